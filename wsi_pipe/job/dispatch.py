"""A job's slides spread over this process, several processes, or a Dask scheduler; every outcome noted once."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import shutil
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from wsi_pipe.config import JobSettings
from wsi_pipe.encoders.base import Encoder
from wsi_pipe.errors import DeviceError, EncoderError, OutputError, WsiPipeError
from wsi_pipe.execute import Done, Failed, Where, run
from wsi_pipe.files import output_error
from wsi_pipe.job.paths import JobPaths
from wsi_pipe.job.prepare import open_entry
from wsi_pipe.job.record import append_outcome, utc_now
from wsi_pipe.job.run import Progress, process
from wsi_pipe.job.task import slide_task
from wsi_pipe.manifest import SlideEntry, is_url
from wsi_pipe.outcome import STAGES, SlideOutcome, Stage

__all__ = ["MIN_FREE_BYTES", "dispatch"]

MIN_FREE_BYTES = 64 << 20
"""Less free space than this ends a run before the next slide, while what is under way can still be written."""

STAGED_AHEAD = 2


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

    In this process, slides share batches; elsewhere each is a task of its own. With ``where.resources``, masks and
    grids are made on any worker and features on those that offer the resources. encoders: those loaded already, for
    work in this process. A process that dies or takes too
    long fails its slide alone. Raises OutputError when the job's folder cannot be written or is nearly full,
    EncoderError when no worker can encode, WorkerError when a scheduler goes away.
    """
    feed = _while_space(entries, paths.root)
    if where.scheduler is None:
        feed = _staged_ahead(feed, settings)
    if where.here:
        yield from process(
            feed,
            settings,
            paths,
            until=until,
            encoders=encoders,
            keep_features=keep_features,
            progress=progress,
        )
        return
    # A worker's tiles and features come out of one budget of this machine.
    share = settings
    if where.scheduler is None and where.workers > 1:
        extract = settings.extract
        memory = max(extract.memory_mib // where.workers, 64)
        share = dataclasses.replace(
            settings, extract=dataclasses.replace(extract, memory_mib=memory, read_threads=extract.read_threads or 1)
        )
    task = partial(slide_task, share, str(paths.root.absolute()))
    if where.resources and until in ("extract", "assemble"):
        results = _in_two_phases(task, keep_features, feed, where, until)
    else:
        results = _outcomes(run(partial(task, until, keep_features), feed, where))
    for outcome in results:
        append_outcome(paths, outcome)
        if progress:
            for label, count in outcome.tiles.items():
                progress(outcome.slide_id, label, count)
        yield outcome


def _while_space(entries: Iterable[SlideEntry], root: Path) -> Iterator[SlideEntry]:
    """The entries, as long as the disk has room. Raises OutputError when it has not."""
    for entry in entries:
        try:
            free = shutil.disk_usage(root).free
        except OSError as error:
            raise output_error(root, error) from error
        if free < MIN_FREE_BYTES and shutil.disk_usage(root).total > 4 * MIN_FREE_BYTES:
            raise OutputError(
                f"{root}: only {free >> 20} MiB of space are left",
                remedy="free some space or give another output folder, then run again: finished slides are kept",
            )
        yield entry


def _staged_ahead(entries: Iterable[SlideEntry], settings: JobSettings) -> Iterator[SlideEntry]:
    """The entries, those behind URLs copied to the cache (where their format needs that) before they are asked for."""
    waiting: deque[tuple[SlideEntry, Future[None] | None]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="stage") as pool:
        for entry in entries:
            waiting.append((entry, pool.submit(_stage, entry, settings) if is_url(entry.path) else None))
            # Local slides cost nothing to have at hand; of remote ones a few are copied ahead.
            while waiting and (waiting[0][1] is None or len(waiting) > STAGED_AHEAD):
                yield _landed(*waiting.popleft())
        while waiting:
            yield _landed(*waiting.popleft())


def _stage(entry: SlideEntry, settings: JobSettings) -> None:
    # What goes wrong here goes wrong again where the slide is opened in earnest, and is told there.
    with contextlib.suppress(WsiPipeError):
        open_entry(entry, settings.reader, settings.cache).close()


def _landed(entry: SlideEntry, staged: Future[None] | None) -> SlideEntry:
    if staged is not None:
        staged.result()
    return entry


def _outcomes(results: Iterable[Done[SlideEntry, SlideOutcome] | Failed[SlideEntry]]) -> Iterator[SlideOutcome]:
    for result in results:
        if isinstance(result, Done):
            yield result.value
            continue
        error = result.error
        if isinstance(error, (OutputError, DeviceError, EncoderError)):
            raise error
        yield failed_outcome(result.item, error)


def failed_outcome(entry: SlideEntry, error: Exception) -> SlideOutcome:
    """The outcome of a slide whose process could not even say what went wrong."""
    known = isinstance(error, WsiPipeError)
    return SlideOutcome(
        slide_id=entry.slide_id,
        status="failed",
        path=entry.path,
        stage="open",
        reason=error.message if isinstance(error, WsiPipeError) else f"{type(error).__name__}: {error}",
        remedy=error.remedy if isinstance(error, WsiPipeError) else "please report this, with the slide if you can",
        error=type(error).__name__ if known else repr(error),
        finished_utc=utc_now(),
    )


def _in_two_phases(
    task: Callable[..., SlideOutcome],
    keep_features: bool,
    entries: Iterable[SlideEntry],
    where: Where,
    until: Stage,
) -> Iterator[SlideOutcome]:
    """Masks and grids anywhere, features where the resources are; a slide goes on as soon as its grids are laid."""
    assert STAGES.index(until) > STAGES.index("tile")
    ready: queue.Queue[SlideEntry | SlideOutcome | BaseException | None] = queue.Queue()
    by_id: dict[str, SlideEntry] = {}

    def note(items: Iterable[SlideEntry]) -> Iterator[SlideEntry]:
        for entry in items:
            by_id[entry.slide_id] = entry
            yield entry

    def lay_grids() -> None:
        try:
            anywhere = dataclasses.replace(where, resources=None)
            for outcome in _outcomes(run(partial(task, "tile", keep_features), note(entries), anywhere)):
                entry = by_id.pop(outcome.slide_id)
                ready.put(outcome if outcome.status == "failed" else entry)
        except BaseException as error:
            ready.put(error)
        finally:
            ready.put(None)

    failed: list[SlideOutcome] = []

    def with_grids() -> Iterator[SlideEntry]:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            if isinstance(item, SlideOutcome):
                failed.append(item)
            else:
                yield item

    thread = threading.Thread(target=lay_grids, name="lay-grids", daemon=True)
    thread.start()
    for outcome in _outcomes(run(partial(task, until, keep_features), with_grids(), where)):
        while failed:
            yield failed.pop()
        yield outcome
    thread.join()
    yield from failed
