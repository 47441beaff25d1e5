"""Local copies of remote slides, for formats that cannot be read by byte ranges.

A copy is named by URL, size and the version that the server states (ETag, or time of change), so that a slide replaced
at its URL is fetched anew. A copy appears under its name only when complete. The folder is kept under a limit by
dropping the copies that were not opened for longest; on POSIX systems one that is open stays readable until closed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsi_pipe.errors import NeedsCopyError, OutputError, SlideOpenError
from wsi_pipe.files import TEMPORARY_SUFFIX, atomic_path

__all__ = ["CACHE_VARIABLE", "Staged", "default_cache_dir", "stage"]

CACHE_VARIABLE = "WSI_PIPE_CACHE"
"""Environment variable that names the folder for copies."""

LIMIT_BYTES = 64 << 30
ATTEMPTS = 3
PAUSE_S = 0.5
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
STALE_S = 24 * 3600.0
"""A partial copy older than this belongs to a run that died."""


_MANY_FILES = (".mrxs", ".vms", ".vmu", ".dcm")


@dataclass(frozen=True, slots=True)
class Staged:
    """A local copy. fetched: it was copied just now, not found."""

    path: Path
    fetched: bool


def default_cache_dir() -> Path:
    """The folder that WSI_PIPE_CACHE names, else ``wsi-pipe`` in the user's cache folder (XDG_CACHE_HOME)."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "wsi-pipe"


def stage(url: str, cache_dir: Path | None = None, *, limit_bytes: int = LIMIT_BYTES, fetch: bool = True) -> Staged:
    """A local copy of the file at ``url``, fetched where it is not there yet.

    Raises SlideOpenError when the URL cannot be read, or the file is larger than the whole cache may be, NeedsCopyError
    when it would have to be fetched and ``fetch`` is off, OutputError when the copy cannot be written.
    """
    from wsi_pipe.slides.remote import open_url

    folder = (default_cache_dir() if cache_dir is None else cache_dir) / "slides"
    if url.split("?", 1)[0].lower().endswith(_MANY_FILES):
        raise SlideOpenError(
            f"{url}: the format keeps its pixels in files beside this one, which are not fetched",
            remedy="copy the slide with all its files to a local disk and give its path",
        )
    files, inner, facts = open_url(url)
    size = facts.get("size")
    name = _name(url, facts)
    path = folder / name
    if path.is_file() and (size is None or path.stat().st_size == size):
        # Marks the copy as used; its age is what eviction goes by.
        _touch(path)
        return Staged(path, fetched=False)
    if size is not None and size > limit_bytes:
        raise SlideOpenError(
            f"{url}: {size / 2**30:.1f} GiB are more than the cache of {limit_bytes / 2**30:.1f} GiB holds",
            remedy="copy the slide to a local disk and give its path",
        )
    if not fetch:
        raise NeedsCopyError(f"{url}: is read from a local copy, which is not there yet")
    _make_room(folder, limit_bytes - (size or 0))
    _fetch(url, files, inner, path, size)
    _make_room(folder, limit_bytes, keep=path)
    return Staged(path, fetched=True)


def _name(url: str, facts: dict[str, Any]) -> str:
    version = next((str(facts[key]) for key in _VERSION_KEYS if facts.get(key)), "")
    digest = hashlib.sha256(f"{url}\n{facts.get('size')}\n{version}".encode()).hexdigest()[:24]
    # Readers go by the extension, and a person should recognise the file.
    last = re.sub(r"[^\w.-]+", "_", url.split("?", 1)[0].rstrip("/").rsplit("/", 1)[-1])[-80:]
    return f"{digest}-{last or 'slide'}"


_VERSION_KEYS = ("ETag", "etag", "md5Hash", "content_md5", "LastModified", "last_modified", "updated", "mtime")


def _fetch(url: str, files: Any, inner: str, path: Path, size: int | None) -> None:
    with atomic_path(path) as temporary:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                files.get_file(inner, str(temporary))
                break
            except OSError as error:
                if isinstance(error, FileNotFoundError) or error.errno in _DISK or attempt == ATTEMPTS:
                    # Trouble with the disk is atomic_path's to name.
                    raise error if error.errno in _DISK else _lost(url, error) from error
            except Exception as error:  # fsspec's file systems raise errors of their own libraries
                if attempt == ATTEMPTS:
                    raise _lost(url, error) from error
            time.sleep(PAUSE_S * attempt)
        done = temporary.stat().st_size
        if size is not None and done != size:
            raise SlideOpenError(f"{url}: {done} of {size} bytes arrived", remedy="check the connection and run again")
        if done == 0:
            raise SlideOpenError(f"{url} is empty", remedy="give the URL of a whole-slide image")


def _lost(url: str, error: Exception) -> SlideOpenError:
    text = f"{type(error).__name__}: {error}".rstrip(": ")
    return SlideOpenError(f"{url}: cannot be copied: {text}", remedy="check the connection and run again")


def _touch(path: Path) -> None:
    try:
        os.utime(path)
    except OSError as error:
        # A cache that others own and share can be read all the same.
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise OutputError(f"{path}: {error.strerror}", remedy="check the cache folder") from error


def _make_room(folder: Path, limit_bytes: int, keep: Path | None = None) -> None:
    """Remove the copies unused for longest until the rest takes at most ``limit_bytes``; another process may, too."""
    try:
        entries = [(entry, entry.stat()) for entry in os.scandir(folder) if entry.is_file(follow_symlinks=False)]
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"{folder}: {error.strerror}", remedy="check the cache folder") from error
    now = time.time()
    held = 0
    for entry, status in sorted(entries, key=lambda item: -item[1].st_mtime):
        partial = entry.name.endswith(TEMPORARY_SUFFIX)
        held += 0 if partial else status.st_size
        drop = now - status.st_mtime > STALE_S if partial else held > limit_bytes
        if drop and (keep is None or entry.name != keep.name):
            try:
                os.unlink(entry.path)
            except OSError:
                # Gone already, or open on a system that keeps such files: the next run tries again.
                continue
            held -= 0 if partial else status.st_size
