"""A number: Huber's loss on standardised values; Pearson's r, R2, errors, and the picture of Bland and Altman."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lrmil.errors import SplitError
from lrmil.metrics.agreement import number_figures
from lrmil.metrics.figures import Array
from lrmil.targets.base import Columns, Fold, Target
from lrmil.targets.cells import column_of, numbers_of

__all__ = ["Regression"]

BINS = 4


@dataclass(frozen=True)
class Regression(Target):
    """A number, in the unit of the table. mean, deviation: of the training bags; the model's output is in deviations
    from the mean, where an error of more than one counts linearly (Huber 1964)."""

    kind: ClassVar[str] = "regression"
    headline: ClassVar[str] = "pearson"
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"loss", "mae", "rmse"})
    options: ClassVar[Mapping[str, str]] = {"column": "column of the numbers [NAME]"}

    mean: float = 0.0
    deviation: float = 1.0

    @classmethod
    def read(cls, name: str, options: Mapping[str, str], columns: Columns) -> tuple[Self, NDArray[np.float64]]:
        return cls(name), numbers_of(columns, column_of(columns, options.get("column", name)))[:, None]

    @property
    def truth_names(self) -> tuple[str, ...]:
        return (f"{self.name}_true",)

    @property
    def outputs(self) -> tuple[str, ...]:
        return (f"{self.name}_standardised",)

    def strata(self, truth: NDArray[Any]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
        values = truth[:, 0]
        there = values[~np.isnan(values)]
        edges = np.quantile(there, np.arange(1, BINS) / BINS) if len(there) else np.zeros(BINS - 1)
        bins = np.searchsorted(edges, np.nan_to_num(values), side="left")
        return tuple(f"quarter {k + 1}" for k in range(BINS)), np.where(np.isnan(values), -1, bins).astype(np.int64)

    def truth_cells(self, row: NDArray[Any]) -> list[object]:
        return ["" if np.isnan(row[0]) else float(row[0])]

    def fitted(self, truth: NDArray[Any], *, balanced: bool = True) -> Self:
        there = truth[~np.isnan(truth[:, 0]), 0]
        if len(there) < 2 or not there.std() > 0:
            raise SplitError(
                f"{self.name}: {len(there)} training values that do not vary are nothing to train on",
                remedy="give cases of other values",
            )
        return replace(self, mean=float(there.mean()), deviation=float(there.std()))

    def losses(self, outputs: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        known = ~truth[..., 0].isnan()
        wanted = (
            ((truth[..., 0].nan_to_num() - self.mean) / self.deviation).to(outputs.dtype).expand(outputs.shape[:-1])
        )
        losses = F.huber_loss(outputs[..., 0], wanted, reduction="none")
        return losses.where(known, 0.0), known.expand(losses.shape).to(losses.dtype)

    def told(self, outputs: Array) -> Array:
        """The numbers (N,) in the unit of the table."""
        return np.asarray(self.mean + self.deviation * outputs[:, 0])

    def said(self, outputs: Array) -> dict[str, list[object]]:
        return {self.name: self.told(outputs).tolist()}

    def weighted_figures(self, truth: NDArray[Any], outputs: Array, weights: Array) -> dict[str, Array]:
        known = self.known(truth)
        if not known.any():
            return {name: np.full(len(weights), np.nan) for name in ("pearson", "r2", "mae", "rmse")}
        return number_figures(truth[known, 0], self.told(outputs[known]), weights[:, known])

    def extra(self, fold: Fold) -> dict[str, Any]:
        known = self.known(fold.truth)
        off = self.told(fold.outputs[known]) - fold.truth[known, 0]
        spread = 1.96 * float(off.std(ddof=1)) if len(off) > 1 else float("nan")
        bias = float(off.mean()) if len(off) else float("nan")
        return {"bias": bias, "limits_of_agreement": [bias - spread, bias + spread]}

    def draw(self, folder: Path, suffix: str, fold: Fold) -> list[Path]:
        from lrmil.pictures.canvas import COLOURS, canvas

        known = self.known(fold.truth)
        if not known.any():
            return []
        true, told = fold.truth[known, 0], self.told(fold.outputs[known])
        off, (low, high) = told - true, self.extra(fold)["limits_of_agreement"]
        found = self.figures(fold.truth, fold.outputs)
        path = folder / f"{self.name}-agreement{suffix}.png"
        with canvas(path, (8.4, 4.0), columns=2) as (left, right):
            ends = [float(min(true.min(), told.min())), float(max(true.max(), told.max()))]
            left.plot(ends, ends, color="0.7", linewidth=1, linestyle="--")
            left.plot(true, told, "o", color=COLOURS[0], markersize=3.5, alpha=0.7)
            left.set(xlabel=f"{self.name}, true", ylabel=f"{self.name}, predicted")
            left.set_title(f"Pearson {found['pearson']:.3f}, R2 {found['r2']:.3f}, n {len(true)}", fontsize=10)
            right.plot((true + told) / 2, off, "o", color=COLOURS[0], markersize=3.5, alpha=0.7)
            for value, style in ((float(off.mean()), "-"), (low, "--"), (high, "--")):
                right.axhline(value, color=COLOURS[1], linewidth=1, linestyle=style)
            right.set(xlabel="Mean of true and predicted", ylabel="Predicted - true")
            right.set_title(f"Bland-Altman: bias {off.mean():.3g}, limits {low:.3g} to {high:.3g}", fontsize=10)
        return [path]
