"""Figures of survival against lifelines and scikit-survival, and by hand."""

from __future__ import annotations

import numpy as np
import pytest

from lrmil.errors import FiguresError
from lrmil.metrics.survival import (
    baseline_hazard,
    concordance,
    cumulative_dynamic_auc,
    hazard_ratio,
    kaplan_meier,
    logrank,
)

Cohort = tuple[np.ndarray, np.ndarray, np.ndarray]


def cohort(seed: int, *, ties: bool = False, count: int = 90) -> Cohort:
    """Times, events and risks; ties: of times, of an event with a censoring, and of risks."""
    rng = np.random.default_rng(seed)
    risk = rng.normal(size=count)
    true = rng.exponential(np.exp(-0.8 * risk) * 10)
    lost = rng.uniform(0, 25, size=count)
    time = np.minimum(true, lost)
    if ties:
        time, risk = np.ceil(time), np.round(risk, 1)
    return time, true <= lost, risk


@pytest.mark.parametrize("ties", [False, True])
def test_curves_and_tests_are_those_of_lifelines(ties: bool) -> None:
    lifelines = pytest.importorskip("lifelines")
    time, event, risk = cohort(1, ties=ties)
    curve = kaplan_meier(time, event)
    theirs = lifelines.KaplanMeierFitter().fit(time, event)
    np.testing.assert_allclose(curve.at(theirs.timeline), theirs.survival_function_["KM_estimate"], atol=1e-9)
    band = theirs.confidence_interval_
    there = (curve.survival > 0) & (curve.survival < 1)
    at = theirs.timeline.searchsorted(curve.times[there])
    np.testing.assert_allclose(curve.low[there], band["KM_estimate_lower_0.95"].to_numpy()[at], atol=1e-6)
    np.testing.assert_allclose(curve.high[there], band["KM_estimate_upper_0.95"].to_numpy()[at], atol=1e-6)
    assert curve.median == theirs.median_survival_time_

    from lifelines.statistics import multivariate_logrank_test
    from lifelines.utils import concordance_index

    assert concordance(time, event, risk) == pytest.approx(concordance_index(time, -risk, event), abs=1e-12)
    for groups in (risk > np.median(risk), np.digitize(risk, [-0.5, 0.5])):
        ours, wanted = logrank(time, event, groups), multivariate_logrank_test(time, groups, event)
        assert ours.statistic == pytest.approx(wanted.test_statistic, abs=1e-6)
        assert ours.p == pytest.approx(wanted.p_value, abs=1e-6)


@pytest.mark.parametrize("ties", [False, True])
def test_time_dependent_auc_and_concordance_are_those_of_scikit_survival(ties: bool) -> None:
    metrics = pytest.importorskip("sksurv.metrics")
    util = pytest.importorskip("sksurv.util")
    time, event, risk = cohort(2, ties=ties)
    truth = util.Surv.from_arrays(event, time)
    at = [3.0, 6.0, 10.0]
    wanted, _ = metrics.cumulative_dynamic_auc(truth, truth, risk, at)
    np.testing.assert_allclose(cumulative_dynamic_auc(time, event, risk, at), wanted, atol=1e-6)
    assert concordance(time, event, risk) == pytest.approx(metrics.concordance_index_censored(event, time, risk)[0])


def test_by_hand() -> None:
    time, event = np.array([1.0, 2.0, 2.0, 4.0]), np.array([True, True, False, True])
    curve = kaplan_meier(time, event)
    assert curve.times.tolist() == [0, 1, 2, 4]
    np.testing.assert_allclose(curve.survival, [1, 0.75, 0.5, 0])
    assert curve.at_risk.tolist() == [4, 4, 3, 1]
    # 1 before each of the others, 2 before the one that was lost at 2 and before 4: five pairs, of which four are won.
    assert concordance(time, event, [3.0, 1.0, 2.0, 0.0]) == pytest.approx(4 / 5)
    assert np.isnan(concordance([1.0, 2.0], [False, False], [0.0, 1.0]))
    times, hazard = baseline_hazard(time, event, np.log([1.0, 2.0, 1.0, 1.0]))
    assert times.tolist() == [1, 2, 4]
    np.testing.assert_allclose(hazard, np.cumsum([1 / 5, 1 / 4, 1 / 1]))


def test_nothing_to_compare_is_undefined_and_bad_times_are_refused() -> None:
    test = logrank([1.0, 2.0], [True, True], [1, 1])
    assert np.isnan(test.p)
    assert np.isnan(cumulative_dynamic_auc([1.0, 2.0], [True, True], [0.0, 1.0], [5.0])).all()
    for time in ([-1.0, 2.0], [np.nan, 1.0], [np.inf, 1.0]):
        with pytest.raises(FiguresError, match="time"):
            kaplan_meier(time, [True, True])
    with pytest.raises(FiguresError, match="do not fit"):
        kaplan_meier([1.0, 2.0], [True])


def test_a_known_hazard_ratio_is_recovered_within_its_interval() -> None:
    rng = np.random.default_rng(4)
    group = np.arange(600) % 2
    true = rng.exponential(np.where(group == 1, 5.0, 12.5))
    lost = rng.uniform(2, 30, size=600)
    time, event = np.minimum(true, lost), true <= lost
    found = hazard_ratio(time, event, group)
    assert found.low < 2.5 < found.high
    assert found.high / found.low < 2
    assert found.p < 1e-9
    lifelines = pytest.importorskip("lifelines")
    import pandas as pd

    fitted = lifelines.CoxPHFitter().fit(pd.DataFrame({"t": time, "e": event, "g": group}), "t", "e").summary
    wanted = fitted.loc["g", ["exp(coef)", "exp(coef) lower 95%", "exp(coef) upper 95%"]].to_numpy(float)
    np.testing.assert_allclose(found[:3], wanted, rtol=1e-6)
    # All events on one side: the likelihood has no maximum.
    assert np.isnan(hazard_ratio([1.0, 2.0, 3.0, 4.0], [1, 1, 0, 0], [1, 1, 0, 0]).value)
