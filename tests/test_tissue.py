"""Tissue found on made-up overviews whose truth is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from wsi_pipe.config import SegmentSettings, from_mapping, to_mapping
from wsi_pipe.errors import ConfigError, MaskError
from wsi_pipe.overview import read_overview
from wsi_pipe.slides import open_slide
from wsi_pipe.slides.writing.write import write_pyramid
from wsi_pipe.synthetic import SlideSpec, SyntheticSlide
from wsi_pipe.tissue import find_tissue

UM = (8.0, 8.0)
SCALE = (16.0, 16.0)
GLASS = (243, 242, 244)
PINK = (225, 150, 190)
PALE = (240, 226, 237)
VIOLET = (120, 85, 160)
BLUE_INK = (30, 60, 180)
GREEN_INK = (20, 120, 60)
BLACK_INK = (18, 17, 20)
RED_INK = (225, 30, 40)
BROWN = (130, 85, 50)

Picture = NDArray[np.uint8]
Bools = NDArray[np.bool_]


def glass(height: int = 200, width: int = 240, seed: int = 0) -> Picture:
    noise = np.random.default_rng(seed).normal(0, 0.6, (height, width, 3))
    return np.clip(np.array(GLASS) + noise, 0, 255).astype(np.uint8)


def box(picture: Picture, y: int, x: int, height: int, width: int, colour: tuple[int, int, int]) -> Bools:
    """Paint a box, with a little texture; return where it is."""
    where = np.zeros(picture.shape[:2], bool)
    where[y : y + height, x : x + width] = True
    noise = np.random.default_rng(y * 1000 + x).normal(0, 2.0, (int(where.sum()), 1))
    picture[where] = np.clip(np.array(colour) + noise, 0, 255)
    return where


def found(picture: Picture, **options: Any) -> Bools:
    return find_tissue(picture, UM, SCALE, SegmentSettings(**options)).mask


def iou(a: Bools, b: Bools) -> float:
    return float((a & b).sum() / max((a | b).sum(), 1))


@pytest.mark.parametrize("colour", [PINK, PALE, VIOLET, BROWN, (150, 150, 190)])
def test_each_stain_is_tissue_to_within_a_pixel(colour: tuple[int, int, int]) -> None:
    picture = glass()
    where = box(picture, 50, 60, 90, 110, colour)
    mask = found(picture)
    assert (mask & ~ndimage.binary_dilation(where, iterations=2)).sum() == 0
    assert (~mask & ndimage.binary_erosion(where, iterations=2)).sum() == 0


@pytest.mark.parametrize("ink", [BLUE_INK, GREEN_INK, BLACK_INK, RED_INK])
def test_pen_is_left_out_beside_and_on_tissue(ink: tuple[int, int, int]) -> None:
    picture = glass()
    where = box(picture, 50, 60, 110, 90, PINK)
    pen = box(picture, 100, 20, 25, 200, ink)
    mask = found(picture)
    assert (mask & pen).mean() < 0.02
    assert iou(mask, where & ~pen) > 0.9


def test_pen_and_dark_matter_stay_when_asked_to() -> None:
    picture = glass()
    pen = box(picture, 60, 60, 40, 120, BLUE_INK)
    assert iou(found(picture, drop_pen=False), pen) > 0.9
    assert not found(picture).any()
    brownish = glass()
    dark = box(brownish, 60, 60, 40, 120, (50, 38, 44))
    assert iou(found(brownish, drop_dark=False), dark) > 0.9
    assert not found(brownish).any()


def test_only_pen_is_said_so() -> None:
    picture = glass()
    box(picture, 60, 60, 40, 120, GREEN_INK)
    result = find_tissue(picture, UM, SCALE)
    assert result.is_empty
    assert result.empty_reason is not None
    assert "pen or debris" in result.empty_reason
    assert "10.0%" in result.empty_reason  # 40 x 120 of 200 x 240 pixels


def test_stitching_seams_steps_and_unscanned_areas_are_not_tissue() -> None:
    picture = glass(240, 300)
    where = box(picture, 100, 120, 80, 100, PALE)
    gain = np.ones((240, 300, 1))
    gain[:, ::60] *= 0.94
    gain[::60] *= 0.94
    gain[:120, 60:120] *= 0.96
    gain[180:, 120:180] *= 0.92
    picture[:] = np.clip(picture * gain, 0, 255)
    picture[:60, :60] = 255
    picture[:60, 240:] = 0
    assert iou(found(picture), where) > 0.93


def test_a_thin_straight_line_is_an_edge_of_glass_and_a_biopsy_is_not() -> None:
    picture = glass(200, 500)
    box(picture, 30, 20, 4, 450, PINK)
    core = box(picture, 100, 20, 60, 450, PINK)
    assert iou(found(picture), core) > 0.95
    assert found(picture, edge_width_um=0.0)[32, 100]


def test_pieces_and_holes_are_judged_by_their_area_in_um2() -> None:
    picture = glass()
    box(picture, 20, 20, 12, 12, PINK)  # 9216 um2
    box(picture, 20, 60, 14, 14, PINK)  # 12544 um2
    box(picture, 60, 60, 100, 150, PINK)
    box(picture, 80, 80, 16, 16, GLASS)  # 16384 um2
    box(picture, 80, 150, 24, 24, GLASS)  # 36864 um2
    # Sizes are those that remain when the thresholds are applied to sharp boxes.
    plain: dict[str, Any] = {"smooth_um": 0.0, "close_um": 0.0}
    mask = found(picture, **plain)
    assert [mask[26, 26], mask[26, 66], mask[88, 88], mask[92, 162]] == [False, True, True, False]
    mask = found(picture, min_area_um2=9000.0, max_hole_um2=16000.0, **plain)
    assert [mask[26, 26], mask[26, 66], mask[88, 88], mask[92, 162]] == [True, True, False, False]
    # The same slide at twice the resolution gives the same decisions.
    fine = picture.repeat(2, axis=0).repeat(2, axis=1)
    half = find_tissue(fine, (4.0, 4.0), (8.0, 8.0), SegmentSettings(**plain)).mask
    assert [half[52, 52], half[52, 132], half[176, 176], half[184, 324]] == [False, True, True, False]


def test_pale_pieces_need_a_seed() -> None:
    picture = glass()
    where = box(picture, 50, 60, 90, 110, (243, 235, 242))
    stain = np.log10((243 + 1) / (235 + 1))
    assert 0.010 < stain < 0.020
    assert not found(picture).any()
    assert iou(found(picture, stain_min=0.005, stain_seed=0.008, noise_factor=3.0), where) > 0.9


def test_a_slide_that_is_all_tissue_is_all_tissue() -> None:
    for colour in (PINK, VIOLET, PALE):
        picture = glass(60, 80)
        box(picture, 0, 0, 60, 80, colour)
        assert found(picture).all(), colour


@pytest.mark.parametrize("value", [0, 120, 200, 243, 255])
def test_a_blank_slide_is_empty_with_a_reason(value: int) -> None:
    picture = np.full((90, 120, 3), value, np.uint8)
    result = find_tissue(picture, UM, SCALE)
    assert result.is_empty
    assert result.empty_reason


def test_fluorescence_is_empty_with_a_reason() -> None:
    rng = np.random.default_rng(3)
    picture = np.zeros((200, 200, 3), np.uint8)
    signal = ndimage.gaussian_filter(rng.standard_normal((200, 200)), 4)
    picture[..., 2] = np.clip(40 + 900 * signal, 3, 255)
    result = find_tissue(picture, UM, SCALE)
    assert result.is_empty
    assert result.empty_reason is not None
    assert "fluorescence" in result.empty_reason


def test_black_that_was_not_scanned_does_not_make_a_slide_dark() -> None:
    picture = np.zeros((200, 240, 3), np.uint8)
    where = box(picture, 20, 20, 60, 60, PINK)
    assert iou(found(picture), where) > 0.9


def test_a_grey_slide_is_judged_by_density() -> None:
    picture = glass()
    where = box(picture, 50, 60, 90, 110, (150, 150, 150))
    grey = np.repeat(picture.mean(axis=2, keepdims=True), 3, axis=2).astype(np.uint8)
    assert iou(found(grey), where) > 0.95


@pytest.mark.parametrize("method", ["od", "otsu-saturation"])
def test_other_methods_find_plain_tissue(method: str) -> None:
    picture = glass()
    where = box(picture, 50, 60, 90, 110, PINK)
    assert iou(found(picture, method=method), where) > 0.93


def test_methods_differ_where_they_should() -> None:
    """Grey matter: density sees it, colour does not."""
    picture = glass()
    box(picture, 20, 20, 30, 30, PINK)
    box(picture, 100, 100, 60, 60, (120, 120, 120))
    assert not found(picture)[130, 130]
    assert found(picture, method="od", drop_dark=False)[130, 130]


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (3, 2)])
def test_tiny_overviews_do_not_fail(shape: tuple[int, int]) -> None:
    for colour in (PINK, GLASS):
        picture = np.full((*shape, 3), colour, np.uint8)
        assert find_tissue(picture, (100.0, 100.0), SCALE).mask.shape == shape


def test_the_overview_is_not_changed() -> None:
    picture = glass()
    box(picture, 50, 60, 90, 110, PINK)
    before = picture.copy()
    picture.setflags(write=False)
    find_tissue(picture, UM, SCALE)
    assert np.array_equal(picture, before)


@pytest.mark.parametrize(
    ("picture", "um"),
    [
        (np.zeros((4, 4), np.uint8), UM),
        (np.zeros((4, 4, 3), np.float32), UM),
        (np.zeros((4, 4, 3), np.uint8), (0.0, 8.0)),
    ],
)
def test_a_wrong_overview_is_an_error(picture: Any, um: tuple[float, float]) -> None:
    with pytest.raises(MaskError):
        find_tissue(picture, um, SCALE)


@pytest.mark.parametrize("seed", range(20))
def test_synthetic_truth(seed: int) -> None:
    spec = SlideSpec(seed, (1536, 1536), 2.0, seed % 2, pen=True, debris=True, pale=True, holes=True)
    slide = SyntheticSlide(spec)
    rgb, um_per_px, scale = slide.overview(8.0)
    result = find_tissue(rgb, um_per_px, scale)
    truth = slide.truth((rgb.shape[1], rgb.shape[0])).tissue.mask
    assert iou(result.mask, truth) >= 0.95


@pytest.mark.parametrize("seed", [50, 51])
def test_synthetic_truth_through_a_file(seed: int, tmp_path: Path) -> None:
    """JPEG at 20x, opened and averaged as a run does it."""
    spec = SlideSpec(seed, (4096, 3584), 0.5, 1, pen=True, debris=True, pale=True, holes=True)
    made = SyntheticSlide(spec)
    write_pyramid(tmp_path / "slide.svs", made.levels((1, 4)), mpp=0.5)
    slide = open_slide(tmp_path / "slide.svs")
    overview = read_overview(slide, 8.0)
    slide.close()
    result = find_tissue(overview.rgb, overview.um_per_px, overview.scale_l0)
    truth = made.truth((overview.rgb.shape[1], overview.rgb.shape[0])).tissue
    assert truth.scale_l0 == pytest.approx(overview.scale_l0)
    assert iou(result.mask, truth.mask) >= 0.95


# -- settings ---------------------------------------------------------------------------------------------------------


def test_settings_have_help_and_plain_types() -> None:
    import dataclasses

    for f in dataclasses.fields(SegmentSettings):
        assert f.metadata["help"], f.name
        assert type(f.default) in (float, str, bool), f.name
    plain = to_mapping(SegmentSettings())
    assert from_mapping(SegmentSettings, plain) == SegmentSettings()


@pytest.mark.parametrize(
    "options",
    [
        {"method": "magic"},
        {"mpp": 0.0},
        {"min_area_um2": -1.0},
        {"stain_min": float("nan")},
        {"stain_seed": 0.001},
        {"white_min": 300.0},
        {"edge_share": 1.5},
    ],
)
def test_wrong_settings_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        SegmentSettings(**options)


# -- real slides ------------------------------------------------------------------------------------------------------


def real_overview(path: Path, um_per_px: float, mpp: float) -> tuple[Picture, tuple[float, float], tuple[float, float]]:
    import cv2

    slide = open_slide(path, mpp=mpp)
    width, height = slide.pyramid.size_l0
    full = slide.read_region(0, 0, 0, width, height)
    slide.close()
    size = (max(1, round(width * mpp / um_per_px)), max(1, round(height * mpp / um_per_px)))
    scale = (width / size[0], height / size[1])
    small = np.asarray(cv2.resize(full, size, interpolation=cv2.INTER_AREA), np.uint8)
    return small, (scale[0] * mpp, scale[1] * mpp), scale


@pytest.mark.parametrize(
    ("name", "mpp", "low", "high"),
    [
        ("CMU-1-Small-Region.svs", 0.499, 0.35, 0.45),
        ("OS-1-detail.ome.tif", 0.25, 0.99, 1.0),
        ("TCGA-CR-7395-01A-01-TS1.svs", 1.0, 0.60, 0.66),
        ("test3-DAPI-2-387.ndpi", 0.2282, 0.0, 0.0),
    ],
)
def test_real_slides(shared_slides: Path, name: str, mpp: float, low: float, high: float) -> None:
    """Shares of the slide that were judged right by eye."""
    shares = []
    for um in (8.0, 4.0):
        rgb, um_per_px, scale = real_overview(shared_slides / name, um, mpp)
        shares.append(float(find_tissue(rgb, um_per_px, scale).mask.mean()))
    assert low <= shares[0] <= high
    assert abs(shares[0] - shares[1]) < 0.02
