"""Several targets of one model: their outputs side by side, and the mean of their losses.

Each target counts the bags in which it is known, so a bag that lacks one still teaches the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrmil.metrics.figures import Array
from lrmil.metrics.intervals import Estimate
from lrmil.targets.base import Columns, Fold, Target

__all__ = ["Several"]

T = TypeVar("T")


@dataclass(frozen=True)
class Several(Target):
    """Two or more ``parts``, whose names differ. Figures and columns are called as the part's, with its name before."""

    kind: ClassVar[str] = "several"
    headline: ClassVar[str] = ""

    name: str = ""
    parts: tuple[Target, ...] = ()

    @classmethod
    def read(cls, name: str, options: Mapping[str, str], columns: Columns) -> tuple[Self, NDArray[np.float64]]:
        raise TypeError("several targets are read one by one")

    @property
    def relative(self) -> bool:  # type: ignore[override]
        """Whether a part is."""
        return any(part.relative for part in self.parts)

    @property
    def lower_is_better(self) -> frozenset[str]:  # type: ignore[override]
        """Figures of any part of which less is better, without the part's name."""
        return frozenset().union(*(part.lower_is_better for part in self.parts))

    @property
    def truth_names(self) -> tuple[str, ...]:
        return tuple(name for part in self.parts for name in part.truth_names)

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(f"{part.name}.{name}" for part in self.parts for name in part.outputs)

    def each(self, truth: Any, outputs: Any = None) -> list[tuple[Target, Any, Any]]:
        """Each part with its columns of truth and outputs, the last axis of both."""
        found = []
        t, o = 0, 0
        for part in self.parts:
            width, count = len(part.truth_names), len(part.outputs)
            inside = None if outputs is None else outputs[..., o : o + count]
            found.append((part, truth[..., t : t + width], inside))
            t, o = t + width, o + count
        return found

    def _changed(self, change: Callable[[Target, Any, Any], Target], truth: Any, outputs: Any = None) -> Self:
        return replace(self, parts=tuple(change(*one) for one in self.each(truth, outputs)))

    def strata(self, truth: NDArray[Any]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
        # By the first target; bags of which it knows nothing are a group of their own.
        part, own, _ = self.each(truth)[0]
        names, found = part.strata(own)
        other = self.known(truth) & (found < 0)
        if not other.any():
            return names, found
        return (*names, f"{part.name} unknown"), np.where(other, len(names), found)

    def truth_cells(self, row: NDArray[Any]) -> list[object]:
        return [cell for part, own, _ in self.each(row) for cell in part.truth_cells(own)]

    def case_truth(self, rows: NDArray[Any]) -> NDArray[Any] | None:
        found = [part.case_truth(own) for part, own, _ in self.each(rows)]
        return None if any(own is None for own in found) else np.concatenate([o for o in found if o is not None])

    def fitted(self, truth: NDArray[Any], *, balanced: bool = True) -> Self:
        return self._changed(lambda part, own, _: part.fitted(own, balanced=balanced), truth)

    def losses(self, outputs: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros_like(outputs[..., 0])
        there = torch.zeros_like(total)
        for part, own, inside in self.each(truth, outputs):
            losses, counts = part.losses(inside, own)
            # Each part's mean over the bags that it counts, spread over the bags that any part counts.
            total = total + losses / counts.sum(-1, keepdim=True).clamp_min(1)
            there = torch.maximum(there, (counts > 0).to(there.dtype))
        return total * there.sum(-1, keepdim=True) / len(self.parts), there

    def distilled(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        parts = zip(self.each(teacher, student), self.each(teacher, teacher), strict=True)
        losses = [part.distilled(own, theirs, temperature) for (part, _, own), (_, _, theirs) in parts]
        return torch.stack(losses).mean()

    def row_losses(self, outputs: Array, truth: NDArray[Any], *, weighted: bool = True) -> Array:
        rows = [part.row_losses(inside, own, weighted=weighted) for part, own, inside in self.each(truth, outputs)]
        return np.asarray(np.mean(rows, axis=0))

    def centred(self, outputs: Array, seen: NDArray[np.bool_]) -> Array:
        blank = np.empty((0, len(self.truth_names)))
        parts = [part.centred(inside, seen) for part, _, inside in self.each(blank, outputs)]
        return np.concatenate(parts, axis=-1)

    def linear_path(self, values: Array, truth: NDArray[Any], penalties: Sequence[float]) -> list[tuple[Array, Array]]:
        paths = [part.linear_path(values, own, penalties) for part, own, _ in self.each(truth)]
        return [
            (np.concatenate([w for w, _ in step]), np.concatenate([b for _, b in step]))
            for step in zip(*paths, strict=True)
        ]

    def settled(self, outputs: Array, truth: NDArray[Any]) -> Self:
        return self._changed(lambda part, own, inside: part.settled(inside, own), truth, outputs)

    def calibrated(self, outputs: Array, truth: NDArray[Any], cases: Sequence[str]) -> Self:
        return self._changed(lambda part, own, inside: part.calibrated(inside, own, cases), truth, outputs)

    @property
    def calibration(self) -> str:
        return "; ".join(f"{part.name}: {part.calibration}" for part in self.parts)

    def said(self, outputs: Array) -> dict[str, list[object]]:
        blank = np.empty((0, len(self.truth_names)))
        found: dict[str, list[object]] = {}
        for part, _, inside in self.each(blank, outputs):
            found |= part.said(inside)
        return found

    def together(self, outputs: Array) -> Array:
        blank = np.empty((0, len(self.truth_names)))
        return np.concatenate([part.together(inside) for part, _, inside in self.each(blank, outputs)])

    def weighted_figures(self, truth: NDArray[Any], outputs: Array, weights: Array) -> dict[str, Array]:
        return self._named(
            [(part, part.weighted_figures(own, inside, weights)) for part, own, inside in self.each(truth, outputs)]
        )

    def validation(self, truth: NDArray[Any], outputs: Array) -> dict[str, float]:
        found = [(part, part.validation(own, inside)) for part, own, inside in self.each(truth, outputs)]
        losses = [own["loss"] for _, own in found if np.isfinite(own["loss"])]
        return {"loss": float(np.mean(losses)) if losses else float("nan"), **self._named(found)}

    def estimates(self, folds: Sequence[Fold], *, replicates: int = 2000, seed: int = 0) -> dict[str, Estimate]:
        return self._named(
            [
                (part, part.estimates([_inside(fold, k) for fold in folds], replicates=replicates, seed=seed))
                for k, part in enumerate(self.parts)
            ]
        )

    def extra(self, fold: Fold) -> dict[str, Any]:
        return {part.name: part.extra(_inside(fold, k)) for k, part in enumerate(self.parts)}

    def draw(self, folder: Path, suffix: str, fold: Fold) -> list[Path]:
        return [p for k, part in enumerate(self.parts) for p in part.draw(folder, suffix, _inside(fold, k))]

    def _named(self, found: Sequence[tuple[Target, Mapping[str, T]]]) -> dict[str, T]:
        return {f"{part.name}.{name}": value for part, own in found for name, value in own.items()}

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "name": self.name, "parts": [part.to_json() for part in self.parts]}


def _inside(fold: Fold, k: int) -> Fold:
    assert isinstance(fold.target, Several)
    part, truth, outputs = fold.target.each(fold.truth, fold.outputs)[k]
    return Fold(part, truth, outputs, fold.cases)
