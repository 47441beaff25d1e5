"""Settings by search: inside the training cases alone, the same after an interruption, the cost told before."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lrmil.cli import group
from lrmil.config import ModelSettings, TrainSettings, load_settings, tuned_on
from lrmil.data import load_labels
from lrmil.errors import ResumeError, SplitError
from lrmil.experiment import Cohort
from lrmil.experiment import tune as module
from lrmil.experiment.search_space import DEFAULT_SPACE, Axis, SearchSpace
from lrmil.experiment.tune import TuneSettings, tune_fold
from lrmil.splits import make_splits
from lrmil.store import BagRecord, FeatureStore
from wsi_pipe.cli import run_group
from wsi_pipe.errors import ConfigError

MakeBag = Callable[..., Path]
BASE = TrainSettings(model=ModelSettings("mean", hidden=8), epochs=2, min_epochs=1, device="cpu", precision="float32")
CASES = 24


def make_cohort(tmp_path: Path, spoilt: str = "") -> tuple[Cohort, object]:
    """Twenty-four cases of two classes; spoilt: "test" or "val", whose features and labels are then noise."""
    rng = np.random.default_rng(0)
    ids = [f"s{i}" for i in range(CASES)]
    labels = {name: ["a", "b"][i % 2] for i, name in enumerate(ids)}
    splits = make_splits(labels, 2, 0, 0.2)
    part = dict(zip(splits.ids, splits.folds["fold_1"], strict=True))
    bags = [rng.normal(size=(5, 4)) + np.array([2 * (i % 2), 0, 0, 0]) for i in range(CASES)]
    for i, name in enumerate(ids):
        if spoilt and part[name] == spoilt:
            bags[i] = np.full((5, 4), 1e4)
            labels[name] = "b" if labels[name] == "a" else "a"
    path = tmp_path / f"labels{spoilt}.csv"
    path.write_text("slide_id,label\n" + "".join(f"{name},{label}\n" for name, label in labels.items()))
    flat = np.concatenate(bags).astype(np.float32)
    store = FeatureStore(
        flat, np.arange(0, 5 * CASES + 1, 5), [BagRecord(name) for name in ids], dtype="float32", content_hash="fixed"
    )
    return Cohort(store, load_labels(path, ids, ids, lengths=store.lengths)), splits


@pytest.mark.parametrize("method", ["random", "halving"])
def test_no_case_outside_the_training_part_counts(tmp_path: Path, method: str) -> None:
    settings = TuneSettings(method, trials=3, inner_folds=2)
    space = SearchSpace.of(BASE, ["learning_rate=1e-3..1e-1:log", "model.hidden=4,8"])
    found = []
    for spoilt in ("", "test", "val"):
        cohort, splits = make_cohort(tmp_path, spoilt)
        result = tune_fold(cohort, splits, "fold_1", space, settings, tmp_path / (spoilt or "plain"))  # type: ignore[arg-type]
        found.append([(trial.changes, trial.figures) for trial in result.trials])
    assert found[0] == found[1] == found[2]


def test_an_interrupted_search_goes_on_and_tells_its_cost_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohort, splits = make_cohort(tmp_path)
    space = SearchSpace.of(BASE, ["learning_rate=1e-3..1e-1:log"])
    settings = TuneSettings(trials=3, inner_folds=2)
    arguments = (cohort, splits, "fold_1", space, settings)
    whole = tune_fold(*arguments, tmp_path / "whole")  # type: ignore[arg-type]
    said: list[str] = []
    calls: list[int] = []
    real = module.train

    def counted(*given: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*given, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "train", counted)
    first = tune_fold(*arguments, tmp_path / "parts", cost_only=True, say=said.append)  # type: ignore[arg-type]
    assert (first.best, first.toml, first.trainings, len(calls)) == (None, None, 6, 1)
    assert "3 trials on 2 inner folds of" in said[0]
    assert "are 6 trainings; the first took" in said[0]
    assert len(said) == 1
    with pytest.raises(KeyboardInterrupt):
        tune_fold(*arguments, tmp_path / "parts")  # type: ignore[arg-type]
    again = tune_fold(*arguments, tmp_path / "parts", say=said.append)  # type: ignore[arg-type]
    # Six trainings and the one that was cut off.
    assert len(calls) == 7
    assert [trial.figures for trial in again.trials] == [trial.figures for trial in whole.trials]
    assert again.toml is not None
    assert whole.toml is not None
    assert again.toml.read_text() == whole.toml.read_text()
    other = SearchSpace.of(BASE, ["learning_rate=1e-3..1e-2:log"])
    with pytest.raises(ResumeError, match="another --out"):
        tune_fold(cohort, splits, "fold_1", other, settings, tmp_path / "parts")  # type: ignore[arg-type]


def test_the_best_mean_is_chosen_and_halving_drops_the_worse_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohort, splits = make_cohort(tmp_path)
    space = SearchSpace.of(BASE, ["seed=1,2,3,4,5,6,7"])
    asked: list[tuple[str, int]] = []
    inner: list[object] = []

    def figure(
        cohort: object, resident: object, split: object, space: object, trial: module.Trial, metric: str
    ) -> float:
        if not any(split is one for one in inner):
            inner.append(split)
        number = int(trial.changes[0].partition("=")[2]) if trial.changes else 9
        asked.append(("".join(trial.changes), next(i for i, one in enumerate(inner) if one is split)))
        # 3 is the best but for the first inner fold, on which it is second.
        return abs(number - 3) + (1.5 if number == 3 and len(trial.figures) == 0 else 0.0)

    monkeypatch.setattr(module, "_figure", figure)
    halving = TuneSettings("halving", trials=8, inner_folds=3)
    assert halving.rungs(8) == [8, 4, 2]
    result = tune_fold(cohort, splits, "fold_1", space, halving, tmp_path / "halving")  # type: ignore[arg-type]
    counts = [sum(rung == i for _, rung in asked) for i in range(3)]
    assert counts == [8, 4, 2]
    # The settings to start from are given every inner fold.
    assert sum(name == "" for name, _ in asked) == 3
    assert result.best is not None
    assert result.best.changes == ("seed=3",)
    asked.clear()
    plain = TuneSettings("random", trials=8, inner_folds=3)
    result = tune_fold(cohort, splits, "fold_1", space, plain, tmp_path / "random")  # type: ignore[arg-type]
    assert len(asked) == 24
    assert result.best is not None
    assert result.best.mean == pytest.approx(0.5)
    with open(tmp_path / "random" / "fold_1" / "trials.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["settings"] == "the settings as they were"
    # The higher the better.
    best = tune_fold(
        cohort,
        splits,
        "fold_1",
        space,
        TuneSettings(trials=8, metric="auc"),
        tmp_path / "auc",  # type: ignore[arg-type]
    ).best
    assert best is not None
    assert best.changes == ()


def test_what_can_be_searched() -> None:
    axis = Axis.parse("learning_rate=1e-4..1e-2:log")
    draws = [float(axis.draw(np.random.default_rng(i))) for i in range(200)]
    assert min(draws) >= 1e-4
    assert max(draws) <= 1e-2
    # Even in the logarithm: half of the draws lie below the geometric mean.
    assert 70 < sum(value < 1e-3 for value in draws) < 130
    assert {Axis.parse("model.hidden=64,128").draw(np.random.default_rng(i)) for i in range(20)} == {"64", "128"}
    assert Axis.parse("model.hidden=8..64").draw(np.random.default_rng(0)).isdigit()
    space = SearchSpace.of(TrainSettings(), [])
    assert [a.key for a in space.axes] == [text.partition("=")[0] for text in DEFAULT_SPACE]
    trials = space.trials(5, 3)
    assert trials[0] == ()
    assert len(set(trials)) == 5
    assert trials == space.trials(5, 3) != space.trials(5, 4)
    assert math.isclose(space.settings(trials[1]).learning_rate, float(trials[1][0].partition("=")[2]))
    assert len(SearchSpace.of(TrainSettings(), ["model.name=abmil,mean"]).trials(20, 0)) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate", "not of the form"),
        ("rate=1,2", "no setting 'rate'"),
        ("learning_rate=2..1", "no range"),
        ("learning_rate=0..1:log", "no range"),
        ("learning_rate=1..2:exp", "no range"),
        ("model.name=abmil,perceptron", "perceptron"),
        ("model.dropout=0.5..1.5", "dropout"),
    ],
)
def test_what_cannot_be_searched_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SearchSpace.of(TrainSettings(), [text])


def test_too_few_training_cases_are_told(tmp_path: Path) -> None:
    cohort, splits = make_cohort(tmp_path)
    with pytest.raises(SplitError, match="inside the training cases: class 'a' has"):
        tune_fold(
            cohort,
            splits,
            "fold_1",
            SearchSpace.of(BASE, []),
            TuneSettings(inner_folds=9),
            tmp_path,  # type: ignore[arg-type]
        )


@pytest.mark.slow
def test_the_file_is_for_train_and_for_its_own_fold(
    bag_writer: MakeBag, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(16):
        bag_writer(tmp_path / "bags", f"s{i}", (rng.normal(size=(6, 4)) + i % 2).astype(np.float16), case_id=f"p{i}")
        rows.append(f"s{i},p{i},{'ab'[i % 2]}\n")
    (tmp_path / "labels.csv").write_text("slide_id,case_id,label\n" + "".join(rows))

    def call(*arguments: object) -> int:
        return run_group(group, "lrmil", [str(a) for a in arguments])

    splits = tmp_path / "splits.csv"
    assert call("split", "--labels", tmp_path / "labels.csv", "--folds", 2, "-o", splits) == 0
    data = ["--bags", tmp_path / "bags", "--labels", tmp_path / "labels.csv", "--splits", splits]
    search = ["--search", "learning_rate=0.01,0.02", "--trials", 3, "--inner-folds", 2, "--model", "mean"]
    fast = ["--set", "epochs=2", "--set", "model.hidden=8", "--device", "cpu"]
    assert call("tune", *data, "--fold", 1, *search, *fast, "-o", tmp_path / "tuned") == 0
    told = capsys.readouterr()
    assert "are 6 trainings; the first took" in told.err
    toml = tmp_path / "tuned" / "fold_1.toml"
    settings = load_settings(toml)
    assert (settings.model.name, settings.model.hidden, settings.epochs) == ("mean", 8, 2)
    chosen = json.loads((tmp_path / "tuned" / "fold_1" / "trials.json").read_text())["trials"]
    least = min(chosen, key=lambda trial: np.mean(trial["figures"]))
    wanted = float(least["changes"][0].partition("=")[2]) if least["changes"] else TrainSettings().learning_rate
    assert settings.learning_rate == wanted
    assert tuned_on(toml)
    run = ["--config", toml, "--replicates", 20, "-o", tmp_path / "run"]
    assert call("train", *data, *run) == 2
    assert "the choice of the settings" in capsys.readouterr().err
    assert call("train", *data, *run, "--fold", 1) == 0
    plain = tmp_path / "plain.toml"
    plain.write_text("epochs = 3\n")
    assert tuned_on(plain) is None
    assert load_settings(plain).epochs == 3
    plain.write_text("epochs = 3\n[tuned]\ncases = 3\n")
    with pytest.raises(ConfigError, match="does not say whose"):
        load_settings(plain)
