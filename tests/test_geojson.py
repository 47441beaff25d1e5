"""Masks as outlines and as GeoJSON, in and out, and what of foreign files counts."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy import ndimage

from wsi_pipe.errors import MaskError
from wsi_pipe.geometry import TissueMask
from wsi_pipe.tissue import (
    fill_polygons,
    mask_from_geojson,
    mask_to_geojson,
    place_areas,
    read_mask,
    regions_of,
    stored_mask,
    trace_mask,
)
from wsi_pipe.tissue.areas import read_areas

Bools = NDArray[np.bool_]

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
    assert read_areas(data)[1] == [
        "1 Point ignored: only areas count",
        "2 LineStrings ignored: only areas count",
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
        (as_feature({"type": "Polygon", "coordinates": [[[0, 0], [1, float("nan")], [2, 0]]]}), "not finite"),
        (square(90, 90, 200), "outside the slide of 100 x 100 px"),
        ([square(1, 1, 5), square(-60, 0, 10)], "object 2"),
        (as_feature({"type": "Polygon", "coordinates": [[[0, 0], [1], [2, 0]]]}), "not a pair of numbers"),
        (as_feature({"type": "Polygon", "coordinates": [[[0], [1], [2]]]}), "not a pair of numbers"),
        (as_feature({"type": "Polygon", "coordinates": [[[0, 0], [1e300, 1], [2, 0]]]}), "on no slide"),
        ({"type": "GeometryCollection"}, "without geometries"),
        ({"type": "FeatureCollection", "features": [], "wsi_pipe": {"scale_l0": [1]}}, "broken"),
        ({"type": "FeatureCollection", "features": [], "wsi_pipe": 3}, "broken"),
        (
            {"type": "FeatureCollection", "features": [], "wsi_pipe": {"frame": "qupath", "origin_l0": [10**400, 1]}},
            "broken",
        ),
    ],
)
def test_what_is_wrong_is_named(data: Any, message: str) -> None:
    with pytest.raises(MaskError, match=message):
        mask_from_geojson(data, (100, 100), (10.0, 10.0))


def test_a_stated_size_that_is_not_of_the_slide_is_not_believed() -> None:
    """A number in a file must not decide over memory."""
    data = mask_to_geojson(TissueMask(np.ones((10, 10), bool), (10.0, 10.0)))
    data["wsi_pipe"]["mask_size_px"] = [10**9, 10**9]
    assert mask_from_geojson(data, (100, 100)).mask.shape == (10, 10)
    data["wsi_pipe"]["scale_l0"] = [1e-7, 1e-7]
    with pytest.raises(MaskError, match="too large"):
        mask_from_geojson(data, (100, 100))


def test_without_any_scale_the_error_says_so() -> None:
    with pytest.raises(MaskError, match="no scale"):
        mask_from_geojson([square(1, 1, 5)], (100, 100))


# -- what counts of foreign files -------------------------------------------------------------------------------------


def test_a_stray_ring_is_dropped_with_a_note_and_takes_its_holes_along() -> None:
    """qupath#1112: a ring of two points beside sound ones; and as a hole, where only the hole goes."""
    sound = square(10, 10, 40)
    stray = as_feature({"type": "Polygon", "coordinates": [[[5, 5], [5, 5]], [[1, 1], [2, 1], [2, 2], [1, 1]]]})
    holed = json.loads(json.dumps(sound))
    holed["geometry"]["coordinates"].append([[20, 20], [30, 20], [20, 20]])
    repeated = as_feature({"type": "Polygon", "coordinates": [[[7, 7], [8, 8], [7, 7], [8, 8], [7, 7]]]})
    empty = as_feature({"type": "Polygon", "coordinates": [[]]})
    for data in ([sound, stray], [holed], [sound, repeated], [sound, empty]):
        found = read_mask(data, (100, 100), (10.0, 10.0))
        assert found.mask.mask.sum() == 16
        assert found.notes == ("1 stray ring ignored: it has fewer than three different points",)


