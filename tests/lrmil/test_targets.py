"""Targets: what they read, lose, decide and judge, each against another implementation or by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, cohen_kappa_score, mean_absolute_error, r2_score, roc_auc_score

from lrmil.errors import LabelError, SplitError
from lrmil.targets import TARGETS, Fold, Several, Target, TargetTable, load_targets, parse_targets, target_from_json
from lrmil.targets.base import truth_without
from lrmil.targets.cases import averaged, table_by_case
from lrmil.targets.cox import Cox
from lrmil.targets.discrete import DiscreteSurvival
from lrmil.targets.multilabel import MultiLabel
from lrmil.targets.ordinal import Ordinal
from lrmil.targets.regression import Regression
from wsi_pipe.errors import ConfigError

RNG = np.random.default_rng(0)


def table(
    folder: Path, text: str, targets: Sequence[str], ids: Sequence[str], cases: Sequence[str] = ()
) -> TargetTable:
    path = folder / "labels.csv"
    path.write_text(text)
    return load_targets(path, ids, cases or ids, parse_targets(targets))


def survival_truth(count: int = 60, seed: int = 0, *, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 2))
    true, lost = rng.exponential(np.exp(-x[:, 0] + 0.5 * x[:, 1])), rng.uniform(0.2, 3, size=count)
    time = np.minimum(true, lost)
    return np.stack([np.ceil(5 * time) if ties else time, true <= lost], axis=1).astype(float), x


# Survival


def partial_likelihood(z: np.ndarray, truth: np.ndarray) -> float:
    """Breslow's, term by term."""
    terms = [np.log(np.exp(z[truth[:, 0] >= time]).sum()) - z[i] for i, (time, event) in enumerate(truth) if event == 1]
    return float(np.mean(terms))


@pytest.mark.parametrize("ties", [False, True])
def test_cox_loss_is_the_partial_likelihood_and_unknown_bags_are_at_no_risk(ties: bool) -> None:
    truth, x = survival_truth(ties=ties)
    target, z = Cox("os"), x[:, :1]
    loss = float(target.loss(torch.from_numpy(z), torch.from_numpy(truth)))
    assert loss == pytest.approx(partial_likelihood(z[:, 0], truth), abs=1e-12)
    hidden = truth.copy()
    hidden[::3] = np.nan
    kept = ~np.isnan(hidden[:, 0])
    outputs = torch.from_numpy(z).requires_grad_()
    value = target.loss(outputs, torch.from_numpy(hidden))
    assert value.item() == pytest.approx(partial_likelihood(z[kept, 0], truth[kept]), abs=1e-12)
    value.backward()
    assert outputs.grad is not None
    assert (outputs.grad[::3] == 0).all()
    assert outputs.grad.isfinite().all()
    # Several networks at once, of which each leaves other bags out.
    keep = torch.from_numpy(np.stack([kept, np.ones(len(kept), bool)]))
    many = truth_without(torch.from_numpy(truth).expand(2, *truth.shape), keep)
    losses, counts = target.losses(torch.from_numpy(z).expand(2, *z.shape), many)
    np.testing.assert_allclose((losses.sum(1) / counts.sum(1)).numpy(), [value.item(), loss], atol=1e-12)


def test_a_linear_cox_model_is_that_of_lifelines() -> None:
    lifelines = pytest.importorskip("lifelines")
    import pandas as pd

    truth, x = survival_truth(200)
    weight, _ = Cox("os").linear_path(x, truth, (1e-9,))[0]
    frame = pd.DataFrame({"a": x[:, 0], "b": x[:, 1], "t": truth[:, 0], "e": truth[:, 1]})
    wanted = lifelines.CoxPHFitter().fit(frame, "t", "e").params_.to_numpy()
    np.testing.assert_allclose(weight[0], wanted, atol=1e-3)
    # The coefficients that the times were drawn with: 1 and -0.5.
    assert np.abs(weight[0] - [1, -0.5]).max() < 0.25


