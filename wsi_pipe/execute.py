"""Running a callable over many items: in this process, in processes that can be killed, or on a Dask scheduler.

Knows no stage: ``fn(item)`` returns a value, and what it returns comes back as it is finished. A process that dies or
takes too long costs its own item only. Nothing but items and results crosses a process boundary.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar, cast

from wsi_pipe.cores import core_shares, cores_environment
from wsi_pipe.errors import ConfigError, TaskTimeoutError, WorkerError, WsiPipeError

__all__ = ["Done", "Failed", "KillableWorker", "Where", "run", "run_bounded", "run_killable"]

T = TypeVar("T")
R = TypeVar("R")

POLL_S = 0.2
KILL_GRACE_S = 2.0
READY_S = 600.0
"""What a process may take to load what all items need, where items have a time-out."""
WORKERS_POLL_S = 2.0
RESULT_S = 10.0
AHEAD = 2
"""Tasks in flight for each worker on a scheduler: one runs, one waits beside it; the rest stay here."""


@dataclass(frozen=True)
class Where:
    """Where work runs.

    workers: processes on this machine; 1 without a time-out is this process itself. scheduler: address of a Dask
    scheduler, which then decides. timeout_s: seconds that one item may take. retries: how often an item is tried
    again after its process died. resources: what a Dask worker must offer, such as {"GPU": 1}.
    connect_s: seconds to wait for a scheduler.
    """

    workers: int = 1
    scheduler: str | None = None
    timeout_s: float | None = None
    retries: int = 1
    resources: dict[str, float] | None = None
    connect_s: float = 20.0

    @property
    def here(self) -> bool:
        """Whether work runs in this very process."""
        return self.scheduler is None and self.workers == 1 and self.timeout_s is None


@dataclass(frozen=True)
class Done(Generic[T, R]):
    """An item and what the callable returned; worker: who did it, empty for this process."""

    item: T
    value: R
    worker: str = field(default="", compare=False)


@dataclass(frozen=True)
class Failed(Generic[T]):
    """An item whose process died, took too long, or whose callable raised; the error says which. worker: as in Done."""

    item: T
    error: Exception
    worker: str = field(default="", compare=False)


def run(
    fn: Callable[[T], R],
    items: Iterable[T | Done[T, R] | None],
    where: Where,
    *,
    blames_worker: Callable[[Exception], bool] = lambda error: False,
    ready: Callable[[], object] | None = None,
) -> Generator[Done[T, R] | Failed[T], None, None]:
    """Apply ``fn`` to every item; results come as they are finished, in no fixed order.

    items: consumed lazily, a few ahead of what is finished. fn: a picklable callable when it runs elsewhere. Closing
    the generator ends the workers. On a scheduler, an item that is a Done comes back as it is, and None means that the
    next item is not there yet. blames_worker: whether an error that ``fn`` raised is its worker's fault rather than the
    item's: that worker gets no more items, and the item goes to another; it is Failed only once there is no other.
    ready: called in each process that can be killed before its first item; outside the item's time, as is the start.
    Raises WorkerError when a scheduler cannot be reached or goes away; what was handed out before stays valid.
    """
    if where.workers < 1:
        raise ConfigError(f"{where.workers} workers: at least 1 is needed")
    if where.scheduler:
        return _on_scheduler(fn, items, where, blames_worker, ready)
    known = cast("Iterable[T]", items)
    return _here(fn, known) if where.here else _in_processes(fn, known, where, blames_worker, ready)


def _here(fn: Callable[[T], R], items: Iterable[T]) -> Generator[Done[T, R] | Failed[T]]:
    for item in items:
        try:
            value = fn(item)
        except Exception as error:
            yield Failed(item, error)
        else:
            yield Done(item, value)


class KillableWorker:
    """One process that runs one callable at a time, keeps what it has loaded, and can be killed.

    cores: how many it may use, all of this process's by default.
    """

    def __init__(self, cores: int | None = None) -> None:
        self._environment = None if cores is None else os.environ | cores_environment(cores)
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._ready: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self.exit_code: int | None = None
        """Of the process that died in the last call, where one did and its code is known."""

    def call(
        self,
        fn: Callable[[T], R],
        item: T,
        timeout_s: float | None,
        stop: threading.Event | None = None,
        ready: Callable[[], object] | None = None,
    ) -> R:
        """``fn(item)`` in the process.

        ready: called in a process before its first item and outside the item's time, to load what all items need.

        Raises what ``fn`` raises; TaskTimeoutError when it takes longer than ``timeout_s`` and WorkerError when the
        process dies, both after the process is gone (the next call starts another). ``stop`` set by another thread
        ends the call by WorkerError.
        """
        pipe = self._start()
        # Also without anything to load a process takes its time to start.
        ready = ready or (None if timeout_s is None else _nothing)
        if ready is not None and self._ready is not self._process:
            limit_s = None if timeout_s is None else max(timeout_s, READY_S)
            self._ask(pipe, _call_ready, ready, limit_s, stop, "getting ready")
            self._ready = self._process
        return self._ask(pipe, fn, item, timeout_s, stop, "it")

    def _ask(
        self,
        pipe: Connection,
        fn: Callable[[T], R],
        item: T,
        timeout_s: float | None,
        stop: threading.Event | None,
        what: str,
    ) -> R:
        self.exit_code = None
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            pipe.send((fn, item))
            while not pipe.poll(POLL_S):
                if stop is not None and stop.is_set():
                    self.kill()
                    raise WorkerError("stopped")
                if deadline is not None and time.monotonic() > deadline:
                    self.kill()
                    raise TaskTimeoutError(
                        f"{'' if what == 'it' else what + ' '}took longer than {timeout_s:g} s and was ended",
                        remedy="give more time with --timeout, or leave the slide out",
                    )
            kind, value = pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            self.exit_code = self._exit_code()
            self.kill()
            raise WorkerError(
                f"its process died ({_cause(self.exit_code)})",
                remedy="too little memory or a damaged slide: try fewer --workers, or leave the slide out",
            ) from error
        except BaseException:
            # An interrupt between question and answer: the next call would get this one's answer.
            self.kill()
            raise
        if kind == "error":
            raise value
        result: R = value
        return result

    def _start(self) -> Connection:
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                ours, theirs = multiprocessing.Pipe()
                # Not multiprocessing.Process: Dask's own workers are daemons, which may not have children of that kind.
                code = f"from wsi_pipe.execute import serve; serve({theirs.fileno()}, {os.getpid()})"
                # A process group of its own: a terminal's Ctrl-C is the parent's to answer, also while this one starts.
                self._process = subprocess.Popen(
                    [sys.executable, "-c", code],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env=self._environment,
                    process_group=0,
                )
                theirs.close()
                self._pipe = ours
            assert self._pipe is not None
            return self._pipe

    def _exit_code(self) -> int | None:
        process = self._process
        if process is None:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(KILL_GRACE_S)
        return None

    def kill(self) -> None:
        """End the process, whatever it does."""
        with self._lock:
            process, pipe = self._process, self._pipe
            self._process = self._pipe = None
        if process is not None:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(KILL_GRACE_S)
        if pipe is not None:
            pipe.close()


def _cause(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


def serve(descriptor: int, parent: int) -> None:
    """The worker process: calls until the pipe closes or the parent is gone. The parent alone answers to Ctrl-C, and to
    SIGTERM, which a batch system sends to all processes of a job at once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    pipe = Connection(descriptor)
    while True:
        try:
            fn, item = pipe.recv()
        except (EOFError, OSError):
            return
        except Exception as error:
            pipe.send(("error", WorkerError(f"a task cannot be understood by its process ({error})")))
            continue
        try:
            answer = ("value", fn(item))
        except Exception as error:
            answer = ("error", error)
        try:
            pipe.send(answer)
        except (BrokenPipeError, ConnectionResetError):
            return
        except Exception as error:
            pipe.send(("error", WorkerError(f"a result cannot be sent back ({type(error).__name__}: {error})")))


