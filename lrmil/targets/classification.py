"""One class of several: cross-entropy, calibrated probabilities, AUC and the other figures of a classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lrmil.errors import SplitError
from lrmil.losses import bag_distillation, cross_entropy
from lrmil.metrics import calibrate, evaluate, evaluate_folds, figures, softmax
from lrmil.metrics.figures import LOWER_IS_BETTER, NAMES, Array, weighted_figures
from lrmil.metrics.intervals import Estimate
from lrmil.targets.base import Columns, Fold, Target
from lrmil.targets.cells import levels_of
from lrmil.targets.logistic import log_losses, logistic_path
from lrmil.targets.newton import MOST_NUMBERS, newton_paths

__all__ = ["Classification", "class_weights"]


@dataclass(frozen=True)
class Classification(Target):
    """One of ``classes``; of two ``positive`` is looked for.

    weights: (C,) of the cross-entropy, whose mean over the training bags is 1; none is 1 for each. temperature, bias,
    method: of the calibration, see ``lrmil.metrics.Calibration``.
    """

    kind: ClassVar[str] = "class"
    headline: ClassVar[str] = "auc"
    lower_is_better: ClassVar[frozenset[str]] = LOWER_IS_BETTER
    options: ClassVar[Mapping[str, str]] = {
        "column": "column of the classes [NAME]",
        "order": "classes, as a<b; the last of two is the positive one [sorted]",
    }

    name: str = ""
    classes: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    temperature: float = 1.0
    bias: tuple[float, ...] = ()
    method: str = "none"
    positive: int = 1

    @classmethod
    def read(cls, name: str, options: Mapping[str, str], columns: Columns) -> tuple[Self, NDArray[np.float64]]:
        classes, truth = levels_of(name, options, columns)
        return cls(name, classes), truth[:, None]

    def read_again(self, options: Mapping[str, str], columns: Columns) -> NDArray[np.float64]:
        return levels_of(self.name, options, columns, self.classes)[1][:, None]

    @property
    def truth_names(self) -> tuple[str, ...]:
        return (self.name or "label",)

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.classes

    def known(self, truth: NDArray[Any]) -> NDArray[np.bool_]:
        return _labels(truth) >= 0

    def strata(self, truth: NDArray[Any]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
        return self.classes, _labels(truth)

    def truth_cells(self, row: NDArray[Any]) -> list[object]:
        label = int(_labels(np.asarray(row)[None])[0])
        return [self.classes[label] if label >= 0 else ""]

    def fitted(self, truth: NDArray[Any], *, balanced: bool = True) -> Self:
        labels = _labels(truth)
        there = np.flatnonzero(labels >= 0)
        return replace(self, weights=tuple(class_weights(labels, there, self.classes, balanced=balanced).tolist()))

    @property
    def prior(self) -> Array:
        """What is added to logits so that the weights of the classes do not shift probabilities, (C,)."""
        return -np.log(np.asarray(self.weights or (1.0,) * len(self.classes), np.float64))

    def tensor_weights(self, like: Tensor) -> Tensor:
        """The weights of the classes, (C,) float32 on the device of ``like``."""
        return torch.tensor(self.weights or (1.0,) * len(self.classes), dtype=torch.float32, device=like.device)

    def losses(self, outputs: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        labels = truth if truth.dtype == torch.int64 else truth[..., 0].nan_to_num(nan=-1.0).long()
        known = labels >= 0
        weights = self.tensor_weights(outputs).to(outputs.dtype)
        shape = outputs.shape[:-1]
        labels = labels.expand(shape).clamp_min(0)
        losses = F.cross_entropy(outputs.flatten(0, -2), labels.flatten(), weights, reduction="none").view(shape)
        return losses * known, known.expand(shape).to(losses.dtype)

    def loss(self, outputs: Tensor, truth: Tensor) -> Tensor:
        if truth.dtype == torch.int64:
            return cross_entropy(outputs, truth, self.tensor_weights(outputs))
        return super().loss(outputs, truth)

    def distilled(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        return bag_distillation(student, teacher, temperature)

    def row_losses(self, outputs: Array, truth: NDArray[Any], *, weighted: bool = True) -> Array:
        labels = _labels(truth)
        known = labels >= 0
        losses = np.zeros(len(labels))
        if weighted:
            weights = np.asarray(self.weights or (1.0,) * len(self.classes))[labels[known]]
            losses[known] = log_losses(outputs[known], labels[known]) * weights / max(float(weights.mean()), 1e-30)
        else:
            losses[known] = log_losses(outputs[known] + self.prior, labels[known])
        return losses * len(labels) / max(int(known.sum()), 1)

    def linear_path(self, values: Array, truth: NDArray[Any], penalties: Sequence[float]) -> list[tuple[Array, Array]]:
        labels = _labels(truth)
        known = labels >= 0
        weights = np.asarray(self.weights or (1.0,) * len(self.classes))[labels[known]]
        return logistic_path(values[known], labels[known], weights, len(self.classes), penalties)

    def linear_held_out(
        self, values: Array, truth: NDArray[Any], folds: NDArray[np.int64], penalties: Sequence[float]
    ) -> Array:
        labels = _labels(truth)
        if len(self.classes) != 2 or values.shape[1] > MOST_NUMBERS or (labels < 0).any():
            return super().linear_held_out(values, truth, folds, penalties)
        # Two classes and few numbers: the folds are fitted together.
        weights = np.asarray(self.weights or (1.0, 1.0))[labels]
        kept = folds != np.arange(int(folds.max()) + 1)[:, None]
        rows = np.arange(len(labels))
        return np.stack(
            [
                (values[None] @ weight.transpose(0, 2, 1) + bias[:, None])[folds, rows]
                for weight, bias in newton_paths(values, labels, weights, kept, penalties)
            ]
        )

    def calibrated(self, outputs: Array, truth: NDArray[Any], cases: Sequence[str]) -> Self:
        labels = _labels(truth)
        known = labels >= 0
        own = [case for case, there in zip(cases, known.tolist(), strict=True) if there]
        found = calibrate(outputs.reshape(-1, len(self.classes))[known], labels[known], own, class_weights=self.weights)
        method = f"{found.method}: {found.note}" if found.note else found.method
        return replace(self, temperature=found.temperature, bias=found.bias, method=method)

    @property
    def calibration(self) -> str:
        return self.method

    def probabilities(self, outputs: Array) -> Array:
        """Calibrated probabilities, float64 (N, C)."""
        return softmax(outputs, self.temperature, self.bias)

    def said(self, outputs: Array) -> dict[str, list[object]]:
        p = self.probabilities(outputs)
        columns: dict[str, list[object]] = {self.name or "predicted": [self.classes[c] for c in p.argmax(axis=1)]}
        head = f"probability_{self.name}_" if self.name else "probability_"
        return columns | {f"{head}{name}": p[:, c].tolist() for c, name in enumerate(self.classes)}

    def together(self, outputs: Array) -> Array:
        # The outputs whose probabilities are the mean of the slides'.
        mean = np.log(np.maximum(self.probabilities(outputs).mean(axis=0), 1e-300))
        bias = np.asarray(self.bias, np.float64) if self.bias else 0.0
        return np.asarray(self.temperature * (mean - bias))

    def weighted_figures(self, truth: NDArray[Any], outputs: Array, weights: Array) -> dict[str, Array]:
        labels = _labels(truth)
        known = labels >= 0
        if not known.any():
            return {name: np.full(len(weights), np.nan) for name in NAMES}
        return weighted_figures(
            labels[known], self.probabilities(outputs[known]), weights[:, known], positive=self.positive
        )

    def validation(self, truth: NDArray[Any], outputs: Array) -> dict[str, float]:
        labels = _labels(truth)
        known = labels >= 0
        if not known.any():
            return dict.fromkeys(NAMES, float("nan"))
        return figures(labels[known], softmax(outputs[known], bias=tuple(self.prior.tolist())))

    def estimates(self, folds: Sequence[Fold], *, replicates: int = 2000, seed: int = 0) -> dict[str, Estimate]:
        found = []
        for fold in folds:
            assert isinstance(fold.target, Classification)
            labels = _labels(fold.truth)
            known = labels >= 0
            cases = [case for case, there in zip(fold.cases, known.tolist(), strict=True) if there]
            if cases:
                found.append((labels[known], fold.target.probabilities(fold.outputs[known]), cases))
        if not found:
            return {name: Estimate(np.nan, np.nan, np.nan, "no slide has a label") for name in NAMES}
        if len(found) == 1:
            return evaluate(*found[0], classes=self.classes, positive=self.positive, replicates=replicates, seed=seed)
        return evaluate_folds(
            [y for y, _, _ in found],
            [p for _, p, _ in found],
            [own for _, _, own in found],
            positive=self.positive,
            replicates=replicates,
            seed=seed,
        )

    def draw(self, folder: Path, suffix: str, fold: Fold) -> list[Path]:
        from lrmil.pictures.run import draw_calibration, draw_confusion, draw_roc

        labels = _labels(fold.truth)
        known = labels >= 0
        if not known.any():
            return []
        logits, y = fold.outputs[known], labels[known]
        p = self.probabilities(logits)
        cases = [case for case, there in zip(fold.cases, known.tolist(), strict=True) if there]
        head = f"{self.name}-" if self.name else ""
        paths = [folder / f"{head}{what}{suffix}.png" for what in ("roc", "calibration", "confusion")]
        drawn = draw_roc(paths[0], y, p, self.classes, cases)
        draw_calibration(paths[1], y, softmax(logits), p)
        draw_confusion(paths[2], y, p.argmax(axis=1), self.classes)
        return paths if drawn else paths[1:]


def _labels(truth: NDArray[Any]) -> NDArray[np.int64]:
    """Labels int64 (N,), -1 where not known, of int64 (N,) or float (N, 1)."""
    if truth.dtype == np.int64 and truth.ndim == 1:
        return np.asarray(truth)
    return np.nan_to_num(np.asarray(truth, np.float64).reshape(len(truth), -1)[:, 0], nan=-1.0).astype(np.int64)


def class_weights(
    labels: NDArray[np.int64], train: NDArray[np.int64], classes: Sequence[str], *, balanced: bool
) -> Tensor:
    """Weight of each class, (C,) float32, whose mean over the training bags is 1.

    Raises SplitError, naming it, when a class has no training bag.
    """
    counts = np.bincount(labels[train], minlength=len(classes))
    if (counts == 0).any():
        raise SplitError(
            f"class {classes[int(counts.argmin())]!r} has no training bag", remedy="make the splits anew, stratified"
        )
    weights = len(train) / (len(classes) * counts) if balanced else np.ones(len(classes))
    return torch.from_numpy(weights.astype(np.float32))
