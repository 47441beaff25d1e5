"""Training on one fold: one loop for teacher, student and plain MIL."""

from __future__ import annotations

from lrmil.trainer.compute import bag_logits, choose_device, choose_precision
from lrmil.trainer.targets import TeacherTargets, teacher_targets
from lrmil.trainer.training import Prediction, TrainResult, train

__all__ = [
    "Prediction",
    "TeacherTargets",
    "TrainResult",
    "bag_logits",
    "choose_device",
    "choose_precision",
    "teacher_targets",
    "train",
]
