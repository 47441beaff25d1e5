"""Hamamatsu NDPI: each level is one huge JPEG, which its restart markers let us read in pieces.

Between two restart markers the entropy-coded data stands alone. A private tag lists where each piece begins, so a block
is made of the pieces of some rows: a header of the block's own size, the pieces, and restart markers numbered afresh.
Tags after tifffile's and OpenSlide's notes on the format; restart intervals: ITU-T T.81, B.2.4.4 and E.1.4.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.errors import SlideOpenError, SlideReadError, UnsupportedSlideError
from wsi_pipe.geometry import IntPair
from wsi_pipe.slides.base import RGBArray
from wsi_pipe.slides.codecs.decode import (
    JPEG_REDUCES,
    CodecError,
    JpegDecoder,
    JpegHead,
    decode_jpeg_stream,
    jpeg_prefix,
    read_jpeg_head,
    with_frame_size,
)
from wsi_pipe.slides.native import only_picture, to_rgb
from wsi_pipe.slides.storage.source import Source
from wsi_pipe.slides.tiff.ifd import Directory
from wsi_pipe.slides.tiff.image import COMPRESSION, HEIGHT, JPEG, STRIP_COUNTS, STRIP_OFFSETS, WIDTH
from wsi_pipe.slides.tiff.layout import TiffLayout, icc_profile, resolution_mpp
from wsi_pipe.slides.tiff.picture import only_plane, pick_plane
from wsi_pipe.slides.tiff.samples import check_samples

__all__ = ["NdpiImage", "ndpi_focus", "read_ndpi"]

LENS, FOCUS, STARTS, STARTS_HIGH = 65421, 65424, 65426, 65432
MAX_HEADER_BYTES = 1 << 16
BLOCK_PX = 1 << 19
"""Pixels of a block, about: enough rows that the header costs little, few enough that a tile needs little else."""

MIN_ROWS_PX, MAX_ROWS_PX = 64, 512
MAX_WHOLE_BYTES, MAX_WHOLE_PX = 1 << 24, 1 << 24
"""A level without restart markers is decoded as one block, if it is no larger than this."""


class NdpiImage:
    """One level of an NDPI file. Raises UnsupportedSlideError where its JPEG cannot be taken apart."""

    origin_px: IntPair = (0, 0)

    def __init__(self, source: Source, directory: Directory) -> None:
        self._source = source
        self._directory = directory
        self._name = f"{source.name}: image {directory.index}"
        self._lock = threading.Lock()
        self._starts: NDArray[np.int64] | None = None
        self.size_px = (directory.number(WIDTH), directory.number(HEIGHT))
        self.reduces: tuple[int, ...] = JPEG_REDUCES
        if directory.number(COMPRESSION, 1) != JPEG or directory.count(STRIP_OFFSETS) != 1:
            raise UnsupportedSlideError(f"{self._name}: only NDPI levels of one JPEG strip are read")
        self._at, self._length = directory.number(STRIP_OFFSETS), directory.number(STRIP_COUNTS)
        if self._length < 4 or self._at + self._length > source.size:
            raise SlideOpenError(
                f"{self._name}: the JPEG stream lies outside the file",
                remedy="the file is truncated or damaged: copy it again",
            )
        try:
            self._head = read_jpeg_head(source.read(self._at, min(self._length, MAX_HEADER_BYTES)))
        except CodecError as error:
            raise UnsupportedSlideError(f"{self._name}: the JPEG header is not understood: {error}") from error
        head = self._head
        if head.components not in (1, 3) or head.progressive:
            raise UnsupportedSlideError(f"{self._name}: the JPEG stream is progressive or has no 1 or 3 components")
        # libjpeg's own guess, as the scanner's software and OpenSlide make it: YCbCr unless the stream says otherwise.
        self._ycbcr = head.jfif or head.adobe_transform != 0
        self._pieces: IntPair | None = None
        if directory.count(STARTS):
            self._set_pieces(head)
        else:
            self._set_whole(head)

    def _set_pieces(self, head: JpegHead) -> None:
        mcu = (8 * max(h for h, _ in head.sampling), 8 * max(v for _, v in head.sampling))
        if head.components == 1:
            mcu = (8, 8)
        across = -(-self.size_px[0] // mcu[0])
        if not head.restart_interval or across % head.restart_interval:
            raise UnsupportedSlideError(
                f"{self._name}: {across} blocks a row do not divide by the restart interval {head.restart_interval}"
            )
        columns, rows = across // head.restart_interval, -(-self.size_px[1] // mcu[1])
        counts = self._directory.count(STARTS), self._directory.count(STARTS_HIGH)
        if counts[0] != columns * rows or counts[1] not in (0, counts[0]):
            raise UnsupportedSlideError(
                f"{self._name}: {counts[0]} restart markers are listed, {columns * rows} are expected"
            )
        self._mcu, self._pieces = mcu, (columns, rows)
        width = head.restart_interval * mcu[0]
        height = MIN_ROWS_PX
        while height < MAX_ROWS_PX and 2 * height * width <= BLOCK_PX:
            height *= 2
        self.block_px = (width, height)
        self._rows = height // mcu[1]
        if width >= 1 << 16:
            raise UnsupportedSlideError(f"{self._name}: {width} px between restart markers are out of bounds")

    def _set_whole(self, head: JpegHead) -> None:
        width, height = self.size_px
        if head.size_px != self.size_px or self._length > MAX_WHOLE_BYTES or width * height > MAX_WHOLE_PX:
            raise UnsupportedSlideError(
                f"{self._name}: {width} x {height} px in one JPEG stream without a list of restart markers"
            )
        # Rounded up, so that every reduction divides it.
        self.block_px = (-(-width // 8) * 8, -(-height // 8) * 8)
        self._whole = JpegDecoder(self.size_px, head.components, ycbcr=self._ycbcr)

    def starts(self) -> NDArray[np.int64]:
        """Where each piece begins in the file, and the end of the last; read once, when needed."""
        starts = self._starts
        if starts is None:
            with self._lock:
                if self._starts is None:
                    low = self._directory.array(STARTS).astype(np.int64)
                    if self._directory.count(STARTS_HIGH):
                        low |= self._directory.array(STARTS_HIGH).astype(np.int64) << 32
                    self._starts = np.append(low, self._length) + self._at
                starts = self._starts
        return starts

    def fetch(self, cells: Sequence[IntPair]) -> list[Any]:
        """Entropy-coded pieces of each block, row by row. Raises SlideReadError."""
        if self._pieces is None:
            return self._source.read_many([(self._at, self._length)] * len(cells))
        starts = self.starts()
        columns, rows = self._pieces
        limit = self._piece_limit()
        ranges: list[tuple[int, int]] = []
        per_cell: list[int] = []
        for column, row in cells:
            first, last = row * self._rows, min((row + 1) * self._rows, rows)
            pieces = [
                (int(starts[i]), int(starts[i + 1])) for i in range(first * columns + column, last * columns, columns)
            ]
            if any(not 0 < end - start <= limit for start, end in pieces):
                raise SlideReadError(
                    f"{self._name}: the list of restart markers is damaged near column {column}, row {row}",
                    remedy="the file is damaged: copy it again",
                )
            ranges += [(start, end - start) for start, end in pieces]
            per_cell.append(len(pieces))
        data = iter(self._source.read_many(ranges))
        return [[next(data) for _ in range(count)] for count in per_cell]

    def decode(self, cell: IntPair, data: Any, reduce: int) -> RGBArray:
        """See NativeImage.decode."""
        if self._pieces is None:
            return to_rgb(self._whole.decode(data, reduce))
        size = (self.block_px[0], len(data) * self._mcu[1])
        head = with_frame_size(self._head.kept, size)
        parts: list[bytes | memoryview] = [jpeg_prefix(self._head.components, ycbcr=self._ycbcr), head]
        for i, piece in enumerate(data):
            if i:
                parts.append(bytes((0xFF, 0xD0 + (i - 1) % 8)))
            parts.append(_without_marker(piece))
        parts.append(b"\xff\xd9")
        return to_rgb(decode_jpeg_stream(b"".join(parts), size, self._head.components, reduce))

    def probe(self) -> None:
        """See ProbedImage.probe; of several blocks, since a list of markers may be wrong in one place only."""
        columns, rows = (1, 1) if self._pieces is None else (self._pieces[0], -(-self._pieces[1] // self._rows))
        if self._pieces is not None:
            sizes = np.diff(self.starts())
            if sizes.min() <= 0 or sizes.max() > self._piece_limit():
                raise UnsupportedSlideError(f"{self._name}: the list of restart markers is not in order")
        # The end is where a list that has gone astray shows; of a URL each block costs a request.
        places = (0.5, 1.0, 0.0, 0.25, 0.75) if self._source.local else (0.5, 1.0)
        cells = dict.fromkeys((round(at * (columns - 1)), round(at * (rows - 1))) for at in places)
        for cell in cells:
            try:
                self.decode(cell, self.fetch([cell])[0], 1)
            except CodecError as error:
                raise UnsupportedSlideError(f"{self._name}: block column {cell[0]}, row {cell[1]}: {error}") from error

    def _piece_limit(self) -> int:
        """Bytes that an entropy-coded piece may take."""
        return 4 * self.block_px[0] * self._mcu[1] * 3 + (1 << 16)


def _without_marker(piece: bytes | memoryview) -> bytes | memoryview:
    """The entropy-coded data of a piece, without the restart or end marker behind it."""
    if len(piece) >= 2 and piece[-2] == 0xFF and 0xD0 <= piece[-1] <= 0xD9:
        return piece[:-2]
    # Behind the last piece the stream's end marker may be followed by padding.
    end = bytes(piece).rfind(b"\xff\xd9")
    return piece[:end] if end >= 0 else piece


def read_ndpi(
    source: Source, directories: Sequence[Directory], scene: int | None = None, z: int | None = None
) -> TiffLayout:
    """The layout of an NDPI file: pages with a lens are levels of the focal plane that is meant, -1 is the macro image.

    Raises NotAPictureError for a plane that is not there, UnsupportedSlideError where the file is not understood.
    """
    focus, note = ndpi_focus(source.name, directories, scene, z)
    levels = [d for d in directories if _lens(d) > 0 and _focus(d) == focus]
    if not levels or levels[0].number(WIDTH) < max(d.number(WIDTH) for d in levels):
        raise UnsupportedSlideError(f"{source.name}: the first image of the NDPI file is not its finest level")
    first = levels[0]
    check_samples(source.name, first)
    images = [NdpiImage(source, d) for d in levels]
    mpp, mpp_source = resolution_mpp(first)
    lens = _lens(first)
    return TiffLayout(
        vendor="hamamatsu",
        description="Hamamatsu NDPI with JPEG restart intervals",
        images=images,
        mpp=mpp,
        mpp_source=mpp_source,
        objective_power=lens,
        icc=icc_profile(first),
        properties={"hamamatsu.SourceLens": f"{lens:g}"},
        associated=dict([("macro", d) for d in directories if _lens(d) == -1][-1:]),
        notes=(note,) if note else (),
    )


def ndpi_focus(name: str, directories: Sequence[Directory], scene: int | None, z: int | None) -> tuple[float, str]:
    """The offset of the focal plane that is meant, and the note on it where there are several.

    Raises NotAPictureError for one that is not there.
    """
    only_picture(name, scene, None)
    offsets = sorted({_focus(d) for d in directories if _lens(d) > 0})
    if len(offsets) < 2:
        only_plane(name, z)
        return (offsets[0] if offsets else 0.0), ""
    # Of the two in the middle of an even number, the one nearer to where the scanner focused.
    middle = min(((len(offsets) - 1) // 2, len(offsets) // 2), key=lambda i: abs(offsets[i]))
    number, note = pick_plane(name, len(offsets), z, middle)
    return offsets[number], f"{note}; its focus offset is {offsets[number]:g}"


def _lens(directory: Directory) -> float:
    return _number(directory, LENS)


def _focus(directory: Directory) -> float:
    return _number(directory, FOCUS)


def _number(directory: Directory, tag: int) -> float:
    """The one number of a tag; 0 where there is none, or what is there is no number."""
    values = directory.array(tag) if directory.count(tag) == 1 else np.zeros(0)
    return float(values[0]) if len(values) and values.dtype.kind in "iuf" and np.isfinite(values[0]) else 0.0
