"""Survival in intervals: an output is the log-odds of having the event in an interval, given that it had not happened.

Gensheimer and Narasimhan, A scalable discrete-time survival model for neural networks, PeerJ 7:e6257, 2019. A bag's
loss is its own, so batches of any size are alike, and hazards need not be proportional.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lrmil.metrics.figures import Array
from lrmil.targets.base import Columns
from lrmil.targets.times import Survival

__all__ = ["DiscreteSurvival"]

INTERVALS = 4


@dataclass(frozen=True)
class DiscreteSurvival(Survival):
    """Hazards of K intervals. edges: their ends (K,), the first begins at 0; time after the last counts as the last.

    Risk is minus the expected number of intervals survived.
    """

    kind: ClassVar[str] = "survival-discrete"
    relative: ClassVar[bool] = False
    options: ClassVar[Mapping[str, str]] = {
        **Survival.options,
        "intervals": f"number of intervals, ended by quantiles of the training events [{INTERVALS}]",
    }

    intervals: int = INTERVALS
    edges: tuple[float, ...] = ()

    @classmethod
    def read(cls, name: str, options: Mapping[str, str], columns: Columns) -> tuple[Self, NDArray[np.float64]]:
        target, truth = super().read(name, options, columns)
        text = options.get("intervals", str(INTERVALS))
        if not text.isdecimal() or not 2 <= int(text) <= 100:
            raise columns.error(f"intervals={text} is no number from 2 to 100", "write, for one, intervals=8")
        return replace(target, intervals=int(text)), truth

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(f"{self.name}_hazard_{k + 1}" for k in range(self.intervals))

    def fitted(self, truth: NDArray[Any], *, balanced: bool = True) -> Self:
        found = super().fitted(truth, balanced=balanced)
        seen = truth[truth[:, 1] == 1, 0]
        inner = np.quantile(seen, np.arange(1, self.intervals) / self.intervals)
        edges = np.append(inner, max(float(np.nanmax(truth[:, 0])), float(inner[-1])))
        # Ties of times may make intervals empty; they then keep a hazard of no one.
        return replace(found, edges=tuple(edges.tolist()))

    def losses(self, outputs: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        time, event = truth[..., :1], truth[..., 1:2]
        known = ~(time.isnan() | event.isnan())
        ends = outputs.new_tensor(self.edges)
        starts = outputs.new_tensor((0.0, *self.edges[:-1]))
        # An interval counts as survived where the event came after it, and where a case was last seen after its middle.
        middle = (starts + ends) / 2
        survived = ((time > ends) & (event == 1)) | ((time >= middle) & (event == 0))
        within = (time > starts) & (time <= ends) & (event == 1)
        first = (time <= ends[0]) & (event == 1)
        within[..., 0] = first[..., 0]
        terms = F.softplus(-outputs) * within + F.softplus(outputs) * survived
        there = known[..., 0].expand(outputs.shape[:-1])
        return terms.sum(-1).where(there, 0.0), there.to(outputs.dtype)

    def curve(self, outputs: Array) -> Array:
        """Survival after each interval, (N, K)."""
        return np.asarray(np.exp(-np.cumsum(np.logaddexp(0, outputs), axis=1)))

    def risk(self, outputs: Array) -> Array:
        return np.asarray(-self.curve(outputs).sum(axis=1))

    def survival(self, outputs: Array, times: Sequence[float]) -> Array:
        # Between the ends of an interval the hazard is even, so the logarithm is a straight line.
        logs = np.concatenate([np.zeros((len(outputs), 1)), -np.cumsum(np.logaddexp(0, outputs), axis=1)], axis=1)
        edges = np.array((0.0, *self.edges))
        told = np.array([np.interp(times, edges, row) for row in logs]).reshape(len(outputs), len(times))
        return np.asarray(np.exp(told))

    def together(self, outputs: Array) -> Array:
        # The hazards whose curve is the mean of the slides' curves.
        mean = self.curve(outputs).mean(axis=0)
        before = np.concatenate([[1.0], mean[:-1]])
        hazard = np.clip(1 - mean / np.maximum(before, 1e-300), 1e-12, 1 - 1e-12)
        return np.asarray(np.log(hazard / (1 - hazard)))
