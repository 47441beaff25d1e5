"""Which tiles a model attends to most, on the grid of its attention or on a finer one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.errors import ConfigError
from wsi_pipe.geometry import TileGrid

__all__ = ["most_attended"]


def most_attended(
    grids: tuple[TileGrid, ...], label: str, attention: dict[str, NDArray[np.float32]], top: int
) -> NDArray[np.int64]:
    """Rows of the grid ``label`` that lie in the ``top`` tiles of most attention, in order of rows.

    grids: of a slide, coarsest first. attention: by level, (N,) each. That of the grid itself is taken where it is
    there, else that of the nearest coarser grid, whose tiles each hold several of the finer ones (EAGLE looks at
    coarse tiles and takes fine ones). Of equals the first tile comes first. Raises ConfigError where the attention
    is of finer grids alone.
    """
    labels = [grid.label for grid in grids]
    here = labels.index(label)
    at = next((place for place in range(here, -1, -1) if labels[place] in attention), None)
    if at is None:
        raise ConfigError(
            f"the attention is of {', '.join(attention)}, which is finer than {label}",
            remedy=f"give features of {', '.join(attention)} (-r), or attention of a coarser model",
        )
    weights = attention[labels[at]]
    chosen = np.zeros(len(grids[at]), bool)
    chosen[np.argsort(-weights, kind="stable")[:top]] = True
    for finer in grids[at + 1 : here + 1]:
        parent = finer.parent
        assert parent is not None
        chosen = (parent >= 0) & chosen[np.clip(parent, 0, len(chosen) - 1)] if len(chosen) else np.zeros(0, bool)
    return np.flatnonzero(chosen)
