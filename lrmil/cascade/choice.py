"""Which score of uncertainty tells best where low resolution loses, found on cases that do not set the threshold.

A score chosen on the calibration cases would make the threshold look safer than it is. So some cases are put aside for
the choice alone, or the score is named beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lrmil.cascade.control import least_cases
from lrmil.cascade.scores import SCORES
from lrmil.metrics.auc import placements

__all__ = ["CHOICE_SHARE", "ScoreChoice", "choose_score", "put_aside"]

Array = NDArray[np.float64]
CHOICE_SHARE = 0.2
"""Of the cases, for the choice of the score."""
CLEARLY_BETTER = 0.01
"""By how much another score's area must exceed that of one that is preferred."""


@dataclass(frozen=True)
class ScoreChoice:
    """The score, why in words, and how well each told the slides that lose: area under the ROC curve, NaN for none."""

    score: str
    said: str
    areas: Mapping[str, float]


def put_aside(cases: NDArray[np.int64], risk: float, confidence: float | None, seed: int = 0) -> NDArray[np.bool_]:
    """The slides of cases that choose the score, bool (N,): ``CHOICE_SHARE`` of them, drawn without looking at losses.

    cases: int64 (N,), numbers from 0. None are put aside where the rest would be too few for the promise.
    """
    count = int(cases.max()) + 1 if len(cases) else 0
    aside = int(CHOICE_SHARE * count)
    if count - aside < least_cases(risk, confidence):
        return np.zeros(len(cases), bool)
    chosen = np.zeros(count, bool)
    chosen[np.random.default_rng(seed).permutation(count)[:aside]] = True
    return np.asarray(chosen[cases])


def choose_score(scores: Mapping[str, Array], lost: Array) -> ScoreChoice:
    """The score that orders slides that lose above those that do not, by the area under its ROC curve.

    scores: float64 (N,) each, of slides put aside. lost: float64 (N,), what keeping a slide at low resolution loses.
    Where no slide was put aside, or all or none of them lose, it is the first of ``SCORES``.
    """
    names = [name for name in SCORES if name in scores]
    positive = lost > 0
    if not len(lost) or positive.all() or not positive.any():
        why = (
            "no cases could be put aside to choose" if not len(lost) else "the cases put aside do not tell scores apart"
        )
        return ScoreChoice(names[0], f"{names[0]}: {why}", dict.fromkeys(names, float("nan")))
    above, _ = placements(positive, np.stack([scores[name] for name in names]))
    areas = dict(zip(names, above.mean(axis=1).tolist(), strict=True))
    best = max(areas.values())
    score = next(name for name in names if areas[name] >= best - CLEARLY_BETTER)
    found = ", ".join(f"{name} {area:.3f}" for name, area in areas.items())
    return ScoreChoice(score, f"{score}: on {len(lost)} slides put aside, area over slides that lose: {found}", areas)
