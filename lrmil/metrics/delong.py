"""The test of DeLong, DeLong and Clarke-Pearson (1988) for two AUCs on the same slides.

Placement values come from midranks (Sun and Xu 2014); slides of one case are a cluster (Obuchowski 1997), which equals
DeLong's where each case has one slide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lrmil.errors import FiguresError
from lrmil.metrics.auc import placements
from lrmil.metrics.cases import case_numbers

__all__ = ["DeLong", "delong"]


@dataclass(frozen=True)
class DeLong:
    """Two AUCs with their covariance.

    auc: (A, B). covariance: (2, 2). difference: A minus B, with standard error and 95 % interval. z, p: two-sided test
    that both are equal; NaN, with the reason, where that cannot be computed.
    """

    auc: tuple[float, float]
    covariance: tuple[tuple[float, float], tuple[float, float]]
    difference: float
    standard_error: float
    low: float
    high: float
    z: float
    p: float
    reason: str | None = None


def delong(labels: ArrayLike, scores_a: ArrayLike, scores_b: ArrayLike, cases: Sequence[str] | None = None) -> DeLong:
    """Compare the AUCs of two scores of the same slides.

    labels: (N,), 1 or True for positive. scores: (N,), higher for positive. cases: of each slide; slides of a case
    may have different labels. Raises FiguresError when the lengths differ.
    """
    from scipy.stats import norm

    positive = np.asarray(labels).astype(bool)
    scores = np.stack([np.asarray(scores_a, np.float64), np.asarray(scores_b, np.float64)])
    if positive.ndim != 1 or scores.shape != (2, len(positive)):
        raise FiguresError(f"labels {positive.shape} and scores {scores.shape[1:]} do not fit")
    m, n = int(positive.sum()), int((~positive).sum())
    if min(m, n) == 0:
        nan = float("nan")
        none = ((nan, nan), (nan, nan))
        return DeLong((nan, nan), none, nan, nan, nan, nan, nan, nan, "all slides are of one class")
    v10, v01 = placements(positive, scores)
    auc = v10.mean(axis=1)
    a, b = float(auc[0]), float(auc[1])
    clusters = case_numbers(cases, len(positive))
    covariance, reason = _covariance(positive, clusters, v10 - auc[:, None], v01 - auc[:, None])
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    difference = a - b
    # Rounding leaves some 1e-17 where two equal scores should leave nothing.
    error = float(np.sqrt(variance)) if variance > 1e-14 else 0.0
    if reason is None and error > 0:
        z = difference / error
        p = float(2 * norm.sf(abs(z)))
    else:
        z = float("nan")
        p = 1.0 if reason is None and difference == 0 else float("nan")
        reason = reason or "the difference does not vary between slides"
    half = float(norm.isf(0.025)) * error
    rows = ((float(covariance[0, 0]), float(covariance[0, 1])), (float(covariance[1, 0]), float(covariance[1, 1])))
    return DeLong((a, b), rows, difference, error, difference - half, difference + half, z, p, reason)


def _covariance(
    positive: NDArray[np.bool_], clusters: NDArray[np.int64], d10: NDArray[np.float64], d01: NDArray[np.float64]
) -> tuple[NDArray[np.float64], str | None]:
    """Covariance (K, K) of the AUCs from centred placements, summed within clusters (Obuchowski 1997, eq. 4 to 6)."""
    m, n = int(positive.sum()), int((~positive).sum())
    count = int(clusters.max()) + 1
    in_pos = np.bincount(clusters[positive], minlength=count) > 0
    in_neg = np.bincount(clusters[~positive], minlength=count) > 0
    i10, i01 = int(in_pos.sum()), int(in_neg.sum())
    if i10 < 2 or i01 < 2:
        return np.full((2, 2), np.nan), "a class has fewer than two cases"
    sum10 = np.stack([np.bincount(clusters[positive], weights=row, minlength=count) for row in d10])
    sum01 = np.stack([np.bincount(clusters[~positive], weights=row, minlength=count) for row in d01])
    s10 = i10 / ((i10 - 1) * m) * (sum10 @ sum10.T)
    s01 = i01 / ((i01 - 1) * n) * (sum01 @ sum01.T)
    s11 = count / (count - 1) * (sum10 @ sum01.T)
    return np.asarray(s10 / m + s01 / n + (s11 + s11.T) / (m * n)), None
