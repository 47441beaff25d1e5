"""The training loop: it learns, it resumes exactly, it looks at test bags once, and students need LR only."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lrmil.checkpoint import load_model
from lrmil.config import MODELS, LossSettings, ModelSettings, TrainSettings, load_settings
from lrmil.errors import BagMismatchError, DivergedError, ResumeError, SettingsError, SplitError
from lrmil.model import MILModel, build_model
from lrmil.splits import FoldIndices
from lrmil.store import FeatureStore, ResidentStore, StoreMeta
from lrmil.trainer import (
    TrainResult,
    bag_logits,
    choose_device,
    choose_precision,
    loop,
    teacher_targets,
    train,
    training,
)
from lrmil.trainer.optimise import AdamW, class_weights, learning_rate, make_optimizer

DIM = 10
# The linear model is fitted, not trained, and has tests of its own.
TRAINED = tuple(name for name in MODELS if name != "linear")
SETTINGS = TrainSettings(
    model=ModelSettings(name="gated-abmil", hidden=16, attention_dim=8, heads=4, dropout=0.25),
    epochs=6,
    learning_rate=3e-3,
    max_bags=4,
    patience=0,
    precision="float32",
    device="cpu",
    small_cohorts="off",  # the loop of large cohorts, on few bags
)
SPLIT = FoldIndices(np.arange(0, 30), np.arange(30, 40), np.arange(40, 50))


def bags(count: int = 50, seed: int = 0) -> tuple[FeatureStore, NDArray[np.int64]]:
    """Bags in which positive ones hold a few shifted tiles."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    arrays = []
    for label in labels:
        values = rng.normal(size=(rng.integers(3, 20), DIM)).astype(np.float32)
        values[:2] += 2.0 * label
        arrays.append(values)
    meta = StoreMeta("net", "ab" * 32, "5x", 2.0, 256)
    return FeatureStore.from_arrays(arrays, [f"s{i:02d}" for i in range(count)], meta=meta), labels.astype(np.int64)


STORE, LABELS = bags()


def run(settings: TrainSettings = SETTINGS, out: Path | None = None, **more: Any) -> TrainResult:
    return train(STORE, LABELS, SPLIT, settings, out, **more)


def same_weights(a: MILModel, b: MILModel) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", TRAINED)
def test_every_model_learns_a_plain_task(name: str) -> None:
    settings = replace(SETTINGS, model=replace(SETTINGS.model, name=name), epochs=25)
    result = run(settings)
    assert result.card.metrics["test_auc"] > 0.9
    history = [row["train_loss"] for row in result.history]
    assert history[-1] < 0.7 * history[0]


def scaled(factor: float, shift: float) -> tuple[FeatureStore, FeatureStore]:
    """Bags with features far from 0 and of other sizes, and the same in plain units."""
    rng = np.random.default_rng(3)
    plain = [STORE.bag(i).astype(np.float32) for i in range(len(STORE))]
    scale = (factor * np.exp(rng.normal(size=DIM))).astype(np.float32)
    moved = [values * scale + shift * scale for values in plain]
    ids = [f"s{i:02d}" for i in range(len(plain))]
    return tuple(FeatureStore.from_arrays(a, ids, meta=STORE.meta, dtype="float32") for a in (moved, plain))  # type: ignore[return-value]


@pytest.mark.parametrize("name", TRAINED)
def test_a_model_does_not_mind_the_units_of_its_features(name: str) -> None:
    settings = replace(SETTINGS, model=replace(SETTINGS.model, name=name, input_dropout=0.2), epochs=3)
    moved, plain = scaled(100.0, 5.0)
    a, b = (train(store, LABELS, SPLIT, settings) for store in (moved, plain))
    # Of the same tiles in other units the same model is made, but for rounding.
    for x, y in zip(a.predictions, b.predictions, strict=True):
        np.testing.assert_allclose(x.logits, y.logits, atol=2e-2)
    raw = train(moved, LABELS, SPLIT, replace(settings, standardise=False))
    difference = [abs(x.logits[0] - y.logits[0]) for x, y in zip(raw.predictions, b.predictions, strict=True)]
    assert max(difference) > 0.2


def test_a_model_keeps_the_moments_of_its_training_tiles(tmp_path: Path) -> None:
    moved, _ = scaled(100.0, 5.0)
    train(moved, LABELS, SPLIT, SETTINGS, tmp_path)
    module, _ = load_model(tmp_path / "model.safetensors")
    tiles = np.concatenate([moved.bag(int(i)) for i in SPLIT.train]).astype(np.float64)
    np.testing.assert_allclose(module.input_mean.numpy(), tiles.mean(0), rtol=1e-4)
    np.testing.assert_allclose(module.input_scale.numpy(), 1 / tiles.std(0), rtol=1e-3)


