"""Figures with 95 % intervals by case, and paired differences of two classifiers on the same cases.

AUCs and shares have intervals in closed form that hold near 1 (``auc``, ``proportions``); the other figures have those
of a bootstrap that draws cases. An interval of no width is none, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lrmil.errors import FiguresError
from lrmil.metrics.auc import Auc, AucInterval, auc_difference, mean_auc, one_auc
from lrmil.metrics.bootstrap import resample_weights
from lrmil.metrics.cases import case_numbers
from lrmil.metrics.figures import NAMES, Array, check, undefined_reasons, weighted_figures
from lrmil.metrics.proportions import Share, mean_share, share_of

__all__ = [
    "Difference",
    "Estimate",
    "bootstrap_compare",
    "bootstrap_folds",
    "compare",
    "evaluate",
    "evaluate_folds",
    "summarise_folds",
]

Figures = Callable[[Array], Mapping[str, Array]]
"""Figures, name -> (R,), for weights (R, N) of slides."""

LEVEL = 0.95
LEAST_DEFINED = 0.5
"""An interval needs this part of the replicates to be defined."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval; NaN where undefined, and then ``reason`` says why.

    defined: part of the bootstrap replicates in which the figure was defined.
    """

    value: float
    low: float
    high: float
    reason: str | None = None
    defined: float = 1.0


@dataclass(frozen=True)
class Difference:
    """Run A minus run B: the figures, the difference with its 95 % interval, and a two-sided p-value."""

    a: float
    b: float
    value: float
    low: float
    high: float
    p: float
    reason: str | None = None


def evaluate(
    labels: ArrayLike,
    probabilities: ArrayLike,
    cases: Sequence[str] | None = None,
    *,
    classes: Sequence[str] | None = None,
    positive: int = 1,
    replicates: int = 2000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """All figures of ``lrmil.metrics.NAMES`` with 95 % intervals by case.

    labels: int (N,). probabilities: (N, C). cases: of each slide. classes: names for reasons. positive: which of two
    classes is looked for. Bootstrap replicates in which a figure is undefined are left out; where that is more than
    half, the interval is NaN with a reason.
    """
    y, p = check(labels, probabilities)
    names = list(classes) if classes is not None else [f"class {c}" for c in range(p.shape[1])]
    folds = [_Fold(y, p, case_numbers(cases, len(y)))]
    return _estimates(folds, undefined_reasons(y, names), positive, replicates, seed)


def evaluate_folds(
    labels: Sequence[ArrayLike],
    probabilities: Sequence[ArrayLike],
    cases: Sequence[Sequence[str]],
    *,
    positive: int = 1,
    replicates: int = 2000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Figures as means over folds, with 95 % intervals over the cases that each fold tests.

    One entry a fold: labels int (N,), probabilities (N, C), cases. A fold in which a figure is undefined is left out of
    its mean. The interval holds for the models as trained: it says nothing of how training again would differ.
    """
    numbers = case_numbers([case for fold in cases for case in fold], sum(len(np.asarray(y)) for y in labels))
    folds, at = [], 0
    for y, p in zip(labels, probabilities, strict=True):
        checked = check(y, p)
        folds.append(_Fold(*checked, numbers[at : at + len(checked[0])]))
        at += len(checked[0])
    return _estimates(folds, dict.fromkeys(NAMES, "undefined in every fold"), positive, replicates, seed)


@dataclass(frozen=True)
class _Fold:
    """Labels (N,), probabilities (N, C) and case numbers (N,), the same numbering in all folds."""

    y: NDArray[np.int64]
    p: Array
    cases: NDArray[np.int64]

    def aucs(self, positive: int, count: int) -> list[Auc]:
        """The AUC of the positive class, or of each class against the rest."""
        columns = [positive] if self.p.shape[1] == 2 else range(self.p.shape[1])
        return [one_auc(self.y == c, self.p[:, c], self.cases, count, c) for c in columns]

    def shares(self, positive: int) -> dict[str, Share]:
        """Accuracy and recalls."""
        hits = self.p.argmax(axis=1) == self.y
        recalls = [share_of(hits[self.y == c], self.cases[self.y == c]) for c in range(self.p.shape[1])]
        found = {"accuracy": share_of(hits, self.cases), "balanced_accuracy": mean_share(recalls)}
        if len(recalls) == 2:
            found |= {"sensitivity": recalls[positive], "specificity": recalls[1 - positive]}
        return found


