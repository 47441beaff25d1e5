"""Fitting the linear model: the target's loss with an L2 penalty, everything chosen inside the training cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lrmil.config import POOLINGS, ModelSettings
from lrmil.data import plan_batches
from lrmil.model.linear import LinearModel
from lrmil.store import ResidentStore
from lrmil.targets import Several, Target
from lrmil.targets.logistic import log_losses, logistic_path
from lrmil.trainer.inner import target_folds

__all__ = ["LinearFit", "bag_summaries", "fit_linear", "log_losses", "logistic_path"]

Array = NDArray[np.float64]
ROWS_AT_ONCE = 4096
PENALTIES = (1.0, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
"""Of the mean loss, for features that are scaled so that a bag's have a mean square of 1 together."""
UNCHOSEN_PENALTY, UNCHOSEN_POOLING = 1e-2, "mean"
"""Where there are too few cases to choose by cross-validation."""
CLEARLY_BETTER = 0.5
"""Standard errors by which more numbers a bag must beat fewer, so that chance alone does not choose them."""


@dataclass(frozen=True)
class LinearFit:
    """A fitted linear model. penalties: one, or one for each of several targets.

    held_out: outputs (N, O) of the training bags from inner folds that left their case out, at the pooling and penalty
    chosen; None where there are too few cases for folds. losses: the mean inner loss of the best penalty by pooling.
    """

    model: LinearModel
    penalties: tuple[float, ...]
    held_out: Array | None
    losses: Mapping[str, float]

    @property
    def said(self) -> str:
        """What was chosen and why, in words."""
        chosen = (
            f"linear, {self.model.settings.pooling} of the tiles, penalty {', '.join(f'{p:g}' for p in self.penalties)}"
        )
        if self.held_out is None:
            return f"{chosen}: not chosen, since a class has fewer than two training cases that inner folds could use"
        found = ", ".join(f"{name} {loss:.3f}" for name, loss in self.losses.items())
        return f"{chosen} (loss of training cases left out in turn: {found})"


def fit_linear(
    store: ResidentStore,
    train: NDArray[np.int64],
    truth: NDArray[Any],
    cases: Sequence[str],
    settings: ModelSettings,
    target: Target,
    *,
    standardise: bool = True,
    seed: int = 0,
) -> LinearFit:
    """Fit a linear model to the bags ``train``; truth and cases are those of these bags.

    target: fitted to them; its loss is what the model is fitted by. The penalty is that of the least loss of bags whose
    case was left out, over at most five folds of cases; the pooling, where the settings leave it open, is the simplest
    that no other beats by ``CLEARLY_BETTER`` standard errors. seed: of the folds.
    """
    mean, std = store.moments(train)
    poolings = POOLINGS if settings.pooling == "auto" else (settings.pooling,)
    folds = target_folds(target, truth, cases, seed=seed)
    if folds is None and settings.pooling == "auto":
        poolings = (UNCHOSEN_POOLING,)
    values: dict[str, Array] = {}
    chosen: dict[str, tuple[tuple[float, ...], Array | None, float]] = {}
    for pooling in poolings:
        values[pooling] = bag_summaries(store, train, pooling, mean.cpu().numpy(), std.cpu().numpy(), standardise)
        chosen[pooling] = _choose_penalties(_rotated(values[pooling])[0], truth, target, folds)
    best = _simplest({name: found[1] for name, found in chosen.items()}, truth, target)
    penalties, held_out, _ = chosen[best]
    reduced, back, centre = _rotated(values[best])
    fits = [
        part.linear_path(reduced, own, PENALTIES[: PENALTIES.index(penalty) + 1])[-1]
        for (part, own), penalty in zip(_parts(target, truth), penalties, strict=True)
    ]
    weight, bias = (np.concatenate([fit[k] for fit in fits]) for k in range(2))
    weight = weight @ back
    module = LinearModel(replace(settings, pooling=best))
    if standardise:
        module.standardise(mean.cpu(), std.cpu())
    module.set_weights(torch.from_numpy(weight), torch.from_numpy(bias - weight @ centre))
    return LinearFit(module, penalties, held_out, {name: found[2] for name, found in chosen.items()})