def test_groups_are_cut_at_the_training_median_and_survival_is_breslows() -> None:
    truth, x = survival_truth(80)
    target = Cox("os", horizons=(0.5, 1.0)).fitted(truth).settled(x[:, :1], truth)
    assert target.groups(x[:, :1]).sum() == 40
    moved = target.groups(x[:, :1] + 10)
    assert moved.all()
    told = target.said(x[:, :1])
    assert list(told) == ["os_group", "os_risk", "os_survival_0.5", "os_survival_1"]
    risk = x[:, 0] - x[:, 0].mean()
    at = truth[(truth[:, 1] == 1) & (truth[:, 0] <= 1), 0]
    hazard = sum(1 / np.exp(risk[truth[:, 0] >= time]).sum() for time in at)
    np.testing.assert_allclose(told["os_survival_1"], np.exp(-hazard * np.exp(risk)), rtol=1e-9)
    assert set(target.extra(Fold(target, truth, x[:, :1], ("a",) * 80))["group_sizes"].values()) == {40}


def test_discrete_hazards_by_hand() -> None:
    target = DiscreteSurvival("os", edges=(1.0, 2.0, 4.0), intervals=3, horizons=(1.5,))
    z = np.array([[0.3, -0.2, 0.8]])
    h = expit(z[0])

    def loss(time: float, event: float) -> float:
        return float(target.loss(torch.from_numpy(z), torch.tensor([[time, event]], dtype=torch.float64)))

    assert loss(0.0, 1) == pytest.approx(-np.log(h[0]))
    assert loss(1.0, 1) == pytest.approx(-np.log(h[0]))
    assert loss(1.5, 1) == pytest.approx(-np.log((1 - h[0]) * h[1]))
    assert loss(3.9, 1) == pytest.approx(-np.log((1 - h[0]) * (1 - h[1]) * h[2]))
    # Lost before the middle of an interval says nothing of it, after it says that it was survived.
    assert loss(1.4, 0) == pytest.approx(-np.log(1 - h[0]))
    assert loss(1.6, 0) == pytest.approx(-np.log((1 - h[0]) * (1 - h[1])))
    np.testing.assert_allclose(target.curve(z)[0], np.cumprod(1 - h))
    assert target.survival(z, (1.5,))[0, 0] == pytest.approx((1 - h[0]) * np.sqrt(1 - h[1]))
    two = np.concatenate([z, z - 1])
    np.testing.assert_allclose(target.curve(target.together(two)[None])[0], target.curve(two).mean(0))


# Numbers, grades and labels, against scikit-learn


def test_regression_figures_and_huber_loss() -> None:
    true, told = RNG.normal(60, 10, 80), RNG.normal(60, 10, 80)
    told[:40] = true[:40] + 3
    truth = true[:, None].copy()
    truth[::7] = np.nan
    target = Regression("age").fitted(truth)
    there = ~np.isnan(truth[:, 0])
    assert target.mean == pytest.approx(true[there].mean())
    outputs = ((told - target.mean) / target.deviation)[:, None]
    found = target.figures(truth, outputs)
    assert found["pearson"] == pytest.approx(np.corrcoef(true[there], told[there])[0, 1])
    assert found["r2"] == pytest.approx(r2_score(true[there], told[there]))
    assert found["mae"] == pytest.approx(mean_absolute_error(true[there], told[there]))
    off = (told - true)[there] / target.deviation
    huber = np.where(np.abs(off) <= 1, off**2 / 2, np.abs(off) - 0.5).mean()
    assert float(target.loss(torch.from_numpy(outputs), torch.from_numpy(truth))) == pytest.approx(huber)
    extra = target.extra(Fold(target, truth, outputs, ("a",) * 80))
    off = (told - true)[there]
    assert extra["bias"] == pytest.approx(off.mean())
    assert extra["limits_of_agreement"][1] == pytest.approx(off.mean() + 1.96 * off.std(ddof=1))


