"""The linear model: the fit is scikit-learn's, what it chooses it chooses by case, and its file is as any other."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray

from lrmil.checkpoint import load_model
from lrmil.cli import group
from lrmil.config import POOLINGS, QUANTILES, LossSettings, ModelSettings, TrainSettings
from lrmil.data import LabelTable
from lrmil.errors import ModelFileError, SettingsError
from lrmil.model import build_model
from lrmil.model.linear import summaries
from lrmil.splits import FoldIndices
from lrmil.store import FeatureStore
from lrmil.targets.newton import newton_paths
from lrmil.trainer import TrainResult, train
from lrmil.trainer.inner import inner_folds
from lrmil.trainer.linear import PENALTIES, logistic_path
from wsi_pipe.errors import ConfigError

DIM = 9
SETTINGS = TrainSettings(model=ModelSettings(name="linear"), device="cpu")


def weak_bags(count: int = 90, classes: int = 2, seed: int = 0) -> tuple[FeatureStore, NDArray[np.int64]]:
    """Bags whose tiles are all shifted a little, in a direction of their class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    arrays = [rng.normal(size=(rng.integers(4, 12), DIM)) for _ in labels]
    for values, label in zip(arrays, labels, strict=True):
        values[:, label] += 0.8
    return FeatureStore.from_arrays([a.astype(np.float32) for a in arrays], dtype="float32"), labels.astype(np.int64)


def fitted(
    store: FeatureStore, labels: NDArray[np.int64], settings: TrainSettings = SETTINGS, **more: Any
) -> TrainResult:
    every = np.arange(len(labels))
    return train(store, labels, FoldIndices(every[:60], every[60:75], every[75:]), settings, **more)


@pytest.mark.parametrize("classes", [3, 4])
def test_the_fit_is_that_of_scikit_learn(classes: int) -> None:
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(1)
    values, labels = rng.normal(size=(50, 7)), np.arange(50) % classes
    weights = rng.uniform(0.5, 2, 50)
    penalty = 0.01
    *_, (weight, bias) = logistic_path(values, labels, weights, classes, (1.0, penalty))
    # scikit-learn divides the penalty instead of multiplying it, and sums where we average.
    other = LogisticRegression(C=1 / (penalty * weights.sum()), max_iter=5000, tol=1e-9)
    other.fit(values, labels, sample_weight=weights)
    np.testing.assert_allclose(weight, other.coef_, atol=2e-4)
    np.testing.assert_allclose(bias - bias.mean(), other.intercept_ - other.intercept_.mean(), atol=2e-4)


def test_folds_that_are_fitted_together_are_fitted_as_they_would_be_alone() -> None:
    rng = np.random.default_rng(4)
    values, weights = rng.normal(size=(40, 12)), rng.uniform(0.5, 2, 40)
    # Far from each other, so that every row is right long before the weakest penalty.
    labels = (values[:, 0] > 0).astype(np.int64)
    folds = np.arange(40) % 4
    together = newton_paths(20 * values, labels, weights, folds != np.arange(4)[:, None], PENALTIES)
    assert len(together) == len(PENALTIES)
    for fold in range(4):
        kept = folds != fold
        alone = logistic_path(20 * values[kept], labels[kept], weights[kept], 2, PENALTIES)
        for penalty, (weight, bias), (own, shift) in zip(PENALTIES, together, alone, strict=True):
            assert weight[fold] == pytest.approx(own, abs=1e-4)
            assert bias[fold] == pytest.approx(shift, abs=1e-4)
            assert np.isfinite(weight).all()
            share = weights[kept] / weights[kept].sum()
            z = 20 * values[kept] @ weight[fold].T + bias[fold]
            off = share[:, None] * (np.exp(z - np.logaddexp.reduce(z, axis=1)[:, None]) - np.eye(2)[labels[kept]])
            # At the least value the gradient is nothing: of the free bias, and of the penalised weights.
            assert np.abs(off.sum(0)).max() < 1e-6
            assert np.abs(off.T @ (20 * values[kept]) + penalty * weight[fold]).max() < 1e-6