@pytest.mark.parametrize(
    ("classification", "name", "colour", "ignored"),
    [
        ({"name": "Tumour", "color": [1, 2, 3]}, "Tumour", (1, 2, 3), False),
        ({"name": "Tumour", "colorRGB": -3670016}, "Tumour", (200, 0, 0), False),
        ({"name": "Tumour: Positive"}, "Tumour: Positive", None, False),
        ({"names": ["Tumour", "Positive"], "color": [9, 9, 9]}, "Tumour: Positive", (9, 9, 9), False),
        ({"names": ["Ignore*", "Fold"]}, "Ignore*: Fold", None, True),
        ({"names": ["Stroma", "ignore"]}, "Stroma: ignore", None, True),
        ({"name": "IGNORE*"}, "IGNORE*", None, True),
        ({"name": "Ignored by the pathologist"}, "Ignored by the pathologist", None, False),
        ({"name": "Region*", "color": "red"}, "Region*", None, False),
        ("Tumour", "Tumour", None, False),
        ({"name": None}, "", None, False),
        ({"names": []}, "", None, False),
        (7, "", None, False),
    ],
)
def test_classes_as_versions_of_qupath_write_them(classification: Any, name: str, colour: Any, ignored: bool) -> None:
    feature = square(10, 10, 40)
    feature["properties"]["classification"] = classification
    (area,), _ = read_areas([feature])
    assert (area.class_name, area.colour, area.is_ignored) == (name, colour, ignored)


def test_detections_cells_and_tiles_are_no_annotations() -> None:
    kinds = ["detection", "cell", "cell", "tile"]
    others = [square(60, 60, 10) for _ in kinds]
    for feature, kind in zip(others, kinds, strict=True):
        feature["properties"]["objectType"] = kind
    early = square(70, 70, 10)
    early["id"] = "PathDetectionObject"
    del early["properties"]["objectType"]
    found = read_mask([square(10, 10, 40), *others, early], (100, 100), (10.0, 10.0))
    assert found.mask.mask.sum() == 16
    assert found.notes == (
        "2 detections ignored: only annotations count",
        "2 cells ignored: only annotations count",
        "1 tile ignored: only annotations count",
    )
    with pytest.raises(MaskError, match=r"holds no annotation \(2 cells ignored"):
        read_mask(others[1:3], (100, 100), (10.0, 10.0))


def test_only_chosen_classes_make_the_mask() -> None:
    data = [square(10, 10, 20, "Tumour"), square(50, 10, 20, "Tumour: Positive"), square(10, 50, 20, "Stroma")]
    data.append(square(10, 10, 10, "Ignore*"))
    masks = {
        classes: read_mask(data, (100, 100), (10.0, 10.0), classes=classes).mask
        for classes in ((), ("tumour",), ("Tumour: Positive", "Stroma"), ("Necrosis",))
    }
    assert {classes: int(mask.mask.sum()) for classes, mask in masks.items()} == {
        (): 11,
        ("tumour",): 7,
        ("Tumour: Positive", "Stroma"): 8,
        ("Necrosis",): 0,
    }
    assert masks[("Necrosis",)].empty_reason == ("no area of class Necrosis: there is Tumour, Tumour: Positive, Stroma")


def test_collections_without_end_are_refused() -> None:
    data: dict[str, Any] = {"type": "Point", "coordinates": [0, 0]}
    for _ in range(40):
        data = {"type": "GeometryCollection", "geometries": [data]}
    with pytest.raises(MaskError, match="without end"):
        read_areas(data)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats(-1e3, 1e3) | st.integers(-(10**400), 10**400) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "type",
                    "features",
                    "geometry",
                    "geometries",
                    "coordinates",
                    "properties",
                    "classification",
                    "name",
                    "names",
                    "color",
                    "objectType",
                    "wsi_pipe",
                    "frame",
                    "origin_l0",
                    "mask_size_px",
                    "scale_l0",
                    "id",
                ]
            ),
            inner
            | st.sampled_from(
                ["FeatureCollection", "Feature", "Polygon", "MultiPolygon", "GeometryCollection", "Point", "qupath"]
            ),
            max_size=5,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(json_values)
