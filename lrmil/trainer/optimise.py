"""AdamW, its schedule and the class weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrmil.config import TrainSettings
from lrmil.errors import SplitError
from lrmil.model import MILModel

__all__ = ["class_weights", "learning_rate", "make_optimizer", "set_learning_rate"]


def make_optimizer(model: MILModel, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW; biases and norms do not decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)


def learning_rate(settings: TrainSettings, at: float) -> float:
    """The rate at a time in epochs: a linear rise over the warmup, then constant or half a cosine to the last epoch.

    The rise begins at a rate above 0, so that the first step is not lost.
    """
    if at < settings.warmup_epochs:
        return settings.learning_rate * max(at / settings.warmup_epochs, 0.01)
    if settings.schedule == "constant":
        return settings.learning_rate
    part = (at - settings.warmup_epochs) / max(settings.epochs - settings.warmup_epochs, 1e-9)
    low = settings.final_lr_share
    return settings.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(part, 1.0))))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def class_weights(
    labels: NDArray[np.int64], train: NDArray[np.int64], classes: Sequence[str], *, balanced: bool
) -> Tensor:
    """Weight of each class, (C,) float32, whose mean over the training bags is 1.

    Raises SplitError, naming it, when a class has no training bag.
    """
    counts = np.bincount(labels[train], minlength=len(classes))
    if (counts == 0).any():
        raise SplitError(
            f"class {classes[int(counts.argmin())]!r} has no training bag", remedy="make the splits anew, stratified"
        )
    weights = len(train) / (len(classes) * counts) if balanced else np.ones(len(classes))
    return torch.from_numpy(weights.astype(np.float32))