def test_a_linear_regression_is_ridge_where_errors_are_small() -> None:
    x = RNG.normal(size=(50, 3))
    truth = (2 + x @ [0.3, -0.2, 0.1] + 0.01 * RNG.normal(size=50))[:, None]
    target = Regression("age").fitted(truth)
    weight, bias = target.linear_path(x, truth, (0.05,))[0]
    y = (truth[:, 0] - target.mean) / target.deviation
    centred = x - x.mean(0)
    wanted = np.linalg.solve(centred.T @ centred / 50 + 0.05 * np.eye(3), centred.T @ (y - y.mean()) / 50)
    # Beyond one deviation the loss is linear, and some bags are there: the ridge is near, not the same.
    np.testing.assert_allclose(weight[0], wanted, atol=0.02)
    assert bias[0] == pytest.approx(y.mean() - x.mean(0) @ weight[0], abs=0.02)


def test_ordinal_chances_loss_and_figures() -> None:
    target = Ordinal("grade", ("low", "mid", "high"))
    z = RNG.normal(size=(90, 2))
    grades = RNG.integers(0, 3, 90)
    p = target.probabilities(z)
    above = expit(z)
    np.testing.assert_allclose(p, np.stack([1 - above[:, 0], above[:, 0] * (1 - above[:, 1]), above.prod(1)], axis=1))
    truth = grades[:, None].astype(float)
    loss = float(target.loss(torch.from_numpy(z), torch.from_numpy(truth)))
    assert loss == pytest.approx(-np.log(p[np.arange(90), grades]).mean())
    told = np.array([target.levels.index(str(v)) for v in target.said(z)["grade"]])
    found = target.figures(truth, z)
    assert found["kappa_quadratic"] == pytest.approx(cohen_kappa_score(grades, told, weights="quadratic"))
    assert found["mae"] == pytest.approx(mean_absolute_error(grades, told))
    assert found["accuracy"] == pytest.approx(accuracy_score(grades, told))
    np.testing.assert_allclose(target.probabilities(target.together(z[:4])[None])[0], p[:4].mean(0))


def test_multilabel_is_balanced_in_the_loss_and_told_with_its_prior() -> None:
    x = RNG.normal(size=(400, 2))
    chance = expit(np.stack([x[:, 0] - 2, 0.5 * x[:, 1]], axis=1))
    truth = (RNG.random((400, 2)) < chance).astype(float)
    truth[::5, 1] = np.nan
    target = MultiLabel("markers", ("A", "B")).fitted(truth)
    weight, bias = target.linear_path(x, truth, (1e-6,))[0]
    for k in range(2):
        there = ~np.isnan(truth[:, k])
        own = LogisticRegression(C=1e9, class_weight="balanced", tol=1e-8, max_iter=1000)
        own.fit(x[there], truth[there, k])
        np.testing.assert_allclose(weight[k], own.coef_[0], atol=5e-3)
        assert bias[k] == pytest.approx(own.intercept_[0], abs=5e-3)
    outputs = x @ weight.T + bias
    p = target.probabilities(outputs)
    found = target.figures(truth, outputs)
    aucs = [roc_auc_score(truth[~np.isnan(truth[:, k]), k], p[~np.isnan(truth[:, k]), k]) for k in range(2)]
    assert [found["auc_A"], found["auc_B"]] == pytest.approx(aucs)
    assert found["auc"] == pytest.approx(np.mean(aucs))
    # Balanced training would say that half have A; with the prior it is near the share that has.
    assert abs(p[:, 0].mean() - truth[:, 0].mean()) < 0.05
    assert abs(expit(outputs[:, 0]).mean() - truth[:, 0].mean()) > 0.15


# Several, and what is missing

TABLE = """slide_id,os_time,os_event,age,grade,markers_ER,markers_PR
a,10,1,50,low,1,0
b,20,0:LIVING,,high,0,
c,,,70,mid,,
d,5,1:DECEASED,80,low,yes,yes
e,,,,,,
"""
ALL = ["os:survival:horizons=7+15", "age:regression", "grade:ordinal:order=low<mid<high", "markers:multilabel"]


