"""Locks of folders: a file whose lock the operating system lets go when its process ends, however that ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from wsi_pipe.errors import OutputError, WsiPipeError
from wsi_pipe.files import output_error

__all__ = ["HELD", "hold_file", "said_in"]

HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
"""What says that another has the lock; anything else says that there are none, as on Lustre without -o flock."""


@contextmanager
def hold_file(
    path: Path, about: dict[str, Any], busy: Callable[[str], WsiPipeError], *, wait: bool = False
) -> Iterator[Callable[..., None]]:
    """Hold the lock of ``path``, made where it is not there, with its folder.

    ``about`` is told to whoever asks meanwhile, and what the given function is called with. busy: the error for when
    another holds it, from who that is. wait: until the other lets go, rather than raising. The file stays: only the
    lock counts. Raises OutputError when the folder cannot be written or lies on a file system without locks.
    """
    root = path.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise output_error(root, error) from error
    try:
        try:
            _take(handle, wait)
        except OSError as error:
            if error.errno not in HELD:
                raise _no_locks(root, error) from error
            other = said_in(path)
            raise busy(
                f"process {other.get('pid', '?')} on {other.get('host', '?')}, since {other.get('started_utc', '?')}"
            ) from error
        try:
            said = {"pid": os.getpid(), "host": socket.gethostname(), **about}
            _say(handle, said)
        except OSError as error:
            raise output_error(path, error) from error

        def tell(**more: Any) -> None:
            said.update(more)
            # Nothing depends on it: a full disk shows where results are written.
            with suppress(OSError):
                _say(handle, said)

        yield tell
    finally:
        os.close(handle)


def _say(handle: int, what: dict[str, Any]) -> None:
    text = json.dumps(what).encode()
    # Cut to length afterwards: who reads in between finds all of the new text, not nothing.
    os.pwrite(handle, text, 0)
    os.ftruncate(handle, len(text))


def _take(handle: int, wait: bool) -> None:
    """Take the lock; once more after a moment, since whoever asks for the state of a job holds it for an instant."""
    if wait:
        fcntl.flock(handle, fcntl.LOCK_EX)
        return
    for last in (False, False, True):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if last or error.errno not in HELD:
                raise
            time.sleep(0.1)


def _no_locks(root: Path, error: OSError) -> OutputError:
    """Going on without would let two runs write the same files, and each delete what the other has half-written."""
    return OutputError(
        f"{root}: its file system gives no locks ({error.strerror}), so two runs here could spoil each other's work",
        remedy="mount it with locks (Lustre: -o flock; NFS: start lockd on the server), or give another --out",
    )


def said_in(path: Path) -> dict[str, Any]:
    """What the holder of a lock said of itself."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
