"""Items spread over processes of this machine."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

from wsi_pipe.cores import core_shares
from wsi_pipe.errors import WorkerError
from wsi_pipe.execute.items import Done, Failed, Where, left_out
from wsi_pipe.execute.worker import KillableWorker

__all__ = ["in_processes"]

POLL_S = 0.1

T = TypeVar("T")
R = TypeVar("R")


def in_processes(
    fn: Callable[[T], R],
    items: Iterable[T | Done[T, R] | None],
    where: Where,
    blames_worker: Callable[[Exception], bool],
    ready: Callable[[], object] | None,
) -> Generator[Done[T, R] | Failed[T], None, None]:
    """``run`` with ``where.workers`` processes of its own; the arguments are its."""
    stop = threading.Event()
    # Each would take all cores for its threads, of which there would be N times too many.
    idle = [KillableWorker(cores if where.workers > 1 else None) for cores in core_shares(where.workers)]
    everyone = tuple(idle)
    pool = ThreadPoolExecutor(where.workers, thread_name_prefix="worker")
    running: dict[Future[Done[T, R] | Failed[T]], KillableWorker] = {}
    source = iter(items)
    again: deque[T] = deque()
    try:
        while True:
            pausing = False
            while idle:
                try:
                    item = again.popleft() if again else next(source)
                except StopIteration:
                    break
                if item is None:
                    pausing = True
                    break
                if isinstance(item, Done):
                    yield item
                    continue
                worker = idle.pop()
                running[pool.submit(_attempt, worker, fn, item, where, stop, ready)] = worker
            if not running and not pausing:
                return
            if not running:
                time.sleep(POLL_S)
                continue
            finished, _ = wait(running, timeout=POLL_S if pausing else None, return_when=FIRST_COMPLETED)
            for future in finished:
                worker, result = running.pop(future), future.result()
                if isinstance(result, Failed) and blames_worker(result.error):
                    worker.kill()
                    if idle or running:
                        left_out(f"worker process {everyone.index(worker) + 1} of {len(everyone)}", result.error)
                        again.append(result.item)
                        continue
                else:
                    idle.append(worker)
                yield result
    finally:
        # Each call ends its own process, once what that has is put by.
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
        for worker in everyone:
            worker.kill()


def _attempt(
    worker: KillableWorker,
    fn: Callable[[T], R],
    item: T,
    where: Where,
    stop: threading.Event,
    ready: Callable[[], object] | None,
) -> Done[T, R] | Failed[T]:
    for attempt in range(where.retries + 1):
        try:
            return Done(item, worker.call(fn, item, where.timeout_s, stop, ready))
        except WorkerError as error:
            if attempt == where.retries or stop.is_set():
                return Failed(item, error)
        except Exception as error:
            return Failed(item, error)
    raise AssertionError("the last attempt returns")
