"""What a model is trained to say of a bag: one protocol, behind which each kind of target is one file.

A target reads its truth from a label table, gives the loss, takes constants from the training bags, decides, judges,
and draws. The trainer, the predictor and the figures ask this protocol and know no kind. A new kind is a file here
with a subclass of ``Target``, and a row in ``lrmil.targets.kinds``.

Truth is float64 (N, W), one row a bag, NaN where it is not known; of a classification it may also be int64 (N,) with
-1 where it is not known. Outputs are what the model gives, (N, O), float.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrmil.errors import LabelError
from lrmil.metrics.figures import Array
from lrmil.metrics.intervals import Estimate, Figures, bootstrap_folds

__all__ = ["Array", "Columns", "Fold", "Target", "truth_without"]


class Columns(Protocol):
    """The columns of a label table, joined to bags."""

    def names(self) -> Sequence[str]:
        """All columns, as the table writes them."""

    def find(self, name: str) -> str | None:
        """The column of that name, whatever its case, spaces and underscores; None where there is none."""

    def cells(self, name: str) -> list[str | None]:
        """One cell a bag; None where the table lacks the bag or its cell is empty, NA or NaN. Raises LabelError."""

    def error(self, text: str, remedy: str | None = None) -> LabelError:
        """An error that names the table."""


@dataclass(frozen=True)
class Fold:
    """Predictions of one part of one fold.

    target: as the fold's model has it. truth: (N, W). outputs: float64 (N, O). cases: of each row.
    """

    target: Target
    truth: NDArray[Any]
    outputs: Array
    cases: tuple[str, ...]

    def weighing(self) -> Figures:
        """The figures for weights (R, N) of the rows."""
        return lambda weights: self.target.weighted_figures(self.truth, self.outputs, weights)


@dataclass(frozen=True)
class Target(ABC):
    """A kind of target, with the name that the user gave it and the constants that training settles.

    kind: in ``--target NAME:KIND``. relative: whether the loss of a bag depends on what the other bags get, so that
    training has to look at all of them. headline: the one figure that is shown where there is room for one.
    options: what ``--target NAME:KIND:OPTION=...`` may say, with a word on each.
    """

    kind: ClassVar[str]
    relative: ClassVar[bool] = False
    headline: ClassVar[str]
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"loss"})
    options: ClassVar[Mapping[str, str]] = {}

    name: str

    # Truth

    @classmethod
    @abstractmethod
    def read(cls, name: str, options: Mapping[str, str], columns: Columns) -> tuple[Self, NDArray[np.float64]]:
        """The target called ``name`` and its truth (bags, W) from a label table. Raises LabelError."""

    def read_again(self, options: Mapping[str, str], columns: Columns) -> NDArray[np.float64]:
        """The truth (bags, W) of other bags, with this target's own levels. Raises LabelError."""
        return self.read(self.name, options, columns)[1]

    @property
    @abstractmethod
    def truth_names(self) -> tuple[str, ...]:
        """W names, of the columns of truth."""

    @property
    @abstractmethod
    def outputs(self) -> tuple[str, ...]:
        """O names, of the model's outputs."""

    def known(self, truth: NDArray[Any]) -> NDArray[np.bool_]:
        """Bags of which something is known, (N,)."""
        return np.asarray(~np.isnan(truth).all(axis=1))

    @abstractmethod
    def strata(self, truth: NDArray[Any]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
        """Groups by which folds are kept even: their names, and the group of each bag, -1 where nothing is known."""

    @abstractmethod
    def truth_cells(self, row: NDArray[Any]) -> list[object]:
        """One bag's truth (W,) as cells of a table, empty where it is not known."""

    def case_truth(self, rows: NDArray[Any]) -> NDArray[Any] | None:
        """The truth of a case from that of its bags, (n, W) -> (W,); None where they contradict each other."""
        known = rows[~np.isnan(rows).all(axis=1)]
        if not len(known):
            return np.full(rows.shape[1], np.nan)
        low, high = np.nanmin(known, axis=0, initial=np.inf), np.nanmax(known, axis=0, initial=-np.inf)
        if bool((low < high).any()):
            return None
        return np.where(np.isinf(low), np.nan, low)

    # Training

    def fitted(self, truth: NDArray[Any], *, balanced: bool = True) -> Self:
        """With the constants that the training bags' truth gives, such as weights of classes or a scale.

        Raises SplitError where they are not enough to train on.
        """
        return self

    @abstractmethod
    def losses(self, outputs: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each bag, (..., B), 0 where its truth is not known; and how often it counts, (..., B).

        outputs: (..., B, O). truth: (..., B, W). The mean loss is the sum of the first over that of the second.
        """

    def loss(self, outputs: Tensor, truth: Tensor) -> Tensor:
        """The mean loss of bags, a scalar; 0 where nothing of them is known."""
        losses, counts = self.losses(outputs, truth)
        return losses.sum() / counts.sum().clamp_min(1)

    def second_loss(self, outputs: Tensor, truth: Tensor) -> Tensor:
        """The loss of a model's second stream (DSMIL), whose outputs are (B, O)."""
        return self.loss(outputs, truth)

    def distilled(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """How far a student's outputs (B, O) are from its teacher's: by default the mean squared distance."""
        return (student.float() - teacher.detach().float()).square().sum(1).mean()

    def row_losses(self, outputs: Array, truth: NDArray[Any], *, weighted: bool = True) -> Array:
        """Losses (N,) of bags, scaled so that their mean is the mean loss. weighted: as in training, else as judged."""
        with torch.no_grad():
            losses, counts = self.losses(torch.from_numpy(outputs), torch.from_numpy(truth))
        return np.asarray(losses.numpy() * len(truth) / max(float(counts.sum()), 1.0))

    def centred(self, outputs: Array, seen: NDArray[np.bool_]) -> Array:
        """Outputs (R, N, O) of R models made comparable between models. seen: (R, N), bags that each was trained on."""
        return outputs

    def linear_path(self, values: Array, truth: NDArray[Any], penalties: Sequence[float]) -> list[tuple[Array, Array]]:
        """Linear models for falling penalties: weights (O, R) and biases (O,) on values (N, R).

        Minimises the mean loss + penalty / 2 * |weights|^2 by L-BFGS; each begins where the one before ended.
        """
        from scipy.optimize import minimize

        x, y = torch.from_numpy(values), torch.from_numpy(truth)
        width, count = values.shape[1], len(self.outputs)

        def objective(flat: Array, penalty: float) -> tuple[float, Array]:
            at = torch.from_numpy(flat).requires_grad_()
            weight = at[: count * width].view(count, width)
            loss = self.loss(x @ weight.T + at[count * width :], y) + penalty / 2 * weight.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            assert at.grad is not None
            return float(loss.detach()), at.grad.numpy()

        at = np.zeros(count * (width + 1))
        found = []
        for penalty in penalties:
            found_at = minimize(
                objective, at, (penalty,), jac=True, method="L-BFGS-B", options={"maxiter": 300, "gtol": 1e-6}
            )
            at = np.asarray(found_at.x)
            found.append((at[: count * width].reshape(count, width).copy(), at[count * width :].copy()))
        return found

    # What is settled once the model is fitted

    def linear_held_out(
        self, values: Array, truth: NDArray[Any], folds: NDArray[np.int64], penalties: Sequence[float]
    ) -> Array:
        """Outputs (P, N, O) of linear models that did not see the row: one path of penalties for each of the folds.

        values: (N, R). folds: (N,), from 0, which part each row is in.
        """
        found = np.empty((len(penalties), len(truth), len(self.outputs)))
        for fold in range(int(folds.max()) + 1):
            out = folds == fold
            for i, (weight, bias) in enumerate(self.linear_path(values[~out], truth[~out], penalties)):
                found[i, out] = values[out] @ weight.T + bias
        return found

    def settled(self, outputs: Array, truth: NDArray[Any]) -> Self:
        """With what the training bags' outputs give, such as the cut between risk groups."""
        return self

    def calibrated(self, outputs: Array, truth: NDArray[Any], cases: Sequence[str]) -> Self:
        """With the calibration that the validation bags allow; by default none."""
        return self

    @property
    def calibration(self) -> str:
        """Where the calibration comes from, in words."""
        return "none"

    # Decision

    @abstractmethod
    def said(self, outputs: Array) -> dict[str, list[object]]:
        """The columns of ``predictions.csv``, name -> N values; the first is the decision."""

    def together(self, outputs: Array) -> Array:
        """One case's outputs from those of its bags, (n, O) -> (O,): by default their mean."""
        return np.asarray(outputs.mean(axis=0))

    # Figures and pictures

    @abstractmethod
    def weighted_figures(self, truth: NDArray[Any], outputs: Array, weights: Array) -> dict[str, Array]:
        """Figures for R weightings (R, N) of bags at once: name -> (R,), NaN where undefined."""

    def figures(self, truth: NDArray[Any], outputs: Array) -> dict[str, float]:
        """The figures of bags of equal weight."""
        found = self.weighted_figures(truth, outputs, np.ones((1, len(truth))))
        return {name: float(values[0]) for name, values in found.items()}

    def validation(self, truth: NDArray[Any], outputs: Array) -> dict[str, float]:
        """The figures, and "loss", of the validation bags of an epoch; NaN where nothing counts."""
        with torch.no_grad():
            _, counts = self.losses(torch.from_numpy(outputs), torch.from_numpy(truth))
        there = bool(counts.sum() > 0)
        loss = float(self.row_losses(outputs, truth, weighted=False).mean()) if there else float("nan")
        return {**self.figures(truth, outputs), "loss": loss}

    def estimates(self, folds: Sequence[Fold], *, replicates: int = 2000, seed: int = 0) -> dict[str, Estimate]:
        """Figures as means over folds, with 95 % intervals by drawing cases, the same in all folds."""
        return bootstrap_folds([(fold.cases, fold.weighing()) for fold in folds], replicates=replicates, seed=seed)

    def extra(self, fold: Fold) -> dict[str, Any]:
        """What is said of a fold beside its figures, JSON-able, such as a test of its groups."""
        return {}

    @abstractmethod
    def draw(self, folder: Path, suffix: str, fold: Fold) -> list[Path]:
        """Pictures of a fold as ``NAME-....png`` in ``folder``; what was drawn."""

    # On disk

    def to_json(self) -> dict[str, Any]:
        """JSON-able values, from which ``lrmil.targets.target_from_json`` makes the target again."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {"kind": self.kind, **{name: _plain(value) for name, value in values.items()}}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of ``to_json``; keys of later versions are ignored. Raises TypeError where one is missing."""
        known = {item.name for item in dataclasses.fields(cls)}
        return cls(**{name: _tuples(value) for name, value in values.items() if name in known})


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def truth_without(truth: Tensor, kept: Tensor) -> Tensor:
    """Truth of which only ``kept`` rows are known: (B,) or (B, W), and (..., B) bool -> (..., B) or (..., B, W)."""
    if truth.dtype == torch.int64:
        return truth.where(kept, -1)
    return truth.where(kept[..., None], torch.nan)
