"""What share of a tile areas cover, against polygons clipped by another library."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from wsi_pipe.config import TileSettings
from wsi_pipe.errors import MaskError
from wsi_pipe.geometry import Pyramid, TileGrid, TileSpec, TissueMask
from wsi_pipe.tiling import plan_grids
from wsi_pipe.tissue import place_areas, region_coverage, regions_of
from wsi_pipe.tissue import spans as spans_module
from wsi_pipe.tissue.coverage import LINES, grid_coverage

Polygon = list[NDArray[np.float64]]


def grid_of(cells: Any, *, tile: float = 100.0, stride: float | None = None, origin: tuple[float, float] = (0.0, 0.0)):  # type: ignore[no-untyped-def]
    cells = np.asarray(cells, np.int32)
    stride = tile if stride is None else stride
    spec = TileSpec(0.5, 64, max(round(64 * (1 - stride / tile)), 0))
    return TileGrid(
        spec, (0.5, 0.5), origin, (stride, stride), (tile, tile), cells, np.ones(len(cells), np.float32)
    )  # fmt: skip


def all_cells(columns: int, rows: int) -> NDArray[np.int32]:
    y, x = np.mgrid[:rows, :columns]
    return np.stack([x.ravel(), y.ravel()], 1).astype(np.int32)


def by_shapely(grid: TileGrid, areas: Any, cut: Any = None) -> NDArray[np.float64]:
    wanted = shapely.unary_union(areas)
    if cut is not None:
        wanted = wanted.difference(shapely.unary_union(cut))
    low = grid.corners_l0
    high = low + np.asarray(grid.tile_size_l0)
    boxes = shapely.box(low[:, 0], low[:, 1], high[:, 0], high[:, 1])
    found: NDArray[np.float64] = shapely.area(shapely.intersection(boxes, wanted)) / shapely.area(boxes)
    return found


def rings_of(shape: Any) -> list[Polygon]:
    parts = list(shape.geoms) if hasattr(shape, "geoms") else [shape]
    return [
        [np.asarray(ring.coords)[:-1] for ring in (part.exterior, *part.interiors)]
        for part in parts
        if isinstance(part, shapely.Polygon)
    ]


def blob(rng: np.random.Generator, centre: tuple[float, float], radius: float, points: int = 60) -> Any:
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    wave = radius * (1 + 0.3 * np.sin(3 * angle + rng.uniform(0, 6)) + 0.1 * np.sin(7 * angle))
    return shapely.Polygon(np.stack([centre[0] + wave * np.cos(angle), centre[1] + wave * np.sin(angle)], 1))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("stride", [100.0, 75.0, 40.0, 130.0])
def test_overlapping_areas_with_holes_agree_with_clipping(seed: int, stride: float) -> None:
    rng = np.random.default_rng(seed)
    shapes = [blob(rng, tuple(rng.uniform(100, 900, 2)), rng.uniform(20, 300)) for _ in range(6)]
    shapes[0] = shapes[0].difference(shapes[0].buffer(-25))  # a ring: its inside is a hole
    cut = [blob(rng, tuple(rng.uniform(100, 900, 2)), rng.uniform(50, 200)) for _ in range(2)]
    cells = all_cells(12, 10)
    grid = grid_of(cells[rng.random(len(cells)) < 0.7], stride=stride, origin=(-37.5, 12.25))
    found = grid_coverage(grid, [p for s in shapes for p in rings_of(s)], [p for s in cut for p in rings_of(s)])
    assert found.dtype == np.float32
    expected = by_shapely(grid, shapes, cut)
    assert 0.01 < expected.mean() < 0.99
    assert np.abs(found - expected).max() < 1 / LINES
    assert np.abs(found - expected).mean() < 2e-4


@settings(max_examples=200, deadline=None)
@given(
    st.floats(-50, 450), st.floats(-50, 450), st.floats(0.5, 500), st.floats(0.5, 500), st.sampled_from([100.0, 60.0])
)
def test_a_box_is_off_by_half_a_line_at_each_of_its_edges(
    x: float, y: float, w: float, h: float, stride: float
) -> None:
    grid = grid_of(all_cells(5, 5), stride=stride)
    shape = shapely.box(x, y, x + w, y + h)
    found = grid_coverage(grid, rings_of(shape))
    assert np.abs(found - by_shapely(grid, [shape])).max() <= 2 * 1 / (2 * LINES) + 1e-6


def test_what_is_covered_wholly_is_one_and_what_is_not_is_zero() -> None:
    grid = grid_of(all_cells(6, 6))
    box = [np.array([[100.0, 100.0], [400.0, 100.0], [400.0, 300.0], [100.0, 300.0]])]
    expected = np.zeros((6, 6), np.float32)
    expected[1:3, 1:4] = 1
    assert np.array_equal(grid_coverage(grid, [box]).reshape(6, 6), expected)
    # The same box drawn twice, and the other way round, is no more and no less of it.
    assert np.array_equal(grid_coverage(grid, [box, [box[0][::-1]]]).reshape(6, 6), expected)
    assert not grid_coverage(grid, [box], [box]).any()
    assert grid_coverage(grid_of(np.zeros((0, 2))), [box]).shape == (0,)
    assert not grid_coverage(grid, []).any()


def test_a_ring_that_crosses_itself_counts_by_the_even_odd_rule() -> None:
    bow = [np.array([[0.0, 0.0], [100.0, 100.0], [100.0, 0.0], [0.0, 100.0]])]
    assert grid_coverage(grid_of([[0, 0]]), [bow])[0] == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("factor", [2, 4, 5])
def test_a_tile_has_the_mean_of_what_is_in_it(factor: int) -> None:
    """Through grids as they are planned, of which all fine tiles are kept."""
    pyramid = Pyramid.from_sizes([(4000, 4000)], (0.5, 0.5))
    everything = TissueMask(np.ones((1, 1), bool), (4000.0, 4000.0))
    tiles = TileSettings(resolutions=(0.5, 0.5 * factor), tile_px=64, min_tissue=0.0)
    coarse, fine = plan_grids(pyramid, everything, tiles)
    rng = np.random.default_rng(factor)
    shapes = [blob(rng, tuple(rng.uniform(500, 3500, 2)), rng.uniform(100, 900)) for _ in range(5)]
    features = [
        {
            "type": "Feature",
            "geometry": shapely.geometry.mapping(shape),
            "properties": {"classification": {"name": f"Class {n % 2}"}},
        }
        for n, shape in enumerate(shapes)
    ]
    regions, _ = regions_of(place_areas(features, (4000, 4000)))
    covered = region_coverage((coarse, fine), regions)
    assert fine.parent is not None
    full = np.bincount(fine.parent, minlength=len(coarse)) == factor**2
    assert full.sum() > 20
    for region in regions:
        sums = np.bincount(fine.parent, covered[fine.label][region.slug], minlength=len(coarse))
        assert np.abs(sums / factor**2 - covered[coarse.label][region.slug])[full].max() < 1e-6
        assert covered[coarse.label][region.slug].max() > 0.5


def test_bands_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    polygons = [p for _ in range(5) for p in rings_of(blob(rng, tuple(rng.uniform(100, 900, 2)), 200))]
    grid = grid_of(all_cells(10, 10))
    whole = grid_coverage(grid, polygons)
    monkeypatch.setattr(spans_module, "_CROSSINGS_AT_ONCE", 7)
    monkeypatch.setattr("wsi_pipe.tissue.coverage._CELLS_AT_ONCE", 25)
    assert np.allclose(grid_coverage(grid, polygons), whole, atol=1e-7)


def test_outlines_beyond_reason_are_refused_and_not_worked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans_module, "_MOST_CROSSINGS", 1000)
    x = np.arange(200.0)
    comb = [np.stack([x, np.where(x % 2 == 0, 0.0, 900.0)], 1)]
    with pytest.raises(MaskError, match="too intricate"):
        grid_coverage(grid_of(all_cells(10, 10)), [comb])
