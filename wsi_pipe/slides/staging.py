"""Local copies of remote slides, for formats that cannot be read by byte ranges.

A copy is named by URL, size and the version that the server states (ETag, or time of change), so that a slide replaced
at its URL is fetched anew. A copy appears under its name only when complete. The folder is kept under a limit by
dropping the copies that were not opened for longest. One that is in use by any process, or is being made, is never
dropped: where these alone are more than the limit, the folder is larger for as long.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsi_pipe.errors import NeedsCopyError, OutputError, SlideOpenError
from wsi_pipe.files import TEMPORARY_SUFFIX, atomic_path
from wsi_pipe.slides.in_use import InUse, alone, drop_unused, mark, tell_keepers

__all__ = ["CACHE_VARIABLE", "Staged", "default_cache_dir", "stage"]

CACHE_VARIABLE = "WSI_PIPE_CACHE"
"""Environment variable that names the folder for copies."""

LIMIT_BYTES = 64 << 30
ATTEMPTS = 3
PAUSE_S = 0.5
POLL_S = 0.2
_FULL = (errno.ENOSPC, errno.EDQUOT)
_DISK = (*_FULL, errno.EROFS, errno.EACCES, errno.EPERM)
LOCK_SUFFIX = ".lock"
YOUNG_S = 60.0
"""A partial copy or lock file younger than this may be one that its maker is about to mark."""

_log = logging.getLogger(__name__)

_MANY_FILES = (".mrxs", ".vms", ".vmu", ".dcm")


@dataclass(frozen=True, slots=True)
class Staged:
    """A local copy. fetched: it was copied just now, not found. mark: no process drops the copy while it is held."""

    path: Path
    fetched: bool
    mark: InUse


def default_cache_dir() -> Path:
    """The folder that WSI_PIPE_CACHE names, else ``wsi-pipe`` in the user's cache folder (XDG_CACHE_HOME)."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "wsi-pipe"


