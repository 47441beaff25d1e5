"""Figures against scikit-learn and brute force; intervals and tests against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import sklearn.metrics as sk
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lrmil.errors import FiguresError
from lrmil.metrics import (
    NAMES,
    compare,
    confusion,
    delong,
    evaluate,
    figures,
    fit_temperature,
    reliability,
    softmax,
    summarise_folds,
    undefined_reasons,
)
from lrmil.metrics.bootstrap import case_numbers, resample_weights
from lrmil.metrics.figures import weighted_figures

Array = NDArray[np.float64]


def example(n: int, classes: int, seed: int, *, ties: bool = False) -> tuple[NDArray[np.int64], Array]:
    rng = np.random.default_rng(seed)
    y = np.concatenate([np.arange(classes), rng.integers(0, classes, n - classes)])
    logits = rng.normal(size=(n, classes)) + 1.2 * np.eye(classes)[y]
    if ties:
        logits = np.round(logits)
    return y, softmax(logits)


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("ties", [False, True])
def test_figures_equal_scikit_learns(classes: int, ties: bool) -> None:
    y, p = example(150, classes, seed=classes, ties=ties)
    ours = figures(y, p)
    called = p.argmax(axis=1)
    one_hot = np.eye(classes)[y]
    auc = sk.roc_auc_score(y, p[:, 1]) if classes == 2 else sk.roc_auc_score(y, p, multi_class="ovr")
    ap = sk.average_precision_score(y, p[:, 1]) if classes == 2 else sk.average_precision_score(one_hot, p)
    theirs = {
        "auc": auc,
        "average_precision": ap,
        "balanced_accuracy": sk.balanced_accuracy_score(y, called),
        "accuracy": sk.accuracy_score(y, called),
        "f1_macro": sk.f1_score(y, called, average="macro"),
        "f1_weighted": sk.f1_score(y, called, average="weighted"),
        "brier": sk.brier_score_loss(y, p[:, 1]) if classes == 2 else ((p - one_hot) ** 2).sum(axis=1).mean(),
        "loss": sk.log_loss(y, p),
    }
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, abs=1e-12), name
    assert set(ours) == set(NAMES)


def test_expected_calibration_error_by_hand() -> None:
    # Two slides in the bin around 0.9 (one right), two in the bin around 0.6 (both right).
    p = np.array([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4], [0.6, 0.4]])
    y = np.array([0, 0, 0, 0])
    expected = 0.5 * abs(0.5 - 0.9) + 0.5 * abs(1.0 - 0.6)
    assert figures(y, p)["ece"] == pytest.approx(expected, abs=1e-12)


def test_confidence_of_one_has_a_bin_and_costs_nothing_when_right() -> None:
    assert figures([0, 1], [[1.0, 0.0], [0.0, 1.0]])["ece"] == 0.0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(4, 40), st.booleans())
def test_whole_weights_equal_repeated_slides(seed: int, n: int, ties: bool) -> None:
    y, p = example(n, 3 if n > 6 else 2, seed, ties=ties)
    weights = np.random.default_rng(seed + 1).integers(0, 4, n)
    if weights.sum() == 0:
        weights[0] = 1
    fast = weighted_figures(y, p, weights[None].astype(float))
    slow = figures(np.repeat(y, weights), np.repeat(p, weights, axis=0))
    for name in NAMES:
        assert fast[name][0] == pytest.approx(slow[name], abs=1e-10, nan_ok=True), name


def test_undefined_auc_is_nan_with_its_reason_never_zero() -> None:
    result = evaluate([1, 1, 1], [[0.2, 0.8]] * 3, classes=["benign", "tumour"], replicates=50)
    assert math.isnan(result["auc"].value)
    assert result["auc"].reason == "all slides are tumour"
    assert result["accuracy"].value == 1.0
    three = undefined_reasons([0, 0, 2], ["a", "b", "c"])
    assert three["auc"] == "no slide is b"


def test_replicates_without_a_class_are_counted() -> None:
    y = np.array([0, 0, 0, 0, 0, 0, 0, 0, 0, 1])
    p = softmax(np.random.default_rng(0).normal(size=(10, 2)))
    # One case of ten is missing from (1 - 1/10)^10 = 35 % of the replicates: the interval is there, and says so.
    auc = evaluate(y, p, replicates=4000)["auc"]
    assert auc.defined == pytest.approx(1 - 0.9**10, abs=0.03)
    assert auc.low <= auc.value <= auc.high


def test_no_interval_where_most_replicates_are_undefined() -> None:
    # Three classes of one case each: all three are drawn in 3! / 3^3 = 22 % of the replicates.
    auc = evaluate([0, 1, 2], np.eye(3) * 0.7 + 0.1, replicates=2000)["auc"]
    assert auc.value == 1.0
    assert math.isnan(auc.low)
    assert auc.reason is not None
    assert "undefined in 7" in auc.reason


def test_bootstrap_draws_cases_not_slides() -> None:
    # Four cases of five identical slides each: by case the spread is that of 4 draws, not of 20.
    y = np.repeat([0, 1, 0, 1], 5)
    right = np.repeat([1, 1, 0, 0], 5)
    p = np.where((right == 1)[:, None], np.eye(2)[y], np.eye(2)[1 - y]) * 0.98 + 0.01
    cases = [f"case{i // 5}" for i in range(20)]
    by_case = evaluate(y, p, cases, replicates=4000, seed=3)["accuracy"]
    assert (by_case.low, by_case.high) == (0.0, 1.0)
    by_slide = evaluate(y, p, replicates=4000, seed=3)["accuracy"]
    assert by_slide.low >= 0.2
    assert by_slide.high <= 0.8


def test_weights_draw_whole_cases_with_replacement() -> None:
    cases = case_numbers(["b", "a", "b", "c"], 4)
    weights = resample_weights(cases, 500, np.random.default_rng(0))
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, [0, 1, 3]].sum(axis=1) == 3).all()
    assert weights.mean(axis=0) == pytest.approx(np.ones(4), abs=0.15)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    # Accuracy of a classifier that is right with probability 0.7: 95 % intervals over 200 sets of 120 cases.
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(200):
        y = rng.integers(0, 2, 120)
        right = rng.random(120) < 0.7
        p = np.eye(2)[np.where(right, y, 1 - y)] * 0.8 + 0.1
        estimate = evaluate(y, p, replicates=300, seed=seed)["accuracy"]
        covered += estimate.low <= 0.7 <= estimate.high
    assert 0.90 <= covered / 200 <= 0.985


def brute_force_delong(y: NDArray[np.int64], a: Array, b: Array) -> tuple[Array, Array]:
    """AUCs and covariance straight from the kernel matrix of DeLong et al. (1988), equations 5 to 7."""
    aucs, v10, v01 = [], [], []
    for s in (a, b):
        x, z = s[y == 1], s[y == 0]
        psi = np.array([[1.0 if i > j else 0.5 if i == j else 0.0 for j in z] for i in x])
        aucs.append(psi.mean())
        v10.append(psi.mean(axis=1))
        v01.append(psi.mean(axis=0))
    return np.array(aucs), np.cov(np.array(v10)) / len(v10[0]) + np.cov(np.array(v01)) / len(v01[0])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(6, 40), st.booleans())
def test_delong_equals_brute_force(seed: int, n: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    y = np.concatenate([[0, 0, 1, 1], rng.integers(0, 2, n - 4)])
    a, b = rng.normal(size=n) + y, rng.normal(size=n) + 0.5 * y
    if ties:
        a, b = np.round(a), np.round(b)
    auc, covariance = brute_force_delong(y, a, b)
    ours = delong(y, a, b)
    assert ours.auc == pytest.approx(tuple(auc), abs=1e-12)
    assert np.array(ours.covariance) == pytest.approx(covariance, abs=1e-12)
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    assert ours.standard_error**2 == pytest.approx(variance, abs=1e-12)


def test_delong_of_repeated_slides_of_a_case_is_that_of_the_cases() -> None:
    # Obuchowski's clusters: five copies of each slide, one cluster each, tell nothing new; without clusters they would.
    rng = np.random.default_rng(5)
    y = np.array([0, 1] * 15)
    a, b = rng.normal(size=30) + y, rng.normal(size=30) + 0.3 * y
    once = delong(y, a, b)
    copies = delong(np.repeat(y, 5), np.repeat(a, 5), np.repeat(b, 5), [str(i // 5) for i in range(150)])
    assert copies.difference == pytest.approx(once.difference)
    assert copies.standard_error == pytest.approx(once.standard_error, rel=1e-9)
    naive = delong(np.repeat(y, 5), np.repeat(a, 5), np.repeat(b, 5))
    assert naive.standard_error < 0.5 * once.standard_error


def test_delong_of_clusters_agrees_with_resampling_of_cases() -> None:
    # Cases with slides of both classes: the cluster covariance has a cross term that only such data test.
    rng = np.random.default_rng(8)
    cases = np.repeat(np.arange(80), 3)
    effect = rng.normal(size=80)[cases]
    y = rng.integers(0, 2, 240)
    a = rng.normal(size=240) + y + effect
    b = rng.normal(size=240) + 0.5 * y - effect
    ours = delong(y, a, b, [str(c) for c in cases])
    p, q = (np.stack([1 - s, s], axis=1) for s in (1 / (1 + np.exp(-a)), 1 / (1 + np.exp(-b))))
    drawn = compare([y], [p], [q], [[str(c) for c in cases]], replicates=4000)["auc"]
    assert ours.difference == pytest.approx(drawn.value, abs=1e-12)
    assert (drawn.high - drawn.low) / 3.92 == pytest.approx(ours.standard_error, rel=0.08)


def test_delong_null_is_rejected_at_its_level() -> None:
    rng = np.random.default_rng(2)
    rejected = 0
    for _ in range(400):
        y = np.array([0, 1] * 40)
        shared = rng.normal(size=80) + y
        rejected += delong(y, shared + rng.normal(size=80), shared + rng.normal(size=80)).p < 0.05
    assert 0.02 <= rejected / 400 <= 0.09


def test_delong_without_answer_says_why() -> None:
    one = delong([1, 1, 1], [1, 2, 3], [3, 2, 1])
    assert math.isnan(one.p)
    assert one.reason == "all slides are of one class"
    same = delong([0, 1, 0, 1], [1, 2, 3, 4], [1, 2, 3, 4])
    assert same.difference == 0
    assert same.p == 1.0


def test_compare_is_paired() -> None:
    y, p = example(120, 2, seed=4)
    same = compare([y], [p], [p], [[str(i) for i in range(120)]], replicates=300)
    assert all(d.value == 0 and d.low == 0 and d.high == 0 and d.p == 1 for d in same.values())
    worse = softmax(np.log(p) * 0.3 + np.random.default_rng(0).normal(size=p.shape))
    both = compare([y], [p], [worse], [[str(i) for i in range(120)]], replicates=1000)["auc"]
    assert both.value == pytest.approx(figures(y, p)["auc"] - figures(y, worse)["auc"])
    assert both.low > 0
    assert both.p < 0.05


def test_compare_averages_over_folds() -> None:
    sets = [example(60, 2, seed=s) for s in (1, 2)]
    worse = [softmax(np.log(p) + np.random.default_rng(9).normal(size=p.shape)) for _, p in sets]
    cases = [[f"{k}-{i}" for i in range(60)] for k in range(2)]
    got = compare([y for y, _ in sets], [p for _, p in sets], worse, cases, replicates=100)["brier"]
    assert got.a == pytest.approx(np.mean([figures(y, p)["brier"] for y, p in sets]))
    assert got.b == pytest.approx(np.mean([figures(y, q)["brier"] for (y, _), q in zip(sets, worse, strict=True)]))


def test_temperature_recovers_the_scale_and_keeps_the_ranking() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 3)) * 2
    y = (softmax(logits).cumsum(axis=1) > rng.random((4000, 1))).argmax(axis=1)
    temperature = fit_temperature(logits * 3.0, y)
    assert temperature == pytest.approx(3.0, rel=0.08)
    before, after = figures(y, softmax(logits * 3)), figures(y, softmax(logits * 3, temperature))
    assert after["ece"] < before["ece"]
    assert after["loss"] < before["loss"]
    assert after["accuracy"] == before["accuracy"]


def test_temperature_is_the_minimum_on_a_grid() -> None:
    y, p = example(80, 2, seed=1)
    logits = np.log(p) * 4
    best = fit_temperature(logits, y)
    losses = {t: figures(y, softmax(logits, t))["loss"] for t in (best * 0.98, best, best * 1.02)}
    assert min(losses, key=losses.__getitem__) == best


def test_temperature_is_one_where_validation_says_nothing() -> None:
    assert fit_temperature([[2.0, 0.0], [0.0, 3.0]], [0, 1]) == 1.0  # all right: certainty would look best
    assert fit_temperature([[2.0, 0.0], [0.0, 3.0]], [1, 1]) == 1.0
    assert fit_temperature(np.zeros((0, 2)), []) == 1.0
    with pytest.raises(FiguresError, match="NaN"):
        fit_temperature([[np.nan, 0.0]], [0])


def test_reliability_bins() -> None:
    bins = reliability([0, 0, 1], [[0.95, 0.05], [0.95, 0.05], [0.45, 0.55]], bins=10)
    assert bins.slides.tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 2]
    assert bins.accuracy[9] == 1.0
    assert bins.confidence[5] == pytest.approx(0.55)
    # Wilson's interval of 2 out of 2 begins at 1 / (1 + z^2 / 2).
    assert bins.low[9] == pytest.approx(1 / (1 + 1.959963984540054**2 / 2))


def test_confusion_rows_are_true() -> None:
    assert confusion([0, 0, 1, 2], [0, 1, 1, 0], 3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]


def test_fold_summary_leaves_out_undefined_folds() -> None:
    got = summarise_folds([{"auc": 0.8}, {"auc": math.nan}, {"auc": 0.9}])["auc"]
    assert got["mean"] == pytest.approx(0.85)
    assert got["std"] == pytest.approx(np.std([0.8, 0.9], ddof=1))
    assert got["folds"] == 2


@pytest.mark.parametrize(
    ("labels", "probabilities"),
    [([0, 2], [[0.5, 0.5], [0.5, 0.5]]), ([0], [[0.5, 0.6]]), ([], np.zeros((0, 2))), ([0], [[np.nan, 1.0]])],
)
def test_what_is_no_probability_is_refused(labels: list[int], probabilities: object) -> None:
    with pytest.raises(FiguresError):
        figures(labels, probabilities)  # type: ignore[arg-type]
