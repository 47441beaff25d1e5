"""Models at work: folds that answer together, abstention, distance from the training tiles, cards to read."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf

import lrmil
from lrmil.checkpoint import ModelCard, load_model, load_whole, read_card, save_model
from lrmil.cli import group
from lrmil.config import ModelSettings
from lrmil.errors import FiguresError, LeakageError, ModelFileError, ModelMismatchError
from lrmil.metrics.selective import AbstentionRule, choose_threshold
from lrmil.model import build_model
from lrmil.ood import Reference, outlying, reference_of, together
from lrmil.predictor import EnsemblePredictor, Predictor, load_predictor
from lrmil.store import BagRecord, FeatureStore, ResidentStore
from wsi_pipe.cli import run_group

MakeBag = Callable[..., Path]
DIM = 6


@pytest.fixture(scope="module")
def world(bag_writer: MakeBag, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two folds on 20 cases, six new slides and one of another scanner."""
    root = tmp_path_factory.mktemp("deployed")
    rng = np.random.default_rng(1)
    rows = []
    for i in range(26):
        label = ["benign", "tumour"][i % 2]
        features = rng.normal(size=(14, DIM))
        features[:4, 0] += 4.0 * (i % 2)
        bag_writer(root / ("bags" if i < 20 else "new"), f"s{i}", features.astype(np.float16), case_id=f"p{i}")
        rows.append(f"s{i},{label}")
    (root / "labels.csv").write_text("slide_id,label\n" + "\n".join(rows[:20]) + "\n")
    (root / "new.csv").write_text("slide_id,label\n" + "\n".join(rows[20:]) + "\n")
    bag_writer(root / "other", "odd", (rng.normal(size=(14, DIM)) * 3 + 2).astype(np.float16), case_id="q")
    for fold in (1, 2):
        lrmil.train(
            root / "bags", root / "labels.csv", root / "run", folds=2, fold=fold, val_fraction=0.3, epochs=3,
            model="abmil", small_cohorts="off", hidden=16, learning_rate=0.01, replicates=20, device="cpu",
            say=lambda text: None,
        )  # fmt: skip
    return root


def call(*arguments: object) -> int:
    return run_group(group, "lrmil", [str(a) for a in arguments])


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_answers_with_the_mean_of_its_folds(world: Path, tmp_path: Path) -> None:
    bag = world / "new" / "s21.h5"
    members = [Predictor.load(world / "run" / f"fold_{k}" / "model.safetensors") for k in (1, 2)]
    each = np.array([list(m.predict_bag(bag).probabilities.values()) for m in members])
    mean = each.mean(axis=0)
    model = lrmil.load(world / "run")
    got = model.predict(bag)
    assert isinstance(got, lrmil.SlidePrediction)
    assert list(got.probabilities.values()) == pytest.approx(mean.tolist(), abs=1e-12)
    assert got.predicted == model.classes[int(mean.argmax())]
    assert got.disagreement is not None
    assert list(got.disagreement.probabilities) == ["fold_1", "fold_2"]
    assert got.disagreement.sd["tumour"] == pytest.approx(abs(each[0, 1] - each[1, 1]) / 2)
    entropies = [-(row * np.log(row)).sum() for row in (mean, *each)]
    wanted = entropies[0] - np.mean(entropies[1:])
    assert got.disagreement.mutual_information_nats == pytest.approx(wanted, abs=1e-12)
    assert got.disagreement.vote_share == (each.argmax(axis=1) == mean.argmax()).mean()
    # Logits stand for the mean before calibration, so that a softmax gives it.
    raw = [torch.softmax(torch.tensor(m.predict_bag(bag).logits, dtype=torch.float64), 0) for m in members]
    assert np.exp(got.logits) == pytest.approx(torch.stack(raw).mean(0).numpy(), abs=1e-9)
    maps = [m.predict_bag(bag).attention for m in members]
    assert got.attention == pytest.approx(np.mean(maps, axis=0), abs=1e-6)

    assert call("predict", "--model", world / "run", "--bags", world / "new", "-o", tmp_path / "out") == 0
    row = next(row for row in rows_of(tmp_path / "out" / "predictions.csv") if row["slide_id"] == "s21")
    assert float(row["probability_tumour"]) == pytest.approx(mean[1], abs=1e-5)
    assert float(row["sd_tumour"]) == pytest.approx(got.disagreement.sd["tumour"], abs=1e-5)
    assert (row["members"], "abstained" in row) == ("2", False)
    head = json.loads((tmp_path / "out" / "predictions.json").read_text())["model"]
    assert [m["fold"] for m in head["members"]] == ["fold_1", "fold_2"]
    assert "temperature" not in head


