"""How far a student's outputs agree with the teacher, batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrmil.distill.evaluate import Agreement, RunningAgreement, child_targets, final_target
from lrmil.distill.feed import Feed, ReadyBatch
from lrmil.distill.ranks import Ranks
from lrmil.distill.student import StudentOutput
from lrmil.distill.targets import Lesson

__all__ = ["Judge", "judged", "judges_for", "named"]


class Summed(Protocol):
    """An agreement that is summed up: ``sums`` over parts of the data add up."""

    sums: tuple[float, float, float, float]


class Judge(Protocol):
    """Takes a student's outputs on the batches of a feed in their order, and says how far they agree with a teacher."""

    def add(self, output: StudentOutput, batch: ReadyBatch) -> None:
        """Count one batch, of tiles of one slide."""

    @property
    def parts(self) -> list[Summed]:
        """By layer, and of the final feature."""

    def figures(self) -> dict[str, float]:
        """Explained variance and cosine by layer and of the final feature."""


def judged(judges: Sequence[Judge], ranks: Ranks) -> dict[str, float]:
    """The figures of all teachers, over the tiles of all processes."""
    parts = [part for judge in judges for part in judge.parts]
    if ranks.count > 1:
        sums = ranks.summed(np.array([part.sums for part in parts]))
        for part, (error, total, cosine, count) in zip(parts, sums.tolist(), strict=True):
            part.sums = (error, total, cosine, count)
    figures: dict[str, float] = {}
    for judge in judges:
        figures |= judge.figures()
    return figures


def judges_for(feed: Feed) -> list[Judge]:
    """One a teacher, of the kind that suits the feed's device."""
    if feed.device.type == "cuda":
        return [DeviceJudge(lesson, feed.device) for lesson in feed.lessons]
    return [HostJudge(lesson) for lesson in feed.lessons]


def named(teacher: str, figure: str) -> str:
    """The name of a teacher's figure: with the teacher's where there are several."""
    return f"{teacher}.{figure}" if teacher else figure


def _named(teacher: str, layers: list[Agreement], final: Agreement) -> dict[str, float]:
    figures = {}
    for own, agreement in [*((f"layer{n}", found) for n, found in enumerate(layers)), ("final", final)]:
        name = named(teacher, own)
        figures[f"{name}_explained_variance"] = agreement.explained_variance
        figures[f"{name}_cosine"] = agreement.cosine
    return figures


class HostJudge:
    """In numpy, from the targets as stored."""

    def __init__(self, lesson: Lesson) -> None:
        stats = lesson.stats
        self._teacher, self._stats, self._slides = lesson.name, stats, lesson.slides
        self._layers = [RunningAgreement(m, s) for m, s in zip(stats.layer_centre, stats.layer_std, strict=True)]
        self._final = RunningAgreement(stats.final_centre, stats.final_std)
        self._slide, self._wanted = -1, np.zeros((0, 0), np.float32)

    def add(self, output: StudentOutput, batch: ReadyBatch) -> None:
        """See ``Judge``."""
        stats, tiles, number = self._stats, batch.source.tile, int(batch.source.slide[0])
        if number != self._slide:
            # Slides come one after another, so the targets of one are all that is held.
            self._slide, self._wanted = number, final_target(self._slides[number])
        for n, patches in enumerate(output.patches):
            values, present = child_targets(self._slides[number], n, tiles)
            predicted = patches.float().cpu().numpy() * stats.layer_std[n] + stats.layer_mean[n]
            self._layers[n].add(predicted[present], values[present])
        predicted = output.final.float().cpu().numpy() * stats.final_std + stats.final_mean
        self._final.add(predicted, self._wanted[tiles])

    @property
    def parts(self) -> list[Summed]:
        """See ``Judge``."""
        return [*self._layers, self._final]

    def figures(self) -> dict[str, float]:
        """See ``Judge``."""
        return _named(self._teacher, [running.result() for running in self._layers], self._final.result())


class DeviceJudge:
    """On the device, from the targets that are there for the loss; nothing is waited for before ``figures``.

    A GPU would otherwise stand still while a core works through as many numbers as it made. The device must know
    float64.
    """

    def __init__(self, lesson: Lesson, device: torch.device) -> None:
        stats = lesson.stats
        self._teacher = lesson.name
        scales = zip(stats.layer_mean, stats.layer_std, stats.layer_centre, strict=True)
        self._layers = [_DeviceAgreement(*scale, device) for scale in scales]
        self._final = _DeviceAgreement(stats.final_mean, stats.final_std, stats.final_centre, device)

    def add(self, output: StudentOutput, batch: ReadyBatch) -> None:
        """See ``Judge``."""
        targets = batch.targets
        for running, patches, wanted in zip(self._layers, output.patches, targets.layers, strict=True):
            running.add(patches, wanted, targets.mask)
        wanted = (targets.weights[..., None] * targets.final).sum(1)
        self._final.add(output.final, wanted, torch.ones_like(targets.mask[:, 0]))

    @property
    def parts(self) -> list[Summed]:
        """See ``Judge``."""
        return [*self._layers, self._final]

    def figures(self) -> dict[str, float]:
        """See ``Judge``."""
        return _named(self._teacher, [running.result() for running in self._layers], self._final.result())


class _DeviceAgreement:
    """``RunningAgreement`` of tensors on a device, of values that are scaled as targets are."""

    def __init__(
        self, mean: NDArray[np.float32], std: NDArray[np.float32], centre: NDArray[np.float32], device: torch.device
    ) -> None:
        mean64, std64, centre64 = (values.astype(np.float64) for values in (mean, std, centre))
        # From scaled values to distances from the centre in units of std.
        self._shift = torch.from_numpy((mean64 - centre64) / std64).to(device)
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)

    def add(self, predicted: Tensor, wanted: Tensor, present: Tensor) -> None:
        """predicted, wanted: (..., D). present: bool (...), what counts. Nothing is picked out: that would wait."""
        p, t = ((values.double() + self._shift).where(present[..., None], 0.0) for values in (predicted, wanted))
        norms = p.norm(dim=-1) * t.norm(dim=-1)
        cosine = torch.where(norms > 0, (p * t).sum(-1) / norms.where(norms > 0, 1.0), 0.0)
        self._sums += torch.stack([(t - p).square().sum(), t.square().sum(), cosine.sum(), present.sum().double()])

    @property
    def sums(self) -> tuple[float, float, float, float]:
        """See ``Summed``."""
        error, total, cosine, count = self._sums.tolist()
        return error, total, cosine, count

    @sums.setter
    def sums(self, values: tuple[float, float, float, float]) -> None:
        self._sums = torch.tensor(values, dtype=torch.float64, device=self._sums.device)

    def result(self) -> Agreement:
        """The figures so far; NaN where nothing was added."""
        error, total, cosine, count = self._sums.tolist()
        if not count or total == 0:
            return Agreement(float("nan"), float("nan"))
        return Agreement(1 - error / total, cosine / count)
