"""Byte ranges of a local file or a URL, counted, checked against the size, and the same for every caller."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from wsi_pipe.errors import SlideOpenError, SlideReadError
from wsi_pipe.geometry import IntPair
from wsi_pipe.slides.base import ReadStats

__all__ = ["FileSource", "Source", "SourceFile", "is_url", "open_source", "slide_fingerprint", "slide_fingerprints"]

Range = tuple[int, int]
"""(offset, length) in bytes."""

FINGERPRINT_BYTES = 1 << 20

RUN_BYTES = 1 << 22
"""What neighbouring ranges of a local file may take to be read at once."""


class Source(Protocol):
    """Random access to the bytes of one file, from any number of threads."""

    name: str
    size: int
    stats: ReadStats
    local: bool
    """Whether reading costs no network requests."""

    def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes from ``offset``. Raises SlideReadError when they cannot be had."""

    def read_many(self, ranges: Sequence[Range]) -> list[bytes | memoryview]:
        """The bytes of each range, in order; neighbours may be views of one piece of memory.

        Raises SlideReadError when one cannot be had.
        """

    def close(self) -> None:
        """Release the file; closing twice is fine."""


def is_url(path: str | Path) -> bool:
    """Whether ``path`` names something that fsspec opens rather than a local file."""
    return isinstance(path, str) and "://" in path


def open_source(path: str | Path, stats: ReadStats | None = None) -> Source:
    """The bytes behind a local path or an fsspec URL.

    Raises SlideOpenError when it is not there, not readable or empty, UnsupportedSlideError when the server of a URL
    cannot give byte ranges.
    """
    counts = ReadStats() if stats is None else stats
    if is_url(path):
        from wsi_pipe.slides.storage.remote import RemoteSource

        return RemoteSource(str(path), counts)
    return FileSource(path, counts)


class FileSource:
    """A local file, read with positioned reads, so that threads share one descriptor without a lock."""

    local = True

    def __init__(self, path: str | Path, stats: ReadStats) -> None:
        self.name = str(path)
        self.stats = stats
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
            status = os.fstat(self._descriptor)
        except OSError as error:
            self.close()
            raise SlideOpenError(
                f"{self.name}: {error.strerror or error}", remedy="check the path and its permissions"
            ) from error
        self.size = status.st_size
        if self.size == 0 or not os.path.isfile(path):
            self.close()
            cause = "is empty" if os.path.isfile(path) else "is not a file"
            raise SlideOpenError(f"{self.name} {cause}", remedy="give the path of a whole-slide image")

    @property
    def descriptor(self) -> int:
        """The open file's, for positioned reads; -1 once it is closed."""
        return self._descriptor

    def read(self, offset: int, length: int) -> bytes:
        """See Source.read."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise outside(self, offset, length)
        if self._descriptor < 0:
            raise SlideReadError(f"{self.name}: the slide is closed")
        try:
            data = os.pread(self._descriptor, length, offset)
            while len(data) < length:
                # A single read stops at 2 GiB, and may stop early on a network file system.
                more = os.pread(self._descriptor, length - len(data), offset + len(data))
                if not more:
                    raise SlideReadError(
                        f"{self.name}: the file ends at byte {offset + len(data)}, {self.size} were there when it was "
                        "opened",
                        remedy="something is changing the file: copy it again",
                    )
                data += more
        except OSError as error:
            if isinstance(error, SlideReadError):
                raise
            raise SlideReadError(
                f"{self.name}: cannot read {length} bytes at {offset}: {error.strerror or error}"
            ) from error
        self.stats.add(bytes_fetched=length, requests=1)
        return data

    def read_many(self, ranges: Sequence[Range]) -> list[bytes | memoryview]:
        """See Source.read_many; what lies side by side in the file, as a row of tiles does, is read at once."""
        found: list[bytes | memoryview] = [b""] * len(ranges)
        for run in _side_by_side(ranges):
            start, (end, length) = ranges[run[0]][0], ranges[run[-1]]
            data = self.read(start, end + length - start)
            if len(run) == 1:
                found[run[0]] = data
                continue
            view = memoryview(data)
            for i in run:
                at = ranges[i][0] - start
                found[i] = view[at : at + ranges[i][1]]
        return found

    def close(self) -> None:
        """See Source.close."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def _side_by_side(ranges: Sequence[Range]) -> list[list[int]]:
    """The numbers of ranges, by place in the file, in runs without a gap."""
    runs: list[list[int]] = []
    end = size = 0
    for i in sorted(range(len(ranges)), key=ranges.__getitem__):
        offset, length = ranges[i]
        if not runs or offset != end or size + length > RUN_BYTES:
            runs.append([])
            size = 0
        runs[-1].append(i)
        end, size = offset + length, size + length
    return runs


class SourceFile(io.RawIOBase):
    """A source as a file object, for libraries that want one.

    limit: bytes that may be read through it in all; a header that makes a library read on and on ends there. Raises
    SlideOpenError beyond it.
    """

    def __init__(self, source: Source, *, limit: int) -> None:
        super().__init__()
        self._source = source
        self._left = limit
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._source.size}[whence]
        if base + offset < 0:
            raise OSError("a position before the start of the file")
        self._at = base + offset
        return self._at

    def read(self, size: int | None = -1, /) -> bytes:
        room = max(self._source.size - self._at, 0)
        length = room if size is None or size < 0 else min(size, room)
        self._left -= length
        if self._left < 0:
            raise SlideOpenError(f"{self._source.name}: the header is out of bounds", remedy="the file is damaged")
        data = self._source.read(self._at, length)
        self._at += length
        return data


def outside(source: Source, offset: int, length: int) -> SlideReadError:
    """The error for a range that the file does not have."""
    return SlideReadError(
        f"{source.name}: {length} bytes at {offset} lie outside the file of {source.size} bytes",
        remedy="the file is truncated or damaged: copy it again",
    )


def slide_fingerprint(sources: Sequence[Source], sizes_px: Sequence[IntPair]) -> str:
    """SHA-256, in hex, over each file's size, first and last MiB, and the level table (width, height).

    It tells slides apart whatever their path and time, at the price of reading 2 MiB of each file.
    """
    return next(slide_fingerprints(sources, [sizes_px]))


def slide_fingerprints(sources: Sequence[Source], tables: Iterable[Sequence[IntPair]]) -> Iterator[str]:
    """``slide_fingerprint`` of the same files with each of several level tables; the files are read once."""
    ends = hashlib.sha256()
    for source in sources:
        ends.update(f"{source.size};".encode())
        ends.update(source.read(0, min(FINGERPRINT_BYTES, source.size)))
        tail = max(source.size - FINGERPRINT_BYTES, 0)
        ends.update(source.read(tail, source.size - tail))
    for sizes_px in tables:
        digest = ends.copy()
        digest.update(";".join(f"{width}x{height}" for width, height in sizes_px).encode())
        yield digest.hexdigest()
