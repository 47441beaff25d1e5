"""Putting wrong outputs aside, so that the next run makes them again and nothing else."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wsi_pipe.bag import check_bag, check_feature_file
from wsi_pipe.care.verify import Finding, verify_job
from wsi_pipe.errors import FileAccessError, ManifestError, OutputError
from wsi_pipe.files import atomic_path, output_error, remove_partial_files
from wsi_pipe.job import JobPaths, load_slides, utc_now
from wsi_pipe.job.guard import problems_guarded
from wsi_pipe.job.lock import hold_job
from wsi_pipe.job.ownership import is_ours

__all__ = ["Quarantine", "Repair", "quarantine_of", "repair_job"]


@dataclass(frozen=True)
class Repair:
    """One file with something wrong, and what was done about it.

    action: "moved" (to ``moved_to``), "deleted" (a temporary file), "left" (a sound bag of other settings, which the
    next run brings up to date), "not ours" (a file that this program did not make, or that lies in a folder shared with
    other jobs and belongs to no slide of this one), or "unseen" (it cannot be looked at, so nothing is known of it).
    """

    path: str
    moved_to: str
    problems: tuple[str, ...]
    action: Literal["moved", "deleted", "left", "not ours", "unseen"] = "moved"


@dataclass(frozen=True)
class Quarantine:
    """What repairs of a job put aside so far. folder: where it lies; files: how many; size_bytes: of all of them."""

    folder: str
    files: int
    size_bytes: int


def quarantine_of(root: Path) -> Quarantine:
    """What lies in the quarantine of the job in ``root``; 0 files where there is none."""
    folder = JobPaths(root).quarantine
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return Quarantine(str(folder), len(sizes), sum(sizes))


def repair_job(root: Path, *, sources: bool = True) -> list[Repair]:
    """Move everything wrong in a job into ``quarantine/``: broken and foreign bags, grids and feature files that do
    not open, outputs that belong to no slide; and delete what interrupted writes left.

    The next run makes just those again. A sound bag of its own slide that is only stale stays where it is: the next
    run makes it anew out of the features in it that still fit, which in quarantine would have to be computed again.
    Nobody empties the quarantine but the user. sources: as in ``verify_job``. Raises ManifestError when ``root`` is not
    a job, JobLockedError while a run is at work in it, OutputError when a file cannot be moved.
    """
    paths = JobPaths(root)
    if not paths.config.is_file():
        raise ManifestError(f"{root}: is not a job directory", remedy="give the folder of wsi-pipe run to --repair")
    with hold_job(root, {"started_utc": utc_now(), "until": "repair"}):
        found = [f for f in verify_job(root, sources=sources) if f.problems and (f.unseen or Path(f.path).is_file())]
        repairs = [_repair(root, f) for f in found if not f.stale]
        repairs += [_repair(root, f) for f in _stage_files(paths)]
        left = ("left by an interrupted write",)
        repairs += [Repair(str(path), "", left, "deleted") for path in remove_partial_files(root, paths.written)]
        repairs += [Repair(f.path, "", f.problems, "left") for f in found if f.stale]
    return repairs


def _repair(root: Path, finding: Finding) -> Repair:
    path = Path(finding.path)
    if finding.unseen:
        return Repair(finding.path, "", finding.problems, "unseen")
    if finding.status == "orphan" and (_is_shared(root, path) or not _may_be_ours(path)):
        return Repair(finding.path, "", finding.problems, "not ours")
    return _put_aside(root, path, finding.problems)


def _is_shared(root: Path, path: Path) -> bool:
    """Whether a file lies in the job by a link alone, so that it may as well be another job's."""
    return not path.parent.resolve().is_relative_to(root.resolve())


def _may_be_ours(path: Path) -> bool:
    if path.suffix == ".geojson":
        return b'"wsi_pipe"' in path.read_bytes()
    return is_ours(path)


def _stage_files(paths: JobPaths) -> Iterator[Finding]:
    """Grids, feature files and masks with something wrong; those of no slide of this job are orphans."""
    known = {entry.slide_id for entry in load_slides(paths.root)}
    kinds: list[tuple[list[Path], Callable[[Path], str], Callable[[Path], list[str]] | None]] = [
        (sorted((paths.root / "tiles").glob("*.h5")), lambda path: path.stem, check_bag),
        (sorted((paths.root / "features").glob("*/*.h5")), lambda path: path.parent.name, check_feature_file),
        (sorted((paths.root / "tissue").glob("*.geojson")), lambda path: path.stem, None),
    ]
    for files, id_of, check in kinds:
        for path in files:
            slide_id = id_of(path)
            if slide_id not in known:
                yield Finding(slide_id, str(path), "orphan", ("belongs to no slide of this job",))
            elif check is not None:
                try:
                    problems = problems_guarded(check, path)
                except FileAccessError as error:
                    yield Finding(slide_id, str(path), "unseen", (str(error),), unseen=True)
                    continue
                if problems:
                    yield Finding(slide_id, str(path), "broken", tuple(problems))


def _put_aside(root: Path, path: Path, problems: tuple[str, ...]) -> Repair:
    target = JobPaths(root).quarantine / path.relative_to(root)
    number = 1
    while target.exists():
        target = target.with_name(f"{path.stem}.{number}{path.suffix}")
        number += 1
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            # A rename within the job: no space is needed, and nothing is ever half moved.
            os.replace(path, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            # A folder of the job is a link to another disk.
            with atomic_path(target) as temporary:
                shutil.copy2(path, temporary)
            path.unlink()
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise output_error(target, error) from error
    return Repair(str(path), str(target), problems)
