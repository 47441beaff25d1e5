"""Tiles that lie anywhere, put onto a grid by how much of each cell they cover."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.geometry import FloatPair, TileGrid

__all__ = ["LEAST_COVERED", "Mapped", "map_tiles"]

LEAST_COVERED = 0.5
"""Share of a grid's tile that adopted tiles must cover for it to get their features."""
SAME_PX = 1.5
"""Level-0 pixels by which a tile may lie beside a cell, or differ from it in size, and still be the same tile."""


@dataclass(frozen=True)
class Mapped:
    """Features of a grid's tiles.

    rows: int64 (M,), tiles of the grid that are covered enough. values: (M, D), the mean of the features that cover
    each, weighted by the area of the overlap; None where there are none to map. covered: float64 (M,). exact: every
    tile is one adopted tile, whose features it has unchanged.
    """

    rows: NDArray[np.int64]
    values: NDArray[np.floating[Any]] | None
    covered: NDArray[np.float64]
    exact: bool


def map_tiles(
    grid: TileGrid, corners: NDArray[np.float64], side: FloatPair, values: NDArray[np.floating[Any]] | None
) -> Mapped:
    """Overlap-weighted means of features on the tiles of a grid.

    corners: float64 (N, 2), top-left, level-0 pixels, of tiles of ``side`` (x, y). values: (N, D) or None.
    """
    from scipy.sparse import csr_matrix

    cell, tile, area = _overlaps(grid, corners, side)
    size = np.asarray(grid.tile_size_l0)
    same = (np.abs(grid.corners_l0[cell] - corners[tile]).max(axis=1) <= SAME_PX) & bool(
        (np.abs(size - np.asarray(side)) <= SAME_PX).all()
    )
    # A tile that is the very cell speaks for it alone: neighbours reach into it by rounding only.
    alone = np.zeros(len(grid), bool)
    alone[cell[same]] = True
    kept = same | ~alone[cell]
    cell, tile, area = cell[kept], tile[kept], np.where(same[kept], float(size.prod()), area[kept])
    total = np.bincount(cell, area, minlength=len(grid))
    covered = np.minimum(total / float(size.prod()), 1.0)
    rows = np.flatnonzero(covered >= LEAST_COVERED)
    exact = bool(alone[rows].all())
    if values is None:
        return Mapped(rows, None, covered[rows], exact)
    weights = csr_matrix((area / total[cell], (cell, tile)), shape=(len(grid), len(corners)))[rows]
    mixed = weights @ np.asarray(values, np.float64)
    return Mapped(rows, np.asarray(mixed).astype(values.dtype), covered[rows], exact)


def _overlaps(
    grid: TileGrid, corners: NDArray[np.float64], side: FloatPair
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Pairs of a grid's tile and an adopted one that overlap, and the area of it in level-0 pixels."""
    origin, stride, size = (np.asarray(pair) for pair in (grid.origin_l0, grid.stride_l0, grid.tile_size_l0))
    row_of = {cell: row for row, cell in enumerate(map(tuple, grid.cells.tolist()))}
    first = np.floor((corners - origin - size) / stride).astype(np.int64) + 1
    span = [math.ceil((side[axis] + size[axis]) / stride[axis]) + 1 for axis in (0, 1)]
    cells, tiles, areas = [], [], []
    for dx in range(span[0]):
        for dy in range(span[1]):
            place = first + np.array([dx, dy])
            low = origin + place * stride
            inside = np.minimum(corners + side, low + size) - np.maximum(corners, low)
            area = np.where((inside > 0).all(axis=1), inside.prod(axis=1), 0.0)
            rows = np.array([row_of.get(cell, -1) for cell in map(tuple, place.tolist())], np.int64)
            there = np.flatnonzero((area > 0) & (rows >= 0))
            cells.append(rows[there])
            tiles.append(there)
            areas.append(area[there])
    return np.concatenate(cells), np.concatenate(tiles), np.concatenate(areas)