def test_whatever_a_file_holds_is_read_or_refused_in_words(data: Any) -> None:
    with contextlib.suppress(MaskError):
        read_mask(data, (100, 100), (10.0, 10.0), bounds_l0=(10, 10, 50, 50))
    with contextlib.suppress(MaskError):
        regions_of(place_areas(data, (100, 100)))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_sound_file_with_one_part_of_it_replaced_is_read_or_refused_in_words(data: st.DataObject) -> None:
    whole: Any = mask_to_geojson(TissueMask(np.eye(4, dtype=bool), (10.0, 10.0)), origin_l0=(3, 4))
    here = whole
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(here[key], (dict, list)) or not here[key] or data.draw(st.integers(0, 3)) == 0:
            here[key] = data.draw(json_values)
            break
        here = here[key]
    with contextlib.suppress(MaskError):
        read_mask(whole, (40, 40), bounds_l0=(3, 4, 30, 30))


# -- the edge of the slide --------------------------------------------------------------------------------------------


def test_what_hangs_over_the_edge_is_cut_with_a_note() -> None:
    """qupath#1606: annotations that were enlarged or transferred reach beyond the image."""
    found = read_mask([square(-20, 20, 50), square(60, 60, 55)], (100, 100), (10.0, 10.0))
    expected = np.zeros((10, 10), bool)
    expected[2:7, 0:3] = True
    expected[6:, 6:] = True
    assert np.array_equal(found.mask.mask, expected)
    (note,) = found.notes
    assert note.startswith(
        "cut at the edge of the slide of 100 x 100 px: object 1, from (-20, 20) to (30, 70); object 2"
    )
    # A part of a mask's pixel over the edge is what masks of this program have.
    assert read_mask([square(0, 0, 108)], (100, 100), (10.0, 10.0)).notes == ()


def test_what_lies_off_the_slide_is_left_out_with_a_note_and_an_error_where_it_is_most() -> None:
    found = read_mask([square(10, 10, 40), square(200, 10, 20)], (100, 100), (10.0, 10.0))
    assert found.mask.mask.sum() == 16
    assert found.notes == ("left out, off the slide of 100 x 100 px: object 2, from (200, 10) to (220, 30)",)
    for data in ([square(10, 10, 10), square(200, 10, 20)], [square(85, 85, 60)], [square(-500, 0, 50)]):
        with pytest.raises(MaskError, match="outside the slide of 100 x 100 px") as error:
            read_mask(data, (100, 100), (10.0, 10.0))
        assert "level-0 pixels" in str(error.value.remedy)


# -- the frame --------------------------------------------------------------------------------------------------------

SIZE = (10_000, 8_000)
BOUNDS = (4_000, 1_000, 3_000, 2_500)
"""As of a MIRAX slide: what was scanned lies somewhere on a larger canvas."""


def placed(data: Any, **options: Any) -> tuple[str, list[float], tuple[str, ...]]:
    found = place_areas(data, SIZE, BOUNDS, **options)
    return found.frame, found.areas[0].corners[0].tolist(), found.notes


def test_a_foreign_file_counts_from_the_scan_where_it_fits_both_or_only_that() -> None:
    both = [square(100, 200, 500)]  # lies on the canvas as well, though not on the scan
    frame, corner, notes = placed(both)
    assert (frame, corner) == ("qupath", [4_100, 1_200])
    assert "corner of the scan's bounds at (4000, 1000)" in notes[0]
    assert "otherwise it would not lie on the scan" in notes[0]
    # Where a scan begins near the corner, an annotation may lie on it in either frame.
    near = place_areas([square(500, 500, 500)], SIZE, (100, 100, 3000, 2500))
    assert near.frame == "qupath"
    assert "--frame image if it counts from the whole image" in near.notes[0]