def _estimates(
    folds: Sequence[_Fold], reasons: Mapping[str, str], positive: int, replicates: int, seed: int
) -> dict[str, Estimate]:
    numbers = np.concatenate([fold.cases for fold in folds])
    count = int(numbers.max()) + 1
    weights = resample_weights(numbers, replicates, np.random.default_rng(seed))
    ends = np.cumsum([0, *(len(fold.y) for fold in folds)])
    points = [weighted_figures(f.y, f.p, np.ones((1, len(f.y))), positive=positive) for f in folds]
    drawn = [
        weighted_figures(f.y, f.p, weights[:, ends[k] : ends[k + 1]], positive=positive, drawn=True)
        for k, f in enumerate(folds)
    ]
    found = {
        name: _estimate(
            float(_mean_defined(np.array([p[name] for p in points]))[0]),
            _mean_defined(np.array([d[name] for d in drawn])),
            reasons.get(name),
            count,
        )
        for name in NAMES
    }
    if not np.isnan(found["auc"].value):
        # Where classes are several, a fold's AUC is that of its classes together: it needs all of them.
        by_fold = [fold.aucs(positive, count) for fold in folds]
        found["auc"] = _closed(mean_auc([auc for own in by_fold if _defined(own) for auc in own]), found["auc"])
    shares = [fold.shares(positive) for fold in folds]
    for name in shares[0]:
        if not np.isnan(found[name].value):
            found[name] = _closed(mean_share([share[name] for share in shares]), found[name])
    return found


def bootstrap_folds(
    folds: Sequence[tuple[Sequence[str], Figures]], *, replicates: int, seed: int
) -> dict[str, Estimate]:
    """Any figures as means over folds, with 95 % percentile intervals by drawing cases, the same in all folds.

    folds: of each the cases of its N slides, and what gives figures, name -> (R,), for weights (R, N) of these slides.
    """
    numbers = case_numbers([case for cases, _ in folds for case in cases], sum(len(cases) for cases, _ in folds))
    ends = np.cumsum([0, *(len(cases) for cases, _ in folds)])
    weights = resample_weights(numbers, replicates, np.random.default_rng(seed))
    points = [figures(np.ones((1, len(cases)))) for cases, figures in folds]
    drawn = [figures(weights[:, ends[k] : ends[k + 1]]) for k, (_, figures) in enumerate(folds)]
    names = list(dict.fromkeys(name for point in points for name in point))
    absent = np.full(1, np.nan)
    return {
        name: _estimate(
            float(_mean_defined(np.array([point.get(name, absent) for point in points]))[0]),
            _mean_defined(np.array([d.get(name, np.full(replicates, np.nan)) for d in drawn])),
            None,
            int(numbers.max()) + 1,
        )
        for name in names
    }


def bootstrap_compare(
    folds: Sequence[tuple[Sequence[str], Figures, Figures]], *, replicates: int, seed: int
) -> dict[str, Difference]:
    """Differences of any figures of two runs on the same slides, by a paired bootstrap that draws cases.

    folds: of each the cases of its N slides, and what gives the figures of run A and B, see ``bootstrap_folds``. Means
    over folds and p as in ``compare``.
    """
    numbers = case_numbers([case for cases, *_ in folds for case in cases], sum(len(cases) for cases, *_ in folds))
    ends = np.cumsum([0, *(len(cases) for cases, *_ in folds)])
    weights = resample_weights(numbers, replicates, np.random.default_rng(seed))
    points = [(a(np.ones((1, len(cases)))), b(np.ones((1, len(cases))))) for cases, a, b in folds]
    drawn = [
        (a(weights[:, ends[k] : ends[k + 1]]), b(weights[:, ends[k] : ends[k + 1]]))
        for k, (_, a, b) in enumerate(folds)
    ]
    return {name: _difference(name, points, drawn, int(numbers.max()) + 1) for name in points[0][0]}


def _defined(aucs: Sequence[Auc]) -> bool:
    return not any(np.isnan(auc.value) for auc in aucs)


def _closed(interval: AucInterval | Share, other: Estimate) -> Estimate:
    """An estimate whose interval is in closed form instead of the bootstrap's."""
    reason = interval.reason if isinstance(interval, AucInterval) else None
    if isinstance(interval, Share) and interval.cases < 2:
        return Estimate(other.value, np.nan, np.nan, "one case gives no interval", other.defined)
    return Estimate(other.value, interval.low, interval.high, reason, other.defined)


def _interval(drawn: Array) -> tuple[float, float]:
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(drawn[np.isfinite(drawn)], [tail, 100 - tail])
    return float(low), float(high)


def _estimate(value: float, drawn: Array, reason: str | None, cases: int) -> Estimate:
    defined = float(np.isfinite(drawn).mean())
    if np.isnan(value):
        return Estimate(np.nan, np.nan, np.nan, reason or "undefined", defined)
    if cases < 2:
        return Estimate(value, np.nan, np.nan, "one case gives no interval", defined)
    if defined < LEAST_DEFINED:
        return Estimate(value, np.nan, np.nan, f"undefined in {1 - defined:.0%} of the replicates", defined)
    low, high = _interval(drawn)
    if low == high:
        return Estimate(value, np.nan, np.nan, "does not vary between the cases", defined)
    # Drawing shifts a figure that is bounded or bent; the sample's own value is never outside.
    return Estimate(value, min(low, value), max(high, value), None, defined)


