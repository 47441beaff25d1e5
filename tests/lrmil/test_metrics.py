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
    Calibration,
    at_threshold,
    calibrate,
    compare,
    confusion,
    delong,
    evaluate,
    evaluate_folds,
    figures,
    reliability,
    softmax,
    summarise_folds,
    threshold_at_sensitivity,
    undefined_reasons,
)
from lrmil.metrics.auc import mean_auc, one_auc
from lrmil.metrics.bootstrap import resample_weights
from lrmil.metrics.cases import case_numbers
from lrmil.metrics.figures import weighted_figures
from lrmil.metrics.proportions import wilson

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
    # Twenty slides of confidence 0.6, of which all are right, and twenty of 0.9, of which half are: two pairs of bins,
    # each with one gap. From its square goes what calibrated slides would show by chance: p (1 - p) / n.
    p = np.repeat([[0.6, 0.4], [0.9, 0.1]], 20, axis=0)
    y = np.concatenate([np.zeros(20), np.zeros(10), np.ones(10)]).astype(int)
    gaps = [(0.4, 0.6 * 0.4 / 20), (0.4, 0.9 * 0.1 / 20)]
    assert figures(y, p)["ece"] == pytest.approx(np.mean([math.sqrt(g**2 - noise) for g, noise in gaps]), abs=1e-12)


def test_calibration_error_is_not_made_of_chance() -> None:
    rng = np.random.default_rng(4)
    plain, ours, found = [], [], []
    for _ in range(200):
        p = rng.uniform(0.5, 1.0, 60)
        right = rng.random(60) < p
        both = np.stack([p, 1 - p], axis=1)
        place = np.ceil(p * 15).astype(int)
        gap = [abs((right[place == b] - p[place == b]).sum()) for b in np.unique(place)]
        plain.append(sum(gap) / 60)
        ours.append(figures(np.where(right, 0, 1), both)["ece"])
        # Half of the confidence above chance is not there: a true error of 0.125 on average.
        found.append(figures(np.where(rng.random(60) < 0.5 + (p - 0.5) / 2, 0, 1), both)["ece"])
    assert np.mean(plain) > 0.1
    assert np.mean(ours) < 0.06
    assert 0.09 < np.mean(found) < 0.17


def test_the_calibration_error_lies_in_its_interval() -> None:
    for seed in range(20):
        y, p = example(50, 2, seed)
        ece = evaluate(y, p, replicates=200)["ece"]
        assert ece.low <= ece.value <= ece.high


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
    # The bins of the calibration error are those of the slides, however often each is drawn.
    for name in set(NAMES) - {"ece"}:
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
    found = evaluate(y, p, replicates=4000)["average_precision"]
    assert found.defined == pytest.approx(1 - 0.9**10, abs=0.03)
    assert found.low <= found.value <= found.high


def test_no_interval_where_most_replicates_are_undefined() -> None:
    # Three classes of one case each: all three are drawn in 3! / 3^3 = 22 % of the replicates.
    found = evaluate([0, 1, 2], np.eye(3) * 0.7 + 0.1, replicates=2000)["average_precision"]
    assert found.value == 1.0
    assert math.isnan(found.low)
    assert found.reason is not None
    assert "undefined in 7" in found.reason


def test_an_auc_of_few_cases_has_no_interval_and_says_why() -> None:
    y, p = example(30, 2, seed=1)
    few = np.concatenate([np.flatnonzero(y == 0), np.flatnonzero(y == 1)[:4]])
    auc = evaluate(y[few], p[few], replicates=10)["auc"]
    assert math.isnan(auc.low)
    assert auc.reason == "too few cases: 4 of a class, 5 are needed"
    # Slides of one case are no more cases.
    cases = ["one" if label else f"case{i}" for i, label in enumerate(y)]
    assert evaluate(y, p, cases, replicates=10)["auc"].reason == "too few cases: 1 of a class, 5 are needed"


@pytest.mark.parametrize("n", [10, 40, 300])
def test_no_interval_of_a_perfect_classifier_is_of_zero_width(n: int) -> None:
    y = np.arange(n) % 2
    p = np.where(np.eye(2)[y] == 1, 0.9, 0.1)
    for name, found in evaluate(y, p, replicates=100).items():
        assert (found.low < found.high) or (math.isnan(found.low) and found.reason), name
    for name in ("auc", "accuracy", "sensitivity", "specificity", "balanced_accuracy"):
        assert evaluate(y, p, replicates=100)[name].low < 1.0
    auc = evaluate(y, p, replicates=10)["auc"]
    assert auc.value == 1.0
    assert 1 - 8 / n < auc.low < 1 - 0.3 / n
    same = compare([y], [p], [p], [[str(i) for i in range(n)]], replicates=50)["auc"]
    assert same.low < 0 < same.high
    assert same.p == 1.0


