"""One run at a time in a job directory."""

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

from wsi_pipe.errors import JobLockedError, OutputError
from wsi_pipe.files import output_error

__all__ = ["hold_job", "holder_of"]

HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
"""What says that another has the lock; anything else says that there are none, as on Lustre without -o flock."""


def lock_path(root: Path) -> Path:
    """The file whose lock a run holds. It stays when the run is over: only the lock counts, never the file."""
    return root / ".lock"


@contextmanager
def hold_job(root: Path, about: dict[str, Any]) -> Iterator[Callable[..., None]]:
    """Hold the job directory; ``about`` is told to whoever asks meanwhile, and what the given function is called with.

    The operating system lets go when the process ends, however it ends. Raises JobLockedError when another run holds
    it, OutputError when the folder cannot be written or lies on a file system without locks.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock_path(root), os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise output_error(root, error) from error
    try:
        try:
            _take(handle)
        except OSError as error:
            if error.errno not in HELD:
                raise _no_locks(root, error) from error
            other = _read(root)
            who = f"process {other.get('pid', '?')} on {other.get('host', '?')}, since {other.get('started_utc', '?')}"
            raise JobLockedError(
                f"{root}: another run is at work in this job ({who})",
                remedy="wait for it (wsi-pipe status), end it, or give another --out",
            ) from error
        try:
            said = {"pid": os.getpid(), "host": socket.gethostname(), **about}
            _say(handle, said)
        except OSError as error:
            raise output_error(lock_path(root), error) from error

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


def _take(handle: int) -> None:
    """Take the lock; once more after a moment, since whoever asks for the state of a job holds it for an instant."""
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


def holder_of(root: Path) -> dict[str, Any] | None:
    """What the run that holds the job said of itself, or None where no run does."""
    try:
        handle = os.open(lock_path(root), os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        # Where there are no locks nobody holds one.
        return _read(root) if error.errno in HELD else None
    finally:
        os.close(handle)
    return None


def _read(root: Path) -> dict[str, Any]:
    try:
        values = json.loads(lock_path(root).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
