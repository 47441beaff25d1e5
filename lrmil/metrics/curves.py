"""The ROC curve with its band by drawing cases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lrmil.errors import FiguresError
from lrmil.metrics.bootstrap import resample_weights
from lrmil.metrics.cases import case_numbers
from lrmil.metrics.figures import Array

__all__ = ["Roc", "roc_curve"]

GRID = 201


class Roc(NamedTuple):
    """An ROC curve, and its 95 % band.

    fpr, tpr: corners of the curve, float64 (K,), from (0, 0) to (1, 1). grid: false-positive rates, (201,). low, high:
    2.5 and 97.5 percentiles of the true-positive rate there; NaN where fewer than two cases of a class exist.
    """

    fpr: Array
    tpr: Array
    grid: Array
    low: Array
    high: Array


def roc_curve(
    positive: ArrayLike,
    scores: ArrayLike,
    cases: Sequence[str] | None = None,
    *,
    replicates: int = 1000,
    seed: int = 0,
) -> Roc:
    """The ROC of scores (N,), higher for positive (N,), with a pointwise bootstrap band by case.

    Raises FiguresError when there is no positive or no negative.
    """
    y, s = np.asarray(positive, bool), np.asarray(scores, np.float64)
    if y.shape != s.shape or y.ndim != 1 or y.all() or not y.any():
        raise FiguresError("an ROC curve needs scores of positives and negatives")
    order = np.argsort(-s, kind="stable")
    last = np.flatnonzero(np.append(s[order][1:] != s[order][:-1], True))
    grid = np.linspace(0, 1, GRID)

    def rates(weights: Array) -> tuple[Array, Array]:
        w = weights[:, order]
        pos = np.cumsum(w * y[order], axis=1)[:, last]
        neg = np.cumsum(w * ~y[order], axis=1)[:, last]
        start = np.zeros((len(w), 1))
        with np.errstate(invalid="ignore"):
            return np.hstack([start, neg / neg[:, -1:]]), np.hstack([start, pos / pos[:, -1:]])

    fpr, tpr = rates(np.ones((1, len(y))))
    numbers = case_numbers(cases, len(y))
    drawn = resample_weights(numbers, replicates, np.random.default_rng(seed))
    many_fpr, many_tpr = rates(drawn)
    defined = np.isfinite(many_fpr[:, -1]) & np.isfinite(many_tpr[:, -1])
    heights = np.array([upper_edge(f, t, grid) for f, t in zip(many_fpr[defined], many_tpr[defined], strict=True)])
    enough = min(len(set(numbers[y].tolist())), len(set(numbers[~y].tolist()))) >= 2 and len(heights)
    low, high = np.percentile(heights, [2.5, 97.5], axis=0) if enough else np.full((2, GRID), np.nan)
    return Roc(fpr[0], tpr[0], grid, low, high)


def upper_edge(fpr: Array, tpr: Array, grid: Array) -> NDArray[np.float64]:
    """The curve over ``grid``; where it rises straight up, its top."""
    # np.interp takes the last of equal abscissae, which is the top of a vertical step.
    return np.asarray(np.interp(grid, fpr, tpr))
