"""One run at a time in a job directory."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wsi_pipe.errors import JobLockedError
from wsi_pipe.job.ownership import claim_job
from wsi_pipe.job.paths import JobPaths
from wsi_pipe.locking import HELD, hold_file, said_in

__all__ = ["hold_job", "holder_of"]


def lock_path(root: Path) -> Path:
    """The file whose lock a run holds. It stays when the run is over: only the lock counts, never the file."""
    return JobPaths(root).lock


@contextmanager
def hold_job(root: Path, about: dict[str, Any]) -> Iterator[Callable[..., None]]:
    """Hold the job directory; ``about`` is told to whoever asks meanwhile, and what the given function is called with.

    The operating system lets go when the process ends, however it ends. Raises JobLockedError when another run holds
    it, NotOursError when the folder holds files and is no job, OutputError when it cannot be written or lies on a file
    system without locks.
    """

    def busy(who: str) -> JobLockedError:
        return JobLockedError(
            f"{root}: another run is at work in this job ({who})",
            remedy="wait for it (wsi-pipe status), end it, or give another --out",
        )

    claim_job(root)
    with hold_file(lock_path(root), about, busy) as tell:
        yield tell


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
        return said_in(lock_path(root)) if error.errno in HELD else None
    finally:
        os.close(handle)
    return None
