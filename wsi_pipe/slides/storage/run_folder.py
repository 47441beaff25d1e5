"""A folder of its own for a run, in a cache on a file system without locks."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import threading
import time
import uuid
from pathlib import Path

from wsi_pipe.slides.storage.in_use import gives_locks

__all__ = ["folder_for_run", "share_run_folder"]

RUN_VARIABLE = "WSI_PIPE_CACHE_RUN"
"""Environment variable by which the processes that a run starts know its name."""
PREFIX = "run-"
OLD_S = 7 * 24 * 3600.0
"""A run that was killed leaves its folder. One in which nothing was fetched or opened for so long is deleted."""

_lock = threading.Lock()
_begun_by: int | None = None
"""The process that began the run, where that is this one."""
_folders: dict[Path, Path | None] = {}


def share_run_folder() -> None:
    """Have the processes that this one starts from now on use its folders."""
    global _begun_by
    if RUN_VARIABLE not in os.environ:
        os.environ[RUN_VARIABLE] = uuid.uuid4().hex[:12]
        _begun_by = os.getpid()


def folder_for_run(shared: Path) -> Path | None:
    """The folder of this run below the cache's folder; None where that gives locks, so that all runs may share it.

    It is deleted when the process that began the run ends.
    """
    with _lock:
        if shared not in _folders and shared.is_dir():
            _folders[shared] = None if gives_locks(shared) else _begin(shared)
        return _folders.get(shared)


def _begin(shared: Path) -> Path:
    share_run_folder()
    folder = shared / f"{PREFIX}{os.environ[RUN_VARIABLE]}"
    for other in shared.glob(f"{PREFIX}*"):
        if other != folder and time.time() - _last_use(other) > OLD_S:
            shutil.rmtree(other, ignore_errors=True)
    if _begun_by == os.getpid():
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _last_use(folder: Path) -> float:
    """Seconds since 1970; now where that cannot be told."""
    with contextlib.suppress(OSError):
        return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    return time.time()
