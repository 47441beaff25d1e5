"""Intervals of AUCs, of their means and of their differences, that hold near 1 and with few cases.

A percentile bootstrap of an AUC near 1 covers far less than it says, and is of width 0 where the sample's AUC is 1.
Here two intervals are cut with each other:

- the logit of the AUC with DeLong's variance, after one pseudo-case of a small weight and a placement of one half was
  added to each class, so that neither the AUC nor the variance can reach the end of its range (as Agresti and Coull
  1998 do for a proportion);
- the score interval of Newcombe (2006, "Part 2", method 5), whose variance is that of Hanley and McNeil (1982) at the
  AUC that is tested, made wider by ``SCORE_WIDER``; it keeps the first from growing beyond reason with few cases.

The constants were set so that simulated coverage holds: ``benchmarks/interval_coverage.py`` prints it. Several AUCs are
averaged by the method of variance estimates recovery (MOVER: Zou and Donner 2008, Newcombe 2011), with correlations
from DeLong's placements, summed within cases (Obuchowski 1997). Differences on the same slides have DeLong's variance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lrmil.errors import FiguresError

__all__ = ["LEAST_CASES", "Auc", "AucInterval", "auc_difference", "mean_auc", "one_auc", "placements"]

Array = NDArray[np.float64]

LEAST_CASES = 5
"""With fewer cases of a class there is no interval: it would hold nothing but the width of the question."""

PSEUDO_PLACEMENT = 0.5
SCORE_WIDER = 1.8
PSEUDO_DIFFERENCE = 0.0625
"""A quarter of a case whose placements differ by one half, squared."""
STEPS = 45
"""Halvings of an interval of length 1: to 3e-14."""


@dataclass(frozen=True)
class Auc:
    """An AUC and what its uncertainty is made of.

    value: NaN where a class is missing. positives, negatives: cases that have slides of the class. pos, neg: what each
    case adds to the AUC's error by its slides of either class, float64 (cases,): the mean over its class's cases of
    DeLong's placements less the AUC. members: which cases it rests on, bool (cases,).
    of_class: which class is the positive one.
    """

    value: float
    positives: int
    negatives: int
    pos: Array
    neg: Array
    members: NDArray[np.bool_]
    of_class: int = 1

    def shares_cases(self, other: Auc) -> bool:
        """Whether some case is in both."""
        return bool((self.members & other.members).any())

    def interval(self, z: float) -> tuple[float, float]:
        """Lower and upper end at ``z`` standard deviations; NaN where the AUC is."""
        if np.isnan(self.value):
            return np.nan, np.nan
        low, high = _augmented(self, z)
        least, greatest = _score(self.value, self.positives, self.negatives, z)
        return max(low, least), min(high, greatest)


@dataclass(frozen=True)
class AucInterval:
    """A mean of AUCs, or a difference, with its 95 % interval; where there is none, NaN ends and the reason."""

    value: float
    low: float
    high: float
    p: float
    reason: str | None = None


def placements(positive: NDArray[np.bool_], scores: Array) -> tuple[Array, Array]:
    """Part of the negatives below each positive, (K, m), of the positives above each negative, (K, n); ties half.

    scores: (K, N). From midranks (Sun and Xu 2014).
    """
    from scipy.stats import rankdata

    m, n = int(positive.sum()), int((~positive).sum())
    overall = rankdata(scores, axis=1)
    among_pos = rankdata(scores[:, positive], axis=1)
    among_neg = rankdata(scores[:, ~positive], axis=1)
    v10 = (overall[:, positive] - among_pos) / n
    v01 = 1 - (overall[:, ~positive] - among_neg) / m
    return np.asarray(v10), np.asarray(v01)


def one_auc(positive: ArrayLike, scores: ArrayLike, cases: NDArray[np.int64], count: int, of_class: int = 1) -> Auc:
    """The AUC of scores, higher for positive, by slide.

    positive: bool (N,). scores: float (N,). cases: case number of each slide, below ``count``, the number of cases of
    all AUCs that will be put together. Raises FiguresError when the shapes differ.
    """
    y, s = np.asarray(positive, bool), np.asarray(scores, np.float64)
    if y.ndim != 1 or s.shape != y.shape or cases.shape != y.shape:
        raise FiguresError(f"labels {y.shape}, scores {s.shape} and cases {cases.shape} do not fit")
    m, n = int(y.sum()), int((~y).sum())
    members = np.bincount(cases, minlength=count) > 0
    if min(m, n) == 0:
        return Auc(np.nan, m, n, np.zeros(count), np.zeros(count), members, of_class)
    v10, v01 = (part[0] for part in placements(y, s[None]))
    value = float(v10.mean())
    by_pos = np.bincount(cases[y], weights=v10 - value, minlength=count) / m
    by_neg = np.bincount(cases[~y], weights=v01 - value, minlength=count) / n
    return Auc(value, len(np.unique(cases[y])), len(np.unique(cases[~y])), by_pos, by_neg, members, of_class)


def _pseudo_weight(positives: int, negatives: int) -> float:
    """Weight of the pseudo-case: a fifth of a case where there are few, up to three fifths where there are many."""
    share = positives * negatives / (positives + negatives)
    return 0.2 + 0.4 * share / (share + 40)


def _augmented(auc: Auc, z: float) -> tuple[float, float]:
    w, p = _pseudo_weight(auc.positives, auc.negatives), PSEUDO_PLACEMENT
    variance, centre = 0.0, 0.0
    for cases, part in ((auc.positives, auc.pos), (auc.negatives, auc.neg)):
        total = cases + w
        centre += (cases * auc.value + w * p) / total / 2
        squares = float(part @ part) * cases**2 + w * cases / total * (auc.value - p) ** 2
        # A class of one case has no spread of its own; the pseudo-case gives it one.
        variance += squares / total / max(total - 1, w)
    # Cases with slides of both classes; a negative sum may be chance, so it does not take away more than half.
    variance = max(variance + 2 * float(auc.pos @ auc.neg), variance / 2)
    half = z * np.sqrt(variance) / (centre * (1 - centre))
    at = np.log(centre / (1 - centre))
    return float(1 / (1 + np.exp(half - at))), float(1 / (1 + np.exp(-half - at)))


def _score(value: float, m: int, n: int, z: float) -> tuple[float, float]:
    """All AUCs that the sample's does not contradict, with the variance that each of them implies."""
    middle = (m + n) / 2 - 1

    def far(theta: float) -> bool:
        shape = 1 + middle * (1 - theta) / (2 - theta) + middle * theta / (1 + theta)
        return bool(abs(value - theta) > z * np.sqrt(SCORE_WIDER * theta * (1 - theta) * shape / (m * n)))

    ends = []
    for out, inside in ((0.0, value), (1.0, value)):
        for _ in range(STEPS):
            middle_of = (out + inside) / 2
            out, inside = (middle_of, inside) if far(middle_of) else (out, middle_of)
        ends.append(inside)
    return ends[0], ends[1]


