"""Small cohorts: networks trained together are the networks, what auto chooses it chooses well, and it stays cheap."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lrmil.checkpoint import load_model
from lrmil.config import LossSettings, ModelSettings, TrainSettings, load_settings
from lrmil.errors import ModelFileError, SettingsError
from lrmil.model import build_model
from lrmil.model.attention import ABMIL
from lrmil.model.ensemble import Ensemble
from lrmil.model.segments import segment_ids, segment_softmax
from lrmil.splits import FoldIndices
from lrmil.store import FeatureStore, ResidentStore, StoreMeta
from lrmil.targets import Classification
from lrmil.trainer import TrainResult, small, train
from lrmil.trainer.choice import choose_share
from lrmil.trainer.compute import threads_for
from lrmil.trainer.linear import log_losses
from lrmil.trainer.optimise import AdamW
from lrmil.trainer.replicas import Recipe, _forward, _initial, train_replicas, unstack
from wsi_pipe.errors import ConfigError

DIM = 8
AUTO = TrainSettings(device="cpu", epochs=12)


def cohort(kind: str, count: int = 60, seed: int = 0) -> tuple[FeatureStore, NDArray[np.int64]]:
    """ "mean": all tiles are shifted a little. "rare": two tiles of positive bags are shifted much, either way."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    arrays = []
    for label in labels:
        values = rng.normal(size=(12, DIM))
        if label and kind == "mean":
            values[:, 0] += 0.7
        elif label:
            values[:2, 0] += 6.0
        if kind == "rare":
            values[2:4, 1] += 6.0
        arrays.append(values.astype(np.float32))
    store = FeatureStore.from_arrays(arrays, meta=StoreMeta("net", "ab" * 32, "5x", 2.0, 256), dtype="float32")
    return store, labels.astype(np.int64)


TWO = Classification(classes=("0", "1"))


def run(store: FeatureStore, labels: NDArray[np.int64], settings: TrainSettings = AUTO, **more: Any) -> TrainResult:
    every = np.arange(len(labels))
    return train(store, labels, FoldIndices(every[:40], every[40:48], every[48:]), settings, **more)


# Networks trained together


@pytest.mark.parametrize("name", ["abmil", "gated-abmil"])
def test_a_stack_is_its_networks(name: str) -> None:
    settings = ModelSettings(name, in_dim=DIM, classes=3, hidden=6, attention_dim=4)
    torch.manual_seed(0)
    stack = _initial(settings, 3, torch.device("cpu"))
    features, offsets = torch.randn(17, DIM), torch.tensor([0, 5, 6, 17])
    mean, std = torch.randn(DIM), torch.rand(DIM) + 0.5
    moved = (features - mean) / std
    together = _forward(stack, moved, segment_ids(offsets, 17), 3, settings, training=False)
    for i in range(3):
        alone = unstack(stack, i, settings, mean, std)
        torch.testing.assert_close(alone(features, offsets).logits, together[i], atol=1e-5, rtol=0)


def test_a_stack_learns_as_its_networks_would_alone() -> None:
    # One step on all bags without dropout: the weights are those of an ABMIL stepped by torch's own optimiser, and a
    # bag that a network leaves out does not move it.
    store, labels = cohort("mean", 12)
    settings = ModelSettings("gated-abmil", in_dim=DIM, hidden=6, attention_dim=4, dropout=0.0)
    left_out = np.zeros((2, 12), bool)
    left_out[1, :6] = True
    recipe = Recipe(1, 0.01, 0.0, 0.5, look_every=1, steps_an_epoch=1, least_bags=12)
    resident, every = ResidentStore.of(store), np.arange(12)
    flat = (torch.zeros(DIM), torch.ones(DIM))
    torch.manual_seed(3)
    found = train_replicas(resident, every, labels, TWO, left_out, settings, recipe, flat, 0, lambda z: False)
    torch.manual_seed(3)
    begun = _initial(settings, 2, torch.device("cpu"))
    for i in range(2):
        model = unstack(begun, i, settings, torch.zeros(DIM), None)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
        kept = every[~left_out[i]]
        rows = resident.gather(kept)
        loss = torch.nn.functional.cross_entropy(
            model(rows.features, rows.offsets).logits, torch.from_numpy(labels[kept])
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for n, p in model.named_parameters() if n != "attention_score.bias"], 0.5)
        optimizer.step()
        stepped = unstack(found.stacks[0], i, settings, torch.zeros(DIM), None)
        for (name, a), (_, b) in zip(model.named_parameters(), stepped.named_parameters(), strict=True):
            if not name.startswith("instance_head") and name != "attention_score.bias":
                torch.testing.assert_close(a, b, atol=2e-5, rtol=0, msg=f"{i} {name}")
    assert np.isnan(found.held_out[0, 0]).all()
    assert np.isfinite(found.held_out[0, 1, :6]).all()
    assert np.isnan(found.held_out[0, 1, 6:]).all()