@pytest.mark.parametrize("pooling", POOLINGS)
def test_summaries_are_numpys(pooling: str) -> None:
    rng = np.random.default_rng(2)
    arrays = [rng.normal(5, 2, size=(n, 4)) for n in (1, 2, 9, 40)]
    offsets = torch.tensor([0, 1, 3, 12, 12, 52])
    got = summaries(torch.from_numpy(np.concatenate(arrays)), offsets, pooling).numpy()
    wanted = {
        "mean": lambda a: a.mean(0),
        "mean+spread": lambda a: np.concatenate([a.mean(0), a.std(0)]),
        "quantiles": lambda a: np.quantile(a, QUANTILES, axis=0).ravel(),
    }[pooling]
    for row, array in zip(got[[0, 1, 2, 4]], arrays, strict=True):
        np.testing.assert_allclose(row, wanted(array), atol=1e-9)
    assert not got[3].any()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_linear_model_is_linear_in_the_standardised_summaries(pooling: str) -> None:
    store, labels = weak_bags()
    settings = replace(SETTINGS, model=ModelSettings(name="linear", pooling=pooling))
    result = fitted(store, labels, settings)
    rows = [store.bag(i).astype(np.float64) for i in range(len(labels))]
    tiles = np.concatenate(rows[:60])
    moved = np.concatenate([(values - tiles.mean(0)) / tiles.std(0) for values in rows])
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum([len(r) for r in rows])]))
    seen = summaries(torch.from_numpy(moved), offsets, pooling).numpy()
    weight, bias = (p.detach().double().numpy() for p in result.model.classifier.parameters())
    wanted = seen @ weight.T + bias
    for p, row in zip(result.predictions, wanted[60:], strict=True):
        np.testing.assert_allclose(p.logits, row, atol=1e-4)


def test_it_learns_a_weak_shift_of_the_mean_and_says_what_it_chose() -> None:
    store, labels = weak_bags()
    said: list[str] = []
    result = fitted(store, labels, say=said.append)
    assert result.card.metrics["test_auc"] > 0.9
    assert result.card.model.pooling == "mean"
    assert result.history == ()
    (text,) = said
    assert text.startswith("linear, mean of the tiles, penalty ")
    assert set(result.card.choice["losses"]) == set(POOLINGS)
    assert result.card.training["model"]["pooling"] == "auto"


def test_a_difference_of_spread_needs_more_than_the_mean() -> None:
    rng = np.random.default_rng(3)
    labels = np.arange(90) % 2
    store = FeatureStore.from_arrays([rng.normal(0, 1 + y, size=(30, DIM)).astype(np.float32) for y in labels])
    result = fitted(store, labels.astype(np.int64))
    assert result.card.model.pooling != "mean"
    assert result.card.metrics["test_auc"] > 0.95
    assert result.card.choice["losses"]["mean"] > 2 * min(result.card.choice["losses"].values())


def test_slides_of_a_case_stay_together_inside_too() -> None:
    # Slides of a case are alike and its features tell it apart, but labels are chance: only folds that tear cases
    # apart could find anything. 30 cases of three slides.
    rng = np.random.default_rng(4)
    case, centre = np.repeat(np.arange(30), 3), rng.normal(size=(30, 40))
    labels = rng.permutation(np.arange(30) % 2)[case]
    folds = inner_folds(labels, [str(c) for c in case], 2)
    assert folds is not None
    assert all(len(set(folds[case == c])) == 1 for c in range(30))
    arrays = [(centre[c] + 0.1 * rng.normal(size=(5, 40))).astype(np.float32) for c in case]
    store = FeatureStore.from_arrays(arrays)
    every = np.arange(90)
    table = LabelTable(("0", "1"), labels.astype(np.int64), tuple(f"c{c}" for c in case), every)
    result = train(store, table, FoldIndices(every, every[:0], every[:0]), SETTINGS)
    assert min(result.card.choice["losses"].values()) > 0.6
    # Cases torn apart are recognised: the same bags as cases of their own look easy.
    easy = train(store, labels, FoldIndices(every, every[:0], every[:0]), SETTINGS)
    assert min(easy.card.choice["losses"].values()) < 0.3


def test_inner_folds_have_every_class_in_every_training_part() -> None:
    labels = np.array([0] * 40 + [1] * 3)
    folds = inner_folds(labels, [str(i) for i in range(43)], 2)
    assert folds is not None
    assert int(folds.max()) + 1 == 3
    assert sorted(folds[40:].tolist()) == [0, 1, 2]
    assert inner_folds(labels, ["a"] * 40 + ["b"] * 3, 2) is None


def test_too_few_cases_are_said_and_fitted_all_the_same() -> None:
    store, labels = weak_bags()
    split = FoldIndices(np.array([0, 1, 2]), np.arange(0), np.arange(60, 90))
    result = train(store, labels, split, SETTINGS)
    assert "fewer than two training cases" in result.card.choice["said"]
    assert result.card.model.pooling == "mean"
    assert len(result.predictions) == 30


