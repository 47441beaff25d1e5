"""Figures and pictures of runs whose target is no plain class, and of cases, through the target's own protocol."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lrmil.errors import FiguresError
from lrmil.metrics import Estimate
from lrmil.targets import Fold, Target, target_from_json
from lrmil.targets.cases import averaged
from lrmil.trainer.predictions import TARGET_NAME
from wsi_pipe.errors import ConfigError
from wsi_pipe.files import parse_json
from wsi_pipe.tables import written_cell

__all__ = ["case_estimates", "is_target_run", "read_fold", "several_slides", "target_in"]


def is_target_run(folder: Path) -> bool:
    """Whether the predictions of a fold's folder are of another target than a plain class."""
    return (folder / TARGET_NAME).is_file()


def target_in(folder: Path) -> Target:
    """The target of a fold's model, from its folder."""
    return target_from_json(parse_json((folder / TARGET_NAME).read_text(encoding="utf-8")))


def read_fold(folder: Path, name: str, part: str) -> tuple[Fold, tuple[str, ...]]:
    """The predictions of one part, and the ids of their bags. name: of the table. Raises FiguresError."""
    path = folder / name
    try:
        target = target_in(folder)
        with open(path, encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["part"] == part]
        if not rows:
            raise FiguresError(f"{path} has no predictions of the part {part!r}", remedy="choose another: --part")
        outputs = np.array([[float(row[f"output_{name}"]) for name in target.outputs] for row in rows])
        truth = np.array([[_number(row[f"truth_{name}"]) for name in target.truth_names] for row in rows])
        cases = tuple(written_cell(row["case_id"]) for row in rows)
        return Fold(target, truth, outputs, cases), tuple(written_cell(row["slide_id"]) for row in rows)
    except (OSError, KeyError, ValueError, TypeError, ConfigError) as error:
        if isinstance(error, FiguresError):
            raise
        raise FiguresError(
            f"{path} is no table of predictions: {error}", remedy="give a folder of lrmil train"
        ) from error


def _number(cell: str) -> float:
    return float(cell) if cell else float("nan")


def several_slides(folds: Sequence[Fold]) -> bool:
    """Whether any case has more than one bag."""
    return any(len(set(fold.cases)) < len(fold.cases) for fold in folds)


def case_estimates(folds: Sequence[Fold], *, replicates: int, seed: int) -> tuple[dict[str, Estimate], tuple[str, ...]]:
    """Figures of cases by the mean of their slides' predictions, and the cases that are left out since their slides are
    labelled differently; no figures where no case has several slides."""
    if not several_slides(folds):
        return {}, ()
    found = [averaged(fold) for fold in folds]
    torn = tuple(dict.fromkeys(case for one in found for case in one.torn))
    kept = [one.fold for one in found if len(one.fold.cases)]
    if not kept:
        return {}, torn
    return kept[0].target.estimates(kept, replicates=replicates, seed=seed), torn