def test_a_feature_that_never_varies_says_nothing() -> None:
    constant = [np.hstack([STORE.bag(i), np.full((len(STORE.bag(i)), 1), 7.0)]) for i in range(len(STORE))]
    store = FeatureStore.from_arrays(
        [values.astype(np.float32) for values in constant], [f"s{i:02d}" for i in range(len(STORE))], meta=STORE.meta
    )
    result = train(store, LABELS, SPLIT, replace(SETTINGS, epochs=1))
    assert result.model.input_scale[-1] == 0
    values = torch.from_numpy(store.bag(0)).float()
    elsewhere = values.clone()
    elsewhere[:, -1] = -300.0
    offsets = torch.tensor([0, len(values)])
    with torch.no_grad():
        assert torch.allclose(result.model(values, offsets).logits, result.model(elsewhere, offsets).logits)


def test_a_run_leaves_everything_needed(tmp_path: Path) -> None:
    seen: list[Any] = []
    result = run(out=tmp_path / "run", classes=("benign", "tumour"), fold="fold_1", progress=seen.append)
    folder = tmp_path / "run"
    assert result.model_path == folder / "model.safetensors"
    module, card = load_model(folder / "model.safetensors")
    assert same_weights(module, result.model)
    assert (card.classes, card.fold, card.encoder, card.level) == (("benign", "tumour"), "fold_1", "net", "5x")
    assert (card.mpp, card.tile_px, card.weights_sha256) == (2.0, 256, "ab" * 32)
    assert card.model.in_dim == DIM
    assert card.features_sha256 == STORE.content_hash
    assert card.temperature == result.card.temperature
    assert load_settings(folder / "config.toml").model == card.model
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert float(rows[2]["val_auc"]) == result.history[2]["val_auc"] == seen[2]["val_auc"]
    with open(folder / "predictions.csv", newline="") as file:
        predictions = list(csv.DictReader(file))
    assert [p["slide_id"] for p in predictions] == [f"s{i}" for i in range(30, 50)]
    assert [p["part"] for p in predictions] == ["val"] * 10 + ["test"] * 10
    first = predictions[0]
    logits = [float(first["logit_benign"]), float(first["logit_tumour"])]
    assert float(first["probability_tumour"]) == pytest.approx(card.probabilities([logits])[0, 1])
    assert first["label"] == "benign"


def test_predictions_are_those_of_the_saved_model_on_the_features_as_stored(tmp_path: Path) -> None:
    # Training in bfloat16 must not round what figures are made of.
    settings = replace(SETTINGS, precision="bfloat16")
    result = run(settings, tmp_path)
    module, _ = load_model(tmp_path / "model.safetensors")
    for place, prediction in zip([*SPLIT.val, *SPLIT.test], result.predictions, strict=True):
        values = torch.from_numpy(STORE.bag(int(place)))
        logits = module(values, torch.tensor([0, len(values)])).logits[0]
        np.testing.assert_allclose(prediction.logits, logits.detach().numpy(), atol=1e-5)


def test_the_same_seed_gives_the_same_numbers_and_leaves_the_callers_alone() -> None:
    torch.manual_seed(9)
    before = torch.random.get_rng_state()
    first = run()
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(10)
    second = run()
    assert first.history == second.history
    assert same_weights(first.model, second.model)
    other = run(replace(SETTINGS, seed=1))
    assert other.history[0]["train_loss"] != first.history[0]["train_loss"]


def test_folds_share_one_resident_store() -> None:
    resident = ResidentStore.of(STORE, "cpu", torch.float32)
    shared = train(resident, LABELS, SPLIT, SETTINGS)
    assert shared.history == run().history


class StopNowError(Exception):
    pass


