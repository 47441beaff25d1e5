"""From a run to a fitted model: by gradient steps, or as a linear model in closed terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from lrmil.model import MILModel, build_model
from lrmil.store import ResidentStore
from lrmil.trainer.compute import threads_for
from lrmil.trainer.linear import fit_linear
from lrmil.trainer.loop import EpochFigures, Run, fit
from lrmil.trainer.steps import Step

__all__ = ["Fitted", "fit_model"]


@dataclass(frozen=True)
class Fitted:
    """A model in evaluation mode. history, best_epoch: of its gradient steps, empty and 0 where there were none.

    choice: what was chosen inside the training cases, for the model's card: "said" in words, and figures.
    """

    model: MILModel
    history: tuple[EpochFigures, ...] = ()
    best_epoch: int = 0
    choice: Mapping[str, Any] = field(default_factory=dict)


def fit_model(run: Run, step: Step, cases: Sequence[str], class_weights: Tensor) -> Fitted:
    """Fit the model that the settings name to the training bags of a run.

    step: the loss of a batch, for models that are trained by gradient steps. cases: of every bag of the store.
    class_weights: (C,). Random numbers are torch's.
    """
    if run.settings.model.name == "linear":
        return _linear(run, cases, class_weights)
    return _by_steps(run, step)


def _by_steps(run: Run, step: Step) -> Fitted:
    settings = run.settings
    model = build_model(settings.model).to(run.store.device)
    if settings.standardise:
        model.standardise(*run.store.moments(run.split.train))
    rows = min(settings.token_budget, settings.max_bags * float(run.store.lengths[run.split.train].mean()))
    with threads_for(2.0 * rows * settings.model.in_dim * settings.model.hidden):
        state = fit(model, step, run)
    return Fitted(model.eval(), tuple(state.history), state.best_epoch)


def _linear(run: Run, cases: Sequence[str], class_weights: Tensor) -> Fitted:
    train = run.split.train
    # From the features as stored, whatever type other models compute in.
    exact = ResidentStore.of(run.store.store, run.store.device, place="mapped")
    with threads_for(2.0 * len(train) * min(len(train), run.settings.model.in_dim) * run.settings.model.classes):
        found = fit_linear(
            exact,
            train,
            run.labels[train],
            [cases[i] for i in train.tolist()],
            run.settings.model,
            np.asarray(class_weights.tolist()),
            standardise=run.settings.standardise,
            seed=run.settings.seed,
        )
    choice = {"said": found.said, "penalty": found.penalty, "losses": dict(found.losses)}
    return Fitted(found.model.to(run.store.device).eval(), choice=choice)