def test_several_targets_mask_what_each_lacks(tmp_path: Path) -> None:
    found = table(tmp_path, TABLE, ALL, "abcde")
    target = found.target
    assert isinstance(target, Several)
    assert found.usable.tolist() == [0, 1, 2, 3]
    assert found.unlabelled == ("e",)
    assert "os: 3 of 5 bags have a value" in found.counts()
    assert target.truth_names[:3] == ("os_time", "os_event", "age_true")
    truth = found.truth[:4]
    fitted = target.fitted(truth)
    z = torch.from_numpy(RNG.normal(size=(4, len(target.outputs)))).requires_grad_()
    loss = fitted.loss(z, torch.from_numpy(truth))
    alone = [part.loss(inside, own) for part, own, inside in fitted.each(torch.from_numpy(truth), z)]
    assert float(loss.detach()) == pytest.approx(float(torch.stack(alone).mean().detach()))
    loss.backward()
    assert z.grad is not None
    # Slide c lacks time and markers, and is at no risk; its age and grade teach.
    assert z.grad[2].tolist()[0] == 0
    assert z.grad[2, -2:].tolist() == [0, 0]
    assert (z.grad[2, 1:4] != 0).any()
    assert target.truth_cells(truth[1]) == [20.0, 0, "", "high", 0, ""]


@pytest.mark.parametrize("text", [*ALL, "os:survival-discrete:intervals=2", "grade:class"])
def test_a_target_comes_back_from_its_file_and_says_the_same(tmp_path: Path, text: str) -> None:
    found = table(tmp_path, TABLE, [text, "age:regression"] if not text.startswith("age") else [text], "abcde")
    truth = found.truth[found.usable]
    outputs = RNG.normal(size=(len(truth), len(found.target.outputs)))
    target = found.target.fitted(truth).settled(outputs, truth)
    back = target_from_json(json.loads(json.dumps(target.to_json(), allow_nan=False)))
    assert back == target
    assert back.said(outputs) == target.said(outputs)


def test_every_kind_is_asked_for_by_its_own_name() -> None:
    for kind, cls in TARGETS.items():
        assert cls.kind == kind
        assert parse_targets([f"x:{kind}"])[0].kind is cls


