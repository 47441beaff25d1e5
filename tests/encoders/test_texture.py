"""Texture features: known answers, other implementations, and what a feature must not depend on."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from skimage import data
from skimage.feature import graycomatrix, graycoprops, local_binary_pattern

from wsi_pipe.encoders.base import Encoder
from wsi_pipe.encoders.texture import GLCM_STATISTICS, MIN_TILE_PX, TextureEncoder, _glcm, _quantile
from wsi_pipe.encoders.texture_measures import (
    GLCM_LEVELS,
    MACENKO_E,
    MACENKO_H,
    OD_STEP,
    OD_ZERO,
    RIU2,
    glcm_counts,
    lbp_counts,
    measure,
    stain_planes,
)
from wsi_pipe.errors import EncoderError
from wsi_pipe.slides import open_slide

UInt8 = NDArray[np.uint8]
NAMES = TextureEncoder.feature_names


def column(name: str) -> int:
    return NAMES.index(name)


def stained(h: NDArray[np.float64] | float, e: NDArray[np.float64] | float, noise: float = 0.0, seed: int = 0) -> UInt8:
    """RGB of optical densities of haematoxylin and eosin, the inverse of the unmixing."""
    h, e = np.broadcast_arrays(np.asarray(h, float), np.asarray(e, float))
    density = h[..., None] * MACENKO_H + e[..., None] * MACENKO_E
    rgb = 256 * 10**-density - 1
    rgb = rgb + np.random.default_rng(seed).normal(0, noise, rgb.shape) if noise else rgb
    return np.clip(np.rint(rgb), 0, 255).astype(np.uint8)


def patches(image: UInt8, size_px: int, step_px: int) -> UInt8:
    height, width = image.shape[:2]
    rows, columns = range(0, height - size_px + 1, step_px), range(0, width - size_px + 1, step_px)
    return np.stack([image[y : y + size_px, x : x + size_px] for y in rows for x in columns])


def jpeg(image: UInt8, quality: int) -> UInt8:
    _, data_ = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return np.asarray(cv2.imdecode(data_, cv2.IMREAD_COLOR), np.uint8)


@pytest.fixture(scope="module")
def encoder() -> TextureEncoder:
    return TextureEncoder(threads=2)


@pytest.fixture(scope="module")
def tissue() -> UInt8:
    """A stained section, uint8 (512, 512, 3), that comes with scikit-image."""
    return np.asarray(data.immunohistochemistry(), np.uint8)


def test_it_is_an_encoder_with_a_name_for_every_feature(encoder: TextureEncoder) -> None:
    assert isinstance(encoder, Encoder)
    assert encoder.info.dim == len(NAMES) >= 128
    assert len(set(NAMES)) == len(NAMES)
    assert len(encoder.info.weights_sha256) == 64
    features = encoder.encode(np.zeros((3, 64, 64, 3), np.uint8))
    assert features.shape == (3, len(NAMES))
    assert features.dtype == np.float32
    assert encoder.encode(np.zeros((0, 64, 64, 3), np.uint8)).shape == (0, len(NAMES))


@pytest.mark.parametrize("seed", range(3))
def test_lbp_equals_scikit_image(seed: int) -> None:
    # Every value once, so that no neighbour ties with its centre and rounding decides nothing.
    image = np.random.default_rng(seed).permutation(61 * 48).reshape(61, 48)
    expected = local_binary_pattern(image, 8, 1, method="uniform")[1:-1, 1:-1]
    ours = lbp_counts(image.astype(np.float32), 0.0) @ RIU2
    # skimage rounds the neighbours' positions to 5 digits: a pixel in a thousand may differ.
    assert np.abs(ours - np.bincount(expected.astype(int).ravel(), minlength=10)).sum() <= 4


def test_lbp_with_a_tolerance_equals_the_definition() -> None:
    image = np.random.default_rng(5).uniform(0, 30, (20, 23)).astype(np.float32)
    expected = np.zeros(10, int)
    for y in range(1, 19):
        for x in range(1, 22):
            ring = []
            for k in range(8):
                dy, dx = -np.sin(2 * np.pi * k / 8), np.cos(2 * np.pi * k / 8)
                y0, x0 = int(np.floor(y + dy + 1e-9)), int(np.floor(x + dx + 1e-9))
                fy, fx = y + dy - y0, x + dx - x0
                block = image[y0 : y0 + 2, x0 : x0 + 2].astype(float)
                value = np.array([1 - fy, fy])[: len(block)] @ block @ np.array([1 - fx, fx])[: block.shape[1]]
                ring.append(value >= image[y, x] + 3.0)
            changes = sum(a != b for a, b in zip(ring, ring[1:] + ring[:1], strict=True))
            expected[sum(ring) if changes <= 2 else 9] += 1
    assert (lbp_counts(image, 3.0) @ RIU2).tolist() == expected.tolist()


def test_a_flat_patch_with_noise_stays_one_pattern() -> None:
    noise = np.random.default_rng(0).integers(-1, 2, (64, 64))
    counts = lbp_counts((128 + noise).astype(np.float32), 3.0) @ RIU2
    assert counts[0] == counts.sum() == 62 * 62


@pytest.mark.parametrize("size", [(40, 33), (64, 64)])
def test_cooccurrence_equals_scikit_image(size: tuple[int, int]) -> None:
    image = cv2.GaussianBlur(np.random.default_rng(1).integers(0, 256, size).astype(np.uint8), (5, 5), 1.5)
    quantised = (image // 16).astype(np.uint8)
    angles = [0, np.pi / 4, np.pi / 2, 3 * np.pi / 4]
    matrices = graycomatrix(quantised, [1], angles, levels=GLCM_LEVELS, symmetric=True)
    ours = glcm_counts(quantised)
    square = ours.sum(0).reshape(GLCM_LEVELS, GLCM_LEVELS)
    assert np.array_equal(square + square.T, matrices.sum((2, 3)))

    together = matrices.sum(3, keepdims=True)
    values = dict(zip(GLCM_STATISTICS, _glcm(ours[None], floor=0.0)[0], strict=True))
    for name in ("homogeneity", "energy", "correlation"):
        assert values[name] == pytest.approx(graycoprops(together, name)[0, 0], rel=1e-9), name
    for name in ("contrast", "dissimilarity"):
        assert np.expm1(values[name]) == pytest.approx(graycoprops(together, name)[0, 0], rel=1e-9), name
    assert values["entropy"] * 8 == pytest.approx(graycoprops(together, "entropy")[0, 0] / np.log(2), rel=1e-6)
    by_direction = graycoprops(matrices, "contrast")[0]
    assert values["anisotropy"] == pytest.approx(np.ptp(by_direction) / by_direction.mean(), rel=1e-9)


@pytest.mark.parametrize(("h", "e"), [(0.8, 0.0), (0.0, 0.6), (0.5, 0.3), (0.1, 0.2)])
def test_stains_are_unmixed(encoder: TextureEncoder, h: float, e: float) -> None:
    tile = np.broadcast_to(stained(h, e), (1, 64, 64, 3)).copy()
    planes = (stain_planes(tile[0]).astype(float) - OD_ZERO) * OD_STEP
    assert planes[..., 0].mean() == pytest.approx(h, abs=0.02)
    assert planes[..., 1].mean() == pytest.approx(e, abs=0.02)
    features = encoder.encode(tile)[0]
    assert features[column("stain_h_mean")] == pytest.approx(h, abs=0.02)
    assert features[column("stain_e_q50")] == pytest.approx(e, abs=0.02)
    assert features[column("stain_r_mean")] == pytest.approx(0, abs=0.02)
    assert features[column("stain_h_share")] == pytest.approx(h / (h + e), abs=0.06)


def test_quantiles_follow_the_data() -> None:
    grey = np.random.default_rng(0).normal(120, 25, 20_000).clip(0, 255).astype(np.uint8)
    share = np.bincount(grey, minlength=256) / grey.size
    for q in (0.05, 0.25, 0.5, 0.95):
        # a level g holds the values of [g - 1/2, g + 1/2)
        assert _quantile(share, q) == pytest.approx(np.quantile(grey, q), abs=0.6)


def test_colour_moments_are_those_of_the_pixels(tissue: UInt8) -> None:
    tile = tissue[:64, :64]
    half = cv2.GaussianBlur(cv2.resize(tile, (32, 32), interpolation=cv2.INTER_AREA), (5, 5), 1.0) / 255.0
    moments = measure(np.ascontiguousarray(tile)).colour
    for channel in range(3):
        values = half[..., channel].ravel()
        assert moments[channel, 0] == pytest.approx(values.mean(), abs=1e-9)
        assert moments[channel, 1] == pytest.approx(values.std(), abs=1e-9)
        assert moments[channel, 2] == pytest.approx(((values - values.mean()) ** 3).mean(), abs=1e-9)


def test_blobs_are_counted_and_sized(encoder: TextureEncoder) -> None:
    def nuclei(n: int, radius: float) -> UInt8:
        h = np.zeros((256, 256))
        for k in range(n):
            centre = (32 + 64 * (k % 4), 32 + 64 * (k // 4))
            cv2.circle(h, centre, int(radius), 0.9, -1, cv2.LINE_8)
        return stained(cv2.GaussianBlur(h, (0, 0), 1.0), 0.2)

    four, twelve, large = encoder.encode(np.stack([nuclei(4, 7), nuclei(12, 7), nuclei(4, 12)]))
    for features, n in ((four, 4), (twelve, 12), (large, 4)):
        assert np.expm1(2 * features[column("blob_count")]) * 128**2 / 1000 == pytest.approx(n, abs=0.01)
    area = column("blob_area_fraction")
    assert twelve[area] == pytest.approx(3 * four[area], rel=0.01)
    assert large[column("blob_log_area_mean")] > four[column("blob_log_area_mean")] + 0.1
    assert four[column("blob_haematoxylin_contrast")] > 0.3
    assert abs(four[column("blob_eosin_contrast")]) < 0.1


def test_orientation_is_coherent_in_fibres_alone(encoder: TextureEncoder) -> None:
    y, x = np.indices((128, 128))
    fibres = stained(0.2 + 0.15 * np.sin(0.5 * x + 0.3 * y), 0.5)
    noise = stained(0.2 + cv2.GaussianBlur(np.random.default_rng(0).normal(0, 1, (128, 128)), (0, 0), 2.0), 0.5)
    along, across = encoder.encode(np.stack([fibres, noise]))
    assert along[column("edge_global_coherence_2")] > 0.9
    assert across[column("edge_global_coherence_2")] < 0.2
    assert along[column("glcm_y_2_anisotropy")] > 3 * across[column("glcm_y_2_anisotropy")]


@pytest.mark.parametrize("grey", [0, 1, 127, 254, 255])
@pytest.mark.parametrize("size", [MIN_TILE_PX, 33, 256])
def test_constant_tiles_give_finite_features_of_the_order_of_one(encoder: TextureEncoder, grey: int, size: int) -> None:
    features = encoder.encode(np.full((2, size, size, 3), grey, np.uint8))
    assert np.isfinite(features).all()
    assert np.abs(features).max() < 4
    assert np.array_equal(features[0], features[1])


def test_tissue_gives_features_of_the_order_of_one(encoder: TextureEncoder, tissue: UInt8) -> None:
    features = encoder.encode(patches(tissue, 128, 64))
    assert np.abs(features).max() < 4
    # A feature that never moves would be dead weight; blobs' extent and such may be still on one kind of tissue.
    assert (features.std(0) > 1e-4).mean() > 0.97
    assert np.array_equal(features, features.astype(np.float16).astype(np.float32)) is False
    assert np.abs(features - features.astype(np.float16)).max() < 2e-3


@settings(max_examples=15, deadline=None)
@given(
    size=st.tuples(st.integers(32, 70), st.integers(32, 70)),
    batch=st.integers(1, 19),
    threads=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_a_tile_does_not_depend_on_its_batch_or_the_threads(
    size: tuple[int, int], batch: int, threads: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    tiles = rng.integers(0, 256, (batch, *size, 3)).astype(np.uint8)
    one = TextureEncoder(threads=1)
    together = one.encode(tiles)
    alone = np.concatenate([one.encode(tile[None]) for tile in tiles])
    several = TextureEncoder(threads=threads)
    assert together.tobytes() == alone.tobytes() == several.encode(tiles).tobytes()
    assert several.submit(tiles[::-1]).result().tobytes() == together[::-1].tobytes()


def test_several_batches_may_be_under_way(encoder: TextureEncoder, tissue: UInt8) -> None:
    tiles = patches(tissue, 64, 64)
    pending = [encoder.submit(tiles[i : i + 7]) for i in range(0, len(tiles), 7)]
    assert np.concatenate([p.result() for p in pending]).tobytes() == encoder.encode(tiles).tobytes()


def test_turning_and_mirroring_change_next_to_nothing(encoder: TextureEncoder, tissue: UInt8) -> None:
    tile = tissue[:256, :256]
    turned = np.stack([tile, np.rot90(tile), tile[::-1], np.transpose(tile, (1, 0, 2))])
    features = encoder.encode(turned)
    assert np.abs(features - features[0]).max() < 0.02


@pytest.mark.parametrize(("quality", "size"), [(80, 128), (50, 128), (80, 64)])
def test_a_tile_stays_next_to_its_own_recompression(
    encoder: TextureEncoder, tissue: UInt8, quality: int, size: int
) -> None:
    original = encoder.encode(patches(tissue, size, size))
    again = encoder.encode(patches(jpeg(tissue, quality), size, size))
    spread = original.std(0) + 1e-6
    distance = np.linalg.norm(original[:, None] / spread - again[None] / spread, axis=2)
    assert (distance.argmin(1) == np.arange(len(original))).mean() >= 0.95


def kinds_of_tissue(kind: str, n: int, seed: int) -> UInt8:
    """H&E-like tiles, uint8 (n, 128, 128, 3), all with the same mean and spread of both stains."""
    rng = np.random.default_rng(seed)
    tiles = []
    for i in range(n):
        plane = np.zeros((128, 128), np.float32)
        if kind == "nuclei":
            for x, y in rng.integers(0, 128, (60, 2)):
                cv2.circle(plane, (int(x), int(y)), int(rng.integers(3, 6)), 1.0, -1)
        elif kind == "fibres":
            angle, freq = rng.uniform(0, np.pi), rng.uniform(0.25, 0.45)
            yy, xx = np.indices(plane.shape) + cv2.GaussianBlur(rng.normal(0, 60, (2, 128, 128)), (0, 0), 12)
            plane = np.sin(freq * (np.cos(angle) * xx + np.sin(angle) * yy)).astype(np.float32)
        else:
            plane = cv2.GaussianBlur(rng.normal(0, 1, plane.shape), (0, 0), 3.0).astype(np.float32)
        plane = cv2.GaussianBlur(plane, (0, 0), 0.8)
        plane = (plane - plane.mean()) / plane.std()
        gain = rng.uniform(0.9, 1.1)
        tiles.append(stained(gain * (0.4 + 0.12 * plane), gain * 0.4, noise=3.0, seed=seed + i))
    return np.stack(tiles)


def linear_accuracy(train: dict[str, NDArray[np.float32]], test: dict[str, NDArray[np.float32]]) -> float:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def rows(part: dict[str, NDArray[np.float32]]) -> tuple[NDArray[np.float32], list[str]]:
        return np.concatenate(list(part.values())), [kind for kind, values in part.items() for _ in values]

    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
    return float(model.fit(*rows(train)).score(*rows(test)))


def split(
    encode: Callable[[UInt8], NDArray[np.float32]], images: dict[str, tuple[UInt8, UInt8]]
) -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.float32]]]:
    return {k: encode(a) for k, (a, _) in images.items()}, {k: encode(b) for k, (_, b) in images.items()}


def test_a_linear_model_tells_kinds_of_tissue_of_one_colour_apart(encoder: TextureEncoder) -> None:
    kinds = ("nuclei", "fibres", "cloud")
    images = {k: (kinds_of_tissue(k, 20, 100 * i), kinds_of_tissue(k, 20, 5000 + 100 * i)) for i, k in enumerate(kinds)}
    assert linear_accuracy(*split(encoder.encode, images)) >= 0.95
    # The colours alone do not tell: it is the textures that do.
    colours = [i for i, name in enumerate(NAMES) if name in ("stain_h_mean", "stain_e_mean", "colour_r_mean")]
    assert linear_accuracy(*split(lambda tiles: encoder.encode(tiles)[:, colours], images)) < 0.7


def test_a_linear_model_tells_photographed_textures_apart(encoder: TextureEncoder) -> None:
    images = {}
    for name in ("brick", "grass", "gravel"):
        grey = np.asarray(getattr(data, name)(), np.float64)
        grey = (grey - grey.mean()) / grey.std()
        tiles = patches(stained(np.clip(0.45 + 0.12 * grey, 0, 1.2), 0.4), 96, 64)
        half = len(tiles) // 2
        images[name] = (tiles[: half - 7], tiles[half + 7 :])  # rows between, so that no pixel is in both
    assert linear_accuracy(*split(encoder.encode, images)) >= 0.97


def test_it_crosses_to_another_process() -> None:
    encoder = TextureEncoder(threads=3)
    tiles = np.random.default_rng(0).integers(0, 256, (9, 40, 40, 3)).astype(np.uint8)
    expected = encoder.encode(tiles)
    copy = pickle.loads(pickle.dumps(encoder))
    assert copy.threads == 3
    assert copy.encode(tiles).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((2, 64, 64, 4), np.uint8, "must be uint8"),
        ((64, 64, 3), np.uint8, "must be uint8"),
        ((2, 64, 64, 3), np.float32, "must be uint8"),
        ((2, 31, 64, 3), np.uint8, "at least 32 px"),
    ],
)
def test_other_tiles_are_refused(
    encoder: TextureEncoder, shape: tuple[int, ...], dtype: type[np.generic], message: str
) -> None:
    with pytest.raises(EncoderError, match=message):
        encoder.encode(np.zeros(shape, dtype))  # type: ignore[arg-type]


def test_no_threads_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        TextureEncoder(threads=0)


def test_two_encodings_of_one_slide_keep_their_tiles_together(encoder: TextureEncoder, shared_slides: Path) -> None:
    """An SVS and its DICOM twin: tiles find their own twin, in features standardised over the slide."""
    svs = open_slide(shared_slides / "CMU-1-Small-Region.svs")
    dicom = open_slide(shared_slides / "CMU-1-Small-Region-dicom")
    pictures = []
    for slide in (svs, dicom):
        with closing(slide):
            pictures.append(slide.read_region(0, 0, 0, *svs.pyramid.size_l0))
    assert np.abs(pictures[0].astype(int) - pictures[1]).mean() > 1, "the two are not the same bytes"
    for size, halvings in ((256, 0), (64, 2)):
        tiles = []
        for picture in pictures:
            side = 2**halvings
            small = cv2.resize(
                picture, (picture.shape[1] // side, picture.shape[0] // side), interpolation=cv2.INTER_AREA
            )
            tiles.append(patches(np.asarray(small, np.uint8), size, size))
        tissue = tiles[0].mean((1, 2, 3)) < 225
        one, other = (encoder.encode(t[tissue]) for t in tiles)
        spread = one.std(0) + 1e-6
        distance = np.linalg.norm(one[:, None] / spread - other[None] / spread, axis=2)
        assert (distance.argmin(1) == np.arange(len(one))).mean() >= 0.95
