"""Figures of times that may be cut short: Kaplan and Meier, log-rank, concordance, time-dependent AUC, Breslow.

Everywhere ``time`` is float (N,), above or at 0, and ``event`` bool (N,): True where the event was seen at that time,
False where the case was last seen without it (right-censored). A case that is censored at the time of an event counts
as still at risk then, as in lifelines and scikit-survival.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lrmil.errors import FiguresError

__all__ = [
    "HazardRatio",
    "KaplanMeier",
    "LogRank",
    "baseline_hazard",
    "censoring_survival",
    "concordance",
    "concordance_pairs",
    "cumulative_dynamic_auc",
    "dynamic_pairs",
    "hazard_ratio",
    "kaplan_meier",
    "logrank",
    "weighted_ratio",
]

Array = NDArray[np.float64]
Z95 = 1.959963984540054
CHUNK_BYTES = 64 << 20


class KaplanMeier(NamedTuple):
    """A survival curve: at each distinct time, float64 (K,), what is left after it.

    times: ascending, from 0. survival: 1 at 0. low, high: the 95 % band of Greenwood's variance on the scale of
    log(-log S), which stays between 0 and 1; 1 before the first event, NaN where nothing is left. at_risk: just before
    each time.
    """

    times: Array
    survival: Array
    low: Array
    high: Array
    at_risk: NDArray[np.int64]

    def at(self, times: ArrayLike) -> Array:
        """Survival at times (M,): the value of the last step at or before each."""
        place = np.searchsorted(self.times, np.asarray(times, np.float64), side="right") - 1
        return np.asarray(self.survival[np.maximum(place, 0)])

    @property
    def median(self) -> float:
        """The first time at which at most half is left; infinite where more is left to the end."""
        below = np.flatnonzero(self.survival <= 0.5)
        return float(self.times[below[0]]) if len(below) else float("inf")


class LogRank(NamedTuple):
    """The log-rank test that groups share one hazard. statistic: chi-squared with ``freedom`` degrees of freedom."""

    statistic: float
    freedom: int
    p: float


def checked(time: ArrayLike, event: ArrayLike) -> tuple[Array, NDArray[np.bool_]]:
    """Times float64 (N,) and events bool (N,). Raises FiguresError for other shapes, and times that are no times."""
    t, e = np.asarray(time, np.float64), np.asarray(event).astype(bool)
    if t.ndim != 1 or t.shape != e.shape:
        raise FiguresError(f"times {t.shape} and events {e.shape} do not fit: (N,) and (N,) are needed")
    if not (t >= 0).all() or not np.isfinite(t).all():
        raise FiguresError("a time is negative, infinite or NaN")
    return t, e


def kaplan_meier(time: ArrayLike, event: ArrayLike) -> KaplanMeier:
    """The product-limit estimate (Kaplan and Meier 1958) with Greenwood's (1926) band."""
    t, e = checked(time, event)
    times, events, at_risk = _steps(t, e)
    with np.errstate(divide="ignore", invalid="ignore"):
        survival = np.cumprod(1 - events / at_risk)
        variance = np.cumsum(events / (at_risk * (at_risk - events)))
        log = np.log(survival)
        width = Z95 * np.sqrt(variance) / -log
        low, high = survival ** np.exp(width), survival ** np.exp(-width)
    untouched = survival == 1
    low, high = np.where(untouched, 1.0, low), np.where(untouched, 1.0, high)
    gone = survival == 0
    low, high = np.where(gone, np.nan, low), np.where(gone, np.nan, high)
    return KaplanMeier(
        np.concatenate([[0.0], times]),
        np.concatenate([[1.0], survival]),
        np.concatenate([[1.0], low]),
        np.concatenate([[1.0], high]),
        np.concatenate([[len(t)], at_risk]).astype(np.int64),
    )


def _steps(t: Array, e: NDArray[np.bool_]) -> tuple[Array, Array, Array]:
    """Distinct times, events at each, and how many are at risk just before it; float64 (K,) each."""
    times, place = np.unique(t, return_inverse=True)
    events = np.bincount(place, weights=e, minlength=len(times))
    left = np.bincount(place, minlength=len(times))
    at_risk = len(t) - np.concatenate([[0], np.cumsum(left)[:-1]]) if len(t) else left
    return times, events.astype(np.float64), at_risk.astype(np.float64)


