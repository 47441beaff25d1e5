"""Projection, attention and pooling in one pass over blocks of tiles, for CPUs.

Written out op by op, attention pooling moves each (T, H) tensor through memory a dozen times, and torch draws a dropout
mask on a CPU more slowly than it multiplies matrices. Here a block of tiles stays in the processor's cache from the
first product to the score, and its gradient likewise. It computes what the plain modules compute; a test holds both
together.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lrmil.model.segments import bag_sum, segment_ids, segment_softmax

__all__ = ["AttentionWeights", "attention_pool", "byte_dropout", "keep_mask"]

# Tiles in a block; at a width of 512 in bfloat16 a block and its neighbours fill the second-level cache.
BLOCK = 1536


class AttentionWeights(NamedTuple):
    """Parameters: projection (H, D) and (H,); attention (A or 2A, H) and (A or 2A,); score (A,) and ()."""

    projection: Tensor
    projection_bias: Tensor
    attention: Tensor
    attention_bias: Tensor
    score: Tensor
    score_bias: Tensor


def keep_mask(shape: tuple[int, ...], keep: float) -> tuple[Tensor, float]:
    """A random mask on the CPU, bool, and the probability that it is true: ``keep`` to the nearest 1/256.

    One random byte an element instead of torch's one 32-bit number: about ten times faster.
    """
    threshold = min(max(round(256 * keep), 1), 256)
    size = 1
    for length in shape:
        size *= length
    words = torch.empty(-(-size // 8), dtype=torch.int64).random_(-(2**63), None)
    mask = words.view(torch.uint8)[:size].view(shape) < threshold if threshold < 256 else torch.ones(shape).bool()
    return mask, threshold / 256


def byte_dropout(values: Tensor, p: float) -> Tensor:
    """Dropout on the CPU with ``keep_mask``: zeroes a part ``p`` and scales the rest to the same mean."""
    mask, keep = keep_mask(tuple(values.shape), 1 - p)
    return values * (mask.to(values.dtype) * (1 / keep))


def attention_pool(
    features: Tensor, offsets: Tensor, weights: AttentionWeights, *, gated: bool, dropout: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention pooling of packed bags on the CPU.

    features: (T, D) of any float type. offsets: (B + 1,) int64. dropout: probability, in the projection and both
    attention branches; 0 when not training. dtype: of the matrix products; sums, softmax and scores are float32, or
    float64 when that is asked for. Returns bag (B, H) and scores (T,) in float32, and projected tiles (T, H) in
    ``dtype``. All three can be differentiated, once.
    """
    out = _AttentionPool.apply(features, offsets, *weights, gated, dropout, dtype)
    return cast(tuple[Tensor, Tensor, Tensor], out)


