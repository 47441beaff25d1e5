"""From a run to a fitted model: by gradient steps, in closed terms, or what inner cross-validation prefers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrmil.config import AUTO_ATTENTION, SMALL_MODELS, ModelSettings
from lrmil.errors import SettingsError
from lrmil.model import MILModel, build_model
from lrmil.model.ensemble import Ensemble
from lrmil.store import ResidentStore
from lrmil.targets import Classification
from lrmil.trainer.choice import Choice, choose_share
from lrmil.trainer.compute import bag_logits, threads_for
from lrmil.trainer.linear import LinearFit, fit_linear
from lrmil.trainer.loop import EpochFigures, Run, fit
from lrmil.trainer.small import SMALL_CASES, SMALL_TILES, SmallFit, fit_small, is_small, small_settings
from lrmil.trainer.steps import Step

__all__ = ["Fitted", "fit_model"]

LEAST_VAL = 50
"""Validation cases with which a model of a large cohort is chosen by them."""


@dataclass(frozen=True)
class Fitted:
    """A model in evaluation mode. history, best_epoch: of its gradient steps, empty and 0 where there were none.

    choice: what was chosen inside the training cases, for the model's card: "said" in words, and figures.
    """

    model: MILModel
    history: tuple[EpochFigures, ...] = ()
    best_epoch: int = 0
    choice: Mapping[str, Any] = field(default_factory=dict)


def fit_model(run: Run, step: Step, cases: Sequence[str], *, taught: bool = False) -> Fitted:
    """Fit the model that the settings name to the training bags of a run.

    step: the loss of a batch, for models that are trained by gradient steps. cases: of every bag of the store.
    taught: whether the step asks a teacher, which only gradient steps can. Random numbers are
    torch's.
    """
    name, train = run.settings.model.name, run.split.train
    own = [cases[i] for i in train.tolist()]
    # A linear model and inner folds see the features as stored, whatever type the loop computes in.
    exact = ResidentStore.of(run.store.store, run.store.device, place="mapped")
    # Networks of small cohorts are trained together through their projections.
    small = run.settings.small_cohorts == "auto" and run.settings.model.projection and not taught
    small = small and is_small(exact, train, own)
    if name == "linear":
        return _fitted(_linear(run, exact, own))
    if name in SMALL_MODELS and small:
        found = _small(run, exact, own, name)
        return Fitted(_averaged(found, run), found.history, found.epoch, {"said": _said(found)})
    if name != "auto":
        return _by_steps(run, step)
    if taught:
        fitted = _by_steps(_named(run, AUTO_ATTENTION), step)
        return replace(fitted, choice={"said": f"auto took {AUTO_ATTENTION}: a student needs attention and steps"})
    linear = _linear(run, exact, own)
    if not small:
        return _large(run, step, linear, cases)
    found = _small(run, exact, own, AUTO_ATTENTION)
    if linear.held_out is None or found.held_out is None:
        return _fitted(linear)
    y = run.labels[train]
    choice = choose_share(linear.held_out, found.held_out, y, run.goal, AUTO_ATTENTION)
    where = f"{len(y)} training slides of {len(set(own))} cases, each left out in turn"
    return _chosen(choice, linear, found.members, found.settings, run, where, found.history, found.epoch)


def _named(run: Run, name: str) -> Run:
    return replace(run, settings=replace(run.settings, model=replace(run.settings.model, name=name)))


def _by_steps(run: Run, step: Step) -> Fitted:
    settings = run.settings
    if settings.model.members > 1 or settings.model.linear_share > 0:
        raise SettingsError(
            f"{settings.model.members} members and a linear share of {settings.model.linear_share:g} are for small "
            f"cohorts of {' or '.join(SMALL_MODELS)}: fewer than {SMALL_CASES} training cases, {SMALL_TILES:,} tiles",
            remedy="leave both out",
        )
    model = build_model(settings.model).to(run.store.device)
    if settings.standardise:
        model.standardise(*run.store.moments(run.split.train))
    rows = min(settings.token_budget, settings.max_bags * float(run.store.lengths[run.split.train].mean()))
    with threads_for(2.0 * rows * settings.model.in_dim * settings.model.hidden):
        state = fit(model, step, run)
    return Fitted(model.eval(), tuple(state.history), state.best_epoch)


def _linear(run: Run, exact: ResidentStore, cases: Sequence[str]) -> LinearFit:
    train, model = run.split.train, replace(run.settings.model, name="linear", members=1, linear_share=0.0)
    with threads_for(2.0 * len(train) * min(len(train), model.in_dim) * model.classes):
        return fit_linear(
            exact,
            train,
            run.labels[train],
            cases,
            model,
            run.goal,
            standardise=run.settings.standardise,
            seed=run.settings.seed,
        )


def _fitted(found: LinearFit) -> Fitted:
    choice = {
        "said": found.said,
        "penalty": found.penalties[0] if len(found.penalties) == 1 else list(found.penalties),
        "losses": dict(found.losses),
        "linear_share": 1.0,
    }
    return Fitted(found.model.eval(), choice=choice)


def _small(run: Run, exact: ResidentStore, cases: Sequence[str], name: str) -> SmallFit:
    train, settings = run.split.train, small_settings(run.settings, name)
    tiles = float(exact.lengths[train].mean()) * len(train) / 6
    with threads_for(2.0 * tiles * settings.model.in_dim * settings.model.hidden):
        return fit_small(exact, train, run.labels[train], cases, settings, run.goal, exact.moments(train))


def _said(found: SmallFit) -> str:
    model = found.settings
    text = f"{model.name} of width {model.hidden} for a small cohort, {model.members} networks averaged"
    if found.held_out is None:
        return f"{text}, {found.epoch} epochs: a class has too few cases for inner folds to choose"
    return f"{text}, {found.epoch} epochs by inner folds"


def _averaged(found: SmallFit, run: Run) -> MILModel:
    if len(found.members) == 1:
        return found.members[0].to(run.store.device).eval()
    return Ensemble(found.settings, list(found.members)).to(run.store.device).eval()


def _large(run: Run, step: Step, linear: LinearFit, cases: Sequence[str]) -> Fitted:
    """Attention as ever, and a linear model beside it; the validation bags, which stop the training, choose."""
    attention = _by_steps(_named(run, AUTO_ATTENTION), step)
    val = run.split.val
    y = run.labels[val]
    present = {cases[i] for i in val.tolist()}
    strata, groups = run.goal.strata(y) if len(y) else ((), y)
    if len(present) < LEAST_VAL or (isinstance(run.goal, Classification) and len(set(groups.tolist())) < len(strata)):
        said = f"auto took {AUTO_ATTENTION}: {len(present)} validation cases are too few to choose by them"
        return replace(attention, choice={"said": said, "linear_share": 0.0})
    exact = ResidentStore.of(run.store.store, run.store.device, place="mapped")
    scores: list[NDArray[np.float64]] = []
    for model in (linear.model.to(run.store.device).eval(), attention.model):
        logits = bag_logits(model, exact, val, token_budget=run.settings.token_budget)
        scores.append(logits.double().numpy())
    choice = choose_share(scores[0], scores[1], y, run.goal, AUTO_ATTENTION, weighted=False)
    where = f"{len(y)} validation slides of {len(present)} cases"
    settings = replace(attention.model.settings, pooling=linear.model.settings.pooling)
    return _chosen(
        choice, linear, (attention.model,), settings, run, where, attention.history, attention.best_epoch
    )  # fmt: skip


def _chosen(
    choice: Choice,
    linear: LinearFit,
    members: Sequence[MILModel],
    settings: ModelSettings,
    run: Run,
    where: str,
    history: tuple[EpochFigures, ...],
    epoch: int,
) -> Fitted:
    card = {
        "said": choice.said(AUTO_ATTENTION, where),
        "linear_share": choice.share,
        "figures": {name: dict(found) for name, found in choice.figures.items()},
        "linear": linear.said,
    }
    if choice.share == 1:
        return Fitted(linear.model.to(run.store.device).eval(), choice=card)
    if choice.share == 0 and len(members) == 1:
        return Fitted(members[0].to(run.store.device).eval(), history, epoch, card)
    settings = replace(settings, linear_share=choice.share, pooling=linear.model.settings.pooling)
    model = Ensemble(settings, list(members), linear.model if choice.share > 0 else None)
    return Fitted(model.to(run.store.device).eval(), history, epoch, card)
