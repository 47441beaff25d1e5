"""The threshold of a cascade whose risk is bounded, from calibration cases that no model has seen.

Two promises, both of which rest on new cases being exchangeable with those of the calibration:

- in expectation, by conformal risk control (Angelopoulos, Bates, Fisch, Lei and Schuster 2022, "Conformal Risk
  Control"): over draws of calibration and new case, the mean loss is at most the risk;
- with a confidence, by Learn then Test (Angelopoulos, Bates, Candes, Jordan and Lei 2021): in at least that share of
  draws of the calibration cases, the mean loss over all further cases is at most the risk. The thresholds are tested in
  a fixed order, from the one that reads all slides upwards, until one is not rejected: no correction for many tests is
  needed. The p-value is the exact binomial one where the loss of a case is 0 or 1, else that of Hoeffding and Bentkus.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lrmil.cascade.losses import SlideLosses
from lrmil.errors import FiguresError, SettingsError

__all__ = ["Control", "TooFewCasesError", "check_enough", "choose_threshold", "least_cases", "p_value"]

LARGEST_LOSS = 1.0
ROUNDING = 1e-12
"""Sums of losses that are equal on paper may differ by this much."""


class TooFewCasesError(FiguresError):
    """Too few calibration cases for any promise. needed, found: how many."""

    def __init__(self, needed: int, found: int, what: str, remedy: str) -> None:
        super().__init__(
            f"{what} needs at least {needed} calibration cases without any loss; there are {found}: "
            f"{needed - found} are missing",
            remedy=remedy,
        )
        self.needed, self.found = needed, found


@dataclass(frozen=True)
class Control:
    """A threshold and what it rests on.

    threshold: slides whose uncertainty is below it are kept at low resolution; -inf keeps none, +inf all. risk: the
    promised one. confidence: of the promise, None where it is in expectation. found: mean loss of the calibration cases
    at the threshold. read: share of slides read at high resolution. cases: of the calibration. holds: False where even
    a cascade that reads every slide loses too much, as where it reads too little of each.
    """

    threshold: float
    risk: float
    confidence: float | None
    found: float
    read: float
    cases: int
    holds: bool = True


def least_cases(risk: float, confidence: float | None = None) -> int:
    """How many cases without loss are needed to promise a risk. Raises SettingsError for one outside (0, 1)."""
    if not 0 < risk < 1:
        raise SettingsError(f"risk {risk} must lie above 0 and below 1")
    if confidence is None:
        # (n * 0 + 1) / (n + 1) <= risk
        return max(1, math.ceil(LARGEST_LOSS / risk - 1 - ROUNDING))
    if not 0 < confidence < 1:
        raise SettingsError(f"confidence {confidence} must lie above 0 and below 1")
    # (1 - risk) ** n <= 1 - confidence
    return max(1, math.ceil(math.log1p(-confidence) / math.log1p(-risk) - ROUNDING))


def check_enough(cases: int, risk: float, confidence: float | None, what: str = "cases") -> None:
    """Raise TooFewCasesError, saying how many are missing, where no threshold could be promised."""
    needed = least_cases(risk, confidence)
    if cases < needed:
        promise = "in expectation" if confidence is None else f"with a confidence of {confidence:g}"
        larger = _risk_of(cases, confidence)
        least = "" if larger is None else f", a risk of at least {larger:g}"
        less = "" if confidence is None else ", a promise in expectation (without --confidence)"
        raise TooFewCasesError(
            needed, cases, f"a risk of {risk:g} {promise}", f"give more {what} that no model has seen{least}{less}"
        )


def _risk_of(cases: int, confidence: float | None) -> float | None:
    """The least risk, to two digits upwards, that so many cases without loss can promise."""
    if cases < 1:
        return None
    exact = 1 / (cases + 1) if confidence is None else -math.expm1(math.log1p(-confidence) / cases)
    step = 10.0 ** (math.floor(math.log10(exact)) - 1)
    risk = math.ceil(exact / step) * step
    return float(f"{risk:.3g}") if risk < 1 else None


def p_value(mean: float, cases: int, risk: float, *, binary: bool) -> float:
    """Of the hypothesis that the risk is above ``risk``, given the mean loss of so many cases, each in [0, 1].

    binary: losses are 0 or 1, so that their sum is binomial and the p-value exact. Otherwise the smaller of Hoeffding's
    bound and Bentkus', as in Bates et al. 2021 ("Distribution-Free, Risk-Controlling Prediction Sets").
    """
    from scipy.stats import binom

    total = mean * cases
    if binary:
        return float(binom.cdf(round(total), cases, risk))
    bentkus = math.e * float(binom.cdf(math.ceil(total - ROUNDING * cases), cases, risk))
    if mean >= risk:
        return 1.0
    divergence = (1 - mean) * math.log((1 - mean) / (1 - risk))
    divergence += mean * math.log(mean / risk) if mean > 0 else 0.0
    return min(bentkus, math.exp(-cases * divergence), 1.0)


def choose_threshold(losses: SlideLosses, risk: float, confidence: float | None = None) -> Control:
    """The largest threshold that keeps the promise: the fewest slides read.

    losses: of calibration cases that neither the models nor the choice of the score have seen. confidence: None
    promises in expectation. Where even reading all slides loses too much, since reading is partial, the threshold is
    -inf and the promise does not hold. Raises TooFewCasesError, SettingsError.
    """
    check_enough(losses.count, risk, confidence)
    n = losses.count
    rise = (losses.kept - losses.read) * losses.weights
    risen = np.flatnonzero(rise > 0)
    # A threshold at a slide's uncertainty keeps those below it; only slides that lose by it change the risk.
    steps, place = np.unique(losses.uncertainty[risen], return_inverse=True)
    totals = float(losses.read @ losses.weights) + np.cumsum([0.0, *np.bincount(place, rise[risen], len(steps))])
    # Entry i: the sum of losses up to and with the threshold steps[i], the last one for all above.
    threshold, holds = -math.inf, False
    for total, step in zip(totals.tolist(), [*steps.tolist(), math.inf], strict=True):
        if not _accepted(total, n, risk, confidence, losses.binary):
            break
        threshold, holds = step, True
    return Control(threshold, risk, confidence, losses.risk(threshold), losses.share_read(threshold), n, holds)


def _accepted(total: float, cases: int, risk: float, confidence: float | None, binary: bool) -> bool:
    if confidence is None:
        return (total + LARGEST_LOSS) / (cases + 1) <= risk + ROUNDING
    return p_value(total / cases, cases, risk, binary=binary) <= 1 - confidence + ROUNDING