def bag_summaries(
    store: ResidentStore, indices: NDArray[np.int64], pooling: str, mean: Array, std: Array, standardise: bool
) -> Array:
    """What ``LinearModel`` sees of bags, float64 (N, W), some bags at a time so that memory does not grow with them."""
    dim = store.dim
    module = LinearModel(ModelSettings(name="linear", in_dim=dim, pooling=pooling)).double()
    if standardise:
        module.standardise(torch.from_numpy(np.asarray(mean)), torch.from_numpy(np.asarray(std)))
    plan = plan_batches(store.lengths, indices, token_budget=ROWS_AT_ONCE, shuffle_seed=None)
    parts = (store.gather(chosen) for chosen in plan)
    return np.concatenate([module.pool(p.features.cpu().double(), p.offsets.cpu()).bag.numpy() for p in parts])


def _rotated(values: Array) -> tuple[Array, Array, Array]:
    """Values (N, W) as coordinates (N, R) in the directions in which the bags differ, R < N; (R, W) back; (W,) centre.

    Each value is divided by its deviation over the bags, so that the penalty treats all alike. The penalty does not
    mind a rotation, so few bags of many features are fitted as if they had no more features than bags. No label is
    looked at, so this is done once for all inner folds.
    """
    centre, spread = values.mean(axis=0), values.std(axis=0)
    # What differs only by rounding says nothing.
    constant = spread <= 1e-6 * np.maximum(np.abs(values).max(axis=0), 1e-30)
    scale = np.where(constant, 0.0, 1 / np.where(constant, 1.0, spread)) / np.sqrt(max(int((~constant).sum()), 1))
    left, size, right = np.linalg.svd((values - centre) * scale, full_matrices=False)
    kept = size > 1e-7 * max(float(size.max(initial=0.0)), 1e-30)
    return left[:, kept] * size[kept], right[kept] * scale, centre


def _simplest(held_out: Mapping[str, Array | None], truth: NDArray[Any], target: Target) -> str:
    """The first of the poolings, which come from simple to rich, whose loss none of the others clearly beats."""
    rows = {name: target.row_losses(z, truth) for name, z in held_out.items() if z is not None}
    if not rows:
        return next(iter(held_out))
    best = min(rows, key=lambda name: float(rows[name].mean()))
    for name, losses in rows.items():
        worse = losses - rows[best]
        if worse.mean() <= CLEARLY_BETTER * worse.std(ddof=1) / np.sqrt(len(worse)):
            return name
    return best


def _parts(target: Target, truth: NDArray[Any]) -> list[tuple[Target, NDArray[Any]]]:
    """A target and its truth, or those of each of several, which are fitted one by one."""
    return [(part, own) for part, own, _ in target.each(truth)] if isinstance(target, Several) else [(target, truth)]


def _choose_penalties(
    values: Array, truth: NDArray[Any], target: Target, folds: NDArray[np.int64] | None
) -> tuple[tuple[float, ...], Array | None, float]:
    """The penalty of the least held-out loss of each target, held-out outputs (N, O) at them, and their mean loss."""
    parts = _parts(target, truth)
    if folds is None:
        return (UNCHOSEN_PENALTY,) * len(parts), None, float("nan")
    found = [_choose_penalty(values, own, part, folds) for part, own in parts]
    outputs = np.concatenate([held_out for _, held_out, _ in found], axis=1)
    return tuple(penalty for penalty, *_ in found), outputs, float(np.mean([loss for *_, loss in found]))


def _choose_penalty(
    values: Array, truth: NDArray[Any], target: Target, folds: NDArray[np.int64]
) -> tuple[float, Array, float]:
    """The penalty of the least held-out loss, the held-out outputs (N, O) at it, and that loss."""
    held_out = target.linear_held_out(values, truth, folds, PENALTIES)
    losses = [float(target.row_losses(outputs, truth).mean()) for outputs in held_out]
    best = int(np.argmin(losses))
    return PENALTIES[best], held_out[best], losses[best]
