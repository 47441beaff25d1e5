"""A grade: a chance for each step up, quadratic-weighted kappa.

Output k is the log-odds of being above grade k among those that are at least of grade k, so that the chances of the
grades, products of these, are always in order: CORN (Shi, Cao and Raschka, Pattern Analysis and Applications 2023). Its
loss is the negative log-likelihood of the grade (the continuation-ratio model of McCullagh 1980).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lrmil.errors import SplitError
from lrmil.metrics.agreement import grade_figures
from lrmil.metrics.figures import Array
from lrmil.targets.base import Columns, Fold, Target
from lrmil.targets.cells import levels_of

__all__ = ["Ordinal"]

LEAST_OF_STRATUM = 10


@dataclass(frozen=True)
class Ordinal(Target):
    """One of ``levels``, low to high: truth is its place. The grade that is called is the median of the chances."""

    kind: ClassVar[str] = "ordinal"
    headline: ClassVar[str] = "kappa_quadratic"
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"loss", "mae"})
    options: ClassVar[Mapping[str, str]] = {
        "column": "column of the grades [NAME]",
        "order": "grades from low to high, as low<mid<high [numbers by value, names by letter]",
    }

    levels: tuple[str, ...] = ()

    @classmethod
    def read(cls, name: str, options: Mapping[str, str], columns: Columns) -> tuple[Self, NDArray[np.float64]]:
        levels, truth = levels_of(name, options, columns)
        return cls(name, levels), truth[:, None]

    def read_again(self, options: Mapping[str, str], columns: Columns) -> NDArray[np.float64]:
        return levels_of(self.name, options, columns, self.levels)[1][:, None]

    @property
    def truth_names(self) -> tuple[str, ...]:
        return (f"{self.name}_true",)

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(f"{self.name}_above_{level}" for level in self.levels[:-1])

    def strata(self, truth: NDArray[Any]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
        grades = np.nan_to_num(truth[:, 0], nan=-1.0).astype(np.int64)
        counts = np.bincount(grades[grades >= 0], minlength=len(self.levels))
        # Neighbours are taken together until they are enough to be dealt out.
        names: list[list[str]] = [[]]
        place, total = np.zeros(len(self.levels), np.int64), 0
        for k, level in enumerate(self.levels):
            if total >= LEAST_OF_STRATUM and counts[k:].sum() >= LEAST_OF_STRATUM:
                names.append([])
                total = 0
            names[-1].append(level)
            place[k], total = len(names) - 1, total + int(counts[k])
        return tuple("/".join(own) for own in names), np.where(grades < 0, -1, place[np.maximum(grades, 0)])

    def truth_cells(self, row: NDArray[Any]) -> list[object]:
        return ["" if np.isnan(row[0]) else self.levels[int(row[0])]]

    def fitted(self, truth: NDArray[Any], *, balanced: bool = True) -> Self:
        grades = truth[~np.isnan(truth[:, 0]), 0]
        if len(set(grades.tolist())) < 2:
            raise SplitError(f"{self.name}: the training bags are of one grade", remedy="make the splits anew")
        return self

    def losses(self, outputs: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        grade = truth[..., 0]
        known = ~grade.isnan()
        steps = torch.arange(outputs.shape[-1], device=outputs.device)
        above = (grade[..., None] > steps).to(outputs.dtype).expand(outputs.shape)
        asked = (grade[..., None] >= steps).expand(outputs.shape)
        terms = F.binary_cross_entropy_with_logits(outputs, above, reduction="none")
        losses = terms.where(asked, 0.0).sum(-1)
        return losses.where(known, 0.0), known.expand(losses.shape).to(losses.dtype)

    def above(self, outputs: Array) -> Array:
        """The chance of being above each grade but the last, (N, K - 1), falling."""
        return np.asarray(np.exp(-np.cumsum(np.logaddexp(0, -outputs), axis=1)))

    def probabilities(self, outputs: Array) -> Array:
        """The chance of each grade, (N, K)."""
        above = self.above(outputs)
        whole = np.concatenate([np.ones((len(above), 1)), above, np.zeros((len(above), 1))], axis=1)
        return np.asarray(whole[:, :-1] - whole[:, 1:])

    def told(self, outputs: Array) -> NDArray[np.int64]:
        """The grade that is called, its place, (N,)."""
        return np.asarray((self.above(outputs) > 0.5).sum(axis=1), np.int64)

    def said(self, outputs: Array) -> dict[str, list[object]]:
        p = self.probabilities(outputs)
        columns: dict[str, list[object]] = {self.name: [self.levels[k] for k in self.told(outputs)]}
        return columns | {f"{self.name}_probability_{level}": p[:, k].tolist() for k, level in enumerate(self.levels)}

    def together(self, outputs: Array) -> Array:
        # The outputs whose chances are the mean of the slides'.
        mean = self.above(outputs).mean(axis=0)
        step = np.clip(mean / np.maximum(np.concatenate([[1.0], mean[:-1]]), 1e-300), 1e-12, 1 - 1e-12)
        return np.asarray(np.log(step / (1 - step)))

    def weighted_figures(self, truth: NDArray[Any], outputs: Array, weights: Array) -> dict[str, Array]:
        known = self.known(truth)
        if not known.any():
            return {name: np.full(len(weights), np.nan) for name in ("kappa_quadratic", "mae", "accuracy")}
        grades = truth[known, 0].astype(np.int64)
        return grade_figures(grades, self.told(outputs[known]), len(self.levels), weights[:, known])

    def draw(self, folder: Path, suffix: str, fold: Fold) -> list[Path]:
        from lrmil.pictures.run import draw_confusion

        known = self.known(fold.truth)
        if not known.any():
            return []
        path = folder / f"{self.name}-grades{suffix}.png"
        draw_confusion(path, fold.truth[known, 0].astype(np.int64), self.told(fold.outputs[known]), self.levels)
        return [path]
