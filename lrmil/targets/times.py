"""What both kinds of survival share: their columns, the groups, the figures and the pictures."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from lrmil.errors import SplitError
from lrmil.metrics.figures import Array
from lrmil.metrics.intervals import Estimate, bootstrap_folds
from lrmil.metrics.survival import concordance_pairs, dynamic_pairs, hazard_ratio, kaplan_meier, logrank, weighted_ratio
from lrmil.targets.base import Columns, Fold, Target
from lrmil.targets.cells import column_of, numbers_of, yes_or_no

__all__ = ["Survival"]

QUARTILES = (0.25, 0.5, 0.75)
LEAST_EVENTS = 2


@dataclass(frozen=True)
class Survival(Target):
    """A time, and whether the event was seen then: truth (time, event).

    horizons: times of the time-dependent AUC and of the survival that is told; by default the times by which a quarter,
    half and three quarters of the training events had happened. cut: risk above which a case is of the high-risk group,
    the median of the training bags.
    """

    relative: ClassVar[bool] = True
    headline: ClassVar[str] = "concordance"
    options: ClassVar[Mapping[str, str]] = {
        "time": "column of times, all in one unit [NAME_time, else NAME]",
        "event": "column of 1 (event seen) and 0 (censored) [NAME_event, NAME_status]",
        "horizons": "times of the time-dependent AUC, as 12+36+60 [quartiles of the training events]",
    }

    horizons: tuple[float, ...] = ()
    cut: float = 0.0

    @classmethod
    def read(cls, name: str, options: Mapping[str, str], columns: Columns) -> tuple[Self, NDArray[np.float64]]:
        time = column_of(columns, options.get("time", f"{name}_time"), *([] if "time" in options else [name]))
        others = [] if "event" in options else [f"{name}_status"]
        event = column_of(columns, options.get("event", f"{name}_event"), *others)
        truth = np.stack([numbers_of(columns, time), yes_or_no(columns, event, "whether the event was seen")], axis=1)
        truth[np.isnan(truth).any(axis=1)] = np.nan
        if (truth[:, 0] < 0).any():
            raise columns.error(f"column {time}: {np.nanmin(truth[:, 0]):g} is a negative time", "correct it")
        try:
            horizons = tuple(sorted(float(part) for part in options.get("horizons", "").split("+") if part))
        except ValueError as error:
            raise columns.error(f"horizons={options['horizons']} are no times", "write them as 12+36+60") from error
        return cls(name, horizons=horizons), truth

    @property
    def truth_names(self) -> tuple[str, ...]:
        return (f"{self.name}_time", f"{self.name}_event")

    def strata(self, truth: NDArray[Any]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
        return ("censored", "event"), np.nan_to_num(truth[:, 1], nan=-1.0).astype(np.int64)

    def truth_cells(self, row: NDArray[Any]) -> list[object]:
        return ["", ""] if np.isnan(row[0]) else [float(row[0]), int(row[1])]

    def fitted(self, truth: NDArray[Any], *, balanced: bool = True) -> Self:
        seen = truth[truth[:, 1] == 1, 0]
        if len(seen) < LEAST_EVENTS:
            raise SplitError(
                f"{self.name}: {len(seen)} training bags with an event are too few to train on",
                remedy="give more cases, or make the splits anew, stratified",
            )
        if self.horizons:
            return self
        return replace(self, horizons=tuple(float(np.quantile(seen, q)) for q in QUARTILES))

    @abstractmethod
    def risk(self, outputs: Array) -> Array:
        """The risk of bags, (N,), higher for earlier events."""

    @abstractmethod
    def survival(self, outputs: Array, times: Sequence[float]) -> Array:
        """The chance to be without the event after each of M times, (N, M)."""

    def settled(self, outputs: Array, truth: NDArray[Any]) -> Self:
        known = self.known(truth)
        return replace(self, cut=float(np.median(self.risk(outputs[known]))))

    def groups(self, outputs: Array) -> NDArray[np.bool_]:
        """Who is of the high-risk group, (N,)."""
        return np.asarray(self.risk(outputs) > self.cut)

    def said(self, outputs: Array) -> dict[str, list[object]]:
        columns: dict[str, list[object]] = {
            f"{self.name}_group": ["high" if high else "low" for high in self.groups(outputs).tolist()],
            f"{self.name}_risk": self.risk(outputs).tolist(),
        }
        told = self.survival(outputs, self.horizons)
        return columns | {f"{self.name}_survival_{t:.4g}": told[:, k].tolist() for k, t in enumerate(self.horizons)}

    def _pairs(self, truth: NDArray[Any], outputs: Array) -> dict[str, tuple[Array, Array]]:
        time, event, risk = truth[:, 0], truth[:, 1] == 1, self.risk(outputs)
        found = {"concordance": concordance_pairs(time, event, risk)}
        names = [f"auc_t{k}" for k in range(1, len(self.horizons) + 1)]
        return found | {
            name: dynamic_pairs(time, event, risk, at) for name, at in zip(names, self.horizons, strict=True)
        }

    def weighted_figures(self, truth: NDArray[Any], outputs: Array, weights: Array) -> dict[str, Array]:
        known = self.known(truth)
        pairs = self._pairs(truth[known], outputs[known])
        w = weights[:, known]
        return {name: weighted_ratio(pair, w, w) for name, pair in pairs.items()}

    def estimates(self, folds: Sequence[Fold], *, replicates: int = 2000, seed: int = 0) -> dict[str, Estimate]:
        # Pairs do not depend on the weighting, so they are made once a fold.
        return bootstrap_folds([_drawn(fold) for fold in folds], replicates=replicates, seed=seed)

    def extra(self, fold: Fold) -> dict[str, Any]:
        known = self.known(fold.truth)
        truth, high = fold.truth[known], self.groups(fold.outputs[known])
        test = logrank(truth[:, 0], truth[:, 1] == 1, high)
        curves = {name: kaplan_meier(truth[of, 0], truth[of, 1] == 1) for name, of in (("low", ~high), ("high", high))}
        ratio = hazard_ratio(truth[:, 0], truth[:, 1] == 1, high)
        return {
            "hazard_ratio": {"high_over_low": ratio.value, "low_end": ratio.low, "high_end": ratio.high, "p": ratio.p},
            "logrank": {"statistic": test.statistic, "p": test.p},
            "median_survival": {name: curve.median for name, curve in curves.items()},
            "group_sizes": {"low": int((~high).sum()), "high": int(high.sum())},
            "cut": self.cut,
            "horizons": list(self.horizons),
        }

    def draw(self, folder: Path, suffix: str, fold: Fold) -> list[Path]:
        from lrmil.pictures.canvas import COLOURS, canvas

        known = self.known(fold.truth)
        if not known.any():
            return []
        truth, high = fold.truth[known], self.groups(fold.outputs[known])
        test = logrank(truth[:, 0], truth[:, 1] == 1, high)
        path = folder / f"{self.name}-survival{suffix}.png"
        with canvas(path, (5.6, 4.2)) as (axes,):
            for name, of, colour in (("low", ~high, COLOURS[0]), ("high", high, COLOURS[1])):
                if not of.any():
                    continue
                time, event = truth[of, 0], truth[of, 1] == 1
                curve = kaplan_meier(time, event)
                axes.fill_between(
                    curve.times, curve.low, curve.high, step="post", color=colour, alpha=0.18, linewidth=0
                )
                axes.step(
                    curve.times, curve.survival, where="post", color=colour,
                    label=f"{name} risk: n {int(of.sum())}, {int(event.sum())} events",
                )  # fmt: skip
                lost = time[~event]
                axes.plot(lost, curve.at(lost), "|", color=colour, markersize=6)
            p = "undefined" if np.isnan(test.p) else f"{test.p:.3g}"
            axes.set(xlabel=f"Time ({self.name})", ylabel="Without the event", ylim=(-0.02, 1.02), xlim=(0, None))
            axes.set_title(f"Kaplan-Meier, 95 % bands; log-rank p {p}; cut at the training median", fontsize=9)
            axes.legend(loc="lower left", fontsize=8)
        return [path]


def _drawn(fold: Fold) -> tuple[tuple[str, ...], Any]:
    assert isinstance(fold.target, Survival)
    known = fold.target.known(fold.truth)
    pairs = fold.target._pairs(fold.truth[known], fold.outputs[known])
    return fold.cases, lambda weights: {
        name: weighted_ratio(pair, weights[:, known], weights[:, known]) for name, pair in pairs.items()
    }
