"""The published settings of LRMIL: plain attention on features, both rules for parents, Adam at one rate."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lrmil.checkpoint import ModelCard, load_model, save_model
from lrmil.config import LossSettings, ModelSettings, TrainSettings, deciding
from lrmil.distill import DistillSettings
from lrmil.distill.run import _stated
from lrmil.distill.train import _rate
from lrmil.experiment.presets import find_preset
from lrmil.experiment.settings import ExperimentSettings, load_experiment
from lrmil.losses import teacher_mass
from lrmil.model import build_model, widest_weight
from lrmil.trainer.optimise import learning_rate, make_optimizer
from wsi_pipe.config import to_mapping
from wsi_pipe.errors import ConfigError


@pytest.mark.parametrize("gated", [False, True])
def test_plain_attention_by_hand(gated: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = ModelSettings(
        "gated-abmil" if gated else "abmil", in_dim=5, attention_dim=3, classes=2, dropout=0.0, projection=False
    )
    model = build_model(settings).eval()
    x = torch.randn(9, 5)
    output = model(x, torch.tensor([0, 4, 9]))
    w = {name: value.detach().double().numpy() for name, value in model.state_dict().items()}
    for b, rows in enumerate((x[:4], x[4:])):
        h = rows.double().numpy()
        value = h @ w["attention.weight"].T + w["attention.bias"]
        hidden = np.tanh(value[:, :3])
        if gated:
            hidden = hidden / (1 + np.exp(-value[:, 3:]))
        score = hidden @ w["attention_score.weight"][0] + w["attention_score.bias"][0]
        a = np.exp(score - score.max())
        bag = (a / a.sum()) @ h
        logits = w["classifier.weight"] @ bag + w["classifier.bias"]
        assert output.bag[b].tolist() == pytest.approx(bag.tolist(), abs=1e-6)
        assert output.logits[b].tolist() == pytest.approx(logits.tolist(), abs=1e-6)
    # The head for single tiles sees the features themselves, so its loss does not reach what classifies.
    assert torch.equal(output.instances, x)
    assert not any("projection" in name for name in w)
    assert tuple(w[widest_weight(settings)[0]].shape) == widest_weight(settings)[1]
    path = tmp_path / "m.safetensors"
    save_model(path, model, ModelCard(settings, ("a", "b")))
    again, _ = load_model(path)
    assert torch.equal(again(x, torch.tensor([0, 9])).logits, model(x, torch.tensor([0, 9])).logits)


def test_plain_attention_sees_standardised_features() -> None:
    torch.manual_seed(0)
    model = build_model(ModelSettings("abmil", in_dim=4, attention_dim=3, projection=False)).eval()
    x = torch.randn(6, 4)
    offsets = torch.tensor([0, 6])
    before = model(x, offsets).logits
    mean, std = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([2.0, 0.5, 1.0, 3.0])
    model.standardise(mean, std)
    assert torch.allclose(model(x * std + mean, offsets).logits, before, atol=1e-5)


@pytest.mark.parametrize("change", [{"name": "dsmil"}, {"name": "auto"}, {"members": 2}])
def test_others_need_their_projection(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="projection"):
        ModelSettings(**({"name": "abmil", "projection": False} | change))  # type: ignore[arg-type]


def test_parents_by_the_mean_and_the_greatest_of_their_children() -> None:
    # Two bags: one of three LR tiles, the last without children, one of two. A child without a parent counts for none.
    logits = torch.tensor([1.0, 3.0, 0.5, 9.0, -1.0, -3.0])
    parent = torch.tensor([0, 0, 1, -1, 1, 0])
    hr, lr = torch.tensor([0, 4, 6]), torch.tensor([0, 3, 5])
    for rule, first, second in (("mean", [2.0, 0.5], [-3.0, -1.0]), ("max", [3.0, 0.5], [-3.0, -1.0])):
        mass, covered = teacher_mass(logits, hr, parent, lr, rule)
        wanted = [*np.exp(first) / np.exp(first).sum(), 0.0, *np.exp(second) / np.exp(second).sum()]
        assert mass.tolist() == pytest.approx(wanted, abs=1e-6)
        assert covered.tolist() == [True, True, False, True, True]
    summed, _ = teacher_mass(logits, hr, parent, lr)
    a = np.exp(logits[:4].numpy()) / np.exp(logits[:4].numpy()).sum()
    assert summed[:3].tolist() == pytest.approx([a[0] + a[1], a[2], 0.0], abs=1e-6)
    with pytest.raises(ConfigError, match="parents 'median' must be one of"):
        LossSettings(parents="median")


def test_a_bag_without_any_parent_has_no_mass() -> None:
    mass, covered = teacher_mass(
        torch.tensor([1.0, 2.0]), torch.tensor([0, 2]), torch.tensor([-1, -1]), torch.tensor([0, 2]), "mean"
    )
    assert mass.tolist() == [0, 0]
    assert not covered.any()


def test_the_preset_states_what_is_published() -> None:
    paper = load_experiment(find_preset("paper"))
    assert (paper.teacher, paper.student, paper.student_px, paper.tile_px) == ("conch_trunk", "copy", 256, 256)
    d = paper.distill
    assert (d.layers, d.layer_variance, d.stain, d.flips, d.val_fraction) == ((0, 1, 10), False, 0.0, False, 0.0)
    m = paper.mil
    assert (m.model.name, m.model.projection, m.model.attention_dim, m.model.dropout) == ("abmil", False, 128, 0.0)
    assert (m.max_bags, m.class_weights, m.monitor, m.small_cohorts) == (1, "none", "auc", "off")
    assert list(paper.taught) == ["mean", "max"]
    assert [loss.parents for loss in paper.taught.values()] == ["mean", "max"]
    assert list(ExperimentSettings().taught) == [""]
    with pytest.raises(ConfigError, match="parent_rules 'median'"):
        ExperimentSettings(parent_rules=("median",))
    with pytest.raises(ConfigError, match="known ones are cpu, cpu-small"):
        find_preset("unheard-of")


def test_both_stages_are_adam_at_one_rate() -> None:
    paper = load_experiment(find_preset("paper"))
    torch.manual_seed(0)
    model = build_model(dataclasses.replace(paper.mil.model, in_dim=4))
    optimizer = make_optimizer(model, paper.mil)
    x, offsets = torch.randn(6, 4), torch.tensor([0, 6])
    weight = model.classifier.weight
    wanted = weight.detach().double().numpy().copy()
    first, second = np.zeros_like(wanted), np.zeros_like(wanted)
    for step in range(1, 4):
        optimizer.zero_grad()
        model(x, offsets).logits[0, 0].square().backward()
        assert weight.grad is not None
        g = weight.grad.double().numpy()
        # Kingma and Ba, Adam, 2015, algorithm 1: nothing decays.
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
        optimizer.step()
        wanted -= paper.mil.learning_rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        assert weight.detach().numpy() == pytest.approx(wanted, abs=1e-7)
    assert {learning_rate(paper.mil, at) for at in (0.0, 0.5, 50.0, 99.0)} == {paper.mil.learning_rate}
    assert {_rate(paper.distill, at) for at in (0.0, 0.5, 1.0)} == {paper.distill.lr}
    assert _rate(DistillSettings(warmup=0.0), 1.0) == pytest.approx(0.0)
    with pytest.raises(ConfigError, match="schedule"):
        DistillSettings(schedule="stairs")


def test_runs_from_before_these_settings_are_the_same_runs() -> None:
    now = to_mapping(TrainSettings())
    before = json.loads(json.dumps(now))
    del before["model"]["projection"], before["model"]["pseudo_bags"], before["model"]["stream_average"]
    del before["loss"]["parents"], before["targets"], before["unit"]
    assert deciding(TrainSettings()) == deciding(before) == before
    other = dataclasses.replace(TrainSettings(), loss=LossSettings(parents="max"))
    assert deciding(other) != before
    assert "schedule" not in _stated(DistillSettings())
    assert _stated(DistillSettings(schedule="constant"))["schedule"] == "constant"


def test_a_gradient_is_cut_only_where_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from lrmil.distill import train as module

    called: list[float] = []
    keep: Callable[..., torch.Tensor] = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", lambda p, norm: called.append(norm) or keep(p, norm))
    weight = torch.nn.Linear(1, 1)

    class Run:
        student = weight

        def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
            return weight(pixels)

    monkeypatch.setattr(module, "_loss", lambda output, *rest: output.sum())

    class Batch:
        pixels = torch.ones(1, 1)

    for clip in (0.0, 1.0):
        optimizer = make_optimizer(build_model(ModelSettings("mean", in_dim=1)), TrainSettings())
        module.train_step(Run(), Batch(), [], optimizer, DistillSettings(clip=clip))  # type: ignore[arg-type]
    assert called == [1.0]
    assert math.isfinite(float(weight.weight.detach()))
