"""DSMIL: the critical tile of each class, and attention by likeness to it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrmil.config import ModelSettings
from lrmil.model.base import MILModel, MILOutput, Pooled
from lrmil.model.segments import bag_dot, bag_sum, segment_argmax, segment_log_softmax, segment_max

__all__ = ["DSMIL"]


class DSMIL(MILModel):
    """Two streams: the largest score of a tile for each class, and an attention by likeness to that critical tile.

    Class c attends with ``softmax(q_i . q_critical(c) / sqrt(Q))``; the classifier sees the C bag vectors side by side.
    The attention of a tile is the mean over the classes. The second loss is the cross-entropy of the largest scores.
    With ``stream_average`` the answer is the mean of both streams' probabilities, as the published code gives on
    request; in training each stream has its own loss as ever.
    Li, Li and Eliceiri, Dual-stream Multiple Instance Learning Network, CVPR 2021.
    """

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__(settings, bag_width=settings.classes * settings.hidden)
        self.instance_classifier = nn.Linear(settings.hidden, settings.classes)
        self.query = nn.Sequential(
            nn.Linear(settings.hidden, settings.attention_dim),
            nn.ReLU(),
            nn.Linear(settings.attention_dim, settings.attention_dim),
            nn.Tanh(),
        )

    def forward(self, features: Tensor, offsets: Tensor) -> MILOutput:
        output = super().forward(features, offsets)
        if self.training or not self.settings.stream_average:
            return output
        assert output.second_logits is not None
        # An empty bag has no largest tile.
        largest = output.second_logits.where(output.second_logits.isfinite(), 0.0)
        both = torch.stack([output.logits.log_softmax(1), largest.to(output.logits.dtype).log_softmax(1)])
        return output._replace(logits=both.logsumexp(0) - math.log(2))

    def pool(self, instances: Tensor, offsets: Tensor) -> Pooled:
        scores = self.instance_classifier(instances).float()
        queries = self.query(instances)
        critical = queries[segment_argmax(scores, offsets)]
        likeness = bag_dot(queries, critical, offsets) / math.sqrt(self.settings.attention_dim)
        log_attention = segment_log_softmax(likeness, offsets)
        bag = bag_sum(log_attention.exp(), instances, offsets)
        mean_attention = torch.logsumexp(log_attention, dim=1) - math.log(self.settings.classes)
        return Pooled(bag.flatten(1), mean_attention, segment_max(scores, offsets))

    def second_loss(self, output: MILOutput, offsets: Tensor, labels: Tensor, weights: Tensor) -> Tensor | None:
        assert output.second_logits is not None
        return (F.cross_entropy(output.second_logits, labels, reduction="none") * weights).mean()
