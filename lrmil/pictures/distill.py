"""The course of a distillation as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from lrmil.pictures.canvas import COLOURS, canvas

__all__ = ["draw_distillation"]

SUFFIX = "_explained_variance"


class Course(Protocol):
    """What is drawn of ``lrmil.distill.DistillHistory``."""

    @property
    def epochs(self) -> Sequence[Mapping[str, float]]:
        """Figures of every epoch."""

    @property
    def best(self) -> int:
        """The epoch kept, from 1; 0 for none."""


class Explained(Protocol):
    """What is drawn of ``lrmil.distill.Agreement``."""

    @property
    def explained_variance(self) -> float:
        """Of HR features, at most 1."""


def draw_distillation(path: Path, history: Course, baseline: Mapping[str, Explained]) -> None:
    """Losses by epoch, and the explained variance of each layer with the linear baseline as a dashed line.

    baseline: by the names of the layers, empty where there is none. Raises OutputError when it cannot be written.
    """
    epochs = range(1, len(history.epochs) + 1)
    with canvas(path, (9.0, 3.6), columns=2) as (left, right):
        for colour, (key, name) in zip(COLOURS, (("loss", "training"), ("val_loss", "validation")), strict=False):
            if all(key in figures for figures in history.epochs):
                left.plot(epochs, [figures[key] for figures in history.epochs], color=colour, label=name)
        if history.best:
            left.axvline(history.best, color="0.6", linewidth=1, label=f"best: epoch {history.best}")
        left.set(xlabel="epoch", ylabel="loss", yscale="log")
        left.legend(frameon=False)
        names = [key.removesuffix(SUFFIX) for key in (history.epochs[0] if history.epochs else ()) if SUFFIX in key]
        for i, name in enumerate(names):
            colour = COLOURS[i % len(COLOURS)]
            right.plot(epochs, [figures[name + SUFFIX] for figures in history.epochs], color=colour, label=name)
            if name in baseline:
                right.axhline(baseline[name].explained_variance, color=colour, linestyle="--", linewidth=1)
        right.axhline(0.0, color="0.6", linewidth=1)
        right.set(xlabel="epoch", ylabel="explained variance of HR features")
        # A first epoch far below zero would flatten everything after it.
        right.set_ylim(-0.25, 1.0)
        if names:
            right.legend(frameon=False, title="dashed: linear map of LR features" if baseline else None)
