"""Several networks as one model: the mean of their logits, with a linear model's share."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from lrmil.config import ModelSettings
from lrmil.model.base import MILModel, MILOutput, Pooled
from lrmil.model.linear import LinearModel
from lrmil.model.segments import segment_log_softmax

__all__ = ["Ensemble", "linear_settings", "member_settings"]


def member_settings(settings: ModelSettings) -> ModelSettings:
    """The settings of one network of an ensemble."""
    return replace(settings, members=1, linear_share=0.0)


def linear_settings(settings: ModelSettings) -> ModelSettings:
    """The settings of the linear model of an ensemble."""
    return replace(settings, name="linear", members=1, linear_share=0.0, auxiliary_weight=None)


class Ensemble(MILModel):
    """Networks of one architecture that differ by their random numbers, and perhaps a linear model beside them.

    Logits are ``(1 - linear_share) * mean of the networks' + linear_share * the linear model's``. Attention is the mean
    of the networks', and so are ``bag`` and ``instances``.
    """

    def __init__(self, settings: ModelSettings, members: list[MILModel], linear: LinearModel | None = None) -> None:
        nn.Module.__init__(self)
        self.settings = settings
        self.members = nn.ModuleList(members)
        self.linear = linear

    def forward(self, features: Tensor, offsets: Tensor) -> MILOutput:
        outputs: list[MILOutput] = [member(features, offsets) for member in self.members]
        logits = torch.stack([output.logits for output in outputs]).mean(0)
        if self.linear is not None:
            share = self.settings.linear_share
            logits = (1 - share) * logits + share * self.linear(features, offsets).logits
        scores = [output.attention_logits for output in outputs if output.attention_logits is not None]
        attention = None
        if scores:
            logs = torch.stack([segment_log_softmax(values, offsets) for values in scores])
            attention = logs.logsumexp(0) - math.log(len(scores))
        bag = torch.stack([output.bag for output in outputs]).mean(0)
        instances = torch.stack([output.instances for output in outputs]).mean(0)
        return MILOutput(logits, attention, bag, instances)

    def standardise(self, mean: Tensor, std: Tensor) -> None:
        for model in [*self.members, *([self.linear] if self.linear is not None else [])]:
            model.standardise(mean, std)

    def pool(self, instances: Tensor, offsets: Tensor) -> Pooled:
        raise TypeError("an ensemble has no pooling of its own: its members pool")
