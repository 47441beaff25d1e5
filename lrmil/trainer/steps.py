"""Step functions: a batch of bags to a loss. The loop is the same for teacher, student and plain MIL."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrmil.config import LossSettings
from lrmil.data import BagBatch
from lrmil.losses import attention_distillation, instance_distillation
from lrmil.model import MILModel, MILOutput
from lrmil.targets import Classification, Target
from lrmil.trainer.targets import TeacherTargets

__all__ = ["Step", "StepLoss", "WholeStep", "plain_step", "student_step", "target_step", "taught_step"]


class StepLoss(NamedTuple):
    """total: scalar with gradient; terms: its unweighted parts, detached scalars; logits: (B, C) detached."""

    total: Tensor
    terms: dict[str, Tensor]
    logits: Tensor


class Step(Protocol):
    """A batch of bags to a loss."""

    def __call__(self, model: MILModel, batch: BagBatch) -> StepLoss:
        """The loss of a batch, with gradient."""


def target_step(target: Target) -> Step:
    """The target's own loss: of a teacher on HR bags, or of plain MIL."""

    def step(model: MILModel, batch: BagBatch) -> StepLoss:
        output = model(batch.features, batch.offsets)
        own = _own(target, model, output, batch)
        return StepLoss(own, {"ce": own.detach()}, output.logits.detach())

    return step


class WholeStep:
    """The loss of a target that compares bags with each other, over all training bags in every step.

    ``begin`` notes what the model says of all of them before an epoch; a step takes the bags of its batch as they are
    now, with gradient, and the others as they were seen last. Steps of an epoch sum up to the gradient of the whole
    loss, as they do for other targets. Nothing is kept between epochs, so a run that is resumed goes on the same.
    """

    def __init__(self, target: Target, truth: NDArray[Any], train: NDArray[np.int64], bags: int) -> None:
        self.target, self.train = target, train
        self.place = torch.full((bags,), -1, dtype=torch.int64)
        self.place[torch.from_numpy(train)] = torch.arange(len(train))
        self.truth = torch.from_numpy(truth[train].astype(np.float32))
        self.outputs = torch.zeros(0)

    def begin(self, outputs: Tensor, device: torch.device) -> None:
        """Outputs (N, O) of the training bags as the epoch begins."""
        self.outputs = outputs.to(device)
        self.truth, self.place = self.truth.to(device), self.place.to(device)

    def __call__(self, model: MILModel, batch: BagBatch) -> StepLoss:
        output = model(batch.features, batch.offsets)
        rows = self.place[batch.bag_index]
        logits = output.logits.float()
        whole = self.target.loss(self.outputs.index_copy(0, rows, logits), self.truth)
        self.outputs = self.outputs.index_copy(0, rows, logits.detach())
        # By bags, so that the size of a step does not depend on how many bags it holds.
        total = whole * (len(self.train) / len(rows))
        share = model.settings.second_loss_share
        if share and output.second_logits is not None:
            total = (1 - share) * total + share * self.target.second_loss(output.second_logits, batch.labels)
        return StepLoss(total, {"loss": whole.detach()}, output.logits.detach())


def taught_step(target: Target, settings: LossSettings, targets: TeacherTargets | None) -> Step:
    """The four terms of stage 2. targets: the teacher's, not needed where its weights are 0.

    A term whose weight is 0 is not computed, so with all of the teacher's at 0 and ``ce`` at 1 the numbers are those
    of ``target_step``, bit for bit.
    """

    def step(model: MILModel, batch: BagBatch) -> StepLoss:
        output = model(batch.features, batch.offsets)
        ce = _own(target, model, output, batch)
        total, terms = settings.ce * ce, {"ce": ce.detach()}
        if not settings.needs_teacher:
            return StepLoss(total, terms, output.logits.detach())
        assert targets is not None
        logits, mass, covered = targets.of(batch)
        if settings.bag > 0:
            bag = target.distilled(output.logits, logits, settings.temperature)
            total, terms["bag"] = total + settings.bag * bag, bag.detach()
        if settings.soft > 0:
            assert mass is not None
            assert covered is not None
            temperature = settings.attention_temperature
            soft = attention_distillation(output.attention_logits, mass, covered, batch.offsets, temperature)
            total, terms["soft"] = total + settings.soft * soft, soft.detach()
        if settings.hard > 0:
            assert mass is not None
            assert covered is not None
            k = settings.instances
            hard = instance_distillation(model.instance_head, output.instances, mass, covered, batch.offsets, k)
            total, terms["hard"] = total + settings.hard * hard, hard.detach()
        return StepLoss(total, terms, output.logits.detach())

    return step


def plain_step(class_weights: Tensor) -> Step:
    """Cross-entropy with classes alone. class_weights: (C,)."""
    return target_step(_classes(class_weights))


def student_step(class_weights: Tensor, settings: LossSettings, targets: TeacherTargets | None) -> Step:
    """``taught_step`` of classes. class_weights: (C,)."""
    return taught_step(_classes(class_weights), settings, targets)


def _classes(weights: Tensor) -> Classification:
    return Classification(classes=tuple(map(str, range(len(weights)))), weights=tuple(weights.tolist()))


def _own(target: Target, model: MILModel, output: MILOutput, batch: BagBatch) -> Tensor:
    """The target's loss, of which the model's own second loss takes its share."""
    own = target.loss(output.logits, batch.labels)
    share = model.settings.second_loss_share
    if share == 0:
        return own
    if isinstance(target, Classification):
        weights = target.tensor_weights(output.logits)[batch.labels]
        second = model.second_loss(output, batch.offsets, batch.labels, weights)
        assert second is not None
    else:
        assert output.second_logits is not None
        second = target.second_loss(output.second_logits, batch.labels)
    return (1 - share) * own + share * second