def logrank(time: ArrayLike, event: ArrayLike, groups: ArrayLike) -> LogRank:
    """Whether groups (N,) differ in hazard (Mantel 1966); NaN where fewer than two groups, or no event, are there."""
    from scipy.stats import chi2

    t, e = checked(time, event)
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < 2 or not e.any():
        return LogRank(np.nan, max(len(names) - 1, 0), np.nan)
    at = np.unique(t[e])
    member = np.eye(len(names))[group]
    at_risk = (t[:, None] >= at[None, :]).T.astype(float) @ member
    died = ((t[:, None] == at[None, :]) & e[:, None]).T.astype(float) @ member
    n, d = at_risk.sum(1), died.sum(1)
    share = at_risk / n[:, None]
    observed, expected = died.sum(0), (d[:, None] * share).sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = np.where(n > 1, d * (n - d) / (n - 1), 0.0)
    variance = np.einsum("k,kg,gh->gh", factor, share, np.eye(len(names))) - np.einsum(
        "k,kg,kh->gh", factor, share, share
    )
    off = (observed - expected)[:-1]
    inner = variance[:-1, :-1]
    if np.linalg.matrix_rank(inner) < len(inner):
        return LogRank(np.nan, len(names) - 1, np.nan)
    statistic = float(off @ np.linalg.solve(inner, off))
    return LogRank(statistic, len(names) - 1, float(chi2.sf(statistic, len(names) - 1)))


def concordance_pairs(time: ArrayLike, event: ArrayLike, risk: ArrayLike) -> tuple[Array, Array]:
    """For each ordered pair whether it can be compared, and what it counts: float64 (N, N) each.

    Row i had its event before column j, or at the time at which j was censored. It counts 1 where i has the higher
    risk, half where both are equal (Harrell et al. 1982).
    """
    t, e = checked(time, event)
    r = np.asarray(risk, np.float64)
    comparable = e[:, None] & ((t[:, None] < t[None, :]) | ((t[:, None] == t[None, :]) & ~e[None, :]))
    won = np.where(r[:, None] > r[None, :], 1.0, np.where(r[:, None] == r[None, :], 0.5, 0.0))
    return comparable.astype(np.float64), won * comparable


def weighted_ratio(pairs: tuple[Array, Array], rows: Array, columns: Array) -> Array:
    """``sum_ij r_i c_j won_ij / sum_ij r_i c_j comparable_ij`` for R weightings, (R,); NaN where nothing counts.

    pairs: from ``concordance_pairs``. rows, columns: weights (R, N).
    """
    comparable, won = pairs
    with np.errstate(divide="ignore", invalid="ignore"):
        total = ((rows @ comparable) * columns).sum(1)
        return np.asarray(np.where(total > 0, ((rows @ won) * columns).sum(1) / total, np.nan))


def concordance(time: ArrayLike, event: ArrayLike, risk: ArrayLike) -> float:
    """Harrell's C of risks (N,), higher for earlier events; NaN where no pair can be compared."""
    pairs = concordance_pairs(time, event, risk)
    ones = np.ones((1, len(pairs[0])))
    return float(weighted_ratio(pairs, ones, ones)[0])


def censoring_survival(time: ArrayLike, event: ArrayLike) -> KaplanMeier:
    """The chance of not being censored yet; where an event and a censoring share a time, the event comes first."""
    t, e = checked(time, event)
    times, place = np.unique(t, return_inverse=True)
    events = np.bincount(place, weights=e, minlength=len(times))
    lost = np.bincount(place, weights=~e, minlength=len(times))
    at_risk = len(t) - np.concatenate([[0], np.cumsum(events + lost)[:-1]]) - events
    with np.errstate(divide="ignore", invalid="ignore"):
        survival = np.cumprod(np.where(at_risk > 0, 1 - lost / at_risk, 1.0))
    whole = np.concatenate([[1.0], survival])
    edge = np.full(len(whole), np.nan)
    return KaplanMeier(np.concatenate([[0.0], times]), whole, edge, edge, np.append(len(t), at_risk).astype(np.int64))


