"""Which slides and tiles each step takes, and how they are turned and stained: all of it from the seed alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrmil.data import BagBatch
from lrmil.distill.augment import stain_mixes, stained, turned
from lrmil.finetuning.settings import FinetuneSettings
from lrmil.finetuning.tiles import TilePixels, Wanted

__all__ = ["StepPlan", "make_batch", "offsets_of", "plan_steps"]


@dataclass(frozen=True)
class StepPlan:
    """What one step takes.

    step: from 0. last: whether a pass over the slides ends with it. bags: slides and tiles. symmetry: int64 (T,), 0 to
    7. stain: see ``stain_mixes``, None for none.
    """

    step: int
    last: bool
    bags: tuple[Wanted, ...]
    symmetry: NDArray[np.int64]
    stain: NDArray[np.float32] | None


def plan_steps(
    lengths: NDArray[np.int64], train: Sequence[int], settings: FinetuneSettings, rng: np.random.Generator
) -> Iterator[StepPlan]:
    """The plans of all steps, cheap to draw: a run that goes on draws those before its step again.

    lengths: tiles of every slide. train: slides to learn from, all of which come before one comes again.
    """
    order: list[int] = []
    for step in range(settings.steps):
        if not order:
            order = rng.permutation(np.asarray(train)).tolist()
        chosen, order = order[: settings.max_bags], order[settings.max_bags :]
        bags = tuple((number, _some(int(lengths[number]), settings.max_tiles, rng)) for number in chosen)
        total = sum(int(lengths[number]) if rows is None else len(rows) for number, rows in bags)
        symmetry = rng.integers(0, 8, total) if settings.flips else np.zeros(total, np.int64)
        stain = stain_mixes(rng.random((total, 2, 3)), settings.stain) if settings.stain > 0 else None
        yield StepPlan(step, not order or step + 1 == settings.steps, bags, symmetry, stain)


def _some(tiles: int, most: int, rng: np.random.Generator) -> NDArray[np.int64] | None:
    """At most ``most`` of a slide's tiles, in their order; None for all."""
    return np.sort(rng.permutation(tiles)[:most]) if 0 < most < tiles else None


def make_batch(pixels: TilePixels, labels: NDArray[np.int64], plan: StepPlan, device: torch.device) -> BagBatch:
    """The slides of a step, augmented, on the device; features are uint8 (T, S, S, 3)."""
    found = pixels.fetch(plan.bags)
    tiles = torch.from_numpy(np.concatenate(found)).to(device)
    if plan.symmetry.any():
        tiles = turned(tiles, torch.from_numpy(plan.symmetry).to(device))
    if plan.stain is not None:
        tiles = stained(tiles, torch.from_numpy(plan.stain).to(device))
    offsets = offsets_of([len(own) for own in found]).to(device)
    segment = torch.repeat_interleave(torch.arange(len(found), device=device), offsets.diff())
    numbers = np.array([number for number, _ in plan.bags], np.int64)
    rows = None
    if any(own is not None for _, own in plan.bags):
        parts = [np.arange(len(f)) if own is None else own for f, (_, own) in zip(found, plan.bags, strict=True)]
        rows = torch.from_numpy(np.concatenate(parts)).to(device)
    known = torch.from_numpy(labels[numbers]).to(device)
    return BagBatch(tiles, offsets, segment, known, torch.from_numpy(numbers).to(device), rows=rows)


def offsets_of(lengths: Sequence[int]) -> Tensor:
    """Where each of some bags begins, int64 (B + 1,)."""
    return torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int64))
