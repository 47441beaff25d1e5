"""Children that this process keeps for single calls: ended when they take too long, or compute too much."""

from __future__ import annotations

import atexit
import contextlib
import signal
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

from wsi_pipe.errors import TaskTimeoutError, WorkerError
from wsi_pipe.execute.worker import KillableWorker
from wsi_pipe.stopping import stop_event

__all__ = ["end_own_workers", "run_bounded", "run_killable"]

T = TypeVar("T")
R = TypeVar("R")


_own_workers: list[KillableWorker] = []
"""Children of this process that are free: as many as calls ran at one time, since Dask may run several threads."""


@contextlib.contextmanager
def _own_worker() -> Iterator[KillableWorker]:
    """A child of this process, started when it is first used; it stays for the next."""
    try:
        worker = _own_workers.pop()
    except IndexError:
        worker = KillableWorker()
    try:
        yield worker
    finally:
        _own_workers.append(worker)


@atexit.register
def end_own_workers() -> None:
    """End the children that are free; the next call starts another."""
    while _own_workers:
        _own_workers.pop().kill()


def run_killable(fn: Callable[[T], R], timeout_s: float, item: T, *, ready: Callable[[], object] | None = None) -> R:
    """``fn(item)`` in a child of this process that is killed when it takes too long; the child stays for the next.

    What a Dask worker calls: Dask itself cannot end a task that runs. Raises as ``KillableWorker.call``.
    """
    with _own_worker() as worker:
        return worker.call(fn, item, timeout_s, stop_event(), ready)


def run_bounded(fn: Callable[[T], R], cpu_s: float, item: T) -> R:
    """``fn(item)`` in a child of this process that is ended once it has computed for ``cpu_s`` processor seconds.

    For code that may loop or crash on what it is given. Waiting costs no processor time, so that a slow disk or a busy
    machine is not taken for a loop. Raises what ``fn`` raises; TaskTimeoutError when it was ended, WorkerError when
    the process died of something else.
    """
    with _own_worker() as worker:
        try:
            return worker.call(partial(_bounded, fn, cpu_s), item, None)
        except WorkerError as error:
            if worker.exit_code == -signal.SIGPROF:
                raise TaskTimeoutError(f"computed for more than {cpu_s:.0f} s and was ended") from error
            raise


def _bounded(fn: Callable[[T], R], cpu_s: float, item: T) -> R:
    # The signal ends the process, also within a C library that never comes back to Python.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    try:
        return fn(item)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
