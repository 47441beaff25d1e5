"""The structure of a CZI file: its header, the directory of sub-blocks, metadata, attachments.

Reference: ZISRAW (CZI) file format, design specification 1.2.2 (Carl Zeiss Microscopy). libCZI, which pylibCZIrw wraps,
gives regions and no tiles as they are stored, and takes a lock for each; so the directory is read here, and the codecs
are those of imagecodecs.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from wsi_pipe.errors import SlideOpenError, UnsupportedSlideError
from wsi_pipe.geometry import IntPair
from wsi_pipe.slides.storage.source import Source

__all__ = ["MAGIC", "Attachment", "CziFile", "SubBlock", "read_file"]

MAGIC = b"ZISRAWFILE"
SEGMENT_BYTES = 32
FIXED_BYTES = 256
"""Of a sub-block's own header at least; its metadata begin after it."""

MAX_SUBBLOCKS = 1 << 22
MAX_DIRECTORY_BYTES = 1 << 29
MAX_XML_BYTES = 1 << 25
MAX_DIMENSIONS = 32
MAX_ATTACHMENTS = 1000


@dataclass(frozen=True, slots=True)
class SubBlock:
    """A tile. at: (x, y) of its corner and size_px its (width, height), in pixels of level 0 anywhere on the stage;
    stored_px: (width, height) as stored. dimensions: the start in each other dimension, such as C, Z, S, M. position:
    of its segment in the file; head_bytes: from there to its metadata. pixel_type, compression: codes of the format.
    pyramid: 0 for level 0."""

    at: IntPair
    size_px: IntPair
    stored_px: IntPair
    dimensions: dict[str, int]
    position: int
    head_bytes: int
    pixel_type: int
    compression: int
    pyramid: int


@dataclass(frozen=True, slots=True)
class Attachment:
    """A file within the file, such as "Label" of the type "CZI". offset, length: of its bytes."""

    name: str
    kind: str
    offset: int
    length: int


@dataclass(frozen=True)
class CziFile:
    """What a file holds. xml: its metadata, "" without."""

    subblocks: list[SubBlock]
    xml: str
    attachments: list[Attachment]


def read_file(source: Source) -> CziFile:
    """The structure of a CZI file.

    Raises UnsupportedSlideError where it is none, or one part of several, SlideOpenError where it is damaged.
    """
    if source.size < SEGMENT_BYTES + 84 or not source.read(0, 16).startswith(MAGIC):
        raise UnsupportedSlideError(f"{source.name} is no CZI file")
    try:
        head = source.read(SEGMENT_BYTES, 80)
        part, directory, metadata = struct.unpack_from("<iqq", head, 48)
        (attachments,) = struct.unpack_from("<q", head, 72)
        if part:
            raise UnsupportedSlideError(f"{source.name}: part {part} of a CZI of several files is not read")
        if directory <= 0:
            raise _damaged(source, "the file has no directory: its writing was not finished")
        return CziFile(_subblocks(source, directory), _xml(source, metadata), _attachments(source, attachments))
    except (struct.error, UnicodeDecodeError, OverflowError) as error:
        raise _damaged(source, f"its structure ends early ({error})") from error


def _damaged(source: Source, what: str) -> SlideOpenError:
    return SlideOpenError(f"{source.name}: {what}", remedy="the file is truncated or damaged: copy it again")


def _segment(source: Source, at: int, kind: bytes, most: int) -> bytes:
    """The contents of a segment."""
    if at < 0 or at + SEGMENT_BYTES > source.size:
        raise _damaged(source, f"the segment {kind.decode()} lies outside the file")
    name, allocated, used = struct.unpack("<16sqq", source.read(at, SEGMENT_BYTES))
    if name.rstrip(b"\0") != kind:
        raise _damaged(source, f"no segment {kind.decode()} is where the file says")
    length = used or allocated
    if not 0 < length <= most or at + SEGMENT_BYTES + length > source.size:
        raise _damaged(source, f"the segment {kind.decode()} of {length} bytes does not fit in")
    return source.read(at + SEGMENT_BYTES, length)


def _subblocks(source: Source, at: int) -> list[SubBlock]:
    data = _segment(source, at, b"ZISRAWDIRECTORY", MAX_DIRECTORY_BYTES)
    (count,) = struct.unpack_from("<i", data)
    if not 0 < count <= MAX_SUBBLOCKS or count * 32 > len(data):
        raise _damaged(source, f"a directory of {count} tiles is out of bounds")
    found, offset = [], 128
    for _ in range(count):
        subblock, offset = _entry(source, data, offset)
        found.append(subblock)
    return found


def _entry(source: Source, data: bytes, offset: int) -> tuple[SubBlock, int]:
    schema, pixel_type, position, part, compression, pyramid, dimensions = struct.unpack_from(
        "<2siqiiB5xi", data, offset
    )
    if schema != b"DV" or not 0 < dimensions <= MAX_DIMENSIONS:
        raise _damaged(source, "an entry of the directory is damaged")
    if part:
        raise UnsupportedSlideError(f"{source.name}: tiles in other files are not read")
    if not 0 < position <= source.size - SEGMENT_BYTES:
        raise _damaged(source, "a tile lies outside the file")
    start: dict[str, int] = {}
    size, stored = {"X": 0, "Y": 0}, {"X": 0, "Y": 0}
    for i in range(dimensions):
        name, first, length, _, kept = struct.unpack_from("<4siifi", data, offset + 32 + 20 * i)
        axis = name.rstrip(b"\0 ").decode("ascii", "replace")
        start[axis] = first
        if axis in size:
            size[axis], stored[axis] = length, kept or length
    sides = (size["X"], size["Y"], stored["X"], stored["Y"])
    if min(sides) < 1 or "X" not in start or "Y" not in start:
        raise _damaged(source, "a tile of the directory has no size")
    found = SubBlock(
        (start.pop("X"), start.pop("Y")), sides[:2], sides[2:], start, position,
        max(FIXED_BYTES, 16 + 32 + 20 * dimensions), pixel_type, compression, pyramid,
    )  # fmt: skip
    return found, offset + 32 + 20 * dimensions


def _xml(source: Source, at: int) -> str:
    if at <= 0:
        return ""
    data = _segment(source, at, b"ZISRAWMETADATA", MAX_XML_BYTES)
    (length,) = struct.unpack_from("<i", data)
    if not 0 <= length <= len(data) - 256:
        raise _damaged(source, "the metadata do not fit in")
    return data[256 : 256 + length].decode("utf-8", "replace").lstrip("\ufeff").rstrip("\0")


def _text(field: bytes) -> str:
    return field.split(b"\0")[0].decode("ascii", "replace")


def _attachments(source: Source, at: int) -> list[Attachment]:
    """Labels and thumbnails; none where anything about them is damaged, since they are no part of the slide."""
    if at <= 0:
        return []
    found = []
    try:
        data = _segment(source, at, b"ZISRAWATTDIR", MAX_DIRECTORY_BYTES)
        (count,) = struct.unpack_from("<i", data)
        for i in range(min(count, MAX_ATTACHMENTS)):
            position, kind, name = struct.unpack_from("<12xq20x8s80s", data, 256 + 128 * i)
            (length,) = struct.unpack("<i", source.read(position + SEGMENT_BYTES, 4))
            start = position + SEGMENT_BYTES + 256
            if length > 0 and start + length <= source.size:
                found.append(Attachment(_text(name), _text(kind), start, length))
    except (SlideOpenError, struct.error, OSError):
        return found
    return found