def compare(
    labels: Sequence[ArrayLike],
    a: Sequence[ArrayLike],
    b: Sequence[ArrayLike],
    cases: Sequence[Sequence[str]],
    *,
    positive: int = 1,
    replicates: int = 2000,
    seed: int = 0,
) -> dict[str, Difference]:
    """Differences of two runs on the same slides, by case, with 95 % intervals: in closed form for the AUC (see
    ``auc_difference``), by a paired bootstrap, which draws the same cases for both, for the other figures.

    labels, a, b, cases: one entry a fold: int (N,), probabilities (N, C) of run A and B on the same slides, cases. A
    case that is in several folds is drawn in all of them together. A figure is its mean over the folds in which it is
    defined for both. p is twice the smaller tail of the difference at 0, not below 1 / (replicates + 1).
    """
    if not labels or not len(labels) == len(a) == len(b) == len(cases):
        raise FiguresError("compare needs the same folds of both runs, at least one")
    checked = [(check(y, p), check(y, q)) for y, p, q in zip(labels, a, b, strict=True)]
    numbers = case_numbers([case for fold in cases for case in fold], sum(len(c[0][0]) for c in checked))
    weights = resample_weights(numbers, replicates, np.random.default_rng(seed))
    ends = np.cumsum([0, *(len(c[0][0]) for c in checked)])
    points: list[tuple[Mapping[str, Array], Mapping[str, Array]]] = []
    drawn: list[tuple[Mapping[str, Array], Mapping[str, Array]]] = []
    for k, ((y, p), (_, q)) in enumerate(checked):
        ones, w = np.ones((1, len(y))), weights[:, ends[k] : ends[k + 1]]
        points.append(
            (weighted_figures(y, p, ones, positive=positive), weighted_figures(y, q, ones, positive=positive))
        )
        drawn.append(
            (
                weighted_figures(y, p, w, positive=positive, drawn=True),
                weighted_figures(y, q, w, positive=positive, drawn=True),
            )
        )
    count = int(numbers.max()) + 1
    found = {name: _difference(name, points, drawn, count) for name in NAMES}
    if not np.isnan(found["auc"].value):
        first: list[Auc] = []
        second: list[Auc] = []
        for k, ((y, p), (_, q)) in enumerate(checked):
            inside = numbers[ends[k] : ends[k + 1]]
            of_a, of_b = (_Fold(y, r, inside).aucs(positive, count) for r in (p, q))
            if _defined(of_a):
                first += of_a
                second += of_b
        closed = auc_difference(first, second)
        old = found["auc"]
        found["auc"] = Difference(old.a, old.b, old.value, closed.low, closed.high, closed.p, closed.reason)
    return found


def _difference(
    name: str,
    points: Sequence[tuple[Mapping[str, Array], Mapping[str, Array]]],
    drawn: Sequence[tuple[Mapping[str, Array], Mapping[str, Array]]],
    cases: int,
) -> Difference:
    value_a = _mean_defined(np.array([p[name] for p, _ in points]))[0]
    value_b = _mean_defined(np.array([q[name] for _, q in points]))[0]
    delta = _mean_defined(np.array([p[name] - q[name] for p, q in drawn]))
    delta = delta[np.isfinite(delta)]
    value = float(value_a - value_b)
    if np.isnan(value):
        return Difference(float(value_a), float(value_b), np.nan, np.nan, np.nan, np.nan, "undefined in every fold")
    if cases < 2 or len(delta) < LEAST_DEFINED * len(next(iter(drawn))[0][name]):
        reason = "one case gives no interval" if cases < 2 else "undefined in most replicates"
        return Difference(float(value_a), float(value_b), value, np.nan, np.nan, np.nan, reason)
    tail = min((delta <= 0).mean(), (delta >= 0).mean())
    p = min(1.0, max(2 * float(tail), 1 / (len(delta) + 1)))
    low, high = _interval(delta)
    if low == high:
        reason = "does not vary between the cases"
        return Difference(float(value_a), float(value_b), value, np.nan, np.nan, p, reason)
    return Difference(float(value_a), float(value_b), value, min(low, value), max(high, value), p)


def _mean_defined(values: Array) -> Array:
    """Mean over the first axis of what is not NaN; NaN where nothing is."""
    there = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(there, values, 0).sum(axis=0) / there.sum(axis=0))


def summarise_folds(folds: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Mean, standard deviation (n - 1), least, greatest and number of the folds in which each figure is defined."""
    result = {}
    for name in folds[0] if folds else ():
        values = np.array([fold[name] for fold in folds], np.float64)
        values = values[np.isfinite(values)]
        spread = float(values.std(ddof=1)) if len(values) > 1 else np.nan
        ends = (float(values.min()), float(values.max())) if len(values) else (np.nan, np.nan)
        mean = float(values.mean()) if len(values) else np.nan
        result[name] = {"mean": mean, "std": spread, "min": ends[0], "max": ends[1], "folds": float(len(values))}
    return result
