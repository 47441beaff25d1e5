"""The stages composed: many slides in, one outcome each; the one place that catches a slide's errors."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path

from wsi_pipe.config import JobSettings
from wsi_pipe.cores import available_cores
from wsi_pipe.encoders import encoder_of_job
from wsi_pipe.encoders.base import Encoder, EncoderInfo, LayeredEncoder, block_indices
from wsi_pipe.encoders.naming import check_slugs, slug_of
from wsi_pipe.errors import EncoderError, FileAccessError, NotOursError, OutputError, StaleWorkError, WsiPipeError
from wsi_pipe.extract import ExtractItem, SlideFailure, SlideFeatures, SlidePart, extract_features
from wsi_pipe.geometry import TileGrid
from wsi_pipe.job.ahead import Ahead
from wsi_pipe.job.drawing import draw_slide
from wsi_pipe.job.features import (
    Wanted,
    assemble,
    missing_features,
    refuse_foreign_features,
    store_features,
    wanted_features,
)
from wsi_pipe.job.grids import store_grids
from wsi_pipe.job.index import JobIndex, Stamp, wanted_of
from wsi_pipe.job.opening import open_entry
from wsi_pipe.job.partial import drop_part, load_part, store_part
from wsi_pipe.job.paths import JobPaths
from wsi_pipe.job.prepare import prepare
from wsi_pipe.job.prepared import Prepared, StageClock
from wsi_pipe.job.private import told, told_of
from wsi_pipe.job.record import OutcomeLog, stamp_of, utc_now
from wsi_pipe.manifest import SlideEntry, is_url
from wsi_pipe.outcome import STAGES, SlideOutcome, Stage
from wsi_pipe.quality import quality_counts
from wsi_pipe.slides.storage.in_use import Keep, keep_copy
from wsi_pipe.slides.storage.staging import trim_copies
from wsi_pipe.stopping import Stop, StopRequested, putting_by

__all__ = ["Progress", "load_encoders", "process"]

Progress = Callable[[str, str, int], None]
"""Called with a slide's id, what is going on, and a number: "segment" and 1 as work begins on it, "laid" and how many
tiles it has for all its encoders together, then a level's label and by how many tiles that advanced."""


PREPARE_MIB = 256
"""What one slide takes while it is prepared: tissue on 25 x 25 mm at 8 um/px."""


