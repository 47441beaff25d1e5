"""Tiles of one resolution with what belongs to them by place: what a grid and a level of a bag have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wsi_pipe.geometry import FloatPair, TileGrid

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Layout", "frame_of"]


class Layout:
    """The tiles of one resolution, in row-major order; row i of every array belongs to tile i.

    layout: the tiles as a value. finer: those of the next finer resolution, where there is one.
    """

    def __init__(self, layout: TileGrid, finer: TileGrid | None) -> None:
        self.layout = layout
        self._finer = finer
        self._by_parent: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return len(self.layout)

    @property
    def label(self) -> str:
        """Its name, such as "20x"."""
        return self.layout.label

    @property
    def mpp(self) -> FloatPair:
        """Micrometres per tile pixel, (x, y), at which tiles are cut."""
        return self.layout.mpp_effective

    @property
    def tile_px(self) -> int:
        """Side of a tile in pixels."""
        return self.layout.spec.size_px

    @property
    def tile_size_l0(self) -> FloatPair:
        """Width and height of a tile in level-0 pixels."""
        return self.layout.tile_size_l0

    @property
    def cells(self) -> NDArray[np.int32]:
        """Column and row of each tile, int32 (N, 2)."""
        return self.layout.cells

    @property
    def coords(self) -> NDArray[np.int64]:
        """Top-left corner (x, y) of each tile in level-0 pixels, rounded, int64 (N, 2)."""
        return self.layout.coords

    @property
    def tissue(self) -> NDArray[np.float32]:
        """Tissue fraction of each tile, float32 (N,)."""
        return self.layout.tissue

    @property
    def parent(self) -> NDArray[np.int32] | None:
        """Row of each tile's parent in the next coarser resolution, int32 (N,); None for the coarsest."""
        return self.layout.parent

    @property
    def finer_label(self) -> str | None:
        """The name of the next finer resolution, None for the finest."""
        return None if self._finer is None else self._finer.label

    def children(self, row: int) -> NDArray[np.int64]:
        """Rows of the tiles of the next finer resolution that lie in tile ``row``, int64 (K,); none for the finest.

        Raises IndexError for a row that does not exist.
        """
        if not -len(self) <= row < len(self):
            raise IndexError(f"{self.label} has no tile {row}: it has {len(self)}")
        parent = None if self._finer is None else self._finer.parent
        if parent is None:
            return np.empty(0, np.int64)
        if self._by_parent is None:
            order = np.argsort(parent, kind="stable").astype(np.int64)
            self._by_parent = order, np.searchsorted(parent[order], np.arange(len(self) + 1))
        order, starts = self._by_parent
        row %= len(self)
        return order[starts[row] : starts[row + 1]]


def frame_of(level: Layout, values: Mapping[str, ArrayLike] | None = None) -> pd.DataFrame:
    """Tiles as a pandas DataFrame, one row a tile.

    Columns: level, x, y (level-0 pixels), column, row, tissue, parent (-1 without one), and ``values`` (N,) or (N, D)
    by name; those of (N, D) become D columns, name_0 and so on.
    """
    import pandas as pd

    count = len(level)
    columns: dict[str, ArrayLike] = {
        "level": np.full(count, level.label, object),
        "x": level.coords[:, 0],
        "y": level.coords[:, 1],
        "column": level.cells[:, 0],
        "row": level.cells[:, 1],
        "tissue": level.tissue,
        "parent": np.full(count, -1, np.int32) if level.parent is None else level.parent,
    }
    for name, given in (values or {}).items():
        array = np.asarray(given)
        if array.dtype == np.float16:
            # pandas cannot show it, nor compute with it.
            array = array.astype(np.float32)
        if array.ndim == 2:
            columns |= {f"{name}_{i}": array[:, i] for i in range(array.shape[1])}
        else:
            columns[name] = array
    return pd.DataFrame(columns)
