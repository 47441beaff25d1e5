"""Which copies of a cache are in use, told between processes by locks of the operating system.

A mark is a shared lock on the copy itself. The system lifts it when its process ends, however it ends, so that a killed
run leaves nothing in use behind. Only who gets a copy for itself may drop it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

__all__ = ["InUse", "Keep", "alone", "drop_unused", "keep_copy", "mark", "tell_keepers"]

HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
"""What says that another has the lock; anything else says that there are none, as on Lustre without -o flock."""


TRIES, PAUSE_S = 100, 0.01


class InUse:
    """A mark on one open file. It holds until ``release``, or until nobody refers to it any more."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self._close = weakref.finalize(self, os.close, handle)

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
        return InUse(os.dup(self.handle))

    def release(self) -> None:
        """Give the file free; releasing twice is fine."""
        self._close()


def mark(path: Path) -> InUse | None:
    """Mark a file as in use; None where it is not there, or is just being dropped.

    Raises OSError when it may not be read. On a file system without locks the mark tells nobody anything, but there
    ``drop_unused`` drops nothing either.
    """
    for _ in range(TRIES):
        try:
            found = InUse(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except FileNotFoundError:
            return None
        if found.take() and _same(path, found.handle):
            return found
        # Somebody drops it at this moment, or has done so since it was opened: in an instant its name is gone.
        found.release()
        time.sleep(PAUSE_S)
    return None


def drop_unused(path: Path) -> Literal["dropped", "in use", "gone", "no locks"]:
    """Delete a file that nobody has marked.

    Where the file system gives no locks, nobody can tell whether it is in use, and it stays. Raises OSError when it
    may not be deleted.
    """
    try:
        # Locks over NFS want a handle that may write.
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return "gone"
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return "in use" if error.errno in HELD else "no locks"
        if not _same(path, handle):
            return "gone"
        os.unlink(path)
        return "dropped"
    finally:
        os.close(handle)


@contextmanager
def alone(path: Path) -> Iterator[bool]:
    """Hold the lock file at ``path``; False where another holds it. It is deleted when its holder is done.

    On a file system without locks everybody is told True. Raises OSError when the file cannot be made.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
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
