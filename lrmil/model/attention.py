"""Models that pool by a weight for each tile: mean, max, ABMIL, gated ABMIL and CLAM-SB."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrmil.config import ModelSettings
from lrmil.model.base import MILModel, MILOutput, Pooled
from lrmil.model.fused import AttentionWeights, attention_pool
from lrmil.model.segments import bag_sum, segment_ids, segment_max, segment_mean, segment_softmax, select_extremes

__all__ = ["ABMIL", "ClamSB", "MaxPooling", "MeanPooling"]


class MeanPooling(MILModel):
    """The mean of the projected tiles."""

    def pool(self, instances: Tensor, offsets: Tensor) -> Pooled:
        return Pooled(segment_mean(instances, offsets))


class MaxPooling(MILModel):
    """The largest value of each projected feature; an empty bag counts as 0."""

    def pool(self, instances: Tensor, offsets: Tensor) -> Pooled:
        largest = segment_max(instances.float(), offsets)
        return Pooled(largest.where(largest.isfinite(), 0.0))


class ABMIL(MILModel):
    """Attention pooling, plain or gated.

    Plain: ``a = w . tanh(V h)``; gated: ``a = w . (tanh(V h) * sigmoid(U h))``; the bag is the sum of ``softmax(a) h``.
    h is a tile's projection or, without ``settings.projection``, its standardised features.
    Ilse, Tomczak and Welling, Attention-based Deep Multiple Instance Learning, ICML 2018, equations 7 to 9.
    """

    def __init__(self, settings: ModelSettings) -> None:
        own = settings.hidden if settings.projection else settings.in_dim
        super().__init__(settings, own, projected=settings.projection)
        self.gated = settings.name != "abmil"
        width = settings.attention_dim
        # One matrix product for both branches: V in the first rows, U in the second.
        self.attention = nn.Linear(own, 2 * width if self.gated else width)
        self.attention_score = nn.Linear(width, 1)
        if not settings.projection:
            self.instance_head = nn.Linear(own, 2)

    def embed(self, features: Tensor, offsets: Tensor) -> tuple[Tensor, Pooled]:
        if not self.settings.projection:
            instances = (self.drop_inputs(features.to(self.input_mean.dtype)) - self.input_mean) * self.input_scale
            return instances, self.pool(instances, offsets)
        if features.device.type != "cpu":
            return super().embed(features, offsets)
        (weight, bias), score = self.input_weights(), self.attention_score
        bag, scores, instances = attention_pool(
            self.drop_inputs(features),
            offsets,
            AttentionWeights(weight, bias, self.attention.weight, self.attention.bias, score.weight[0], score.bias[0]),
            gated=self.gated,
            dropout=self.settings.dropout if self.training else 0.0,
            dtype=torch.bfloat16 if torch.is_autocast_enabled("cpu") else weight.dtype,
        )
        return instances, Pooled(bag, scores)

    def pool(self, instances: Tensor, offsets: Tensor) -> Pooled:
        scores = self.score(instances)
        weights = segment_softmax(scores, offsets)
        return Pooled(bag_sum(weights[:, None], instances, offsets)[:, 0], scores)

    def score(self, instances: Tensor) -> Tensor:
        """The attention logits of projected tiles: (T, H) -> (T,) float32 (float64 of float64)."""
        hidden = self.attention(instances)
        if self.gated:
            value, gate = hidden.chunk(2, dim=1)
            mixed = self.dropout(torch.tanh(value)) * self.dropout(torch.sigmoid(gate))
        else:
            mixed = self.dropout(torch.tanh(hidden))
        scores: Tensor = self.attention_score(mixed)[:, 0]
        return scores.to(torch.promote_types(scores.dtype, torch.float32))


class ClamSB(ABMIL):
    """CLAM with a single attention branch: gated attention, and a clustering of the most and least attended tiles.

    The second loss asks the instance classifier of the bag's class to tell the ``cluster_k`` most attended tiles from
    the least attended ones. Lu et al., Data-efficient and weakly supervised computational pathology on whole-slide
    images, Nature Biomedical Engineering 2021; here with cross-entropy, and k is at most half of a bag's tiles.
    """

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__(settings)
        self.clusters = nn.Linear(settings.hidden, 2 * settings.classes)

    def second_loss(self, output: MILOutput, offsets: Tensor, labels: Tensor, weights: Tensor) -> Tensor | None:
        assert output.attention_logits is not None
        bag = segment_ids(offsets, len(output.instances))
        rows, attended = select_extremes(output.attention_logits, offsets, self.settings.cluster_k)
        bag = bag[rows]
        logits = self.clusters(output.instances[rows]).unflatten(1, (self.settings.classes, 2))
        own = logits[torch.arange(len(rows), device=rows.device), labels[bag]]
        losses = F.cross_entropy(own.float(), attended.long(), reduction="none")
        chosen = torch.bincount(bag, minlength=len(labels)).clamp_min(1)
        return (losses * (weights / chosen)[bag]).sum() / len(labels)