def test_votes_and_disagreement_by_hand() -> None:
    from lrmil.predictor import Disagreement

    d = Disagreement.of(["x", "y", "z"], np.array([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]]), ("a", "b"))
    assert d.vote_share == pytest.approx(2 / 3)
    assert d.sd["a"] == pytest.approx(math.sqrt((0.2**2 + 0.1**2 + 0.3**2) / 3))
    same = Disagreement.of(["x", "y"], np.array([[0.9, 0.1], [0.9, 0.1]]), ("a", "b"))
    assert (same.mutual_information_nats, same.sd["b"], same.vote_share) == (0, 0, 1)


def test_a_run_is_judged_on_new_cases_and_on_no_case_of_its_folds(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = ["--bags", world / "new", "--labels", world / "new.csv", "--replicates", 20, "--json"]
    assert call("evaluate", "--model", world / "run", *new, "-o", tmp_path / "a", "--abstain", "coverage=0.5") == 0
    found = json.loads(capsys.readouterr().out)["folds"][0]
    got = lrmil.load(world / "run").predict([world / "new" / f"s{i}.h5" for i in range(20, 26)], abstain="coverage=0.5")
    assert isinstance(got, list)
    written = {row["slide_id"]: row for row in rows_of(tmp_path / "a" / "predictions.csv")}
    for p in got:
        assert float(written[p.slide_id]["probability_tumour"]) == pytest.approx(p.probabilities["tumour"], abs=1e-5)
    answered = [p for p in got if not p.abstained]
    assert found["answered"]["coverage"]["value"] == pytest.approx(len(answered) / 6)
    right = [p.predicted == written[p.slide_id]["label"] for p in answered]
    assert found["answered"]["estimates"]["accuracy"]["value"] == pytest.approx(np.mean(right))

    # Every case of the cohort taught, stopped or calibrated some fold, so even the test part of one is refused.
    own = ["--bags", world / "bags", "--labels", world / "labels.csv"]
    for more in ((), ("--splits", world / "run" / "splits.csv", "--fold", 1)):
        assert call("evaluate", "--model", world / "run", *own, *more, "-o", tmp_path / "b") == 2
        assert "was trained on" in capsys.readouterr().err
    with pytest.raises(LeakageError, match="fold_1"):
        lrmil.evaluate(world / "run", world / "bags", world / "labels.csv", tmp_path / "c")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ("tumour", "benign")}, "knows the classes tumour, benign, but .*fold_1.* benign, tumour"),
        ({"weights_sha256": "cd" * 32}, r"features timm:some/net \(weights cdcdcdcdcdcd\).*they are no ensemble"),
        ({"level": "10x"}, "at 10x.* but .*fold_1.*at 5x"),
        ({"tile_px": 512}, "512 px"),
    ],
)
def test_folds_of_other_features_or_classes_are_no_ensemble(
    world: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    for k in (1, 2):
        module, card, reference = load_whole(world / "run" / f"fold_{k}" / "model.safetensors")
        card = dataclasses.replace(card, **change) if k == 2 else card  # type: ignore[arg-type]
        save_model(tmp_path / f"fold_{k}" / "model.safetensors", module, card, reference)
    with pytest.raises(ModelMismatchError, match=message):
        lrmil.load(tmp_path)
    # One fold's folder holds one model, which is asked alone.
    assert not isinstance(load_predictor(tmp_path / "fold_2"), EnsemblePredictor)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelFileError, match=r"holds no model\.safetensors"):
        lrmil.load(tmp_path / "empty")


def test_abstention_is_chosen_on_validation_slides(world: Path, tmp_path: Path) -> None:
    folder = world / "run" / "fold_1"
    val = [row for row in rows_of(folder / "predictions.csv") if row["part"] == "val"]
    confidence = [max(float(row["probability_benign"]), float(row["probability_tumour"])) for row in val]
    kept = read_card(folder / "model.safetensors").validation
    assert kept["confidence"] == pytest.approx(sorted(confidence, reverse=True))
    assert call("evaluate", world / "run", "--abstain", "coverage=0.6", "--replicates", 20, "--json") == 0
    predictor = Predictor.load(folder / "model.safetensors")
    rule = predictor.abstain("coverage=0.6")
    assert rule.coverage >= 0.6
    assert sum(value >= rule.threshold for value in confidence) == math.ceil(0.6 * len(confidence))
    out = tmp_path / "out"
    arguments = ["--model", folder / "model.safetensors", "--bags", world / "new", "-o", out]
    assert call("predict", *arguments, "--abstain", "threshold=0.99999") == 0
    rows = rows_of(out / "predictions.csv")
    for row in rows:
        top = max(float(row["probability_benign"]), float(row["probability_tumour"]))
        assert row["abstained"] == ("yes" if top < 0.99999 else "no")
        assert row["predicted"] in ("benign", "tumour")
    assert call("predict", *arguments, "--abstain", "half") == 2


