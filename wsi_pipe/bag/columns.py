"""One number a tile, as columns: what a level of a bag holds beside features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.bag.read import open_bag
from wsi_pipe.bag.values import PER_TILE
from wsi_pipe.errors import BagError

__all__ = ["read_columns"]

KINDS = ("attention", *PER_TILE)


def read_columns(path: Path, label: str) -> dict[str, dict[str, NDArray[np.float32]]]:
    """Of each kind ("attention", "annotation", "quality") the columns of a level by name, float32 (N,).

    An annotation goes by the name of its class. Raises BagError when the file is not a bag, or lacks the level.
    """
    with open_bag(path) as file:
        if label not in file["levels"]:
            raise BagError(f"{path}: has no level {label}", remedy=f"its levels are {', '.join(file['levels'])}")
        group = file["levels"][label]
        return {
            kind: {
                str(data.attrs.get("class", name)): np.asarray(data[()], np.float32)
                for name, data in (group[kind].items() if kind in group else ())
            }
            for kind in KINDS
        }
