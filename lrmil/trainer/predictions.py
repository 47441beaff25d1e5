"""The tables of predictions that a training leaves: by bag, and by case."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrmil.checkpoint import ModelCard
from lrmil.targets import Classification, Fold, Target
from lrmil.targets.cases import averaged
from wsi_pipe.files import write_text_atomically
from wsi_pipe.tables import csv_text

__all__ = [
    "CASE_PREDICTIONS_NAME",
    "PREDICTIONS_NAME",
    "TARGET_NAME",
    "Prediction",
    "case_predictions_csv",
    "predictions_csv",
    "truth_of",
    "write_predictions",
]

PREDICTIONS_NAME = "predictions.csv"
CASE_PREDICTIONS_NAME = "predictions-cases.csv"
TARGET_NAME = "target.json"
"""A target that is no plain class, as the fold's model has it, beside the predictions."""


@dataclass(frozen=True)
class Prediction:
    """Logits of one bag. part: "val" or "test". logits: (C,) before calibration, or the outputs of another target.

    label: the class, or the stratum of another target, whose truth (W,) is then in ``truth``.
    """

    slide_id: str
    case_id: str
    part: str
    label: int
    logits: tuple[float, ...]
    truth: tuple[float, ...] = ()


def truth_of(rows: Sequence[Prediction], target: Target) -> NDArray[Any]:
    """The truth of predictions: int64 (N,) classes, or float64 (N, W) of another target."""
    if rows and rows[0].truth:
        return np.array([p.truth for p in rows], np.float64)
    if rows or isinstance(target, Classification):
        return np.array([p.label for p in rows], np.int64)
    return np.empty((0, len(target.truth_names)))


def write_predictions(
    out: Path,
    predictions: Sequence[Prediction],
    card: ModelCard,
    calibrated: NDArray[np.float64] | None = None,
) -> None:
    """Write ``predictions.csv``, ``predictions-cases.csv`` where a case has several slides, and ``target.json`` where
    the target is no plain class. calibrated: as of ``predictions_csv``. Raises OutputError when one cannot be written.
    """
    write_text_atomically(out / PREDICTIONS_NAME, predictions_csv(predictions, card, calibrated))
    if calibrated is None:
        by_case = case_predictions_csv(predictions, card.target)
    else:
        logs = np.log(np.maximum(calibrated, 1e-300)).tolist()
        rows = [replace(p, logits=tuple(own)) for p, own in zip(predictions, logs, strict=True)]
        by_case = case_predictions_csv(rows, Classification(classes=card.classes))
    if by_case is not None:
        write_text_atomically(out / CASE_PREDICTIONS_NAME, by_case)
    if card.target_state:
        text = json.dumps(dict(card.target_state), indent=1, allow_nan=False)
        write_text_atomically(out / TARGET_NAME, text + "\n")


def predictions_csv(
    predictions: Sequence[Prediction], card: ModelCard, calibrated: NDArray[np.float64] | None = None
) -> str:
    """The table of predictions: ids, part, truth, outputs, and what the target says of them (of a class: label, logits
    and calibrated probabilities).

    calibrated: (N, C) probabilities of classes, where they do not follow from the card, as those of an ensemble.
    """
    target = card.target
    outputs = np.array([p.logits for p in predictions], np.float64).reshape(len(predictions), len(card.classes))
    ids: list[list[object]] = [[p.slide_id, p.case_id, p.part] for p in predictions]
    truth = truth_of(predictions, target)
    return _table(["slide_id", "case_id", "part"], ids, target, truth, outputs, calibrated)


def case_predictions_csv(predictions: Sequence[Prediction], target: Target) -> str | None:
    """The table of cases, whose predictions are the mean of those of their slides; None where each has but one.

    A case whose slides are labelled differently has no label here.
    """
    if len({p.case_id for p in predictions}) == len(predictions):
        return None
    found: list[tuple[list[object], NDArray[Any], NDArray[np.float64]]] = []
    for part in dict.fromkeys(p.part for p in predictions):
        rows = [p for p in predictions if p.part == part]
        outputs = np.array([p.logits for p in rows], np.float64)
        cases = averaged(Fold(target, truth_of(rows, target), outputs, tuple(p.case_id for p in rows)), keep_torn=True)
        for k, case in enumerate(cases.fold.cases):
            found.append(([case, part, cases.slides[k]], cases.fold.truth[k], cases.fold.outputs[k]))
    truth = np.array([own for _, own, _ in found])
    return _table(
        ["case_id", "part", "slides"], [ids for ids, _, _ in found], target, truth, np.array([o for *_, o in found])
    )


def _table(
    head: Sequence[str],
    ids: Sequence[list[object]],
    target: Target,
    truth: NDArray[Any],
    outputs: NDArray[np.float64],
    calibrated: NDArray[np.float64] | None = None,
) -> str:
    said = target.said(outputs)
    if calibrated is not None:
        said |= {f"probability_{name}": calibrated[:, c].tolist() for c, name in enumerate(target.outputs)}
    plain = isinstance(target, Classification) and not target.name
    if plain:
        # The class that is called is the most probable one; a column of its own would say nothing new.
        said.pop("predicted")
    names = [f"{'logit' if plain else 'output'}_{name}" for name in target.outputs]
    numbers: list[list[object]] = (
        [[] for _ in ids] if plain else [["" if np.isnan(v) else float(v) for v in row] for row in truth]
    )
    rows: list[list[object]] = [
        [*ids[i], *target.truth_cells(truth[i]), *numbers[i], *outputs[i].tolist(), *(c[i] for c in said.values())]
        for i in range(len(ids))
    ]
    exact = [] if plain else [f"truth_{name}" for name in target.truth_names]
    return csv_text([*head, *target.truth_names, *exact, *names, *said], rows)