def test_thresholds_by_hand() -> None:
    confidence, correct = [0.9, 0.8, 0.7, 0.6], [True, True, False, True]
    found = choose_threshold(confidence, correct, AbstentionRule("accuracy", 1.0))
    assert (found.threshold, found.coverage, found.accuracy) == (pytest.approx(0.75), 0.5, 1.0)
    # As many slides as the accuracy allows: with the fourth it is 3 of 4 again.
    found = choose_threshold(confidence, correct, AbstentionRule("accuracy", 0.75))
    assert (found.threshold, found.coverage) == (0.0, 1.0)
    found = choose_threshold(confidence, correct, AbstentionRule("coverage", 0.6))
    assert (found.threshold, found.coverage) == (pytest.approx(0.65), 0.75)
    found = choose_threshold([0.9, 0.8, 0.8, 0.6], correct, AbstentionRule("coverage", 0.5))
    assert found.coverage == 0.75  # equal confidences stay together
    assert [found.abstains(value) for value in (0.69, 0.71)] == [True, False]
    with pytest.raises(FiguresError, match=r"no threshold has an accuracy of 0\.9.*2 validation"):
        choose_threshold([0.9, 0.8], [False, True], AbstentionRule("accuracy", 0.9))
    with pytest.raises(FiguresError, match="no validation slides"):
        choose_threshold([], [], AbstentionRule("coverage", 0.9))
    for text in ("accuracy", "accuracy=x", "accuracy=0", "speed=1", "coverage=1.5"):
        with pytest.raises(FiguresError, match="no rule of abstention"):
            AbstentionRule.parse(text)


def resident(*bags: np.ndarray) -> ResidentStore:
    flat = np.concatenate(bags).astype(np.float32)
    offsets = np.cumsum([0, *map(len, bags)]).astype(np.int64)
    store = FeatureStore(flat, offsets, [BagRecord(f"s{i}") for i in range(len(bags))], dtype="float32")
    return ResidentStore.of(store, place="mapped")


def test_distance_is_mahalanobis_with_ledoit_and_wolfs_shrinkage() -> None:
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(300, 5)) @ rng.normal(size=(5, 5)) * [1, 10, 0.1, 1, 3] + 7
    wide = np.concatenate([mixed, np.full((300, 1), 3.0)], axis=1)
    reference = reference_of(resident(wide[:100], wide[100:]), [0, 1])
    assert reference is not None
    z = (mixed - mixed.mean(0)) / mixed.std(0)
    inverse = np.linalg.inv(ledoit_wolf(z, assume_centered=True)[0])
    # A feature that never varied in training counts for nothing.
    new = np.concatenate([rng.normal(size=(4, 5)) * 5, rng.normal(size=(4, 1))], axis=1)
    off = (new[:, :5] - mixed.mean(0)) / mixed.std(0)
    wanted = np.sqrt(np.einsum("ni,ij,nj->n", off, inverse, off) / 5)
    tensor = torch.from_numpy(new).float()
    assert reference.tile_distances(tensor) == pytest.approx(wanted, rel=1e-4)
    assert reference.distance(tensor) == pytest.approx(math.sqrt((wanted**2).mean()), rel=1e-4)
    assert reference.distance(torch.from_numpy(wide).float()) == pytest.approx(1, abs=0.1)
    again = Reference.from_tensors(reference.tensors())
    assert again.distance(tensor) == reference.distance(tensor)
    with pytest.raises(ValueError, match="scale is missing"):
        Reference.from_tensors({"mean": reference.mean, "correlation": torch.eye(6)})
    assert reference_of(resident(wide[:1]), [0]) is None
    assert reference_of(resident(np.ones((9, 3))), [0]) is None


def test_many_features_are_kept_as_leading_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrmil.ood.WHOLE_DIM", 8)
    monkeypatch.setattr("lrmil.ood.LEADING", 3)
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(4000, 3)) @ rng.normal(size=(3, 12)) + 0.1 * rng.normal(size=(4000, 12))
    reference = reference_of(resident(wide), [0])
    assert reference is not None
    assert {name: tuple(t.shape) for name, t in reference.tensors().items()} == {
        "mean": (12,), "scale": (12,), "vectors": (12, 3), "values": (3,), "rest": (1,),
    }  # fmt: skip
    assert "3 leading directions of 12" in reference.form
    assert reference.distance(torch.from_numpy(wide).float()) == pytest.approx(1, abs=0.1)
    # As likely a size, against the grain of the training tiles.
    across = torch.from_numpy(rng.normal(size=(50, 12)) * wide.std(0)).float()
    assert reference.distance(across) > 3
    again = Reference.from_tensors(reference.tensors())
    assert again.distance(across) == pytest.approx(reference.distance(across))


