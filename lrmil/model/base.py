"""What every MIL model shares: its inputs, its output, the projection and the heads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

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
    a loss on single tiles trains what the bag branch sees.
    """

    def __init__(self, settings: ModelSettings, bag_width: int | None = None) -> None:
        super().__init__()
        self.settings = settings
        self.input_dropout = Dropout(settings.input_dropout)
        self.projection = nn.Linear(settings.in_dim, settings.hidden)
        self.dropout = Dropout(settings.dropout)
        self.classifier = nn.Linear(bag_width or settings.hidden, settings.classes)
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

    def project(self, features: Tensor) -> Tensor:
        """The projected tiles: (T, D) -> (T, H), at least 0."""
        if not torch.is_autocast_enabled(features.device.type):
            features = features.to(self.projection.weight.dtype)
        hidden = torch.relu_(self.projection(self.input_dropout(features)))
        out: Tensor = self.dropout(hidden)
        return out

    @abstractmethod
    def pool(self, instances: Tensor, offsets: Tensor) -> Pooled:
        """Pool the projected tiles (T, H) of the bags at ``offsets`` (B + 1,)."""

    def second_loss(self, output: MILOutput, offsets: Tensor, labels: Tensor, weights: Tensor) -> Tensor | None:
        """The model's own second loss, a scalar, or None: labels (B,) int64, weights (B,) of the bags, mean about 1."""
        return None
