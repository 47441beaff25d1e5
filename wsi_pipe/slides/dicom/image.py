"""One level of a DICOM whole-slide image: which frame is which tile, and how it decodes.

References: DICOM PS3.3 C.8.12.4 (VL Whole Slide Microscopy), C.7.6.17 (multi-frame dimension, tiling).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wsi_pipe.errors import SlideReadError, UnsupportedSlideError
from wsi_pipe.geometry import IntPair
from wsi_pipe.slides.base import RGBArray
from wsi_pipe.slides.codecs.decode import JPEG_REDUCES, CodecError, Decoder, JpegDecoder, PlainDecoder, read_jpeg_head
from wsi_pipe.slides.codecs.jpeg2000 import Jpeg2000Decoder
from wsi_pipe.slides.dicom.frames import Frame, frame_table, join_fragments
from wsi_pipe.slides.native import MAX_TILE_BYTES
from wsi_pipe.slides.storage.source import Source

__all__ = ["DicomImage", "Instance", "codec_name"]

JPEG_SYNTAXES = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51")
JPEG2000_SYNTAXES = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
PLAIN_SYNTAXES = ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2")
COLOURS = ("RGB", "YBR_FULL_422", "YBR_FULL", "YBR_ICT", "YBR_RCT")

MAX_FRAMES = 1 << 24


@dataclass(frozen=True)
class Instance:
    """One file of a series: its bytes, its tags, where its pixel data begins, and its transfer syntax."""

    source: Source
    tags: Any
    pixels_at: int
    syntax: str

    @property
    def kind(self) -> str:
        """The third value of ImageType: VOLUME, LABEL, OVERVIEW or THUMBNAIL."""
        values = list(self.tags.get("ImageType", []) or [])
        return str(values[2]) if len(values) > 2 else ""

    @property
    def size_px(self) -> IntPair:
        """(width, height) of the whole level."""
        return (self.number("TotalPixelMatrixColumns"), self.number("TotalPixelMatrixRows"))

    def number(self, name: str, default: int | None = None) -> int:
        """A tag as a whole number. Raises UnsupportedSlideError where it is missing, without a default, or none."""
        value = self.tags.get(name, default)
        try:
            return int(value)
        except (TypeError, ValueError) as error:
            raise UnsupportedSlideError(f"{self.source.name}: DICOM {name} is missing or no number") from error


class DicomImage:
    """One level: the frames of one instance, or of the instances of one concatenation.

    Raises UnsupportedSlideError when anything about it is not understood.
    """

    origin_px: IntPair = (0, 0)

    def __init__(self, instances: Sequence[Instance]) -> None:
        first = instances[0]
        self._name = first.source.name
        self.size_px = first.size_px
        self.block_px = (first.number("Columns"), first.number("Rows"))
        if min(*self.size_px, *self.block_px) < 1 or self.block_px[0] * self.block_px[1] * 3 > MAX_TILE_BYTES:
            raise UnsupportedSlideError(
                f"{self._name}: {self.size_px[0]} x {self.size_px[1]} px in frames of {self.block_px[0]} x "
                f"{self.block_px[1]} px is out of bounds"
            )
        self._grid = (-(-self.size_px[0] // self.block_px[0]), -(-self.size_px[1] // self.block_px[1]))
        if self._grid[0] * self._grid[1] > MAX_FRAMES:
            raise UnsupportedSlideError(f"{self._name}: {self._grid[0]} x {self._grid[1]} frames are out of bounds")
        for instance in instances:
            _check_pixels(instance)
        alike = {(i.syntax, i.size_px, i.number("Columns"), i.number("Rows"), _colour(i)) for i in instances}
        if len(alike) > 1:
            raise UnsupportedSlideError(f"{self._name}: the pieces of a concatenation differ in size or coding")
        self._decoder = _decoder(first, self.block_px)
        self._jpeg_ycbcr = first.syntax in JPEG_SYNTAXES and _colour(first) != "RGB"
        self.reduces: tuple[int, ...] = (1,) if first.syntax in PLAIN_SYNTAXES else JPEG_REDUCES
        self._frames = self._place(instances)

    def _place(self, instances: Sequence[Instance]) -> dict[IntPair, tuple[Source, Frame]]:
        frames: dict[IntPair, tuple[Source, Frame]] = {}
        at = 0
        for instance in instances:
            count = instance.number("NumberOfFrames", 1)
            if not 0 < count <= MAX_FRAMES:
                raise UnsupportedSlideError(f"{instance.source.name}: {count} frames are out of bounds")
            plain = self.block_px[0] * self.block_px[1] * 3 if instance.syntax in PLAIN_SYNTAXES else 0
            table = frame_table(instance.source, instance.tags, instance.pixels_at, count, plain)
            for cell, frame in zip(self._cells(instance, at, count), table, strict=True):
                if cell in frames or cell[1] >= self._grid[1]:
                    raise UnsupportedSlideError(
                        f"{instance.source.name}: more than one frame for a place: focal planes or optical paths are "
                        "not read"
                    )
                frames[cell] = (instance.source, frame)
            at += count
        if (
            any(_organization(instance) == "TILED_FULL" for instance in instances)
            and at != self._grid[0] * self._grid[1]
        ):
            raise UnsupportedSlideError(
                f"{self._name}: {at} frames for {self._grid[0]} x {self._grid[1]} tiles: frames are lacking, or focal "
                "planes or optical paths are there, which are not read"
            )
        return frames

    def _cells(self, instance: Instance, start: int, count: int) -> list[IntPair]:
        """The cell of each frame of an instance whose first frame is number ``start`` of the level."""
        columns = self._grid[0]
        if _organization(instance) == "TILED_FULL":
            if instance.number("TotalPixelMatrixFocalPlanes", 1) != 1:
                raise UnsupportedSlideError(f"{instance.source.name}: several focal planes are not read")
            return [(i % columns, i // columns) for i in range(start, start + count)]
        groups = instance.tags.get("PerFrameFunctionalGroupsSequence") or []
        if len(groups) != count:
            raise UnsupportedSlideError(f"{instance.source.name}: {len(groups)} frame positions for {count} frames")
        return [self._sparse_cell(instance, group) for group in groups]

    def _sparse_cell(self, instance: Instance, group: Any) -> IntPair:
        try:
            position = group.PlanePositionSlideSequence[0]
            x = int(position.ColumnPositionInTotalImagePixelMatrix) - 1
            y = int(position.RowPositionInTotalImagePixelMatrix) - 1
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise UnsupportedSlideError(f"{instance.source.name}: a frame's position is missing or damaged") from error
        cell = (x // self.block_px[0], y // self.block_px[1])
        if x % self.block_px[0] or y % self.block_px[1] or not (0 <= x < self.size_px[0] and 0 <= y < self.size_px[1]):
            raise UnsupportedSlideError(f"{instance.source.name}: a frame at ({x}, {y}) px lies off the grid of tiles")
        return cell

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


def _organization(instance: Instance) -> str:
    """TILED_FULL or TILED_SPARSE; what an instance says goes before what it looks like."""
    stated = str(instance.tags.get("DimensionOrganizationType", "") or "")
    groups = instance.tags.get("PerFrameFunctionalGroupsSequence")
    return stated or ("TILED_SPARSE" if groups else "TILED_FULL")


def _frame(data: tuple[bytes, bool]) -> bytes | memoryview:
    """A frame's stream; nothing where its fragments are damaged, of which ``decode`` tells."""
    raw, fragments = data
    try:
        return join_fragments(raw) if fragments else raw
    except CodecError:
        return b""


