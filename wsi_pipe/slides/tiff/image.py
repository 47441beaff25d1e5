"""One image of a TIFF file: where its tiles or strips lie, and how they decode."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.errors import SlideOpenError, SlideReadError, UnsupportedSlideError
from wsi_pipe.geometry import IntPair
from wsi_pipe.slides.base import RGBArray
from wsi_pipe.slides.codecs.decode import JPEG_REDUCES, CodecError, Decoder, JpegDecoder, PlainDecoder
from wsi_pipe.slides.codecs.fastjpeg import ReadTiles, reads_tiles
from wsi_pipe.slides.codecs.jpeg2000 import Jpeg2000Decoder
from wsi_pipe.slides.native import MAX_TILE_BYTES, to_rgb
from wsi_pipe.slides.room import Room
from wsi_pipe.slides.storage.source import FileSource, Source
from wsi_pipe.slides.tiff.ifd import Directory

__all__ = ["TiffImage"]

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 256, 257, 258, 259, 262
STRIP_OFFSETS, SAMPLES, ROWS_PER_STRIP, STRIP_COUNTS, PLANAR = 273, 277, 278, 279, 284
PREDICTOR, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_COUNTS = 317, 322, 323, 324, 325
FILL_ORDER, SAMPLE_FORMAT, JPEG_TABLES, DEPTH = 266, 339, 347, 32997

NONE, LZW, JPEG, DEFLATE, OLD_DEFLATE = 1, 5, 7, 8, 32946
APERIO_YCBCR, APERIO_RGB, JPEG2000 = 33003, 33005, 34712
JPEG2000_KINDS = (APERIO_YCBCR, APERIO_RGB, JPEG2000)
PHOTOMETRIC_GREY, PHOTOMETRIC_RGB, PHOTOMETRIC_YCBCR = 1, 2, 6

_NAMES = {
    NONE: "none", LZW: "LZW", JPEG: "JPEG", DEFLATE: "deflate", OLD_DEFLATE: "deflate", APERIO_YCBCR: "JPEG 2000",
    APERIO_RGB: "JPEG 2000", JPEG2000: "JPEG 2000",
}  # fmt: skip


class TiffImage:
    """An image of a TIFF file, in tiles or strips.

    Raises UnsupportedSlideError when anything about it is not understood.
    """

    origin_px: IntPair = (0, 0)

    def __init__(self, source: Source, directory: Directory, *, size_px: IntPair | None = None) -> None:
        self._source = source
        self.directory = directory
        self._lock = threading.Lock()
        self._table: tuple[NDArray[np.uint64], NDArray[np.uint64]] | None = None
        self._spans: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
        self._name = f"{source.name}: image {directory.index}"
        stored = (directory.number(WIDTH), directory.number(HEIGHT))
        self.size_px = stored if size_px is None else size_px
        self.is_tiled = TILE_WIDTH in directory
        if self.is_tiled:
            self.block_px = (directory.number(TILE_WIDTH), directory.number(TILE_HEIGHT))
        else:
            self.block_px = (stored[0], min(directory.number(ROWS_PER_STRIP, stored[1]), stored[1]))
        if min(*stored, *self.block_px) < 1 or self.block_px[0] * self.block_px[1] * 3 > MAX_TILE_BYTES:
            raise UnsupportedSlideError(
                f"{self._name}: {stored[0]} x {stored[1]} px in tiles of {self.block_px[0]} x {self.block_px[1]} px "
                "is out of bounds"
            )
        if self.size_px[0] > stored[0] or self.size_px[1] > stored[1]:
            raise UnsupportedSlideError(
                f"{self._name}: {self.size_px[0]} x {self.size_px[1]} px are described, "
                f"{stored[0]} x {stored[1]} px are stored"
            )
        self._stored_px = stored
        self._grid = (-(-stored[0] // self.block_px[0]), -(-stored[1] // self.block_px[1]))
        self._check_pixels()
        self._check_table()
        self._set_codec()

    def _check_pixels(self) -> None:
        d = self.directory
        self.samples = d.number(SAMPLES, 1)
        self.planar = d.number(PLANAR, 1) == 2 and self.samples > 1
        self.compression = d.number(COMPRESSION, 1)
        self.photometric = d.number(PHOTOMETRIC, PHOTOMETRIC_GREY)
        bits, formats = d.numbers(BITS) or (1,), d.numbers(SAMPLE_FORMAT)
        if any(b != 8 for b in bits) or any(f != 1 for f in formats):
            raise UnsupportedSlideError(f"{self._name}: only 8-bit unsigned samples are read, not {bits} bits")
        if d.number(DEPTH, 1) != 1:
            raise UnsupportedSlideError(f"{self._name}: a volume of {d.number(DEPTH)} slices is not read")
        colours = {1: (PHOTOMETRIC_GREY,), 3: (PHOTOMETRIC_RGB, PHOTOMETRIC_YCBCR)}.get(self.samples, ())
        if self.photometric not in colours:
            raise UnsupportedSlideError(
                f"{self._name}: {self.samples} samples a pixel under photometric {self.photometric} are not RGB"
            )
        if d.number(FILL_ORDER, 1) != 1:
            raise UnsupportedSlideError(f"{self._name}: reversed bits in bytes are not read")
        if self.compression not in _NAMES:
            raise UnsupportedSlideError(f"{self._name}: TIFF compression {self.compression} is not read")

    def _check_table(self) -> None:
        d = self.directory
        self._offsets_tag, self._counts_tag = (
            (TILE_OFFSETS, TILE_COUNTS) if self.is_tiled else (STRIP_OFFSETS, STRIP_COUNTS)
        )
        expected = self._grid[0] * self._grid[1] * (self.samples if self.planar else 1)
        counts = d.count(self._offsets_tag), d.count(self._counts_tag)
        if counts != (expected, expected):
            # Two lists that agree contradict the size: whoever believes that lays the tiles out wrongly.
            wrong = self.is_tiled and counts[0] == counts[1] > 0
            raise (SlideOpenError if wrong else UnsupportedSlideError)(
                f"{self._name}: {self._stored_px[0]} x {self._stored_px[1]} px in tiles of {self.block_px[0]} x "
                f"{self.block_px[1]} px need {expected} tiles, the file lists {counts[0]} offsets and {counts[1]} sizes"
            )

    def _set_codec(self) -> None:
        self.reduces: tuple[int, ...] = JPEG_REDUCES if self.compression in (JPEG, *JPEG2000_KINDS) else (1,)
        if self.photometric == PHOTOMETRIC_YCBCR and (self.planar or self.compression not in (JPEG, APERIO_YCBCR)):
            raise UnsupportedSlideError(f"{self._name}: YCbCr under {self.codec} compression is not read")
        # Twice what the pixels take, and some more: nothing that was compressed at all needs that.
        channels = 1 if self.planar else self.samples
        self._limit_bytes = 2 * self.block_px[0] * self.block_px[1] * channels + (1 << 16)
        self._decoder = self._decoder_of(self.block_px)
        last_rows = self._stored_px[1] - (self._grid[1] - 1) * self.block_px[1]
        # Tiles are always whole; the last strip ends with the image.
        self._last = self._decoder_of((self.block_px[0], last_rows)) if not self.is_tiled else self._decoder

    def _decoder_of(self, size_px: IntPair) -> Decoder:
        channels = 1 if self.planar else self.samples
        if self.compression == JPEG:
            try:
                tables = self.directory.raw(JPEG_TABLES)
                return JpegDecoder(size_px, channels, ycbcr=self.photometric == PHOTOMETRIC_YCBCR, tables=tables)
            except CodecError as error:
                raise UnsupportedSlideError(f"{self._name}: the JPEG tables are not understood: {error}") from error
        if self.compression in JPEG2000_KINDS:
            return Jpeg2000Decoder(size_px, channels, ycbcr=self.compression == APERIO_YCBCR)
        predictor = self.directory.number(PREDICTOR, 1)
        if predictor not in (1, 2) or (predictor == 2 and self.compression == NONE):
            raise UnsupportedSlideError(f"{self._name}: TIFF predictor {predictor} is not read")
        return PlainDecoder(size_px, channels, self.codec, difference=predictor == 2)

    @property
    def codec(self) -> str:
        """The name of the compression."""
        return _NAMES[self.compression]

    def table(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """Offsets and byte counts of all tiles, row by row (plane by plane where planar); read once, when needed."""
        table = self._table
        if table is None:
            with self._lock:
                table = self._table
                if table is None:
                    offsets = self.directory.array(self._offsets_tag).astype(np.uint64)
                    counts = self.directory.array(self._counts_tag).astype(np.uint64)
                    table = self._table = (offsets, counts)
        return table

    def is_whole(self) -> bool:
        """False where a tile is empty; reads the table of all tiles."""
        offsets, counts = self.table()
        return bool(offsets.all() and counts.all())

    def fetch(self, cells: Sequence[IntPair]) -> list[Any]:
        """Raw bytes of blocks, a tuple of one item a plane; None for a missing block. Raises SlideReadError."""
        if not cells:
            return []
        offsets, counts = self.table()
        columns, rows = self._grid
        planes = self.samples if self.planar else 1
        # All at once: with many reading threads, time under Python's lock is what there is least of.
        column, row = np.asarray(cells, np.int64).T
        at = (row * columns + column)[:, None] + np.arange(planes) * (columns * rows)
        offset, count = offsets[at], counts[at]
        # Writers leave background out with a byte count or an offset of 0.
        there = offset.all(1) & count.all(1)
        if (beyond := there & (count > self._limit_bytes).any(1)).any():
            first = int(beyond.argmax())
            raise self._too_large(cells[first], int(count[first].max()))
        present: list[bool] = there.tolist()
        spans = list(zip(offset.ravel().tolist(), count.ravel().tolist(), strict=True))
        if planes == 1 and all(present):
            return [(data,) for data in self._source.read_many(spans)]
        found = [i for i, is_there in enumerate(present) if is_there]
        wanted = [span for i in found for span in spans[i * planes : (i + 1) * planes]]
        data = self._source.read_many(wanted)
        blocks: list[Any] = [None] * len(cells)
        for n, i in enumerate(found):
            blocks[i] = tuple(data[n * planes : (n + 1) * planes])
        return blocks

    def probe(self) -> None:
        """See ProbedImage.probe; of a local file the places of all tiles are checked, remotely that costs too much."""
        total = self._grid[0] * self._grid[1]
        if self._source.local:
            offsets, counts = self.table()
            size = np.uint64(self._source.size)
            beyond = (counts > size) | (offsets > size - np.minimum(counts, size))
            lost = np.flatnonzero(beyond & (counts > 0) & (offsets > 0))
            if len(lost):
                column, row = int(lost[0]) % total % self._grid[0], int(lost[0]) % total // self._grid[0]
                raise SlideOpenError(
                    f"{self._name}: {len(lost)} of {len(counts)} tiles lie outside the file, the first at column "
                    f"{column}, row {row}",
                    remedy="the file is truncated or damaged: copy it again",
                )
        for i in (total // 2, 0, total - 1, total // 4, 3 * total // 4):
            spans = [
                (self.directory.item(self._offsets_tag, at), self.directory.item(self._counts_tag, at))
                for at in range(i, total * (self.samples if self.planar else 1), total)
            ]
            if not all(offset and count for offset, count in spans):
                continue
            cell = (i % self._grid[0], i // self._grid[0])
            if (largest := max(count for _, count in spans)) > self._limit_bytes:
                raise self._too_large(cell, largest)
            try:
                self.decode(cell, self._source.read_many(spans), 1)
            except CodecError as error:
                raise UnsupportedSlideError(f"{self._name}: tile column {cell[0]}, row {cell[1]}: {error}") from error
            return

    def _too_large(self, cell: IntPair, count: int) -> SlideReadError:
        width, height = self.block_px
        return SlideReadError(
            f"{self._name}: tile column {cell[0]}, row {cell[1]} declares {count} bytes, a tile of {width} x {height} "
            "px cannot take that many",
            remedy="the file is damaged: copy it again",
        )

    def decode(self, cell: IntPair, data: Any, reduce: int) -> RGBArray:
        """See NativeImage.decode."""
        decoder = self._last if cell[1] == self._grid[1] - 1 else self._decoder
        if self.planar:
            return np.concatenate([decoder.decode(part, reduce) for part in data], axis=2)
        return to_rgb(decoder.decode(data[0], reduce))

    def decode_into(self, datas: Sequence[Any], outs: Sequence[RGBArray], reduce: int) -> list[bool]:
        """See BatchImage.decode_into; only the last strip is not a whole block."""
        if self.planar or not isinstance(self._decoder, JpegDecoder):
            return [False] * len(datas)
        return self._decoder.decode_into([data[0] for data in datas], outs, reduce)

    def reads_into(self) -> bool:
        """See RoomImage.reads_into: JPEG tiles of a local file."""
        return (
            self.is_tiled
            and not self.planar
            and isinstance(self._decoder, JpegDecoder)
            and isinstance(self._source, FileSource)
            and reads_tiles()
        )

    def read_into(self, cells: NDArray[np.int64], room: Room, reduce: int) -> ReadTiles:
        """See RoomImage.read_into."""
        assert isinstance(self._decoder, JpegDecoder)
        assert isinstance(self._source, FileSource)
        offsets, counts = self._sound_spans()
        at = cells[:, 1] * self._grid[0] + cells[:, 0]
        offset, count = offsets[at], counts[at]
        found = self._decoder.read_into(self._source.descriptor, offset, count, room, reduce)
        self._source.stats.add(bytes_fetched=int(np.dot(count, found.done)), requests=found.requests)
        return found

    def _sound_spans(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The table with a count of 0 for what cannot be: that is left to ``fetch``, which says what is wrong."""
        spans = self._spans
        if spans is None:
            offset, count = self.table()
            size = np.uint64(self._source.size)
            wrong = (count > self._limit_bytes) | (count > size) | (offset > size - np.minimum(count, size))
            wrong |= offset == 0
            sound = [np.where(wrong, np.uint64(0), values).astype(np.int64) for values in (offset, count)]
            # By two threads at once it is made twice, alike.
            spans = self._spans = (sound[0], sound[1])
        return spans
