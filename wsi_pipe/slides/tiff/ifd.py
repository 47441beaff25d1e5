"""The directories and tags of a TIFF file, every declared size checked against the file before it is used.

Classic TIFF and BigTIFF of both byte orders, and Hamamatsu's own 64-bit variety of classic TIFF. tifffile would parse
these too; here values are read by range and only when asked for (the tile table of level 0 of a remote slide takes
megabytes that a low-resolution pass never needs), and a lying tag costs an error instead of memory.
References: TIFF 6.0; the BigTIFF proposal of 2007; for NDPI, tifffile's notes on its 64-bit offsets.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.errors import SlideOpenError, SlideReadError, UnsupportedSlideError
from wsi_pipe.slides.storage.source import Source

__all__ = ["Directory", "read_directories", "read_directory"]

MAX_DIRECTORIES = 4096
MAX_TAGS = 4096
MAX_VALUE_BYTES = 1 << 28
MAX_TAGS_IN_ALL = 1 << 18
"""Of all directories of a file together: each may be sound by itself, and a small file hold thousands that overlap."""

NDPI_FLAG = 65420
SUB_IFDS = 330

_TYPES = {
    1: "u1", 2: "S1", 3: "u2", 4: "u4", 5: "u4", 6: "i1", 7: "u1", 8: "i2", 9: "i4", 10: "i4", 11: "f4", 12: "f8",
    13: "u4", 16: "u8", 17: "i8", 18: "u8",
}  # fmt: skip
_RATIONAL = (5, 10)
_LONG, _LONG8 = (4, 9, 13), 16


@dataclass(frozen=True, slots=True)
class _Entry:
    kind: int
    count: int
    bytes_count: int
    offset: int
    literal: bytes = b""
    """The value itself where it does not lie in one piece in the file."""


@dataclass(frozen=True, slots=True)
class _Format:
    order: Literal["<", ">"]
    big: bool
    ndpi: bool
    read: list[int] = field(default_factory=list, compare=False)
    """Tags of each directory that was read."""


class Directory:
    """One image file directory: its tags, read from the file when asked for."""

    def __init__(self, source: Source, form: _Format, index: str, entries: dict[int, _Entry]) -> None:
        self._source = source
        self._form = form
        self._entries = entries
        self.index = index
        self.is_ndpi = form.ndpi

    def __contains__(self, tag: int) -> bool:
        return tag in self._entries

    def count(self, tag: int) -> int:
        """How many values a tag has; 0 where it is absent."""
        entry = self._entries.get(tag)
        return 0 if entry is None else entry.count

    def raw(self, tag: int) -> bytes:
        """A tag's value as bytes; empty where it is absent. Raises SlideOpenError where it lies outside the file."""
        entry = self._entries.get(tag)
        if entry is None or entry.bytes_count == 0:
            return b""
        if entry.literal:
            return entry.literal
        if entry.bytes_count > MAX_VALUE_BYTES or entry.offset + entry.bytes_count > self._source.size:
            raise SlideOpenError(
                f"{self._source.name}: TIFF tag {tag} of image {self.index} declares {entry.bytes_count} bytes at "
                f"{entry.offset}, the file has {self._source.size}",
                remedy="the file is truncated or damaged: copy it again",
            )
        return self._source.read(entry.offset, entry.bytes_count)

    def array(self, tag: int) -> NDArray[np.generic]:
        """A tag's values as a flat array in native byte order; empty where the tag is absent."""
        entry = self._entries.get(tag)
        if entry is None:
            return np.empty(0, np.uint64)
        dtype = np.dtype(_TYPES[entry.kind]).newbyteorder(self._form.order)
        values = np.frombuffer(self.raw(tag), dtype)
        return values.astype(dtype.newbyteorder("="))

    def item(self, tag: int, index: int) -> int:
        """One value of a whole-number tag, without reading the others. Raises SlideOpenError outside the file."""
        entry = self._entries[tag]
        dtype = np.dtype(_TYPES[entry.kind]).newbyteorder(self._form.order)
        if dtype.kind not in "ui" or entry.kind in _RATIONAL or not 0 <= index < entry.count:
            raise SlideOpenError(f"{self._source.name}: TIFF tag {tag} of image {self.index} is damaged")
        if entry.literal:
            return int(np.frombuffer(entry.literal, dtype)[index])
        at = entry.offset + index * dtype.itemsize
        if at + dtype.itemsize > self._source.size:
            raise SlideOpenError(
                f"{self._source.name}: TIFF tag {tag} of image {self.index} lies outside the file",
                remedy="the file is truncated or damaged: copy it again",
            )
        return int(np.frombuffer(self._source.read(at, dtype.itemsize), dtype)[0])

    def number(self, tag: int, default: int | None = None) -> int:
        """The first value of a whole-number tag. Raises UnsupportedSlideError where it is absent without a default."""
        entry = self._entries.get(tag)
        if entry is None or entry.count == 0:
            if default is None:
                raise UnsupportedSlideError(f"{self._source.name}: image {self.index} has no TIFF tag {tag}")
            return default
        if np.dtype(_TYPES[entry.kind]).kind not in "ui" or entry.kind in _RATIONAL:
            raise UnsupportedSlideError(f"{self._source.name}: TIFF tag {tag} of image {self.index} is no whole number")
        return int(self.array(tag)[0])

    def numbers(self, tag: int) -> tuple[int, ...]:
        """All values of a whole-number tag, at most 65,536 of them; empty where it is absent or of another type."""
        entry = self._entries.get(tag)
        if entry is None or entry.count > 1 << 16 or np.dtype(_TYPES[entry.kind]).kind not in "ui":
            return ()
        return tuple(int(value) for value in self.array(tag))

    def rational(self, tag: int) -> float | None:
        """The first value of a rational or float tag; None where it is absent, divides by zero or is not above 0."""
        entry = self._entries.get(tag)
        if entry is None or entry.count == 0:
            return None
        values = self.array(tag)
        if entry.kind in _RATIONAL:
            value = float(values[0]) / float(values[1]) if len(values) >= 2 and values[1] else 0.0
        else:
            value = float(values[0]) if values.dtype.kind in "uif" else 0.0
        return value if np.isfinite(value) and value > 0 else None

    def text(self, tag: int) -> str:
        """A text tag up to its first NUL, undecodable bytes replaced; empty where it is absent."""
        return self.raw(tag).split(b"\0", 1)[0].decode("utf-8", "replace")