def _colour(instance: Instance) -> str:
    return str(instance.tags.get("PhotometricInterpretation", ""))


def _check_pixels(instance: Instance) -> None:
    name = instance.source.name
    bits = (instance.number("BitsAllocated"), instance.number("BitsStored", 8))
    if instance.number("SamplesPerPixel", 1) != 3 or bits != (8, 8) or instance.number("PixelRepresentation", 0):
        raise UnsupportedSlideError(f"{name}: only 8-bit RGB images are read, not {_colour(instance) or 'unknown'}")
    if _colour(instance) not in COLOURS:
        raise UnsupportedSlideError(f"{name}: photometric interpretation {_colour(instance)!r} is not read")
    if instance.syntax not in (*JPEG_SYNTAXES, *JPEG2000_SYNTAXES, *PLAIN_SYNTAXES):
        raise UnsupportedSlideError(f"{name}: DICOM transfer syntax {instance.syntax} is not read")
    plain = instance.syntax in PLAIN_SYNTAXES
    if plain and (_colour(instance) != "RGB" or instance.number("PlanarConfiguration", 0) != 0):
        raise UnsupportedSlideError(f"{name}: uncompressed frames are read as interleaved RGB only")


def _decoder(instance: Instance, size_px: IntPair) -> Decoder:
    colour = _colour(instance)
    if instance.syntax in JPEG_SYNTAXES:
        return JpegDecoder(size_px, 3, ycbcr=colour != "RGB")
    if instance.syntax in JPEG2000_SYNTAXES:
        # ICT and RCT are the codestream's own transforms, which decoding undoes.
        return Jpeg2000Decoder(size_px, 3, ycbcr=colour in ("YBR_FULL", "YBR_FULL_422"))
    return PlainDecoder(size_px, 3, "none", difference=False)


def codec_name(syntax: str) -> str:
    """The compression of a transfer syntax that is read."""
    return "JPEG" if syntax in JPEG_SYNTAXES else "JPEG 2000" if syntax in JPEG2000_SYNTAXES else "uncompressed"
