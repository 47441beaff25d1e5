"""What a frozen teacher says of every bag, computed once before the student's first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrmil.data import BagBatch, batches
from lrmil.errors import BagMismatchError, SettingsError
from lrmil.losses import teacher_mass
from lrmil.model import MILModel
from lrmil.store import ResidentStore

__all__ = ["BatchTargets", "TeacherTargets", "teacher_targets"]


class BatchTargets(NamedTuple):
    """A teacher's word on one batch: logits (B, C), mass (T,) float32 and covered (T,) bool of its LR tiles."""

    logits: Tensor
    mass: Tensor | None
    covered: Tensor | None


@dataclass(frozen=True)
class TeacherTargets:
    """A teacher's word on the bags of an LR store; a frozen teacher says the same in every epoch.

    logits: (bags, C) float32, NaN for bags that were not asked for. mass, covered: (T,) over all rows of the store, or
    None when the attention was not asked for. offsets: (bags + 1,) int64 of the store.
    """

    logits: Tensor
    mass: Tensor | None
    covered: Tensor | None
    offsets: Tensor

    def of(self, batch: BagBatch) -> BatchTargets:
        """The part for a batch of the LR store, in its order."""
        logits = self.logits[batch.bag_index]
        if self.mass is None or self.covered is None:
            return BatchTargets(logits, None, None)
        within = batch.rows
        if within is None:
            within = torch.arange(len(batch.segment), device=batch.segment.device) - batch.offsets[batch.segment]
        rows = self.offsets[batch.bag_index][batch.segment] + within
        return BatchTargets(logits, self.mass[rows], self.covered[rows])


@torch.no_grad()
def teacher_targets(
    teacher: MILModel,
    hr_store: ResidentStore,
    lr_store: ResidentStore,
    indices: Sequence[int] | NDArray[np.int64],
    *,
    attention: bool,
    token_budget: int,
    parents: str = "sum",
) -> TeacherTargets:
    """Logits of a teacher on HR bags, and its attention summed into their LR tiles.

    indices: the bags of ``lr_store`` to ask for; their HR bags are found by slide id. attention: whether the attention
    is wanted. token_budget: HR tiles at a time. parents: see ``teacher_mass``.

    Raises BagMismatchError, naming the slides, when HR bags are missing or their parents do not fit the LR bags;
    SettingsError when the teacher has no attention but it is wanted.
    """
    device = lr_store.device
    chosen = np.asarray(indices, np.int64)
    hr_index = _matching(hr_store, lr_store, chosen)
    if attention and hr_store.parents is None:
        raise BagMismatchError(
            "the HR features were packed without the rows of their LR tiles",
            remedy="pack them with the LR level as parent level",
        )
    offsets = torch.from_numpy(np.asarray(lr_store.store.offsets, np.int64)).to(device)
    logits = torch.full((len(lr_store), teacher.settings.classes), torch.nan, device=device)
    mass = torch.zeros(int(lr_store.store.offsets[-1]), device=device) if attention else None
    covered = torch.zeros(int(lr_store.store.offsets[-1]), dtype=torch.bool, device=device) if attention else None
    lr_of = torch.full((len(hr_store),), -1, dtype=torch.int64)
    lr_of[torch.from_numpy(hr_index)] = torch.from_numpy(chosen)
    lr_of = lr_of.to(device)
    teacher = teacher.to(device).eval()
    unlabelled = np.zeros(len(hr_store), np.int64)
    for batch in batches(hr_store, unlabelled, hr_index, token_budget=token_budget, shuffle_seed=None):
        output = teacher(batch.features, batch.offsets)
        lr_bags = lr_of[batch.bag_index]
        logits[lr_bags] = output.logits.float()
        if mass is None or covered is None:
            continue
        if output.attention_logits is None:
            raise SettingsError(
                f"the teacher ({teacher.settings.name}) has no attention per tile",
                remedy="choose an attention model as teacher, or set the soft and hard weights to 0",
            )
        assert batch.parent is not None
        lengths = (offsets[1:] - offsets[:-1])[lr_bags]
        wrong = (batch.parent >= lengths[batch.segment]) | (batch.parent < -1)
        if wrong.any():
            bag = int(lr_bags[batch.segment[wrong.nonzero()[0, 0]]])
            raise BagMismatchError(
                f"{lr_store.store.slide_ids[bag]}: a parent row lies beyond the {int(lengths.max())} LR tiles",
                remedy="make LR and HR features of the same tiling",
            )
        packed = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        bag_mass, bag_covered = teacher_mass(output.attention_logits, batch.offsets, batch.parent, packed, parents)
        segment = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
        rows = torch.arange(len(segment), device=device) - packed[segment] + offsets[lr_bags][segment]
        mass[rows] = bag_mass
        covered[rows] = bag_covered
    return TeacherTargets(logits, mass, covered, offsets)


def _matching(hr_store: ResidentStore, lr_store: ResidentStore, chosen: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places in the HR store of the LR store's bags."""
    hr, lr = hr_store.store, lr_store.store
    if hr.meta.parent_level and lr.meta.level and hr.meta.parent_level != lr.meta.level:
        raise BagMismatchError(
            f"the HR features know their tiles at {hr.meta.parent_level}, the LR features are at {lr.meta.level}",
            remedy=f"pack the HR features with the parent level {lr.meta.level}",
        )
    place = {slide: i for i, slide in enumerate(hr.slide_ids) if hr.lengths[i] > 0}
    slides = [lr.slide_ids[i] for i in chosen.tolist()]
    missing = [slide for slide in slides if slide not in place]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise BagMismatchError(
            f"{len(missing)} slides have no HR features: {', '.join(missing[:5])}{more}",
            remedy="extract them, or leave these slides out of the splits",
        )
    return np.array([place[slide] for slide in slides], np.int64)