def coverage(auc: float, n: int, prevalence: float, draws: int) -> float:
    """How often the interval covers the AUC of two normal distributions."""
    from scipy.stats import norm

    rng = np.random.default_rng(int(1000 * auc) + n)
    y = np.arange(n) < round(n * prevalence)
    covered = 0
    for _ in range(draws):
        scores = rng.normal(size=n) + y * math.sqrt(2) * norm.ppf(auc)
        found = mean_auc([one_auc(y, scores, np.arange(n), n)])
        covered += found.low <= auc <= found.high
    return covered / draws


@pytest.mark.parametrize(("auc", "n"), [(0.9, 33), (0.97, 33), (0.97, 165), (0.99, 100)])
def test_auc_intervals_cover_the_truth(auc: float, n: int) -> None:
    # Of 300 draws at 95 %, fewer than 272 (90.7 %) come about once in a thousand.
    assert 0.907 <= coverage(auc, n, 0.4, 300) <= 0.997


def test_the_auc_s_interval_is_delong_s_where_there_are_many_cases() -> None:
    y, p = example(3000, 2, seed=3)
    auc = evaluate(y, p, replicates=10)["auc"]
    error = math.sqrt(delong(y, p[:, 1], p[:, 1]).covariance[0][0])
    assert (auc.high - auc.low) / (2 * 1.96 * error) == pytest.approx(1, rel=0.02)


def test_the_mean_of_independent_folds_is_surer_than_one() -> None:
    sets = [example(60, 2, seed=s) for s in range(4)]
    single = [evaluate(y, p, replicates=10)["auc"] for y, p in sets]
    cases = [[f"{k}-{i}" for i in range(60)] for k in range(4)]
    apart = evaluate_folds([y for y, _ in sets], [p for _, p in sets], cases, replicates=10)["auc"]
    widths = np.mean([e.high - e.low for e in single])
    assert apart.value == pytest.approx(np.mean([e.value for e in single]))
    assert apart.high - apart.low == pytest.approx(widths / 2, rel=0.1)
    # The same fold four times tells nothing new.
    (y, p), own = sets[0], cases[0]
    again = evaluate_folds([y] * 4, [p] * 4, [own] * 4, replicates=10)["auc"]
    assert again.high - again.low == pytest.approx(single[0].high - single[0].low, rel=1e-6)


def test_a_share_lies_in_its_interval() -> None:
    for n in range(1, 60):
        for share in (0.0, 1.0, 1 / n):
            low, high = wilson(share, n)
            assert low <= share <= high


def test_shares_count_cases_not_slides() -> None:
    # Four cases of five identical slides each: by case the spread is that of 4 draws, not of 20.
    y = np.repeat([0, 1, 0, 1], 5)
    right = np.repeat([1, 1, 0, 0], 5)
    p = np.where((right == 1)[:, None], np.eye(2)[y], np.eye(2)[1 - y]) * 0.98 + 0.01
    cases = [f"case{i // 5}" for i in range(20)]
    by_case = evaluate(y, p, cases, replicates=100)["accuracy"]
    z2 = 1.959963984540054**2
    wilson_of_4 = (0.5 + z2 / 8 - math.sqrt(z2) * math.sqrt(0.25 / 4 + z2 / 64)) / (1 + z2 / 4)
    assert by_case.low == pytest.approx(wilson_of_4, rel=1e-9)
    by_slide = evaluate(y, p, replicates=100)["accuracy"]
    assert by_slide.low >= 0.2
    assert by_slide.high <= 0.8


def test_operating_points_by_hand() -> None:
    threshold = threshold_at_sensitivity([1, 1, 1, 1, 0, 0], [0.9, 0.8, 0.7, 0.1, 0.75, 0.2], 0.75)
    assert threshold == 0.7
    point = at_threshold([1, 1, 0, 0, 0], [0.95, 0.3, 0.7, 0.6, 0.1], None, threshold, 0.75)
    assert (point.sensitivity.value, point.specificity.value) == (0.5, pytest.approx(2 / 3))
    assert (point.ppv.value, point.npv.value, point.prevalence) == (0.5, pytest.approx(2 / 3), 0.4)
    with pytest.raises(FiguresError, match="no validation slide is positive"):
        threshold_at_sensitivity([0, 0], [0.1, 0.2], 0.9)