class _AttentionPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        offsets: Tensor,
        projection: Tensor,
        projection_bias: Tensor,
        attention: Tensor,
        attention_bias: Tensor,
        score: Tensor,
        score_bias: Tensor,
        gated: bool,
        dropout: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        total, hidden, width = len(features), len(projection), len(score)
        wide = torch.promote_types(dtype, torch.float32)
        # Scaling what is kept is left to the weights: a ReLU, and a product with the score vector, let the factor pass.
        keep = round(256 * (1 - dropout)) / 256 if dropout else 1.0
        branches = keep * keep if gated else keep
        w1, b1 = (projection / keep).to(dtype), (projection_bias / keep).to(dtype)
        w2, b2 = attention.to(dtype), attention_bias.to(dtype)
        w3 = (score / branches).to(wide)
        tiles = features.new_empty((total, hidden), dtype=dtype)
        inner = features.new_empty((total, len(attention)), dtype=dtype)
        kept = torch.ones((total, width), dtype=torch.bool) if dropout and not gated else None
        scores = features.new_empty(total, dtype=wide)
        for a in range(0, total, BLOCK):
            b = min(a + BLOCK, total)
            h, both = tiles[a:b], inner[a:b]
            torch.addmm(b1, features[a:b].to(dtype), w1.T, out=h).relu_()
            if dropout:
                _mask_(h, keep_mask((b - a, hidden), keep)[0])
            torch.addmm(b2, h, w2.T, out=both)
            value, gate = both[:, :width].tanh_(), both[:, width:]
            mask = keep_mask((b - a, width), branches)[0] if dropout else None
            if gated:
                gate.sigmoid_()
                if mask is not None:
                    # On the gate, which is never 0 by itself, so that its zeros say what was dropped.
                    gate.mul_(mask)
                mixed = value * gate
            else:
                if mask is not None and kept is not None:
                    kept[a:b] = mask
                    value.mul_(mask)
                mixed = value
            torch.mv(mixed.to(wide), w3, out=scores[a:b])
        scores += score_bias
        attended = segment_softmax(scores, offsets)
        bag = bag_sum(attended[:, None], tiles, offsets)[:, 0]
        ctx.save_for_backward(features, offsets, projection, attention, score, tiles, inner, kept, attended, bag)
        ctx.gated, ctx.keep, ctx.branches, ctx.dtype = gated, keep, branches, dtype
        ctx.set_materialize_grads(False)
        return bag, scores, tiles

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, to_bag: Tensor | None, to_scores: Tensor | None, to_tiles: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        features, offsets, projection, attention, score, tiles, inner, kept, attended, bag = ctx.saved_tensors
        dtype, total, width = ctx.dtype, len(tiles), len(score)
        wide = torch.promote_types(dtype, torch.float32)
        w1, w2 = (projection / ctx.keep).to(dtype), attention.to(dtype)
        w3 = (score / ctx.branches).to(dtype)
        to_bag = torch.zeros_like(bag) if to_bag is None else to_bag.to(wide)
        # d(softmax): each score gets a_i (g . h_i - g . z), where g is the gradient of the bag and z the bag.
        centre = (to_bag * bag).sum(1)
        segment = segment_ids(offsets, total)
        rounded = to_bag.to(dtype)
        grads = [torch.zeros_like(p, dtype=wide) for p in (projection, projection[:, 0], attention, attention[:, 0])]
        to_w1, to_b1, to_w2, to_b2 = grads
        to_w3, to_b3 = torch.zeros_like(score, dtype=wide), attended.new_zeros(())
        to_features = torch.empty_like(features) if ctx.needs_input_grad[0] else None
        for a in range(0, total, BLOCK):
            b = min(a + BLOCK, total)
            h, value, gate = tiles[a:b], inner[a:b, :width], inner[a:b, width:]
            spread = rounded[segment[a:b]]
            products = (h * spread).sum(1, dtype=wide)
            s = attended[a:b] * (products - centre[segment[a:b]])
            if to_scores is not None:
                s += to_scores[a:b]
            to_b3 += s.sum()
            to_mixed = s.to(dtype)[:, None] * w3
            inner_grad = torch.empty_like(inner[a:b])
            if ctx.gated:
                to_w3 += (value * gate).to(wide).T @ s
                # The saved gate is 0 where it was dropped, and so are both gradients.
                inner_grad[:, :width] = torch.ops.aten.tanh_backward(to_mixed * gate, value)
                inner_grad[:, width:] = torch.ops.aten.sigmoid_backward(to_mixed * value, gate)
            else:
                to_w3 += value.to(wide).T @ s
                torch.mul(to_mixed, 1 - value * value, out=inner_grad)
                if kept is not None:
                    inner_grad.mul_(kept[a:b])
            to_h = spread.mul_(attended[a:b, None].to(dtype)).addmm_(inner_grad, w2)
            if to_tiles is not None:
                to_h += to_tiles[a:b]
            # Zero where the ReLU was 0 or the mask dropped it: in both cases the saved tile is 0.
            to_h = torch.ops.aten.threshold_backward(to_h, h, 0)
            x = features[a:b].to(dtype)
            _add_product(to_w1, to_h.T, x)
            to_b1 += to_h.sum(0, dtype=wide)
            _add_product(to_w2, inner_grad.T, h)
            to_b2 += inner_grad.sum(0, dtype=wide)
            if to_features is not None:
                to_features[a:b] = to_h @ w1
        return (
            to_features,
            None,
            to_w1.div_(ctx.keep).to(projection.dtype),
            to_b1.div_(ctx.keep).to(projection.dtype),
            to_w2.to(attention.dtype),
            to_b2.to(attention.dtype),
            to_w3.div_(ctx.branches).to(score.dtype),
            to_b3.to(score.dtype),
            None,
            None,
            None,
        )


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``; a block of 16-bit factors is rounded as one product is, the sum over blocks is wide."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _mask_(values: Tensor, mask: Tensor) -> None:
    """Zero what the mask drops, in place. As integers, since 16-bit floats times bool is ten times slower."""
    if values.dtype == torch.bfloat16:
        values.view(torch.int16).mul_(mask)
    else:
        values.mul_(mask)
