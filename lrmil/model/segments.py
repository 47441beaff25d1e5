"""Operations on bags that lie one after the other in one tensor.

T tiles of B bags are packed along the first axis; ``offsets`` (B + 1,) int64 gives where each bag begins, so bag b is
``values[offsets[b]:offsets[b + 1]]``. Nothing is padded, so nothing needs a mask and one bag cannot touch another.
"""

from __future__ import annotations

import itertools
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "bag_dot",
    "bag_sum",
    "segment_argmax",
    "segment_ids",
    "segment_log_softmax",
    "segment_logsumexp",
    "segment_max",
    "segment_mean",
    "segment_rank",
    "segment_softmax",
    "segment_sum",
    "select_extremes",
]

# Below this mean number of tiles in a bag, one gather over all bags is faster on a CPU than one small product per bag.
_LOOP_FROM = 48
# Tiles that are widened to float32 at a time, so that the copy stays in the processor's cache.
_WIDEN = 2048


def segment_ids(offsets: Tensor, total: int) -> Tensor:
    """The bag of each tile: (T,) int64 from ``offsets`` (B + 1,), where ``total`` is T (known without asking a GPU)."""
    bags = torch.arange(len(offsets) - 1, device=offsets.device)
    return torch.repeat_interleave(bags, offsets.diff(), output_size=total)


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """Sum over each bag: (T,) or (T, K) -> (B,) or (B, K); an empty bag gives 0."""
    return torch.segment_reduce(values, "sum", offsets=offsets, axis=0, initial=0.0)


def segment_mean(values: Tensor, offsets: Tensor) -> Tensor:
    """Mean over each bag: (T, H) -> (B, H) float32 (float64 of float64); an empty bag gives 0."""
    weights = (1.0 / offsets.diff().clamp_min(1)).to(_wide(values))[segment_ids(offsets, len(values))]
    return bag_sum(weights[:, None], values, offsets)[:, 0]


def segment_max(values: Tensor, offsets: Tensor) -> Tensor:
    """Largest of each bag: (T, ...) -> (B, ...); an empty bag gives -inf."""
    return torch.segment_reduce(values, "max", offsets=offsets, axis=0, initial=-torch.inf)


def segment_argmax(values: Tensor, offsets: Tensor) -> Tensor:
    """Row of the first largest value of each bag and column: (T, K) -> (B, K) int64 rows among the T; 0 if empty."""
    values = values.detach()
    bag = segment_ids(offsets, len(values))
    rows = torch.arange(len(values), device=values.device)[:, None].expand_as(values)
    is_largest = values == segment_max(values, offsets)[bag]
    none = torch.full((len(offsets) - 1, values.shape[1]), len(values), dtype=torch.int64, device=values.device)
    first = none.scatter_reduce(0, bag[:, None].expand_as(rows), rows.where(is_largest, len(values)), "amin")
    return first.where(first < len(values), 0)


def segment_logsumexp(logits: Tensor, offsets: Tensor) -> Tensor:
    """log sum exp over each bag in float32 (float64 of float64): (T,) or (T, K) -> (B,) or (B, K); -inf if empty.

    Values of -inf count as absent; a bag of only such values gives -inf without NaN in the gradient.
    """
    _, largest, log_total = _shifted(logits, offsets)
    return largest + log_total


def segment_log_softmax(logits: Tensor, offsets: Tensor) -> Tensor:
    """log softmax within each bag, in float32 (float64 of float64): (T,) or (T, K) -> the same shape."""
    shifted, _, log_total = _shifted(logits, offsets)
    # A bag of only -inf would give -inf + inf; its tiles stay at -inf.
    log_total = log_total.where(log_total.isfinite(), 0.0)
    return shifted - log_total[segment_ids(offsets, len(logits))]


def segment_softmax(logits: Tensor, offsets: Tensor) -> Tensor:
    """Softmax within each bag, in float32 (float64 of float64): (T,) or (T, K) -> the same shape."""
    return segment_log_softmax(logits, offsets).exp()


def segment_rank(values: Tensor, offsets: Tensor) -> Tensor:
    """Rank of each tile in its bag, 0 for the largest, ties in order: (T,) -> (T,) int64. No gradient."""
    bag = segment_ids(offsets, len(values))
    by_value = torch.argsort(values.detach(), descending=True, stable=True)
    order = by_value[torch.argsort(bag[by_value], stable=True)]
    rank = torch.empty_like(bag)
    rank[order] = torch.arange(len(values), device=values.device) - offsets[:-1][bag[order]]
    return rank