def test_more_classes_than_two_and_balanced_weights() -> None:
    store, labels = weak_bags(classes=3)
    rare = np.flatnonzero((labels != 2) | (np.arange(90) < 30))
    split = FoldIndices(rare[rare < 70], rare[:0], np.flatnonzero(np.arange(90) >= 70))
    result = train(store, labels, split, SETTINGS)
    assert len(result.predictions[0].logits) == 3
    assert result.card.metrics["test_auc"] > 0.85
    # Weights of the classes are taken back, as for every other model.
    assert result.card.bias[2] < result.card.bias[0]
    assert result.card.calibration.startswith("prior")


def test_the_file_comes_back_and_is_checked(tmp_path: Path) -> None:
    store, labels = weak_bags()
    result = fitted(store, labels, out_dir=tmp_path / "run")
    module, card = load_model(tmp_path / "run" / "model.safetensors")
    assert card.model == result.model.settings
    assert not any("projection" in name for name in module.state_dict())
    output = module(torch.from_numpy(store.bag(80)), torch.tensor([0, len(store.bag(80))]))
    assert output.attention_logits is None
    found = next(p for p in result.predictions if p.slide_id == store.slide_ids[80])
    np.testing.assert_allclose(output.logits[0].tolist(), found.logits, atol=1e-5)
    # The same again, into the same folder, gives the same file.
    again = fitted(store, labels, out_dir=tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), result.model.parameters(), strict=True))
    from lrmil.checkpoint import save_model

    with pytest.raises(ModelFileError, match=r"classifier\.weight has the shape"):
        save_model(tmp_path / "x.safetensors", module, replace(card, model=replace(card.model, in_dim=10**9)))
    with pytest.raises(ModelFileError, match="still to be chosen"):
        save_model(tmp_path / "x.safetensors", module, replace(card, model=replace(card.model, pooling="auto")))
    with pytest.raises(ConfigError, match="still to be chosen"):
        build_model(ModelSettings(name="linear"))


def test_it_learns_nothing_from_a_teacher() -> None:
    store, labels = weak_bags()
    teacher = build_model(ModelSettings(name="mean", in_dim=DIM, hidden=4))
    with pytest.raises(SettingsError, match="labels alone"):
        fitted(store, labels, teacher=teacher, hr_store=store)
    plain = replace(SETTINGS, loss=LossSettings(bag=0, soft=0, hard=0))
    assert fitted(store, labels, plain, teacher=teacher, hr_store=store).card.model.name == "linear"


def test_the_commands_take_it(tmp_path: Path) -> None:
    import h5py

    rng = np.random.default_rng(5)
    (tmp_path / "bags").mkdir()
    rows = []
    for i in range(40):
        with h5py.File(tmp_path / "bags" / f"s{i:02d}.h5", "w") as file:
            values = rng.normal(size=(8, DIM)) + (i % 2) * 0.9 * (np.arange(DIM) < 2)
            file["features"] = values.astype(np.float32)
            file["coords"] = np.stack([np.arange(8) % 4, np.arange(8) // 4], 1) * 256
        rows.append(f"s{i:02d},{'ab'[i % 2]}")
    (tmp_path / "labels.csv").write_text("slide_id,label\n" + "\n".join(rows) + "\n")
    common = ["--bags", str(tmp_path / "bags"), "--labels", str(tmp_path / "labels.csv"), "-e", "net", "-r", "5x"]
    run = str(tmp_path / "run")
    invoke = CliRunner().invoke
    result = invoke(group, ["train", *common, "-o", run, "--model", "linear", "--folds", "2", "--replicates", "50"])
    assert result.exit_code == 0, result.output
    assert "fold_1: linear, " in result.stderr
    assert (tmp_path / "run" / "summary.json").is_file()
    assert invoke(group, ["compare", run, run, "--replicates", "20"]).exit_code == 0
    model = str(tmp_path / "run" / "fold_1" / "model.safetensors")
    out = tmp_path / "out"
    result = invoke(group, ["predict", "--model", model, "--bags", str(tmp_path / "bags"), "-o", str(out)])
    assert result.exit_code == 0, result.output
    with open(tmp_path / "run" / "fold_1" / "predictions.csv", newline="") as file:
        trained = {row["slide_id"]: float(row["probability_b"]) for row in csv.DictReader(file)}
    body = json.loads((out / "predictions.json").read_text())
    assert body["model"]["architecture"] == "linear"
    # The store holds float16, the bags float32.
    predicted = {slide["slide_id"]: slide["probabilities"]["b"] for slide in body["slides"]}
    assert all(predicted[name] == pytest.approx(p, abs=2e-3) for name, p in trained.items())
    splits = str(tmp_path / "run" / "splits.csv")
    asked = ["evaluate", "--model", model, *common, "--splits", splits, "--fold", "1", "-o", str(tmp_path / "ev")]
    result = invoke(group, asked)
    assert result.exit_code == 0, result.output
