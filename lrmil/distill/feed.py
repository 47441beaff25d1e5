"""Batches as training takes them: pixels and targets on the device, gathered ahead of the step that needs them."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrmil.distill.ahead import run_ahead
from lrmil.distill.augment import stained, turned
from lrmil.distill.children import turn
from lrmil.distill.pixels import PixelBatch, PixelSource
from lrmil.distill.targets import Lesson, TargetStats

__all__ = ["Feed", "ReadyBatch", "TargetBatch"]

CUDA_AHEAD = 3
"""Batches made ahead for a GPU. On a CPU none: a thread beside the step would take the cores that it computes on."""


class TargetBatch(NamedTuple):
    """layers: T_l (B, k*k, C_l) float32, final: (B, k*k, D) float32, both scaled and 0 where there is no child. mask:
    (B, k*k) bool. weights: (B, k*k) float32. Child maps are turned as their tiles are."""

    layers: list[Tensor]
    final: Tensor
    mask: Tensor
    weights: Tensor


class ReadyBatch(NamedTuple):
    """source: which tiles these are. pixels: uint8 (B, S, S, 3), augmented. targets: of the first teacher; more: of the
    others. Tensors lie on the device."""

    source: PixelBatch
    pixels: Tensor
    targets: TargetBatch
    more: tuple[TargetBatch, ...] = ()

    def of(self, teacher: int) -> ReadyBatch:
        """With the targets of one teacher, counted from 0."""
        return self._replace(targets=(self.targets, *self.more)[teacher], more=())


class _Gathered(NamedTuple):
    """A batch in memory, pinned where a GPU follows. values: layers and then final, as stored, not scaled yet, teacher
    after teacher."""

    source: PixelBatch
    pixels: Tensor
    values: list[Tensor]
    mask: Tensor
    weights: Tensor
    symmetry: Tensor | None
    stain: Tensor | None


class _Scale(NamedTuple):
    """What one kind of target is scaled by, (C,) float32 each on the device."""

    mean: Tensor
    std: Tensor


class Feed:
    """The batches of a source with their targets.

    stats, name: of the source's slides with their first teacher; more: lessons of other teachers on the same slides.
    device: where they go. ahead: how many are made ahead in a thread, by default what suits the device; the batches are
    the same whatever it is. What is still on its way from pinned memory when a batch is handed out arrives before the
    device comes to work on it.
    """

    def __init__(
        self,
        source: PixelSource,
        stats: TargetStats,
        device: torch.device,
        *,
        ahead: int | None = None,
        more: Sequence[Lesson] = (),
        name: str = "",
    ) -> None:
        self.source, self.device = source, device
        self.slides = source.slides
        self.lessons = (Lesson(name, self.slides, stats), *more)
        self.ahead = (CUDA_AHEAD if device.type == "cuda" else 0) if ahead is None else ahead
        k = self.slides[0].children.k
        # Places of a child map after each of the eight symmetries.
        self._turned = np.stack([turn(np.arange(k * k), k, symmetry) for symmetry in range(8)])
        self._stored: list[Sequence[NDArray[np.floating[Any]]]] = []
        self._scales: list[_Scale | None] = []
        for lesson in self.lessons:
            own = lesson.stats
            layers = range(len(own.layer_mean))
            self._stored += [[slide.layers[i] for slide in lesson.slides] for i in layers]
            self._stored.append([slide.final for slide in lesson.slides])
            means, stds = [*own.layer_mean, own.final_mean], [*own.layer_std, own.final_std]
            self._scales += [_scale(mean, std, device) for mean, std in zip(means, stds, strict=True)]
        # A teacher without blocks has its final features as the only layer: they are gathered once.
        self._first = [_first_of(self._stored, i) for i in range(len(self._stored))]

    def __len__(self) -> int:
        return len(self.source)

    def shuffled(self, seed: Sequence[int]) -> Generator[ReadyBatch, None, None]:
        """As ``PixelSource.shuffled``. Close it, if not read to its end."""
        return self._ready(self.source.shuffled(seed))

    def in_order(self) -> Generator[ReadyBatch, None, None]:
        """As ``PixelSource.in_order``. Close it, if not read to its end."""
        return self._ready(self.source.in_order())

    def _ready(self, batches: Iterator[PixelBatch]) -> Generator[ReadyBatch, None, None]:
        made = (self._gather(batch) for batch in batches)
        with closing(run_ahead(made, self.ahead)) as gathered:
            for batch in gathered:
                yield self._moved(batch)

    def _gather(self, batch: PixelBatch) -> _Gathered:
        """One batch in memory."""
        shape = len(batch.tile), self._turned.shape[1]
        children = np.empty(shape, np.int64)
        weights = np.empty(shape, np.float32)
        parts = [(number, np.flatnonzero(batch.slide == number)) for number in np.unique(batch.slide).tolist()]
        for number, at in parts:
            children[at] = self.slides[number].children.children[batch.tile[at]]
            weights[at] = self.slides[number].weights[batch.tile[at]]
        row, turned = np.arange(shape[0])[:, None], self._turned[batch.symmetry]
        children, weights = children[row, turned], weights[row, turned]
        mask = children >= 0
        values: list[Tensor] = []
        for i, stored in enumerate(self._stored):
            if self._first[i] < i:
                values.append(values[self._first[i]])
                continue
            dtype = np.result_type(*{stored[number].dtype for number, _ in parts})
            out = np.zeros((*shape, stored[parts[0][0]].shape[1]), dtype)
            for number, at in parts:
                present = mask[at]
                tile, place = np.nonzero(present)
                out[at[tile], place] = stored[number][children[at][present]]
            values.append(self._tensor(out))
        symmetry = self._tensor(batch.symmetry) if batch.symmetry.any() else None
        stain = None if batch.stain is None else self._tensor(batch.stain)
        return _Gathered(
            batch, self._tensor(batch.pixels), values, self._tensor(mask), self._tensor(weights), symmetry, stain
        )

    def _tensor(self, values: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        if self.device.type != "cuda":
            return tensor
        # From pinned memory alone can a GPU fetch while the program goes on. A new thread would pin for the first GPU,
        # and take memory there.
        with torch.cuda.device(self.device):
            return tensor.pin_memory()

    def _moved(self, batch: _Gathered) -> ReadyBatch:
        """The batch on the device, scaled and augmented there: half as much to move where targets are in float16."""
        mask = self._move(batch.mask)
        absent = ~mask[..., None]
        found = []
        for values, scale in zip(batch.values, self._scales, strict=True):
            full = self._move(values).float()
            found.append(full if scale is None else ((full - scale.mean) / scale.std).masked_fill_(absent, 0.0))
        weights, own = self._move(batch.weights), iter(found)
        targets = [
            TargetBatch([next(own) for _ in lesson.stats.layer_mean], next(own), mask, weights)
            for lesson in self.lessons
        ]
        pixels = self._move(batch.pixels)
        if batch.symmetry is not None:
            pixels = turned(pixels, self._move(batch.symmetry))
        if batch.stain is not None:
            pixels = stained(pixels, self._move(batch.stain))
        return ReadyBatch(batch.source, pixels, targets[0], tuple(targets[1:]))

    def _move(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=self.device.type == "cuda")


def _first_of(stored: Sequence[Sequence[NDArray[np.floating[Any]]]], number: int) -> int:
    """The first kind of target that is the same arrays as that of a ``number``."""
    return next(i for i, kind in enumerate(stored) if all(a is b for a, b in zip(kind, stored[number], strict=True)))


def _scale(mean: NDArray[np.float32], std: NDArray[np.float32], device: torch.device) -> _Scale | None:
    """None for targets that are learnt as they are."""
    if not mean.any() and (std == 1).all():
        return None
    return _Scale(torch.from_numpy(mean).to(device), torch.from_numpy(std).to(device))
