"""Pixels of the tiles of many slides: kept decoded where they fit, else read when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.cores import available_cores
from wsi_pipe.geometry import TileGrid
from wsi_pipe.slides import open_slide
from wsi_pipe.slides.base import Slide
from wsi_pipe.tiles import stream_tiles

__all__ = ["HeldTiles", "SlideTiles", "TilePixels", "TileSlide", "Wanted"]

Pixels = NDArray[np.uint8]
Wanted = tuple[int, NDArray[np.int64] | None]
"""A slide's number, and which of its tiles in rising order, None for all."""


@dataclass(frozen=True)
class TileSlide:
    """Where the tiles of one slide lie. mpp: (x, y). scene, z: which picture in the file, or None."""

    slide_id: str
    path: str
    mpp: tuple[float, float]
    grid: TileGrid
    scene: int | None = None
    z: int | None = None


class TilePixels(Protocol):
    """lengths: int64 (slides,), tiles of each. side_px: of a tile."""

    lengths: NDArray[np.int64]
    side_px: int

    def fetch(self, wanted: Sequence[Wanted]) -> list[Pixels]:
        """uint8 (N, S, S, 3) of each."""


class HeldTiles:
    """Tiles in memory: uint8 (N, S, S, 3) of each slide."""

    def __init__(self, tiles: Sequence[Pixels]) -> None:
        self._tiles = tiles
        self.lengths = np.array([len(own) for own in tiles], np.int64)
        self.side_px = int(tiles[0].shape[1])

    def fetch(self, wanted: Sequence[Wanted]) -> list[Pixels]:
        """See ``TilePixels``."""
        return [self._tiles[number] if rows is None else self._tiles[number][rows] for number, rows in wanted]


class SlideTiles:
    """Tiles of slides on disk, read by ``threads`` (0 for as many as there are cores).

    A slide's tiles stay decoded once they were read whole, if those of all slides fit into ``cache_mib``; otherwise
    only what is asked for is read, each time. Reading raises what opening and decoding the slide raise.
    """

    def __init__(self, slides: Sequence[TileSlide], side_px: int, *, cache_mib: int = 0, threads: int = 0) -> None:
        self.slides = slides
        self.lengths = np.array([len(slide.grid) for slide in slides], np.int64)
        self.side_px = side_px
        self.threads = threads or available_cores()
        self.reads = 0
        fits = int(self.lengths.sum()) * side_px**2 * 3 <= cache_mib << 20
        self._kept: dict[int, Pixels] | None = {} if fits else None

    def check(self, numbers: Sequence[int]) -> None:
        """Open slides and close them: one that is not there is told of before hours of training, not after.

        Raises what opening a slide raises.
        """
        for number in numbers:
            self._open(number).close()

    def _open(self, number: int) -> Slide:
        slide = self.slides[number]
        return open_slide(slide.path, mpp=slide.mpp, scene=slide.scene, z=slide.z)

    def fetch(self, wanted: Sequence[Wanted]) -> list[Pixels]:
        """See ``TilePixels``."""
        kept = self._kept
        if kept is not None:
            missing = sorted({number for number, _ in wanted} - kept.keys())
            kept |= dict(zip(missing, self._read_all([(number, None) for number in missing]), strict=True))
            return [kept[number] if rows is None else kept[number][rows] for number, rows in wanted]
        return self._read_all(wanted)

    def _read_all(self, wanted: Sequence[Wanted]) -> list[Pixels]:
        if not wanted:
            return []
        each = max(self.threads // len(wanted), 1)
        with ThreadPoolExecutor(min(self.threads, len(wanted))) as pool:
            return list(pool.map(lambda item: self._read(item[0], item[1], each), wanted))

    def _read(self, number: int, rows: NDArray[np.int64] | None, threads: int) -> Pixels:
        slide = self.slides[number]
        self.reads += 1
        grid = slide.grid if rows is None else slide.grid.take(rows)
        out = np.empty((len(grid), self.side_px, self.side_px, 3), np.uint8)
        opened = self._open(number)
        try:
            for batch in stream_tiles(opened, grid, threads=threads):
                out[batch.index] = batch.pixels
        finally:
            opened.close()
        return out
