"""Attention for small cohorts: few weights, several networks averaged, stopped by folds inside the training cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrmil.config import ModelSettings, TrainSettings
from lrmil.model import MILModel
from lrmil.store import ResidentStore
from lrmil.targets import Target
from lrmil.trainer.inner import target_folds
from lrmil.trainer.replicas import Recipe, train_replicas, unstack

__all__ = ["SMALL_CASES", "SMALL_TILES", "SmallFit", "fit_small", "is_small"]

Array = NDArray[np.float64]
SMALL_CASES, SMALL_TILES = 200, 200_000
"""A training part with fewer cases, and no more tiles, is small."""
MEMBERS, REPEATS = 5, 2
PATIENCE = 4
"""Looks without a better loss of the bags left out after which all networks end."""
# In place of the values that are right for large cohorts, where these are left at their defaults.
IN_PLACE: Mapping[str, float] = {"epochs": 60, "learning_rate": 2e-3, "weight_decay": 1e-2}
MODEL_IN_PLACE: Mapping[str, float] = {"hidden": 32, "attention_dim": 16, "input_dropout": 0.1, "members": MEMBERS}


@dataclass(frozen=True)
class SmallFit:
    """Networks that were trained alike on all training bags.

    held_out: outputs (N, O) of the training bags, each the mean over networks that left its case out, at the epoch
    chosen; None where there are too few cases for folds. epoch: chosen. history: one row for each look;
    "inner_loss" is the mean over three looks of the loss of bags left out.
    """

    settings: ModelSettings
    members: tuple[MILModel, ...]
    held_out: Array | None
    epoch: int
    history: tuple[dict[str, float | None], ...]


def is_small(store: ResidentStore, train: NDArray[np.int64], cases: Sequence[str]) -> bool:
    """Whether a training part is small; cases: of its bags."""
    return len(set(cases)) < SMALL_CASES and int(store.lengths[train].sum()) <= SMALL_TILES


def small_settings(settings: TrainSettings, name: str) -> TrainSettings:
    """Settings with values for small cohorts wherever the large ones' defaults were left."""
    defaults, model_defaults = TrainSettings(), ModelSettings()
    own = {
        k: type(getattr(defaults, k))(v) for k, v in IN_PLACE.items() if getattr(settings, k) == getattr(defaults, k)
    }
    inner = {
        k: type(getattr(model_defaults, k))(v)
        for k, v in MODEL_IN_PLACE.items()
        if getattr(settings.model, k) == getattr(model_defaults, k)
    }
    return replace(settings, **own, model=replace(settings.model, name=name, linear_share=0.0, **inner))


def fit_small(
    store: ResidentStore,
    train: NDArray[np.int64],
    truth: NDArray[Any],
    cases: Sequence[str],
    settings: TrainSettings,
    target: Target,
    moments: tuple[Tensor, Tensor],
) -> SmallFit:
    """Train attention networks on a small cohort; settings: as from ``small_settings``; truth, cases: of ``train``.

    Beside the networks that see all cases, ``REPEATS`` times as many as there are inner folds are trained that each
    leave out a fold. The epoch is that of the least loss of the bags left out, whose logits are the mean of the
    networks that left them out; without folds it is the last.
    """
    model = settings.model
    kept = [target_folds(target, truth, cases, seed=settings.seed + 1000 * r) for r in range(REPEATS)]
    rows = [folds == k for folds in kept if folds is not None for k in range(int(folds.max()) + 1)]
    left_out = np.stack([*rows, *[np.zeros(len(train), bool)] * model.members])
    mean, std = moments
    scale = torch.where(std > 0, 1 / torch.where(std > 0, std, 1.0), 0.0)
    flat = (torch.zeros_like(mean), torch.ones_like(std))
    recipe = Recipe(settings.epochs, settings.learning_rate, settings.weight_decay, settings.clip_norm)
    losses: list[float] = []

    def enough(logits: Array) -> bool:
        if not rows:
            return False
        held_out = np.nanmean(logits[: len(rows)], axis=0)
        losses.append(float(target.row_losses(held_out, truth).mean()))
        return len(losses) - 1 - int(np.argmin(_smooth(losses))) >= PATIENCE

    found = train_replicas(
        store,
        train,
        truth,
        target,
        left_out,
        replace(model, members=1),
        recipe,
        (mean, scale) if settings.standardise else flat,
        settings.seed,
        enough,
    )
    best = int(np.argmin(_smooth(losses))) if rows else len(found.epochs) - 1
    held_out = np.nanmean(found.held_out[best, : len(rows)], axis=0) if rows else None
    members = tuple(
        unstack(
            found.stacks[best],
            len(rows) + i,
            replace(model, members=1),
            mean.cpu(),
            std.cpu() if settings.standardise else None,
        )
        for i in range(model.members)
    )
    smooth = _smooth(losses) if rows else np.empty(0)
    history = tuple(
        {
            "epoch": float(epoch),
            "train_loss": found.losses[epoch - 1],
            "inner_loss": float(smooth[i]) if rows else None,
        }
        for i, epoch in enumerate(found.epochs)
    )
    return SmallFit(model, members, held_out, found.epochs[best], history)


def _smooth(losses: Sequence[float]) -> Array:
    """Means of three neighbours: the least of a noisy curve lies where chance put it."""
    padded = np.pad(np.asarray(losses), 1, mode="edge")
    return np.asarray((padded[:-2] + padded[1:-1] + padded[2:]) / 3)
