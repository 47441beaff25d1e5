"""A cascade from two runs to predictions, from bags and from slides."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lrmil.cascade import TooFewCasesError
from lrmil.cascade.card import is_cascade, read_cascade_card, save_cascade, unpacked
from lrmil.cascade.evidence import Evidence, out_of_fold
from lrmil.cascade.fitting import fit_cascade
from lrmil.cascade.predict import CascadePredictor
from lrmil.checkpoint import read_card
from lrmil.cli import group
from lrmil.errors import FiguresError, ModelFileError, SettingsError
from lrmil.store import FeatureStore
from lrmil.subsets import chosen_rows, drawn_rows
from wsi_pipe.bag import Bag, BagLevel, Features, read_bag, write_bag
from wsi_pipe.cli import group as wsi_pipe
from wsi_pipe.cli import run_group
from wsi_pipe.synthetic import make_cohort

CASES = 40


def lrmil(*arguments: object) -> int:
    return run_group(group, "lrmil", [str(a) for a in arguments])


@pytest.fixture(scope="module")
def runs(bag_writer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bags of 40 cases whose class high resolution tells, and low resolution in most of them; a run at either."""
    root = tmp_path_factory.mktemp("cascade")
    rng = np.random.default_rng(0)
    rows = ["slide_id,label"]
    for i in range(CASES):
        label, seen = i % 2, i % 10 < 8
        low = rng.normal(size=(8, 6)).astype(np.float32)
        low[:3, 0] += 3 * (2 * label - 1) * seen
        path = bag_writer(root / "bags", f"s{i:02d}", low, deep=True)
        fine = rng.normal(size=(32, 6)).astype(np.float32)
        fine[:, 1] += 3 * (2 * label - 1)
        bag = read_bag(path)
        values = {"net": Features("timm:some/net", fine, "ab" * 32, "MIT", "float32", "{}", f"fine-{i}")}
        levels = [BagLevel(lv.grid, values if lv.grid.label == "20x" else lv.features) for lv in bag.levels]
        write_bag(path, Bag(bag.attrs, tuple(levels)))
        rows.append(f"s{i:02d},{'ab'[label]}")
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    assert lrmil("split", "--labels", root / "labels.csv", "--folds", 2, "--out", root / "splits.csv") == 0
    common = ["--bags", root / "bags", "--labels", root / "labels.csv", "--splits", root / "splits.csv"]
    common += ["--model", "abmil", "--epochs", 8, "--replicates", 10]
    assert lrmil("train", *common, "-r", "5x", "-o", root / "lr") == 0
    guided = ["--guided-by", root / "lr", "--guided-share", 0.5, "--guided-draws", 2]
    assert lrmil("train", *common, "-r", "20x", "-o", root / "hr", *guided) == 0
    return root


def test_tiles_below_the_most_attended_are_chosen() -> None:
    parents = np.array([0, 0, 1, 1, 2, 2, -1, -1])
    attention = [0.2, 0.5, 0.3]
    assert chosen_rows(attention, parents, 0.25).tolist() == [2, 3]
    assert chosen_rows(attention, parents, 0.5).tolist() == [2, 3, 4, 5]
    # Never more than the budget; but the first is read, however small that is.
    assert chosen_rows(attention, parents, 0.49).tolist() == [2, 3]
    assert chosen_rows(attention, parents, 0.01).tolist() == [2, 3]
    assert chosen_rows(attention, parents, 1).tolist() == list(range(8))
    with pytest.raises(SettingsError, match="budget 0"):
        chosen_rows(attention, parents, 0)
    drawn = [drawn_rows([0.98, 0.01, 0.01], parents, 0.25, np.random.default_rng(i)).tolist() for i in range(50)]
    assert drawn.count([0, 1]) > 40
    assert len({tuple(rows) for rows in drawn}) > 1


