"""What a job remembers: its settings, its slides, and the outcome of each slide."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from wsi_pipe.config import JobSettings, dump_toml, load_toml
from wsi_pipe.files import output_error, write_text_atomically
from wsi_pipe.job.paths import JobPaths
from wsi_pipe.manifest import SlideEntry, read_manifest, write_manifest
from wsi_pipe.outcome import SlideOutcome

__all__ = [
    "OutcomeLog",
    "append_outcome",
    "load_settings",
    "load_slides",
    "open_job",
    "read_outcomes",
    "utc_now",
    "write_failures",
]


def open_job(root: Path, settings: JobSettings, entries: list[SlideEntry]) -> JobPaths:
    """Make the job directory and note settings and slides in it; slides of earlier runs stay listed.

    Raises OutputError when the folder cannot be made or written.
    """
    paths = JobPaths(root)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(root, error) from error
    write_text_atomically(paths.config, dump_toml(settings))
    listed = {entry.slide_id: entry for entry in load_slides(root)}
    listed.update({entry.slide_id: entry for entry in entries})
    write_manifest(paths.slides, listed.values())
    return paths


def load_settings(root: Path) -> JobSettings | None:
    """The settings of a job, or None where there is no job yet. Raises ConfigError when they cannot be understood."""
    path = JobPaths(root).config
    return load_toml(JobSettings, path) if path.is_file() else None


def load_slides(root: Path) -> list[SlideEntry]:
    """The slides of a job, or none where there is no job yet. Raises ManifestError when they cannot be understood."""
    path = JobPaths(root).slides
    return read_manifest(path) if path.is_file() else []


def append_outcome(paths: JobPaths, outcome: SlideOutcome) -> None:
    """Add one line to the outcomes. Raises OutputError when it cannot be written."""
    line = (json.dumps(outcome.to_json(), ensure_ascii=False) + "\n").encode()
    try:
        # One write in append mode: lines of several processes do not mix.
        handle = os.open(paths.outcomes, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            end = os.fstat(handle).st_size
            if end and os.pread(handle, 1, end - 1) != b"\n":
                # A crash or a full disk cut the last line short: it must not take this one with it.
                line = b"\n" + line
            if os.write(handle, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(handle)
    except OSError as error:
        raise output_error(paths.outcomes, error) from error


def read_outcomes(root: Path) -> dict[str, SlideOutcome]:
    """The last outcome of each slide, by slide id. A line cut short by a crash is passed over."""
    return {outcome.slide_id: outcome for outcome in _lines(JobPaths(root).outcomes)}


class OutcomeLog:
    """The outcomes of one run, noted beside those of the runs before it.

    A slide of which all was valid already is not noted again, and one of which some was keeps the times and counts of
    what was: else a run that does nothing would take from the report what the slides cost.
    """

    def __init__(self, paths: JobPaths) -> None:
        self._paths = paths
        self._before = read_outcomes(paths.root)

    def note(self, outcome: SlideOutcome) -> None:
        """Add the outcome as far as it says anything new. Raises OutputError when it cannot be written."""
        before = self._before.get(outcome.slide_id)
        if before is not None and before.status == "failed":
            # Its times are of work that came to nothing; what features of earlier runs cost still holds.
            outcome = outcome.keeping(replace(before, seconds={}, counts={}))
        elif before is not None:
            same = (before.status, before.path, before.notes) == (outcome.status, outcome.path, outcome.notes)
            if outcome.nothing_new and same and outcome.seconds.keys() <= before.seconds.keys():
                return
            outcome = outcome.keeping(before)
        append_outcome(self._paths, outcome)


def write_failures(paths: JobPaths) -> None:
    """Write ``failures.csv``: slide, path, stage, cause and remedy of every slide whose last outcome is a failure."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["slide_id", "slide", "stage", "cause", "remedy"])
    for outcome in read_outcomes(paths.root).values():
        if outcome.status == "failed":
            writer.writerow([outcome.slide_id, outcome.path, outcome.stage, outcome.reason, outcome.remedy])
    write_text_atomically(paths.failures, buffer.getvalue())


def utc_now() -> str:
    """The time now, ISO 8601 in UTC to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _lines(path: Path) -> Iterator[SlideOutcome]:
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as handle:
        for line in handle:
            try:
                yield SlideOutcome.from_json(json.loads(line))
            except (ValueError, TypeError, AttributeError):
                continue
