"""CLAM-MB, DTFD-MIL and DSMIL's average of two streams, each against a forward pass written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lrmil.config import ModelSettings
from lrmil.model import MILModel, build_model
from wsi_pipe.errors import ConfigError

Array = NDArray[np.float64]
SIZES = {"in_dim": 5, "classes": 3, "hidden": 4, "attention_dim": 2, "dropout": 0.0, "cluster_k": 2}


def model_of(name: str, **changes: object) -> MILModel:
    torch.manual_seed(3)
    model = build_model(ModelSettings(name, **(SIZES | changes)))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model.eval()


def weights_of(model: MILModel) -> dict[str, Array]:
    return {name: value.detach().double().numpy() for name, value in model.state_dict().items()}


def softmax(values: Array, axis: int = 0) -> Array:
    e = np.exp(values - values.max(axis=axis, keepdims=True))
    return np.asarray(e / e.sum(axis=axis, keepdims=True))


def projected(w: dict[str, Array], x: Array) -> Array:
    return np.maximum(x @ w["projection.weight"].T + w["projection.bias"], 0)


def gated(h: Array, weight: Array, bias: Array, score: Array) -> Array:
    inner = h @ weight.T + bias
    half = inner.shape[1] // 2
    return np.asarray((np.tanh(inner[:, :half]) / (1 + np.exp(-inner[:, half:]))) @ score.T)


@pytest.fixture
def bags() -> tuple[torch.Tensor, torch.Tensor, list[Array]]:
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(n, 5)) for n in (7, 3, 1)]
    return torch.from_numpy(np.concatenate(parts)).float(), torch.tensor([0, 7, 10, 11]), parts


def test_clam_mb(bags: tuple[torch.Tensor, torch.Tensor, list[Array]]) -> None:
    model = model_of("clam-mb")
    w, (x, offsets, parts) = weights_of(model), bags
    output = model(x, offsets)
    labels, bag_weights = torch.tensor([2, 0, 1]), torch.tensor([0.5, 2.0, 1.0])
    clusters = 0.0
    for b, part in enumerate(parts):
        h = projected(w, part)
        scores = gated(h, w["attention.weight"], w["attention.bias"], w["attention_score.weight"])
        scores = scores + w["attention_score.bias"]
        a = softmax(scores)
        # Class-specific: each class has its own attention, its own bag vector and its own row of weights.
        logits = [w["classifier.weight"][c] @ (a[:, c] @ h) + w["classifier.bias"][c] for c in range(3)]
        assert output.logits[b].tolist() == pytest.approx(logits, abs=1e-5)
        assert output.attention_logits is not None
        tiles = output.attention_logits[int(offsets[b]) : int(offsets[b + 1])].exp()
        assert tiles.tolist() == pytest.approx(a.mean(axis=1).tolist(), abs=1e-5)
        k = min(2, len(part) // 2)
        for c in range(3) if k else ():
            order = np.argsort(scores[:, c])
            own = int(labels[b]) == c
            rows = [*order[-k:], *(order[:k] if own else [])]
            truth = [1 if own else 0] * k + ([0] * k if own else [])
            told = h[rows] @ w["clusters.weight"].T + w["clusters.bias"]
            p = softmax(told.reshape(-1, 3, 2)[:, c], axis=1)
            clusters += float(bag_weights[b]) * np.mean([-np.log(p[i, t]) for i, t in enumerate(truth)]) / 3 / 3
    loss = model.second_loss(output, offsets, labels, bag_weights)
    assert loss is not None
    assert float(loss.detach()) == pytest.approx(clusters, abs=1e-5)


def test_dtfd(bags: tuple[torch.Tensor, torch.Tensor, list[Array]]) -> None:
    model = model_of("dtfd", pseudo_bags=3)
    w, (x, offsets, parts) = weights_of(model), bags
    output = model(x, offsets)
    labels, bag_weights = torch.tensor([2, 0, 1]), torch.tensor([0.5, 2.0, 1.0])
    first_tier = []
    for b, part in enumerate(parts):
        h = projected(w, part)
        scores = gated(h, w["first.both.weight"], w["first.both.bias"], w["first.score.weight"])[:, 0]
        rank = np.argsort(np.argsort(-scores))
        groups = [np.flatnonzero(rank % 3 == g) for g in range(min(3, len(part)))]
        within = [softmax(scores[rows]) for rows in groups]
        features = np.stack([a @ h[rows] for a, rows in zip(within, groups, strict=True)])
        above = gated(features, w["second.both.weight"], w["second.both.bias"], w["second.score.weight"])
        between = softmax(above[:, 0])
        logits = w["classifier.weight"] @ (between @ features) + w["classifier.bias"]
        assert output.logits[b].tolist() == pytest.approx(logits.tolist(), abs=1e-5)
        attention = np.zeros(len(part))
        for rows, a, share in zip(groups, within, between, strict=True):
            attention[rows] = a * share
        assert output.attention_logits is not None
        tiles = output.attention_logits[int(offsets[b]) : int(offsets[b + 1])].exp()
        assert tiles.tolist() == pytest.approx(attention.tolist(), abs=1e-5)
        assert float(tiles.sum().detach()) == pytest.approx(1, abs=1e-5)
        told = softmax(features @ w["first_classifier.weight"].T + w["first_classifier.bias"], axis=1)
        first_tier.append(float(bag_weights[b]) * float(np.mean(-np.log(told[:, int(labels[b])]))))
    loss = model.second_loss(output, offsets, labels, bag_weights)
    assert loss is not None
    assert float(loss.detach()) == pytest.approx(np.mean(first_tier), abs=1e-5)


def test_pseudo_bags_are_dealt_at_random_in_training_and_not_otherwise(
    bags: tuple[torch.Tensor, torch.Tensor, list[Array]],
) -> None:
    model, (x, offsets, _) = model_of("dtfd", pseudo_bags=2), bags
    assert torch.equal(model(x, offsets).logits, model(x, offsets).logits)
    model.train()
    torch.manual_seed(0)
    draws = {tuple(model(x, offsets).logits[0].tolist()) for _ in range(8)}
    assert len(draws) > 1
    # A bag of one tile has but one way.
    assert len({tuple(model(x, offsets).logits[2].tolist()) for _ in range(4)}) == 1


def test_dsmils_average_of_its_streams(bags: tuple[torch.Tensor, torch.Tensor, list[Array]]) -> None:
    model, (x, offsets, parts) = model_of("dsmil", stream_average=True), bags
    w, output = weights_of(model), model(x, offsets)
    for b, part in enumerate(parts):
        h = projected(w, part)
        scores = h @ w["instance_classifier.weight"].T + w["instance_classifier.bias"]
        q = np.tanh(
            np.maximum(h @ w["query.0.weight"].T + w["query.0.bias"], 0) @ w["query.2.weight"].T + w["query.2.bias"]
        )
        a = softmax(q @ q[scores.argmax(axis=0)].T / np.sqrt(2))
        bag = w["classifier.weight"] @ (a.T @ h).ravel() + w["classifier.bias"]
        wanted = (softmax(bag) + softmax(scores.max(axis=0))) / 2
        assert output.logits[b].softmax(0).tolist() == pytest.approx(wanted.tolist(), abs=1e-5)
    # In training each stream has a loss of its own, as without the average.
    plain = model_of("dsmil").train()
    assert torch.equal(model.train()(x, offsets).logits, plain(x, offsets).logits)
    with pytest.raises(ConfigError, match="no two streams"):
        ModelSettings("abmil", stream_average=True)
    # An empty bag has no largest tile.
    assert model.eval()(x[:7], torch.tensor([0, 7, 7])).logits.isfinite().all()
