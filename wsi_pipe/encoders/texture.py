"""The embedded default encoder: classical texture features of H&E, without weights and without torch.

Features, in order (``TextureEncoder.feature_names``); sources are in ``texture_measures``:

- ``stain_<h|e|r>_<mean|std|q05|q25|q50|q75|q95>``: optical density of haematoxylin, eosin and the residual;
  ``stain_h_share`` is haematoxylin's share of both, ``stain_correlation`` the correlation of the two over the tile,
  ``stain_tissue`` the fraction of pixels with a sum of both above 0.15 (soft at the edge).
- ``colour_<r|g|b|l|a|b*>_<mean|std|skew>``: colour moments, in units of the full range.
- ``lbp_<place>_<0..9>``: square root of the share of each riu2 pattern (0 to 8 neighbours brighter, 9 is "not
  uniform"). A place is a channel and a scale: luminance of the tile as it is, halved and quartered (``y_1``, ``y_2``,
  ``y_4``), haematoxylin of the halved and the quartered tile (``h_2``, ``h_4``).
- ``glcm_<place>_<statistic>``: contrast and dissimilarity (log1p), homogeneity, energy, entropy (of 8 bits),
  correlation, all of the four directions together; ``anisotropy`` is the spread of contrast over directions,
  relative to its mean, ``shade`` the cube root of the cluster shade.
- ``band_<place>``: log1p of the standard deviation in each band of the pyramid.
- ``blob_...``: nucleus-like blobs of haematoxylin: energy, skewness and density of peaks by size, then area fraction,
  count, areas, extent in the bounding box, elongation, and stain inside against outside.
- ``edge_...``: gradients of luminance and the coherence of their orientation, over the tile and locally.

Lengths are pixels: the features mean what they mean at the grid's resolution. Every feature is of the order of 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.cores import available_cores
from wsi_pipe.encoders.base import EncoderInfo, FeatureArray, PendingFeatures, TileArray, check_finite
from wsi_pipe.encoders.texture_measures import (
    BLOB_NAMES,
    EDGE_NAMES,
    GLCM_LEVELS,
    OD_STEP,
    OD_ZERO,
    PLACES,
    RIU2,
    RIU2_BINS,
    RawMeasures,
    measure,
)
from wsi_pipe.errors import EncoderError

__all__ = ["MIN_TILE_PX", "TextureEncoder"]

Float64 = NDArray[np.float64]

VERSION = "wsi-pipe texture 1"
"""Changes whenever a feature changes: its hash stands where other encoders have that of their weights."""

MIN_TILE_PX = 32
"""Below this the quartered tile has too few pixels for a pattern."""

CHUNK_TILES = 8
"""Tiles to a piece of work: small enough that threads end together, large enough to vectorise over."""

STAIN_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
GLCM_STATISTICS = (
    "contrast", "dissimilarity", "homogeneity", "energy", "entropy", "correlation", "anisotropy", "shade",
)  # fmt: skip
TISSUE_OD = 0.15


def _names() -> tuple[str, ...]:
    names = [
        f"stain_{stain}_{what}"
        for stain in ("h", "e", "r")
        for what in ("mean", "std", *(f"q{round(100 * q):02d}" for q in STAIN_QUANTILES))
    ]
    names += ["stain_h_share", "stain_correlation", "stain_tissue"]
    names += [f"colour_{c}_{what}" for c in ("r", "g", "b", "l", "a", "b*") for what in ("mean", "std", "skew")]
    places = [f"{channel}_{scale}" for channel, scale in PLACES]
    names += [f"lbp_{place}_{pattern}" for place in places for pattern in range(RIU2_BINS)]
    names += [f"glcm_{place}_{statistic}" for place in places for statistic in GLCM_STATISTICS]
    names += [f"band_{place}" for place in places]
    return (*names, *BLOB_NAMES, *EDGE_NAMES)


FEATURE_NAMES = _names()


@dataclass(frozen=True)
class _Pending(PendingFeatures):
    parts: Sequence[Future[FeatureArray]]

    def result(self) -> FeatureArray:
        """Wait; float32 (B, D)."""
        return np.concatenate([part.result() for part in self.parts])


@dataclass(frozen=True)
class _Done(PendingFeatures):
    features: FeatureArray

    def result(self) -> FeatureArray:
        """float32 (B, D), there already."""
        return self.features


class TextureEncoder:
    """Texture features of H&E tiles of any size from 32 px: deterministic, each tile by itself.

    threads: how many encode at once, by default one a core that the process may use. Features are the same bytes
    whatever it is.
    """

    feature_names: tuple[str, ...] = FEATURE_NAMES
    in_flight = 2

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads if threads is not None else available_cores()
        if self.threads < 1:
            raise ValueError(f"threads {self.threads} must be at least 1")
        self._pool: ThreadPoolExecutor | None = None
        self._info = EncoderInfo(
            name="texture",
            slug="texture",
            dim=len(FEATURE_NAMES),
            weights_sha256=hashlib.sha256(VERSION.encode()).hexdigest(),
            licence="Apache-2.0",
            transform={"version": VERSION},
        )

    def __reduce__(self) -> tuple[type[TextureEncoder], tuple[int]]:
        # Threads cannot cross to another process: they are started anew there.
        return type(self), (self.threads,)

    @property
    def info(self) -> EncoderInfo:
        """Facts about the encoder."""
        return self._info

    def encode(self, tiles: TileArray) -> FeatureArray:
        """Features float32 (B, D) of tiles uint8 (B, H, W, 3), RGB.

        Raises EncoderError for another shape or dtype or tiles below 32 px, EncoderOutputError when a feature is not
        finite.
        """
        return self.submit(tiles).result()

    def submit(self, tiles: TileArray) -> PendingFeatures:
        """Start encoding on the threads and return at once; the same features as ``encode``.

        With one thread the work is done before it returns. The caller leaves ``tiles`` as they are until the result
        is there.
        """
        _check(tiles)
        if self.threads == 1 or len(tiles) <= 1:
            return _Done(_features(tiles))
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="texture")
        step = min(CHUNK_TILES, -(-len(tiles) // self.threads))
        return _Pending([self._pool.submit(_features, tiles[i : i + step]) for i in range(0, len(tiles), step)])


def _check(tiles: TileArray) -> None:
    if tiles.dtype != np.uint8 or tiles.ndim != 4 or tiles.shape[3] != 3:
        raise EncoderError(f"tiles must be uint8 (B, H, W, 3), not {tiles.dtype} {tiles.shape}")
    if min(tiles.shape[1:3]) < MIN_TILE_PX:
        raise EncoderError(
            f"texture features need tiles of at least {MIN_TILE_PX} px, not {tiles.shape[2]} x {tiles.shape[1]}",
            remedy=f"give --tile-px {MIN_TILE_PX} or more",
        )


def _features(tiles: TileArray) -> FeatureArray:
    if not len(tiles):
        return np.zeros((0, len(FEATURE_NAMES)), np.float32)
    raw = [measure(np.ascontiguousarray(tile)) for tile in tiles]
    features = np.concatenate(
        [
            _stain(raw),
            _colour(raw),
            _lbp(raw),
            _glcm(np.stack([r.glcm for r in raw])).reshape(len(raw), -1),
            np.log1p(np.stack([r.band for r in raw]).reshape(len(raw), -1)) / 2,
            np.stack([r.blob for r in raw]),
            np.stack([r.edge for r in raw]),
        ],
        axis=1,
    ).astype(np.float32)
    return check_finite(features, "texture")


def _stain(raw: Sequence[RawMeasures]) -> Float64:
    counts = np.stack([r.stain for r in raw])  # (B, 3, 256)
    share = counts / counts.sum(-1, keepdims=True)
    levels = np.arange(256.0)
    mean = (share * levels).sum(-1)
    deviation = np.sqrt((share * (levels - mean[..., None]) ** 2).sum(-1))
    quantiles = np.stack([_quantile(share, q) for q in STAIN_QUANTILES], -1)
    zero = np.array(OD_ZERO)
    columns = (
        np.concatenate([mean[..., None] - zero[:, None], deviation[..., None], quantiles - zero[:, None]], -1) * OD_STEP
    )
    h, e = mean[:, 0], mean[:, 1]
    product = np.array([r.stain_product for r in raw])
    # 16 squared grey levels (0.02 OD) keep the correlation of a flat tile at 0.
    correlation = (product - h * e) / (deviation[:, 0] * deviation[:, 1] + 16.0)
    above = np.clip(((levels - zero[0]) * OD_STEP - 0.5 * TISSUE_OD) / TISSUE_OD, 0.0, 1.0)
    tissue = (share[:, :2] * above).sum(-1).max(-1)
    h, e = np.maximum(h - zero[0], 0.0), np.maximum(e - zero[1], 0.0)
    extra = np.stack([h / (h + e + 4.0), correlation, tissue], -1)
    return np.concatenate([columns.reshape(len(raw), -1), extra], 1)


def _quantile(share: Float64, q: float) -> Float64:
    """Quantile of histograms (..., 256), linear within a level so that one grey level of noise moves it little."""
    cumulative = np.cumsum(share, -1)
    index = np.minimum((cumulative < q).sum(-1), 255)
    upto = np.take_along_axis(cumulative, index[..., None], -1)[..., 0]
    inside = np.take_along_axis(share, index[..., None], -1)[..., 0]
    value: Float64 = index + 0.5 - np.clip((upto - q) / np.maximum(inside, 1e-12), 0.0, 1.0)
    return value


def _colour(raw: Sequence[RawMeasures]) -> Float64:
    moments = np.stack([r.colour for r in raw])  # (B, 6, 3)
    moments[..., 2] = np.cbrt(moments[..., 2])
    return moments.reshape(len(raw), -1)


def _lbp(raw: Sequence[RawMeasures]) -> Float64:
    # Integer sums: a floating product would go through BLAS, whose order of summation depends on the batch.
    counts = np.stack([r.lbp for r in raw]) @ RIU2  # (B, places, 10)
    share: Float64 = np.sqrt(counts / counts.sum(-1, keepdims=True))
    return share.reshape(len(raw), -1)


_FIRST, _SECOND = (a.ravel().astype(np.float64) for a in np.indices((GLCM_LEVELS, GLCM_LEVELS)))
_DIFFERENCE = np.abs(_FIRST - _SECOND)


def _glcm(counts: NDArray[np.int64], *, floor: float = 0.02) -> Float64:
    """GLCM_STATISTICS, float64 (..., 8), of pair counts (..., 4 directions, 256).

    Pairs count both ways round and all directions together, so that energy, entropy and correlation are those of one
    symmetric matrix. floor: squared levels added to the variance under the correlation, which would be noise in a
    flat tile, and to the contrast under the anisotropy.
    """
    total = counts.sum(-2)
    square = total.reshape(*total.shape[:-1], GLCM_LEVELS, GLCM_LEVELS)
    symmetric = (square + np.swapaxes(square, -1, -2)).reshape(total.shape)
    p = symmetric / symmetric.sum(-1, keepdims=True)
    contrast = (p * _DIFFERENCE**2).sum(-1)
    dissimilarity = (p * _DIFFERENCE).sum(-1)
    homogeneity = (p / (1 + _DIFFERENCE**2)).sum(-1)
    energy = np.sqrt((p * p).sum(-1))
    entropy = -(p * np.log2(np.where(p > 0, p, 1.0))).sum(-1) / 8
    mean = (p * _FIRST).sum(-1)[..., None]
    variance = (p * (_FIRST - mean) ** 2).sum(-1)
    covariance = (p * (_FIRST - mean) * (_SECOND - mean)).sum(-1)
    correlation = covariance / (variance + floor)
    shade = np.cbrt((p * (_FIRST + _SECOND - 2 * mean) ** 3).sum(-1)) / 4
    by_direction = (counts * _DIFFERENCE**2).sum(-1) / counts.sum(-1)
    spread = by_direction.max(-1) - by_direction.min(-1)
    anisotropy = spread / (by_direction.mean(-1) + floor)
    return np.stack(
        [np.log1p(contrast), np.log1p(dissimilarity), homogeneity, energy, entropy, correlation, anisotropy, shade], -1
    )