def test_the_optimiser_has_torchs_numbers() -> None:
    torch.manual_seed(0)
    ours = [
        torch.randn(5, 3, requires_grad=True),
        torch.randn(3, requires_grad=True),
        torch.randn(2, requires_grad=True),
    ]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    groups = [([0], 0.1), ([1, 2], 0.0)]
    a = AdamW([{"params": [ours[i] for i in g], "weight_decay": d} for g, d in groups], 1e-2)
    b = torch.optim.AdamW([{"params": [theirs[i] for i in g], "weight_decay": d} for g, d in groups], lr=1e-2)
    for step in range(5):
        for p, q in zip(ours[: 2 if step else 3], theirs[: 2 if step else 3], strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
        a.zero_grad()
        b.zero_grad()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-6)


# An ensemble as a model


def test_an_ensemble_is_the_mean_of_its_members_and_comes_back_from_its_file(tmp_path: Path) -> None:
    store, labels = cohort("rare")
    settings = replace(AUTO, model=ModelSettings("gated-abmil"))
    result = run(store, labels, settings, out_dir=tmp_path / "run")
    model, card = load_model(tmp_path / "run" / "model.safetensors")
    assert isinstance(model, Ensemble)
    assert card.model.members == small.MEMBERS
    assert card.training["model"]["members"] == 1
    assert load_settings(tmp_path / "run" / "config.toml").model.hidden == 512
    values = torch.from_numpy(np.concatenate([store.bag(50), store.bag(51)]))
    offsets = torch.tensor([0, 12, 24])
    with torch.no_grad():
        output = model(values, offsets)
        outputs = [member(values, offsets) for member in model.members]
        expected = torch.stack([o.logits for o in outputs]).mean(0)
        attention = torch.stack([segment_softmax(o.attention_logits, offsets) for o in outputs]).mean(0)
    torch.testing.assert_close(output.logits, expected)
    assert output.attention_logits is not None
    torch.testing.assert_close(segment_softmax(output.attention_logits, offsets), attention, atol=1e-6, rtol=1e-4)
    by_slide = {p.slide_id: p.logits for p in result.predictions}
    np.testing.assert_allclose(output.logits[0].tolist(), by_slide[store.slide_ids[50]], atol=1e-5)
    assert (tmp_path / "run" / "metrics.csv").read_text().startswith("epoch,train_loss,inner_loss")
    from lrmil.checkpoint import save_model

    huge = replace(card, model=replace(card.model, hidden=10**8))
    with pytest.raises(ModelFileError, match=r"members\.0\.projection\.weight has the shape"):
        save_model(tmp_path / "x.safetensors", model, huge)


