"""Which copies of a cache are in use, told between processes by locks of the operating system.

A mark is a shared lock on a file beside the copy, ``.NAME.use``, which comes and goes with it: on network drives of
Windows a lock on the copy itself would keep its own maker from writing. The system lifts it when its process ends,
however it ends, so that a killed run leaves nothing in use behind. Only who gets the file for itself may drop the copy.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import time
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from wsi_pipe.files import TEMPORARY_SUFFIX

__all__ = [
    "LOCK_SUFFIX",
    "USE_SUFFIX",
    "InUse",
    "Keep",
    "alone",
    "copy_of",
    "drop_unused",
    "gives_locks",
    "keep_copy",
    "mark",
    "tell_keepers",
    "use_file",
]

USE_SUFFIX = ".use"
LOCK_SUFFIX = ".lock"

HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EBADF)
"""What says that another has the lock, or may have it (NFS locks no file that may only be read); anything else says
that there are none, as on Lustre without -o flock."""
MAY_NOT = (errno.EACCES, errno.EPERM, errno.EROFS)

TRIES, PAUSE_S = 100, 0.01

_marks_lock = threading.Lock()
_marks: dict[Path, weakref.WeakSet[InUse]] = {}
"""All marks of this process by the file that is locked."""


class InUse:
    """A mark, one open file. It holds until ``release``, or until nobody refers to it any more.

    path: of the file that is locked.
    """

    def __init__(self, path: Path, handle: int) -> None:
        self.path, self.handle = path, handle
        self._close = weakref.finalize(self, os.close, handle)
        with _marks_lock:
            _marks.setdefault(path, weakref.WeakSet()).add(self)

    @property
    def holds(self) -> bool:
        """Until it is released."""
        return self._close.alive

    def take(self) -> bool:
        """Set the mark; False while another process has the file for itself."""
        try:
            fcntl.flock(self.handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in HELD
        return True

    def again(self) -> InUse:
        """A mark on the same file that is released by itself."""
        # The lock is that of the open file, and lasts until the last of its handles is closed.
        return InUse(self.path, os.dup(self.handle))

    def release(self) -> None:
        """Give the file free; releasing twice is fine."""
        self._close()


def use_file(path: Path) -> Path:
    """The file whose lock says that a copy is in use, the same for a copy and what is to become it; of a lock file it
    is that file itself."""
    name = path.name
    if name.endswith(LOCK_SUFFIX):
        return path
    if name.endswith(TEMPORARY_SUFFIX):
        name = name.removeprefix(".").removesuffix(TEMPORARY_SUFFIX).rpartition(".")[0] or name
    return path.with_name(f".{name}{USE_SUFFIX}")


def mark(path: Path, *, coming: bool = False) -> InUse | None:
    """Mark a copy as in use; None where it is not there, or is just being dropped.

    coming: it need not be there, since this process is about to make it. Raises OSError when it may not be read, or
    when the folder may not be written and ``coming`` is set. On a file system without locks, and in a folder of others
    that has no file to lock, the mark tells other processes nothing.
    """
    beside = use_file(path)
    for _ in range(TRIES):
        if not (coming or path.exists()):
            return None
        try:
            found = InUse(beside, _open_lock(beside))
        except OSError as error:
            if coming or error.errno not in MAY_NOT:
                raise
            return InUse(beside, os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        if found.take() and _same(beside, found.handle) and (coming or path.exists()):
            return found
        # Somebody drops it at this moment, or has done so since it was opened: in an instant its name is gone.
        found.release()
        time.sleep(PAUSE_S)
    return None


def drop_unused(path: Path, *, own: bool = False) -> Literal["dropped", "in use", "gone", "no locks"]:
    """Delete a copy, or what one was to become, that nobody has marked; or a lock file that nobody holds.

    Where the file system gives no locks, nobody can tell whether another process uses it, and it stays; own: no other
    does. Raises OSError when it may not be deleted.
    """
    beside = use_file(path)
    handle = _open_lock(beside)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in HELD:
                return "in use"
            if not own:
                return "no locks"
        if not _same(beside, handle):
            return "gone"
        with _marks_lock:
            if any(one.holds for one in _marks.get(beside, ())):
                return "in use"
            _marks.pop(beside, None)
            there = path.exists()
            path.unlink(missing_ok=True)
        # A partial copy may have a whole one beside it, which others mark.
        if path != beside and not copy_of(beside).exists():
            beside.unlink(missing_ok=True)
        return "dropped" if there else "gone"
    finally:
        os.close(handle)


def copy_of(use: Path) -> Path:
    """The copy that a file of marks belongs to."""
    return use.with_name(use.name.removeprefix(".").removesuffix(USE_SUFFIX))


def gives_locks(folder: Path) -> bool:
    """Whether the file system of a folder gives locks; True where that cannot be tried."""
    path = folder / f".{uuid.uuid4().hex}{LOCK_SUFFIX}"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in HELD
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):
            path.unlink()
    return True


@contextmanager
def alone(path: Path) -> Iterator[bool]:
    """Hold the lock file at ``path``; False where another holds it, or it is another user's who lets nobody look at it.
    It is deleted when its holder is done.

    On a file system without locks everybody is told True. Raises OSError when the file cannot be made.
    """
    try:
        handle = _open_lock(path)
    except OSError as error:
        if error.errno not in MAY_NOT or not path.exists():
            raise
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = _same(path, handle)
        except OSError as error:
            held = error.errno not in HELD
        try:
            yield held
        finally:
            if held:
                with contextlib.suppress(OSError):
                    os.unlink(path)
    finally:
        os.close(handle)


def _open_lock(path: Path) -> int:
    """A handle of a file that is only there to be locked, made where it is not there, for all users of the cache.

    Another user's may be for reading only, which is enough for a lock but over NFS. Raises OSError, of making it, where
    it cannot be opened in any way.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in MAY_NOT:
            raise
        # In a folder like /tmp, O_CREAT is refused on others' files whatever their mode.
        for way in (os.O_RDWR, os.O_RDONLY):
            with contextlib.suppress(OSError):
                return os.open(path, way | os.O_CLOEXEC)
        raise
    status = os.fstat(handle)
    if status.st_uid == os.geteuid() and status.st_mode & 0o666 != 0o666:
        # The umask of who came first must not keep the others out.
        with contextlib.suppress(OSError):
            os.fchmod(handle, 0o666)
    return handle


