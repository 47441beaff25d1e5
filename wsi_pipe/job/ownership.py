"""Which files of a job directory are the job's own: no other is ever written over or removed."""

from __future__ import annotations

import json
import os
from collections.abc import Container, Iterable, Iterator
from pathlib import Path

from wsi_pipe.bag import SCHEMA
from wsi_pipe.config import JobSettings, load_toml
from wsi_pipe.errors import NotOursError, WsiPipeError
from wsi_pipe.files import is_temporary
from wsi_pipe.job.paths import JobPaths
from wsi_pipe.ownership import SHOWN, claim_folder, names_in, starts_with_any

__all__ = [
    "claim_job",
    "foreign_files",
    "is_feature_file_of_ours",
    "is_job",
    "refuse_foreign",
    "refuse_foreign_reports",
    "refuse_other_features",
    "refuse_other_hdf5",
]

HEAD_BYTES = 1 << 16
"""The root attributes come first in the HDF5 files of this program, the schema before all others."""
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
SAVED_TILES = (".png", ".jpg", ".webp", ".tar", ".json")
PICTURES = (".jpg", ".raw.jpg", ".grid.jpg")
REPORTS = {
    "report.html": (b"wsi-pipe</title>", b'name="generator" content="wsi-pipe'),
    "report.json": (b'"wsi-pipe report"',),
    "report.csv": (b"slide_id,status,path,",),
    "failures.csv": (b"slide_id,slide,stage,",),
    "outcomes.jsonl": (b'"slide_id"',),
    "passed_over.json": (b'"kind"',),
}
"""By what the files of the job as a whole are known."""
REMEDY = "move it out of the job, or give another --out"


def claim_job(root: Path, *, make: bool = True) -> list[Path]:
    """Make ``root`` a job directory, unless it is one; the files of others in one that an earlier version made.

    make: off to look only. Raises NotOursError when it holds files and is no job, OutputError when it cannot be read or
    written.
    """
    paths = JobPaths(root)
    passed_over = [paths.lock.name] if _lock_alone(paths) else []
    adopted = claim_folder(
        root, paths.marker.name, "a job", earlier=_is_earlier_job, passed_over=passed_over, make=make
    )
    return foreign_files(root) if adopted else []


def is_job(root: Path) -> bool:
    """Whether ``root`` is a job, of this version or an earlier one."""
    return JobPaths(root).marker.is_file() or _is_earlier_job(root)


def _lock_alone(paths: JobPaths) -> bool:
    """Whether nothing but the lock of a run that was ended at once lies here."""
    names = [name for name in names_in(paths.root) if not is_temporary(name)]
    return names == [paths.lock.name] and (not paths.lock.stat().st_size or _is_lock(paths.lock))


def _is_lock(path: Path) -> bool:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and {"pid", "host"} <= values.keys()


def _is_earlier_job(root: Path) -> bool:
    """Whether this is a job of a version that set no mark: settings and outcomes of ours, or the lock of a run that was
    ended before its first outcome."""
    paths = JobPaths(root)
    try:
        load_toml(JobSettings, paths.config)
    except (WsiPipeError, OSError):
        return False
    if not paths.outcomes.exists():
        return paths.slides.is_file() and _is_lock(paths.lock)
    return next(_noted(paths), None) is not None


def _noted(paths: JobPaths) -> Iterator[str]:
    """Ids of the slides that have an outcome; a line that is none is passed over."""
    try:
        with paths.outcomes.open(encoding="utf-8", errors="replace") as handle:
            for line in handle:
                try:
                    values = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(values, dict) and isinstance(values.get("slide_id"), str) and "status" in values:
                    yield values["slide_id"]
    except OSError:
        return


def foreign_files(root: Path) -> list[Path]:
    """What lies in a job directory and was not made by this program, as far as names and first bytes show it."""
    paths = JobPaths(root)
    noted = set(_noted(paths))
    own = {path.name for path in (*paths.written, paths.quarantine)} | paths.own_names
    found = [root / name for name in names_in(root) if name not in own]
    found += _foreign_reports(paths)
    for folder in paths.written:
        for name in names_in(folder):
            path = folder / name
            if path.is_dir():
                found += [inside for inside in _files_below(path) if not _is_of_slide(folder.name, inside, noted)]
            elif not _is_of_slide(folder.name, path, noted):
                found.append(path)
    return sorted(set(found))