@pytest.mark.parametrize(("stop_at", "every"), [(1, 1), (3, 1), (5, 2), (6, 1)])
def test_a_stopped_run_goes_on_as_if_it_had_never_stopped(stop_at: int, every: int, tmp_path: Path) -> None:
    settings = replace(SETTINGS, save_every=every)
    whole = run(settings, tmp_path / "whole")

    def stop(row: Any) -> None:
        if row["epoch"] == stop_at:
            raise StopNowError

    with pytest.raises(StopNowError):
        run(settings, tmp_path / "parts", progress=stop)
    epochs: list[float] = []
    resumed = run(settings, tmp_path / "parts", progress=lambda row: epochs.append(row["epoch"]))
    assert epochs == list(range(stop_at - stop_at % every + 1, 7))
    assert resumed.history == whole.history
    assert same_weights(resumed.model, whole.model)
    assert resumed.predictions == whole.predictions
    assert (tmp_path / "parts" / "metrics.csv").read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = run(out=tmp_path)
    (tmp_path / "model.safetensors").unlink()
    epochs: list[Any] = []
    again = run(out=tmp_path, progress=epochs.append)
    assert epochs == []
    assert same_weights(first.model, again.model)
    assert (tmp_path / "model.safetensors").exists()


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    run(out=tmp_path)
    for other in (replace(SETTINGS, learning_rate=1e-3), replace(SETTINGS, seed=5)):
        with pytest.raises(ResumeError, match="other settings"):
            run(other, tmp_path)
    with pytest.raises(ResumeError):
        train(STORE, 1 - LABELS, SPLIT, SETTINGS, tmp_path)
    with pytest.raises(ResumeError):
        train(STORE, LABELS, FoldIndices(SPLIT.train, SPLIT.test, SPLIT.val), SETTINGS, tmp_path)
    with pytest.raises(ResumeError):
        train(bags(seed=1)[0], LABELS, SPLIT, SETTINGS, tmp_path)
    # What does not change the numbers does not matter.
    run(replace(SETTINGS, save_every=3), tmp_path)
    (tmp_path / "state.safetensors").write_bytes(b"broken")
    with pytest.raises(ResumeError, match="delete it"):
        run(out=tmp_path)


def test_test_bags_are_not_touched_before_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    touched: list[tuple[str, tuple[int, ...]]] = []

    def recording(model: Any, store: Any, indices: Any, **more: Any) -> Any:
        touched.append(("pass", tuple(int(i) for i in indices)))
        return bag_logits(model, store, indices, **more)

    original = loop.batches

    def batches(store: Any, labels: Any, indices: Any, **more: Any) -> Any:
        touched.append(("train", tuple(int(i) for i in indices)))
        return original(store, labels, indices, **more)

    monkeypatch.setattr(loop, "bag_logits", recording)
    monkeypatch.setattr(training, "bag_logits", recording)
    monkeypatch.setattr(loop, "batches", batches)
    run()
    test, val, learn = (tuple(part.tolist()) for part in (SPLIT.test, SPLIT.val, SPLIT.train))
    assert touched == [("train", learn), ("pass", val)] * 6 + [("pass", val), ("pass", test)]