def stage(url: str, cache_dir: Path | None = None, *, limit_bytes: int = LIMIT_BYTES, fetch: bool = True) -> Staged:
    """A local copy of the file at ``url``, fetched where it is not there yet, and marked as in use.

    Where another process is fetching it, that one's copy is waited for. Raises SlideOpenError when the URL cannot be
    read, or the file is larger than the whole cache may be, NeedsCopyError when it would have to be fetched and
    ``fetch`` is off, OutputError when the copy cannot be written.
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
    path = folder / _name(url, facts)
    staged = _found(path, size)
    if staged is None:
        if size is not None and size > limit_bytes:
            raise SlideOpenError(
                f"{url}: {size / 2**30:.1f} GiB are more than the cache of {limit_bytes / 2**30:.1f} GiB holds",
                remedy="copy the slide to a local disk and give its path",
            )
        if not fetch:
            raise NeedsCopyError(f"{url}: is read from a local copy, which is not there yet")
        with _cache_errors(url, folder):
            staged = _fetch_once(url, files, inner, path, size, limit_bytes)
    tell_keepers(url, staged.mark)
    return staged


def _found(path: Path, size: int | None) -> Staged | None:
    """The copy that is there already, or None."""
    try:
        held = mark(path)
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}", remedy="check the cache folder") from error
    if held is None or (size is not None and path.stat().st_size != size):
        return None
    # Its age is what dropping goes by.
    _touch(path)
    return Staged(path, fetched=False, mark=held)


def _fetch_once(url: str, files: Any, inner: str, path: Path, size: int | None, limit_bytes: int) -> Staged:
    """Fetch a copy, unless another process does meanwhile: two would take twice the room and the network."""
    folder = path.parent
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        with alone(folder / f".{path.name}{LOCK_SUFFIX}") as mine:
            staged = _found(path, size)
            if staged is None and mine:
                _make_room(folder, limit_bytes, size or 0)
                if size is not None and shutil.disk_usage(folder).free < size:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                staged = Staged(path, fetched=True, mark=_fetch(url, files, inner, path, size))
                _make_room(folder, limit_bytes)
        if staged is not None:
            return staged
        time.sleep(POLL_S)


@contextlib.contextmanager
def _cache_errors(url: str, folder: Path) -> Iterator[None]:
    """Trouble in writing below, told of the cache and not of the output folder of a run."""
    try:
        yield
    except OSError as error:
        cause = error.__cause__ if isinstance(error, OutputError) else error
        if isinstance(error, SlideOpenError) or not isinstance(cause, OSError):
            raise
        if cause.errno in _FULL:
            raise OutputError(
                f"{folder}: the disk of the cache is full ({_free(folder)}), no room for a copy of {url}",
                remedy="free space there, give a smaller --cache-size so that older copies go, or another folder with "
                "--cache",
            ) from error
        raise OutputError(
            f"{folder}: {cause.strerror or cause}, so {url} cannot be copied there",
            remedy="check the folder and its permissions, or give another folder with --cache",
        ) from error


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 2**30:.2f} GiB left"
    except OSError:
        return "its free space is not known"


def _name(url: str, facts: dict[str, Any]) -> str:
    version = next((str(facts[key]) for key in _VERSION_KEYS if facts.get(key)), "")
    digest = hashlib.sha256(f"{url}\n{facts.get('size')}\n{version}".encode()).hexdigest()[:24]
    # Readers go by the extension, and a person should recognise the file.
    last = re.sub(r"[^\w.-]+", "_", url.split("?", 1)[0].rstrip("/").rsplit("/", 1)[-1])[-80:]
    return f"{digest}-{last or 'slide'}"


_VERSION_KEYS = ("ETag", "etag", "md5Hash", "content_md5", "LastModified", "last_modified", "updated", "mtime")


def _fetch(url: str, files: Any, inner: str, path: Path, size: int | None) -> InUse:
    """Copy to ``path``; the copy is marked from its first byte on."""
    with atomic_path(path) as temporary:
        temporary.touch()
        held = mark(temporary)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                files.get_file(inner, str(temporary))
                break
            except OSError as error:
                if isinstance(error, FileNotFoundError) or error.errno in _DISK or attempt == ATTEMPTS:
                    # Trouble with the disk is the cache's to name.
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
        # A file system may have put a file of its own in the place of the one that was marked.
        held = mark(temporary) or held
        if held is None:
            raise _lost(url, FileNotFoundError(errno.ENOENT, "the copy was deleted while it was made"))
    return held


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


def _make_room(folder: Path, limit_bytes: int, coming_bytes: int = 0) -> None:
    """Drop the copies unused for longest until the rest and ``coming_bytes`` take at most ``limit_bytes``, and what
    killed runs left.

    What is in use stays. Raises OutputError where the file system gives no locks, so that nothing may be dropped.
    """
    entries = _entries(folder)
    now, lockless = time.time(), False
    # Copies under way count as far as they have come.
    total = coming_bytes + sum(status.st_size for _, status in entries)
    # Leftovers of killed runs first, then by age.
    for path, status in sorted(entries, key=lambda item: (not _leftover(item[0]), item[1].st_mtime)):
        if _leftover(path):
            if now - status.st_mtime < YOUNG_S:
                continue
        elif total <= limit_bytes:
            break
        try:
            fate = drop_unused(path)
        except OSError:
            # Another's, in a shared cache: the limit is for who may delete it.
            continue
        lockless = lockless or fate == "no locks"
        total -= status.st_size if fate in ("dropped", "gone") else 0
    if total <= limit_bytes:
        return
    if lockless:
        raise OutputError(
            f"{folder}: {total / 2**30:.2f} GiB are more than --cache-size allows, and its file system gives no locks, "
            "so nobody can tell which copies are in use",
            remedy="give a folder on a local disk with --cache, a larger --cache-size, or empty the folder while no "
            "run uses it",
        )
    if coming_bytes:
        # Told once it is here.
        return
    _log.warning(
        "%s: copies in use, or of other users, take %.2f GiB, %.2f GiB more than --cache-size allows for now",
        folder,
        total / 2**30,
        (total - limit_bytes) / 2**30,
    )


def _entries(folder: Path) -> list[tuple[Path, os.stat_result]]:
    """The files of the cache; other processes may add and delete some meanwhile."""
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    if entry.is_file(follow_symlinks=False):
                        found.append((Path(entry.path), entry.stat()))
    except OSError as error:
        raise OutputError(f"{folder}: {error.strerror}", remedy="check the cache folder") from error
    return found


def _leftover(path: Path) -> bool:
    """Whether a file was left by a killed run, unless it is in use."""
    return path.name.endswith((TEMPORARY_SUFFIX, LOCK_SUFFIX))