def read_directories(source: Source) -> list[Directory]:
    """The main chain of directories of a TIFF file.

    Raises UnsupportedSlideError when the file is no TIFF, SlideOpenError when the chain is damaged.
    """
    try:
        form, first = _read_header(source)
        found: list[Directory] = []
        seen: set[int] = set()
        offset = first
        while offset:
            if offset in seen or len(found) >= MAX_DIRECTORIES:
                raise SlideOpenError(f"{source.name}: the TIFF directories run in a circle or without end")
            seen.add(offset)
            entries, offset = _read_entries(source, form, offset)
            found.append(Directory(source, form, str(len(found)), entries))
    except SlideReadError as error:
        raise SlideOpenError(error.message, remedy=error.remedy) from error
    if not found:
        raise SlideOpenError(f"{source.name}: the TIFF file holds no image")
    return found


def read_directory(source: Source, parent: Directory, offset: int, index: str) -> Directory:
    """One directory outside the main chain, such as a SubIFD of ``parent``."""
    try:
        entries, _ = _read_entries(source, parent._form, offset)
    except SlideReadError as error:
        raise SlideOpenError(error.message, remedy=error.remedy) from error
    return Directory(source, parent._form, index, entries)


def _read_header(source: Source) -> tuple[_Format, int]:
    head = source.read(0, min(16, source.size))
    if len(head) < 16 or head[:2] not in (b"II", b"MM"):
        raise UnsupportedSlideError(f"{source.name} is not a TIFF file")
    order: Literal["<", ">"] = "<" if head[:2] == b"II" else ">"
    (version,) = struct.unpack_from(order + "H", head, 2)
    if version == 43:
        size, zero, offset = struct.unpack_from(order + "HHQ", head, 4)
        if size != 8 or zero != 0:
            raise UnsupportedSlideError(f"{source.name}: the BigTIFF header is not understood")
        return _Format(order, True, False), offset
    if version != 42:
        raise UnsupportedSlideError(f"{source.name} is not a TIFF file")
    classic, wide = struct.unpack_from(order + "I", head, 4)[0], struct.unpack_from(order + "Q", head, 4)[0]
    # NDPI looks like classic TIFF; the first directory's offset takes 8 bytes, and one private tag gives it away.
    for offset in dict.fromkeys((classic, wide)):
        if order == "<" and 8 <= offset < source.size:
            try:
                entries, _ = _read_entries(source, _Format(order, False, False), offset)
            except (SlideOpenError, SlideReadError):
                continue
            if NDPI_FLAG in entries:
                return _Format(order, False, True), offset
    return _Format(order, False, False), classic


def _read_entries(source: Source, form: _Format, offset: int) -> tuple[dict[int, _Entry], int]:
    count_size, entry_size, next_size = (8, 20, 8) if form.big else (2, 12, 8 if form.ndpi else 4)
    order = form.order
    (count,) = struct.unpack(order + ("Q" if form.big else "H"), source.read(offset, count_size))
    if not 0 < count <= MAX_TAGS:
        raise SlideOpenError(f"{source.name}: a TIFF directory at byte {offset} declares {count} tags")
    form.read.append(count)
    if sum(form.read) > MAX_TAGS_IN_ALL:
        raise SlideOpenError(
            f"{source.name}: its TIFF directories hold more than {MAX_TAGS_IN_ALL} tags together",
            remedy="the file is damaged: copy it again",
        )
    start = offset + count_size
    table = source.read(start, count * entry_size)
    end = start + len(table)
    # The last directory of some writers ends with the file, without the offset of a next one.
    room = max(min(next_size, source.size - end), 0)
    tail = source.read(end, room) + bytes(next_size - room) if room else bytes(next_size)
    (following,) = struct.unpack(order + ("Q" if next_size == 8 else "I"), tail)
    high = b""
    if form.ndpi and source.size > 0xFFFFFFFF:
        # Behind the directory, NDPI keeps the upper halves of the entries' values.
        high = source.read(end + next_size, 4 * count)
    entries: dict[int, _Entry] = {}
    for i in range(count):
        at = i * entry_size
        tag, kind = struct.unpack_from(order + "HH", table, at)
        if kind not in _TYPES:
            continue
        (length,) = struct.unpack_from(order + ("Q" if form.big else "I"), table, at + 4)
        width = np.dtype(_TYPES[kind]).itemsize * (2 if kind in _RATIONAL else 1)
        value_at, inline = (at + 12, 8) if form.big else (at + 8, 4)
        upper = high[4 * i : 4 * i + 4]
        if length * width > inline:
            (where,) = struct.unpack_from(order + ("Q" if form.big else "I"), table, value_at)
            if upper:
                where += int.from_bytes(upper, "little") << 32
        elif length == 1 and kind in _LONG and any(upper):
            # A single number that needs the upper half too: where the pixels of a level begin.
            entries.setdefault(tag, _Entry(_LONG8, 1, 8, 0, table[value_at : value_at + 4] + upper))
            continue
        else:
            where = start + value_at
        entries.setdefault(tag, _Entry(kind, length, length * width, where))
    return entries, following
