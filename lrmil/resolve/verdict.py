"""From paired differences of AUCs to a verdict: enough, needed, or too few cases to say.

A resolution is enough where the lower end of the interval of its AUC less the finest one's lies above minus the margin
(non-inferiority: Piaggio et al. 2012, CONSORT). Resolutions are tested from fine to coarse, and the first that is not
enough ends the sequence, so that the chance of calling any resolution enough that is not stays that of one test
(Westfall and Krishen 2001). Several encoders at one resolution share its error (Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lrmil.errors import FiguresError
from lrmil.metrics.auc import LEAST_CASES, Auc, AucInterval, mean_auc, one_auc
from lrmil.metrics.cases import case_numbers
from lrmil.resolve.paired import Paired, paired_difference

__all__ = ["Comparison", "Verdict", "cases_needed", "compare_arms", "decide", "own_auc"]

LEVEL, POWER = 0.95, 0.8
MOST_TIMES = 100
"""Times the cases at hand beyond which a number of cases means: the difference lies at the margin."""
Fold = tuple[NDArray[np.int64], NDArray[np.float64], Sequence[str]]
"""Labels (N,), probabilities (N, C) and cases of the slides that a fold tests."""


@dataclass(frozen=True)
class Comparison:
    """An arm against the finest one.

    auc, low_auc, high_auc: the arm's own, mean over folds, with 95 % interval. difference: its AUC less the finest
    one's, with the interval at which it is tested. error: standard error of the difference. cases: that were tested.
    state: "reference", "enough", "loses" (more than the margin) or "undecided". needed: cases that would decide with a
    power of 0.8, None where that is not asked or not known; infinite where the difference lies at the margin.
    """

    name: str
    level: str
    auc: float
    low_auc: float
    high_auc: float
    difference: float
    low: float
    high: float
    error: float
    cases: int
    state: Literal["reference", "enough", "loses", "undecided"]
    needed: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Verdict:
    """kind: "enough", "needed", "undecided" or "nothing" (no resolution tells the classes apart). level: that is enough
    or needed, "" otherwise. text: in words."""

    kind: Literal["enough", "needed", "undecided", "nothing"]
    level: str
    text: str


def _aucs(folds: Sequence[Fold], positive: int) -> list[list[Auc]]:
    numbers = case_numbers([case for _, _, cases in folds for case in cases], sum(len(y) for y, _, _ in folds))
    count, at = int(numbers.max()) + 1, 0
    found: list[list[Auc]] = []
    for y, p, _ in folds:
        own = numbers[at : at + len(y)]
        at += len(y)
        columns = [positive] if p.shape[1] == 2 else range(p.shape[1])
        aucs = [one_auc(y == c, p[:, c], own, count, c) for c in columns]
        # Of several classes a fold needs all of them, as in the figures of a run.
        found.append(aucs if not any(math.isnan(auc.value) for auc in aucs) else [])
    return found


def own_auc(folds: Sequence[Fold], positive: int = 1) -> AucInterval:
    """The mean over folds of an arm's AUC with its 95 % interval by case; of several classes the mean over them."""
    return mean_auc([auc for own in _aucs(folds, positive) for auc in own])


def compare_arms(
    name: str, level: str, arm: Sequence[Fold], finest: Sequence[Fold], margin: float, *, positive: int = 1, of: int = 1
) -> Comparison:
    """An arm's AUC against the finest one's on the same slides in the same folds.

    of: arms at this level, which share the error. Raises FiguresError where slides, labels or folds differ.
    """
    if len(arm) != len(finest) or any(
        not np.array_equal(a[0], b[0]) or list(a[2]) != list(b[2]) for a, b in zip(arm, finest, strict=True)
    ):
        raise FiguresError(f"{name} was not tested on the slides of the finest resolution")
    own, first = _aucs(arm, positive), _aucs(finest, positive)
    level_of = 1 - (1 - LEVEL) / of
    found = paired_difference(
        [auc for aucs in own for auc in aucs], [auc for aucs in first for auc in aucs], level=level_of
    )
    alone = own_auc(arm, positive)
    cases = len({case for _, _, ids in arm for case in ids})
    error = _error(found, margin, level_of)
    state: Literal["enough", "loses", "undecided"] = "undecided"
    if found.low > -margin:
        state = "enough"
    elif found.high < -margin:
        state = "loses"
    needed = cases_needed(found.value, error, cases, margin, level=level_of) if state == "undecided" else None
    return Comparison(
        name, level, alone.value, alone.low, alone.high, found.value, found.low, found.high, error, cases, state,
        needed, found.reason,
    )  # fmt: skip


