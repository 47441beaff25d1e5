"""What a job remembers: its settings, its slides, and the outcome of each slide."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from wsi_pipe.config import JobSettings, dump_toml, fingerprint, load_toml
from wsi_pipe.encoders.naming import slug_of
from wsi_pipe.errors import ConfigError
from wsi_pipe.files import output_error, parse_json, write_text_atomically
from wsi_pipe.job.ownership import claim_job, refuse_foreign
from wsi_pipe.job.paths import JobPaths
from wsi_pipe.job.private import load_identities, public, write_identities
from wsi_pipe.manifest import SlideEntry, read_manifest, write_manifest
from wsi_pipe.outcome import SlideOutcome, focus_of
from wsi_pipe.tables import csv_text

__all__ = [
    "OutcomeLog",
    "append_line",
    "append_outcome",
    "load_settings",
    "load_slides",
    "merged_settings",
    "open_job",
    "read_outcomes",
    "stamp_of",
    "utc_now",
    "write_failures",
]


def open_job(root: Path, settings: JobSettings, entries: list[SlideEntry], *, salt: bytes | None = None) -> JobPaths:
    """Make the job directory and note settings and slides in it.

    Slides of earlier runs stay listed, with what ``entries`` do not state of them; resolutions and encoders of earlier
    runs stay in the settings. salt: of an anonymised job. Paths that are not to be told, and secrets of URLs, go into
    the job's folder private. Raises NotOursError when the folder holds files and is no job, or a file of others stands
    where a result of these slides goes; OutputError when the folder cannot be made or written.
    """
    paths = JobPaths(root)
    claim_job(root)
    refuse_foreign(paths, (entry.slide_id for entry in entries))
    _check_anonymous(root, settings, entries)
    held = load_settings(root)
    write_text_atomically(paths.config, dump_toml(merged_settings(root, held, settings) if held else settings))
    load_identities(root, strict=True)
    before = load_slides(root)
    listed = {entry.slide_id: entry for entry in before}
    listed.update({entry.slide_id: entry for entry in entries})
    write_identities(root, list(listed.values()), salt)
    # The list may be what the user gave and keeps by hand: it is written only where it says something else.
    if list(listed.values()) != before or not paths.slides.is_file():
        write_manifest(paths.slides, map(public, listed.values()))
    return paths


def _check_anonymous(root: Path, settings: JobSettings, entries: list[SlideEntry]) -> None:
    """Raise ConfigError where names would get into an anonymised job, or stand in one already."""
    own = load_settings(root)
    if own is not None and own.anonymise != settings.anonymise:
        raise ConfigError(
            f"{root}: was made {'with' if own.anonymise else 'without'} --anonymise",
            remedy="make a new job, or work on the bags of this one",
        )
    if settings.anonymise and not all(entry.hides for entry in entries):
        raise ConfigError(
            f"{root}: slides of an anonymised job go by hashed ids",
            remedy="make its bags with wsi-pipe run --anonymise, and work on these",
        )


def merged_settings(root: Path, held: JobSettings, given: JobSettings) -> JobSettings:
    """The settings of the job at ``root`` after a call: those given, with the resolutions and encoders of both.

    Of what the job holds those count that something was made with: where only tissue was found, say, the resolutions
    in its settings are defaults that nobody asked for.
    """
    encoded = any(_holds(root / name) for name in ("bags", "features", "partial"))
    laid = encoded or _holds(root / "tiles")
    resolutions = tuple(sorted({*(held.tile.resolutions if laid else ()), *given.tile.resolutions}))
    tile = dataclasses.replace(given.tile, resolutions=resolutions)
    theirs = {spec.label for spec in given.tile.specs}
    ours = {spec.label for spec in held.tile.specs} if encoded else set()
    by_label: dict[str, tuple[str, ...]] = {}
    for label in (spec.label for spec in tile.specs):
        names: dict[str, str] = {}
        for settings, labels in ((held, ours), (given, theirs)):
            # A file that lies elsewhere now is the same encoder.
            names |= {slug_of(name): name for name in settings.extract.encoders_of(label) if label in labels}
        by_label[label] = tuple(names.values())
    alike = len(set(by_label.values())) == 1
    encoders = {"*": next(iter(by_label.values()))} if alike else {k: v for k, v in by_label.items() if v}
    return dataclasses.replace(given, tile=tile, extract=dataclasses.replace(given.extract, encoders=encoders))


def _holds(folder: Path) -> bool:
    """Whether anything lies in a folder."""
    try:
        with os.scandir(folder) as inside:
            return next(inside, None) is not None
    except OSError:
        return False


def load_settings(root: Path) -> JobSettings | None:
    """The settings of a job, or None where there is no job yet. Raises ConfigError when they cannot be understood."""
    path = JobPaths(root).config
    return load_toml(JobSettings, path) if path.is_file() else None


def load_slides(root: Path) -> list[SlideEntry]:
    """The slides of a job, or none where there is no job yet. Raises ManifestError when they cannot be understood.

    What its folder private tells of them is filled in, as far as it may be read.
    """
    path = JobPaths(root).slides
    if not path.is_file():
        return []
    private = load_identities(root)
    return [private.get(entry.slide_id, entry) for entry in read_manifest(path, own=True)]


def append_outcome(paths: JobPaths, outcome: SlideOutcome) -> None:
    """Add one line to the outcomes. Raises OutputError when it cannot be written."""
    append_line(paths.outcomes, json.dumps(outcome.to_json(), ensure_ascii=False))


def append_line(path: Path, text: str) -> None:
    """Add one line to a file. Raises OutputError when it cannot be written."""
    line = f"{text}\n".encode()
    try:
        # One write in append mode: lines of several processes do not mix.
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
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
        raise output_error(path, error) from error


def read_outcomes(root: Path) -> dict[str, SlideOutcome]:
    """The last outcome of each slide, by slide id. A line cut short by a crash is passed over."""
    return {outcome.slide_id: outcome for outcome in _lines(JobPaths(root).outcomes)}


STALE = "StaleWorkError"
"""The ``error`` of a slide whose finished work does not fit what was asked for, and was left as it is."""


def _of_now(outcome: SlideOutcome) -> dict[str, Any]:
    names = ("status", "path", "stage", "reason", "remedy", "error", "finished_utc")
    return {name: getattr(outcome, name) for name in names}


def _facts(outcome: SlideOutcome) -> tuple[object, ...]:
    return outcome.status, outcome.path, outcome.mpp, outcome.mpp_source, outcome.notes, outcome.stamp


class OutcomeLog:
    """The outcomes of one run, noted beside those of the runs before it.

    A slide of which all was valid already is not noted again, and one of which some was keeps the times and counts of
    what was: else a run that does nothing would take from the report what the slides cost.
    """

    def __init__(self, paths: JobPaths) -> None:
        self._paths = paths
        self._before = read_outcomes(paths.root)
        self._settled = paths.config.is_file()

    def note(self, outcome: SlideOutcome) -> None:
        """Add the outcome as far as it says anything new.

        Raises OutputError when it cannot be written, or the job that was there when the run began is gone.
        """
        if self._settled and not self._paths.config.is_file():
            # A thread that prepares another slide may have made an empty folder of that name: the job is not in it.
            raise output_error(self._paths.root, FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)))
        if outcome.mark is not None:
            _append_mark(self._paths, outcome.mark.to_json())
        before = self._before.get(outcome.slide_id)
        if before is not None and outcome.error == STALE:
            # Nothing was done, and what is there is what it was.
            outcome = replace(before, **_of_now(outcome))
        elif before is not None and before.status == "failed" and before.error != STALE:
            # Its times are of work that came to nothing; what features of earlier runs cost still holds, and how sharp
            # their tiles are.
            outcome = outcome.keeping(replace(before, seconds={}, counts=focus_of(before.counts)))
        elif before is not None:
            same = _facts(before) == _facts(outcome)
            if outcome.nothing_new and same and outcome.seconds.keys() <= before.seconds.keys():
                return
            outcome = outcome.keeping(before)
        append_outcome(self._paths, outcome)


def _append_mark(paths: JobPaths, mark: dict[str, Any]) -> None:
    """Add a line to the index. Nothing depends on it: where it cannot be written the next run looks at the files."""
    line = (json.dumps(mark, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
    with suppress(OSError):
        handle = os.open(paths.index, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line)
        finally:
            os.close(handle)


def write_failures(paths: JobPaths) -> None:
    """Write ``failures.csv``: slide, path, stage, cause and remedy of every slide whose last outcome is a failure."""
    failed = (outcome for outcome in read_outcomes(paths.root).values() if outcome.status == "failed")
    rows = ([o.slide_id, o.path, o.stage, o.reason, o.remedy] for o in failed)
    write_text_atomically(paths.failures, csv_text(["slide_id", "slide", "stage", "cause", "remedy"], rows))


def stamp_of(entry: SlideEntry) -> str:
    """Size and time of change of a slide's local file: whether it may be another by now shows without opening it.

    In an anonymised job a hash of them, since a file often was changed last when it was scanned.
    """
    try:
        state = os.stat(entry.path)
    except (OSError, ValueError):
        return ""
    stamp = f"{state.st_size}:{state.st_mtime_ns}"
    return fingerprint(entry.path, stamp) if entry.hides else stamp


def utc_now() -> str:
    """The time now, ISO 8601 in UTC to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _lines(path: Path) -> Iterator[SlideOutcome]:
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as handle:
        for line in handle:
            try:
                yield SlideOutcome.from_json(parse_json(line))
            except (ValueError, TypeError, AttributeError):
                continue