def test_the_positive_class_can_be_the_first() -> None:
    y, p = example(60, 2, seed=8)
    first, second = figures(y, p, positive=0), figures(y, p)
    assert first["sensitivity"] == second["specificity"]
    assert first["auc"] == pytest.approx(second["auc"])
    assert first["average_precision"] == pytest.approx(sk.average_precision_score(y == 0, p[:, 0]))
    assert second["kappa"] == pytest.approx(sk.cohen_kappa_score(y, p.argmax(axis=1)))


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
    assert all(d.value == 0 and d.p == 1 for d in same.values())
    assert all(math.isnan(d.low) and d.reason for name, d in same.items() if name != "auc")
    # That two order 120 slides alike does not say that they always would.
    assert 0 < same["auc"].high < 0.02
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


def draw_logits(
    rng: np.random.Generator, n: int, prevalence: float, *, scale: float = 1.0, shift: float = 0.0
) -> tuple[Array, NDArray[np.int64], Array]:
    """Logits of a model that is miscalibrated in a known way, labels, and the logits of the best there is."""
    y = (rng.random(n) < prevalence).astype(np.int64)
    odds = 2 * (rng.normal(size=n) + 2 * (y - 0.5)) + math.log(prevalence / (1 - prevalence))
    off = scale * odds + shift
    return np.stack([-off / 2, off / 2], axis=1), y, np.stack([-odds / 2, odds / 2], axis=1)


def loss(p: Array, y: NDArray[np.int64]) -> float:
    return float(-np.log(np.maximum(p[np.arange(len(y)), y], 1e-12)).mean())


def test_class_weights_are_taken_back() -> None:
    rng = np.random.default_rng(0)
    best, y, _ = draw_logits(rng, 20_000, 0.05)
    weights = [1 / (2 * 0.95), 1 / (2 * 0.05)]
    # What a model learns under a cross-entropy with these weights.
    learnt = best + np.log(weights)
    found = calibrate(learnt[:0], y[:0], class_weights=weights)
    assert (found.method, found.temperature) == ("prior", 1.0)
    np.testing.assert_allclose(found.probabilities(learnt), softmax(best), atol=1e-12)
    assert softmax(learnt)[:, 1].mean() > 2.5 * 0.05
    assert found.probabilities(learnt)[:, 1].mean() == pytest.approx(0.05, abs=0.005)


def test_few_validation_cases_are_not_fitted_to() -> None:
    rng = np.random.default_rng(1)
    worse = []
    for _ in range(200):
        z, y, _ = draw_logits(rng, 10, 1 / 20)
        test_z, test_y, _ = draw_logits(rng, 500, 1 / 20)
        weights = [0.53, 10.0]
        found, plain = calibrate(z, y, class_weights=weights), calibrate(z[:0], y[:0], class_weights=weights)
        assert "are needed" in found.note
        worse.append(loss(found.probabilities(test_z), test_y) - loss(plain.probabilities(test_z), test_y))
    assert np.mean(worse) <= 0.005


@pytest.mark.parametrize(("prevalence", "scale", "shift"), [(0.5, 3.0, 0.0), (0.2, 0.4, 0.0), (0.5, 1.0, 1.5)])
def test_known_miscalibration_is_mended(prevalence: float, scale: float, shift: float) -> None:
    rng = np.random.default_rng(2)
    gained, there = 0.0, 0.0
    for _ in range(12):
        z, y, _ = draw_logits(rng, 200, prevalence, scale=scale, shift=shift)
        test_z, test_y, best = draw_logits(rng, 4000, prevalence, scale=scale, shift=shift)
        plain, ours = softmax(test_z), calibrate(z, y).probabilities(test_z)
        gained += loss(plain, test_y) - loss(ours, test_y)
        there += loss(plain, test_y) - loss(softmax(best), test_y)
    assert there / 12 > 0.05
    assert gained >= 0.5 * there


def test_what_is_calibrated_already_is_hardly_harmed() -> None:
    rng = np.random.default_rng(3)
    worse = []
    for _ in range(30):
        z, y, _ = draw_logits(rng, 80, 0.3)
        test_z, test_y, _ = draw_logits(rng, 4000, 0.3)
        worse.append(loss(calibrate(z, y).probabilities(test_z), test_y) - loss(softmax(test_z), test_y))
    assert np.mean(worse) <= 0.01


def test_calibration_keeps_cases_together_and_does_not_depend_on_their_order() -> None:
    z, y, _ = draw_logits(np.random.default_rng(5), 120, 0.4, scale=3.0)
    cases = [f"c{i // 2}" for i in range(120)]
    first = calibrate(z, y, cases)
    assert first.method == "fitted"
    assert "60 cases" in first.note
    again = calibrate(np.repeat(z, 1, axis=0), y, cases)
    assert again == first
    assert calibrate(z[:40], y[:40]).method == "none"
    with pytest.raises(FiguresError, match="NaN"):
        calibrate([[np.nan, 0.0]], [0])
    assert Calibration().probabilities([[0.0, 0.0]]).tolist() == [[0.5, 0.5]]


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
