"""A job's slides spread over this process, several processes, or a Dask scheduler; every outcome noted once."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import queue
import shutil
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial

from wsi_pipe.config import JobSettings
from wsi_pipe.encoders.base import Encoder
from wsi_pipe.errors import ConfigError, EncoderError, OutputError, WsiPipeError
from wsi_pipe.execute import Done, Failed, Where, run
from wsi_pipe.files import output_error
from wsi_pipe.job.paths import JobPaths
from wsi_pipe.job.prepare import open_entry
from wsi_pipe.job.private import told_of
from wsi_pipe.job.record import OutcomeLog, utc_now
from wsi_pipe.job.run import Progress, process
from wsi_pipe.job.task import slide_task, warm_up
from wsi_pipe.manifest import SlideEntry, is_url
from wsi_pipe.outcome import STAGES, SlideOutcome, Stage
from wsi_pipe.slides.storage.in_use import Keep, keep_copy
from wsi_pipe.slides.storage.run_folder import share_run_folder

__all__ = ["MIN_FREE_BYTES", "check_folder", "dispatch"]

MIN_FREE_BYTES = 64 << 20
"""Less free space than this ends a run before the next slide, while what is under way can still be written."""

POLL_S = 0.1
STAGED_AHEAD = 2
LAID_AHEAD = 1000
"""Slides whose grids may wait for a worker that can encode."""


def dispatch(
    entries: Sequence[SlideEntry],
    settings: JobSettings,
    paths: JobPaths,
    where: Where,
    *,
    until: Stage = "assemble",
    keep_features: bool = False,
    encoders: Mapping[str, Encoder] | None = None,
    progress: Progress | None = None,
) -> Generator[SlideOutcome, None, None]:
    """Take slides to ``until`` where ``where`` says; outcomes come, and are noted in the job, as slides finish.

    What comes tells of this run alone; for what is noted see ``OutcomeLog``. In this process, slides share batches;
    elsewhere each is a task of its own. With ``where.resources``, masks and grids are made on any worker and features
    on those that offer the resources. encoders: those loaded already, for work in this process. A process that dies
    or takes too long fails its slide alone; a worker that cannot encode or write is left out, and its slides go to
    others. Raises OutputError when the job's folder is nearly full, once the slides under way are done, or when no
    worker can write it, EncoderError when no worker can encode, WorkerError when a scheduler goes away.
    """
    short: list[OutputError] = []
    feed: Iterable[SlideEntry] = _while_space(entries, paths, short)
    share_run_folder()
    stopped = threading.Event()
    copies: dict[str, Keep] = {}
    if where.scheduler is None:
        feed = _staged_ahead(feed, settings, stopped, copies)
    try:
        results = _dispatched(feed, settings, paths, where, until, keep_features, encoders, progress, stopped)
        # Closed with this one: else its workers would live until somebody collects it.
        with contextlib.closing(results):
            for outcome in results:
                if (copy := copies.pop(outcome.slide_id, None)) is not None:
                    copy.release()
                yield outcome
        if short:
            raise short[0]
    finally:
        for copy in copies.values():
            copy.release()


def _dispatched(
    feed: Iterable[SlideEntry],
    settings: JobSettings,
    paths: JobPaths,
    where: Where,
    until: Stage,
    keep_features: bool,
    encoders: Mapping[str, Encoder] | None,
    progress: Progress | None,
    stopped: threading.Event,
) -> Generator[SlideOutcome, None, None]:
    """``dispatch`` of slides that are staged already."""
    if where.here:
        here = process(
            feed,
            settings,
            paths,
            until=until,
            encoders=encoders,
            keep_features=keep_features,
            progress=progress,
            stopped=stopped,
        )
        with contextlib.closing(here):
            yield from here
        check_folder(paths)
        return
    # A worker's tiles and features come out of one budget of this machine.
    share = settings
    if where.scheduler is None and where.workers > 1:
        extract = settings.extract
        memory = max(extract.memory_mib // where.workers, 64)
        share = dataclasses.replace(settings, extract=dataclasses.replace(extract, memory_mib=memory))
    task = partial(slide_task, share, str(paths.root.absolute()))
    ready = partial(warm_up, share)
    if where.scheduler and where.resources and until in ("extract", "assemble"):
        results = _in_two_phases(task, ready, keep_features, feed, where, until)
    else:
        results = _run(partial(task, until, keep_features), partial(ready, until), feed, where)
    log = OutcomeLog(paths)
    # Workers end when this generator does, also by an error, whoever may still hold on to that.
    with contextlib.closing(results):
        for outcome in results:
            check_folder(paths)
            log.note(outcome)
            if progress and "extract" not in outcome.cached:
                for label, count in outcome.tiles.items():
                    progress(outcome.slide_id, label, count)
            yield outcome


def check_folder(paths: JobPaths) -> None:
    """Raises OutputError when the job's folder was removed or moved: a write would make another, bare one."""
    if not paths.config.is_file():
        raise output_error(paths.root, FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)))