def select_extremes(scores: Tensor, offsets: Tensor, k: int, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k tiles of highest and the k of lowest score of each bag, k being at most half of the tiles that are kept.

    scores: (T,); keep: (T,) bool, the tiles to choose from (all by default). Returns rows (M,) int64 in ascending order
    and (M,) bool, true for the highest. A bag with fewer than two such tiles gives none, so no tile is ever both.
    """
    keep = torch.ones_like(scores, dtype=torch.bool) if keep is None else keep
    bag = segment_ids(offsets, len(scores))
    kept = segment_sum(keep.to(torch.float32), offsets).to(torch.int64)[bag]
    take = torch.clamp(kept // 2, max=k)
    # Tiles that are not kept rank behind all others.
    rank = segment_rank(scores.detach().to(torch.float64).where(keep, -torch.inf), offsets)
    highest = keep & (rank < take)
    lowest = keep & (rank >= kept - take) & (rank < kept)
    rows = torch.nonzero(highest | lowest)[:, 0]
    return rows, highest[rows]


def bag_sum(weights: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
    """Weighted sums over each bag: weights (T, K), values (T, H) -> (B, K, H), ``out[b] = weights_b.T @ values_b``.

    Sums are taken in float32 (float64 of float64), whatever the type of ``values``.
    """
    return cast(Tensor, _BagSum.apply(weights, values, offsets))


def bag_dot(values: Tensor, queries: Tensor, offsets: Tensor) -> Tensor:
    """Products of each tile with its bag's queries: values (T, H), queries (B, K, H) -> (T, K), float32 or float64."""
    return cast(Tensor, _BagDot.apply(values, queries, offsets))


class _BagSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(weights, values, offsets)
        return _sum(weights, values, offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weights, values, offsets = ctx.saved_tensors
        to_weights = _dot(values, grad, offsets).to(weights.dtype) if ctx.needs_input_grad[0] else None
        to_values = _spread(weights, grad, offsets, values.dtype) if ctx.needs_input_grad[1] else None
        return to_weights, to_values, None


class _BagDot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, queries: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(values, queries, offsets)
        return _dot(values, queries, offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        values, queries, offsets = ctx.saved_tensors
        to_values = _spread(grad, queries, offsets, values.dtype) if ctx.needs_input_grad[0] else None
        to_queries = _sum(grad, values, offsets).to(queries.dtype) if ctx.needs_input_grad[1] else None
        return to_values, to_queries, None


def _wide(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _shifted(logits: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits less the largest of their bag, (T, ...); that largest and the log of the sum of exp of these, (B, ...).

    Kept apart, since a large logit plus a small logarithm would lose the latter's digits.
    """
    logits = logits.to(_wide(logits))
    largest = segment_max(logits.detach(), offsets)
    largest = largest.where(largest.isfinite(), 0.0)
    shifted = logits - largest[segment_ids(offsets, len(logits))]
    total = segment_sum(shifted.exp(), offsets)
    present = total > 0
    return shifted, largest, total.where(present, 1.0).log().where(present, -torch.inf)


def _pieces(offsets: Tensor) -> list[tuple[int, int, int]]:
    ends = offsets.tolist()
    return [
        (b, start, min(start + _WIDEN, end))
        for b, (first, end) in enumerate(itertools.pairwise(ends))
        for start in range(first, end, _WIDEN)
    ]


def _looped(values: Tensor, offsets: Tensor) -> bool:
    return values.device.type == "cpu" and len(values) >= _LOOP_FROM * (len(offsets) - 1)


def _sum(weights: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
    wide = _wide(values)
    weights = weights.to(wide)
    out = values.new_zeros((len(offsets) - 1, weights.shape[1], values.shape[1]), dtype=wide)
    if _looped(values, offsets):
        for b, start, end in _pieces(offsets):
            out[b].addmm_(weights[start:end].T, values[start:end].to(wide))
        return out
    for k in range(weights.shape[1]):
        out[:, k] = segment_sum(weights[:, k, None] * values, offsets)
    return out


def _dot(values: Tensor, queries: Tensor, offsets: Tensor) -> Tensor:
    wide = _wide(values)
    queries = queries.to(wide)
    out = values.new_empty((len(values), queries.shape[1]), dtype=wide)
    if _looped(values, offsets):
        for b, start, end in _pieces(offsets):
            torch.mm(values[start:end].to(wide), queries[b].T, out=out[start:end])
        return out
    bag = segment_ids(offsets, len(values))
    for k in range(queries.shape[1]):
        out[:, k] = (values * queries[:, k][bag]).sum(1)
    return out


def _spread(weights: Tensor, queries: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    wide = _wide(queries)
    weights, queries = weights.to(wide), queries.to(wide)
    out = queries.new_empty((len(weights), queries.shape[2]), dtype=dtype)
    if _looped(weights, offsets):
        for b, start, end in _pieces(offsets):
            out[start:end] = weights[start:end] @ queries[b]
        return out
    bag = segment_ids(offsets, len(weights))
    total = torch.zeros_like(out, dtype=wide)
    for k in range(weights.shape[1]):
        total += weights[:, k, None] * queries[:, k][bag]
    return total.to(dtype)