def test_a_linear_model_beside_attention_has_its_share(tmp_path: Path) -> None:
    from lrmil.checkpoint import ModelCard, save_model

    settings = ModelSettings("abmil", DIM, hidden=4, attention_dim=2, members=2, linear_share=0.25, pooling="quantiles")
    torch.manual_seed(0)
    model = build_model(settings).eval()
    assert isinstance(model, Ensemble)
    assert model.linear is not None
    model.standardise(torch.randn(DIM), torch.rand(DIM) + 0.5)
    save_model(tmp_path / "m.safetensors", model, ModelCard(settings, ("a", "b")))
    back, _ = load_model(tmp_path / "m.safetensors")
    values, offsets = torch.randn(9, DIM), torch.tensor([0, 4, 9])
    with torch.no_grad():
        networks = [member(values, offsets).logits for member in model.members]
        expected = 0.75 * (networks[0] + networks[1]) / 2 + 0.25 * model.linear(values, offsets).logits
        torch.testing.assert_close(back(values, offsets).logits, expected)


def test_what_is_still_to_be_chosen_is_no_model() -> None:
    with pytest.raises(ConfigError, match="still to be chosen"):
        build_model(ModelSettings())
    with pytest.raises(ConfigError, match="members"):
        ModelSettings("gated-abmil", members=1000)
    with pytest.raises(ConfigError, match="linear all of it"):
        ModelSettings("linear", members=2)


# What is chosen


def test_auto_says_what_it_chose_with_the_inner_figures() -> None:
    said: list[str] = []
    store, labels = cohort("rare")
    result = run(store, labels, say=said.append)
    (text,) = said
    assert text.startswith("auto chose ")
    assert "40 training slides of 40 cases, each left out in turn: linear AUC" in text
    assert result.card.choice["figures"]["gated-abmil"]["auc"] > 0.8
    assert result.card.metrics["test_auc"] > 0.9


def logits_of(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.stack([-scores, scores], 1) / 2


def test_the_better_one_is_chosen_and_of_equals_the_mean() -> None:
    rng = np.random.default_rng(0)
    y = np.arange(200) % 2
    good, bad = logits_of(3.0 * (2 * y - 1) + rng.normal(size=200)), logits_of(2 * rng.normal(size=200))
    assert choose_share(good, bad, y, TWO, "abmil").share == 1.0
    assert choose_share(bad, good, y, TWO, "abmil").share == 0.0
    same = choose_share(good, good, y, TWO, "abmil")
    assert same.share == 0.5
    assert same.figures["both"] == same.figures["linear"]


def test_inner_folds_stop_small_attention_before_it_overfits() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 48)
    labels[:2] = 0, 1
    store = FeatureStore.from_arrays([rng.normal(size=(6, 40)).astype(np.float32) for _ in labels], dtype="float32")
    result = run(store, labels, replace(AUTO, epochs=60, model=ModelSettings("gated-abmil")))
    inner = [row["inner_loss"] for row in result.history]
    assert result.best_epoch < 20
    assert len(inner) <= result.best_epoch // 2 + small.PATIENCE
    # Labels are chance: logits that were stopped in time are near none.
    losses = log_losses(
        np.array([p.logits for p in result.predictions]), np.array([p.label for p in result.predictions])
    )
    assert losses.mean() < 1.0


def test_the_rule_of_small_is_by_cases_and_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    store, labels = cohort("mean")
    settings = replace(AUTO, model=ModelSettings("gated-abmil"), epochs=2)
    assert isinstance(run(store, labels, settings).model, Ensemble)
    for off in (replace(settings, small_cohorts="off"), replace(settings, model=ModelSettings("dsmil", hidden=8))):
        assert not isinstance(run(store, labels, off).model, Ensemble)
    for name, value in (("SMALL_CASES", 40), ("SMALL_TILES", 479)):
        with monkeypatch.context() as patch:
            patch.setattr(small, name, value)
            large = run(store, labels, settings)
        assert type(large.model) is ABMIL
        assert large.card.model.hidden == 512


def test_what_a_user_asks_for_stays() -> None:
    asked = TrainSettings(model=ModelSettings(hidden=24, members=2), epochs=9)
    got = small.small_settings(asked, "abmil")
    assert (got.model.name, got.model.hidden, got.model.members, got.epochs) == ("abmil", 24, 2, 9)
    assert (got.model.attention_dim, got.learning_rate) == (16, 2e-3)
    store, labels = cohort("mean")
    with pytest.raises(SettingsError, match="small"):
        run(store, labels, replace(asked, small_cohorts="off", model=replace(asked.model, name="abmil")))


