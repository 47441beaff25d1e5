"""How much of each tile areas cover: exact along lines, which run across the tiles closely."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.geometry import TileGrid
from wsi_pipe.tissue.spans import Polygon, Spans, scan_polygons

__all__ = ["LINES", "grid_coverage", "lines_across"]

LINES = 256
"""Lines across a tile of the finest grid. What a horizontal edge of an outline is off by is half of their distance at
most: 1/512 of the tile."""

_LEAST_STEP_L0 = 0.25
"""Level-0 pixels between lines; outlines are not drawn more finely."""
_CELLS_AT_ONCE = 1 << 22


def lines_across(grids: Sequence[TileGrid]) -> list[int]:
    """Lines across a tile of each grid, coarsest first: as close together in all of them where one grid divides the
    next, so that what covers a tile is the mean of what covers its parts."""
    finest = grids[-1].tile_size_l0[1]
    fewest = max(1, min(LINES, math.ceil(finest / _LEAST_STEP_L0)))
    return [fewest * max(1, round(grid.tile_size_l0[1] / finest)) for grid in grids]


def grid_coverage(
    grid: TileGrid, areas: Sequence[Polygon], cut: Sequence[Polygon] = (), *, lines: int = LINES
) -> NDArray[np.float32]:
    """The fraction of each tile that lies in any of ``areas`` and in none of ``cut``, float32 (N,) from 0 to 1.

    areas, cut: polygons in level-0 pixels; they may overlap. lines: horizontal lines across a tile, along each of which
    the covered length is exact; their mean is the fraction (the midpoint rule). An edge that lies between two lines may
    be taken for half of their distance higher or lower, which is 1 / (2 * lines) of the tile at most; of steeper edges
    next to nothing is lost.
    """
    covered = np.zeros(len(grid))
    if not len(grid) or not areas:
        return covered.astype(np.float32)
    polygons = [*areas, *cut]
    stride, size = np.asarray(grid.stride_l0), np.asarray(grid.tile_size_l0)
    # Tiles that overlap are taken apart into sets of tiles that do not.
    apart = np.maximum(np.ceil(size / stride - 1e-9), 1).astype(int)
    for ox in range(int(apart[0])):
        for oy in range(int(apart[1])):
            offset = np.array([ox, oy])
            rows = np.flatnonzero((grid.cells % apart == offset).all(axis=1))
            if len(rows):
                origin = np.asarray(grid.origin_l0) + offset * stride
                cells = grid.cells[rows].astype(np.int64) // apart
                covered[rows] = _lattice(cells, origin, stride * apart, size, polygons, len(areas), lines)
    return np.clip(covered, 0, 1).astype(np.float32)


def _lattice(
    cells: NDArray[np.int64],
    origin: NDArray[np.float64],
    pitch: NDArray[np.float64],
    size: NDArray[np.float64],
    polygons: Sequence[Polygon],
    areas: int,
    lines: int,
) -> NDArray[np.float64]:
    """Covered fractions of tiles, float64 (n,), that lie ``pitch`` apart, which is ``size`` or more."""
    first, last = int(cells[:, 0].min()), int(cells[:, 0].max())
    width = last - first + 2
    tile_rows, row_of = np.unique(cells[:, 1], return_inverse=True)
    covered = np.zeros(len(cells))
    step = max(1, _CELLS_AT_ONCE // width)
    for start in range(0, len(tile_rows), step):
        some = tile_rows[start : start + step]
        within = (np.arange(lines) + 0.5) * (size[1] / lines)
        lines_y = (origin[1] + some[:, None] * pitch[1] + within).ravel()
        # Column by column what a stretch's ends add from there on: a sum along the row gives what is covered.
        change = np.zeros(len(some) * width)
        for _, _, spans in scan_polygons(polygons, lines_y):
            line, left, right = _united(spans, areas)
            for x, sign in ((left, 1.0), (right, -1.0)):
                column = np.floor((x - origin[0]) / pitch[0])
                # Between tiles that lie apart nothing is covered: what ends there ends at the tile before.
                part = np.minimum((x - origin[0] - column * pitch[0]) / size[0], 1.0)
                place = np.clip(column + part - first, 0, width - 1)
                whole = np.minimum(np.floor(place), width - 2)
                at = line // lines * width + whole.astype(np.int64)
                rest = place - whole
                change += sign * np.bincount(at, 1 - rest, minlength=len(change))
                change += sign * np.bincount(at + 1, rest, minlength=len(change))
        fractions = np.cumsum(change.reshape(len(some), width), axis=1) / lines
        here = (row_of >= start) & (row_of < start + step)
        covered[here] = fractions[row_of[here] - start, cells[here, 0] - first]
    return covered


def _united(spans: Spans, areas: int) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """(line, left, right) of stretches that lie in any of the first ``areas`` polygons and in none of the others."""
    line = np.concatenate([spans.line, spans.line])
    x = np.concatenate([spans.left, spans.right])
    sign = np.repeat([1, -1], len(spans.line))
    is_area = np.concatenate([spans.owner, spans.owner]) < areas
    order = np.lexsort((x, line))
    line, x, sign, is_area = line[order], x[order], sign[order], is_area[order]
    within = (np.cumsum(sign * is_area) > 0) & (np.cumsum(sign * ~is_area) == 0)
    # All stretches of a line have ended at its last event, so none runs on into the next line.
    here = np.flatnonzero(within[:-1])
    return line[here], x[here], x[here + 1]
