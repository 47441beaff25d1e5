"""Survival by proportional hazards: the output is the logarithm of a bag's hazard over that of the mean training bag.

The loss is Cox's (1975) partial likelihood with Breslow's (1974) treatment of ties. A bag's loss depends on who else is
at risk at its time, so training looks at all training bags in every step (``relative``): those of the step as the
network sees them now, the others as it saw them last. Steps of one bag then train as well as steps of many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrmil.metrics.figures import Array
from lrmil.metrics.survival import baseline_hazard
from lrmil.targets.times import Survival

__all__ = ["Cox"]

ABSENT = -1e4
"""The log-hazard of who is not there: its exponential is 0, and its gradient is defined."""


@dataclass(frozen=True)
class Cox(Survival):
    """Proportional hazards. centre: mean output of the training bags. hazard: Breslow's cumulative hazard of a bag of
    risk 0 at each horizon; it is that of the training bags, so single times of theirs are not kept."""

    kind: ClassVar[str] = "survival"

    centre: float = 0.0
    hazard: tuple[float, ...] = ()

    @property
    def outputs(self) -> tuple[str, ...]:
        return (f"{self.name}_log_hazard",)

    def losses(self, outputs: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        z, time, event = outputs[..., 0], truth[..., 0], truth[..., 1]
        known = ~(time.isnan() | event.isnan())
        known = known.expand(z.shape)
        time = time.nan_to_num(nan=-1.0).expand(z.shape)
        counted = (event == 1).expand(z.shape) & known
        order = time.argsort(dim=-1, descending=True, stable=True)
        later = z.where(known, ABSENT).gather(-1, order)
        times = time.gather(-1, order)
        # The risk set of a time is all bags of that time or later, so ties share the sum at the last of them.
        last = torch.ones_like(times, dtype=torch.bool)
        last[..., :-1] = times[..., 1:] != times[..., :-1]
        places = torch.arange(times.shape[-1], device=times.device).where(last, times.shape[-1])
        ends = places.flip(-1).cummin(-1).values.flip(-1)
        at_risk = later.logcumsumexp(-1).gather(-1, ends).gather(-1, order.argsort(dim=-1))
        return (at_risk - z).where(counted, 0.0), counted.to(z.dtype)

    def centred(self, outputs: Array, seen: NDArray[np.bool_]) -> Array:
        # A constant added to all log-hazards changes no likelihood, so each model has one of its own.
        share = seen[:, :, None] / np.maximum(seen.sum(axis=1), 1)[:, None, None]
        return np.asarray(outputs - (np.nan_to_num(outputs) * share).sum(axis=1, keepdims=True))

    def settled(self, outputs: Array, truth: NDArray[Any]) -> Self:
        known = self.known(truth)
        found = replace(self, centre=float(outputs[known, 0].mean()))
        found = super(Cox, found).settled(outputs, truth)
        times, hazard = baseline_hazard(truth[known, 0], truth[known, 1] == 1, found.risk(outputs[known]))
        steps = np.append(0.0, hazard)
        at = np.searchsorted(times, np.asarray(found.horizons), side="right")
        return replace(found, hazard=tuple(steps[at].tolist()))

    def risk(self, outputs: Array) -> Array:
        return np.asarray(outputs[:, 0] - self.centre)

    def survival(self, outputs: Array, times: Sequence[float]) -> Array:
        known = dict(zip(self.horizons, self.hazard, strict=True)) if self.hazard else {}
        hazard = np.array([known.get(time, np.nan) for time in times])
        return np.asarray(np.exp(-hazard[None, :] * np.exp(np.clip(self.risk(outputs), -50, 50))[:, None]))
