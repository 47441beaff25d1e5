"""Local copies of remote slides, for formats that cannot be read by byte ranges.

A copy is named by URL, size and the version that the server states (ETag, or time of change), so that a slide replaced
at its URL is fetched anew. A copy appears under its name only when complete. The folder is kept under a limit by
dropping the copies that were not opened for longest. One that is in use by any process, or is being made, is never
dropped: where these alone are more than the limit, the folder is larger for as long.

On a file system without locks nobody can tell what others use. There a run has a folder of its own in the cache, its
processes drop what they fetched themselves, and it goes with the run.
"""

from __future__ import annotations

import contextlib
import errno
import glob
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
from wsi_pipe.masking import mask_secrets, same_address
from wsi_pipe.slides.storage.in_use import (
    LOCK_SUFFIX,
    USE_SUFFIX,
    InUse,
    alone,
    copy_of,
    drop_unused,
    mark,
    tell_keepers,
)
from wsi_pipe.slides.storage.run_folder import folder_for_run
from wsi_pipe.slides.storage.transfer import DISK_FULL, copy_file, no_space
from wsi_pipe.stopping import StopRequested, stop_event

__all__ = ["CACHE_VARIABLE", "Staged", "default_cache_dir", "stage", "trim_copies"]

CACHE_VARIABLE = "WSI_PIPE_CACHE"
"""Environment variable that names the folder for copies."""

LIMIT_BYTES = 64 << 30
POLL_S = 0.2
SPARE_BYTES = 64 << 20
"""What a copy of unknown size leaves free on its disk, which others write to as well."""
WAIT_TOLD_S = 30.0
WAIT_LIMIT_S = 3600.0
"""How long another process is waited for before that is said, and, while its copy does not grow, at all."""
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
    read, the file is larger than the whole cache may be, the copy cannot be written, or another's does not come on,
    NeedsCopyError when it would have to be fetched and ``fetch`` is off. None of that concerns other slides.
    """
    from wsi_pipe.slides.storage.remote import open_url

    shared = (default_cache_dir() if cache_dir is None else cache_dir) / "slides"
    if url.split("?", 1)[0].lower().endswith(_MANY_FILES):
        raise SlideOpenError(
            f"{url}: the format keeps its pixels in files beside this one, which are not fetched",
            remedy="copy the slide with all its files to a local disk and give its path",
        )
    files, inner, facts = open_url(url)
    size = facts.get("size")
    if fetch:
        with _cache_errors(url, shared):
            shared.mkdir(parents=True, exist_ok=True)
    folder = folder_for_run(shared)
    path = (folder or shared) / _name(url, facts)
    staged = _found(path, size)
    if staged is None:
        if size is not None and size > limit_bytes:
            raise SlideOpenError(
                f"{url}: {size / 2**30:.1f} GiB are more than the cache of {limit_bytes / 2**30:.1f} GiB holds",
                remedy="copy the slide to a local disk and give its path",
            )
        if not fetch:
            raise NeedsCopyError(f"{url}: is read from a local copy, which is not there yet")
        with _cache_errors(url, path.parent):
            staged = _fetch_once(url, files, inner, path, size, limit_bytes, own=folder is not None)
    tell_keepers(url, staged.mark)
    return staged


def trim_copies(cache_dir: Path | None, limit_bytes: int) -> None:
    """Drop the copies unused for longest until the rest takes at most ``limit_bytes``.

    Slides that were under way at the same time may have taken more. What cannot be dropped stays.
    """
    shared = (default_cache_dir() if cache_dir is None else cache_dir) / "slides"
    with contextlib.suppress(OSError):
        folder = folder_for_run(shared) or shared
        if folder.is_dir():
            _make_room(folder, limit_bytes, told=False)


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


def _fetch_once(
    url: str, files: Any, inner: str, path: Path, size: int | None, limit_bytes: int, *, own: bool
) -> Staged:
    """Fetch a copy, unless another process does meanwhile: two would take twice the room and the network.

    own: nobody but this run uses the folder.
    """
    folder = path.parent
    folder.mkdir(parents=True, exist_ok=True)
    wait = _Wait(url, path, folder / f".{path.name}{LOCK_SUFFIX}")
    while True:
        with alone(wait.lock_file) as mine:
            staged = _found(path, size)
            if staged is None and mine:
                _make_room(folder, limit_bytes, size or 0)
                if size is not None and shutil.disk_usage(folder).free < size:
                    raise no_space()
                if own:
                    _own.add(path)
                staged = Staged(path, fetched=True, mark=_fetch(url, files, inner, path, size, limit_bytes))
                _make_room(folder, limit_bytes)
        if staged is not None:
            return staged
        wait.go_on()


_own: set[Path] = set()
"""Copies that this process fetched into a folder that no other run uses."""


class _Wait:
    """Waiting for another process to copy a slide."""

    def __init__(self, url: str, path: Path, lock_file: Path) -> None:
        self.url, self.lock_file = url, lock_file
        self._path = path
        self._begun = self._grew = time.monotonic()
        self._bytes, self._told = -1, False

    def go_on(self) -> None:
        """Wait a little. Raises SlideOpenError when the other's copy has not grown for long."""
        if stop_event().is_set():
            raise StopRequested
        time.sleep(POLL_S)
        now, done = time.monotonic(), self._done_bytes()
        if done != self._bytes:
            self._bytes, self._grew = done, now
        if now - self._begun > WAIT_TOLD_S and not self._told:
            shown = mask_secrets(self.url)
            _log.warning("waiting for another process to copy %s (lock file %s)", shown, self.lock_file)
            self._told = True
        if now - self._grew > WAIT_LIMIT_S:
            raise SlideOpenError(
                f"{self.url}: another process holds {self.lock_file}, and its copy has not grown for "
                f"{WAIT_LIMIT_S / 60:.0f} minutes",
                remedy="end that process, or delete the lock file where there is none, and run again",
            )

    def _done_bytes(self) -> int:
        sizes = []
        for partial in self._path.parent.glob(f".{glob.escape(self._path.name)}.*{TEMPORARY_SUFFIX}"):
            with contextlib.suppress(OSError):
                sizes.append(partial.stat().st_size)
        return sum(sizes)


