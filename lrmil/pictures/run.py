"""What a run came to: ROC with its band, calibration, confusion matrix, training curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from lrmil.errors import FiguresError
from lrmil.metrics import confusion, evaluate, figures, reliability, roc_curve
from lrmil.pictures.canvas import COLOURS, canvas

__all__ = ["draw_calibration", "draw_confusion", "draw_curves", "draw_roc"]

BAND_REPLICATES = 1000


def draw_roc(
    path: Path, labels: ArrayLike, probabilities: ArrayLike, classes: Sequence[str], cases: Sequence[str] | None = None
) -> bool:
    """ROC of class 1 of two, or of each class against the rest, with 95 % bands by case.

    labels: int (N,). probabilities: (N, C). Returns False, and writes nothing, where no class has both positives and
    negatives, since there is no curve.
    """
    y, p = np.asarray(labels, np.int64), np.asarray(probabilities, np.float64)
    curves = []
    for c in [1] if len(classes) == 2 else range(len(classes)):
        try:
            curves.append((c, roc_curve(y == c, p[:, c], cases, replicates=BAND_REPLICATES)))
        except FiguresError:
            continue
    if not curves:
        return False
    with canvas(path, (4.6, 4.6)) as (axes,):
        axes.plot([0, 1], [0, 1], color="0.7", linewidth=1, linestyle="--")
        for i, (c, roc) in enumerate(curves):
            colour = COLOURS[i % len(COLOURS)]
            # The figure's own estimate, so that picture and table agree.
            auc = evaluate(y == c, np.stack([1 - p[:, c], p[:, c]], axis=1), cases, replicates=BAND_REPLICATES)["auc"]
            spread = f" ({auc.low:.3f} to {auc.high:.3f})" if np.isfinite(auc.low) else ""
            axes.fill_between(roc.grid, roc.low, roc.high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(roc.fpr, roc.tpr, color=colour, label=f"{classes[c]}: AUC {auc.value:.3f}{spread}")
        axes.set(xlabel="False-positive rate", ylabel="True-positive rate", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
        axes.set_aspect("equal")
        axes.set_title(f"ROC, 95 % bands by case, {len(y)} slides", fontsize=10)
        axes.legend(loc="lower right", fontsize=8)
    return True


def draw_calibration(path: Path, labels: ArrayLike, before: ArrayLike, after: ArrayLike) -> None:
    """Reliability of the predicted class before and after calibration, 95 % intervals and slides per bin.

    labels: int (N,). before, after: probabilities (N, C).
    """
    with canvas(path, (8.0, 4.2), columns=2) as panels:
        for axes, values, title in zip(panels, (before, after), ("As trained", "Calibrated"), strict=True):
            bins = reliability(labels, values, bins=10)
            there = bins.slides > 0
            error = np.stack([bins.accuracy - bins.low, bins.high - bins.accuracy])[:, there]
            axes.plot([0, 1], [0, 1], color="0.7", linewidth=1, linestyle="--")
            axes.errorbar(
                bins.confidence[there],
                bins.accuracy[there],
                yerr=np.maximum(error, 0),
                fmt="o-",
                color=COLOURS[0],
                capsize=2,
            )
            for x, y, n in zip(bins.confidence[there], bins.low[there], bins.slides[there], strict=True):
                axes.annotate(str(n), (x, y), xytext=(0, -9), textcoords="offset points", ha="center", fontsize=7)
            found = figures(labels, values)
            axes.set_title(f"{title}: ECE {found['ece']:.3f}, Brier {found['brier']:.3f}", fontsize=10)
            axes.set(xlabel="Probability of the predicted class", ylabel="Part that is right")
            axes.set(xlim=(0, 1.02), ylim=(-0.05, 1.05))


def draw_confusion(path: Path, labels: ArrayLike, predicted: ArrayLike, classes: Sequence[str]) -> None:
    """Confusion matrix: counts, and colour by the part of the true class. labels, predicted: int (N,)."""
    matrix = confusion(labels, predicted, len(classes))
    total = matrix.sum(axis=1, keepdims=True)
    share = np.divide(matrix, total, out=np.zeros(matrix.shape), where=total > 0)
    side = 2.2 + 0.6 * len(classes)
    with canvas(path, (side + 0.6, side)) as (axes,):
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for row in range(len(classes)):
            for column in range(len(classes)):
                text = f"{matrix[row, column]}\n{share[row, column]:.0%}"
                dark = share[row, column] > 0.55
                axes.text(column, row, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
        axes.set_xticks(
            range(len(classes)),
            classes,
            rotation=45 if len(classes) > 3 else 0,
            ha="right" if len(classes) > 3 else "center",
        )
        axes.set_yticks(range(len(classes)), classes)
        axes.set(xlabel="Predicted", ylabel="True")


def draw_curves(path: Path, history: Sequence[Mapping[str, float | None]], best_epoch: int, monitor: str) -> None:
    """Losses, and the monitored figure, by epoch; the kept epoch is marked. history: one mapping an epoch."""
    epochs = [row["epoch"] for row in history]

    def series(name: str) -> list[float]:
        return [np.nan if row.get(name) is None else float(row[name] or 0.0) for row in history]

    names = [name for name in history[0] if name.startswith("train_")] if history else []
    with canvas(path, (8.0, 3.6), columns=2) as (left, right):
        for i, name in enumerate([*names, "inner_loss", "val_loss"]):
            if any(name in row for row in history):
                left.plot(
                    epochs, series(name), label=name.replace("_", " "), color=COLOURS[i % len(COLOURS)], marker="."
                )
        left.set(xlabel="Epoch", ylabel="Loss")
        left.legend(fontsize=8)
        shown = [n for n in dict.fromkeys(("auc", "balanced_accuracy", monitor)) if n != "loss"]
        for i, name in enumerate(shown):
            if any(f"val_{name}" in row for row in history):
                right.plot(epochs, series(f"val_{name}"), label=f"val {name}", color=COLOURS[i], marker=".")
        right.set(xlabel="Epoch", ylabel="Figure on the validation cases")
        if right.lines:
            right.legend(fontsize=8)
        for axes in (left, right):
            axes.axvline(best_epoch, color="0.6", linewidth=1, linestyle=":")
