"""AdamW, its schedule and the class weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lrmil.config import TrainSettings
from lrmil.model import MILModel
from lrmil.targets.classification import class_weights

__all__ = ["AdamW", "class_weights", "learning_rate", "make_optimizer", "set_learning_rate"]


class AdamW:
    """AdamW (Loshchilov and Hutter 2019) by torch's fused kernel, with torch's numbers.

    torch's own class imports its compiler when the first optimiser is made, which takes two seconds of a processor:
    more than a small cohort takes to train. param_groups: each with "params", "weight_decay" and "lr". state: moments
    and step count by parameter, under torch's names.
    """

    BETAS, EPSILON = (0.9, 0.999), 1e-8

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        self.param_groups = [{"lr": lr, **group} for group in groups]
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, or set them to 0."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if set_to_none or parameter.grad is None:
                    parameter.grad = None
                else:
                    parameter.grad.zero_()

    @torch.no_grad()
    def step(self) -> None:
        """One step by the gradients; parameters without one stay."""
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            if not moved:
                continue
            for p in moved:
                if p not in self.state:
                    count = torch.zeros((), dtype=torch.float32, device=p.device)
                    self.state[p] = {"step": count, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            states = [self.state[p] for p in moved]
            steps = [s["step"] for s in states]
            for count in steps:
                count += 1
            torch._fused_adamw_(
                moved,
                [p.grad for p in moved],
                [s["exp_avg"] for s in states],
                [s["exp_avg_sq"] for s in states],
                [],
                steps,
                amsgrad=False,
                lr=group["lr"],
                beta1=self.BETAS[0],
                beta2=self.BETAS[1],
                weight_decay=group["weight_decay"],
                eps=self.EPSILON,
                maximize=False,
                grad_scale=None,
                found_inf=None,
            )


def make_optimizer(model: MILModel, settings: TrainSettings) -> AdamW:
    """AdamW; biases and norms do not decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW(groups, settings.learning_rate)


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


def set_learning_rate(optimizer: AdamW, rate: float) -> None:
    """Set the rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate
