"""Whole-slide images to verified multi-resolution feature bags.

``import wsi_pipe as wp``: what is public is in ``__all__``, explained in docs/python.md; everything else may move. The
names are imported when they are first asked for, so that the import itself costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsi_pipe.api.bags import Bag, BagLevel, open_bag, write_bag
    from wsi_pipe.api.dataset import TileDataset
    from wsi_pipe.api.encoders import register_encoder
    from wsi_pipe.api.features import TileFeatures
    from wsi_pipe.api.grids import Grid, Grids, TileBatch
    from wsi_pipe.api.job import Job
    from wsi_pipe.api.slide import Slide, open
    from wsi_pipe.api.tissue import Tissue
    from wsi_pipe.encoders import list_encoders, load_encoder
    from wsi_pipe.errors import WsiPipeError

__version__ = "0.1.0"

__all__ = [
    "Bag",
    "BagLevel",
    "Grid",
    "Grids",
    "Job",
    "Slide",
    "TileBatch",
    "TileDataset",
    "TileFeatures",
    "Tissue",
    "WsiPipeError",
    "__version__",
    "list_encoders",
    "load_encoder",
    "open",
    "open_bag",
    "register_encoder",
    "write_bag",
]

_PLACES = {
    "Bag": "wsi_pipe.api.bags",
    "BagLevel": "wsi_pipe.api.bags",
    "Grid": "wsi_pipe.api.grids",
    "Grids": "wsi_pipe.api.grids",
    "Job": "wsi_pipe.api.job",
    "Slide": "wsi_pipe.api.slide",
    "TileBatch": "wsi_pipe.api.grids",
    "TileDataset": "wsi_pipe.api.dataset",
    "TileFeatures": "wsi_pipe.api.features",
    "Tissue": "wsi_pipe.api.tissue",
    "WsiPipeError": "wsi_pipe.errors",
    "list_encoders": "wsi_pipe.encoders",
    "load_encoder": "wsi_pipe.encoders",
    "open": "wsi_pipe.api.slide",
    "open_bag": "wsi_pipe.api.bags",
    "register_encoder": "wsi_pipe.api.encoders",
    "write_bag": "wsi_pipe.api.bags",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
