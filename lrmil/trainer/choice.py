"""``--model auto``: a linear model, attention, or the mean of both, by cases that were left out in turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrmil.targets import Classification, Target

__all__ = ["SHARES", "Choice", "choose_share"]

Array = NDArray[np.float64]
SHARES = (0.5, 0.25, 0.75, 0.0, 1.0)
"""Of the linear model, the first preferred: the mean of two models is rarely much worse than the better of them."""
CLEARLY_BETTER = 0.5
"""Standard errors by which another share must beat one that is preferred."""


@dataclass(frozen=True)
class Choice:
    """share: of the linear model in the logits; 0 is attention alone, 1 the linear model alone.

    figures: loss and the target's main figure (AUC) of bags whose cases were left out, by candidate.
    """

    share: float
    figures: Mapping[str, Mapping[str, float]]

    def said(self, attention: str, where: str) -> str:
        """The choice in words. attention: name of the attention model. where: what the figures were found on."""
        chosen = {0.0: attention, 1.0: "linear"}.get(
            self.share, f"{self.share:g} linear + {1 - self.share:g} {attention}"
        )
        found = ", ".join(f"{name} {_shown(f)}" for name, f in self.figures.items())
        return f"auto chose {chosen}; on {where}: {found}"


def _shown(figures: Mapping[str, float]) -> str:
    """The main figure, and the loss in brackets."""
    main = [f"{'AUC' if name == 'auc' else name} {value:.3f}" for name, value in figures.items() if name != "loss"]
    return f"{', '.join(main)} (loss {figures['loss']:.3f})" if main else f"loss {figures['loss']:.3f}"


def choose_share(
    linear: Array, attention: Array, truth: NDArray[Any], target: Target, name: str, *, weighted: bool = True
) -> Choice:
    """The share of the linear model, from outputs (N, O) of bags that neither model was fitted to.

    truth: of the bags. weighted: their losses as in training, else as bags are judged. name: of the attention model.
    The share is the first of
    ``SHARES`` whose mean loss no other beats by ``CLEARLY_BETTER`` standard errors of the difference.
    """
    rows = {
        share: target.row_losses(share * linear + (1 - share) * attention, truth, weighted=weighted) for share in SHARES
    }
    best = min(rows, key=lambda share: float(rows[share].mean()))
    share = best
    for candidate, losses in rows.items():
        worse = losses - rows[best]
        if worse.mean() <= CLEARLY_BETTER * worse.std(ddof=1) / np.sqrt(len(worse)):
            share = candidate
            break
    shown = {"linear": linear, name: attention}
    if 0 < share < 1:
        shown["both"] = share * linear + (1 - share) * attention
    found = {key: _judged(target, truth, outputs, weighted) for key, outputs in shown.items()}
    return Choice(share, found)


def _judged(target: Target, truth: NDArray[Any], outputs: Array, weighted: bool) -> dict[str, float]:
    # Classes are judged by what the loss has made of them: of balanced weights, no prior is taken back.
    plain = replace(target, weights=()) if weighted and isinstance(target, Classification) else target
    found = plain.validation(truth, outputs)
    heads = [n for n in (target.headline, *(f"{p.name}.{p.headline}" for p in getattr(target, "parts", ()))) if n]
    return {name: found[name] for name in (*heads, "loss")}