def test_calibration_looks_at_validation_bags_only_and_takes_class_weights_back() -> None:
    labels = LABELS.copy()
    flipped = labels.copy()
    flipped[SPLIT.test] = 1 - flipped[SPLIT.test]
    # Three of four training bags of one class go, so that the classes have weights.
    rare = SPLIT.train[labels[SPLIT.train] == 1]
    split = FoldIndices(np.setdiff1d(SPLIT.train, rare[len(rare) // 4 :]), SPLIT.val, SPLIT.test)
    result, other = (train(STORE, table, split, SETTINGS) for table in (labels, flipped))
    assert (other.card.temperature, other.card.bias) == (result.card.temperature, result.card.bias)
    counts = np.bincount(labels[split.train])
    shift = np.log(counts / counts.mean())
    np.testing.assert_allclose(result.card.bias, shift - shift.mean(), atol=1e-6)
    assert result.card.calibration.startswith("prior: not fitted: 10 validation cases")
    plain = train(STORE, labels, split, replace(SETTINGS, class_weights="none"))
    assert (plain.card.bias, plain.card.temperature) == ((), 1.0)


def test_without_validation_the_last_epoch_stays_and_nothing_is_calibrated() -> None:
    nothing = np.array([], np.int64)
    result = train(STORE, LABELS, FoldIndices(SPLIT.train, nothing, SPLIT.test), replace(SETTINGS, patience=1))
    assert result.best_epoch == 6
    assert result.card.temperature == 1
    assert len(result.history) == 6


@pytest.mark.parametrize(("monitor", "pick"), [("loss", min), ("auc", max), ("brier", min), ("balanced_accuracy", max)])
def test_the_best_epoch_is_kept(monitor: str, pick: Any) -> None:
    settings = replace(SETTINGS, monitor=monitor, epochs=15, learning_rate=0.03)
    result = run(settings)
    values = [row[f"val_{monitor}"] for row in result.history]
    assert result.best_epoch == values.index(pick(values)) + 1
    shorter = run(replace(settings, schedule="constant"))
    again = train(STORE, LABELS, SPLIT, replace(settings, schedule="constant", epochs=shorter.best_epoch))
    assert same_weights(shorter.model, again.model)


def test_patience_ends_a_run_but_not_before_min_epochs() -> None:
    settings = replace(SETTINGS, epochs=40, learning_rate=0.1, patience=3, min_epochs=0)
    result = run(settings)
    assert len(result.history) == result.best_epoch + 3 < 40
    longer = run(replace(settings, min_epochs=30))
    assert 30 <= len(longer.history) <= 40


def test_an_undefined_monitor_is_refused() -> None:
    one_class = FoldIndices(SPLIT.train, np.arange(30, 40, 2), SPLIT.test)
    with pytest.raises(SettingsError, match="auc is undefined"):
        train(STORE, LABELS, one_class, replace(SETTINGS, monitor="auc"))
    result = train(STORE, LABELS, one_class, SETTINGS)
    assert all(row["val_auc"] is None for row in result.history)
    assert math.isnan(result.card.metrics["val_auc"])


def test_divergence_is_named() -> None:
    with pytest.raises(DivergedError, match="training loss of epoch"):
        run(replace(SETTINGS, learning_rate=1e30, clip_norm=0.0))


def test_bad_splits_and_labels_are_refused_by_name() -> None:
    with pytest.raises(SplitError, match="class '1' has no training bag"):
        train(STORE, LABELS, FoldIndices(np.arange(0, 30, 2), SPLIT.val, SPLIT.test), SETTINGS)
    with pytest.raises(SplitError, match="two parts"):
        train(STORE, LABELS, FoldIndices(SPLIT.train, SPLIT.val, np.arange(29, 50)), SETTINGS)
    with pytest.raises(SplitError, match="no training bag"):
        train(STORE, LABELS, FoldIndices(np.array([], np.int64), SPLIT.val, SPLIT.test), SETTINGS)
    unlabelled = LABELS.copy()
    unlabelled[4] = -1
    with pytest.raises(SplitError, match=r"s04 .* no label"):
        train(STORE, unlabelled, SPLIT, SETTINGS)
    arrays = [STORE.bag(i) for i in range(50)]
    arrays[45] = arrays[45][:0]
    with pytest.raises(SplitError, match=r"45 .* no tiles"):
        train(FeatureStore.from_arrays(arrays), LABELS, SPLIT, SETTINGS)
    with pytest.raises(SettingsError, match="do not fit 50 bags"):
        train(STORE, LABELS[:-1], SPLIT, SETTINGS)


def test_class_weights_balance_and_average_to_one() -> None:
    labels = np.array([0, 0, 0, 1, 2, 2, 1, 1])
    train_part = np.arange(6)
    weights = class_weights(labels, train_part, "abc", balanced=True).numpy()
    np.testing.assert_allclose(weights, [6 / 9, 2, 1])
    assert weights[labels[:6]].mean() == pytest.approx(1)
    assert class_weights(labels, train_part, "abc", balanced=False).tolist() == [1, 1, 1]


def test_the_schedule() -> None:
    settings = replace(SETTINGS, epochs=11, warmup_epochs=1.0, learning_rate=1.0, final_lr_share=0.1)
    rates = [learning_rate(settings, t) for t in (0, 0.5, 1, 6, 11, 12)]
    np.testing.assert_allclose(rates, [0.01, 0.5, 1, 0.55, 0.1, 0.1])
    assert learning_rate(replace(settings, schedule="constant"), 9) == 1
    assert learning_rate(replace(settings, warmup_epochs=0.0), 0) == 1


def test_biases_do_not_decay() -> None:
    optimizer = make_optimizer(build_model(SETTINGS.model), replace(SETTINGS, weight_decay=0.1))
    decay = {p.ndim: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {2: 0.1, 1: 0.0}


def test_clipping_bounds_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    original = AdamW.step

    def recording(self: Any, *args: Any, **more: Any) -> Any:
        gradients = [p.grad.flatten() for g in self.param_groups for p in g["params"] if p.grad is not None]
        norms.append(float(torch.cat(gradients).norm()))
        return original(self, *args, **more)

    monkeypatch.setattr(AdamW, "step", recording)
    run(replace(SETTINGS, epochs=1, clip_norm=0.01))
    assert max(norms) <= 0.01 * 1.001
    norms.clear()
    run(replace(SETTINGS, epochs=1, clip_norm=0.0))
    assert max(norms) > 0.05


def test_devices_and_precisions() -> None:
    with pytest.raises(SettingsError, match="nonsense"):
        choose_device("nonsense")
    if not torch.cuda.is_available():
        assert choose_device("auto") == torch.device("cpu")
        with pytest.raises(SettingsError, match="cuda"):
            choose_device("cuda")
    cpu = torch.device("cpu")
    assert choose_precision("bfloat16", cpu) == torch.bfloat16
    assert choose_precision("float32", cpu) == torch.float32
    assert choose_precision("auto", cpu) in (torch.float32, torch.bfloat16)


def test_deterministic_mode_is_given_back() -> None:
    run(replace(SETTINGS, deterministic=True, epochs=1))
    assert not torch.are_deterministic_algorithms_enabled()


def test_tensorboard_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run(replace(SETTINGS, tensorboard=True, epochs=2), tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("val/auc")] == [1, 2]


# Teacher and student


def pyramids(seed: int = 0) -> tuple[FeatureStore, FeatureStore, NDArray[np.int64]]:
    """LR and HR features of the same slides, in another order; the first LR tile of each has no HR tile."""
    rng = np.random.default_rng(seed)
    lr, hr, parents, labels = [], [], [], np.arange(50) % 2
    for label in labels:
        count = int(rng.integers(4, 9))
        tiles = rng.normal(size=(count, DIM)).astype(np.float32)
        parent = rng.integers(1, count, size=4 * count)
        below = tiles[parent] + 0.1 * rng.normal(size=(4 * count, DIM)).astype(np.float32)
        below[parent == 1] += 2.0 * label
        lr.append(tiles)
        hr.append(below.astype(np.float32))
        parents.append(parent)
    ids = [f"s{i}" for i in range(50)]
    order = rng.permutation(50)
    lr_store = FeatureStore.from_arrays(lr, ids, meta=StoreMeta(level="5x"))
    hr_store = FeatureStore.from_arrays(
        [hr[i] for i in order],
        [ids[i] for i in order],
        parents=[parents[i] for i in order],
        meta=StoreMeta(level="20x", parent_level="5x"),
    )
    return lr_store, hr_store, labels


LR, HR, PYRAMID_LABELS = pyramids()


def hr_model(name: str = "gated-abmil", classes: int = 2) -> MILModel:
    torch.manual_seed(2)
    return build_model(replace(SETTINGS.model, name=name, in_dim=DIM, classes=classes))


def test_targets_are_the_teachers_word_bag_by_bag() -> None:
    teacher = hr_model().eval()
    chosen = np.array([3, 17, 8])
    targets = teacher_targets(
        teacher, ResidentStore.of(HR, "cpu"), ResidentStore.of(LR, "cpu"), chosen, attention=True, token_budget=30
    )
    assert targets.mass is not None
    assert targets.covered is not None
    for i in chosen.tolist():
        j = HR.slide_ids.index(LR.slide_ids[i])
        values = torch.from_numpy(HR.bag(j))
        output = teacher(values, torch.tensor([0, len(values)]))
        torch.testing.assert_close(targets.logits[i], output.logits[0].detach())
        assert output.attention_logits is not None
        attention = output.attention_logits.detach().softmax(0).numpy()
        assert HR.parents is not None
        parent = HR.parents[HR.offsets[j] : HR.offsets[j + 1]]
        expected = np.bincount(parent, attention, minlength=int(LR.lengths[i]))
        rows = slice(int(LR.offsets[i]), int(LR.offsets[i + 1]))
        np.testing.assert_allclose(targets.mass[rows], expected, atol=1e-6)
        assert targets.covered[rows].tolist() == [k in parent for k in range(int(LR.lengths[i]))]
        assert not targets.covered[rows][0]
    assert targets.logits[4].isnan().all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gated-abmil", "clam-sb", "dsmil", "transmil"])
def test_a_student_is_pulled_to_the_teachers_attention(name: str) -> None:
    settings = replace(SETTINGS, model=replace(SETTINGS.model, name=name, dropout=0.0), epochs=15, class_weights="none")
    teacher = train(HR, [PYRAMID_LABELS[LR.slide_ids.index(s)] for s in HR.slide_ids], SPLIT, settings).model
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    student = replace(settings, loss=LossSettings(ce=0.0, bag=1.0, soft=1.0, hard=0.1, instances=2), patience=0)
    result = train(LR, PYRAMID_LABELS, SPLIT, student, teacher=teacher, hr_store=HR)
    rows = result.history
    assert set(rows[0]) >= {"train_ce", "train_bag", "train_soft", "train_hard"}
    for term in ("bag", "soft", "hard"):
        assert rows[-1][f"train_{term}"] < rows[0][f"train_{term}"], term
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    assert result.card.teacher["model"] == name


def test_a_student_with_all_weights_at_zero_is_plain_mil_bit_for_bit() -> None:
    settings = replace(SETTINGS, loss=LossSettings(ce=1.0, bag=0.0, soft=0.0, hard=0.0))
    plain = train(LR, PYRAMID_LABELS, SPLIT, settings)
    student = train(LR, PYRAMID_LABELS, SPLIT, settings, teacher=hr_model(), hr_store=HR)
    assert plain.history == student.history
    assert same_weights(plain.model, student.model)
    assert plain.predictions == student.predictions


def test_each_fold_starts_fresh() -> None:
    # The published code carried the student from one fold into the next.
    first = train(LR, PYRAMID_LABELS, SPLIT, SETTINGS, teacher=hr_model(), hr_store=HR)
    swapped = FoldIndices(np.arange(20, 50), np.arange(10, 20), np.arange(0, 10))
    train(LR, PYRAMID_LABELS, swapped, SETTINGS, teacher=hr_model(), hr_store=HR)
    again = train(LR, PYRAMID_LABELS, SPLIT, SETTINGS, teacher=hr_model(), hr_store=HR)
    assert first.history == again.history
    assert same_weights(first.model, again.model)


def test_a_saved_student_needs_neither_teacher_nor_hr(tmp_path: Path) -> None:
    result = train(LR, PYRAMID_LABELS, SPLIT, SETTINGS, tmp_path, teacher=hr_model(), hr_store=HR)
    module, _ = load_model(tmp_path / "model.safetensors")
    assert not any("teacher" in name for name, _ in module.named_parameters())
    logits = bag_logits(module, ResidentStore.of(LR, "cpu"), SPLIT.test, token_budget=100)
    np.testing.assert_allclose(logits, [p.logits for p in result.predictions if p.part == "test"], atol=1e-5)


def test_impossible_students_are_refused_with_the_remedy() -> None:
    def student(teacher: MILModel | None = None, hr: FeatureStore | None = HR, **changes: Any) -> None:
        settings = replace(SETTINGS, **changes)
        train(LR, PYRAMID_LABELS, SPLIT, settings, teacher=teacher or hr_model(), hr_store=hr)

    with pytest.raises(SettingsError, match="both"):
        student(hr=None)
    with pytest.raises(SettingsError, match="mean model has no attention"):
        student(model=replace(SETTINGS.model, name="mean"))
    with pytest.raises(SettingsError, match=r"teacher \(max\) has no attention"):
        student(hr_model("max"))
    with pytest.raises(SettingsError, match="3 classes"):
        student(hr_model(classes=3))
    arrays = [HR.bag(i) for i in range(49)]
    with pytest.raises(BagMismatchError, match="without the rows"):
        student(hr=FeatureStore.from_arrays([HR.bag(i) for i in range(50)], HR.slide_ids))
    parents = [HR.parents[a:b] for a, b in zip(HR.offsets[:-1], HR.offsets[1:], strict=True)]  # type: ignore[index]
    fewer = FeatureStore.from_arrays(arrays, HR.slide_ids[:49], parents=parents[:49])
    if HR.slide_ids[49] in {f"s{i}" for i in range(30)}:
        with pytest.raises(BagMismatchError, match=f"1 slides have no HR features: {HR.slide_ids[49]}"):
            student(hr=fewer)
    beyond = [p + 100 for p in parents]
    with pytest.raises(BagMismatchError, match="beyond"):
        student(hr=FeatureStore.from_arrays([HR.bag(i) for i in range(50)], HR.slide_ids, parents=beyond))
    other = replace(HR.meta, parent_level="10x")
    elsewhere = FeatureStore.from_arrays([HR.bag(i) for i in range(50)], HR.slide_ids, parents=parents, meta=other)
    with pytest.raises(BagMismatchError, match="10x"):
        student(hr=elsewhere)
    # A student without the attention terms takes teachers without attention.
    student(hr_model("max"), loss=LossSettings(soft=0.0, hard=0.0), epochs=1)