@pytest.mark.parametrize(
    ("targets", "error", "words"),
    [
        (["os"], ConfigError, "not NAME:KIND"),
        (["os:hazard"], ConfigError, "known ones are class, survival"),
        (["os:survival:when=x"], ConfigError, "time=column of times"),
        (["a:survival", "a:regression"], ConfigError, "two targets are called 'a'"),
        (["pfs:survival"], LabelError, "no column 'pfs_time' or 'pfs'"),
        (["grade:regression"], LabelError, "'low' is no number"),
        (["grade:ordinal:order=low<high"], LabelError, "'mid' is not one of low, high"),
        (["her2:multilabel"], LabelError, "no column begins with her2_"),
        (["os:survival:event=age"], LabelError, "'50' does not say whether the event was seen"),
        (["os:survival-discrete:intervals=1"], LabelError, "no number from 2 to 100"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, targets: list[str], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        table(tmp_path, TABLE, targets, "abcde")


def test_too_little_to_train_on_is_refused() -> None:
    censored = np.array([[1.0, 0], [2.0, 0], [3.0, 1]])
    with pytest.raises(SplitError, match="1 training bags with an event"):
        Cox("os").fitted(censored)
    with pytest.raises(SplitError, match="do not vary"):
        Regression("age").fitted(np.ones((4, 1)))
    with pytest.raises(SplitError, match="of one grade"):
        Ordinal("g", ("a", "b")).fitted(np.ones((4, 1)))
    with pytest.raises(SplitError, match="no training bag is with A"):
        MultiLabel("m", ("A",)).fitted(np.zeros((4, 1)))


def test_values_are_mapped_and_a_contradiction_names_both_rows(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("PATIENT,KRAS\np1,MUT\np2,WT\np3,unclear\n")
    asked = parse_targets(["KRAS:multilabel:columns=KRAS"])
    with pytest.raises(LabelError, match="'unclear' does not say"):
        load_targets(path, ["s1", "s2", "s3"], ["p1", "p2", "p3"], asked)
    found = load_targets(path, ["s1", "s2", "s3"], ["p1", "p2", "p3"], asked, renames={"unclear": ""})
    np.testing.assert_array_equal(found.truth[:, 0], [1, 0, np.nan])
    path.write_text("slide_id,age\ns1,50\ns1.svs,51\n")
    with pytest.raises(LabelError, match="rows 2 and 3"):
        load_targets(path, ["s1"], ["s1"], parse_targets(["age:regression"]))


def test_a_model_file_without_a_target_tells_classes() -> None:
    from lrmil.checkpoint import ModelCard
    from lrmil.config import ModelSettings
    from lrmil.targets import Classification

    values = ModelCard(ModelSettings("mean", 4, 2), ("a", "b"), temperature=2.0, bias=(0.1, -0.1)).to_json()
    del values["target_state"]
    target = ModelCard.from_json(values).target
    assert isinstance(target, Classification)
    assert (target.classes, target.temperature, target.bias) == (("a", "b"), 2.0, (0.1, -0.1))
    with pytest.raises(ConfigError, match="other outputs than its model"):
        ModelCard(ModelSettings("mean", 4, 2), ("a", "b"), target_state=Regression("age").to_json())


def test_classes_among_several_are_masked_too() -> None:
    from lrmil.targets import Classification

    target = Several("", (Classification("kind", ("a", "b", "c")), Regression("age")))
    truth = np.array([[0.0, 50.0], [2.0, np.nan], [np.nan, 60.0], [1.0, 40.0]])
    fitted = target.fitted(truth)
    z = RNG.normal(size=(4, 4))
    known = np.array([0, 1, 3])
    p = np.exp(z[known, :3]) / np.exp(z[known, :3]).sum(1, keepdims=True)
    ce = -np.log(p[np.arange(3), [0, 2, 1]]).mean()
    off = (truth[[0, 2, 3], 1] - 50) / truth[[0, 2, 3], 1].std() - z[[0, 2, 3], 3]
    huber = np.where(np.abs(off) <= 1, off**2 / 2, np.abs(off) - 0.5).mean()
    assert float(fitted.loss(torch.from_numpy(z), torch.from_numpy(truth))) == pytest.approx((ce + huber) / 2, rel=1e-6)
    blank = Fold(fitted, np.full_like(truth, np.nan), z, ("a", "b", "c", "d"))
    assert "no slide" in str(fitted.estimates([blank], replicates=10)["kind.auc"].reason)
    found = fitted.figures(truth, z)
    assert found["kind.accuracy"] == pytest.approx((z[known, :3].argmax(1) == [0, 2, 1]).mean())
    assert list(fitted.said(z))[:2] == ["kind", "probability_kind_a"]


def test_a_validation_part_without_an_event_has_no_loss() -> None:
    truth = np.array([[1.0, 0], [2.0, 0]])
    found = Cox("os", horizons=(1.5,)).validation(truth, np.zeros((2, 1)))
    assert np.isnan(found["loss"])
    assert np.isnan(found["concordance"])


def test_a_heat_map_is_titled_by_what_the_target_says_first() -> None:
    from lrmil.experiment.slide_files import caption_of
    from lrmil.predictor import SlidePrediction

    said = {"os_group": "high", "os_risk": 1.5}
    assert caption_of(SlidePrediction("s1", "done", predicted="high", said=said)) == "s1: os_group high"


def test_what_a_student_learns_of_its_teachers_outputs() -> None:
    z, t = torch.tensor([[1.0], [3.0]], requires_grad=True), torch.tensor([[2.0], [1.0]])
    assert Regression("age").distilled(z, t, 2.0).item() == pytest.approx((1 + 4) / 2)
    both = Several("", (Regression("age"), Regression("size")))
    z2, t2 = torch.tensor([[1.0, 5.0]]), torch.tensor([[2.0, 5.0]])
    assert both.distilled(z2, t2, 2.0).item() == pytest.approx((1 + 0) / 2)


# Cases


def test_a_case_is_the_mean_of_its_slides_by_hand() -> None:
    from lrmil.targets import Classification

    target = Classification(classes=("benign", "tumour"), temperature=2.0, bias=(0.3, -0.3))
    # Two slides of p1 disagree: 0.9 and 0.2 for tumour; p2 has one slide.
    p = np.array([0.9, 0.2, 0.7])
    outputs = 2.0 * (np.log(np.stack([1 - p, p], axis=1)) - [0.3, -0.3])
    fold = Fold(target, np.array([1, 1, 0]), outputs, ("p1", "p1", "p2"))
    assert target.said(outputs)["predicted"] == ["tumour", "benign", "tumour"]
    found = averaged(fold)
    assert found.fold.cases == ("p1", "p2")
    assert found.slides == (2, 1)
    np.testing.assert_allclose(target.probabilities(found.fold.outputs)[:, 1], [0.55, 0.7])
    assert target.said(found.fold.outputs)["predicted"] == ["tumour", "tumour"]
    torn = averaged(Fold(target, np.array([1, 0, 0]), outputs, ("p1", "p1", "p2")))
    assert (torn.torn, torn.fold.cases) == (("p1",), ("p2",))


def test_a_case_with_two_labels_is_no_bag(tmp_path: Path) -> None:
    text = "slide_id,case_id,age\na,p1,50\nb,p1,60\nc,p2,70\n"
    found = table(tmp_path, text, ["age:regression"], "abc", ["p1", "p1", "p2"])
    slides = [np.array([0, 1]), np.array([2])]
    with pytest.raises(LabelError, match="1 cases have slides with different labels: p1"):
        table_by_case(found, slides, ["p1", "p2"], np.array([2, 1]))
    agreed = table(tmp_path, text.replace("60", "50"), ["age:regression"], "abc", ["p1", "p1", "p2"])
    joined = table_by_case(agreed, slides, ["p1", "p2"], np.array([2, 1]))
    assert isinstance(joined, TargetTable)
    assert joined.truth[:, 0].tolist() == [50, 70]
    assert joined.usable.tolist() == [0, 1]


def test_estimates_count_cases(tmp_path: Path) -> None:
    truth, x = survival_truth(40)
    target: Target = Cox("os", horizons=(0.5,)).fitted(truth).settled(x[:, :1], truth)
    cases = tuple(f"p{i // 2}" for i in range(40))
    found: dict[str, Any] = target.estimates([Fold(target, truth, x[:, :1], cases)], replicates=200)
    value = target.figures(truth, x[:, :1])["concordance"]
    assert found["concordance"].value == pytest.approx(value)
    assert found["concordance"].low < value < found["concordance"].high
    drawn = target.draw(tmp_path, "", Fold(target, truth, x[:, :1], cases))
    assert [path.name for path in drawn] == ["os-survival.png"]
    assert all(path.stat().st_size > 5000 for path in drawn)


def test_every_kind_draws_its_pictures(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    z, cases = rng.normal(size=(30, 2)), tuple(map(str, range(30)))
    labels = (z + rng.normal(size=(30, 2)) > 0).astype(float)
    labels[::4, 1] = np.nan
    grades = np.digitize(z[:, :1], [-0.5, 0.5]).astype(float)
    parts = (Regression("age"), Ordinal("grade", ("low", "mid", "high")), MultiLabel("markers", ("ER", "PR")))
    truth, outputs = np.concatenate([z[:, :1], grades, labels], axis=1), np.concatenate([z[:, :1], z, z], axis=1)
    target = Several("", parts).fitted(truth)
    drawn = target.draw(tmp_path, "-val", Fold(target, truth, outputs, cases))
    assert [p.name for p in drawn] == ["age-agreement-val.png", "grade-grades-val.png", "markers-roc-val.png"]
    assert all(p.stat().st_size > 5000 for p in drawn)
    nothing = Fold(target, np.full_like(truth, np.nan), outputs, cases)
    assert target.draw(tmp_path, "-none", nothing) == []
    assert all(np.isnan(value) for value in target.figures(nothing.truth, outputs).values())
