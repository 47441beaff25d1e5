"""Which HR tiles lie in each LR tile, and where: the k x k map that a student's token map is matched with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrmil.errors import SettingsError
from wsi_pipe.geometry import TileGrid

__all__ = ["ChildMap", "child_map", "turn"]


@dataclass(frozen=True)
class ChildMap:
    """Children of the LR tiles that have any.

    k: HR tiles to the side of an LR tile. rows: int64 (M,), rows of these LR tiles. children: int64 (M, k * k), rows of
    the HR tiles in reading order (row by row from the top left), -1 where none was kept.
    """

    k: int
    rows: NDArray[np.int64]
    children: NDArray[np.int64]


def child_map(lr: TileGrid, hr: TileGrid, slide: str) -> ChildMap:
    """The children of ``lr`` in ``hr``.

    Raises SettingsError when the grids overlap, have no parents, or do not subdivide by a whole number.
    """
    if lr.spec.overlap_px or hr.spec.overlap_px:
        raise SettingsError(
            f"{slide}: its grids overlap, so an LR tile has no definite children", remedy="make bags without --overlap"
        )
    if hr.parent is None:
        raise SettingsError(
            f"{slide}: {hr.label} has no parents in {lr.label}", remedy="make bags with both -r in one run"
        )
    factor = lr.stride_l0[0] / hr.stride_l0[0]
    k = round(factor)
    if k < 1 or abs(factor - k) > 1e-6 * factor:
        raise SettingsError(f"{slide}: {lr.label} is not a whole multiple of {hr.label} (factor {factor:g})")
    inside = hr.cells.astype(np.int64) - lr.cells.astype(np.int64)[hr.parent] * k
    if len(hr) and (inside.min() < 0 or inside.max() >= k):
        raise SettingsError(f"{slide}: tiles at {hr.label} lie outside their parents", remedy="run wsi-pipe verify")
    table = np.full((len(lr), k * k), -1, np.int64)
    table[hr.parent, inside[:, 1] * k + inside[:, 0]] = np.arange(len(hr))
    rows = np.flatnonzero((table >= 0).any(axis=1))
    return ChildMap(k, rows, table[rows])


def turn(values: NDArray[Any], k: int, symmetry: int) -> NDArray[Any]:
    """A child map (..., k * k) after one of the eight symmetries of the square, as ``augment.turned`` does to pixels.

    symmetry: 0 to 7; bit 0 mirrors left and right, bit 1 top and bottom, bit 2 then swaps x and y.
    """
    square = values.reshape(*values.shape[:-1], k, k)
    if symmetry & 1:
        square = square[..., :, ::-1]
    if symmetry & 2:
        square = square[..., ::-1, :]
    if symmetry & 4:
        square = np.swapaxes(square, -1, -2)
    return np.ascontiguousarray(square).reshape(values.shape)
