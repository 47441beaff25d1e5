"""What is known of finished slides, so that a run that resumes asks for sizes and times in place of opening files.

One JSON line a slide in ``.index.jsonl``: what was wanted of it, as a fingerprint, and size and times of every file
that this rests on. Where all are the same the slide is done; where anything differs, or nothing is known, the files
themselves are looked at, as ``wsi-pipe verify`` always does. The index may be deleted: it only saves time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from wsi_pipe.bag import SCHEMA_VERSION
from wsi_pipe.config import JobSettings, fingerprint
from wsi_pipe.encoders.base import EncoderInfo
from wsi_pipe.files import write_text_atomically
from wsi_pipe.job.fingerprints import EXTRACT_VERSION, SEGMENT_VERSION, TILE_VERSION
from wsi_pipe.job.paths import JobPaths
from wsi_pipe.manifest import SlideEntry, is_url
from wsi_pipe.outcome import STAGES, SlideOutcome

__all__ = ["JobIndex", "Mark", "compact", "files_of", "marks_of", "seems_unchanged", "stamps_of", "wanted_of"]

INDEX_VERSION = 2
SHOWN_HASH = 16
"""Characters of a hash that tell the weights of one name apart."""
MOST_FILES = 2000
"""A slide of more files than this is looked at in full."""
SINGLE = frozenset(
    (".svs", ".tif", ".tiff", ".ndpi", ".scn", ".bif", ".svslide", ".png", ".jpg", ".jpeg", ".jp2", ".j2k")
)
"""Slides in these are one file, but for OME-TIFF, which may name others. Of any other kind whatever lies beside it
counts as part of it."""

PACE = frozenset({"devices", "batch_size", "read_threads", "memory_mib", "compile", "precision", "random_weights"})
"""Settings of extraction that change how fast it goes, or that what encoders say of themselves already holds."""

Stamp = tuple[str, int, int, int]
"""A file's path, its size in bytes, and when its content and its entry last changed, in ns."""


