"""Tissue found on made-up overviews whose truth is known, and masks in and out of GeoJSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy import ndimage

from wsi_pipe.config import SegmentSettings, from_mapping, to_mapping
from wsi_pipe.errors import ConfigError, MaskError
from wsi_pipe.geometry import TissueMask
from wsi_pipe.overview import read_overview
from wsi_pipe.slides import open_slide
from wsi_pipe.slides.writing.write import write_pyramid
from wsi_pipe.synthetic import SlideSpec, SyntheticSlide
from wsi_pipe.tissue import (
    fill_polygons,
    find_tissue,
    geojson_notices,
    mask_from_geojson,
    mask_to_geojson,
    stored_mask,
    trace_mask,
)

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


# -- outlines ---------------------------------------------------------------------------------------------------------

masks = st.tuples(st.integers(1, 14), st.integers(1, 14)).flatmap(lambda shape: arrays(np.bool_, shape))


@settings(max_examples=300, deadline=None)
@given(masks)
def test_outlines_fill_to_the_same_mask_and_are_valid(mask: Bools) -> None:
    polygons = trace_mask(mask)
    assert np.array_equal(fill_polygons(polygons, (mask.shape[1], mask.shape[0])), mask)
    shapes = [shapely.Polygon(rings[0], rings[1:]) for rings in polygons]
    assert all(shape.is_valid for shape in shapes)
    assert sum(shape.area for shape in shapes) == mask.sum()
    assert len(polygons) == ndimage.label(mask)[1]
    for rings in polygons:
        for ring in rings:
            steps = np.roll(ring, -1, axis=0) - ring
            # Only turns: each step is along one axis, and axes alternate.
            assert ((steps == 0).sum(axis=1) == 1).all()
            assert ((steps[:, 0] == 0) != (np.roll(steps[:, 0], -1) == 0)).all()


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.floats(-3, 15), st.floats(-3, 15)), min_size=3, max_size=7), min_size=1, max_size=3)
)
def test_filling_agrees_with_shapely_at_pixel_centres(points: list[list[tuple[float, float]]]) -> None:
    shapes = [shapely.Polygon(p) for p in points]
    shapes = [s for s in shapes if s.is_valid and s.area > 0]
    polygons = [[np.asarray(s.exterior.coords)[:-1]] for s in shapes]
    mask = fill_polygons(polygons, (12, 11))
    for row in range(11):
        for column in range(12):
            centre = shapely.Point(column + 0.5, row + 0.5)
            if any(s.exterior.distance(centre) < 1e-9 for s in shapes):
                continue  # on an edge either answer is right
            assert mask[row, column] == any(s.contains(centre) for s in shapes)


def test_large_masks_are_exact() -> None:
    rng = np.random.default_rng(8)
    mask = ndimage.zoom(rng.random((30, 40)), 60, order=1) > 0.5
    assert np.array_equal(fill_polygons(trace_mask(mask), (mask.shape[1], mask.shape[0])), mask)


# -- GeoJSON ----------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(masks, st.floats(0.3, 300), st.floats(0.3, 300))
def test_geojson_gives_the_mask_back(mask: Bools, scale_x: float, scale_y: float) -> None:
    scale = (scale_x, scale_y)
    size_l0 = (int(np.ceil(mask.shape[1] * scale_x)), int(np.ceil(mask.shape[0] * scale_y)))
    original = TissueMask(mask, scale, None if mask.any() else "blank")
    text = json.dumps(mask_to_geojson(original, {"mpp": 8.0}), allow_nan=False)
    back = mask_from_geojson(json.loads(text), size_l0, scale)
    assert np.array_equal(back.mask, mask)
    assert back.empty_reason == original.empty_reason
    stored = stored_mask(json.loads(text))
    assert stored is not None
    assert (stored.scale_l0, stored.size_px) == (scale, (mask.shape[1], mask.shape[0]))
    assert stored.settings == {"mpp": 8.0}
    assert np.array_equal(mask_from_geojson(json.loads(text), size_l0).mask, mask)


def square(x: float, y: float, side: float, name: str | None = None) -> dict[str, Any]:
    ring = [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]
    properties: dict[str, Any] = {"objectType": "annotation"}
    if name is not None:
        properties["classification"] = {"name": name, "color": [1, 2, 3]}
    return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": properties}


def test_geojson_has_what_qupath_reads() -> None:
    mask = np.zeros((20, 30), bool)
    mask[2:12, 3:18] = True
    mask[5:8, 6:9] = False
    mask[15:18, 20:25] = True
    data = mask_to_geojson(TissueMask(mask, (16.0, 16.5)))
    assert data["type"] == "FeatureCollection"
    first, second = data["features"]
    assert first["type"] == "Feature"
    assert first["properties"]["objectType"] == "annotation"
    assert first["properties"]["classification"]["name"] == "Tissue"
    assert len(first["properties"]["classification"]["color"]) == 3
    assert first["geometry"]["type"] == "Polygon"
    outer, hole = first["geometry"]["coordinates"]
    assert sorted(map(tuple, outer[:-1])) == [(48, 33.0), (48, 198.0), (288, 33.0), (288, 198.0)]
    assert outer[0] == outer[-1]
    assert sorted(map(tuple, hole[:-1])) == [(96, 82.5), (96, 132.0), (144, 82.5), (144, 132.0)]
    assert len(second["geometry"]["coordinates"]) == 1


def as_feature(geometry: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Feature", "geometry": geometry, "properties": {}}


FORMS: dict[str, Callable[[dict[str, Any], dict[str, Any]], Any]] = {
    "FeatureCollection": lambda a, b: {"type": "FeatureCollection", "features": [a, b]},
    "list": lambda a, b: [a, b],
    "MultiPolygon": lambda a, b: as_feature(
        {"type": "MultiPolygon", "coordinates": [a["geometry"]["coordinates"], b["geometry"]["coordinates"]]}
    ),
    "GeometryCollection": lambda a, b: {"type": "GeometryCollection", "geometries": [a["geometry"], b["geometry"]]},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_geojson(form: str) -> None:
    data = FORMS[form](square(10, 10, 40), square(30, 30, 40, "Tumor"))
    expected = np.zeros((10, 12), bool)
    expected[1:5, 1:5] = True
    expected[3:7, 3:7] = True  # where the two overlap is tissue still
    assert np.array_equal(mask_from_geojson(data, (120, 100), (10.0, 10.0)).mask, expected)


def test_areas_to_ignore_are_cut_out() -> None:
    expected = np.zeros((10, 12), bool)
    expected[1:5, 1:5] = True
    expected[3:7, 3:7] = False
    for name in ("Ignore*", "ignore"):
        data = [square(30, 30, 40, name), square(10, 10, 40, "Tissue")]
        assert np.array_equal(mask_from_geojson(data, (120, 100), (10.0, 10.0)).mask, expected)
    # Other classes are areas like any other.
    assert mask_from_geojson([square(30, 30, 40, "Region*")], (120, 100), (10.0, 10.0)).mask.sum() == 16


def test_a_drawn_ring_that_crosses_itself_fills_both_halves() -> None:
    bow = as_feature({"type": "Polygon", "coordinates": [[[0, 0], [80, 80], [80, 0], [0, 80], [0, 0]]]})
    mask = mask_from_geojson(bow, (80, 80), (10.0, 10.0)).mask
    assert mask[4, 0]
    assert mask[4, 7]
    assert not mask[0, 4]
    assert not mask[7, 4]


def test_points_and_lines_are_noted_and_ignored() -> None:
    point = as_feature({"type": "Point", "coordinates": [5, 5]})
    line = as_feature({"type": "LineString", "coordinates": [[5, 5], [9, 9]]})
    nothing: dict[str, Any] = {"type": "Feature", "geometry": None, "properties": {}}
    data = [square(10, 10, 40), point, line, line, nothing]
    assert mask_from_geojson(data, (100, 100), (10.0, 10.0)).mask.sum() == 16
    assert geojson_notices(data) == [
        "1 Point of the mask ignored: only areas count",
        "2 LineString of the mask ignored: only areas count",
    ]


def test_a_mask_without_area_is_empty_with_a_reason() -> None:
    result = mask_from_geojson({"type": "FeatureCollection", "features": []}, (100, 100), (10.0, 10.0))
    assert result.is_empty
    assert result.empty_reason == "the given mask has no area"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "no type"),
        ("text", "no type"),
        ({"type": "FeatureCollection"}, "no list of features"),
        ([{"features": 1}], "no type"),
        ({"type": "Circle"}, "unknown geometry type 'Circle'"),
        (as_feature({"type": "Polygon"}), "no coordinates"),
        (as_feature({"type": "Polygon", "coordinates": [["a", "b", "c"]]}), "not a pair of numbers"),
        (as_feature({"type": "Polygon", "coordinates": [[[0, 0], [1, 1]]]}), "fewer than three points"),
        (as_feature({"type": "Polygon", "coordinates": [[[0, 0], [1, float("nan")], [2, 0]]]}), "not finite"),
        (square(90, 90, 200), "outside the slide of 100 x 100 px"),
        ([square(1, 1, 5), square(-60, 0, 10)], "object 2"),
        (as_feature({"type": "Polygon", "coordinates": [[[0, 0], [1], [2, 0]]]}), "not a pair of numbers"),
        (as_feature({"type": "Polygon", "coordinates": [[[0], [1], [2]]]}), "fewer than three points"),
        ({"type": "GeometryCollection"}, "without geometries"),
        ({"type": "FeatureCollection", "features": [], "wsi_pipe": {"scale_l0": [1]}}, "broken"),
        ({"type": "FeatureCollection", "features": [], "wsi_pipe": 3}, "broken"),
    ],
)
def test_what_is_wrong_is_named(data: Any, message: str) -> None:
    with pytest.raises(MaskError, match=message):
        mask_from_geojson(data, (100, 100), (10.0, 10.0))


def test_without_any_scale_the_error_says_so() -> None:
    with pytest.raises(MaskError, match="no scale"):
        mask_from_geojson([square(1, 1, 5)], (100, 100))


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
