"""What every MIL model shares: its inputs, its output, the projection and the heads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrmil.config import ModelSettings
from lrmil.errors import ModelMismatchError
from lrmil.model.fused import byte_dropout

__all__ = ["Dropout", "MILModel", "MILOutput", "Pooled"]


class MILOutput(NamedTuple):
    """What a MIL model says of B bags with T tiles in all.

    logits: (B, C). attention_logits: (T,), whose softmax within a bag is the attention, or None where the model has
    none. bag: (B, ...) representation that the classifier sees. instances: (T, H) projected tiles, shared by the bag
    branch and the instance head. second_logits: (B, C) of a second stream (DSMIL's largest tile), else None.
    """

    logits: Tensor
    attention_logits: Tensor | None
    bag: Tensor
    instances: Tensor
    second_logits: Tensor | None = None


class Pooled(NamedTuple):
    """What pooling gives: bag (B, W), attention_logits (T,) or None, second_logits (B, C) or None."""

    bag: Tensor
    attention_logits: Tensor | None = None
    second_logits: Tensor | None = None


class Dropout(nn.Dropout):
    """Dropout; on a CPU with a mask of bytes, which is drawn ten times faster and knows ``p`` to 1/256."""

    def forward(self, values: Tensor) -> Tensor:
        if not self.training or self.p == 0 or values.device.type != "cpu":
            out: Tensor = super().forward(values)
            return out
        return byte_dropout(values, self.p)


class MILModel(nn.Module, ABC):
    """A projection of the tiles, a pooling into one vector a bag, a classifier, and a 2-way head for single tiles.

    Subclasses add their pooling. All parts begin with the same projection and the instance head sits on its result, so
    a loss on single tiles trains what the bag branch sees. The projection sees features standardised by ``input_mean``
    and ``input_scale`` (in_dim,), which ``standardise`` sets and the model's file keeps; they are 0 and 1 in a new one.
    A model that is not ``projected`` has no projection, no instance head unless it makes one, and pools the features
    themselves.
    """

    input_mean: Tensor
    input_scale: Tensor

    def __init__(self, settings: ModelSettings, bag_width: int | None = None, *, projected: bool = True) -> None:
        super().__init__()
        self.settings = settings
        self.input_dropout = Dropout(settings.input_dropout)
        self.register_buffer("input_mean", torch.zeros(settings.in_dim))
        self.register_buffer("input_scale", torch.ones(settings.in_dim))
        if projected:
            self.projection = nn.Linear(settings.in_dim, settings.hidden)
        self.dropout = Dropout(settings.dropout)
        self.classifier = nn.Linear(bag_width or settings.hidden, settings.classes)
        if projected:
            # Always there, so that a model with the instance loss switched off starts from the same random numbers.
            self.instance_head = nn.Linear(settings.hidden, 2)

    def forward(self, features: Tensor, offsets: Tensor) -> MILOutput:
        """Classify packed bags: features (T, D) of any float type, offsets (B + 1,) int64 -> ``MILOutput``.

        Raises ModelMismatchError when D is not the model's ``in_dim``.
        """
        if features.ndim != 2 or features.shape[1] != self.settings.in_dim:
            raise ModelMismatchError(
                f"the features have the shape {tuple(features.shape)}, the model wants (tiles, {self.settings.in_dim})",
                remedy="use bags of the encoder that the model was trained with",
            )
        instances, pooled = self.embed(features, offsets)
        # The classifier is small and its result is what everything is judged by, so it is never rounded.
        with torch.autocast(features.device.type, enabled=False):
            logits = self.classifier(pooled.bag.to(self.classifier.weight.dtype))
        return MILOutput(logits, pooled.attention_logits, pooled.bag, instances, pooled.second_logits)

    def embed(self, features: Tensor, offsets: Tensor) -> tuple[Tensor, Pooled]:
        """The projected tiles (T, H), and what pooling makes of them."""
        instances = self.project(features)
        return instances, self.pool(instances, offsets)

    def standardise(self, mean: Tensor, std: Tensor) -> None:
        """Set the mean and deviation of each feature, (in_dim,); one that never varies is ignored from now on."""
        self.input_mean.copy_(mean)
        self.input_scale.copy_(torch.where(std > 0, 1 / torch.where(std > 0, std, 1.0), 0.0))

    def input_weights(self) -> tuple[Tensor, Tensor]:
        """Weight (H, D) and bias (H,) of the projection for features as they are stored.

        Standardising is linear, so it goes into the weights rather than over every tile.
        """
        weight = self.projection.weight * self.input_scale
        return weight, self.projection.bias - weight @ self.input_mean

    def drop_inputs(self, features: Tensor) -> Tensor:
        """Features with some numbers dropped in training, which then have their mean."""
        if not self.training or self.input_dropout.p == 0:
            return features
        centred: Tensor = self.input_dropout(features.to(self.input_mean.dtype) - self.input_mean)
        return centred + self.input_mean

    def project(self, features: Tensor) -> Tensor:
        """The projected tiles: (T, D) -> (T, H), at least 0."""
        if not torch.is_autocast_enabled(features.device.type):
            features = features.to(self.projection.weight.dtype)
        hidden = torch.relu_(F.linear(self.drop_inputs(features), *self.input_weights()))
        out: Tensor = self.dropout(hidden)
        return out

    @abstractmethod
    def pool(self, instances: Tensor, offsets: Tensor) -> Pooled:
        """Pool the projected tiles (T, H) of the bags at ``offsets`` (B + 1,)."""

    def second_loss(self, output: MILOutput, offsets: Tensor, labels: Tensor, weights: Tensor) -> Tensor | None:
        """The model's own second loss, a scalar, or None: labels (B,) int64, weights (B,) of the bags, mean about 1."""
        return None
