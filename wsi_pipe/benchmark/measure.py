"""Measuring: each arm over each slide, stage by stage and end to end, one after the other and again."""

from __future__ import annotations

import dataclasses
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from wsi_pipe import __version__
from wsi_pipe.benchmark.meters import ForeignLoad, Gpu, Meter, available_cores, machine
from wsi_pipe.benchmark.passes import Passes, now_utc
from wsi_pipe.benchmark.records import END_TO_END, STAGED, ArchivePass, Arm, BenchmarkRecord, Measurement, Spent
from wsi_pipe.config import JobSettings
from wsi_pipe.encoders import encoder_of_job
from wsi_pipe.encoders.base import Encoder, batch_of
from wsi_pipe.errors import ConfigError, EncoderError, EncoderOutputError, OutputError, WsiPipeError, in_words
from wsi_pipe.manifest import SlideEntry

__all__ = ["CACHES", "Progress", "arms_of", "run_benchmark"]

Progress = Callable[[int, int, str], None]
"""Called with the passes done, all passes, and what comes next."""

CACHES = ("warm", "cold")


def arms_of(settings: JobSettings, encoders: Mapping[str, Encoder], compare: Sequence[str] = ()) -> list[Arm]:
    """The arms that settings ask for: every level with each of its encoders, coarsest first.

    compare: "openslide" adds one arm a level, which reads in the peers' way.
    """
    arms = []
    for spec in settings.tile.specs:
        for name in settings.extract.encoders_of(spec.label):
            encoder = encoders[name]
            arms.append(
                Arm(
                    id=f"{spec.label} {name}",
                    label=spec.label,
                    mpp=spec.mpp,
                    size_px=spec.size_px,
                    encoder=name,
                    dim=encoder.info.dim,
                    weights_sha256=encoder.info.weights_sha256,
                    precision=encoder.info.precision,
                    device=_devices(encoder),
                    reader=settings.reader,
                    batch_size=batch_of(encoder, spec.size_px, settings.extract.batch_size),
                )
            )
    for method in compare:
        for label in dict.fromkeys(arm.label for arm in arms):
            first = next(arm for arm in arms if arm.label == label)
            arms.append(dataclasses.replace(first, id=f"{label} {method}", reader="openslide", method=method))
    return arms


def _devices(encoder: Encoder) -> str:
    """The devices that an encoder computes on, by torch's names, separated by commas."""
    return ",".join(str(getattr(one, "device", "cpu")) for one in getattr(encoder, "replicas", (encoder,)))


def run_benchmark(
    entries: Sequence[SlideEntry],
    settings: JobSettings,
    *,
    repeats: int = 5,
    compare: Sequence[str] = (),
    cache: str = "warm",
    command: str = "",
    folder: Path | None = None,
    progress: Progress | None = None,
    save: Callable[[BenchmarkRecord], None] | None = None,
) -> BenchmarkRecord:
    """Measure every arm on every slide ``repeats`` times, arms taking turns so that drifts of the machine hit all.

    Stage passes time one stage after the other; end-to-end passes call ``wsi_pipe.job.run.process``, which is what
    ``wsi-pipe run`` calls, in a scratch job inside ``folder`` (default: the system's temporary folder). cache: "warm"
    reads every slide once before, "cold" has the system drop the slide's pages before each pass.

    Slides that cannot be measured (unreadable, without tissue), or fail in any pass, are listed in ``skipped`` and have
    no measurements. save: called with the record so far when a round over all slides is complete, and once more, with
    the reason in ``interrupted``, when something ends the measuring later, which is then raised all the same. Raises
    ConfigError when no slide is left, EncoderError when an encoder cannot be had or fails, OutputError when the scratch
    job cannot be written.
    """
    if repeats < 1:
        raise ConfigError(f"{repeats} repeats are too few", remedy="give --repeats 1 or more")
    if cache not in CACHES:
        raise ConfigError(f"cache {cache!r} must be warm or cold")
    once: dict[str, Spent] = {}
    now = time.time()
    once["start-up"] = Spent(max(now - psutil.Process().create_time(), 0.0), time.process_time())
    foreign = ForeignLoad()

    meter = Meter()
    extract = settings.extract
    labels = [spec.label for spec in settings.tile.specs]
    encoders = {
        name: encoder_of_job(name, extract)
        for name in dict.fromkeys(name for label in labels for name in extract.encoders_of(label))
    }
    arms = arms_of(settings, encoders, compare)
    once["load encoders"] = meter.spent()

    gpu = Gpu(device for arm in arms for device in arm.device.split(","))
    with tempfile.TemporaryDirectory(prefix="wsi-pipe-benchmark-", dir=folder) as scratch:
        bench = Passes(settings, encoders, gpu, cache, Path(scratch))
        meter = Meter()
        facts, skipped, usable = bench.survey(entries, arms)
        once["warm up"] = meter.spent()
        course = _Course(bench, arms, repeats, usable, skipped, progress)

        def record(interrupted: str | None = None) -> BenchmarkRecord:
            measurements, left_out = course.complete()
            names = {entry.slide_id for entry in course.usable}
            return BenchmarkRecord(
                created_utc=now_utc(),
                wsi_pipe_version=__version__,
                command=command or " ".join(Path(sys.argv[0]).name if i == 0 else a for i, a in enumerate(sys.argv)),
                machine=machine(gpu),
                repeats=course.rounds,
                cache=cache,
                threads=extract.read_threads or available_cores(),
                arms=tuple(arms),
                slides=tuple(fact for fact in facts if fact.slide_id in names),
                measurements=measurements,
                once={**once, **({"left out": left_out} if left_out.wall_s else {})},
                process=Spent(time.time() - now + once["start-up"].wall_s, time.process_time()),
                foreign_load=foreign.share(),
                skipped=dict(course.skipped),
                settings={
                    "segment": repr(settings.segment),
                    "tile": repr(settings.tile),
                    "extract": repr(settings.extract),
                },
                interrupted=interrupted,
                archive=course.archive(),
            )

        try:
            for _ in range(repeats):
                course.next_round()
                if save is not None:
                    save(record())
        except (KeyboardInterrupt, Exception) as error:
            if course.rounds and save is not None:
                reason = in_words(error)[0] if isinstance(error, Exception) else "interrupted"
                save(record(f"after {course.rounds} of {repeats} rounds: {reason}"))
            raise
        if progress is not None:
            progress(course.total, course.total, "done")
        return record()


