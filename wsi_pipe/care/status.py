"""How far a job is."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from wsi_pipe.errors import ManifestError
from wsi_pipe.job import JobPaths, load_slides, read_outcomes
from wsi_pipe.job.lock import holder_of
from wsi_pipe.outcome import SlideOutcome

__all__ = ["JobStatus", "job_status"]


@dataclass(frozen=True)
class JobStatus:
    """Counts of a job's slides, and of the run that is at work in it, if one is.

    waiting: slides without an outcome, and those whose bag was put aside since. run: what the running process said of
    itself, or None.
    finished_in_run: slides that it made something of; unchanged_in_run: those that it found valid, which say nothing of
    its pace. slides_per_hour, hours_left: of that run, None where none is or nothing is finished yet; until the run has
    come by them, slides that are valid count as still to do. noted: slides that something is to be said of.
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


def job_status(root: Path, now: datetime | None = None) -> JobStatus:
    """The state of the job in ``root``, also while a run is at work. Raises ManifestError when it is not a job."""
    entries = load_slides(root)
    if not entries:
        raise ManifestError(f"{root}: is not a job directory", remedy="give the folder that wsi-pipe run wrote")
    outcomes = read_outcomes(root)
    ends = [_end(outcomes.get(entry.slide_id), JobPaths(root)) for entry in entries]
    counts = {
        status: sum(end is not None and end.status == status for end in ends) for status in ("done", "empty", "failed")
    }
    run = holder_of(root)
    finished, rate, left = _pace(run, outcomes, now)
    return JobStatus(
        slides=len(entries),
        done=counts["done"],
        empty=counts["empty"],
        failed=counts["failed"],
        waiting=sum(end is None for end in ends),
        run=run,
        finished_in_run=finished,
        unchanged_in_run=None if run is None else int(run.get("unchanged", 0)),
        slides_per_hour=rate,
        hours_left=left,
        failures=tuple(end for end in ends if end is not None and end.status == "failed"),
        noted=tuple(end for end in ends if end is not None and end.notes),
    )


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
