"""The promise of a cascade, on simulated scores whose true risk is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import binom

from lrmil.cascade import (
    SlideLosses,
    TooFewCasesError,
    choose_threshold,
    disagreement,
    entropy,
    least_cases,
    loss_of,
    margin,
    p_value,
    uncertainty,
)
from lrmil.cascade.choice import choose_score, put_aside
from lrmil.errors import SettingsError

DRAWS = 200
SLOPE = 0.3
"""A slide of uncertainty u loses with the chance SLOPE * u, and u is uniform: the true risk is known."""
Rule = Callable[[SlideLosses, float, float | None], float]


def ours(losses: SlideLosses, risk: float, confidence: float | None) -> float:
    return choose_threshold(losses, risk, confidence).threshold


def plug_in(losses: SlideLosses, risk: float, confidence: float | None) -> float:
    """What must not be done: the largest threshold whose loss on the calibration cases is at most the risk."""
    steps = [*np.sort(losses.uncertainty).tolist(), math.inf]
    return max(step for step in steps if losses.risk(step) <= risk)


def true_risk(threshold: float) -> float:
    return SLOPE * min(max(threshold, 0.0), 1.0) ** 2 / 2


def simulated(rule: Rule, cases: int, risk: float, confidence: float | None, *, slides: int = 1) -> np.ndarray:
    """The true risk at the threshold that a rule sets, over draws of the calibration cases."""
    found = []
    for draw in range(DRAWS):
        rng = np.random.default_rng([7, draw])
        u = rng.uniform(size=cases * slides)
        lost = (rng.uniform(size=len(u)) < SLOPE * u).astype(float)
        number = np.repeat(np.arange(cases), slides)
        found.append(true_risk(rule(SlideLosses(lost, np.zeros(len(u)), u, number), risk, confidence)))
    return np.array(found)


def kept_in_expectation(risks: np.ndarray, risk: float) -> bool:
    return bool(risks.mean() <= risk + 2 * risks.std(ddof=1) / math.sqrt(DRAWS))


def kept_with_confidence(risks: np.ndarray, risk: float, confidence: float) -> bool:
    least = confidence - 2 * math.sqrt(confidence * (1 - confidence) / DRAWS)
    return bool((risks <= risk).mean() >= least)


@pytest.mark.parametrize(("cases", "risk"), [(100, 0.05), (60, 0.02), (300, 0.02)])
def test_the_mean_risk_is_at_most_the_promised_one(cases: int, risk: float) -> None:
    risks = simulated(ours, cases, risk, None)
    assert kept_in_expectation(risks, risk)
    # Nor is it far below: a cascade that reads everything would keep any promise.
    assert risks.mean() > risk - 2 / (cases + 1) - 0.005


@pytest.mark.parametrize(("cases", "risk", "slides"), [(120, 0.02, 1), (300, 0.05, 1), (150, 0.05, 2)])
def test_the_risk_is_at_most_the_promised_one_with_the_confidence(cases: int, risk: float, slides: int) -> None:
    risks = simulated(ours, cases, risk, 0.9, slides=slides)
    assert kept_with_confidence(risks, risk, 0.9)
    assert risks.mean() > risk / 20


def test_a_threshold_that_is_not_corrected_is_caught() -> None:
    risks = simulated(plug_in, 100, 0.05, None)
    assert not kept_in_expectation(risks, 0.05)
    assert not kept_with_confidence(risks, 0.05, 0.9)
    # One that takes the promise in expectation for one with confidence, too.
    assert not kept_with_confidence(simulated(lambda own, risk, _: ours(own, risk, None), 300, 0.05, 0.9), 0.05, 0.9)


def test_a_risk_of_two_percent_needs_114_cases_without_loss() -> None:
    assert least_cases(0.02, 0.9) == 114
    assert least_cases(0.02) == 49
    nothing = SlideLosses(np.zeros(113), np.zeros(113), np.linspace(0, 1, 113), np.arange(113))
    with pytest.raises(TooFewCasesError, match=r"at least 114 .* there are 113: 1 are missing") as error:
        choose_threshold(nothing, 0.02, 0.9)
    assert "a risk of at least 0.021" in str(error.value.remedy)
    assert choose_threshold(nothing, 0.021, 0.9).threshold == math.inf
    assert choose_threshold(nothing, 0.02).threshold == math.inf


def test_the_threshold_keeps_as_many_losses_as_are_allowed() -> None:
    u = np.arange(200) / 200
    lost = np.zeros(200)
    lost[[20, 60, 100, 140]] = 1
    losses = SlideLosses(lost, np.zeros(200), u, np.arange(200))
    # (k + 1) / 201 <= 0.02 allows three; the fourth loss sets the threshold and is read itself.
    found = choose_threshold(losses, 0.02)
    assert found.threshold == u[140]
    assert found.found == pytest.approx(3 / 200)
    assert found.read == pytest.approx(60 / 200)
    allowed = max(k for k in range(5) if binom.cdf(k, 200, 0.02) <= 0.1)
    assert choose_threshold(losses, 0.02, 0.9).threshold == u[[20, 60, 100, 140][allowed]]


def test_slides_of_one_uncertainty_go_together() -> None:
    losses = SlideLosses(np.r_[np.ones(3), np.zeros(57)], np.zeros(60), np.full(60, 0.5), np.arange(60))
    found = choose_threshold(losses, 0.02)
    assert found.threshold == 0.5
    assert found.read == 1


def test_reading_too_little_of_a_slide_is_said() -> None:
    after = np.r_[np.ones(6), np.zeros(94)]
    losses = SlideLosses(after, after, np.linspace(0, 1, 100), np.arange(100))
    found = choose_threshold(losses, 0.02)
    assert found.threshold == -math.inf
    assert not found.holds


def test_losses_never_fall_when_more_slides_are_kept() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 400)
    low, high, part = (rng.dirichlet([1, 1], 400) for _ in range(3))
    for name in ("disagree", "error", "miss"):
        kept, read, counts = loss_of(name, y, low, high, read=part)
        assert (kept >= read).all()
        assert counts.sum() == (400 if name != "miss" else (y == 1).sum())
    wrong_low, wrong_high = low.argmax(1) != y, high.argmax(1) != y
    kept, read, _ = loss_of("error", y, low, high)
    assert not read.any()
    # What low resolution gets right and high resolution does not, is not set off: the excess of errors is bounded.
    assert kept.mean() > wrong_low.mean() - wrong_high.mean()
    assert np.array_equal(kept > 0, wrong_low & ~wrong_high)
    with pytest.raises(SettingsError, match="no loss is called"):
        loss_of("regret", y, low, high)


def test_p_values() -> None:
    assert p_value(0.0, 114, 0.02, binary=True) == pytest.approx(0.98**114)
    assert p_value(0.05, 100, 0.02, binary=False) == 1
    # Bounds that hold for all losses are never below the exact value for those of 0 and 1.
    for losses in range(8):
        assert p_value(losses / 300, 300, 0.05, binary=False) >= p_value(losses / 300, 300, 0.05, binary=True)


def test_scores() -> None:
    sure, torn = [1.0, 0.0], [0.5, 0.5]
    assert margin([sure, torn]).tolist() == [0, 1]
    assert entropy([sure, torn]) == pytest.approx([0, 1])
    members = np.array([[sure, torn], [[0.0, 1.0], torn]])
    # Models that contradict each other disagree; those that are unsure together do not.
    assert disagreement(members) == pytest.approx([1, 0])
    assert set(uncertainty(members)) == {"margin", "entropy", "disagreement"}
    assert set(uncertainty(members[:1])) == {"margin", "entropy"}
    with pytest.raises(SettingsError, match="several"):
        disagreement(members[:1])


@pytest.mark.parametrize(("flips", "least", "most"), [(0.001, 0.0, 0.05), (0.5, 0.8, 1.0)])
def test_few_slides_are_read_where_low_resolution_sees_it_and_most_where_it_does_not(
    flips: float, least: float, most: float
) -> None:
    """Low resolution that sees the signal agrees with high; one that sees nothing agrees by chance."""
    rng = np.random.default_rng(3)
    high = rng.integers(0, 2, 300)
    low = np.where(rng.uniform(size=300) < flips, 1 - high, high)
    sure = rng.uniform(0.5, 1, 300)
    kept, read, _ = loss_of("disagree", high, _probabilities(low, sure), _probabilities(high, np.full(300, 0.9)))
    losses = SlideLosses(kept, read, margin(_probabilities(low, sure)), np.arange(300))
    assert least <= choose_threshold(losses, 0.02, 0.9).read <= most


def _probabilities(classes: np.ndarray, sure: np.ndarray) -> np.ndarray:
    return np.where(np.arange(2) == classes[:, None], sure[:, None], 1 - sure[:, None])


def test_the_score_is_chosen_on_cases_of_its_own() -> None:
    rng = np.random.default_rng(0)
    cases = np.repeat(np.arange(100), 2)
    aside = put_aside(cases, 0.05, None)
    assert len(set(cases[aside])) == 20
    assert not set(cases[aside]) & set(cases[~aside])
    # 100 cases are just enough for the threshold: none can be spared.
    assert not put_aside(cases, 0.01, None).any()
    lost = (rng.uniform(size=200) < 0.3).astype(float)
    told = choose_score({"margin": rng.uniform(size=200), "disagreement": lost + rng.uniform(size=200) / 2}, lost)
    assert told.score == "disagreement"
    assert told.areas["disagreement"] == 1
    assert choose_score({"margin": lost, "entropy": lost}, lost).score == "margin"
    assert choose_score({"margin": lost[:0], "entropy": lost[:0]}, lost[:0]).score == "margin"
