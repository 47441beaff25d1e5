"""Intervals by drawing cases, and paired differences of two classifiers on the same cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lrmil.errors import FiguresError
from lrmil.metrics.figures import NAMES, Array, check, undefined_reasons, weighted_figures

__all__ = ["Difference", "Estimate", "compare", "evaluate", "evaluate_folds", "resample_weights", "summarise_folds"]

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


def case_numbers(cases: Sequence[str] | None, n: int) -> NDArray[np.int64]:
    """A number from 0 for each slide's case; every slide its own case where none are given."""
    if cases is None:
        return np.arange(n)
    if len(cases) != n:
        raise FiguresError(f"{len(cases)} cases do not fit {n} slides")
    return np.unique(np.asarray(cases, str), return_inverse=True)[1].astype(np.int64)


def resample_weights(cases: NDArray[np.int64], replicates: int, rng: np.random.Generator) -> Array:
    """How often each slide is in each replicate, (R, N): whole cases are drawn with replacement."""
    count = int(cases.max()) + 1
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=replicates)
    return drawn[:, cases].astype(np.float64)


def evaluate(
    labels: ArrayLike,
    probabilities: ArrayLike,
    cases: Sequence[str] | None = None,
    *,
    classes: Sequence[str] | None = None,
    replicates: int = 2000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """All figures of ``lrmil.metrics.NAMES`` with 95 % percentile bootstrap intervals by case.

    labels: int (N,). probabilities: (N, C). cases: of each slide. classes: names for reasons. Replicates in which a
    figure is undefined are left out; where that is more than half, the interval is NaN with a reason.
    """
    y, p = check(labels, probabilities)
    names = list(classes) if classes is not None else [f"class {c}" for c in range(p.shape[1])]
    reasons = undefined_reasons(y, names)
    numbers = case_numbers(cases, len(y))
    point = weighted_figures(y, p, np.ones((1, len(y))))
    drawn = weighted_figures(y, p, resample_weights(numbers, replicates, np.random.default_rng(seed)))
    return {
        name: _estimate(float(point[name][0]), drawn[name], reasons.get(name), int(numbers.max()) + 1) for name in NAMES
    }


def evaluate_folds(
    labels: Sequence[ArrayLike],
    probabilities: Sequence[ArrayLike],
    cases: Sequence[Sequence[str]],
    *,
    replicates: int = 2000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Figures as means over folds, with 95 % intervals by drawing the cases that each fold tests.

    One entry a fold: labels int (N,), probabilities (N, C), cases. A fold in which a figure is undefined is left out of
    its mean. The interval holds for the models as trained: it says nothing of how training again would differ.
    """
    checked = [check(y, p) for y, p in zip(labels, probabilities, strict=True)]
    numbers = case_numbers([case for fold in cases for case in fold], sum(len(y) for y, _ in checked))
    weights = resample_weights(numbers, replicates, np.random.default_rng(seed))
    ends = np.cumsum([0, *(len(y) for y, _ in checked)])
    points = [weighted_figures(y, p, np.ones((1, len(y)))) for y, p in checked]
    drawn = [weighted_figures(y, p, weights[:, ends[k] : ends[k + 1]]) for k, (y, p) in enumerate(checked)]
    count = int(numbers.max()) + 1
    return {
        name: _estimate(
            float(_mean_defined(np.array([p[name] for p in points]))[0]),
            _mean_defined(np.array([d[name] for d in drawn])),
            "undefined in every fold",
            count,
        )
        for name in NAMES
    }


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
    return Estimate(value, *_interval(drawn), None, defined)


def compare(
    labels: Sequence[ArrayLike],
    a: Sequence[ArrayLike],
    b: Sequence[ArrayLike],
    cases: Sequence[Sequence[str]],
    *,
    replicates: int = 2000,
    seed: int = 0,
) -> dict[str, Difference]:
    """Paired bootstrap of two runs, by case: the same cases are drawn for both.

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
        points.append((weighted_figures(y, p, ones), weighted_figures(y, q, ones)))
        drawn.append((weighted_figures(y, p, w), weighted_figures(y, q, w)))
    return {name: _difference(name, points, drawn, int(numbers.max()) + 1) for name in NAMES}


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
    return Difference(float(value_a), float(value_b), value, *_interval(delta), p)


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