def _while_space(entries: Iterable[SlideEntry], paths: JobPaths, short: list[OutputError]) -> Iterator[SlideEntry]:
    """The entries, as long as the folder is there and the disk has room. Raises OutputError when the folder is gone.

    short: gets the error that says that room ran out. It is not raised here, since that would end the slides under way
    as well, which can still be written.
    """
    root = paths.root
    for entry in entries:
        check_folder(paths)
        try:
            usage = shutil.disk_usage(root)
        except OSError as error:
            raise output_error(root, error) from error
        if usage.free < MIN_FREE_BYTES and usage.total > 4 * MIN_FREE_BYTES:
            short.append(
                OutputError(
                    f"{root}: only {usage.free >> 20} MiB of space are left",
                    remedy="free some space or give another output folder, then run again: finished slides are kept",
                )
            )
            return
        yield entry


def _staged_ahead(
    entries: Iterable[SlideEntry], settings: JobSettings, stopped: threading.Event, copies: dict[str, Keep]
) -> Iterator[SlideEntry]:
    """The entries, those behind URLs copied to the cache (where their format needs that) before they are asked for.

    ``stopped`` ends them, also while a copy is waited for. copies: gets, by slide, what keeps its copy where it is; the
    caller releases it when the slide is done.
    """
    waiting: deque[tuple[SlideEntry, threading.Event | None]] = deque()
    orders: queue.SimpleQueue[tuple[SlideEntry, threading.Event] | None] = queue.SimpleQueue()
    # A daemon: a copy that takes minutes must not keep an interrupted run from ending.
    thread = threading.Thread(target=_stage_each, args=(orders, settings), name="stage", daemon=True)
    try:
        for entry in entries:
            landed = threading.Event() if is_url(entry.path) else None
            if landed:
                if not thread.is_alive():
                    thread.start()
                copies[entry.slide_id] = keep_copy(entry.path)
                orders.put((entry, landed))
            waiting.append((entry, landed))
            # Local slides cost nothing to have at hand; of remote ones a few are copied ahead.
            while waiting and (waiting[0][1] is None or len(waiting) > STAGED_AHEAD):
                if not _landed(waiting[0][1], stopped):
                    return
                yield waiting.popleft()[0]
        while waiting and _landed(waiting[0][1], stopped):
            yield waiting.popleft()[0]
    finally:
        orders.put(None)


def _stage_each(orders: queue.SimpleQueue[tuple[SlideEntry, threading.Event] | None], settings: JobSettings) -> None:
    while (order := orders.get()) is not None:
        entry, landed = order
        try:
            # What goes wrong here goes wrong again where the slide is opened in earnest, and is told there.
            with contextlib.suppress(Exception):
                open_entry(entry, settings.reader, settings.cache).close()
        finally:
            landed.set()


