"""An LR encoder in one call: what ``lrmil.distill(...)`` does."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lrmil.checkpoint import read_card
from lrmil.data import read_cases
from lrmil.distill.request import COPY, DistillRequest
from lrmil.distill.run import DistillResult, run_distillation
from lrmil.distill.settings import DistillSettings
from lrmil.errors import RandomFeaturesError
from lrmil.splits import SplitTable, read_splits
from wsi_pipe.config import from_mapping, to_mapping
from wsi_pipe.errors import ConfigError
from wsi_pipe.geometry import level_label, parse_resolution
from wsi_pipe.job.private import hidden_slides
from wsi_pipe.manifest import read_manifest

__all__ = ["distill"]

PathLike = str | os.PathLike[str]


def distill(
    bags: PathLike,
    out: PathLike,
    *,
    teacher: str,
    student: str = COPY,
    resolutions: Sequence[str | float] = ("20x", "5x"),
    splits: PathLike | SplitTable | None = None,
    fold: str | int | None = None,
    cases: Sequence[str] | None = None,
    everything: bool = False,
    slides: PathLike | Mapping[str, str] | None = None,
    labels: PathLike | None = None,
    mil_teacher: PathLike | None = None,
    compute: bool = False,
    targets_dir: PathLike | None = None,
    student_px: int | None = None,
    random_teacher: bool = False,
    random_student: bool = False,
    allow_random: bool = False,
    settings: DistillSettings | None = None,
    progress: Callable[[str], object] | None = None,
    **values: Any,
) -> DistillResult:
    """Distil an encoder of low-resolution tiles from high-resolution ones and write it to ``out`` (.safetensors).

    bags: a folder of bags with both resolutions. teacher, student: encoder names; "copy" is a copy of the teacher.
    Whom the student may see: the training cases of a ``fold`` of ``splits``, the ``cases`` named, or ``everything``.
    slides: a slide list, or a mapping from slide ids to files, where they do not lie where the bags say. labels: a CSV
    with the cases of slides, if not as the bags say. mil_teacher: a model whose attention weighs the tiles. compute:
    run the teacher now rather than read its features from the bags. settings: a ``DistillSettings``, or single ones of
    them by name, as ``epochs=10``. The others: as of ``lrmil distill``. progress: told what goes on, a line at a time.

    Raises ConfigError where it is not clear whom the student may see or a setting is unknown, LeakageError or
    SplitError for bad folds, BagMismatchError when bags lack what is needed, RandomFeaturesError, and what reading a
    slide raises.
    """
    mpp = sorted(item if isinstance(item, float) else parse_resolution(str(item)) for item in resolutions)
    if len(mpp) != 2:
        raise ConfigError(f"{len(mpp)} resolutions are given", remedy='give HR and LR, such as ("20x", "5x")')
    ways = sum((splits is not None, cases is not None, everything))
    if ways != 1 or (splits is None) != (fold is None) or cases == ():
        raise ConfigError(
            "whom the student may see is not clear", remedy="give splits with fold, or everything=True, or cases"
        )
    if settings is not None and values:
        raise ConfigError("settings and single ones of them are given", remedy="give one or the other")
    if mil_teacher is not None and not allow_random and read_card(Path(mil_teacher)).weights:
        raise RandomFeaturesError(
            f"{mil_teacher} was trained on features of random weights: its attention means nothing",
            remedy="give another, or allow_random=True for a test",
        )
    chosen = settings or from_mapping(DistillSettings, to_mapping(DistillSettings()) | values, "distill")
    folder = Path(bags)
    if isinstance(slides, Mapping):
        entries = []
        places = dict(slides)
    else:
        entries = hidden_slides(folder.parent) if slides is None else read_manifest(Path(slides))
        places = {entry.slide_id: entry.path for entry in entries}
    # A slide list without cases makes each slide a case of its own, which is no news.
    known = {entry.slide_id: entry.case_id for entry in entries if entry.case_id != entry.slide_id}
    table = read_splits(Path(splits)) if isinstance(splits, (str, os.PathLike)) else splits
    request = DistillRequest(
        bags=folder,
        teacher=teacher,
        student=student,
        lr=level_label(mpp[1]),
        hr=level_label(mpp[0]),
        out=Path(out),
        splits=table,
        fold="" if fold is None else str(fold),
        only_cases=tuple(cases or ()),
        settings=chosen,
        slides=places,
        cases=known | (read_cases(Path(labels)) if labels is not None else {}),
        mil_teacher=None if mil_teacher is None else Path(mil_teacher),
        compute=compute,
        targets_dir=None if targets_dir is None else Path(targets_dir),
        random_teacher=random_teacher,
        random_student=random_student,
        student_px=student_px,
    )
    return run_distillation(request, progress)
