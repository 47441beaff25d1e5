"""Items through a Dask scheduler: connecting, a bounded number in flight, and what becomes of a lost connection."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import CancelledError
from functools import partial
from typing import Any, TypeVar

from wsi_pipe.errors import WorkerError, WsiPipeError
from wsi_pipe.execute.items import Done, Failed, Where
from wsi_pipe.execute.own import run_killable
from wsi_pipe.execute.roster import Workers

__all__ = ["on_scheduler"]

T = TypeVar("T")
R = TypeVar("R")

POLL_S = 0.2
WORKERS_POLL_S = 2.0
RESULT_S = 10.0
AHEAD = 2
"""Tasks in flight for each worker on a scheduler: one runs, one waits beside it; the rest stay here."""


def on_scheduler(
    fn: Callable[[T], R],
    items: Iterable[T | Done[T, R] | None],
    where: Where,
    blames_worker: Callable[[Exception], bool],
    ready: Callable[[], object] | None,
) -> Generator[Done[T, R] | Failed[T], None, None]:
    """``run`` on the scheduler at ``where.scheduler``; the arguments are its."""
    import distributed as dask_distributed

    # Dask states no types.
    distributed: Any = dask_distributed
    assert where.scheduler is not None
    task = fn if where.timeout_s is None else partial(run_killable, fn, where.timeout_s, ready=ready)
    # What Dask's client logs of a lost connection, with tracebacks, is told here in one line.
    log = logging.getLogger("distributed.client")
    log.addFilter(silence := _Silence())
    try:
        client = distributed.Client(where.scheduler, timeout=where.connect_s, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        log.removeFilter(silence)
        raise WorkerError(
            f"no Dask scheduler answers at {where.scheduler} ({error})",
            remedy="start one with 'dask scheduler' and workers with 'dask worker ADDRESS'",
        ) from error
    try:
        finished = distributed.as_completed([], loop=client.loop)
        yield from _through(client, finished, task, iter(items), where, blames_worker)
    except OSError as error:
        # Errors of fn and of items are values by now: what is left is Dask's connection.
        if isinstance(error, WsiPipeError):
            raise
        raise _gone(where) from error
    finally:
        with contextlib.suppress(Exception):
            client.close(timeout=5)
        log.removeFilter(silence)


class _Silence(logging.Filter):
    """Lets no record pass. One object a run: several may be under way in one process."""

    def filter(self, record: logging.LogRecord) -> bool:
        return False


def _through(
    client: Any,
    finished: Any,
    task: Callable[[T], R],
    source: Iterator[T | Done[T, R] | None],
    where: Where,
    blames_worker: Callable[[Exception], bool],
) -> Iterator[Done[T, R] | Failed[T]]:
    """Items through a connected client, a bounded number in flight; results are dropped there once they are here."""
    running: dict[Any, tuple[T, set[str] | None]] = {}
    again: deque[T] = deque()
    workers = Workers(client, where)
    exhausted = False
    room, asked = 1, 0.0
    try:
        while True:
            if time.monotonic() - asked > WORKERS_POLL_S:
                room, asked = AHEAD * max(sum(client.nthreads().values()), 1), time.monotonic()
                again += _stranded(running, workers)
            while (again or not exhausted) and len(running) < room:
                try:
                    item = again.popleft() if again else next(source)
                except StopIteration:
                    exhausted = True
                    break
                if item is None:
                    break
                if isinstance(item, Done):
                    yield item
                    continue
                others = workers.others()
                if others is not None and not others:
                    assert workers.last_error is not None
                    yield Failed(item, workers.last_error)
                    continue
                future = client.submit(
                    _guarded,
                    task,
                    item,
                    pure=False,
                    retries=where.retries,
                    resources=where.resources,
                    workers=sorted(others) if others else None,
                )
                running[future] = item, others
                finished.add(future)
            if not running:
                if exhausted and not again:
                    return
                continue
            future = _next_done(finished, client, where, 1.0 if exhausted or len(running) >= room else POLL_S)
            if future is None or future not in running:
                continue
            outcome: Done[T, R] | Failed[T] | None = _outcome(running[future][0], future, where)
            if outcome is None:
                finished.add(future)
                continue
            del running[future]
            future.release()
            if isinstance(outcome, Failed) and blames_worker(outcome.error):
                workers.blame(outcome.worker, outcome.error)
                # Whether another is there is asked where it is handed out.
                again.append(outcome.item)
                continue
            if isinstance(outcome, Done):
                workers.praise(outcome.worker)
            yield outcome
    finally:
        for future in running:
            with contextlib.suppress(Exception):
                future.cancel()


def _stranded(running: dict[Any, tuple[T, set[str] | None]], workers: Workers) -> Iterator[T]:
    """Items that wait for workers all of which have gone meanwhile; Dask would let them wait for ever."""
    bound = [(future, item, allowed) for future, (item, allowed) in running.items() if allowed is not None]
    present = workers.present() if bound else set()
    for future, item, allowed in bound:
        if not allowed & present:
            del running[future]
            with contextlib.suppress(Exception):
                future.cancel()
            yield item


def _next_done(queue: Any, client: Any, where: Where, patience_s: float) -> Any:
    """The next finished future, or None when none is finished yet. Raises WorkerError when the scheduler is gone."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        if client.status != "running":
            # Dask forgets what was in flight when it loses its scheduler, also where it finds one again.
            raise _gone(where)
        if queue.has_ready():
            return next(queue)
        time.sleep(0.02)
    return None


def _guarded(fn: Callable[[T], R], item: T) -> tuple[str, Any, str]:
    """What came of it, and on which worker. An error as a value: Dask would log it with a traceback on the worker."""
    import distributed

    address: str = distributed.get_worker().address
    try:
        return ("value", fn(item), address)
    except Exception as error:
        return ("error", error, address)


def _outcome(item: T, future: Any, where: Where) -> Done[T, R] | Failed[T] | None:
    """What became of a finished future; None when its result was lost with its worker, so that Dask makes it again.

    Raises WorkerError when the scheduler is gone.
    """
    try:
        kind, value, worker = future.result(timeout=RESULT_S)
    except CancelledError as error:
        # Nobody here cancels what is awaited: a scheduler that started anew knows nothing of it.
        raise _gone(where) from error
    except TimeoutError:
        return None
    except Exception as error:
        if future.status != "error":
            # The task was done; fetching its result failed. That is no fault of the item's.
            raise _gone(where) from error
        # Dask's own words for a worker that died too often.
        return Failed(item, WorkerError(f"its Dask worker died or was lost ({type(error).__name__}: {error})"))
    return Failed(item, value, worker) if kind == "error" else Done(item, value, worker)


def _gone(where: Where) -> WorkerError:
    return WorkerError(
        f"the Dask scheduler at {where.scheduler} went away",
        remedy="start it again and run the same command: finished slides are kept",
    )
