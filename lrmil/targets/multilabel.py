"""Several yes-or-no labels at once: binary cross-entropy, each label balanced; AUC of each and their mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lrmil.errors import FiguresError, SplitError
from lrmil.metrics.curves import roc_curve
from lrmil.metrics.figures import Array, ranking
from lrmil.targets.base import Columns, Fold, Target
from lrmil.targets.cells import column_of, yes_or_no
from wsi_pipe.tables import folded

__all__ = ["MultiLabel"]


@dataclass(frozen=True)
class MultiLabel(Target):
    """``labels``, each present or not; one may be unknown where others are known.

    prior: (L,), log-odds of each label among the training bags, which the loss evens out and the probabilities have
    back (Elkan 2001); none trains without weights.
    """

    kind: ClassVar[str] = "multilabel"
    headline: ClassVar[str] = "auc"
    options: ClassVar[Mapping[str, str]] = {"columns": "columns of the labels, as ER+PR+HER2 [all NAME_...]"}

    labels: tuple[str, ...] = ()
    prior: tuple[float, ...] = ()

    @classmethod
    def read(cls, name: str, options: Mapping[str, str], columns: Columns) -> tuple[Self, NDArray[np.float64]]:
        if "columns" in options:
            found = [column_of(columns, part) for part in options["columns"].split("+") if part]
        else:
            found = [column for column in columns.names() if folded(column).startswith(folded(name)) and
                     folded(column) != folded(name)]  # fmt: skip
        if not found:
            raise columns.error(f"no column begins with {name}_", f"name them: --target {name}:multilabel:columns=A+B")
        head = f"{name}_"
        labels = tuple(c[len(head):] if c.casefold().startswith(head.casefold()) else c for c in found)  # fmt: skip
        truth = np.stack([yes_or_no(columns, column, f"whether {column} is present") for column in found], axis=1)
        return cls(name, labels), truth

    @property
    def truth_names(self) -> tuple[str, ...]:
        return tuple(f"{self.name}_{label}_true" for label in self.labels)

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(f"{self.name}_{label}" for label in self.labels)

    def strata(self, truth: NDArray[Any]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
        # The rarest label is the one that a fold may come to lack.
        with np.errstate(invalid="ignore"):
            known = ~np.isnan(truth)
            positive = (truth == 1).sum(axis=0)
        rarest = int(np.minimum(positive, known.sum(axis=0) - positive).argmin())
        label = np.nan_to_num(truth[:, rarest], nan=0.0).astype(np.int64)
        names = (f"no {self.labels[rarest]}", self.labels[rarest])
        return names, np.where(self.known(truth), label, -1)

    def truth_cells(self, row: NDArray[Any]) -> list[object]:
        return ["" if np.isnan(value) else int(value) for value in row]

    def fitted(self, truth: NDArray[Any], *, balanced: bool = True) -> Self:
        positive, negative = (truth == 1).sum(axis=0), (truth == 0).sum(axis=0)
        for k, label in enumerate(self.labels):
            if not positive[k] or not negative[k]:
                what = "with" if not positive[k] else "without"
                raise SplitError(
                    f"{self.name}: no training bag is {what} {label}", remedy="leave it out, or make the splits anew"
                )
        return replace(self, prior=tuple(np.log(positive / negative).tolist())) if balanced else self

    def losses(self, outputs: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        known = ~truth.isnan()
        wanted = truth.nan_to_num().to(outputs.dtype).expand(outputs.shape)
        terms = F.binary_cross_entropy_with_logits(outputs, wanted, reduction="none")
        if self.prior:
            share = outputs.new_tensor(self.prior).sigmoid()
            # Weights whose mean over the training bags is 1, and whose sum over each answer is the same.
            terms = terms * (wanted / (2 * share) + (1 - wanted) / (2 * (1 - share)))
        # A bag counts by the labels that are known of it, so that each label is fitted as it would be alone.
        losses = terms.where(known, 0.0).mean(-1)
        return losses, known.to(losses.dtype).mean(-1).expand(losses.shape)

    @property
    def calibration(self) -> str:
        return "prior" if self.prior else "none"

    def probabilities(self, outputs: Array) -> Array:
        """The chance of each label, (N, L)."""
        z = outputs + (np.asarray(self.prior) if self.prior else 0.0)
        return np.asarray(np.exp(-np.logaddexp(0, -z)))

    def said(self, outputs: Array) -> dict[str, list[object]]:
        p = self.probabilities(outputs)
        called = ["+".join(label for label, v in zip(self.labels, row, strict=True) if v > 0.5) or "none" for row in p]
        columns: dict[str, list[object]] = {self.name: list(called)}
        return columns | {f"{self.name}_probability_{label}": p[:, k].tolist() for k, label in enumerate(self.labels)}

    def together(self, outputs: Array) -> Array:
        # The outputs whose probabilities are the mean of the slides'.
        mean = np.clip(self.probabilities(outputs).mean(axis=0), 1e-12, 1 - 1e-12)
        return np.asarray(np.log(mean / (1 - mean)) - (np.asarray(self.prior) if self.prior else 0.0))

    def weighted_figures(self, truth: NDArray[Any], outputs: Array, weights: Array) -> dict[str, Array]:
        p = self.probabilities(outputs)
        found: dict[str, Array] = {}
        kinds: dict[str, list[Array]] = {"auc": [], "average_precision": []}
        for k, label in enumerate(self.labels):
            known = ~np.isnan(truth[:, k])
            if known.any():
                auc, average = ranking(truth[known, k] == 1, p[known, k], weights[:, known])
            else:
                auc = average = np.full(len(weights), np.nan)
            found[f"auc_{label}"] = auc
            kinds["auc"].append(auc)
            kinds["average_precision"].append(average)
        for name, values in kinds.items():
            there = np.isfinite(values)
            with np.errstate(invalid="ignore"):
                found[name] = np.asarray(np.where(there, values, 0.0).sum(axis=0) / there.sum(axis=0))
        return {name: found[name] for name in ("auc", "average_precision", *(f"auc_{n}" for n in self.labels))}

    def draw(self, folder: Path, suffix: str, fold: Fold) -> list[Path]:
        from lrmil.pictures.canvas import COLOURS, canvas

        p = self.probabilities(fold.outputs)
        curves = []
        for k, label in enumerate(self.labels):
            known = ~np.isnan(fold.truth[:, k])
            own = [case for case, there in zip(fold.cases, known.tolist(), strict=True) if there]
            try:
                curves.append((label, roc_curve(fold.truth[known, k] == 1, p[known, k], own, replicates=200)))
            except FiguresError:
                continue
        if not curves:
            return []
        found = self.figures(fold.truth, fold.outputs)
        path = folder / f"{self.name}-roc{suffix}.png"
        with canvas(path, (4.6, 4.6)) as (axes,):
            axes.plot([0, 1], [0, 1], color="0.7", linewidth=1, linestyle="--")
            for i, (label, roc) in enumerate(curves):
                colour = COLOURS[i % len(COLOURS)]
                axes.fill_between(roc.grid, roc.low, roc.high, color=colour, alpha=0.12, linewidth=0)
                axes.plot(roc.fpr, roc.tpr, color=colour, label=f"{label}: AUC {found[f'auc_{label}']:.3f}")
            axes.set(xlabel="False-positive rate", ylabel="True-positive rate", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
            axes.set_aspect("equal")
            axes.set_title(f"{self.name}: mean AUC {found['auc']:.3f}, bands by case", fontsize=10)
            axes.legend(loc="lower right", fontsize=8)
        return [path]