def mean_auc(aucs: Sequence[Auc], *, level: float = 0.95) -> AucInterval:
    """The mean of AUCs over one numbering of cases (folds, or classes against the rest), with its interval by MOVER.

    AUCs that are undefined are left out. No interval where some class has fewer than ``LEAST_CASES`` cases.
    """
    from scipy.stats import norm

    there = [auc for auc in aucs if not np.isnan(auc.value)]
    if not there:
        return AucInterval(np.nan, np.nan, np.nan, np.nan, "undefined")
    values = np.array([auc.value for auc in there])
    value = float(values.mean())
    reason = _too_few(there)
    if reason:
        return AucInterval(value, np.nan, np.nan, np.nan, reason)
    correlation = _correlation(there)
    each = np.array([auc.interval(float(norm.isf((1 - level) / 2))) for auc in there])
    down, up = values - each[:, 0], each[:, 1] - values
    low = value - float(np.sqrt(max(down @ correlation @ down, 0.0))) / len(there)
    high = value + float(np.sqrt(max(up @ correlation @ up, 0.0))) / len(there)
    return AucInterval(value, max(low, 0.0), min(high, 1.0), np.nan)


def auc_difference(a: Sequence[Auc], b: Sequence[Auc], *, null: float = 0.0, level: float = 0.95) -> AucInterval:
    """The mean of A's AUCs less the mean of B's on the same slides and cases, pair by pair.

    DeLong's variance over cases, with one pseudo-case a class whose placements differ by one half: where both order
    all slides alike nothing differs in the sample, and yet the difference is not known exactly. Pairs in which either
    is undefined are left out. p: two-sided, that the difference is ``null``. No interval where some class has fewer
    than ``LEAST_CASES`` cases.
    """
    from scipy.stats import norm

    pairs = [(x, y) for x, y in zip(a, b, strict=True) if not np.isnan(x.value + y.value)]
    if not pairs:
        return AucInterval(np.nan, np.nan, np.nan, np.nan, "undefined in every fold")
    k = len(pairs)
    value = sum(x.value - y.value for x, y in pairs) / k
    reason = _too_few([x for x, _ in pairs])
    if reason:
        return AucInterval(value, np.nan, np.nan, np.nan, reason)
    error = np.zeros(len(pairs[0][0].pos))
    pseudo = 0.0
    for x, y in pairs:
        for cases, first, second in ((x.positives, x.pos, y.pos), (x.negatives, x.neg, y.neg)):
            free = max(cases - 1, 0.5)
            error += (first - second) * np.sqrt(cases / free) / k
            pseudo += PSEUDO_DIFFERENCE / (cases * free) / k**2
    spread = float(np.sqrt(error @ error + pseudo))
    half = float(norm.isf((1 - level) / 2)) * spread
    p = float(2 * norm.sf(abs(value - null) / spread))
    return AucInterval(value, max(value - half, -1.0), min(value + half, 1.0), p)


def _too_few(aucs: Sequence[Auc]) -> str | None:
    # Folds test different cases, which add up; of classes against the rest the rarest counts.
    groups: dict[int, tuple[int, int]] = {}
    for auc in aucs:
        positives, negatives = groups.get(auc.of_class, (0, 0))
        groups[auc.of_class] = (positives + auc.positives, negatives + auc.negatives)
    least = min(min(counts) for counts in groups.values())
    return f"too few cases: {least} of a class, {LEAST_CASES} are needed" if least < LEAST_CASES else None


def _correlation(aucs: Sequence[Auc]) -> Array:
    """Correlations of the AUCs' errors: 0 for AUCs of other cases, 1 where one shows no error to correlate."""
    errors = [auc.pos + auc.neg for auc in aucs]
    out = np.eye(len(aucs))
    for i, a in enumerate(aucs):
        for j in range(i):
            b = aucs[j]
            size = float(np.sqrt((errors[i] @ errors[i]) * (errors[j] @ errors[j])))
            if not a.shares_cases(b):
                found = 0.0
            else:
                found = float(np.clip(errors[i] @ errors[j] / size, 0, 1)) if size > 0 else 1.0
            out[i, j] = out[j, i] = found
    return out