def _end_with(parent: int) -> None:
    """End this process when its parent is gone: a slide that nobody waits for must not write beside a new run."""
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os._exit(1)


def _nothing() -> None:
    pass


def _call_ready(ready: Callable[[], object]) -> None:
    ready()


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


def _left_out(worker: str, error: Exception) -> None:
    logging.getLogger(__name__).warning("%s gets no more work, others take over: %s", worker, error)


def _in_processes(
    fn: Callable[[T], R],
    items: Iterable[T],
    where: Where,
    blames_worker: Callable[[Exception], bool],
    ready: Callable[[], object] | None,
) -> Generator[Done[T, R] | Failed[T], None, None]:
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
            while idle:
                try:
                    item = again.popleft() if again else next(source)
                except StopIteration:
                    break
                worker = idle.pop()
                running[pool.submit(_attempt, worker, fn, item, where, stop, ready)] = worker
            if not running:
                return
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                worker, result = running.pop(future), future.result()
                if isinstance(result, Failed) and blames_worker(result.error):
                    worker.kill()
                    if idle or running:
                        _left_out(f"worker process {everyone.index(worker) + 1} of {len(everyone)}", result.error)
                        again.append(result.item)
                        continue
                else:
                    idle.append(worker)
                yield result
    finally:
        stop.set()
        for worker in everyone:
            worker.kill()
        pool.shutdown(wait=True, cancel_futures=True)


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
def _end_own_workers() -> None:
    while _own_workers:
        _own_workers.pop().kill()


