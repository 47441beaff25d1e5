"""How far a job is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from wsi_pipe.care.age import Age, age_of
from wsi_pipe.care.sources import Sources
from wsi_pipe.config import JobSettings
from wsi_pipe.errors import ManifestError
from wsi_pipe.geometry import FloatPair
from wsi_pipe.job import JobPaths, load_settings, load_slides, read_outcomes
from wsi_pipe.job.changes import unfit_work
from wsi_pipe.job.lock import holder_of
from wsi_pipe.job.partial import half_done
from wsi_pipe.job.record import STALE, stamp_of
from wsi_pipe.manifest import SlideEntry
from wsi_pipe.outcome import SlideOutcome, mpp_outliers

__all__ = ["JobStatus", "SlideResolution", "job_status"]


@dataclass(frozen=True)
class SlideResolution:
    """A slide's um per level-0 pixel, (x, y), and who states it."""

    slide_id: str
    mpp: FloatPair | None
    source: str


@dataclass(frozen=True)
class JobStatus:
    """Counts of a job's slides, and of the run that is at work in it, if one is.

    waiting: slides without an outcome, and those whose bag was put aside since. stale: slides whose finished work does
    not fit the job's settings, or their file, any more; they are none of the others. older: done or empty slides of
    which an earlier version made some. random: those that hold features of random weights. resolutions: what is known
    of each slide's, in the order of the list; mpp_outliers: ids of those that stand alone. why_stale,
    made_by: by slide id. run: what the running process said of itself, or None.
    finished_in_run: slides that it made something of; unchanged_in_run: those that it found valid, which say nothing of
    its pace. slides_per_hour, hours_left: of that run, None where none is or nothing is finished yet; until the run has
    come by them, slides that are valid count as still to do. noted: slides that something is to be said of. half_done:
    slides of which a run that was stopped kept features, which the next one continues. states: by slide id, in the
    order of the list, "done", "empty", "failed", "waiting" or "stale".
    """

    slides: int
    done: int
    empty: int
    failed: int
    waiting: int
    run: dict[str, Any] | None
    finished_in_run: int | None
    unchanged_in_run: int | None
    slides_per_hour: float | None
    hours_left: float | None
    failures: tuple[SlideOutcome, ...]
    noted: tuple[SlideOutcome, ...] = ()
    stale: int = 0
    older: int = 0
    random: int = 0
    resolutions: tuple[SlideResolution, ...] = ()
    mpp_outliers: tuple[str, ...] = ()
    why_stale: Mapping[str, str] = field(default_factory=dict)
    made_by: Mapping[str, str] = field(default_factory=dict)
    half_done: int = 0
    states: Mapping[str, str] = field(default_factory=dict)


def job_status(root: Path, now: datetime | None = None) -> JobStatus:
    """The state of the job in ``root``, also while a run is at work. Raises ManifestError when it is not a job."""
    entries = load_slides(root)
    if not entries:
        raise ManifestError(f"{root}: is not a job directory", remedy="give the folder that wsi-pipe run wrote")
    outcomes = read_outcomes(root)
    paths = JobPaths(root)
    ends = [_end(outcomes.get(entry.slide_id), paths) for entry in entries]
    settings = load_settings(root) or JobSettings()
    stale = dict(_stale(entries, ends, settings, paths))
    fits = [None if entry.slide_id in stale else end for entry, end in zip(entries, ends, strict=True)]
    counts = {
        status: sum(end is not None and end.status == status for end in fits) for status in ("done", "empty", "failed")
    }
    ages = {end.slide_id: age_of(end.slide_id, paths) for end in fits if end is not None and end.status != "failed"}
    resolutions = tuple(_resolutions(entries, outcomes, ages))
    run = holder_of(root)
    finished, rate, left = _pace(run, outcomes, now)
    return JobStatus(
        slides=len(entries),
        done=counts["done"],
        empty=counts["empty"],
        failed=counts["failed"],
        waiting=sum(end is None for end in fits) - len(stale),
        run=run,
        finished_in_run=finished,
        unchanged_in_run=None if run is None else int(run.get("unchanged", 0)),
        slides_per_hour=rate,
        hours_left=left,
        half_done=len({entry.slide_id for entry in entries}.intersection(half_done(paths))),
        failures=tuple(end for end in fits if end is not None and end.status == "failed"),
        noted=tuple(end for end in fits if end is not None and end.notes),
        stale=len(stale),
        older=sum(bool(age.older) for age in ages.values()),
        random=sum(bool(age.random) for age in ages.values()),
        resolutions=resolutions,
        mpp_outliers=tuple(mpp_outliers({item.slide_id: item.mpp for item in resolutions})),
        why_stale=stale,
        states={
            entry.slide_id: "stale" if entry.slide_id in stale else "waiting" if end is None else end.status
            for entry, end in zip(entries, fits, strict=True)
        },
        made_by={slide_id: age.older for slide_id, age in ages.items() if age.older},
    )


def _stale(
    entries: Sequence[SlideEntry], ends: Sequence[SlideOutcome | None], settings: JobSettings, paths: JobPaths
) -> Iterator[tuple[str, str]]:
    """Slide id -> why its finished work does not fit any more."""
    sources = Sources(settings)
    for entry, end in zip(entries, ends, strict=True):
        if end is None or (end.status == "failed" and end.error != STALE):
            continue
        kinds = unfit_work(entry, settings, paths)
        if kinds:
            what = dict.fromkeys(text for why in kinds.values() for text in why)
            yield entry.slide_id, f"{', '.join(kinds)}: {'; '.join(what)}"
            continue
        # Only of a file that has another size or time than when it was read is the content looked at.
        if end.error == STALE or (end.stamp and stamp_of(entry) not in ("", end.stamp)):
            changes = sources.changes_of_slide(entry, paths)
            if changes:
                yield entry.slide_id, "; ".join(changes)
            elif end.error == STALE:
                yield entry.slide_id, end.reason or "it was made otherwise"


def _resolutions(
    entries: Sequence[SlideEntry], outcomes: Mapping[str, SlideOutcome], ages: Mapping[str, Age]
) -> Iterator[SlideResolution]:
    for entry in entries:
        end, age = outcomes.get(entry.slide_id), ages.get(entry.slide_id)
        if end is not None and end.mpp is not None:
            yield SlideResolution(entry.slide_id, end.mpp, end.mpp_source)
        else:
            # Outcomes of version 0.1.0 do not say it, but the files do.
            yield SlideResolution(entry.slide_id, age.mpp if age else None, age.mpp_source if age else "none")


def _end(outcome: SlideOutcome | None, paths: JobPaths) -> SlideOutcome | None:
    """A slide's outcome, or None where its bag is gone since."""
    gone = outcome is not None and "assemble" in outcome.seconds and not paths.bag(outcome.slide_id).is_file()
    return None if gone and outcome and outcome.status != "failed" else outcome


def _pace(
    run: dict[str, Any] | None, outcomes: dict[str, SlideOutcome], now: datetime | None
) -> tuple[int | None, float | None, float | None]:
    """Slides finished in the run, slides an hour, hours left."""
    if run is None or "started_utc" not in run:
        return None, None, None
    started = str(run["started_utc"])
    finished = sum(outcome.finished_utc >= started and not outcome.nothing_new for outcome in outcomes.values())
    begun = datetime.fromisoformat(started)
    hours = ((now or datetime.now(begun.tzinfo)) - begun).total_seconds() / 3600
    if not finished or hours <= 0:
        return finished, None, None
    rate = finished / hours
    left = int(run.get("slides", 0)) - int(run.get("unchanged", 0)) - finished
    return finished, rate, max(left, 0) / rate
