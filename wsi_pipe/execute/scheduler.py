"""Items through a Dask scheduler: connecting, a bounded number in flight, and what becomes of a lost connection."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

from wsi_pipe.errors import WorkerError, WsiPipeError
from wsi_pipe.execute.items import Done, Failed, Where
from wsi_pipe.execute.own import run_killable
from wsi_pipe.execute.roster import Identity, Workers, difference
from wsi_pipe.stopping import StopRequested, belongs_to

__all__ = ["on_scheduler"]

T = TypeVar("T")
R = TypeVar("R")

POLL_S = 0.2
WORKERS_POLL_S = 2.0
RESULT_S = 10.0
STOP_S = 1.5
MOST_TRIES = 3
AHEAD = 2
"""Tasks in flight for each worker on a scheduler: one runs, one waits beside it; the rest stay here."""


def _dask() -> Any:
    """Dask's ``distributed``, which states no types. Raises WorkerError where it is not installed."""
    try:
        import distributed
    except ImportError as error:
        raise WorkerError(
            f"a scheduler is given, and Dask cannot be imported ({error})",
            remedy="pip install 'wsi-pipe[cluster]', here and where the workers run",
        ) from error
    return distributed


def on_scheduler(
    fn: Callable[[T], R],
    items: Iterable[T | Done[T, R] | None],
    where: Where,
    blames_worker: Callable[[Exception], bool],
    doubts: Callable[[R], str | None],
    identity: Identity | None,
    ready: Callable[[], object] | None,
) -> Generator[Done[T, R] | Failed[T], None, None]:
    """``run`` on the scheduler at ``where.scheduler``; the arguments are its."""
    distributed = _dask()
    assert where.scheduler is not None
    if (
        where.scheduler.startswith("tls:")
        and distributed.Security().get_connection_args("client")["ssl_context"] is None
    ):
        raise WorkerError(
            f"{where.scheduler} wants a certificate, and Dask's settings name none",
            remedy="set DASK_DISTRIBUTED__COMM__TLS__CA_FILE, ...__TLS__CLIENT__CERT and ...__TLS__CLIENT__KEY",
        )
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
        yield from _through(client, finished, task, iter(items), where, blames_worker, doubts, identity)
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


@dataclass
class _Flight(Generic[T]):
    """An item on its way. allowed: workers that may have it. tried: what those said that could not do it."""

    item: T
    allowed: set[str]
    tried: dict[str, tuple[str, Any]] = field(default_factory=dict)


def _through(
    client: Any,
    finished: Any,
    task: Callable[[T], R],
    source: Iterator[T | Done[T, R] | None],
    where: Where,
    blames_worker: Callable[[Exception], bool],
    doubts: Callable[[R], str | None],
    identity: Identity | None,
) -> Generator[Done[T, R] | Failed[T]]:
    """Items through a connected client, a bounded number in flight; results are dropped there once they are here."""
    running: dict[Any, _Flight[T]] = {}
    again: deque[_Flight[T]] = deque()
    workers = Workers(client, where, identity)
    work = _Work(uuid.uuid4().hex, task, identity, workers.expected)
    exhausted = False
    room, asked = 1, -WORKERS_POLL_S
    try:
        while True:
            if time.monotonic() - asked > (WORKERS_POLL_S if workers.present() else POLL_S):
                workers.look()
                room, asked = AHEAD * max(sum(client.nthreads().values()), 1), time.monotonic()
                again += _stranded(running, workers)
            pausing = False
            while (again or not exhausted) and len(running) < room:
                if workers.present():
                    workers.lacks_nothing()
                elif not running:
                    workers.tell_what_lacks()
                    pausing = True
                    break
                flight = again.popleft() if again else None
                if flight is None:
                    if not workers.for_new() and workers.all_to_blame is None:
                        # All that are there are in doubt: others try what these could not do.
                        break
                    try:
                        item = next(source)
                    except StopIteration:
                        exhausted = True
                        break
                    if item is None:
                        break
                    if isinstance(item, Done):
                        yield item
                        continue
                    flight = _Flight(item, set())
                tried = set(flight.tried)
                flight.allowed = workers.for_another_try(tried) if tried else workers.for_new()
                if not flight.allowed and (error := workers.all_to_blame) is not None and not tried:
                    yield Failed(flight.item, error)
                    continue
                if not flight.allowed and tried:
                    # Those that could have tried it have gone.
                    worker, (_, value) = next(iter(flight.tried.items()))
                    workers.resolve(worker, other_could=False)
                    yield Done(flight.item, value, worker)
                    continue
                if not flight.allowed:
                    again.append(flight)
                    break
                future = client.submit(
                    work,
                    flight.item,
                    pure=False,
                    retries=where.retries,
                    resources=where.resources,
                    workers=sorted(flight.allowed),
                )
                running[future] = flight
                finished.add(future)
            if not running:
                if exhausted and not again:
                    return
                if pausing or again or not workers.for_new():
                    time.sleep(POLL_S)
                continue
            future = _next_done(finished, client, where, 1.0 if exhausted or len(running) >= room else POLL_S)
            if future is None or future not in running:
                continue
            flight = running[future]
            outcome: Done[T, R] | Failed[T] | _Other | None = _outcome(flight.item, future, where)
            if outcome is None:
                finished.add(future)
                continue
            del running[future]
            future.release()
            if isinstance(outcome, _Other):
                workers.is_other(outcome.worker, outcome.text)
                again.append(flight)
                continue
            if isinstance(outcome, Failed) and blames_worker(outcome.error):
                workers.blame(outcome.worker, outcome.error)
                # Whether another is there is asked where it is handed out.
                again.append(flight)
                continue
            if isinstance(outcome, Done):
                doubt = doubts(outcome.value)
                if doubt is not None and _may_try_elsewhere(flight, outcome.worker, doubt, workers):
                    workers.doubt(outcome.worker)
                    flight.tried[outcome.worker] = doubt, outcome.value
                    again.append(flight)
                    continue
                if doubt is None:
                    workers.praise(outcome.worker)
                for worker in flight.tried:
                    workers.resolve(worker, other_could=doubt is None)
            yield outcome
    finally:
        _stop(client, running, work.name)