def test_parts_of_training_bags_are_trained_on_and_nobody_is_judged_on_them(runs: Path) -> None:
    assert json.loads((runs / "hr" / "guided.json").read_text())["budget"] == 0.5
    whole = FeatureStore.open(runs / "hr" / "store")
    assert len(whole) == CASES
    for fold in ("fold_1", "fold_2"):
        with open(runs / "hr" / fold / "predictions.csv", newline="") as file:
            assert not [row for row in csv.DictReader(file) if "subset" in row["slide_id"]]
        said = str(read_card(runs / "hr" / fold / "model.safetensors").choice["said"])
        assert "networks averaged" in said


def test_a_cascade_from_runs_to_predictions(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cascade.safetensors"
    fit = ["cascade", "fit", "--lr", runs / "lr", "--hr", runs / "hr"]
    assert lrmil(*fit, "--risk", 0.1, "--hr-budget", 0.5, "-o", path) == 0
    assert "in at most 10 % of cases it says another class than high resolution" in capsys.readouterr().out
    card = read_cascade_card(path)
    assert is_cascade(path)
    assert (card.low, card.high, card.budget) == (("fold_1", "fold_2"), ("fold_1", "fold_2"), 0.5)
    assert 0 < card.read < 0.6
    assert card.found <= 0.1
    out = tmp_path / "out"
    assert lrmil("predict", "--model", path, "--bags", runs / "bags", "-o", out) == 0
    text = json.loads((out / "predictions.json").read_text())
    assert text["model"]["promise"] == card.promise
    high = [s for s in text["slides"] if s["resolution"] == "high"]
    low = [s for s in text["slides"] if s["resolution"] == "low"]
    assert len(high) + len(low) == CASES
    assert all(s["score"] >= card.threshold for s in high)
    assert all(s["score"] < card.threshold for s in low)
    # Half of 32 tiles, and no more; none of slides that low resolution decides.
    assert {(s["high"]["tiles"], s["high"]["of_tiles"]) for s in high} == {(16, 32)}
    assert {s["high"]["tiles"] for s in low} == {0}
    assert all(s["low_probabilities"] == s["probabilities"] for s in low)
    assert all(s["low_probabilities"] != s["probabilities"] for s in high)
    with open(out / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["resolution"] for row in rows] == [s["resolution"] for s in text["slides"]]
    # Beside each decision, how far the slide lies from those of the training.
    assert all(0 <= float(row["ood_percentile"]) <= 100 for row in rows)
    # Another budget than that of the calibration is possible, and void.
    assert lrmil("predict", "--model", path, "--bags", runs / "bags", "-o", tmp_path / "all", "--hr-budget", 1) == 0
    slides = json.loads((tmp_path / "all" / "predictions.json").read_text())["slides"]
    assert {s["high"]["tiles"] for s in slides if s["resolution"] == "high"} == {32}
    assert all("the promise does not hold" in s["notes"][0] for s in slides)


def test_a_broken_bag_stops_no_other(runs: Path, tmp_path: Path) -> None:
    path = tmp_path / "cascade.safetensors"
    assert lrmil("cascade", "fit", "--lr", runs / "lr", "--hr", runs / "hr", "--risk", 0.2, "-o", path) == 0
    bags = tmp_path / "bags"
    bags.mkdir()
    (bags / "s00.h5").write_bytes((runs / "bags" / "s00.h5").read_bytes())
    (bags / "s01.h5").write_bytes(b"no bag")
    assert lrmil("predict", "--model", path, "--bags", bags, "-o", tmp_path / "out") == 1
    slides = json.loads((tmp_path / "out" / "predictions.json").read_text())["slides"]
    assert [s["status"] for s in slides] == ["done", "failed"]


def test_too_few_cases_are_refused_and_counted(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cascade.safetensors"
    options = ["--lr", runs / "lr", "--hr", runs / "hr", "-o", path, "--risk", 0.02]
    assert lrmil("cascade", "fit", *options, "--confidence", 0.9) == 2
    said = capsys.readouterr().err
    assert f"needs at least 114 calibration cases without any loss; there are {CASES}: 74 are missing" in said
    assert not path.exists()
    assert lrmil("cascade", "fit", *options, "--loss", "miss") == 2
    assert "more cases of b" in capsys.readouterr().err


def test_slides_of_their_own_calibrate_too(
    runs: Path, bag_writer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cascade.safetensors"
    fit = ["cascade", "fit", "--lr", runs / "lr", "--hr", runs / "hr", "--risk", 0.2, "-o", path]
    # Those of the training are not theirs.
    assert lrmil(*fit, "--bags", runs / "bags", "--labels", runs / "labels.csv") == 2
    assert "trained on" in capsys.readouterr().err
    rng = np.random.default_rng(9)
    for i in range(8):
        bag_writer(tmp_path / "bags", f"n{i}", rng.normal(size=(8, 6)).astype(np.float32), deep=True)
    labels = tmp_path / "labels.csv"
    labels.write_text("slide_id,label\n" + "".join(f"n{i},{'ab'[i % 2]}\n" for i in range(8)))
    assert lrmil(*fit, "--bags", tmp_path / "bags", "--labels", labels, "--loss", "error", "--hr-budget", 0.5) == 0
    # One of eight is put aside for the choice of the score.
    assert read_cascade_card(path).cases == 7
    assert "no model was trained on" in read_cascade_card(path).basis


def test_runs_that_do_not_belong_together_are_refused(runs: Path, tmp_path: Path) -> None:
    other = tmp_path / "hr"
    (other / "fold_1").mkdir(parents=True)
    (other / "fold_1" / "predictions.csv").write_bytes((runs / "hr" / "fold_1" / "predictions.csv").read_bytes())
    with pytest.raises(FiguresError, match="same splits"):
        out_of_fold(runs / "lr", other)
    with pytest.raises(FiguresError, match="--guided-by"):
        out_of_fold(runs / "hr", runs / "lr", budget=0.5)


def test_what_a_file_must_be(runs: Path, tmp_path: Path) -> None:
    path = tmp_path / "cascade.safetensors"
    assert lrmil("cascade", "fit", "--lr", runs / "lr", "--hr", runs / "hr", "--risk", 0.2, "-o", path) == 0
    model = runs / "lr" / "fold_1" / "model.safetensors"
    assert not is_cascade(model)
    with pytest.raises(ModelFileError, match=r"is no lrmil\.cascade file"):
        read_cascade_card(model)
    with unpacked(path) as (card, low, high):
        assert low[0].read_bytes() == model.read_bytes()
        save_cascade(tmp_path / "again.safetensors", card, low, high)
    assert read_cascade_card(tmp_path / "again.safetensors") == card
    damaged = bytearray(path.read_bytes())
    damaged[-5] ^= 1
    path.write_bytes(bytes(damaged))
    with pytest.raises(ModelFileError, match="damaged"):
        CascadePredictor.load(path)
    assert lrmil("predict", "--model", model, "--bags", runs / "bags", "-o", tmp_path / "o", "--hr-budget", 0.5) == 2


def evidence(low: np.ndarray, high: np.ndarray, labels: np.ndarray, read: np.ndarray | None = None) -> Evidence:
    n = len(labels)
    ids = tuple(f"c{i}" for i in range(n))
    classes = tuple("abc"[: low.shape[-1]])
    return Evidence(classes, ids, ids, labels, low, high, high if read is None else read, 0.2, "simulated")


def test_scores_and_losses_of_a_fit() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 200)
    high = np.eye(2)[labels] * 0.8 + 0.1
    low = rng.dirichlet([4, 4], size=(3, 200))
    found = fit_cascade(evidence(low, high, labels), 0.05, loss="error")
    assert found.choice.score in ("margin", "disagreement")
    assert found.control.cases == 160
    assert len(found.calibration) == 200
    assert fit_cascade(evidence(low, high, labels), 0.05, score="disagreement").control.cases == 200
    with pytest.raises(SettingsError, match="disagreement"):
        fit_cascade(evidence(low[:1], high, labels), 0.05, score="disagreement")
    positives = int((labels == 1).sum())
    assert fit_cascade(evidence(low, high, labels), 0.05, loss="miss", score="margin").control.cases == positives
    # Where a part of the tiles says something else than all of them, no threshold helps.
    with pytest.raises(FiguresError, match="even if every slide is read"):
        fit_cascade(evidence(low, high, labels, high[:, ::-1]), 0.05)
    with pytest.raises(TooFewCasesError):
        fit_cascade(evidence(low[:, :10], high[:10], labels[:10]), 0.05)
    # Nothing to lose: low resolution decides all.
    assert fit_cascade(evidence(high[None], high, labels), 0.05).control.threshold == math.inf
    three = rng.dirichlet([1, 1, 1], size=(1, 200))
    with pytest.raises(SettingsError, match="which of a, b, c"):
        fit_cascade(evidence(three, three[0], labels), 0.05, loss="miss")


@pytest.mark.slow
def test_slides_are_read_where_low_resolution_is_unsure(tmp_path: Path) -> None:
    """From slide files: only uncertain slides are read at 20x, only below attended tiles, and it is counted."""
    make_cohort(tmp_path / "s", 12, seed=3, size_px=(512, 512), mpp=0.5, max_slides_per_case=1)
    job, labels = tmp_path / "job", tmp_path / "s" / "labels.csv"
    slides = ["--slides", str(tmp_path / "s" / "slides.csv")]
    made = ["run", *slides, "-o", str(job), "-r", "20x", "-r", "5x", "--tile-px", "64"]
    assert run_group(wsi_pipe, "wsi-pipe", made) == 0
    assert lrmil("split", "--labels", labels, "--folds", 2, "--out", tmp_path / "splits.csv") == 0
    common = ["--bags", job, "--labels", labels, "--splits", tmp_path / "splits.csv", "--model", "abmil", "--epochs", 3]
    assert lrmil("train", *common, "--replicates", 10, "-r", "5x", "-o", tmp_path / "lr") == 0
    guided = ["--guided-by", tmp_path / "lr", "--guided-share", 0.5]
    assert lrmil("train", *common, "--replicates", 10, "-r", "20x", "-o", tmp_path / "hr", *guided) == 0
    path = tmp_path / "cascade.safetensors"
    fit = ["cascade", "fit", "--lr", tmp_path / "lr", "--hr", tmp_path / "hr", "--hr-budget", 0.5, "--risk", 0.45]
    assert lrmil(*fit, "--score", "margin", "-o", path) == 0
    # The middle of the scores as the threshold, so that slides are decided by either resolution.
    assert lrmil("predict", "--model", path, "--bags", job, "-o", tmp_path / "bags") == 0
    scores = [s["score"] for s in json.loads((tmp_path / "bags" / "predictions.json").read_text())["slides"]]
    with unpacked(path) as (card, low, high):
        save_cascade(path, replace(card, threshold=float(np.median(scores))), low, high)
    assert lrmil("predict", "--model", path, "--bags", job, "-o", tmp_path / "bags") == 0
    assert lrmil("predict", "--model", path, *slides, "-o", tmp_path / "slides") == 0
    a, b = (
        {s["slide_id"]: s for s in json.loads((tmp_path / n / "predictions.json").read_text())["slides"]}
        for n in ("bags", "slides")
    )
    assert {s["resolution"] for s in b.values()} == {"low", "high"}
    for slide, own in b.items():
        # The same features, tiles and answers as from bags that hold everything.
        assert own["resolution"] == a[slide]["resolution"]
        for name in ("tiles", "of_tiles"):
            assert own["high"][name] == a[slide]["high"][name]
        for name, value in own["probabilities"].items():
            assert value == pytest.approx(a[slide]["probabilities"][name], abs=1e-3)
        assert own["low"]["blocks"] > 0
        assert own["low"]["bytes"] > 0
        assert (own["high"]["blocks"] or 0) * (own["high"]["bytes"] or 0) > 0 or own["resolution"] == "low"
        assert own["high"]["tiles"] <= 0.5 * own["high"]["of_tiles"] or own["resolution"] == "low"