def test_a_foreign_file_that_fits_only_the_whole_image_counts_from_there() -> None:
    frame, corner, notes = placed([square(5_000, 2_000, 800)])
    assert (frame, corner) == ("image", [5_000, 2_000])
    assert "corner of the whole image" in notes[0]


def test_a_frame_that_is_given_is_taken_at_its_word_and_doubted_aloud() -> None:
    frame, corner, notes = placed([square(100, 200, 500)], frame="image")
    assert (frame, corner) == ("image", [100, 200])
    assert "--frame qupath would fit" in notes[0]
    frame, corner, notes = placed([square(5_000, 2_000, 800)], frame="image")
    assert (frame, corner) == ("image", [5_000, 2_000])
    assert "would fit" not in notes[0]
    with pytest.raises(MaskError, match="neither image nor qupath"):
        placed([square(1, 1, 5)], frame="slide")


def test_a_file_that_states_its_frame_is_read_by_it() -> None:
    ours = {"type": "FeatureCollection", "features": [square(100, 200, 500)]}
    for member, expected in (
        ({"frame": "qupath", "origin_l0": [4_000, 1_000]}, ("qupath", [4_100, 1_200])),
        ({"frame": "image"}, ("image", [100, 200])),
        # Of a version that knew but one frame, and said nothing of it.
        ({"mask_size_px": [10, 8], "scale_l0": [1_000, 1_000]}, ("image", [100, 200])),
    ):
        assert placed({**ours, "wsi_pipe": member}) == (*expected, ())
        # The file's own word goes before the option.
        assert placed({**ours, "wsi_pipe": member}, frame="image") == (*expected, ())
    other = placed({**ours, "wsi_pipe": {"frame": "qupath", "origin_l0": [50, 60]}})
    assert other[1] == [150, 260]
    assert "this slide's scan begins at (4000, 1000)" in other[2][0]


@pytest.mark.parametrize("member", [{"frame": "stage"}, {"frame": "qupath"}, {"frame": "qupath", "origin_l0": [1]}])
def test_a_broken_statement_is_an_error(member: Any) -> None:
    with pytest.raises(MaskError, match="broken"):
        placed({"type": "FeatureCollection", "features": [], "wsi_pipe": member})


def test_without_bounds_the_frames_are_one_and_nothing_is_said() -> None:
    for bounds in (None, (0, 0, 10_000, 8_000), (0, 0, 3_000, 2_500)):
        for frame in (None, "image", "qupath"):
            found = place_areas([square(100, 200, 500)], SIZE, bounds, frame=frame)
            assert found.areas[0].corners[0].tolist() == [100, 200]
            assert found.notes == ()


@settings(max_examples=60, deadline=None)
@given(masks, st.integers(0, 500), st.integers(0, 500))
def test_a_mask_survives_both_frames(mask: Bools, x: int, y: int) -> None:
    scale = (16.0, 15.5)
    size = (int(np.ceil(mask.shape[1] * scale[0])) + 1, int(np.ceil(mask.shape[0] * scale[1])) + 1)
    original = TissueMask(mask, scale, None if mask.any() else "blank")
    data = json.loads(json.dumps(mask_to_geojson(original, origin_l0=(x, y))))
    assert data["wsi_pipe"]["origin_l0"] == [x, y]
    assert np.array_equal(mask_from_geojson(data, size).mask, mask)
    # QuPath drops what it does not know, and its own frame begins at the scan's corner: there is the same place.
    first = mask_to_geojson(original)["features"]
    for here, there in zip(data["features"], first, strict=True):
        moved = np.array(here["geometry"]["coordinates"][0]) + np.array([x, y])
        assert np.allclose(moved, there["geometry"]["coordinates"][0], atol=1e-4)
