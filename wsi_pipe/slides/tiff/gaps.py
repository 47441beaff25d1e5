"""Aperio's empty tiles in lower levels: filled from the next finer level, as OpenSlide fills them.

Some Aperio encoders leave tiles of lower levels out where there is tissue, which the finer level holds. White there
would be background where the slide has none.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.geometry import IntPair
from wsi_pipe.slides.base import WHITE, RGBArray, paste
from wsi_pipe.slides.codecs.decode import reduce_by_mean
from wsi_pipe.slides.codecs.fastjpeg import ReadTiles
from wsi_pipe.slides.native import MAX_BLOCK_BYTES, ProbedImage
from wsi_pipe.slides.room import Room
from wsi_pipe.slides.tiff.image import TiffImage

__all__ = ["FilledImage", "fill_gaps"]


@dataclass(frozen=True)
class _Finer:
    """What stands for an empty tile: the blocks of the finer level that cover it, and their raw data."""

    cells: Sequence[IntPair]
    data: Sequence[Any]


class FilledImage:
    """A level whose empty tiles are the means of what lies there in ``finer``; see ProbedImage.

    factor: pixels of the finer level to one of this, along each side.
    """

    origin_px: IntPair = (0, 0)

    def __init__(self, image: TiffImage, finer: ProbedImage, factor: int) -> None:
        self._image = image
        self._finer = finer
        self._factor = factor
        self.size_px = image.size_px
        self.block_px = image.block_px
        self.reduces = image.reduces

    def fetch(self, cells: Sequence[IntPair]) -> list[Any]:
        """See NativeImage.fetch."""
        found = self._image.fetch(cells)
        return [self._cover(cell) if data is None else data for cell, data in zip(cells, found, strict=True)]

    def _cover(self, cell: IntPair) -> _Finer | None:
        spans = []
        for at, block, size, finer_block, finer_size in zip(
            cell, self.block_px, self.size_px, self._finer.block_px, self._finer.size_px, strict=True
        ):
            first, stop = at * block * self._factor, min((at + 1) * block, size) * self._factor
            spans.append(range(first // finer_block, -(-min(stop, finer_size) // finer_block)))
        cells = [(column, row) for row, column in itertools.product(spans[1], spans[0])]
        data = self._finer.fetch(cells)
        return None if all(item is None for item in data) else _Finer(cells, data)

    def decode(self, cell: IntPair, data: Any, reduce: int) -> RGBArray:
        """See NativeImage.decode."""
        if not isinstance(data, _Finer):
            return self._image.decode(cell, data, reduce)
        width, height = (side * self._factor for side in self.block_px)
        x0, y0 = cell[0] * width, cell[1] * height
        out = np.full((height, width, 3), WHITE, np.uint8)
        block_w, block_h = self._finer.block_px
        for (column, row), raw in zip(data.cells, data.data, strict=True):
            if raw is None:
                continue
            x, y = column * block_w, row * block_h
            # What a tile holds beyond its image is padding that the encoder made up.
            inside = (self._finer.size_px[1] - y, self._finer.size_px[0] - x)
            pixels = self._finer.decode((column, row), raw, 1)[: inside[0], : inside[1]]
            paste(out, pixels[:block_h, :block_w], x - x0, y - y0)
        return reduce_by_mean(out, self._factor * reduce, WHITE)

    def decode_into(self, datas: Sequence[Any], outs: Sequence[RGBArray], reduce: int) -> list[bool]:
        """See BatchImage.decode_into; tiles that are put together from the finer level go one by one."""
        stored = [i for i, data in enumerate(datas) if not isinstance(data, _Finer)]
        done = [False] * len(datas)
        found = self._image.decode_into([datas[i] for i in stored], [outs[i] for i in stored], reduce)
        for i, good in zip(stored, found, strict=True):
            done[i] = good
        return done

    def reads_into(self) -> bool:
        """See RoomImage.reads_into."""
        return self._image.reads_into()

    def read_into(self, cells: NDArray[np.int64], room: Room, reduce: int) -> ReadTiles:
        """See RoomImage.read_into; empty tiles are not done so."""
        return self._image.read_into(cells, room, reduce)

    def probe(self) -> None:
        """See ProbedImage.probe."""
        self._image.probe()


def fill_gaps(images: Sequence[TiffImage]) -> tuple[list[ProbedImage], list[IntPair]]:
    """The levels, finest first, with empty tiles filled below level 0, and the sizes of levels that had to be left out.

    A level is left out where it has empty tiles and its pixels are not those of whole boxes of the finer one.
    """
    filled: list[ProbedImage] = list(images[:1])
    left_out: list[IntPair] = []
    for image in images[1:]:
        finer = filled[-1]
        factor = round(finer.size_px[0] / image.size_px[0])
        # Of sizes that were rounded down from level 0 each, one may be a pixel off the other's whole fraction.
        whole = factor > 1 and all(
            abs(fine - factor * coarse) <= factor for fine, coarse in zip(finer.size_px, image.size_px, strict=True)
        )
        if whole and image.block_px[0] * image.block_px[1] * factor**2 * 3 <= MAX_BLOCK_BYTES:
            filled.append(FilledImage(image, finer, factor))
        elif image.is_whole():
            filled.append(image)
        else:
            left_out.append(image.size_px)
    return filled, left_out
