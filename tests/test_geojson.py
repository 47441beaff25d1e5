"""Masks as outlines and as GeoJSON, in and out, and what of foreign files counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
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
    ],
)
def test_what_is_wrong_is_named(data: Any, message: str) -> None:
    with pytest.raises(MaskError, match=message):
        mask_from_geojson(data, (100, 100), (10.0, 10.0))


def test_without_any_scale_the_error_says_so() -> None:
    with pytest.raises(MaskError, match="no scale"):
        mask_from_geojson([square(1, 1, 5)], (100, 100))