def _may_try_elsewhere(flight: _Flight[T], worker: str, doubt: str, workers: Workers) -> bool:
    """Whether another worker shall try what this one could not do: until two say the same, and three at most."""
    if doubt in (before for before, _ in flight.tried.values()) or len(flight.tried) >= MOST_TRIES - 1:
        return False
    return bool(workers.for_another_try({*flight.tried, worker}))


def _stop(client: Any, running: dict[Any, Any], name: str) -> None:
    """Tell the workers to end what they have at hand, which puts by what there is, and give them a moment for it."""
    if not running:
        return

    def tell() -> None:
        with contextlib.suppress(Exception):
            client.run(stop_work, name)
            deadline = time.monotonic() + STOP_S
            while time.monotonic() < deadline and not all(future.done() for future in running):
                time.sleep(0.05)
            for future in running:
                future.cancel()

    # A scheduler that does not answer must not hold up the end.
    thread = threading.Thread(target=tell, name="stop", daemon=True)
    thread.start()
    thread.join(STOP_S + 0.3)


def _stranded(running: dict[Any, _Flight[T]], workers: Workers) -> Iterator[_Flight[T]]:
    """Items that wait for workers all of which have gone meanwhile; Dask would let them wait for ever."""
    present = workers.present()
    for future, flight in list(running.items()):
        if not flight.allowed & present:
            del running[future]
            with contextlib.suppress(Exception):
                future.cancel()
            yield flight


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


_stops: dict[str, threading.Event] = {}
"""On a worker, by run: set once its client has told it to stop."""


def stop_work(name: str) -> None:
    """On a worker: end the tasks of a run."""
    _stops.setdefault(name, threading.Event()).set()


@dataclass(frozen=True)
class _Work(Generic[T, R]):
    """The task of a run as it goes to workers. name: of the run. identity, expected: see ``Workers``."""

    name: str
    task: Callable[[T], R]
    identity: Identity | None
    expected: Mapping[str, str]

    def __call__(self, item: T) -> tuple[str, Any, str]:
        """What came of it, and on which worker. An error as a value: Dask would log it with a traceback there."""
        import distributed

        address: str = distributed.get_worker().address
        if self.identity is not None and (text := difference(self.expected, self.identity())):
            return ("other", f"is of another version: {text}", address)
        stop = _stops.setdefault(self.name, threading.Event())
        if stop.is_set():
            return ("stopped", None, address)
        try:
            with belongs_to(stop):
                return ("value", self.task(item), address)
        except StopRequested:
            return ("stopped", None, address)
        except Exception as error:
            return ("error", error, address)


@dataclass(frozen=True)
class _Other:
    """A worker of another version declined an item."""

    worker: str
    text: str


def _outcome(item: T, future: Any, where: Where) -> Done[T, R] | Failed[T] | _Other | None:
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
    if kind == "other":
        return _Other(worker, value)
    if kind == "stopped":
        return Failed(item, WorkerError("stopped"), worker)
    return Failed(item, value, worker) if kind == "error" else Done(item, value, worker)


def _gone(where: Where) -> WorkerError:
    return WorkerError(
        f"the Dask scheduler at {where.scheduler} went away",
        remedy="start it again and run the same command: finished slides are kept",
    )