def run_killable(fn: Callable[[T], R], timeout_s: float, item: T, *, ready: Callable[[], object] | None = None) -> R:
    """``fn(item)`` in a child of this process that is killed when it takes too long; the child stays for the next.

    What a Dask worker calls: Dask itself cannot end a task that runs. Raises as ``KillableWorker.call``.
    """
    with _own_worker() as worker:
        return worker.call(fn, item, timeout_s, ready=ready)


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


def _guarded(fn: Callable[[T], R], item: T) -> tuple[str, Any, str]:
    """What came of it, and on which worker. An error as a value: Dask would log it with a traceback on the worker."""
    import distributed

    address: str = distributed.get_worker().address
    try:
        return ("value", fn(item), address)
    except Exception as error:
        return ("error", error, address)


def _on_scheduler(
    fn: Callable[[T], R],
    items: Iterable[T | Done[T, R] | None],
    where: Where,
    blames_worker: Callable[[Exception], bool],
    ready: Callable[[], object] | None,
) -> Generator[Done[T, R] | Failed[T], None, None]:
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


def _gone(where: Where) -> WorkerError:
    return WorkerError(
        f"the Dask scheduler at {where.scheduler} went away",
        remedy="start it again and run the same command: finished slides are kept",
    )


class _Workers:
    """Which of a scheduler's workers may have work: those that offer the resources, but for those to blame."""

    def __init__(self, client: Any, where: Where) -> None:
        self._client, self._where = client, where
        self._blamed: dict[str, Exception] = {}

    def blame(self, worker: str, error: Exception) -> None:
        """Give ``worker`` no more work, as far as others are there."""
        if worker not in self._blamed and self.others():
            _left_out(f"the worker at {worker}", error)
        self._blamed[worker] = error

    def praise(self, worker: str) -> None:
        """What a worker had at hand when it was blamed has come out well: it is fit again."""
        self._blamed.pop(worker, None)

    def present(self) -> set[str]:
        """Addresses of the workers that are there and offer the resources."""
        wanted = (self._where.resources or {}).items()
        known: dict[str, Any] = self._client.scheduler_info(n_workers=-1)["workers"]
        return {
            address
            for address, facts in known.items()
            if all((facts.get("resources") or {}).get(name, 0) >= amount for name, amount in wanted)
        }

    def others(self) -> set[str] | None:
        """Workers that nothing is known against; None where that is so of all, or none at all is there."""
        if not self._blamed:
            return None
        present = self.present()
        return present - self._blamed.keys() if present else None

    @property
    def last_error(self) -> Exception | None:
        """Why the last one was blamed."""
        return next(reversed(self._blamed.values()), None)


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
    workers = _Workers(client, where)
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


def _stranded(running: dict[Any, tuple[T, set[str] | None]], workers: _Workers) -> Iterator[T]:
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