def _error(found: Paired, margin: float, level: float) -> float:
    """The standard error on the side of the margin, by which more cases are reckoned."""
    from scipy.stats import norm

    half = found.value - found.low if found.value > -margin else found.high - found.value
    return half / float(norm.isf((1 - level) / 2))


def cases_needed(
    difference: float, error: float, cases: int, margin: float, *, level: float = LEVEL, power: float = POWER
) -> float | None:
    """How many cases would tell, with that power, on which side of minus the margin the difference lies.

    Taken that it is as observed, and that the squared standard error falls as one over the cases: ``cases`` times
    ``((z + z_power) * error / (difference + margin)) ** 2``, rounded up to two digits. Infinite beyond ``MOST_TIMES``
    the cases at hand; None where there is no standard error.
    """
    from scipy.stats import norm

    if math.isnan(error):
        return None
    z = float(norm.isf((1 - level) / 2)) + float(norm.ppf(power))
    distance = abs(difference + margin)
    if distance * math.sqrt(MOST_TIMES) <= z * error:
        return math.inf
    exact = cases * (z * error / distance) ** 2
    step = 10.0 ** max(math.floor(math.log10(exact)) - 1, 0)
    return float(math.ceil(exact / step) * step)


def decide(found: Sequence[Comparison], margin: float) -> Verdict:
    """The verdict of one model's comparisons: the finest, which is the reference, then the others to the coarsest."""
    reference, levels = found[0], list(dict.fromkeys(c.level for c in found[1:] if c.level != found[0].level))
    if not reference.low_auc > 0.5:
        text = f"AUC {_number(reference.auc)}{_interval(reference.low_auc, reference.high_auc)} at {reference.level}"
        return Verdict(
            "nothing", "", f"too little to compare: {text} does not tell the classes apart for sure ({_cases(found)})"
        )
    enough: Comparison | None = None
    stopped: Comparison | None = None
    for level in levels:
        own = [c for c in found[1:] if c.level == level]
        best = max(own, key=lambda c: (c.state == "enough", c.state == "undecided", c.difference))
        if best.state != "enough":
            stopped = best
            break
        enough = best
    if enough is not None:
        text = f"{enough.name} is enough ({_against(enough, reference)}, above the margin of -{margin:g})"
        return Verdict("enough", enough.level, text + _further(stopped))
    if stopped is None:
        return Verdict("needed", reference.level, f"{reference.name} is all there is")
    if stopped.state == "loses":
        text = f"{reference.level} is needed ({stopped.name}: {_against(stopped, reference)}, below -{margin:g})"
        return Verdict("needed", reference.level, text)
    text = f"too few cases to say: {_needed(stopped)} needed for {stopped.name} ({_against(stopped, reference)}, "
    return Verdict("undecided", "", f"{text}margin {margin:g}; {stopped.cases} cases here)")


def _further(stopped: Comparison | None) -> str:
    if stopped is None:
        return ""
    if stopped.state == "loses":
        return f"; {stopped.name} is not"
    return f"; too few cases to say whether {stopped.name} is: {_needed(stopped)} needed"


def _needed(c: Comparison) -> str:
    if c.needed is None:
        return f"at least {LEAST_CASES} of each class"
    if math.isinf(c.needed):
        return f"more than {MOST_TIMES * c.cases:,}, since the difference lies at the margin,"
    return f"about {c.needed:,.0f}"


def _against(c: Comparison, reference: Comparison) -> str:
    return (
        f"AUC {_number(c.auc)} against {_number(reference.auc)} at {reference.level}, difference "
        f"{c.difference:+.3f}{_interval(c.low, c.high, '+.3f')}"
    )


def _number(value: float, form: str = ".3f") -> str:
    return "-" if math.isnan(value) else format(value, form)


def _interval(low: float, high: float, form: str = ".3f") -> str:
    return "" if math.isnan(low) else f" ({format(low, form)} to {format(high, form)})"


def _cases(found: Sequence[Comparison]) -> str:
    return f"{found[0].cases} cases"
