"""TransMIL: a transformer over the tiles of one bag, with Nyström attention and a convolutional position encoding."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrmil.config import ModelSettings
from lrmil.model.base import Dropout, MILModel, Pooled

__all__ = ["PINV_STEPS", "VALUE_KERNEL", "SequenceAttention", "TransMIL"]

VALUE_KERNEL = 33
PINV_STEPS = 6


class TransMIL(MILModel):
    """Two attention layers around a pyramid position encoding; the class token of the second is the bag.

    Shao et al., TransMIL, NeurIPS 2021, with Nyström attention (Xiong et al., AAAI 2021) in the first layer. Only the
    class token leaves the second layer, so its one row of attention is computed exactly, in time linear in the tiles;
    that row, without the class token itself and averaged over the heads, is the attention of the tiles. Bags are
    computed one by one. The order of the tiles matters, since it gives the position encoding its square.
    """

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__(settings)
        self.class_token = nn.Parameter(torch.randn(settings.hidden) * 0.02)
        self.first = SequenceAttention(settings)
        self.position = _PyramidPosition(settings.hidden)
        self.second = SequenceAttention(settings)
        self.norm = nn.LayerNorm(settings.hidden)

    def pool(self, instances: Tensor, offsets: Tensor) -> Pooled:
        ends = offsets.tolist()
        bags = [self._one(instances[a:b]) for a, b in itertools.pairwise(ends)]
        return Pooled(torch.stack([bag for bag, _ in bags]), torch.cat([attention for _, attention in bags]))

    def _one(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        count = len(tiles)
        side = max(1, math.ceil(math.sqrt(count)))
        # The square is filled by repeating the first tiles, as published; an empty bag has the class token alone.
        repeats = [tiles, tiles[: side * side - count]] if count else []
        tokens = torch.cat([self.class_token.to(tiles.dtype)[None], *repeats])
        tokens = tokens + self.first(tokens)
        if count:
            tokens = torch.cat([tokens[:1], self.position(tokens[1:], side)])
        update, log_attention = self.second.class_row(tokens)
        bag: Tensor = self.norm(tokens[0] + update)
        if not count:
            return bag, log_attention[:0]
        extra = side * side - count
        copies = F.pad(log_attention[1 + count :], (0, count - extra), value=-torch.inf)
        return bag, torch.logaddexp(log_attention[1 : 1 + count], copies)


class SequenceAttention(nn.Module):
    """Multi-head attention over one sequence (S, H), after a layer norm, with a convolution over the values added."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        width = settings.hidden
        self.heads, self.landmarks = settings.heads, settings.landmarks
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.values = nn.Conv1d(
            self.heads, self.heads, VALUE_KERNEL, padding=VALUE_KERNEL // 2, groups=self.heads, bias=False
        )
        self.out = nn.Linear(width, width)
        self.dropout = Dropout(settings.dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self._split(tokens)
        if len(tokens) <= self.landmarks:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = _nystroem(q, k, v, self.landmarks)
        mixed = mixed + self._convolved(v)
        out: Tensor = self.dropout(self.out(mixed.transpose(0, 1).flatten(1)))
        return out

    def class_row(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What the first token receives, (H,), and the log of its attention to all tokens, (S,) float32."""
        q, k, v = self._split(tokens)
        scores = (q[:, :1] @ k.transpose(1, 2))[:, 0].float() / math.sqrt(q.shape[2])
        log_attention = scores.log_softmax(1)
        mixed = (log_attention.exp().to(v.dtype)[:, None] @ v)[:, 0]
        mixed = mixed + self._convolved(v[:, : VALUE_KERNEL // 2 + 1])[:, 0]
        log_mean = torch.logsumexp(log_attention, dim=0) - math.log(self.heads)
        return self.dropout(self.out(mixed.flatten())), log_mean

    def _split(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(self.norm(tokens)).unflatten(1, (3, self.heads, -1)).permute(1, 2, 0, 3)
        return q, k, v

    def _convolved(self, v: Tensor) -> Tensor:
        # (heads, S, d): each head's kernel runs along S, alike for all d, which act as the batch.
        out: Tensor = self.values(v.permute(2, 0, 1)).permute(1, 2, 0)
        return out


class _PyramidPosition(nn.Module):
    """Depth-wise convolutions of 7, 5 and 3 over the tiles laid out as a square, added to them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kernels = nn.ModuleList(nn.Conv2d(width, width, k, padding=k // 2, groups=width) for k in (7, 5, 3))

    def forward(self, tiles: Tensor, side: int) -> Tensor:
        square = tiles.T.reshape(1, -1, side, side)
        total = square + sum(kernel(square) for kernel in self.kernels)
        out: Tensor = total[0].flatten(1).T
        return out


def _nystroem(q: Tensor, k: Tensor, v: Tensor, landmarks: int) -> Tensor:
    """Nyström attention in float32: q, k, v (heads, S, d) -> (heads, S, d), with S above ``landmarks``."""
    dtype = v.dtype
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = q.float() / math.sqrt(q.shape[2]), k.float(), v.float()
        q_mean, k_mean = _landmarks(q, landmarks), _landmarks(k, landmarks)
        to_landmarks = (q @ k_mean.transpose(1, 2)).softmax(2)
        between = (q_mean @ k_mean.transpose(1, 2)).softmax(2)
        from_landmarks = F.scaled_dot_product_attention(q_mean, k, v, scale=1.0)
        return (to_landmarks @ (_pinv(between) @ from_landmarks)).to(dtype)


def _landmarks(values: Tensor, count: int) -> Tensor:
    """Means of ``count`` runs of neighbours, lengths at most one apart: (heads, S, d) -> (heads, count, d)."""
    run = torch.arange(values.shape[1], device=values.device) * count // values.shape[1]
    lengths = torch.bincount(run, minlength=count).to(values.dtype)
    sums = values.new_zeros((values.shape[0], count, values.shape[2])).index_add(1, run, values)
    return sums / lengths[:, None]


def _pinv(matrix: Tensor) -> Tensor:
    """Iterative Moore-Penrose pseudo-inverse of (heads, m, m) softmax matrices; equation 11 of the Nyström paper."""
    identity = torch.eye(matrix.shape[-1], device=matrix.device, dtype=matrix.dtype)
    scale = matrix.abs().sum(-2).amax(-1) * matrix.abs().sum(-1).amax(-1)
    z = matrix.transpose(-1, -2) / scale[:, None, None]
    for _ in range(PINV_STEPS):
        mz = matrix @ z
        z = 0.25 * z @ (13 * identity - mz @ (15 * identity - mz @ (7 * identity - mz)))
    return z
