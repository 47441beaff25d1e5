"""A linear classifier on what the tiles of a bag have in common: no attention, no hidden layer."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from lrmil.config import QUANTILES, ModelSettings
from lrmil.model.base import MILModel, Pooled
from lrmil.model.segments import segment_ids, segment_mean

__all__ = ["LinearModel", "pooled_width", "summaries"]


def pooled_width(pooling: str, in_dim: int) -> int:
    """Numbers that ``summaries`` gives for a bag of features of the width ``in_dim``."""
    return in_dim * {"mean": 1, "mean+spread": 2, "quantiles": len(QUANTILES)}[pooling]


def summaries(features: Tensor, offsets: Tensor, pooling: str) -> Tensor:
    """What a linear model sees of each bag: (T, D), (B + 1,) -> (B, ``pooled_width``), float32 (float64 of float64).

    "mean": of each feature. "mean+spread": that and the standard deviation over the bag's tiles. "quantiles": those of
    ``QUANTILES``, with linear interpolation between tiles. An empty bag gives 0.
    """
    wide = features if features.dtype == torch.float64 else features.float()
    if pooling == "quantiles":
        return _quantiles(wide, offsets)
    mean = segment_mean(wide, offsets)
    if pooling == "mean":
        return mean
    # About the bag's own mean, so that nothing cancels.
    apart = (wide - mean[segment_ids(offsets, len(wide))]).square()
    return torch.cat([mean, segment_mean(apart, offsets).sqrt()], dim=1)


def _quantiles(features: Tensor, offsets: Tensor) -> Tensor:
    out = features.new_zeros(len(offsets) - 1, len(QUANTILES), features.shape[1])
    for b, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        if end == start:
            continue
        # torch.quantile takes no more than 16 million values.
        ordered = features[start:end].sort(dim=0).values
        place = torch.tensor(QUANTILES, dtype=torch.float64, device=features.device) * (end - start - 1)
        below = place.long()
        above = (below + 1).clamp_max(end - start - 1)
        out[b] = torch.lerp(ordered[below], ordered[above], (place - below).to(features.dtype)[:, None])
    return out.flatten(1)


class LinearModel(MILModel):
    """Logits that are linear in ``summaries`` of the standardised tiles; it is fitted, not trained by gradient steps.

    Standardising is a shift and a scale that is not negative, with which all the summaries commute, so it is applied
    to them and not to every tile. There is no attention; ``instances`` are the features themselves.
    """

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__(settings, pooled_width(settings.pooling, settings.in_dim), projected=False)

    def embed(self, features: Tensor, offsets: Tensor) -> tuple[Tensor, Pooled]:
        with torch.autocast(features.device.type, enabled=False):
            return features, self.pool(features, offsets)

    def pool(self, instances: Tensor, offsets: Tensor) -> Pooled:
        found = summaries(instances, offsets, self.settings.pooling)
        found = found.view(len(found), -1, self.settings.in_dim)
        is_place = torch.ones(found.shape[1], 1, dtype=found.dtype, device=found.device)
        if self.settings.pooling == "mean+spread":
            is_place[1] = 0
        shifted = found - is_place * self.input_mean.to(found.dtype)
        # An empty bag has no tile that could lie anywhere: it says nothing.
        there = (offsets.diff() > 0).to(found.dtype)[:, None, None]
        return Pooled((shifted * self.input_scale.to(found.dtype) * there).flatten(1))

    @torch.no_grad()
    def set_weights(self, weight: Tensor, bias: Tensor) -> None:
        """Take the weights (C, W) and biases (C,) of a fit."""
        assert isinstance(self.classifier, nn.Linear)
        self.classifier.weight.copy_(weight)
        self.classifier.bias.copy_(bias)
