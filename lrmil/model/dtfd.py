"""DTFD-MIL: pseudo-bags in a first tier, whose features are pooled in a second one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lrmil.config import ModelSettings
from lrmil.model.base import MILModel, MILOutput, Pooled
from lrmil.model.segments import bag_sum, segment_ids, segment_log_softmax, segment_mean, segment_rank

__all__ = ["DTFD"]


class GatedScore(nn.Module):
    """``w . (tanh(V h) * sigmoid(U h))``: (T, H) -> (T,) float32 (float64 of float64)."""

    def __init__(self, width: int, attention_dim: int, dropout: nn.Module) -> None:
        super().__init__()
        self.both = nn.Linear(width, 2 * attention_dim)
        # The softmax does not see a constant added to all scores, so there is none.
        self.score = nn.Linear(attention_dim, 1, bias=False)
        self.dropout = dropout

    def forward(self, instances: Tensor) -> Tensor:
        value, gate = self.both(instances).chunk(2, dim=1)
        scores: Tensor = self.score(self.dropout(torch.tanh(value)) * self.dropout(torch.sigmoid(gate)))[:, 0]
        return scores.to(torch.promote_types(scores.dtype, torch.float32))


class DTFD(MILModel):
    """Double-tier feature distillation with aggregated features (DTFD-MIL, AFS).

    A bag's tiles are dealt out to ``pseudo_bags`` groups. Tier 1 pools each with gated attention into one vector and
    classifies it; tier 2 pools these vectors with gated attention and classifies the bag. The second loss is the
    cross-entropy of tier 1, each pseudo-bag with the bag's label; ``second_logits`` are its log-probabilities averaged
    over pseudo-bags. A tile's attention is that within its pseudo-bag times that of the pseudo-bag. Tiles are dealt out
    at random in training; else round in the order of their attention, which does not depend on the tiles' order.
    Zhang et al., DTFD-MIL: Double-tier feature distillation multiple instance learning, CVPR 2022.
    """

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__(settings)
        self.first = GatedScore(settings.hidden, settings.attention_dim, self.dropout)
        self.second = GatedScore(settings.hidden, settings.attention_dim, self.dropout)
        self.first_classifier = nn.Linear(settings.hidden, settings.classes)

    def pool(self, instances: Tensor, offsets: Tensor) -> Pooled:
        groups, bags = self.settings.pseudo_bags, len(offsets) - 1
        scores = self.first(instances)
        dealt = torch.rand_like(scores) if self.training else scores
        group = segment_ids(offsets, len(instances)) * groups + segment_rank(dealt, offsets) % groups
        order = torch.argsort(group, stable=True)
        counts = torch.bincount(group, minlength=bags * groups)
        # A bag of fewer tiles than groups leaves some of them empty.
        held = counts > 0
        first_offsets = torch.cat([offsets.new_zeros(1), counts[held].cumsum(0)])
        own = held.reshape(bags, groups).sum(1)
        second_offsets = torch.cat([offsets.new_zeros(1), own.cumsum(0)])
        ordered = instances[order]
        within = segment_log_softmax(scores[order], first_offsets)
        features = bag_sum(within.exp()[:, None], ordered, first_offsets)[:, 0]
        between = segment_log_softmax(self.second(features.to(instances.dtype)), second_offsets)
        bag = bag_sum(between.exp()[:, None], features, second_offsets)[:, 0]
        with torch.autocast(instances.device.type, enabled=False):
            told = self.first_classifier(features.to(self.first_classifier.weight.dtype)).log_softmax(1)
        attention = torch.empty_like(within)
        attention[order] = within + between[segment_ids(first_offsets, len(instances))]
        return Pooled(bag, attention, segment_mean(told, second_offsets))

    def second_loss(self, output: MILOutput, offsets: Tensor, labels: Tensor, weights: Tensor) -> Tensor | None:
        assert output.second_logits is not None
        return -(output.second_logits[torch.arange(len(labels), device=labels.device), labels] * weights).mean()
