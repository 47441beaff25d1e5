"""How well a tile is in focus, and whether tissue lies folded or under a bubble there. Pure functions on uint8 tiles.

*Sharpness* is the standard deviation of the Laplacian of luminance at the tile's own resolution, the usual measure of
focus (Pech-Pacheco et al. 2000), over that of the structures 8 to 36 pixels wide. The first falls with blur, the second
stays until the blur is as wide, and both rise alike with contrast: so their ratio says how fine the detail is and not
how much stain there is. Sensor noise is detail too: as much of it as the calmest quarter of the pixels shows is taken
off first. At 20x about 1 is in focus, 0.35 a Gaussian blur of 1 um, 0 one of 2 um or more.

*Fold*: tissue that lies twice is twice as dense as the slide's tissue is otherwise. *Bubble*: the rim of an air bubble
is dark and has no colour, as have dust and black pen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BLURRED_BELOW",
    "FOLDED_FROM",
    "QUALITY_METHODS",
    "QUALITY_VERSION",
    "LevelQuality",
    "TileMeasures",
    "fold_shares",
    "measure_tiles",
    "quality_counts",
]

Floats = NDArray[np.float32]
Counts = NDArray[np.uint16]

QUALITY_VERSION = 1
"""Raised when a change to the measures changes their values."""

QUALITY_METHODS: Mapping[str, str] = {
    "sharpness": "standard deviation of the Laplacian less noise, over that of structures of 8 to 36 px, times 0.2",
    "fold": "share of the tile that is 1.6 times as dense as the slide's dense tissue, at 16 um",
    "bubble": "share of the tile that is dark and without colour, at 4 um",
}

BLURRED_BELOW = 0.3
"""Sharpness of tiles that reports count as blurred: at 20x, what a Gaussian of a little over 1 um leaves."""
FOLDED_FROM = 0.1
"""Share of a tile from which reports count it as folded, or as under a bubble."""

_SHRINK = 4
_AROUND = 9
_BORDER_PX = 4
_LEAST_PX = 32
_MOST_NOISE = 6.0
_NOISE_FACTOR = 1.3
_FAINTEST = 1.5
_SCALE = 0.2
_FOLD_UM = 16.0
_BUBBLE_UM = 4.0
_DARK_OD = 0.35
_GREY_SHARE = 0.8
_BINS = 48
_BIN_OD = 0.05
_TISSUE_OD = 0.10
_FOLD_FACTOR = 1.6
_LEAST_FOLD_OD = 0.45

_OD = (2.3922 - np.log10(np.arange(256, dtype=np.float32) + 1)).clip(0)
"""Optical density of a grey level on glass of 245."""


class TileMeasures(NamedTuple):
    """What is measured of tiles one by one.

    sharpness, bubble: float32 (B,). density: uint16 (B, 48), low-pass pixels by mean optical density in steps of 0.05.
    """

    sharpness: Floats
    bubble: Floats
    density: Counts


def measure_tiles(tiles: NDArray[np.uint8], mpp: float) -> TileMeasures:
    """Measures of tiles, uint8 (B, H, W, 3), each by itself; mpp: um per tile pixel."""
    if not len(tiles):
        return TileMeasures(np.zeros(0, np.float32), np.zeros(0, np.float32), np.zeros((0, _BINS), np.uint16))
    sharpness = np.array([_sharpness(tile) for tile in tiles], np.float32)
    return TileMeasures(sharpness, *_density(tiles, mpp))


def _sharpness(tile: NDArray[np.uint8]) -> float:
    import cv2

    if min(tile.shape[:2]) < _LEAST_PX:
        return 0.0
    # Focus changes over millimetres: the middle half of the rows speaks for the tile, at half the cost.
    rows = tile.shape[0] // 4
    grey = cv2.cvtColor(tile[rows : tile.shape[0] - rows], cv2.COLOR_RGB2GRAY)
    # With the 5 x 5 kernel, which smooths along as it differentiates: the 3 x 3 one sees little but the sensor's noise.
    laplacian = cv2.Laplacian(grey, cv2.CV_16S, ksize=5, scale=0.25)[_BORDER_PX:-_BORDER_PX, _BORDER_PX:-_BORDER_PX]
    fine = float(cv2.norm(laplacian)) ** 2 / laplacian.size
    sample = np.abs(laplacian[::3, ::3]).ravel()
    quarter = len(sample) // 4
    # Of normal noise a quarter lies within 0.319 standard deviations.
    noise = min(float(np.partition(sample, quarter)[quarter]) + 0.5, _MOST_NOISE) / 0.319
    detail = max(fine - _NOISE_FACTOR * noise**2, 0.0)
    small = cv2.resize(grey, (grey.shape[1] // _SHRINK, grey.shape[0] // _SHRINK), interpolation=cv2.INTER_AREA)
    around = cv2.blur(small, (_AROUND, _AROUND))
    structure = float(cv2.meanStdDev(cv2.subtract(small, around, dtype=cv2.CV_16S))[1][0, 0])
    return float(np.sqrt(detail)) / max(structure, _FAINTEST) * _SCALE


def _density(tiles: NDArray[np.uint8], mpp: float) -> tuple[Floats, Counts]:
    """The dark grey share of each tile, and counts of its low-pass pixels by mean optical density."""
    count, height, width = tiles.shape[:3]
    step = max(round(_BUBBLE_UM / mpp), 1)
    size = (max(width // step, 1), max(height // step, 1))
    od = _OD[np.stack([_shrunk(tile, size) for tile in tiles])]
    red, green, blue = od[..., 0], od[..., 1], od[..., 2]
    least, most = np.minimum(np.minimum(red, green), blue), np.maximum(np.maximum(red, green), blue)
    grey = ((least >= _DARK_OD) & (least >= _GREY_SHARE * most)).mean(axis=(1, 2))
    coarse = max(min(round(_FOLD_UM / (mpp * step)), *size), 1)
    rows, columns = size[1] // coarse, size[0] // coarse
    mean = ((red + green + blue) / 3)[:, : rows * coarse, : columns * coarse]
    mean = mean.reshape(count, rows, coarse, columns, coarse).mean(axis=(2, 4))
    bins = np.minimum((mean / _BIN_OD).astype(np.int64), _BINS - 1).reshape(count, -1)
    places = bins + np.arange(count)[:, None] * _BINS
    counts = np.bincount(places.ravel(), minlength=count * _BINS).reshape(count, _BINS)
    return grey.astype(np.float32), counts.astype(np.uint16)


def _shrunk(tile: NDArray[np.uint8], size_px: tuple[int, int]) -> NDArray[np.uint8]:
    """Area means. Halved first, as often as it fits: cv2 has a quick way for that and a slow one for other factors."""
    import cv2

    height, width = tile.shape[:2]
    while width % 2 == height % 2 == 0 and width >= 2 * size_px[0] and height >= 2 * size_px[1]:
        width, height = width // 2, height // 2
        tile = np.asarray(cv2.resize(tile, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
    if (width, height) == size_px:
        return tile
    return np.asarray(cv2.resize(tile, size_px, interpolation=cv2.INTER_AREA), np.uint8)


def fold_shares(density: Counts) -> Floats:
    """The share of each tile of one level of one slide that is a fold, float32 (N,), from the counts of all its tiles.

    A fold is 1.6 times as dense as the slide's dense tissue (the 75th percentile of its density), and 0.45 OD or more.
    """
    counts = density.astype(np.float64)
    first = round(_TISSUE_OD / _BIN_OD)
    tissue = counts[:, first:].sum(axis=0)
    if tissue.sum() == 0:
        return np.zeros(len(counts), np.float32)
    dense = first + int(np.searchsorted(np.cumsum(tissue), 0.75 * tissue.sum()))
    limit = max((dense + 0.5) * _BIN_OD * _FOLD_FACTOR, _LEAST_FOLD_OD)
    folded = counts[:, min(int(np.ceil(limit / _BIN_OD)), _BINS - 1) :].sum(axis=1)
    return np.asarray(folded / np.maximum(counts.sum(axis=1), 1), np.float32)


class LevelQuality:
    """Gathers the measures of one level's tiles, in any order, until ``values`` gives them for all."""

    def __init__(self, count: int, mpp: float) -> None:
        self._mpp = mpp
        self._sharpness = np.zeros(count, np.float32)
        self._bubble = np.zeros(count, np.float32)
        self._density = np.zeros((count, _BINS), np.uint16)

    def add(self, index: NDArray[np.int64], tiles: NDArray[np.uint8]) -> None:
        """Measure tiles, uint8 (B, H, W, 3), of the rows ``index``."""
        measures = measure_tiles(tiles, self._mpp)
        self._sharpness[index] = measures.sharpness
        self._bubble[index] = measures.bubble
        self._density[index] = measures.density

    def values(self) -> dict[str, Floats]:
        """By the names of ``QUALITY_METHODS``, float32 (N,)."""
        return {"sharpness": self._sharpness, "fold": fold_shares(self._density), "bubble": self._bubble}


def quality_counts(label: str, values: Mapping[str, Floats]) -> dict[str, float]:
    """Figures of one level of one slide for its outcome: "sharpness_p5.20x", "sharpness_median.20x",
    "sharpness_p95.20x", and how many tiles are blurred, folded or under a bubble ("blurred_tiles.20x" and so on).
    """
    sharpness = values.get("sharpness")
    if sharpness is None or not len(sharpness):
        return {}
    low, middle, high = (float(v) for v in np.percentile(sharpness, (5, 50, 95)))
    figures = {"sharpness_p5": low, "sharpness_median": middle, "sharpness_p95": high}
    figures["blurred_tiles"] = float(np.count_nonzero(sharpness < BLURRED_BELOW))
    for name, key in (("fold", "folded_tiles"), ("bubble", "bubble_tiles")):
        if name in values:
            figures[key] = float(np.count_nonzero(values[name] >= FOLDED_FROM))
    return {f"{key}.{label}": value for key, value in figures.items()}
