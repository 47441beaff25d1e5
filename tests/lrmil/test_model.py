"""Models over packed bags: exactness of packing, symmetries, and the fast path against the plain one."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrmil.config import ATTENTION_MODELS, MODELS, ModelSettings
from lrmil.errors import ModelMismatchError
from lrmil.model import MILModel, MILOutput, build_model, fused
from lrmil.model.attention import ABMIL
from lrmil.model.segments import (
    bag_dot,
    bag_sum,
    segment_argmax,
    segment_ids,
    segment_log_softmax,
    segment_logsumexp,
    segment_max,
    segment_mean,
    segment_rank,
    segment_softmax,
    segment_sum,
    select_extremes,
)
from lrmil.model.transmil import _landmarks, _nystroem, _pinv

LENGTHS = [5, 1, 300, 60, 2]
SMALL = ModelSettings(
    in_dim=24, classes=3, hidden=16, attention_dim=8, heads=4, landmarks=64, cluster_k=4, pooling="mean+spread"
)


def packed(
    lengths: list[int], dim: int = 24, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return torch.randn(int(offsets[-1]), dim, generator=generator, dtype=dtype), offsets


def model_of(name: str, seed: int = 1, **changes: object) -> MILModel:
    torch.manual_seed(seed)
    return build_model(replace(SMALL, name=name, **changes))


def objective(output: MILOutput) -> Tensor:
    total = output.logits.square().sum()
    if output.attention_logits is not None:
        total = total + output.attention_logits.sin().sum()
    return total


def gradients(model: MILModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_packed_and_one_by_one_give_the_same_logits_and_gradients(name: str) -> None:
    model = model_of(name).eval()
    features, offsets = packed(LENGTHS)
    together = model(features, offsets)
    objective(together).backward()
    from_packed = gradients(model)
    model.zero_grad()
    alone = []
    for a, b in itertools.pairwise(offsets):
        output = model(features[a:b], torch.tensor([0, int(b - a)]))
        objective(output).backward()
        alone.append(output)
    torch.testing.assert_close(together.logits, torch.cat([o.logits for o in alone]), rtol=0, atol=1e-5)
    if together.attention_logits is not None:
        parts = [o.attention_logits for o in alone if o.attention_logits is not None]
        torch.testing.assert_close(together.attention_logits, torch.cat(parts), rtol=0, atol=1e-5)
    assert from_packed.keys() == gradients(model).keys()
    for parameter, gradient in gradients(model).items():
        scale = float(gradient.abs().max()) or 1.0
        torch.testing.assert_close(from_packed[parameter], gradient, rtol=0, atol=1e-5 * max(scale, 1), msg=parameter)


@pytest.mark.parametrize("name", MODELS)
def test_shapes_and_who_has_attention(name: str) -> None:
    model = model_of(name)
    features, offsets = packed(LENGTHS)
    output = model(features, offsets)
    assert output.logits.shape == (5, 3)
    assert output.logits.dtype == torch.float32
    assert output.instances.shape == (368, 24 if name == "linear" else 16)
    assert len(output.bag) == 5
    if name in ATTENTION_MODELS:
        assert output.attention_logits is not None
        assert output.attention_logits.shape == (368,)
    else:
        assert output.attention_logits is None


@pytest.mark.parametrize(
    "name", ["linear", "mean", "max", "abmil", "gated-abmil", "clam-sb", "clam-mb", "dsmil", "dtfd"]
)
def test_the_order_of_the_tiles_does_not_matter(name: str) -> None:
    model = model_of(name).eval()
    features, offsets = packed([50])
    order = torch.randperm(50, generator=torch.Generator().manual_seed(3))
    plain, shuffled = model(features, offsets), model(features[order], offsets)
    torch.testing.assert_close(plain.logits, shuffled.logits, rtol=0, atol=1e-5)
    if plain.attention_logits is not None:
        torch.testing.assert_close(plain.attention_logits[order], shuffled.attention_logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["mean", "max", "abmil", "gated-abmil", "clam-sb", "clam-mb", "dsmil"])
def test_every_tile_twice_halves_the_attention_and_leaves_the_logits(name: str) -> None:
    model = model_of(name).eval()
    features, offsets = packed([40])
    once = model(features, offsets)
    twice = model(torch.cat([features, features]), 2 * offsets)
    torch.testing.assert_close(once.logits, twice.logits, rtol=0, atol=1e-5)
    if once.attention_logits is not None and twice.attention_logits is not None:
        attention = segment_softmax(twice.attention_logits, 2 * offsets)
        torch.testing.assert_close(attention[:40], segment_softmax(once.attention_logits, offsets) / 2)
        torch.testing.assert_close(attention[:40], attention[40:])


def test_one_tile_twice_counts_twice_in_a_mean_but_once_in_a_max() -> None:
    features, offsets = packed([3])
    doubled = torch.cat([features, features[:1]])
    longer = torch.tensor([0, 4])
    mean, largest = model_of("mean").eval(), model_of("max").eval()
    torch.testing.assert_close(largest(features, offsets).logits, largest(doubled, longer).logits)
    tiles = mean.project(features)
    by_hand = mean.classifier((2 * tiles[0] + tiles[1] + tiles[2])[None] / 4)
    torch.testing.assert_close(mean(doubled, longer).logits, by_hand)


@pytest.mark.parametrize("name", ["abmil", "gated-abmil", "clam-sb"])
def test_abmil_is_the_published_formula(name: str) -> None:
    model = model_of(name).eval()
    assert isinstance(model, ABMIL)
    features, offsets = packed([17])
    h = torch.relu(features @ model.projection.weight.T + model.projection.bias)
    inner = h @ model.attention.weight.T + model.attention.bias
    mixed = torch.tanh(inner[:, :8]) * torch.sigmoid(inner[:, 8:]) if name != "abmil" else torch.tanh(inner)
    scores = mixed @ model.attention_score.weight[0] + model.attention_score.bias
    bag = torch.softmax(scores, 0) @ h
    output = model(features, offsets)
    torch.testing.assert_close(output.attention_logits, scores)
    torch.testing.assert_close(output.bag[0], bag)
    torch.testing.assert_close(output.logits[0], model.classifier(bag))


def test_dsmil_is_the_published_formula() -> None:
    model = model_of("dsmil").eval()
    features, offsets = packed([17])
    h = model.project(features)
    scores, queries = model.instance_classifier(h), model.query(h)
    attention = torch.softmax(queries @ queries[scores.argmax(0)].T / 8**0.5, 0)
    output = model(features, offsets)
    torch.testing.assert_close(output.logits[0], model.classifier((attention.T @ h).flatten()))
    torch.testing.assert_close(output.second_logits, scores.amax(0)[None])
    assert output.attention_logits is not None
    torch.testing.assert_close(output.attention_logits.exp(), attention.mean(1))


@pytest.mark.parametrize("count", [1, 2, 3, 10, 70, 400])
def test_transmil_attention_sums_to_the_share_of_the_tiles(count: int) -> None:
    model = model_of("transmil").eval()
    features, offsets = packed([count])
    output = model(features, offsets)
    assert output.attention_logits is not None
    attention = output.attention_logits.detach().exp()
    # The rest is the class token's attention to itself.
    assert 0 < float(attention.sum()) < 1
    assert output.logits.isfinite().all()


def test_nystroem_is_exact_where_every_token_is_a_landmark() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 4, 20, 8)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(_nystroem(q, k, v, 20), exact, rtol=0, atol=5e-2)


def test_nystroem_approximates_attention_over_smooth_tokens() -> None:
    torch.manual_seed(0)
    base = torch.randn(3, 2, 16, 8)
    q, k, v = base.repeat_interleave(16, dim=2)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(_nystroem(q, k, v, 16), exact, rtol=0, atol=5e-2)


def test_landmarks_are_means_of_runs_and_the_inverse_inverts() -> None:
    values = torch.arange(7.0).reshape(1, 7, 1)
    torch.testing.assert_close(_landmarks(values, 3), torch.tensor([[[1.0], [3.5], [5.5]]]))
    matrix = (torch.randn(2, 12, 12, generator=torch.Generator().manual_seed(0)) + 4 * torch.eye(12)).softmax(2)
    torch.testing.assert_close(matrix @ _pinv(matrix), torch.eye(12).expand(2, 12, 12), rtol=0, atol=1e-2)


@pytest.mark.parametrize("name", MODELS)
def test_all_parameters_of_the_bag_branch_get_gradient(name: str) -> None:
    architecture = name
    model = model_of(name).eval()
    features, offsets = packed(LENGTHS)
    output = model(features, offsets)
    loss = output.logits.square().sum()
    second = model.second_loss(output, offsets, torch.tensor([0, 1, 2, 0, 1]), torch.ones(5))
    if second is not None:
        loss = loss + second
    loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # The softmax does not see a constant added to all scores.
    unused = set() if architecture == "linear" else {"instance_head.weight", "instance_head.bias"}
    assert without - {"attention_score.bias"} == unused


def test_clams_second_loss_by_hand() -> None:
    model = model_of("clam-sb", cluster_k=2).eval()
    features, offsets = packed([7, 3, 1])
    labels, weights = torch.tensor([2, 0, 1]), torch.tensor([0.5, 2.0, 1.0])
    output = model(features, offsets)
    loss = model.second_loss(output, offsets, labels, weights)
    expected = torch.zeros(())
    for b, k in ((0, 2), (1, 1)):  # the third bag has one tile: nothing to tell apart
        rows = slice(int(offsets[b]), int(offsets[b + 1]))
        assert output.attention_logits is not None
        order = output.attention_logits[rows].argsort()
        chosen = output.instances[rows][torch.cat([order[-k:], order[:k]])]
        logits = model.clusters(chosen).reshape(-1, 3, 2)[:, labels[b]]
        truth = torch.tensor([1] * k + [0] * k)
        expected = expected + weights[b] * torch.nn.functional.cross_entropy(logits, truth)
    torch.testing.assert_close(loss, expected / 3)


def test_features_of_another_width_are_refused() -> None:
    features, offsets = packed([4], dim=23)
    with pytest.raises(ModelMismatchError, match=r"23.*24"):
        model_of("abmil")(features, offsets)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_of_any_float_type_are_taken(name: str, dtype: torch.dtype) -> None:
    model = model_of(name).eval()
    features, offsets = packed([40, 3])
    stored = features.to(dtype)
    torch.testing.assert_close(model(stored, offsets).logits, model(stored.float(), offsets).logits)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_near_float32(name: str) -> None:
    model = model_of(name).eval()
    features, offsets = packed(LENGTHS)
    exact = model(features, offsets)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(features, offsets)
    assert rounded.logits.dtype == torch.float32
    torch.testing.assert_close(exact.logits, rounded.logits, rtol=0, atol=3e-2)
    rounded.logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# The fast path on a CPU


@pytest.mark.parametrize("name", ["abmil", "gated-abmil"])
@pytest.mark.parametrize("block", [7, 100, 1536])
def test_fused_pooling_equals_the_plain_modules(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "BLOCK", block)
    model = model_of(name).eval().double()
    features, offsets = packed(LENGTHS, dtype=torch.float64)
    features.requires_grad_()
    found = []
    for embed in (model.embed, super(ABMIL, model).embed):
        model.zero_grad()
        features.grad = None
        instances, pooled = embed(features, offsets)
        assert pooled.attention_logits is not None
        loss = pooled.bag.square().sum() + pooled.attention_logits.sin().sum() + instances.pow(3).mean()
        loss.backward()
        assert features.grad is not None
        found.append({"loss": loss.detach(), "features": features.grad.clone(), **gradients(model)})
    assert found[0].keys() == found[1].keys()
    for key in found[0]:
        torch.testing.assert_close(found[0][key], found[1][key], rtol=1e-9, atol=1e-10, msg=key)


@pytest.mark.parametrize("gated", [True, False])
def test_fused_dropout_has_the_gradient_of_its_masks(gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "BLOCK", 16)
    drawn: list[tuple[Tensor, float]] = []
    original = fused.keep_mask

    def recording(shape: tuple[int, ...], keep: float) -> tuple[Tensor, float]:
        drawn.append(original(shape, keep))
        return drawn[-1]

    monkeypatch.setattr(fused, "keep_mask", recording)
    torch.manual_seed(0)
    features, offsets = packed([30, 9], dtype=torch.float64)
    shapes = [(16, 24), (16,), (16 if gated else 8, 16), (16 if gated else 8,), (8,), ()]
    parameters = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    bag, scores, tiles = fused.attention_pool(
        features, offsets, fused.AttentionWeights(*parameters), gated=gated, dropout=0.25, dtype=torch.float64
    )
    (bag.square().sum() + scores.sin().sum() + tiles.mean()).backward()
    given = [p.grad.clone() for p in parameters if p.grad is not None]
    keep_tiles, keep_branches = drawn[0][1], drawn[1][1]
    assert keep_tiles == 0.75
    assert keep_branches == (0.5625 if gated else 0.75)
    on_tiles = torch.cat([mask for mask, _ in drawn[0::2]])
    on_branches = torch.cat([mask for mask, _ in drawn[1::2]])
    w1, b1, w2, b2, w3, b3 = parameters
    h = torch.relu(features @ w1.T + b1) * on_tiles / keep_tiles
    inner = h @ w2.T + b2
    mixed = torch.tanh(inner[:, :8]) * torch.sigmoid(inner[:, 8:]) if gated else torch.tanh(inner)
    plain_scores = (mixed * on_branches / keep_branches) @ w3 + b3
    plain_bag = torch.stack([torch.softmax(plain_scores[a:b], 0) @ h[a:b] for a, b in itertools.pairwise(offsets)])
    torch.testing.assert_close(bag, plain_bag)
    torch.testing.assert_close(scores, plain_scores)
    for p in parameters:
        p.grad = None
    (plain_bag.square().sum() + plain_scores.sin().sum() + h.mean()).backward()
    for mine, p in zip(given, parameters, strict=True):
        torch.testing.assert_close(mine, p.grad)


@pytest.mark.parametrize("keep", [0.75, 0.5, 0.1])
def test_byte_masks_keep_their_share_independently(keep: float) -> None:
    torch.manual_seed(0)
    mask, exact = fused.keep_mask((1001, 203), keep)
    assert abs(exact - keep) <= 1 / 512
    n = mask.numel()
    spread = (exact * (1 - exact) / n) ** 0.5
    assert abs(float(mask.float().mean()) - exact) < 4 * spread
    for lag in (1, 7, 8):  # neighbours come from the same random word
        flat = mask.flatten().float() - exact
        assert abs(float((flat[:-lag] * flat[lag:]).mean())) < 4 * exact * (1 - exact) / n**0.5
    values = torch.ones(1001, 203)
    dropped = fused.byte_dropout(values, 1 - keep)
    torch.testing.assert_close(dropped.unique(), torch.tensor([0.0, 1 / exact]))


def test_dropout_is_off_in_evaluation_and_seeded_in_training() -> None:
    features, offsets = packed([50])
    model = model_of("gated-abmil")
    model.eval()
    assert torch.equal(model(features, offsets).logits, model(features, offsets).logits)
    model.train()
    torch.manual_seed(5)
    first, second = model(features, offsets).logits, model(features, offsets).logits
    torch.manual_seed(5)
    assert torch.equal(first, model(features, offsets).logits)
    assert not torch.equal(first, second)


# Operations on packed bags, against a loop over the bags

lengths_of_bags = st.lists(st.integers(0, 90), min_size=1, max_size=6)


@settings(max_examples=30, deadline=None)
@given(lengths_of_bags, st.integers(0, 1000))
def test_segment_operations_against_a_loop(lengths: list[int], seed: int) -> None:
    values, offsets = packed(lengths, 3, seed, torch.float64)
    bags = [values[a:b] for a, b in itertools.pairwise(offsets)]
    assert segment_ids(offsets, len(values)).tolist() == [b for b, n in enumerate(lengths) for _ in range(n)]
    torch.testing.assert_close(segment_sum(values, offsets), torch.stack([bag.sum(0) for bag in bags]))
    for b, bag in enumerate(bags):
        if not len(bag):
            assert segment_max(values, offsets)[b].isneginf().all()
            assert segment_logsumexp(values, offsets)[b].isneginf().all()
            continue
        rows = slice(int(offsets[b]), int(offsets[b + 1]))
        torch.testing.assert_close(segment_mean(values, offsets)[b], bag.mean(0))
        torch.testing.assert_close(segment_max(values, offsets)[b], bag.amax(0))
        torch.testing.assert_close(segment_logsumexp(values, offsets)[b], bag.logsumexp(0))
        torch.testing.assert_close(segment_softmax(values, offsets)[rows], bag.softmax(0))
        torch.testing.assert_close(segment_argmax(values, offsets)[b] - offsets[b], bag.argmax(0))
        rank = segment_rank(values[:, 0], offsets)[rows]
        assert torch.equal(rank.argsort(), bag[:, 0].argsort(descending=True, stable=True))


@settings(max_examples=30, deadline=None)
@given(lengths_of_bags, st.integers(1, 3), st.integers(0, 1000))
def test_bag_products_against_a_loop_with_gradients(lengths: list[int], k: int, seed: int) -> None:
    values, offsets = packed(lengths, 4, seed, torch.float64)
    generator = torch.Generator().manual_seed(seed + 1)
    weights = torch.randn(len(values), k, generator=generator, dtype=torch.float64).requires_grad_()
    queries = torch.randn(len(lengths), k, 4, generator=generator, dtype=torch.float64).requires_grad_()
    values.requires_grad_()
    inputs = (weights, values, queries)
    sums, dots = bag_sum(weights, values, offsets), bag_dot(values, queries, offsets)
    pairs = list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
    by_hand = torch.stack([weights[a:b].T @ values[a:b] for a, b in pairs])
    dots_by_hand = torch.cat([values[a:b] @ queries[i].T for i, (a, b) in enumerate(pairs)])
    torch.testing.assert_close(sums, by_hand)
    torch.testing.assert_close(dots, dots_by_hand)
    mine = torch.autograd.grad(sums.sin().sum() + dots.sin().sum(), inputs)
    other = torch.autograd.grad(by_hand.sin().sum() + dots_by_hand.sin().sum(), inputs)
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b)


def test_minus_infinity_counts_as_absent_without_nan() -> None:
    logits = torch.tensor([0.0, -torch.inf, 1.0, -torch.inf, -torch.inf]).requires_grad_()
    offsets = torch.tensor([0, 3, 5])
    soft = segment_softmax(logits, offsets)
    torch.testing.assert_close(soft[:3], torch.softmax(torch.tensor([0.0, -torch.inf, 1.0]), 0))
    assert soft[3:].tolist() == [0, 0]
    log = segment_log_softmax(logits, offsets)
    log[[0, 2]].sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_huge_logits_do_not_overflow() -> None:
    logits, offsets = torch.tensor([1e4, 1e4 - 1, -1e4]), torch.tensor([0, 3])
    torch.testing.assert_close(segment_softmax(logits, offsets), torch.softmax(logits, 0))


@pytest.mark.parametrize(("count", "k", "each"), [(0, 3, 0), (1, 3, 0), (2, 3, 1), (5, 3, 2), (6, 3, 3), (50, 3, 3)])
def test_extremes_are_at_most_half_of_the_tiles(count: int, k: int, each: int) -> None:
    scores, keep = torch.randn(50, generator=torch.Generator().manual_seed(count)), torch.zeros(50, dtype=torch.bool)
    keep[torch.randperm(50)[:count]] = True
    rows, highest = select_extremes(scores, torch.tensor([0, 50]), k, keep)
    kept = keep.nonzero()[:, 0]
    order = kept[scores[kept].argsort(descending=True)]
    assert set(rows[highest].tolist()) == set(order[:each].tolist())
    assert set(rows[~highest].tolist()) == set(order[count - each :].tolist())
    assert len(rows) == 2 * each
