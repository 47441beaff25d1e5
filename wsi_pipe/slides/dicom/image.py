"""One level of a DICOM whole-slide image: which frame is which tile, and how it decodes.

References: DICOM PS3.3 C.8.12.4 (VL Whole Slide Microscopy), C.7.6.17 (multi-frame dimension, tiling).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from wsi_pipe.errors import SlideReadError, UnsupportedSlideError
from wsi_pipe.geometry import IntPair
from wsi_pipe.slides.base import RGBArray
from wsi_pipe.slides.codecs.decode import JPEG_REDUCES, CodecError, Decoder, JpegDecoder, PlainDecoder, read_jpeg_head
from wsi_pipe.slides.codecs.jpeg2000 import Jpeg2000Decoder
from wsi_pipe.slides.dicom.frames import Frame, frame_table, join_fragments
from wsi_pipe.slides.dicom.instance import (
    JPEG2000_SYNTAXES,
    JPEG_SYNTAXES,
    MAX_FRAMES,
    PLAIN_SYNTAXES,
    Instance,
    check_meaning,
    check_pixels,
)
from wsi_pipe.slides.dicom.places import middle_plane, places
from wsi_pipe.slides.native import MAX_TILE_BYTES
from wsi_pipe.slides.storage.source import Source

__all__ = ["DicomImage"]


class DicomImage:
    """One level: the frames of one instance, or of the instances of one concatenation, in one focal plane.

    z: the plane, 0 nearest to the glass, at most the last one; None for the middle one. focal_planes: how many there
    are. size_px: (width, height), which a slide may set to less where a level is padded to whole tiles.
    Raises UnsupportedSlideError when anything about it is not understood.
    """

    origin_px: IntPair = (0, 0)

    def __init__(self, instances: Sequence[Instance], z: int | None = None) -> None:
        first = instances[0]
        self._name = first.source.name
        self.local = first.source.local
        for instance in instances:
            check_meaning(instance)
            check_pixels(instance)
        self.size_px = first.size_px
        self.block_px = (first.number("Columns"), first.number("Rows"))
        if min(*self.size_px, *self.block_px) < 1 or self.block_px[0] * self.block_px[1] * 3 > MAX_TILE_BYTES:
            raise UnsupportedSlideError(
                f"{self._name}: {self.size_px[0]} x {self.size_px[1]} px in frames of {self.block_px[0]} x "
                f"{self.block_px[1]} px is out of bounds"
            )
        grid = (-(-self.size_px[0] // self.block_px[0]), -(-self.size_px[1] // self.block_px[1]))
        if grid[0] * grid[1] > MAX_FRAMES:
            raise UnsupportedSlideError(f"{self._name}: {grid[0]} x {grid[1]} frames are out of bounds")
        alike = {(i.syntax, i.size_px, i.number("Columns"), i.number("Rows"), i.colour) for i in instances}
        if len(alike) > 1:
            raise UnsupportedSlideError(f"{self._name}: the pieces of a concatenation differ in size or coding")
        self._decoder = _decoder(first, self.block_px)
        self._jpeg_ycbcr = first.syntax in JPEG_SYNTAXES and first.colour != "RGB"
        self.reduces: tuple[int, ...] = (1,) if first.syntax in PLAIN_SYNTAXES else JPEG_REDUCES
        found = places(instances, grid, self.block_px, self.size_px)
        self.focal_planes = found.count
        self.z = min(middle_plane(found.count) if z is None else z, found.count - 1)
        tables = [frame for instance in instances for frame in self._table(instance)]
        self._frames: dict[IntPair, tuple[Source, Frame]] = {
            cell: frame for cell, plane, frame in zip(found.cells, found.planes, tables, strict=True) if plane == self.z
        }

    def _table(self, instance: Instance) -> list[tuple[Source, Frame]]:
        plain = self.block_px[0] * self.block_px[1] * 3 if instance.syntax in PLAIN_SYNTAXES else 0
        table = frame_table(instance.source, instance.tags, instance.pixels_at, instance.frames, plain)
        return [(instance.source, frame) for frame in table]

    @property
    def cells(self) -> list[IntPair]:
        """The blocks (column, row) that are there, in the order of their frames."""
        return list(self._frames)

    def fetch(self, cells: Sequence[IntPair]) -> list[Any]:
        """Raw data of each block: (bytes, whether they are fragments with item headers). Raises SlideReadError."""
        found = [self._frames.get(cell) for cell in cells]
        data: dict[int, bytes | memoryview] = {}
        for source in {id(item[0]): item[0] for item in found if item is not None}.values():
            mine = [i for i, item in enumerate(found) if item is not None and item[0] is source]
            spans = [item[1] for item in (found[i] for i in mine) if item is not None]
            limit = 2 * self.block_px[0] * self.block_px[1] * 3 + (1 << 16)
            if any(span.length > limit for span in spans):
                raise SlideReadError(f"{source.name}: a frame declares more bytes than it can take")
            data.update(zip(mine, source.read_many([(s.offset, s.length) for s in spans]), strict=True))
        return [None if item is None else (data[i], item[1].fragments) for i, item in enumerate(found)]

    def decode(self, cell: IntPair, data: Any, reduce: int) -> RGBArray:
        """See NativeImage.decode."""
        raw, fragments = data
        return self._decoder.decode(join_fragments(raw) if fragments else raw, reduce)

    def decode_into(self, datas: Sequence[Any], outs: Sequence[RGBArray], reduce: int) -> list[bool]:
        """See BatchImage.decode_into."""
        if not isinstance(self._decoder, JpegDecoder):
            return [False] * len(datas)
        return self._decoder.decode_into([_frame(data) for data in datas], outs, reduce)

    def probe(self) -> None:
        """See ProbedImage.probe."""
        cell = next(iter(self._frames), None)
        if cell is None:
            return
        try:
            data = self.fetch([cell])[0]
            self._check_colours(data)
            self.decode(cell, data, 1)
        except CodecError as error:
            raise UnsupportedSlideError(f"{self._name}: frame at column {cell[0]}, row {cell[1]}: {error}") from error

    def _check_colours(self, data: Any) -> None:
        """Raise CodecError where a JPEG frame says of its colours what contradicts the tags."""
        raw, fragments = data
        if self._jpeg_ycbcr and read_jpeg_head(join_fragments(raw) if fragments else raw).adobe_transform == 0:
            raise CodecError("the JPEG stream is marked as RGB, the DICOM tags say YCbCr")


def _frame(data: tuple[bytes, bool]) -> bytes | memoryview:
    """A frame's stream; nothing where its fragments are damaged, of which ``decode`` tells."""
    raw, fragments = data
    try:
        return join_fragments(raw) if fragments else raw
    except CodecError:
        return b""


def _decoder(instance: Instance, size_px: IntPair) -> Decoder:
    colour = instance.colour
    if instance.syntax in JPEG_SYNTAXES:
        return JpegDecoder(size_px, 3, ycbcr=colour != "RGB")
    if instance.syntax in JPEG2000_SYNTAXES:
        # ICT and RCT are the codestream's own transforms, which decoding undoes.
        return Jpeg2000Decoder(size_px, 3, ycbcr=colour in ("YBR_FULL", "YBR_FULL_422"))
    return PlainDecoder(size_px, 3, "none", difference=False)