def _files_below(folder: Path) -> Iterator[Path]:
    for where, _, names in os.walk(folder):
        yield from (Path(where) / name for name in names)


def _is_of_slide(kind: str, path: Path, noted: Container[str]) -> bool:
    if path.name.endswith(".partial"):
        return True
    if path.suffix == ".h5":
        return is_ours(path)
    if kind == "thumbnails":
        ids = (path.name.removesuffix(ending) for ending in PICTURES if path.name.endswith(ending))
        return any(slide_id in noted for slide_id in ids) or is_ours(path)
    if kind == "tissue":
        # One that another program edited is the user's, and named where its slide's turn comes.
        return path.suffix == ".geojson" and path.stem in noted
    return kind == "tiles" and path.parent.parent.parent.name == "tiles" and path.suffix in SAVED_TILES


def is_ours(path: Path) -> bool:
    """Whether a bag, tile or feature file or a picture says that this program made it."""
    if path.suffix == ".h5":
        return starts_with_any(path, (SCHEMA.encode(),), HEAD_BYTES)
    return starts_with_any(path, (b"wsi-pipe",), 4096)


def is_feature_file_of_ours(path: Path) -> bool:
    """Whether this is a feature file of this program, which may be removed once a bag holds what is in it."""
    return path.is_file() and starts_with_any(path, (f"{SCHEMA}-features".encode(),), HEAD_BYTES)


def refuse_foreign(paths: JobPaths, slide_ids: Iterable[str]) -> None:
    """Refuse to begin where a run over ``slide_ids`` would write over files that this program did not make.

    A slide with an outcome has files of its own, damaged perhaps; of others, what is there already must say that it is
    ours. Raises NotOursError that names them.
    """
    there = {folder: set(names_in(paths.root / folder)) for folder in ("bags", "tiles", "thumbnails")}
    found = _foreign_reports(paths)
    if any(there.values()):
        noted = set(_noted(paths))
        for slide_id in slide_ids:
            if slide_id in noted:
                continue
            own = [("bags", f"{slide_id}.h5"), ("tiles", f"{slide_id}.h5")]
            own += [("thumbnails", f"{slide_id}{ending}") for ending in PICTURES]
            candidates = [paths.root / folder / name for folder, name in own if name in there[folder]]
            found += [path for path in candidates if not is_ours(path)]
    _refuse(found)


def refuse_foreign_reports(paths: JobPaths) -> None:
    """Raises NotOursError where the report's files are there and another made them."""
    _refuse(_foreign_reports(paths))


def _foreign_reports(paths: JobPaths) -> list[Path]:
    there = set(names_in(paths.root))
    return [
        paths.root / name for name, marks in REPORTS.items() if name in there and _foreign(paths.root / name, marks)
    ]


def _foreign(path: Path, marks: tuple[bytes, ...]) -> bool:
    if not path.is_file():
        return True
    return path.stat().st_size > 0 and not starts_with_any(path, marks, 4096)


def _refuse(found: list[Path]) -> None:
    if found:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        what = ", ".join(str(path) for path in found[:SHOWN])
        raise NotOursError(
            f"{what}{more}: {'was' if len(found) == 1 else 'were'} not made by this program and would be written over",
            remedy=REMEDY if len(found) == 1 else REMEDY.replace("it", "them", 1),
        )


def refuse_other_features(*files: Path) -> None:
    """Raises NotOursError for a file in the place of a feature file that is none of ours: text, another's HDF5 file.

    An empty one, or one that begins with zeros, may be ours and damaged.
    """
    for path in files:
        try:
            with open(path, "rb") as handle:
                head = handle.read(HEAD_BYTES)
        except IsADirectoryError:
            head = b"a folder"
        except OSError:
            continue
        if head.strip(b"\0") and f"{SCHEMA}-features".encode() not in head:
            raise NotOursError(f"{path}: was not made by this program and would be written over", remedy=REMEDY)


def refuse_other_hdf5(*files: Path) -> None:
    """Raises NotOursError for an HDF5 file of another schema, which is nobody's damaged bag but another's file."""
    for path in files:
        try:
            with open(path, "rb") as handle:
                head = handle.read(HEAD_BYTES)
        except OSError:
            continue
        if head.startswith(HDF5_SIGNATURE) and SCHEMA.encode() not in head:
            raise NotOursError(f"{path}: was not made by this program and would be written over", remedy=REMEDY)
