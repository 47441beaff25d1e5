"""A job's slides spread over this process, several processes, or a Dask scheduler; every outcome noted once."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import queue
import shutil
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial

from wsi_pipe.config import JobSettings
from wsi_pipe.encoders.base import Encoder
from wsi_pipe.errors import ConfigError, EncoderError, OutputError, WsiPipeError
from wsi_pipe.execute import Done, Failed, Where, run
from wsi_pipe.files import output_error
from wsi_pipe.job.identity import versions
from wsi_pipe.job.paths import JobPaths
from wsi_pipe.job.private import told_of
from wsi_pipe.job.record import OutcomeLog, utc_now
from wsi_pipe.job.run import Progress, process
from wsi_pipe.job.staged import Staging
from wsi_pipe.job.task import slide_task, warm_up
from wsi_pipe.manifest import SlideEntry
from wsi_pipe.outcome import STAGES, SlideOutcome, Stage
from wsi_pipe.slides.storage.run_folder import share_run_folder

__all__ = ["MIN_FREE_BYTES", "check_folder", "dispatch"]

MIN_FREE_BYTES = 64 << 20
"""Less free space than this ends a run before the next slide, while what is under way can still be written."""

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
    share_run_folder()
    stopped = threading.Event()
    # Workers of a cluster copy what they need themselves.
    staging = Staging(
        entries if where.scheduler is None else (),
        settings,
        timeout_s=where.timeout_s,
        stopped=stopped,
        pauses=not where.here,
    )
    feed = _while_space(staging if where.scheduler is None else entries, paths, short)
    log = OutcomeLog(paths)
    try:
        results = _dispatched(feed, settings, paths, where, until, keep_features, encoders, progress, stopped)
        # Closed with this one: else its workers would live until somebody collects it.
        with contextlib.closing(results):
            for outcome in results:
                staging.release(outcome.slide_id)
                yield outcome
                yield from _not_staged(staging, log)
        yield from _not_staged(staging, log)
        if short:
            raise short[0]
    finally:
        stopped.set()
        staging.release_all()


def _not_staged(staging: Staging, log: OutcomeLog) -> Iterator[SlideOutcome]:
    """Slides behind URLs that could not be had: each fails alone, and nobody has worked on it."""
    while staging.failed:
        outcome = dataclasses.replace(failed_outcome(*staging.failed.popleft()), stage="open")
        log.note(outcome)
        yield outcome


def _dispatched(
    feed: Iterable[SlideEntry | None],
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
            (entry for entry in feed if entry is not None),
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


def _while_space(
    entries: Iterable[SlideEntry | None], paths: JobPaths, short: list[OutputError]
) -> Iterator[SlideEntry | None]:
    """The entries, as long as the folder is there and the disk has room. Raises OutputError when the folder is gone.

    short: gets the error that says that room ran out. It is not raised here, since that would end the slides under way
    as well, which can still be written.
    """
    root = paths.root
    for entry in entries:
        if entry is None:
            yield None
            continue
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


def _worker_is_at_fault(error: Exception) -> bool:
    """Whether another worker may do what this one could not: its device may be gone, a mount or weights missing."""
    return isinstance(error, (OutputError, EncoderError))


def _may_be_the_worker(outcome: SlideOutcome) -> str | None:
    """Why a slide that failed may be sound elsewhere: it, or its mask, could not be opened. A share may be missing."""
    if outcome.status != "failed" or not (outcome.stage == "open" or outcome.error == "MaskError"):
        return None
    return f"{outcome.error}: {outcome.reason}"


def _run(
    task: Callable[[SlideEntry], SlideOutcome],
    ready: Callable[[], None],
    entries: Iterable[SlideEntry | Done[SlideEntry, SlideOutcome] | None],
    where: Where,
) -> Generator[SlideOutcome, None, None]:
    return _outcomes(
        run(
            task,
            entries,
            where,
            blames_worker=_worker_is_at_fault,
            doubts=_may_be_the_worker,
            identity=versions,
            ready=ready,
        )
    )


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
    entries: Iterable[SlideEntry | None],
    where: Where,
    until: Stage,
) -> Generator[SlideOutcome, None, None]:
    """Masks and grids anywhere, features where the resources are; a slide goes on as soon as its grids are laid."""
    assert STAGES.index(until) > STAGES.index("tile")
    # Bounded, so that cheap work does not run through an archive ahead of what is dear.
    ready: queue.Queue[SlideEntry | Done[SlideEntry, SlideOutcome] | BaseException | None] = queue.Queue(LAID_AHEAD)
    stop = threading.Event()
    by_id: dict[str, SlideEntry] = {}

    def note(items: Iterable[SlideEntry | None]) -> Iterator[SlideEntry | None]:
        for entry in items:
            if stop.is_set():
                return
            if entry is not None:
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
