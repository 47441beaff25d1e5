"""CLAM-MB: an attention branch, a bag vector and a classifier for each class."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrmil.config import ModelSettings
from lrmil.model.base import MILModel, MILOutput, Pooled
from lrmil.model.segments import bag_sum, segment_ids, segment_log_softmax, select_extremes

__all__ = ["ClamMB"]


class ClassWise(nn.Linear):
    """A linear classifier a class, each on the bag vector of its own class: (B, C * H) -> (B, C)."""

    def forward(self, bags: Tensor) -> Tensor:
        own = bags.reshape(len(bags), *self.weight.shape)
        logits: Tensor = (own * self.weight).sum(2) + self.bias
        return logits


class ClamMB(MILModel):
    """CLAM with several attention branches: gated attention with scores for each class over a shared trunk.

    Class c attends with ``softmax(a_c)`` and its logit is ``w_c . sum_i softmax(a_c)_i h_i + b_c``. The attention of a
    tile is the mean over the classes. The second loss clusters tiles: for the bag's class its ``cluster_k`` most
    attended tiles against the least attended ones, for every other class its most attended tiles as not of it (classes
    exclude each other), and the mean over classes. Lu et al., Data-efficient and weakly supervised computational
    pathology on whole-slide images, Nature Biomedical Engineering 2021; here with cross-entropy, and k is at most half
    of a bag's tiles.
    """

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__(settings)
        self.classifier = ClassWise(settings.hidden, settings.classes)
        width = settings.attention_dim
        # One matrix product for both branches: V in the first rows, U in the second.
        self.attention = nn.Linear(settings.hidden, 2 * width)
        self.attention_score = nn.Linear(width, settings.classes)
        self.clusters = nn.Linear(settings.hidden, 2 * settings.classes)

    def pool(self, instances: Tensor, offsets: Tensor) -> Pooled:
        log_attention = segment_log_softmax(self.class_scores(instances), offsets)
        bag = bag_sum(log_attention.exp(), instances, offsets)
        mean_attention = torch.logsumexp(log_attention, dim=1) - math.log(self.settings.classes)
        return Pooled(bag.flatten(1), mean_attention)

    def class_scores(self, instances: Tensor) -> Tensor:
        """The attention logits of projected tiles for each class: (T, H) -> (T, C)."""
        value, gate = self.attention(instances).chunk(2, dim=1)
        mixed = self.dropout(torch.tanh(value)) * self.dropout(torch.sigmoid(gate))
        scores: Tensor = self.attention_score(mixed)
        return scores

    def second_loss(self, output: MILOutput, offsets: Tensor, labels: Tensor, weights: Tensor) -> Tensor | None:
        value, gate = self.attention(output.instances.detach()).chunk(2, dim=1)
        # Which tiles are chosen is no matter of a gradient, nor of what was dropped.
        scores = self.attention_score(torch.tanh(value) * torch.sigmoid(gate)).detach()
        tile_bag = segment_ids(offsets, len(output.instances))
        total = output.logits.new_zeros(())
        for c in range(self.settings.classes):
            rows, attended = select_extremes(scores[:, c], offsets, self.settings.cluster_k)
            own = labels[tile_bag[rows]] == c
            # In bags of other classes only the most attended tiles count, and they are not of this class.
            keep = own | attended
            rows, target = rows[keep], (attended & own)[keep].long()
            bag = tile_bag[rows]
            logits = self.clusters(output.instances[rows]).unflatten(1, (self.settings.classes, 2))[:, c]
            losses = F.cross_entropy(logits.float(), target, reduction="none")
            chosen = torch.bincount(bag, minlength=len(labels)).clamp_min(1)
            total = total + (losses * (weights / chosen)[bag]).sum() / len(labels)
        return total / self.settings.classes
