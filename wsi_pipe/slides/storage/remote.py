"""Byte ranges of a URL through fsspec: near ranges in one request, several requests at a time, a bounded cache."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from wsi_pipe.errors import SlideOpenError, SlideReadError, UnsupportedSlideError
from wsi_pipe.slides.base import ReadStats

__all__ = ["RemoteSource", "coalesce", "list_folder", "open_url"]

Range = tuple[int, int]

BLOCK_BYTES = 1 << 16
"""Small reads (directories, tags) fetch and keep aligned blocks of this size."""

GAP_BYTES = 1 << 16
"""Two ranges closer than this cost less in one request than in two: at 50 MB/s it takes 1 ms, a request 10 or more."""

SPAN_BYTES = 1 << 23
"""A joined request is no longer than this, so that several run side by side and one failure repeats little."""

CACHE_BYTES = 1 << 26
ATTEMPTS = 3
FIRST_PAUSE_S = 0.2
CONNECT_S, SILENCE_S = 20.0, 60.0


class RemoteSource:
    """A file behind a URL. Raises as ``open_source`` says."""

    local = False

    def __init__(self, url: str, stats: ReadStats, *, cache_bytes: int = CACHE_BYTES) -> None:
        self.name = url
        self.stats = stats
        self._lock = threading.Lock()
        self._cache: OrderedDict[Range, bytes] = OrderedDict()
        self._cached_bytes = 0
        self._cache_bytes = cache_bytes
        self._closed = False
        self._files, self._path, self.size = _open(url)

    def read(self, offset: int, length: int) -> bytes:
        """See Source.read."""
        self._check(offset, length)
        if length == 0:
            return b""
        if length > BLOCK_BYTES:
            return bytes(self.read_many([(offset, length)])[0])
        first, last = offset // BLOCK_BYTES, (offset + length - 1) // BLOCK_BYTES
        starts = [block * BLOCK_BYTES for block in range(first, last + 1)]
        blocks = self.read_many([(start, min(BLOCK_BYTES, self.size - start)) for start in starts])
        skip = offset - starts[0]
        return b"".join(blocks)[skip : skip + length]

    def read_many(self, ranges: Sequence[Range]) -> list[bytes | memoryview]:
        """See Source.read_many."""
        for offset, length in ranges:
            self._check(offset, length)
        found: dict[Range, bytes] = {}
        with self._lock:
            for wanted in ranges:
                if wanted in self._cache:
                    self._cache.move_to_end(wanted)
                    found[wanted] = self._cache[wanted]
        missing = sorted({wanted for wanted in ranges if wanted not in found and wanted[1]})
        spans = coalesce(missing, GAP_BYTES, SPAN_BYTES)
        bodies = self._request([span for span, _ in spans])
        for (start, _), members, body in zip((s for s, _ in spans), (m for _, m in spans), bodies, strict=True):
            for offset, length in members:
                found[offset, length] = body[offset - start : offset - start + length]
        self._keep({wanted: found[wanted] for wanted in missing})
        return [found[wanted] if wanted[1] else b"" for wanted in ranges]

    def close(self) -> None:
        """See Source.close."""
        with self._lock:
            self._closed = True
            self._cache.clear()
            self._cached_bytes = 0

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise SlideReadError(
                f"{self.name}: {length} bytes at {offset} lie outside the file of {self.size} bytes",
                remedy="the file is truncated or damaged: copy it again",
            )
        if self._closed:
            raise SlideReadError(f"{self.name}: the slide is closed")

    def _keep(self, items: dict[Range, bytes]) -> None:
        with self._lock:
            if self._closed:
                return
            for key, data in items.items():
                if key not in self._cache and len(data) <= self._cache_bytes // 4:
                    self._cache[key] = data
                    self._cached_bytes += len(data)
            while self._cached_bytes > self._cache_bytes:
                _, dropped = self._cache.popitem(last=False)
                self._cached_bytes -= len(dropped)

    def _request(self, spans: Sequence[Range]) -> list[bytes]:
        bodies: dict[Range, bytes] = {}
        error: object = None
        for attempt in range(ATTEMPTS):
            open_spans = [span for span in spans if span not in bodies]
            if not open_spans:
                break
            if attempt:
                time.sleep(FIRST_PAUSE_S * 4 ** (attempt - 1))
            starts, ends = [s for s, _ in open_spans], [s + n for s, n in open_spans]
            try:
                answers = self._files.cat_ranges([self._path] * len(open_spans), starts, ends, on_error="return")
            except Exception as caught:  # fsspec's file systems raise errors of their own libraries
                answers = [caught] * len(open_spans)
            for span, answer in zip(open_spans, answers, strict=True):
                if isinstance(answer, bytes) and len(answer) == span[1]:
                    bodies[span] = answer
                else:
                    error = answer
            self.stats.add(bytes_fetched=sum(len(a) for a in answers if isinstance(a, bytes)), requests=len(open_spans))
        lost = [span for span in spans if span not in bodies]
        if lost:
            raise SlideReadError(
                f"{self.name}: {lost[0][1]} bytes at {lost[0][0]} did not arrive in {ATTEMPTS} attempts: "
                f"{_cause(error, lost[0][1])}",
                remedy="check the connection and run again",
            )
        return [bodies[span] for span in spans]


def coalesce(ranges: Sequence[Range], gap: int, longest: int) -> list[tuple[Range, list[Range]]]:
    """Join sorted ranges that lie within ``gap`` bytes into spans of at most ``longest`` (or one range, if longer).

    Gives (span, ranges in it) pairs.
    """
    spans: list[tuple[Range, list[Range]]] = []
    for offset, length in ranges:
        if spans:
            (start, size), members = spans[-1]
            end = max(start + size, offset + length)
            if offset <= start + size + gap and end - start <= longest:
                members.append((offset, length))
                spans[-1] = ((start, end - start), members)
                continue
        spans.append(((offset, length), [(offset, length)]))
    return spans


def open_url(url: str) -> tuple[Any, str, dict[str, Any]]:
    """The file system of a URL, the path in it, and what it states of the file.

    Raises SlideOpenError when no file system is there for the URL, or it cannot be reached.
    """
    import fsspec

    protocol = url.split("://", 1)[0]
    options: dict[str, Any] = {}
    if protocol in ("http", "https"):
        import aiohttp

        # The default limits a request's whole time, and would let a silent server hold a thread for five minutes.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S)
        options["client_kwargs"] = {"timeout": timeout}
    try:
        files, path = fsspec.core.url_to_fs(url, **options)
    except (ValueError, ImportError) as error:
        raise SlideOpenError(
            f"{url}: {error}", remedy="use a local path, http(s)://, or a URL whose fsspec package is installed"
        ) from error
    try:
        return files, path, dict(files.info(path))
    except Exception as error:
        raise SlideOpenError(
            f"{url}: cannot be reached: {_cause(error, 0)}", remedy="check the URL and the permissions"
        ) from error


def list_folder(url: str) -> list[str]:
    """The URLs of the files beside ``url``. Raises UnsupportedSlideError where the server does not list them."""
    files, path, _ = open_url(url)
    try:
        names = files.ls(path.rsplit("/", 1)[0] + "/", detail=False)
    except Exception as error:  # fsspec's file systems raise errors of their own libraries
        raise UnsupportedSlideError(
            f"{url}: the files beside it cannot be listed: {_cause(error, 0)}",
            remedy="copy the files of the series to a local folder and give the path of one of them",
        ) from error
    return [str(files.unstrip_protocol(name)) for name in names]


def _open(url: str) -> tuple[Any, str, int]:
    """The file system, the path in it and the size, once a range from the middle has come back as asked."""
    files, path, facts = open_url(url)
    size = facts.get("size")
    if size == 0:
        raise SlideOpenError(f"{url} is empty", remedy="give the URL of a whole-slide image")
    if not size:
        raise UnsupportedSlideError(f"{url}: the server does not tell the file's size")
    if size > 1:
        try:
            with files.open(path, "rb", block_size=BLOCK_BYTES, cache_type="none") as handle:
                handle.seek(size // 2)
                probe = handle.read(1)
        except (ValueError, NotImplementedError, OSError) as error:
            raise UnsupportedSlideError(f"{url}: the server does not give byte ranges: {_cause(error, 0)}") from error
        except Exception as error:
            raise SlideOpenError(f"{url}: cannot be read: {_cause(error, 0)}", remedy="check the URL") from error
        if len(probe) != 1:
            raise UnsupportedSlideError(f"{url}: the server does not give byte ranges")
    return files, path, int(size)


def _cause(error: object, length: int) -> str:
    if isinstance(error, bytes):
        return f"{len(error)} bytes came instead of {length}"
    inner = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ is not None else error
    return f"{type(inner).__name__}: {inner}".rstrip(": ")