def _same(path: Path, handle: int) -> bool:
    """Whether a name still stands for the open file."""
    try:
        there, here = os.stat(path), os.fstat(handle)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


class Keep:
    """Keeps the copy of one URL between openings, once there is one; see ``keep_copy``."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._mark: InUse | None = None

    def add(self, found: InUse) -> None:
        """Keep the copy that has this mark, instead of an earlier one."""
        before, self._mark = self._mark, found.again()
        if before is not None:
            before.release()

    def release(self) -> None:
        """Keep it no longer; releasing twice is fine."""
        with _lock:
            here = _keeps.get(self._url)
            if here is not None:
                here.discard(self)
                if not here:
                    del _keeps[self._url]
            found, self._mark = self._mark, None
        if found is not None:
            found.release()


_lock = threading.Lock()
_keeps: dict[str, weakref.WeakSet[Keep]] = {}
"""Weak: what an interrupted run forgot to release goes with it."""


def keep_copy(url: str) -> Keep:
    """From now on, and until it is released, the copy that this process reads ``url`` from stays where it is.

    A slide's own mark ends when it is closed; but a slide is opened for its mask, again for its tiles, and in between
    it is as much in use.
    """
    keep = Keep(url)
    with _lock:
        _keeps.setdefault(url, weakref.WeakSet()).add(keep)
    return keep


def tell_keepers(url: str, found: InUse) -> None:
    """Tell who keeps the copies of ``url`` of the one that was just marked."""
    with _lock:
        for keep in list(_keeps.get(url, ())):
            keep.add(found)
