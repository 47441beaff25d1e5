"""The peers' way of reading, to compare with: one ``read_region`` for each tile, then a resize."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.geometry import TileGrid
from wsi_pipe.slides.base import Slide

__all__ = ["best_level", "read_singly"]


def best_level(slide: Slide, grid: TileGrid) -> int:
    """The coarsest level that is at least as fine as the tiles, as OpenSlide's best level for a downsample."""
    wanted = min(grid.scale_l0) * (1 + 1e-6)
    fine = [i for i, level in enumerate(slide.pyramid.levels) if max(level.downsample) <= wanted]
    return max(fine, default=0)


def read_singly(slide: Slide, grid: TileGrid, batch_size: int, threads: int) -> Iterator[NDArray[np.uint8]]:
    """Tiles of a grid in its order, uint8 (B, S, S, 3), each read by itself from the best level and resized.

    Tiles are read on ``threads`` threads, which is generous: peers read in worker processes and pay for sending tiles.
    """
    import cv2

    size = grid.spec.size_px
    level = best_level(slide, grid)
    scale = slide.pyramid.levels[level].downsample
    width, height = (max(round(t / d), 1) for t, d in zip(grid.tile_size_l0, scale, strict=True))

    def read(corner: NDArray[np.float64]) -> NDArray[np.uint8]:
        x, y = round(corner[0] / scale[0]), round(corner[1] / scale[1])
        region = slide.read_region(level, x, y, width, height)
        if region.shape[:2] == (size, size):
            return region
        return np.asarray(cv2.resize(region, (size, size), interpolation=cv2.INTER_AREA), np.uint8)

    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(grid), batch_size):
            yield np.stack(list(pool.map(read, grid.corners_l0[start : start + batch_size])))