@contextlib.contextmanager
def _cache_errors(url: str, folder: Path) -> Iterator[None]:
    """Trouble in writing below, told of the slide that needs the copy: it is not the output folder's."""
    try:
        yield
    except OSError as error:
        cause = error.__cause__ if isinstance(error, OutputError) else error
        if isinstance(error, SlideOpenError) or not isinstance(cause, OSError):
            raise
        if cause.errno in DISK_FULL:
            raise SlideOpenError(
                f"{folder}: the disk of the cache is full ({_free(folder)}), no room for a copy of {url}",
                remedy="free space there, give a smaller --cache-size so that older copies go, or another folder with "
                "--cache",
            ) from error
        raise SlideOpenError(
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
    # Whoever signs a URL and for how long, it is the same file.
    digest = hashlib.sha256(f"{same_address(url)}\n{facts.get('size')}\n{version}".encode()).hexdigest()[:24]
    # Readers go by the extension, and a person should recognise the file.
    last = re.sub(r"[^\w.-]+", "_", url.split("?", 1)[0].rstrip("/").rsplit("/", 1)[-1])[-80:]
    return f"{digest}-{last or 'slide'}"


_VERSION_KEYS = ("ETag", "etag", "md5Hash", "content_md5", "LastModified", "last_modified", "updated", "mtime")


def _fetch(url: str, files: Any, inner: str, path: Path, size: int | None, limit_bytes: int) -> InUse:
    """Copy to ``path``; the copy is marked from its first byte on."""
    held = mark(path, coming=True)
    if held is None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
    if size is None:
        large = f"the server does not tell its size, and it is larger than the cache of {limit_bytes / 2**30:.1f} GiB"
    else:
        large = f"more than the {size} bytes that the server told of arrive"

    def look_after_room() -> None:
        # What has come so far counts among the copies.
        _make_room(path.parent, limit_bytes, told=False)
        if shutil.disk_usage(path.parent).free < SPARE_BYTES:
            raise no_space()

    try:
        with atomic_path(path) as temporary:
            temporary.touch()
            copy_file(
                url,
                files,
                inner,
                temporary,
                most_bytes=limit_bytes if size is None else size,
                too_large=large,
                look_after_room=look_after_room,
            )
            done = temporary.stat().st_size
            if size is not None and done != size:
                raise SlideOpenError(
                    f"{url}: {done} of {size} bytes arrived", remedy="check the connection and run again"
                )
            if done == 0:
                raise SlideOpenError(f"{url} is empty", remedy="give the URL of a whole-slide image")
    except BaseException:
        held.release()
        with contextlib.suppress(OSError):
            # Of a copy that did not come to be nothing stays, not even its marks.
            drop_unused(path, own=path in _own)
        raise
    return held


def _touch(path: Path) -> None:
    try:
        os.utime(path)
    except OSError as error:
        # A cache that others own and share can be read all the same.
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise OutputError(f"{path}: {error.strerror}", remedy="check the cache folder") from error


def _make_room(folder: Path, limit_bytes: int, coming_bytes: int = 0, *, told: bool = True) -> None:
    """Drop the copies unused for longest until the rest and ``coming_bytes`` take at most ``limit_bytes``, and what
    killed runs left.

    What is in use stays, and so does what may be in use, for all that this process can tell.
    """
    now = time.time()
    entries = [item for item in _entries(folder) if _leftover(item[0]) or not item[0].name.endswith(USE_SUFFIX)]
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
            # Marks are dropped with their copy, also where that never came to be.
            fate = drop_unused(copy_of(path) if path.name.endswith(USE_SUFFIX) else path, own=path in _own)
        except OSError:
            # Another's, in a shared cache: the limit is for who may delete it.
            continue
        total -= status.st_size if fate in ("dropped", "gone") else 0
    # What is coming is told of once it is here.
    if told and total > limit_bytes and not coming_bytes:
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
    if path.name.endswith(USE_SUFFIX):
        return not copy_of(path).exists()
    return path.name.endswith((TEMPORARY_SUFFIX, LOCK_SUFFIX))
