"""Where the frames of a DICOM file lie: extended offset table, basic offset table, or along the fragments.

Reference: DICOM PS3.5 A.4 (encapsulated pixel data).
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wsi_pipe.errors import SlideOpenError, UnsupportedSlideError
from wsi_pipe.slides.codecs.decode import CodecError
from wsi_pipe.slides.storage.source import Source

__all__ = ["Frame", "frame_table", "join_fragments"]

PIXEL_DATA = (0x7FE0, 0x0010)
ITEM, SEQUENCE_END = 0xFFFEE000, 0xFFFEE0DD
UNDEFINED = 0xFFFFFFFF
MAX_FRAGMENTS = 1 << 24
MAX_REMOTE_WALK_BYTES = 1 << 24
"""Going from fragment to fragment fetches most of a file."""


@dataclass(frozen=True, slots=True)
class Frame:
    """Where a frame lies. fragments: whether the bytes begin with an item header, and may hold several items."""

    offset: int
    length: int
    fragments: bool


def frame_table(source: Source, tags: Any, pixels_at: int, count: int, plain_bytes: int) -> Sequence[Frame]:
    """The place of each of ``count`` frames; the pixel data element begins at ``pixels_at``.

    plain_bytes: bytes of a frame that is not compressed, 0 for compressed ones. Raises SlideOpenError when the pixel
    data are damaged or cut short, UnsupportedSlideError when frames cannot be told apart.
    """
    start, length = _pixel_data(
        source, pixels_at, explicit=str(tags.file_meta.TransferSyntaxUID) != "1.2.840.10008.1.2"
    )
    if plain_bytes:
        if length == UNDEFINED or count * plain_bytes > length or start + count * plain_bytes > source.size:
            raise _damaged(source, f"{count} frames of {plain_bytes} bytes do not fit in")
        return [Frame(start + i * plain_bytes, plain_bytes, False) for i in range(count)]
    if length != UNDEFINED:
        raise _damaged(source, "compressed frames are not encapsulated in")
    tag, table_bytes = _item(source, start)
    first = start + 8 + table_bytes
    if tag != ITEM or first > source.size:
        raise _damaged(source, "no offset table begins")
    extended, lengths = tags.get("ExtendedOffsetTable"), tags.get("ExtendedOffsetTableLengths")
    if extended and lengths:
        return _extended(source, first, bytes(extended), bytes(lengths), count)
    if table_bytes:
        if table_bytes != 4 * count:
            raise _damaged(source, f"{table_bytes // 4} offsets for {count} frames stand in")
        offsets = np.frombuffer(source.read(start + 8, table_bytes), "<u4").astype(np.int64)
        # The table's 32 bits overflow beyond 4 GiB; then the fragments themselves are followed.
        if offsets[0] == 0 and np.all(np.diff(offsets) > 0):
            return _basic(source, first, offsets)
    return _walk(source, first, count)


def join_fragments(data: bytes) -> bytes | memoryview:
    """The contents of the items that ``data`` consists of. Raises CodecError where they are damaged."""
    parts: list[memoryview] = []
    view, at = memoryview(data), 0
    while at + 8 <= len(data):
        group, element, length = struct.unpack_from("<HHI", data, at)
        if (group << 16 | element) != ITEM:
            break
        if at + 8 + length > len(data):
            raise CodecError("a fragment of the frame is cut short")
        parts.append(view[at + 8 : at + 8 + length])
        at += 8 + length
    if not parts:
        raise CodecError("the frame has no fragment")
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _damaged(source: Source, what: str) -> SlideOpenError:
    return SlideOpenError(
        f"{source.name}: {what} the DICOM pixel data", remedy="the file is truncated or damaged: copy it again"
    )


def _pixel_data(source: Source, at: int, *, explicit: bool) -> tuple[int, int]:
    """Where the value of the pixel data element begins, and its length."""
    if at + 12 > source.size:
        raise _damaged(source, "the file ends before")
    head = source.read(at, 12)
    if struct.unpack_from("<HH", head) != PIXEL_DATA:
        raise _damaged(source, "the header is not followed by")
    if explicit:
        return at + 12, struct.unpack_from("<I", head, 8)[0]
    return at + 8, struct.unpack_from("<I", head, 4)[0]


def _item(source: Source, at: int) -> tuple[int, int]:
    if at + 8 > source.size:
        raise _damaged(source, "the file ends in")
    group, element, length = struct.unpack("<HHI", source.read(at, 8))
    return group << 16 | element, length


def _extended(source: Source, first: int, offsets: bytes, lengths: bytes, count: int) -> list[Frame]:
    if len(offsets) < 8 * count or len(lengths) < 8 * count:
        raise _damaged(source, "the extended offset table is shorter than")
    starts, sizes = np.frombuffer(offsets, "<u8", count), np.frombuffer(lengths, "<u8", count)
    room = source.size - first - 8
    if room < 0 or starts.max() > room or sizes.max() > room or (starts + sizes).max() > room:
        raise _damaged(source, "the extended offset table points outside")
    return [Frame(first + 8 + int(o), int(n), False) for o, n in zip(starts, sizes, strict=True)]


def _basic(source: Source, first: int, offsets: np.ndarray[Any, np.dtype[np.int64]]) -> list[Frame]:
    if first + int(offsets[-1]) + 8 > source.size:
        raise _damaged(source, "the basic offset table points outside")
    end = first + int(offsets[-1])
    while True:
        # The last frame ends where the sequence does.
        tag, length = _item(source, end)
        if tag != ITEM:
            break
        end += 8 + length
        if end == source.size:
            break
    bounds = [*(first + int(o) for o in offsets), end]
    return [Frame(a, b - a, True) for a, b in itertools.pairwise(bounds)]


def _walk(source: Source, first: int, count: int) -> list[Frame]:
    """One fragment a frame, found by going from one to the next."""
    if not source.local and source.size > MAX_REMOTE_WALK_BYTES:
        raise UnsupportedSlideError(f"{source.name}: the DICOM file has no offset table to read by byte ranges")
    spans: list[tuple[int, int]] = []
    at = first
    while at < source.size and len(spans) < MAX_FRAGMENTS:
        tag, length = _item(source, at)
        if tag == SEQUENCE_END:
            break
        if tag != ITEM or at + 8 + length > source.size:
            raise _damaged(source, "a fragment is cut short in")
        spans.append((at, 8 + length))
        at += 8 + length
    if count == 1 and spans:
        return [Frame(first, at - first, True)]
    if len(spans) != count:
        raise UnsupportedSlideError(
            f"{source.name}: {len(spans)} fragments for {count} frames, and no offset table to tell them apart"
        )
    return [Frame(offset, length, True) for offset, length in spans]
