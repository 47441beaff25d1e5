"""Bytes of a URL into a local file: within a number of bytes, not slower than a crawl, and ended when told to."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wsi_pipe.errors import SlideOpenError
from wsi_pipe.stopping import StopRequested, stop_event

__all__ = ["DISK_FULL", "copy_file"]

ATTEMPTS = 3
PAUSE_S = 0.5
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
DISK = (*DISK_FULL, errno.EROFS, errno.EACCES, errno.EPERM)
CRAWL_S, CRAWL_BYTES = 120.0, 120 << 10
"""Fewer bytes than this in so long: the server lets go of a byte now and then, and would be waited for without end. One
that says nothing at all is given up by its file system's own time-out."""
LOOK_BYTES = 64 << 20
"""How often room is looked after while a file of unknown size grows."""


class _EndedError(Exception):
    """Raised within a transfer to end it. No KeyboardInterrupt: that would end fsspec's own thread as well."""


def copy_file(
    url: str,
    files: Any,
    inner: str,
    temporary: Path,
    *,
    most_bytes: int,
    too_large: str,
    look_after_room: Callable[[], None],
) -> None:
    """Copy ``inner`` of an fsspec file system to ``temporary``; tried again where the connection is lost.

    most_bytes: where more come, it ends with the error ``too_large``. look_after_room: called now and then while the
    file grows. Raises SlideOpenError when the file cannot be had, OSError of the disk, StopRequested when this thread's
    work is told to stop.
    """
    for attempt in range(1, ATTEMPTS + 1):
        watch = _watch(most_bytes, look_after_room)
        try:
            files.get_file(inner, str(temporary), callback=watch)
            # Not every file system tells of what it copies.
            watch.check(temporary.stat().st_size)
            return
        except Exception as error:  # fsspec's file systems raise errors of their own libraries
            if watch.stop.is_set():
                raise StopRequested from error
            if watch.found == "large":
                raise SlideOpenError(f"{url}: {too_large}", remedy=_LARGE_REMEDY) from error
            if watch.found == "crawls":
                raise SlideOpenError(
                    f"{url}: fewer than {CRAWL_BYTES >> 10} KiB came in {CRAWL_S:.0f} s",
                    remedy="check the server and the connection, then run again",
                ) from error
            if watch.failed is not None:
                raise watch.failed from error
            number = error.errno if isinstance(error, OSError) else None
            if number in DISK:
                raise
            if isinstance(error, FileNotFoundError) or attempt == ATTEMPTS:
                raise _lost(url, error) from error
        time.sleep(PAUSE_S * attempt)


_LARGE_REMEDY = "give a larger --cache-size, or copy the slide to a local disk and give its path"


def _lost(url: str, error: Exception) -> SlideOpenError:
    text = f"{type(error).__name__}: {error}".rstrip(": ")
    return SlideOpenError(f"{url}: cannot be copied: {text}", remedy="check the connection and run again")


def _watch(most_bytes: int, look_after_room: Callable[[], None]) -> Any:
    """What fsspec calls with every piece that arrives, and that ends the transfer by raising."""
    from fsspec.callbacks import Callback

    class Watch(Callback):  # type: ignore[misc]  # fsspec states no types
        def __init__(self) -> None:
            super().__init__()
            # Of who asked for the copy: pieces arrive in a thread of fsspec's.
            self.stop = stop_event()
            self.found = ""
            self.failed: Exception | None = None
            self._done = self._looked = 0
            self._window_at, self._window_bytes = time.monotonic(), 0

        def relative_update(self, inc: int = 1) -> None:
            self.check(self._done + inc)

        def absolute_update(self, value: int) -> None:
            self.check(value)

        def check(self, done: int) -> None:
            self._done = done
            now = time.monotonic()
            if self.stop.is_set():
                raise _EndedError
            if done > most_bytes:
                self.found = "large"
                raise _EndedError
            if now - self._window_at > CRAWL_S:
                if done - self._window_bytes < CRAWL_BYTES:
                    self.found = "crawls"
                    raise _EndedError
                self._window_at, self._window_bytes = now, done
            if done - self._looked >= LOOK_BYTES:
                self._looked = done
                try:
                    look_after_room()
                except Exception as error:
                    self.failed = error
                    raise _EndedError from error

    return Watch()


def no_space() -> OSError:
    """The error of a full disk."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