def dynamic_pairs(time: ArrayLike, event: ArrayLike, risk: ArrayLike, at: float) -> tuple[Array, Array]:
    """As ``concordance_pairs`` for the cumulative/dynamic AUC at one time: rows are cases with an event by then, each
    by the inverse of its chance of not being censored before it (Uno et al. 2007), columns cases without one."""
    t, e = checked(time, event)
    r = np.asarray(risk, np.float64)
    curve = censoring_survival(t, e)
    with np.errstate(divide="ignore"):
        weight = np.where(e & (t <= at), 1 / np.maximum(curve.at(t), 1e-12), 0.0)
    comparable = weight[:, None] * (t > at)[None, :]
    won = np.where(r[:, None] > r[None, :], 1.0, np.where(r[:, None] == r[None, :], 0.5, 0.0))
    return comparable, won * comparable


def cumulative_dynamic_auc(time: ArrayLike, event: ArrayLike, risk: ArrayLike, at: Sequence[float]) -> Array:
    """The AUC of having had the event by each time, (len(at),), with inverse-probability-of-censoring weights.

    The censoring distribution is that of the same cases. NaN where nobody has had the event by then, or all have.
    """
    found = []
    for when in at:
        pairs = dynamic_pairs(time, event, risk, when)
        ones = np.ones((1, len(pairs[0])))
        found.append(weighted_ratio(pairs, ones, ones)[0])
    return np.array(found, np.float64)


def baseline_hazard(time: ArrayLike, event: ArrayLike, log_risk: ArrayLike) -> tuple[Array, Array]:
    """The cumulative hazard of a case of log-risk 0 (Breslow 1972): distinct event times (K,) and its value after each.

    log_risk: (N,). The survival of a case is ``exp(-hazard * exp(its log-risk))``.
    """
    t, e = checked(time, event)
    weight = np.exp(np.asarray(log_risk, np.float64))
    times = np.unique(t[e])
    order = np.argsort(t)
    # What is at risk at a time: everything from the first case of that time on.
    ahead = np.append(np.cumsum(weight[order][::-1])[::-1], 0.0)
    at_risk = ahead[np.searchsorted(t[order], times, side="left")]
    died = np.array([(e & (t == when)).sum() for when in times], np.float64)
    return times, np.cumsum(died / at_risk) if len(times) else np.zeros(0)


class HazardRatio(NamedTuple):
    """A ratio of hazards with its 95 % interval of Wald, and the two-sided p-value; NaN where it is not defined."""

    value: float
    low: float
    high: float
    p: float


def hazard_ratio(time: ArrayLike, event: ArrayLike, values: ArrayLike) -> HazardRatio:
    """The ratio of hazards for a difference of 1 in ``values`` (N,), by Cox's partial likelihood with Breslow's ties.

    NaN where values do not vary among those at risk, or the likelihood has no maximum: all events are on one side.
    """
    t, e = checked(time, event)
    x = np.asarray(values, np.float64)
    undefined = HazardRatio(np.nan, np.nan, np.nan, np.nan)
    if not e.any() or len(np.unique(x)) < 2:
        return undefined
    order = np.argsort(-t, kind="stable")
    t, e, x = t[order], e[order], x[order] - x.mean()
    # The risk set of a time ends with the last case of that time.
    ends = np.searchsorted(-t, -t, side="right") - 1
    beta, information = 0.0, 0.0
    for _ in range(100):
        weight = np.exp(np.clip(beta * x, -500, 500))
        s0, s1, s2 = (np.cumsum(weight * x**k)[ends] for k in range(3))
        mean = s1 / s0
        slope = float((e * (x - mean)).sum())
        information = float((e * (s2 / s0 - mean**2)).sum())
        if information <= 1e-12 or abs(beta) > 50 / max(float(x.std()), 1e-12):
            return undefined
        step = slope / information
        beta += float(np.clip(step, -2 / x.std(), 2 / x.std()))
        if abs(step) < 1e-10:
            break
    from scipy.stats import norm

    error = 1 / np.sqrt(information)
    low, high = np.exp(beta - Z95 * error), np.exp(beta + Z95 * error)
    return HazardRatio(float(np.exp(beta)), float(low), float(high), float(2 * norm.sf(abs(beta) / error)))
