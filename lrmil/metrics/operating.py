"""Operating points: a threshold chosen on validation cases, and what it comes to on others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lrmil.errors import FiguresError
from lrmil.metrics.cases import case_numbers
from lrmil.metrics.proportions import Share, share_of

__all__ = ["OperatingPoint", "at_threshold", "threshold_at_sensitivity"]


@dataclass(frozen=True)
class OperatingPoint:
    """What calling every slide of at least ``threshold`` positive comes to; NaN where nothing is counted.

    wanted: the sensitivity that the threshold was chosen for, on other cases. ppv, npv: share of those called positive,
    and negative, that are; both depend on the prevalence, the share of positives.
    """

    wanted: float
    threshold: float
    prevalence: float
    sensitivity: Share
    specificity: Share
    ppv: Share
    npv: Share


def threshold_at_sensitivity(positive: ArrayLike, scores: ArrayLike, sensitivity: float) -> float:
    """The highest threshold at which at least that share of the positives is called so.

    positive: bool (N,). scores: (N,), higher for positive. Raises FiguresError when there is no positive, or the
    sensitivity is not above 0 and at most 1.
    """
    y, s = np.asarray(positive, bool), np.asarray(scores, np.float64)
    if not 0 < sensitivity <= 1:
        raise FiguresError(f"a sensitivity of {sensitivity} is not above 0 and at most 1")
    if not y.any():
        raise FiguresError("no validation slide is positive, so no threshold can be chosen")
    ranked = np.sort(s[y])[::-1]
    # Less a hair: 0.95 of 20 is 19, not 20.
    needed = int(np.ceil(sensitivity * len(ranked) - 1e-9))
    return float(ranked[needed - 1])


def at_threshold(
    positive: ArrayLike, scores: ArrayLike, cases: Sequence[str] | None, threshold: float, wanted: float
) -> OperatingPoint:
    """Figures at a threshold, with 95 % intervals by case. positive: bool (N,). scores: (N,)."""
    y, called = np.asarray(positive, bool), np.asarray(scores, np.float64) >= threshold
    numbers = case_numbers(cases, len(y))

    def share(of: NDArray[np.bool_], hits: NDArray[np.bool_]) -> Share:
        return share_of(hits[of], numbers[of])

    return OperatingPoint(
        wanted,
        threshold,
        float(y.mean()) if len(y) else np.nan,
        share(y, called),
        share(~y, ~called),
        share(called, y),
        share(~called, ~y),
    )