def test_a_large_cohort_is_chosen_by_its_validation_slides(monkeypatch: pytest.MonkeyPatch) -> None:
    from lrmil.trainer import fitting

    store, labels = cohort("mean", 120)
    every = np.arange(120)
    settings = replace(AUTO, model=ModelSettings(hidden=8, attention_dim=4), epochs=3, small_cohorts="off")
    few = train(store, labels, FoldIndices(every[:40], every[40:60], every[60:]), settings)
    assert "20 validation cases are too few" in few.card.choice["said"]
    assert type(few.model) is ABMIL
    enough = train(store, labels, FoldIndices(every[:40], every[40:100], every[100:]), settings)
    # Three epochs teach attention nothing yet.
    assert enough.card.choice["linear_share"] > 0
    assert "on 60 validation slides of 60 cases" in enough.card.choice["said"]
    assert fitting.LEAST_VAL == 50


def test_a_student_under_auto_is_an_attention_model() -> None:
    store, labels = cohort("mean")
    torch.manual_seed(0)
    teacher = build_model(ModelSettings("gated-abmil", in_dim=DIM, hidden=4, attention_dim=2))
    loss = LossSettings(bag=1.0, soft=0.0, hard=0.0)
    settings = replace(AUTO, model=ModelSettings(hidden=8, attention_dim=4), epochs=2, loss=loss)
    said: list[str] = []
    result = run(store, labels, settings, teacher=teacher, hr_store=store, say=said.append)
    assert result.card.model.name == "gated-abmil"
    assert said == ["auto took gated-abmil: a student needs attention and steps"]


def test_too_few_cases_for_inner_folds() -> None:
    store, labels = cohort("mean")
    split = FoldIndices(np.array([0, 1, 2]), np.arange(0), np.arange(40, 60))
    assert train(store, labels, split, AUTO).card.model.name == "linear"
    settings = replace(AUTO, model=ModelSettings("gated-abmil"), epochs=4)
    result = train(store, labels, split, settings)
    assert "a class has too few cases for inner folds" in result.card.choice["said"]
    assert result.best_epoch == 4


# Cost


def test_threads_are_few_for_small_steps_and_come_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with threads_for(1e6):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
        with threads_for(1e12):
            assert torch.get_num_threads() == 3
        with pytest.raises(ValueError, match="in the middle"), threads_for(1e6):
            raise ValueError("in the middle")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_training_imports_no_compiler_and_takes_one_thread() -> None:
    code = """
import sys
import numpy as np, torch
from dataclasses import replace
from lrmil.config import ModelSettings, TrainSettings
from lrmil.splits import FoldIndices
from lrmil.store import FeatureStore
from lrmil.trainer import loop, replicas, train
torch.set_num_threads(2)
threads = set()
for module, name in ((loop, "_train_epoch"), (replicas, "_forward")):
    def watched(*a, inner=getattr(module, name), **k):
        threads.add(torch.get_num_threads())
        return inner(*a, **k)
    setattr(module, name, watched)
labels = np.arange(30) % 2
store = FeatureStore.from_arrays([np.full((6, 4), y, np.float32) + np.eye(6, 4, dtype=np.float32) for y in labels])
every = np.arange(30)
split = FoldIndices(every[:20], every[20:25], every[25:])
settings = TrainSettings(model=ModelSettings(hidden=8, attention_dim=4), epochs=2, device="cpu")
train(store, labels, split, settings)
train(store, labels, split, replace(settings, small_cohorts="off", model=replace(settings.model, name="gated-abmil")))
print(sorted(threads), torch.get_num_threads(), "torch._dynamo" in sys.modules, "sklearn" in sys.modules)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.split() == ["[1]", "2", "False", "False"]