def preparing_threads(settings: JobSettings) -> int:
    """How many slides are prepared at a time: one a core, as far as the memory budget goes."""
    return max(min(available_cores(), settings.extract.memory_mib // PREPARE_MIB), 1)


def load_encoders(settings: JobSettings) -> dict[str, Encoder]:
    """Every encoder that the settings name, loaded once.

    Raises EncoderError when one cannot be had, ConfigError when it lacks the layers that the settings ask for and,
    before any is loaded, when two would have one name in bags.
    """
    extract = settings.extract
    labels = [spec.label for spec in settings.tile.specs]
    names = dict.fromkeys(name for label in labels for name in extract.encoders_of(label))
    check_slugs((name, slug_of(name)) for name in names)
    encoders = {name: encoder_of_job(name, extract) for name in names}
    for name, encoder in encoders.items():
        block_indices(extract.layers, encoder.depth if isinstance(encoder, LayeredEncoder) else 0, name)
    return encoders


@dataclass
class _Work:
    """One slide on its way."""

    entry: SlideEntry
    clock: StageClock = field(default_factory=StageClock)
    prepared: Prepared | None = None
    wanted: list[Wanted] = field(default_factory=list)
    missing: list[Wanted] = field(default_factory=list)
    costs: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    begun: tuple[Stamp, ...] | None = None
    error: Exception | None = None


def process(
    entries: Iterable[SlideEntry],
    settings: JobSettings,
    paths: JobPaths,
    *,
    until: Stage = "assemble",
    encoders: Mapping[str, Encoder] | None = None,
    keep_features: bool = False,
    progress: Progress | None = None,
    record: bool = True,
    stopped: threading.Event | None = None,
) -> Generator[SlideOutcome, None, None]:
    """Take slides through the stages up to ``until``, doing just what is missing or stale; one outcome each.

    Outcomes come, and with ``record`` are noted in the job, as slides finish. A slide's error ends that slide alone.
    ``entries`` is consumed lazily; while one slide's tiles are encoded the next ones are segmented, as many at a time
    as ``preparing_threads`` says. Raises OutputError
    when the job's folder cannot be written any more and DeviceError when the device fails, both after what was done
    is on disk. stopped: as in ``extract_features``, for ``entries`` that wait. Raises StopRequested once it is told to
    stop; features of the slide under way are kept for the next run.
    """
    run = _Run(settings, paths, until, encoders, keep_features, progress, record, stopped)
    try:
        if STAGES.index(until) < STAGES.index("extract"):
            yield from run.without_features(entries)
        else:
            yield from run.with_features(entries)
    finally:
        run.end()


class _Run:
    """One call of ``process``: what all its slides share."""

    def __init__(
        self,
        settings: JobSettings,
        paths: JobPaths,
        until: Stage,
        encoders: Mapping[str, Encoder] | None,
        keep_features: bool,
        progress: Progress | None,
        record: bool,
        stopped: threading.Event | None,
    ) -> None:
        self.settings, self.paths, self.until = settings, paths, until
        self.encoders = encoders
        self.keep_features = keep_features
        self.stopped = stopped
        self.stop = Stop()
        self.log = OutcomeLog(paths) if record else None
        self.progress = progress or (lambda slide_id, what, amount: None)
        self.finished: deque[SlideOutcome] = deque()
        self.under_way: dict[str, _Work] = {}
        self.copies: dict[str, Keep] = {}
        self.index: JobIndex | None = None
        self.ahead: Ahead[SlideEntry, SlideOutcome | _Work] | Ahead[SlideEntry, _Work] | None = None

    def end(self) -> None:
        """Wait for slides that are prepared in vain, and let go of all."""
        if self.stopped is not None:
            # Whatever waits for the next slide waits in vain.
            self.stopped.set()
        if self.ahead is not None:
            self.ahead.close()
        self.release_copies()

    def release_copies(self) -> None:
        """Give free the copies of the slides that were not finished."""
        while self.copies:
            self.copies.popitem()[1].release()

    def _is_known(self, entry: SlideEntry) -> bool:
        """Whether the slide is done as it is wanted, by the index of the job; its outcome is noted then."""
        outcome = self.index.known(entry) if self.index else None
        if outcome is not None:
            self._note(replace(outcome, finished_utc=utc_now()))
        return outcome is not None

    def _begin(self, entry: SlideEntry) -> _Work:
        if self.stop.asked:
            raise StopRequested
        # A slide behind a URL is opened for its mask and again for its tiles: its copy stays in the cache in between.
        if is_url(entry.path):
            self.copies[entry.slide_id] = keep_copy(entry.path)
        return _Work(entry, StageClock(self.stop), begun=self.index.begin(entry) if self.index else None)

    def without_features(self, entries: Iterable[SlideEntry]) -> Iterator[SlideOutcome]:
        def ready(entry: SlideEntry) -> _Work:
            work = self._begin(entry)
            self._prepare(work, tile=self.until == "tile")
            return work

        ahead = Ahead(entries, ready, preparing_threads(self.settings), Stop(self.stopped))
        self.ahead = ahead
        with contextlib.closing(iter(ahead)) as done:
            for work in done:
                if work.error is None:
                    self._finish(work)
                else:
                    self._fail(work, work.error)
                yield from self._drain()

    def with_features(self, entries: Iterable[SlideEntry]) -> Iterator[SlideOutcome]:
        encoders = self.encoders if self.encoders is not None else load_encoders(self.settings)
        extract = self.settings.extract
        # Set by the engine too, once its work ends early.
        stopped = self.stopped or threading.Event()
        items = self._items(entries, encoders, Stop(stopped))
        # Slides that lack nothing, which come first in a run that resumes, are handed out one by one: the engine's
        # thread, which takes the others, has no way to.
        first: ExtractItem | None = None
        for first in items:
            if first is not None:
                break
            yield from self._drain()
        if first is None:
            yield from self._drain()
            return
        results = extract_features(
            chain([first], (item for item in items if item is not None)),
            encoders,
            batch_size=extract.batch_size,
            read_threads=extract.read_threads,
            memory_bytes=extract.memory_mib << 20,
            dtype=extract.dtype,
            layers=extract.layers,
            progress=self.progress,
            stopped=stopped,
            keep=self._keep,
        )
        try:
            # Closed with this one: what is kept of slides under way is kept before anything else ends.
            with contextlib.closing(results):
                for result in results:
                    self._after_extract(self.under_way[result.slide_id], result)
                    del self.under_way[result.slide_id]
                    yield from self._drain()
        except (OutputError, EncoderError):
            # What was finished before, in the engine's thread, is noted in the job already.
            yield from self._drain()
            raise
        yield from self._drain()

    def _prepare(self, work: _Work, *, tile: bool) -> None:
        """Segment and tile; ``work.error`` says where the slide failed. In any thread: nothing is noted."""
        self.progress(work.entry.slide_id, "segment", 1)
        try:
            into_bag = self.until == "assemble" and not self.keep_features
            work.prepared = prepare(work.entry, self.settings, self.paths, work.clock, tile=tile, into_bag=into_bag)
        except OutputError:
            raise
        except Exception as error:
            work.error = error

    def _items(
        self, entries: Iterable[SlideEntry], encoders: Mapping[str, Encoder], stop: Stop
    ) -> Iterator[ExtractItem | None]:
        """Slides that lack features; those that lack none, or fail, are finished on the way and give None.

        Several are prepared at a time, in threads. They come, and are noted, in the order of ``entries``.
        """
        infos = {name: encoder.info for name, encoder in encoders.items()}
        # What is to be made anew is not asked whether it is known.
        if self.until == "assemble" and not self.settings.redo:
            wanted = wanted_of(self.settings, infos, keep_features=self.keep_features)
            self.index = JobIndex(self.paths, wanted)
        entries = iter(entries)
        for entry in entries:
            if self.stop.asked:
                raise StopRequested
            if not self._is_known(entry):
                entries = chain([entry], entries)
                break
            yield None
        else:
            return

        def ready(entry: SlideEntry) -> SlideOutcome | _Work:
            known = self.index.known(entry) if self.index else None
            return known if known is not None else self._made_ready(entry, infos)

        self.ahead = ahead = Ahead(entries, ready, preparing_threads(self.settings), stop)
        with contextlib.closing(iter(ahead)) as done:
            for work in done:
                if self.stop.asked:
                    raise StopRequested
                yield self._item_of(work)

    def _made_ready(self, entry: SlideEntry, infos: Mapping[str, EncoderInfo]) -> _Work:
        """A slide with its grids, and what it lacks. In any thread: nothing is noted."""
        work, settings = self._begin(entry), self.settings
        self._prepare(work, tile=True)
        if work.prepared is None:
            return work
        work.wanted = wanted_features(work.prepared, settings.extract, infos, settings.reader)
        try:
            work.missing = missing_features(
                work.prepared, work.wanted, settings.extract, settings.reader, self.paths, redo=settings.redo
            )
            if self.until != "assemble" or self.keep_features:
                refuse_foreign_features(entry.slide_id, work.missing, self.paths)
        except (StaleWorkError, FileAccessError, NotOursError) as error:
            # What it holds is not wanted so, or not known, or another's: it is neither made again nor taken for done.
            work.clock.stage = "extract"
            work.error = error
        return work

    def _item_of(self, work: SlideOutcome | _Work) -> ExtractItem | None:
        """What the engine is to do of a slide; None where that is nothing: it is noted then."""
        if isinstance(work, SlideOutcome):
            self._note(replace(work, finished_utc=utc_now()))
            return None
        if work.error is not None or work.prepared is None:
            self._fail(work, work.error or RuntimeError("no grids were laid"))
            return None
        entry, settings = work.entry, self.settings
        grids = [grid for grid in work.prepared.grids if self._names(work, grid)]
        if not grids:
            self._assemble(work)
            return None
        self.under_way[entry.slide_id] = work
        self.progress(entry.slide_id, "laid", sum(len(grid) * len(self._names(work, grid)) for grid in grids))
        return ExtractItem(
            slide_id=entry.slide_id,
            open=partial(open_entry, entry, settings.reader, settings.cache),
            grids=grids,
            encoders={grid.label: self._names(work, grid) for grid in grids},
            parts=load_part(work.prepared, work.missing, self.paths, settings.extract.dtype),
        )

    def _keep(self, part: SlidePart) -> None:
        """What there is of a slide under way. A disk that is full shows where finished slides are written."""
        work = self.under_way.get(part.slide_id)
        if work is not None and work.prepared is not None:
            putting_by.set()
            try:
                with contextlib.suppress(OSError):
                    if not work.prepared.stored and not self.paths.tiles(part.slide_id).is_file():
                        # What the next call may find other settings for, and must then not take for its own.
                        store_grids(work.prepared, self.paths)
                    store_part(part, work.prepared, work.missing, self.paths)
            finally:
                putting_by.clear()

    @staticmethod
    def _names(work: _Work, grid: TileGrid) -> list[str]:
        """Encoders whose features of a grid are missing."""
        return [item.name for item in work.missing if item.label == grid.label] if len(grid) else []

    def _after_extract(self, work: _Work, result: SlideFeatures | SlideFailure) -> None:
        assert work.prepared is not None
        work.clock.stage = "extract"
        if isinstance(result, SlideFailure):
            self._fail(work, result.error)
            return
        work.clock.seconds.update(result.seconds)
        work.costs = result.costs
        work.prepared.counts.update(result.counts)
        for label, values in result.quality.items():
            work.prepared.counts.update(quality_counts(label, values))
        if self.until == "assemble" and not self.keep_features:
            # Straight into the bag: a file in between would be written, read back and deleted.
            self._assemble(work, result)
            return
        try:
            with work.clock("extract"):
                store_features(work.prepared, result, work.missing, self.paths)
        except OutputError:
            raise
        except Exception as error:
            self._fail(work, error)
            return
        self._assemble(work)

    def _assemble(self, work: _Work, computed: SlideFeatures | None = None) -> None:
        assert work.prepared is not None
        cached = work.prepared.cached if work.missing else (*work.prepared.cached, "extract")
        if self.until == "assemble":
            try:
                with work.clock("assemble"):
                    made, notes = assemble(
                        work.prepared,
                        work.wanted,
                        work.missing,
                        self.settings.extract,
                        self.paths,
                        keep_features=self.keep_features,
                        computed=computed,
                    )
            except OutputError:
                raise
            except Exception as error:
                self._fail(work, error)
                return
            work.prepared = dataclasses.replace(work.prepared, notes=(*work.prepared.notes, *notes))
            cached = cached if made else (*cached, "assemble")
        drop_part(work.prepared, work.wanted, self.paths)
        self._finish(work, cached)

    def _finish(self, work: _Work, cached: tuple[str, ...] | None = None) -> None:
        """Draw the slide, whose results are safe by now, and note it as done."""
        self._draw(work)
        prepared = work.prepared
        empty = prepared is not None and prepared.attrs.status == "empty"
        self._note(
            SlideOutcome(
                slide_id=work.entry.slide_id,
                status="empty" if empty else "done",
                path=work.entry.shown_path,
                reason=prepared.attrs.empty_reason if prepared and empty else None,
                seconds=work.clock.seconds,
                tiles={grid.label: len(grid) for grid in prepared.grids} if prepared else {},
                counts=prepared.counts if prepared else {},
                mpp=prepared.attrs.mpp_l0 if prepared else None,
                mpp_source=prepared.attrs.mpp_source if prepared else "",
                stamp=stamp_of(work.entry),
                cached=cached if cached is not None else prepared.cached if prepared else work.clock.cached,
                costs={item.place: work.costs.get(item.place, {}) for item in work.wanted},
                finished_utc=utc_now(),
                notes=tuple(
                    told(work.entry, note) for note in (*work.clock.notes, *(prepared.notes if prepared else ()))
                ),
            ),
            work,
        )

    def _draw(self, work: _Work) -> None:
        """Draw what there is of a slide. Raises OutputError; what else goes wrong with pictures is worth a note."""
        pictures, work.clock.pictures = work.clock.pictures, None
        if pictures is None:
            return
        try:
            draw_slide(pictures, self.paths)
        except OutputError:
            raise
        except Exception as error:
            work.clock.notes += (f"its pictures could not be drawn: {told_of(work.entry, error)[0]}",)

    def _fail(self, work: _Work, error: Exception) -> None:
        """Note a failure. An error that nobody foresaw fails its slide too, with its type in the reason."""
        self._draw(work)
        reason, remedy = told_of(work.entry, error)
        kind = type(error).__name__ if isinstance(error, WsiPipeError) else _trace(error)
        self._note(
            SlideOutcome(
                slide_id=work.entry.slide_id,
                status="failed",
                path=work.entry.shown_path,
                stage=work.clock.stage,
                reason=reason,
                remedy=remedy,
                error=kind,
                seconds=work.clock.seconds,
                finished_utc=utc_now(),
                notes=tuple(told(work.entry, note) for note in work.clock.notes),
            )
        )

    def _note(self, outcome: SlideOutcome, done: _Work | None = None) -> None:
        if done is not None and self.index is not None:
            weights = {item.place: item.info.weights_sha256 for item in done.wanted}
            outcome = replace(outcome, mark=self.index.mark(done.entry, done.begun, outcome, weights))
        if (copy := self.copies.pop(outcome.slide_id, None)) is not None:
            copy.release()
            cache = self.settings.cache
            trim_copies(Path(cache.folder) if cache.folder else None, int(cache.gib * 2**30))
        if self.log:
            self.log.note(outcome)
        self.finished.append(outcome)

    def _drain(self) -> Iterator[SlideOutcome]:
        while self.finished:
            yield self.finished.popleft()


def _trace(error: BaseException) -> str:
    """The last frames of an unforeseen error, for a report."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)[-3:]
    return f"{type(error).__name__} at " + " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames))
