"""Reading HDF5 files of earlier runs where HDF5 can do no harm: on damaged ones it may loop for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from wsi_pipe.bag import unreachable
from wsi_pipe.errors import BagError, TaskTimeoutError, WorkerError, WsiPipeError
from wsi_pipe.execute import run_bounded

__all__ = ["problems_guarded", "read_guarded", "read_many_guarded"]

R = TypeVar("R")

_in_turns = threading.Lock()
"""Slides are prepared by several threads: they share one child, which is quick, and whose start takes longest."""

CPU_S = 10.0
BYTES_PER_CPU_S = 10e6
"""A tenth of what a slow core reads and checks: no sound file comes near."""


def read_guarded(fn: Callable[[Path], R], path: Path) -> R:
    """``fn(path)``, a function of ``wsi_pipe.bag``, in a long-lived child of this process, begun anew when it dies.

    The path is made absolute: the child stays in the folder that this process was in when it began.
    Raises what ``fn`` raises; BagError where the file is not there or HDF5 does not return or crashes the child;
    FileAccessError where the file, or a process to read it in, cannot be had.
    """
    path = path.absolute()
    try:
        limit_s = CPU_S + path.stat().st_size / BYTES_PER_CPU_S
    except (FileNotFoundError, NotADirectoryError) as error:
        # Most files of a first run: no process is started for them.
        raise BagError(f"{path}: {error.strerror}") from error
    except OSError as error:
        raise unreachable(path, error) or BagError(f"{path}: {error.strerror}") from error
    try:
        try:
            with _in_turns:
                return run_bounded(fn, limit_s, path)
        except WorkerError:
            # It may have been killed for another's sake: what is wrong with the file happens again.
            with _in_turns:
                return run_bounded(fn, limit_s, path)
    except TaskTimeoutError as error:
        raise BagError(f"{path}: unreadable: HDF5 did not return within {limit_s:.0f} s of computing") from error
    except WorkerError as error:
        raise BagError(f"{path}: unreadable: HDF5 crashed ({error.message})") from error
    except OSError as error:
        if isinstance(error, WsiPipeError) or (outside := unreachable(path, error)) is None:
            raise
        raise outside from error


BATCH = 64


def read_many_guarded(fn: Callable[[Path], R], paths: Sequence[Path]) -> Iterator[R]:
    """``read_guarded`` of each path, in order, many in one go: handing a small file over takes longer than to read it.

    ``fn`` must not read whole files. Raises what ``read_guarded`` raises for the first path that is not right.
    """
    for start in range(0, len(paths), BATCH):
        batch = [path.absolute() for path in paths[start : start + BATCH]]
        try:
            yield from run_bounded(partial(_each, fn), CPU_S, batch)
        except (TaskTimeoutError, WorkerError):
            # One of them hangs or crashes it: which?
            for path in batch:
                yield read_guarded(fn, path)


def _each(fn: Callable[[Path], R], paths: list[Path]) -> list[R]:
    return [fn(path) for path in paths]


def problems_guarded(check: Callable[[Path], list[str]], path: Path) -> list[str]:
    """What ``check_bag`` or ``check_feature_file`` says of a file, or that it cannot be read at all.

    Raises FileAccessError when it cannot be looked at.
    """
    try:
        return read_guarded(check, path)
    except BagError as error:
        return [error.message.removeprefix(f"{path.absolute()}: ")]
