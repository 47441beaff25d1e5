"""Leaving out tiles that are out of focus, where that is asked for: before anything hangs on the grids."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import numpy as np

from wsi_pipe.geometry import TileGrid
from wsi_pipe.quality import QUALITY_VERSION, LevelQuality
from wsi_pipe.slides.base import Slide
from wsi_pipe.tiles import stream_tiles

__all__ = ["drop_blurred", "left_out_notes"]

_BATCH = 64


def drop_blurred(slide: Slide, grids: Sequence[TileGrid], min_sharpness: float) -> tuple[tuple[TileGrid, ...], str]:
    """The grids without tiles below ``min_sharpness`` (see ``wsi_pipe.quality``) or whose parent is, coarsest first,
    and JSON text for ``BagAttrs.left_out``. Reads every tile once. Raises SlideReadError when one cannot be read.
    """
    kept_grids: list[TileGrid] = []
    counts: dict[str, list[int]] = {}
    row_of: np.ndarray[tuple[int], np.dtype[np.int32]] | None = None
    for grid in grids:
        quality = LevelQuality(len(grid), sum(grid.mpp_effective) / 2)
        for batch in stream_tiles(slide, grid, batch_size=_BATCH) if len(grid) else ():
            quality.add(batch.index, batch.pixels)
        kept = quality.values()["sharpness"] >= min_sharpness
        parent = grid.parent
        if parent is not None and row_of is not None:
            parent = row_of[parent]
            kept &= parent >= 0
            parent = parent[kept]
        row_of = np.where(kept, np.cumsum(kept) - 1, -1).astype(np.int32)
        kept_grids.append(dataclasses.replace(grid.take(np.flatnonzero(kept)), parent=parent))
        counts[grid.label] = [int(np.count_nonzero(~kept)), len(grid)]
    about = {"min_sharpness": min_sharpness, "version": QUALITY_VERSION, "tiles": counts}
    return tuple(kept_grids), json.dumps(about)


def left_out_notes(text: str) -> list[str]:
    """``BagAttrs.left_out`` in words, one note for each level that tiles were left out of."""
    about = json.loads(text) if text else {"tiles": {}}
    return [
        f"focus: {left:,} of {all_tiles:,} tiles at {label} are left out, below sharpness {about['min_sharpness']:g}"
        for label, (left, all_tiles) in about["tiles"].items()
        if left
    ]