def _landed(landed: threading.Event | None, stopped: threading.Event) -> bool:
    """Wait for a copy; False where the run ended meanwhile."""
    while landed is not None and not landed.wait(POLL_S):
        if stopped.is_set():
            return False
    return True


def _worker_is_at_fault(error: Exception) -> bool:
    """Whether another worker may do what this one could not: its device may be gone, a mount or weights missing."""
    return isinstance(error, (OutputError, EncoderError))


def _run(
    task: Callable[[SlideEntry], SlideOutcome],
    ready: Callable[[], None],
    entries: Iterable[SlideEntry | Done[SlideEntry, SlideOutcome] | None],
    where: Where,
) -> Generator[SlideOutcome, None, None]:
    return _outcomes(run(task, entries, where, blames_worker=_worker_is_at_fault, ready=ready))


def _outcomes(
    results: Generator[Done[SlideEntry, SlideOutcome] | Failed[SlideEntry], None, None],
) -> Generator[SlideOutcome, None, None]:
    """One outcome for each result. Raises what concerns the whole job, and what no worker could do."""
    with contextlib.closing(results):
        for result in results:
            if isinstance(result, Done):
                yield result.value
                continue
            error = result.error
            if isinstance(error, (OutputError, EncoderError, ConfigError)):
                raise error
            yield failed_outcome(result.item, error)


def failed_outcome(entry: SlideEntry, error: Exception) -> SlideOutcome:
    """The outcome of a slide whose process could not even say what went wrong, nor in which stage."""
    reason, remedy = told_of(entry, error)
    return SlideOutcome(
        slide_id=entry.slide_id,
        status="failed",
        path=entry.shown_path,
        reason=reason,
        remedy=remedy,
        error=type(error).__name__ if isinstance(error, WsiPipeError) or entry.hides else repr(error),
        finished_utc=utc_now(),
    )


def _in_two_phases(
    task: Callable[..., SlideOutcome],
    warm: Callable[[Stage], None],
    keep_features: bool,
    entries: Iterable[SlideEntry],
    where: Where,
    until: Stage,
) -> Generator[SlideOutcome, None, None]:
    """Masks and grids anywhere, features where the resources are; a slide goes on as soon as its grids are laid."""
    assert STAGES.index(until) > STAGES.index("tile")
    # Bounded, so that cheap work does not run through an archive ahead of what is dear.
    ready: queue.Queue[SlideEntry | Done[SlideEntry, SlideOutcome] | BaseException | None] = queue.Queue(LAID_AHEAD)
    stop = threading.Event()
    by_id: dict[str, SlideEntry] = {}

    def note(items: Iterable[SlideEntry]) -> Iterator[SlideEntry]:
        for entry in items:
            if stop.is_set():
                return
            by_id[entry.slide_id] = entry
            yield entry

    def hand_on(what: SlideEntry | Done[SlideEntry, SlideOutcome] | BaseException | None) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(what, timeout=0.1)
                return

    def lay_grids() -> None:
        try:
            anywhere = dataclasses.replace(where, resources=None)
            with contextlib.closing(
                _run(partial(task, "tile", keep_features), partial(warm, "tile"), note(entries), anywhere)
            ) as laid:
                for outcome in laid:
                    entry = by_id.pop(outcome.slide_id)
                    hand_on(Done(entry, outcome) if outcome.status == "failed" else entry)
                    if stop.is_set():
                        return
            hand_on(None)
        except BaseException as error:  # raised again in the caller's thread
            hand_on(error)

    def with_grids() -> Iterator[SlideEntry | Done[SlideEntry, SlideOutcome] | None]:
        while True:
            try:
                item = ready.get(timeout=0.05)
            except queue.Empty:
                yield None
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    thread = threading.Thread(target=lay_grids, name="lay-grids", daemon=True)
    thread.start()
    try:
        yield from _run(partial(task, until, keep_features), partial(warm, until), with_grids(), where)
    finally:
        stop.set()
