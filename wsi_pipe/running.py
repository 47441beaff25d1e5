"""One call on a job, from what was asked to the report: the checks before any work, the lock, the slides, the end.

What ``wsi-pipe run`` and its single stages do, and ``wsi_pipe.Job.run``. Who calls is told by a ``Watch`` and may
show it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wsi_pipe.asked import Say, collect_entries, settings_from, where_from
from wsi_pipe.config import JobSettings
from wsi_pipe.errors import ConfigError, EncoderError, JobError, OutputError, WorkerError, WsiPipeError
from wsi_pipe.execute import Where
from wsi_pipe.files import remove_partial_files
from wsi_pipe.job import JobPaths, open_job, read_outcomes, utc_now, write_failures
from wsi_pipe.job.changes import Call, call_of, note_changes, refuse_stale
from wsi_pipe.job.dispatch import check_folder, dispatch
from wsi_pipe.job.index import compact
from wsi_pipe.job.left_out import note_passed_over
from wsi_pipe.job.lock import hold_job
from wsi_pipe.job.ownership import claim_job
from wsi_pipe.job.private import job_salt
from wsi_pipe.job.replaced import file_weights, other_weights, refuse_unfit
from wsi_pipe.job.run import Progress, load_encoders
from wsi_pipe.manifest import SlideEntry
from wsi_pipe.masking import has_secret
from wsi_pipe.outcome import SlideOutcome, Stage
from wsi_pipe.plan import bytes_per_tile, refuse_bad_encoders, refuse_lack_of_room
from wsi_pipe.slides.passed_over import PassedOver

__all__ = ["After", "RunEnd", "Watch", "begin_lines", "run_stages"]

After = Callable[[JobPaths, JobSettings, list[SlideEntry]], int | None]
"""What a run that was not stopped does at its end, with the slides that are done; for how many of them it failed."""

REPORTED_AT_ONCE = 1000
"""Slides of a job whose report is brought up to date where the run is interrupted."""
TELL_S = 1.0
"""How often at most a run that resumes says how many slides it found valid."""


class Watch:
    """Is told what a run does, and by itself shows nothing of it."""

    def say(self, line: str) -> None:
        """A line that the user is to know."""

    def begun(self, call: Call, paths: JobPaths, where: Where, about: Mapping[str, Any]) -> None:
        """All checks are passed, the job is held, and its settings and slides are noted."""

    @contextlib.contextmanager
    def working(self, slides: int) -> Iterator[Progress | None]:
        """Around the work on the slides; what it gives is called with its progress."""
        yield None

    def finished(self, outcome: SlideOutcome) -> None:
        """A slide is through. May raise KeyboardInterrupt, which ends the run."""

    def ended(self, seconds: float, stopped: WsiPipeError | None) -> None:
        """The slides are through, and the files at the end are written."""


@dataclass
class RunEnd:
    """What became of a run.

    stopped: what ended it early. unwritten: what kept it from writing failures and report. failed_after: slides for
    which what was to be done at the end failed.
    """

    settings: JobSettings
    entries: list[SlideEntry]
    outcomes: list[SlideOutcome] = field(default_factory=list)
    seconds: float = 0.0
    stopped: WsiPipeError | None = None
    unwritten: OutputError | None = None
    failed_after: int = 0


MOST_SHOWN = 20


def begin_lines(call: Call, paths: JobPaths) -> Iterator[str]:
    """What becomes another by a call, old -> new, and which secrets are kept: to be told before the work."""
    moved = [change for change in call.changes if change.what == "path"]
    others = [change for change in call.changes if change.what != "path"]
    yield from (f"changed: {change}" for change in others[:MOST_SHOWN])
    if len(others) > MOST_SHOWN:
        yield f"changed: {len(others) - MOST_SHOWN:,} more values, see {paths.changes}"
    if moved:
        yield f"moved: {len(moved):,} slides, such as {moved[0]}"
    count = sum(has_secret(entry.path) for entry in call.entries)
    if count:
        yield (
            f"warning: {count} URLs hold a password or a token: they are kept in {paths.identities}, for you alone, to "
            "go on with; everywhere else they are masked"
        )


def look_at_folder(job: Path, say: Say) -> None:
    """Refuse a folder that holds files and is no job, before anything is read or written in it."""
    foreign = claim_job(job, make=False)
    if foreign:
        shown = ", ".join(str(path) for path in foreign[:5]) + (f" and {len(foreign) - 5} more" if foreign[5:] else "")
        say(
            f"note: {job} was made by an earlier version and is marked as a job now; of what lies in it, this program "
            f"did not make {shown}: left as it is"
        )


def run_stages(
    job: Path,
    values: Mapping[str, Any],
    *,
    until: Stage = "assemble",
    report: bool = False,
    after: After | None = None,
    watch: Watch | None = None,
) -> RunEnd:
    """Take slides to ``until`` in a job, doing just what is missing.

    values: by the names of the command line's options, see ``wsi_pipe.asked``. report: write the job's page at the
    end. Raises ConfigError, ManifestError, StaleWorkError, EncoderError, OutputError and NotOursError before any work,
    each for what the command line refuses; a slide's own error is in its outcome. What ends a run early once it has
    begun is in ``RunEnd.stopped``, and raised only where not one slide came through for want of an encoder or worker.
    """
    watch = watch or Watch()
    look_at_folder(job, watch.say)
    settings = settings_from(values, job, values.get("config"), watch.say)
    where = where_from(values)
    if values.get("salt") and not settings.anonymise:
        raise ConfigError("--salt needs --anonymise", remedy="give both, or leave out --salt")
    salt = job_salt(job, values.get("salt")) if settings.anonymise else None
    passed_over = PassedOver()
    entries = collect_entries(values, job, passed_over, salt=salt, say=watch.say)
    call = call_of(job, settings, entries, part=bool(values.get("only") or values.get("limit")))
    if not settings.redo:
        refuse_unfit(job, call)
    settings, entries = call.settings, call.entries
    encoders = None
    if until in ("extract", "assemble"):
        # What is wrong with encoders or room stops here, before any work; other processes load their own encoders.
        refuse_bad_encoders(settings, fetch=where.scheduler is None and not where.here)
        if where.here:
            encoders = load_encoders(settings)
        if not settings.redo:
            hashes = {name: encoder.info.weights_sha256 for name, encoder in (encoders or {}).items()}
            refuse_stale(job, other_weights(job, call, hashes.get if encoders else file_weights()))
        dims = {name: encoder.info.dim for name, encoder in encoders.items()} if encoders else None
        refuse_lack_of_room(entries, settings, job, bytes_per_tile(settings, dims) if dims else None)
    end = RunEnd(settings, entries)
    outcomes = end.outcomes
    start = time.perf_counter()
    unchanged, told = 0, start
    about = {"started_utc": utc_now(), "slides": len(entries), "until": until}
    with hold_job(job, about) as tell:
        paths = open_job(job, call.stored, entries, salt=salt)
        note_changes(paths, call.changes)
        if values.get("sources") and not settings.anonymise:
            # The names of files that were passed over name people as slides' do.
            note_passed_over(paths, passed_over)
        watch.begun(call, paths, where, about)
        compact(paths)
        # Of a run that was killed: nobody else writes here now.
        remove_partial_files(job, paths.written)
        with watch.working(len(entries)) as progress:
            results = dispatch(
                entries,
                settings,
                paths,
                where,
                until=until,
                encoders=encoders,
                keep_features=bool(values.get("keep_features", True)),
                progress=progress,
            )
            try:
                for outcome in results:
                    outcomes.append(outcome)
                    watch.finished(outcome)
                    unchanged += outcome.nothing_new
                    if outcome.nothing_new and time.perf_counter() - told > TELL_S:
                        told = time.perf_counter()
                        tell(unchanged=unchanged)
                tell(unchanged=unchanged)
            except (JobError, EncoderError) as error:
                end.stopped = error
            except KeyboardInterrupt:
                # Ends workers and reading threads now, not when the garbage collector comes by.
                results.close()
                remove_partial_files(job, paths.written)
                with contextlib.suppress(OutputError):
                    check_folder(paths)
                    # The report of a large job takes longer than who ends a run waits.
                    _write_end(paths, call.stored, report and len(entries) <= REPORTED_AT_ONCE)
                raise
            finally:
                results.close()
        if any(outcome.error in ("TaskTimeoutError", "WorkerError") for outcome in outcomes):
            # Processes that were ended may have left files half-written.
            remove_partial_files(job, paths.written)
        if end.stopped:
            # Where the folder cannot be written, the error that says so is already on its way.
            with contextlib.suppress(OutputError):
                check_folder(paths)
                _write_end(paths, call.stored, report)
        else:
            try:
                _write_end(paths, call.stored, report)
            except OutputError as error:
                # The slides are done all the same, and are told of.
                end.unwritten = error
            if after:
                done = {outcome.slide_id for outcome in outcomes if outcome.status == "done"}
                end.failed_after = after(paths, settings, [e for e in entries if e.slide_id in done]) or 0
        end.seconds = time.perf_counter() - start
        watch.ended(end.seconds, end.stopped)
    if end.stopped and not outcomes and isinstance(end.stopped, (EncoderError, WorkerError)):
        # No encoder, or no scheduler: nothing could be done.
        raise end.stopped
    return end


def _write_end(paths: JobPaths, settings: JobSettings, report: bool) -> None:
    """What is written at the end of a run, also of one that was stopped: failures.csv, and the report."""
    write_failures(paths)
    if report:
        from wsi_pipe.report import write_report

        write_report(paths.root, list(read_outcomes(paths.root).values()), settings)