@dataclass(frozen=True)
class Mark:
    """What is known of one finished slide. wanted: fingerprint of what was asked for. files: all that it rests on.
    weights: the first characters of the hash of the weights of the features asked for, by place, "20x/uni"."""

    slide_id: str
    wanted: str
    files: tuple[Stamp, ...]
    status: str
    reason: str | None
    tiles: Mapping[str, int]
    tissue_mm2: float | None = None
    notes: tuple[str, ...] = ()
    mpp: tuple[float, float] | None = None
    mpp_source: str = ""
    stamp: str = ""
    weights: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """JSON-able values: a line of the index."""
        return {
            "version": INDEX_VERSION,
            "slide_id": self.slide_id,
            "wanted": self.wanted,
            "files": [list(stamp) for stamp in self.files],
            "status": self.status,
            "reason": self.reason,
            "tiles": dict(self.tiles),
            "tissue_mm2": self.tissue_mm2,
            "notes": list(self.notes),
            "mpp": None if self.mpp is None else list(self.mpp),
            "mpp_source": self.mpp_source,
            "stamp": self.stamp,
            "weights": dict(self.weights),
        }

    @classmethod
    def from_json(cls, values: Any) -> Mark | None:
        """The inverse of ``to_json``; None for anything else."""
        try:
            if values["version"] != INDEX_VERSION or values["status"] not in ("done", "empty"):
                return None
            files = tuple((str(p), int(size), int(m), int(c)) for p, size, m, c in values["files"])
            return cls(
                str(values["slide_id"]),
                str(values["wanted"]),
                files,
                str(values["status"]),
                values["reason"],
                {str(label): int(count) for label, count in values["tiles"].items()},
                values["tissue_mm2"],
                tuple(map(str, values["notes"])),
                None if values["mpp"] is None else (float(values["mpp"][0]), float(values["mpp"][1])),
                str(values["mpp_source"]),
                str(values["stamp"]),
                {str(place): str(sha256) for place, sha256 in values["weights"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            return None


def wanted_of(settings: JobSettings, encoders: Mapping[str, EncoderInfo], *, keep_features: bool) -> str:
    """Fingerprint of what a run wants of every slide: settings, encoders with their weights, versions of the stages."""
    infos = [
        (info.name, info.slug, info.weights_sha256, info.precision, info.transform, info.dim)
        for _, info in sorted(encoders.items())
    ]
    versions = (INDEX_VERSION, SCHEMA_VERSION, SEGMENT_VERSION, TILE_VERSION, EXTRACT_VERSION)
    extract = {item.name: getattr(settings.extract, item.name) for item in fields(settings.extract)}
    what = (settings.reader, settings.segment, settings.tile, {k: v for k, v in extract.items() if k not in PACE})
    # Named only where it was chosen, so that what is known of earlier jobs stays known.
    chosen = () if settings.primary is None else (settings.primary,)
    return fingerprint("index", versions, *what, infos, keep_features, *chosen)


def _of_slide(run: str, entry: SlideEntry) -> str:
    """What is wanted of one slide: the run's, and all that the slide list says of it."""
    # Every field, those of later versions too.
    # What was stated just now is no part of what the slide is; names of an anonymised job stay out of its files.
    left_out = {"stated"} | ({"path", "mask", "annotations", "hides"} if entry.hides else set())
    own = [getattr(entry, item.name) for item in fields(entry) if item.name not in left_out]
    return f"{run}:{fingerprint(*own)}"


def files_of(entry: SlideEntry, paths: JobPaths) -> list[str] | None:
    """All files that a finished slide rests on; None where that cannot be told from names."""
    slide = _slide_files(entry.path)
    if slide is None:
        return None
    tiles = paths.tiles(entry.slide_id)
    # Where a slide went to its bag in one go, the bag alone holds its grids.
    own = [paths.tissue(entry.slide_id), *([tiles] if tiles.is_file() else []), paths.bag(entry.slide_id)]
    return [*slide, *_given(entry), *(str(path) for path in own)]


def _given(entry: SlideEntry) -> list[str]:
    """Files beside the slide that the list names for it."""
    return [path for path in (entry.mask, entry.annotations) if path]


def _slide_files(where: str) -> list[str] | None:
    if is_url(where):
        return None
    stem, ending = os.path.splitext(where)
    if ending.lower() in SINGLE and not stem.lower().endswith(".ome"):
        return [where]
    # A folder, or a file with others beside it: of one series, or in a folder of its own name.
    folders = [where] if os.path.isdir(where) else [os.path.dirname(where) or ".", stem]
    found = [] if os.path.isdir(where) else [where]
    for folder in folders:
        for here, names, files in os.walk(folder):
            if folder != where and here == folder and folder != stem:
                names.clear()
            found += [os.path.join(here, name) for name in files]
            if len(found) > MOST_FILES:
                return None
    return sorted(set(found))


def stamps_of(files: Iterable[str]) -> tuple[Stamp, ...] | None:
    """Size and times of files; None where one is not there or cannot be looked at."""
    found = []
    try:
        for path in files:
            status = os.stat(path)
            found.append((path, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    except OSError:
        return None
    return tuple(found)


def _public(entry: SlideEntry, stamps: tuple[Stamp, ...]) -> tuple[Stamp, ...]:
    """Stamps as the index holds them: an anonymised job tells neither paths nor times, which may be those of the scan,
    but a hash of the times under the slide's path; their order stays."""
    if not entry.hides:
        return stamps
    return tuple((fingerprint(entry.path, *times), size, 0, 0) for _, size, *times in stamps)


def seems_unchanged(entry: SlideEntry, mark: Mark) -> bool:
    """Whether a slide's own files, where they lie as they did, have the sizes and times that they had for a mark.

    Of a slide that was moved, or cannot be looked at, nothing is known.
    """
    files = _slide_files(entry.path)
    stamps = None if files is None else stamps_of(files)
    if stamps is None:
        return True
    now = _public(entry, stamps)
    before = mark.files[: len(now)]
    moved = not entry.hides and [path for path, *_ in before] != [path for path, *_ in now]
    return moved or before == now


class JobIndex:
    """The index of one job as one run uses it. run: see ``wanted_of``."""

    def __init__(self, paths: JobPaths, run: str) -> None:
        self._paths, self._run = paths, run
        self._marks = marks_of(paths)

    def known(self, entry: SlideEntry) -> SlideOutcome | None:
        """The outcome of a slide that is done as it is wanted, by its files' sizes and times; else None."""
        mark = self._marks.get(entry.slide_id)
        if mark is None or mark.wanted != _of_slide(self._run, entry):
            return None
        files = files_of(entry, self._paths)
        stamps = None if files is None else stamps_of(files)
        if stamps is None or _public(entry, stamps) != mark.files:
            return None
        return SlideOutcome(
            slide_id=entry.slide_id,
            status="empty" if mark.status == "empty" else "done",
            path=entry.shown_path,
            reason=mark.reason,
            tiles=mark.tiles,
            counts={} if mark.tissue_mm2 is None else {"tissue_mm2": mark.tissue_mm2},
            cached=tuple(stage for stage in STAGES if stage != "open"),
            notes=mark.notes,
            mpp=mark.mpp,
            mpp_source=mark.mpp_source,
            stamp=mark.stamp,
        )

    def begin(self, entry: SlideEntry) -> tuple[Stamp, ...] | None:
        """The slide's own files before anything of it is read: what changes from here on is seen."""
        files = _slide_files(entry.path)
        return None if files is None else stamps_of([*files, *_given(entry)])

    def mark(
        self, entry: SlideEntry, begun: tuple[Stamp, ...] | None, outcome: SlideOutcome, weights: Mapping[str, str]
    ) -> Mark | None:
        """What is to be noted of a slide that is done now; None where its files changed meanwhile or are not known.

        weights: of its features, by place.
        """
        files = files_of(entry, self._paths)
        stamps = None if files is None or begun is None or outcome.status == "failed" else stamps_of(files)
        if stamps is None or begun is None or stamps[: len(begun)] != begun:
            return None
        return Mark(
            entry.slide_id,
            _of_slide(self._run, entry),
            _public(entry, stamps),
            outcome.status,
            outcome.reason,
            outcome.tiles,
            outcome.counts.get("tissue_mm2"),
            outcome.notes,
            outcome.mpp,
            outcome.mpp_source,
            outcome.stamp,
            {place: sha256[:SHOWN_HASH] for place, sha256 in weights.items()},
        )


_read: dict[Path, tuple[int, int, dict[str, Mark]]] = {}
"""By file: its inode, how much of it was read, and what that held. Workers see one slide at a time of a job."""


def marks_of(paths: JobPaths) -> dict[str, Mark]:
    """The last mark of each slide; only what was added since the last call is read."""
    path = paths.index
    try:
        status = os.stat(path)
        inode, offset, marks = _read.get(path, (0, 0, {}))
        if inode != status.st_ino or status.st_size < offset:
            offset, marks = 0, {}
        if status.st_size > offset:
            with open(path, "rb") as file:
                file.seek(offset)
                data = file.read()
            # A line that is being written counts when it is whole.
            whole = data.rfind(b"\n") + 1
            for line in data[:whole].splitlines():
                with suppress(ValueError, RecursionError):
                    if (mark := Mark.from_json(json.loads(line))) is not None:
                        marks[mark.slide_id] = mark
            offset += whole
        _read[path] = (status.st_ino, offset, marks)
        return dict(marks)
    except OSError:
        return {}


def compact(paths: JobPaths) -> None:
    """Write the index anew where most of its lines are out of date. Only for who holds the job."""
    with suppress(OSError):
        size = os.stat(paths.index).st_size
        marks = marks_of(paths)
        lines = [json.dumps(mark.to_json(), ensure_ascii=False) for mark in marks.values()]
        text = "".join(f"{line}\n" for line in lines)
        if size > 2 * len(text) + (1 << 16):
            write_text_atomically(paths.index, text)
