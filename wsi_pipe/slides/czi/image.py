"""One level of a CZI slide: tiles that lie anywhere and may overlap, in blocks of a regular grid.

Where the tiles themselves lie on a grid, the blocks are the tiles. Else a block is pasted together from those that
touch it, in the order of their M index, the last on top, as ZEN shows them; a tile that several blocks want is decoded
once and kept while its neighbours are read.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from wsi_pipe.errors import UnsupportedSlideError
from wsi_pipe.geometry import IntPair
from wsi_pipe.slides.base import WHITE, RGBArray, paste
from wsi_pipe.slides.codecs.decode import Buffer, CodecError
from wsi_pipe.slides.czi.segments import SubBlock
from wsi_pipe.slides.czi.tiles import decode_tile, fetch_tiles
from wsi_pipe.slides.native import MAX_TILE_BYTES
from wsi_pipe.slides.storage.source import Source

__all__ = ["CziImage", "Kept"]

BLOCK_PX = 1024
"""Side of a block where tiles lie on no grid."""

KEPT_BYTES = 1 << 26
MAX_TILES_IN_BLOCK = 4096


class Kept:
    """Tiles decoded lately, of all levels of a slide; each is decoded by one thread while others wait for it."""

    def __init__(self, limit_bytes: int = KEPT_BYTES) -> None:
        self._lock = threading.Lock()
        self._found: OrderedDict[int, Future[RGBArray]] = OrderedDict()
        self._limit, self._bytes = limit_bytes, 0
        self.decoded = 0

    def get(self, tile: SubBlock, data: Buffer) -> RGBArray:
        """Pixels of a tile. Raises CodecError."""
        key = tile.position
        with self._lock:
            future = self._found.get(key)
            mine = future is None
            if future is None:
                future = Future()
                self._found[key] = future
            else:
                self._found.move_to_end(key)
        if not mine:
            return future.result()
        try:
            pixels = decode_tile(tile, data)
        except BaseException as error:
            with self._lock:
                self._found.pop(key, None)
            future.set_exception(error)
            raise
        future.set_result(pixels)
        with self._lock:
            self.decoded += 1
            self._bytes += pixels.size
            while self._bytes > self._limit and len(self._found) > 1:
                oldest = next(iter(self._found))
                if not self._found[oldest].done():
                    break
                self._bytes -= self._found.pop(oldest).result().size
        return pixels


class CziImage:
    """One level. tiles: those of the level; origin_l0: level-0 pixel at its corner; factor: level-0 pixels per pixel.

    Raises UnsupportedSlideError where its tiles are out of bounds.
    """

    origin_px: IntPair = (0, 0)
    reduces: tuple[int, ...] = (1,)

    def __init__(
        self, source: Source, tiles: Sequence[SubBlock], origin_l0: IntPair, size_px: IntPair, factor: int, kept: Kept
    ) -> None:
        self._source, self._kept = source, kept
        self.size_px, self.factor = size_px, factor
        for tile in tiles:
            if tile.stored_px[0] * tile.stored_px[1] * 3 > MAX_TILE_BYTES:
                raise UnsupportedSlideError(
                    f"{source.name}: a tile of {tile.stored_px[0]} x {tile.stored_px[1]} px is out of bounds"
                )
        # Below others first: the order in which they are pasted.
        ordered = sorted(tiles, key=lambda tile: (tile.dimensions.get("M", 0), tile.position))
        self._tiles = [(tile, self._place(tile, origin_l0)) for tile in ordered]
        self.block_px, self._grid = self._blocks()
        self._cells = self._sorted()

    def _place(self, tile: SubBlock, origin_l0: IntPair) -> IntPair:
        # Corners of coarser tiles may lie between two of the level's pixels.
        return (
            round((tile.at[0] - origin_l0[0]) / self.factor),
            round((tile.at[1] - origin_l0[1]) / self.factor),
        )

    def _blocks(self) -> tuple[IntPair, bool]:
        """(width, height) of a block, and whether blocks are tiles."""
        sizes = Counter(tile.stored_px for tile, _ in self._tiles)
        width, height = max(sizes, key=lambda size: (size[0] * size[1], sizes[size]))
        seen = set()
        for tile, (x, y) in self._tiles:
            cell = (x // width, y // height)
            right = x + tile.stored_px[0] >= self.size_px[0] or tile.stored_px[0] == width
            below = y + tile.stored_px[1] >= self.size_px[1] or tile.stored_px[1] == height
            if x % width or y % height or x < 0 or y < 0 or cell in seen or not (right and below):
                side = (min(BLOCK_PX, self.size_px[0]), min(BLOCK_PX, self.size_px[1]))
                return side, False
            seen.add(cell)
        return (width, height), True

    def _sorted(self) -> dict[IntPair, list[int]]:
        """The tiles that touch each block, in the order of pasting."""
        cells: dict[IntPair, list[int]] = {}
        (block_w, block_h), (size_w, size_h) = self.block_px, self.size_px
        for i, (tile, (x, y)) in enumerate(self._tiles):
            right, below = min(x + tile.stored_px[0], size_w), min(y + tile.stored_px[1], size_h)
            for row in range(max(y, 0) // block_h, -(-below // block_h)):
                for column in range(max(x, 0) // block_w, -(-right // block_w)):
                    here = cells.setdefault((column, row), [])
                    here.append(i)
                    if len(here) > MAX_TILES_IN_BLOCK:
                        raise UnsupportedSlideError(
                            f"{self._source.name}: more than {MAX_TILES_IN_BLOCK} tiles lie on one place"
                        )
        return cells

    def covers(self, x: float, y: float) -> bool:
        """Whether a tile lies at a place, in pixels of the level."""
        cell = (int(x) // self.block_px[0], int(y) // self.block_px[1])
        return any(
            left <= x <= left + tile.stored_px[0] and top <= y <= top + tile.stored_px[1]
            for tile, (left, top) in (self._tiles[i] for i in self._cells.get(cell, ()))
        )

    def fetch(self, cells: Sequence[IntPair]) -> list[Any]:
        """The stored bytes of the tiles of each block; None where there is none. Raises SlideReadError."""
        wanted = [self._cells.get(cell) for cell in cells]
        numbers = sorted({i for part in wanted if part is not None for i in part})
        datas = dict(zip(numbers, fetch_tiles(self._source, [self._tiles[i][0] for i in numbers]), strict=True))
        return [None if part is None else [(i, datas[i]) for i in part] for part in wanted]

    def decode(self, cell: IntPair, data: Any, reduce: int) -> RGBArray:
        """See NativeImage.decode."""
        assert reduce == 1
        if self._grid:
            (number, stored) = data[0]
            return np.ascontiguousarray(decode_tile(self._tiles[number][0], stored))
        left, top = cell[0] * self.block_px[0], cell[1] * self.block_px[1]
        out = np.full((self.block_px[1], self.block_px[0], 3), WHITE, np.uint8)
        for number, stored in data:
            tile, (x, y) = self._tiles[number]
            paste(out, self._kept.get(tile, stored), x - left, y - top)
        return out

    def probe(self) -> None:
        """See ProbedImage.probe."""
        tile = self._tiles[0][0]
        (data,) = fetch_tiles(self._source, [tile])
        try:
            decode_tile(tile, data)
        except CodecError as error:
            raise UnsupportedSlideError(f"{self._source.name}: the tile at byte {tile.position}: {error}") from error