class _Course:
    """The passes, round by round: what was measured, and what turned out to be of no use.

    rounds: how many are complete. usable: slides that have not failed yet. Seconds of passes that are in no record are
    kept, so that the books of what is left still balance.
    """

    def __init__(
        self,
        bench: Passes,
        arms: Sequence[Arm],
        repeats: int,
        usable: Sequence[SlideEntry],
        skipped: Mapping[str, str],
        progress: Progress | None,
    ) -> None:
        self.usable, self.skipped, self.rounds = list(usable), dict(skipped), 0
        self._bench, self._arms, self._progress = bench, arms, progress
        self._passes = sum(2 if arm.method == "native" else 1 for arm in arms)
        self._repeats = repeats
        self.total = repeats * len(usable) * self._passes
        self._measured: list[Measurement] = []
        self._broken: list[Spent] = []
        self._archive: list[ArchivePass] = []

    def next_round(self) -> None:
        """Every arm over every slide; arms go round by one place from round to round, so that none is always first.

        A slide that fails is skipped, in this round and with all that was measured of it before. Raises what concerns
        all slides, EncoderError and OutputError, and the error of the last slide there is.
        """
        first = self.rounds % len(self._arms)
        for entry in list(self.usable):
            try:
                for arm in (*self._arms[first:], *self._arms[:first]):
                    for kind in (STAGED, END_TO_END) if arm.method == "native" else (STAGED,):
                        self._pass(entry, arm, kind)
            except Exception as error:
                # As in a run, an error that nobody foresaw is its slide's own; so are features that are no numbers.
                everyones = isinstance(error, EncoderError | OutputError) and not isinstance(error, EncoderOutputError)
                if everyones or (len(self.usable) == 1 and isinstance(error, WsiPipeError)):
                    raise
                if len(self.usable) == 1:
                    reason, remedy = in_words(error)
                    raise ConfigError(
                        f"no slide can be measured ({entry.slide_id}: {reason})", remedy=remedy
                    ) from error
                self.usable.remove(entry)
                self.skipped[entry.slide_id] = in_words(error)[0]
                # What was measured of it stays in the count of passes done.
                lost = sum(m.slide == entry.slide_id for m in self._measured)
                self.total -= self._repeats * self._passes - lost
        if len(self.usable) > 1:
            for arm in (*self._arms[first:], *self._arms[:first]):
                if arm.method == "native":
                    self._all_at_once(arm)
        self.rounds += 1

    def _all_at_once(self, arm: Arm) -> None:
        if self._progress is not None:
            self._progress(len(self._measured), self.total, f"all {len(self.usable)} slides in one pass, {arm.id}")
        meter = Meter()
        one = None
        try:
            one = self._bench.archive(self.usable, arm)
        finally:
            if one is None:
                self._broken.append(meter.spent())
        if one is not None:
            self._archive.append(dataclasses.replace(one, repeat=self.rounds))

    def archive(self) -> tuple[ArchivePass, ...]:
        """Passes of complete rounds over just the slides that never failed."""
        return tuple(one for one in self._archive if self._counts(one))

    def _counts(self, one: ArchivePass) -> bool:
        return one.repeat < self.rounds and one.slides == len(self.usable)

    def complete(self) -> tuple[tuple[Measurement, ...], Spent]:
        """Measurements of complete rounds over slides that never failed; and what all other passes took."""
        names = {entry.slide_id for entry in self.usable}
        good = tuple(m for m in self._measured if m.repeat < self.rounds and m.slide in names)
        rest = [Spent(m.wall_s, m.cpu_s) for m in self._measured if m.repeat >= self.rounds or m.slide not in names]
        rest += [Spent(one.wall_s, one.cpu_s) for one in self._archive if not self._counts(one)]
        rest += self._broken
        return good, Spent(math.fsum(s.wall_s for s in rest), math.fsum(s.cpu_s for s in rest))

    def _pass(self, entry: SlideEntry, arm: Arm, kind: str) -> None:
        done = len(self._measured)
        if self._progress is not None:
            self._progress(done, self.total, f"{entry.slide_id}, {arm.id}, {kind.replace('_', ' ')}")
        meter = Meter()
        try:
            one = (self._bench.staged if kind == STAGED else self._bench.end_to_end)(entry, arm)
        except BaseException:
            self._broken.append(meter.spent())
            raise
        self._measured.append(dataclasses.replace(one, repeat=self.rounds, order=done))
