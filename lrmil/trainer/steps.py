"""Step functions: a batch of bags to a loss. The loop is the same for teacher, student and plain MIL."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from lrmil.config import LossSettings
from lrmil.data import BagBatch
from lrmil.losses import attention_distillation, bag_distillation, cross_entropy, instance_distillation
from lrmil.model import MILModel, MILOutput
from lrmil.trainer.targets import TeacherTargets

__all__ = ["Step", "StepLoss", "plain_step", "student_step"]


class StepLoss(NamedTuple):
    """total: scalar with gradient; terms: its unweighted parts, detached scalars; logits: (B, C) detached."""

    total: Tensor
    terms: dict[str, Tensor]
    logits: Tensor


Step = Callable[[MILModel, BagBatch], StepLoss]


def plain_step(class_weights: Tensor) -> Step:
    """Cross-entropy with the labels: of a teacher on HR bags, or of plain MIL. class_weights: (C,)."""

    def step(model: MILModel, batch: BagBatch) -> StepLoss:
        output = model(batch.features, batch.offsets)
        ce = _classification(model, output, batch, class_weights)
        return StepLoss(ce, {"ce": ce.detach()}, output.logits.detach())

    return step


def student_step(class_weights: Tensor, settings: LossSettings, targets: TeacherTargets | None) -> Step:
    """The four terms of stage 2. class_weights: (C,). targets: the teacher's, not needed where its weights are 0.

    A term whose weight is 0 is not computed, so with all of the teacher's at 0 and ``ce`` at 1 the numbers are those
    of ``plain_step``, bit for bit.
    """

    def step(model: MILModel, batch: BagBatch) -> StepLoss:
        output = model(batch.features, batch.offsets)
        ce = _classification(model, output, batch, class_weights)
        total, terms = settings.ce * ce, {"ce": ce.detach()}
        if not settings.needs_teacher:
            return StepLoss(total, terms, output.logits.detach())
        assert targets is not None
        logits, mass, covered = targets.of(batch)
        if settings.bag > 0:
            bag = bag_distillation(output.logits, logits, settings.temperature)
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


def _classification(model: MILModel, output: MILOutput, batch: BagBatch, class_weights: Tensor) -> Tensor:
    """Cross-entropy, of which the model's own second loss takes its share."""
    ce = cross_entropy(output.logits, batch.labels, class_weights)
    share = model.settings.second_loss_share
    if share == 0:
        return ce
    second = model.second_loss(output, batch.offsets, batch.labels, class_weights[batch.labels])
    assert second is not None
    return (1 - share) * ce + share * second