def test_slides_of_another_kind_are_told(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = read_card(world / "run" / "fold_1" / "model.safetensors")
    assert len(card.validation["distance"]) == card.data["val"]["slides"]
    for model in (world / "run", world / "run" / "fold_1" / "model.safetensors"):
        bags = ["--bags", world / "new", "--bags", world / "other"]
        assert call("predict", "--model", model, *bags, "-o", tmp_path / "out") == 0
        assert "odd: farther from the training tiles than all" in capsys.readouterr().err
        rows = {row["slide_id"]: row for row in rows_of(tmp_path / "out" / "predictions.csv")}
        assert (rows["odd"]["ood"], rows["odd"]["ood_percentile"]) == ("yes", "100")
        near = [float(rows[f"s{i}"]["ood_distance"]) for i in range(20, 26)]
        assert float(rows["odd"]["ood_distance"]) > 1.5 * max(near)


def test_distances_beside_validation_slides_by_hand() -> None:
    one = outlying(1.5, [1.0, 1.5, 2.0, 3.0])
    assert (one.percentile, one.beyond, one.slides) == (37.5, False, 4)
    far = outlying(6.0, [1.0, 3.0])
    assert (far.percentile, far.beyond) == (100, True)
    assert "2 times the farthest" in far.note
    assert "1 in 3" in far.note
    alone = outlying(6.0, [])
    assert math.isnan(alone.percentile)
    assert "no validation slides" in alone.note
    both = together([one, far])
    assert (both.distance, both.percentile, both.beyond) == (3.75, 68.75, False)
    assert "by 1 of 2 models" in both.note
    assert together([far, far, one]).beyond


def test_a_file_without_training_tiles_still_answers(make_bag: MakeBag, tmp_path: Path) -> None:
    module = build_model(ModelSettings("mean", in_dim=DIM, hidden=4))
    save_model(tmp_path / "m.safetensors", module, ModelCard(module.settings, ("a", "b")))
    bag = make_bag("s", np.zeros((3, DIM), np.float16))
    predictor = Predictor.load(tmp_path / "m.safetensors")
    got = predictor.predict_bag(bag)
    assert (got.ood, got.disagreement, got.abstained) == (None, None, None)
    with pytest.raises(FiguresError, match="no validation slides"):
        predictor.abstain("coverage=0.5")


def test_training_tiles_of_another_width_are_a_broken_file(tmp_path: Path) -> None:
    module = build_model(ModelSettings("mean", in_dim=DIM, hidden=4))
    wrong = Reference(torch.zeros(3), torch.ones(3), torch.eye(3))
    with pytest.raises(ModelFileError, match="3 features instead of 6"):
        save_model(tmp_path / "m.safetensors", module, ModelCard(module.settings, ("a", "b")), wrong)


def test_cards_to_read_say_what_the_files_say(world: Path) -> None:
    folder = world / "run" / "fold_1"
    card = read_card(folder / "model.safetensors")
    text = (folder / "model.md").read_text(encoding="utf-8")
    counts = card.data["train"]
    row = f"| training | {counts['slides']} | {counts['cases']} | {counts['tiles']} |"
    assert f"{row} {counts['classes']['benign']} | {counts['classes']['tumour']} |" in text
    assert counts["tiles"] == 14 * counts["slides"]
    auc = json.loads((folder / "figures.json").read_text())["estimates"]["auc"]
    assert f"| AUC | {auc['value']:.3f} ({auc['low']:.3f} to {auc['high']:.3f}) |" in text
    assert f"trained on: {counts['cases']} cases, {counts['slides']} slides" in text
    assert "timm:some/net (weights abababababab) at 5x of 256 px, 6 features a tile" in text
    assert "labels alone, without a teacher" in text
    assert not any(f"s{i}" in text.split() or f"p{i}" in text.split() for i in range(26))
    whole = (world / "run" / "model.md").read_text(encoding="utf-8")
    assert "[fold_1](fold_1/model.md)" in whole
    assert "asks the 2 models together" in whole


def test_old_readers_of_two_things_still_get_them(world: Path) -> None:
    module, card = load_model(world / "run" / "fold_1" / "model.safetensors")
    assert module.settings.in_dim == DIM
    assert card.fold == "fold_1"
