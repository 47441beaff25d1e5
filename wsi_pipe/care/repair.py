"""Putting wrong outputs aside, so that the next run makes them again and nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wsi_pipe.bag import check_bag, check_feature_file
from wsi_pipe.care.verify import verify_job
from wsi_pipe.errors import ManifestError
from wsi_pipe.files import output_error, remove_partial_files
from wsi_pipe.job import JobPaths, load_slides, utc_now
from wsi_pipe.job.guard import problems_guarded
from wsi_pipe.job.lock import hold_job

__all__ = ["Quarantine", "Repair", "quarantine_of", "repair_job"]


@dataclass(frozen=True)
class Repair:
    """One file with something wrong, and what was done about it.

    action: "moved" (to ``moved_to``), "deleted" (a temporary file), or "left" (a sound bag of other settings, which
    the next run brings up to date).
    """

    path: str
    moved_to: str
    problems: tuple[str, ...]
    action: Literal["moved", "deleted", "left"] = "moved"


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
        found = [f for f in verify_job(root, sources=sources) if f.problems and Path(f.path).is_file()]
        wrong = [(Path(f.path), f.problems) for f in found if not f.stale]
        wrong += list(_broken_stage_files(paths))
        repairs = [_put_aside(root, path, problems) for path, problems in wrong]
        left = ("left by an interrupted write",)
        repairs += [Repair(str(path), "", left, "deleted") for path in remove_partial_files(root, paths.written)]
        repairs += [Repair(f.path, "", f.problems, "left") for f in found if f.stale]
    return repairs


def _broken_stage_files(paths: JobPaths) -> Iterator[tuple[Path, tuple[str, ...]]]:
    known = {entry.slide_id for entry in load_slides(paths.root)}
    for path in sorted((paths.root / "tiles").glob("*.h5")):
        problems = [] if path.stem in known else ["belongs to no slide of this job"]
        problems = problems or problems_guarded(check_bag, path)
        if problems:
            yield path, tuple(problems)
    for path in sorted((paths.root / "features").glob("*/*.h5")):
        problems = [] if path.parent.name in known else ["belongs to no slide of this job"]
        problems = problems or problems_guarded(check_feature_file, path)
        if problems:
            yield path, tuple(problems)
    for path in sorted((paths.root / "tissue").glob("*.geojson")):
        if path.stem not in known:
            yield path, ("belongs to no slide of this job",)


def _put_aside(root: Path, path: Path, problems: tuple[str, ...]) -> Repair:
    target = JobPaths(root).quarantine / path.relative_to(root)
    number = 1
    while target.exists():
        target = target.with_name(f"{path.stem}.{number}{path.suffix}")
        number += 1
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # A rename within the job: no space is needed, and nothing is ever half moved.
        os.replace(path, target)
    except OSError as error:
        raise output_error(target, error) from error
    return Repair(str(path), str(target), problems)
