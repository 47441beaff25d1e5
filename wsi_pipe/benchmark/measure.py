"""Measuring: each arm over each slide, stage by stage and end to end, one after the other and again."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from wsi_pipe import __version__
from wsi_pipe.benchmark.meters import ForeignLoad, Gpu, Meter, available_cores, machine
from wsi_pipe.benchmark.passes import Passes, now_utc
from wsi_pipe.benchmark.records import END_TO_END, STAGED, Arm, BenchmarkRecord, Measurement, Spent
from wsi_pipe.config import JobSettings
from wsi_pipe.encoders import encoder_of_job
from wsi_pipe.encoders.base import Encoder, batch_of
from wsi_pipe.errors import ConfigError
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
) -> BenchmarkRecord:
    """Measure every arm on every slide ``repeats`` times, arms taking turns so that drifts of the machine hit all.

    Stage passes time one stage after the other; end-to-end passes call ``wsi_pipe.job.run.process``, which is what
    ``wsi-pipe run`` calls, in a scratch job inside ``folder`` (default: the system's temporary folder). cache: "warm"
    reads every slide once before, "cold" has the system drop the slide's pages before each pass.

    Slides that cannot be measured (unreadable, without tissue) are listed in ``skipped``. Raises ConfigError when none
    is left, and EncoderError when an encoder cannot be had.
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
        measurements: list[Measurement] = []
        total = repeats * len(usable) * sum(2 if arm.method == "native" else 1 for arm in arms)
        for repeat, entry, arm, kind in _turns(repeats, usable, arms):
            if progress is not None:
                progress(len(measurements), total, f"{entry.slide_id}, {arm.id}, {kind.replace('_', ' ')}")
            one = bench.staged if kind == STAGED else bench.end_to_end
            measurements.append(dataclasses.replace(one(entry, arm), repeat=repeat, order=len(measurements)))
        if progress is not None:
            progress(total, total, "done")
    return BenchmarkRecord(
        created_utc=now_utc(),
        wsi_pipe_version=__version__,
        command=command or " ".join(Path(sys.argv[0]).name if i == 0 else a for i, a in enumerate(sys.argv)),
        machine=machine(gpu),
        repeats=repeats,
        cache=cache,
        threads=extract.read_threads or available_cores(),
        arms=tuple(arms),
        slides=tuple(facts),
        measurements=tuple(measurements),
        once=once,
        process=Spent(time.time() - now + once["start-up"].wall_s, time.process_time()),
        foreign_load=foreign.share(),
        skipped=skipped,
        settings={
            "segment": repr(settings.segment),
            "tile": repr(settings.tile),
            "extract": repr(settings.extract),
        },
    )


def _turns(
    repeats: int, entries: Sequence[SlideEntry], arms: Sequence[Arm]
) -> Iterator[tuple[int, SlideEntry, Arm, str]]:
    """Every pass; arms go round by one place from repeat to repeat, so that none is always first."""
    for repeat in range(repeats):
        for entry in entries:
            for k in range(len(arms)):
                arm = arms[(k + repeat) % len(arms)]
                yield repeat, entry, arm, STAGED
                if arm.method == "native":
                    yield repeat, entry, arm, END_TO_END
