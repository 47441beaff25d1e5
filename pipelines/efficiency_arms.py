"""The arms: ways to classify slides from the labels of few training cases, all with the same cases and settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrmil.config import TrainSettings
from lrmil.metrics import softmax
from lrmil.splits import FoldIndices
from lrmil.store import FeatureStore, ResidentStore
from lrmil.trainer import TrainResult, train
from lrmil.trainer.targets import teacher_targets
from pipelines.efficiency_features import CohortFeatures, thinned
from pipelines.efficiency_settings import EfficiencySettings, EndToEndSettings
from pipelines.end_to_end import train_end_to_end
from wsi_pipe.errors import ConfigError

__all__ = ["ARMS", "CONTROLS", "Parts", "arms_at", "linear_model", "run_arms"]

HR, HR_FEW, HR_LINEAR = "HR", "HR, LR's number of tiles", "HR, linear"
LR_LINEAR, LR, END_TO_END = "LR, linear", "LR", "LR, end to end"
LONGER = "LR, end to end, longer"
STAGE2, STAGE1, STAGE1_LINEAR, BOTH = "LR, stage 2 alone", "LR, stage 1", "LR, stage 1, linear", "LR, stages 1 and 2"
TUNED, TAUGHT, TUNED_BOTH = "LR, stage 1, fine-tuned", "LR, stage 2, end to end", "LR, stages 1 and 2, fine-tuned"
CONTROLS = (TUNED, TAUGHT)
"""Run at ``controls_at`` labelled cases alone."""
ARMS = (
    HR,
    HR_LINEAR,
    HR_FEW,
    LR_LINEAR,
    LR,
    END_TO_END,
    LONGER,
    STAGE2,
    STAGE1,
    STAGE1_LINEAR,
    BOTH,
    TUNED,
    TAUGHT,
    TUNED_BOTH,
)


def arms_at(settings: EfficiencySettings, count: int) -> tuple[str, ...]:
    """The arms that are run with ``count`` labelled cases. Raises ConfigError for a name that is none."""
    unknown = [arm for arm in settings.arms if arm not in ARMS]
    if unknown:
        raise ConfigError(f"no arm is called {unknown[0]!r}", remedy=f"known ones are: {'; '.join(ARMS)}")
    return tuple(
        arm
        for arm in ARMS
        if (not settings.arms or arm in settings.arms or arm == HR)
        and (arm not in CONTROLS or count in settings.controls_at)
        and (arm != LONGER or settings.longer_steps)
    )


NOBODY = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Parts:
    """Rows of the stores. train, val: labelled, parted to choose a tile size alone. hidden: training cases whose
    labels are not seen. test: never seen."""

    train: NDArray[np.int64]
    val: NDArray[np.int64]
    hidden: NDArray[np.int64]
    test: NDArray[np.int64]

    @property
    def labelled(self) -> NDArray[np.int64]:
        """Rows of ``train`` and ``val``."""
        return np.sort(np.concatenate([self.train, self.val]))

    def fold(self, *, more: NDArray[np.int64] | None = None, hidden: bool = False) -> FoldIndices:
        """For the trainer, which learns from all labelled cases: so few choose an epoch worse than a fixed number does.

        more: rows to predict beside those of the test part. hidden: learn from the hidden cases as well.
        """
        test = self.test if more is None else np.concatenate([self.test, more])
        train = np.concatenate([self.labelled, self.hidden]) if hidden else self.labelled
        return FoldIndices(train, NOBODY, test)


def linear_model(
    store: FeatureStore, labels: NDArray[np.int64], parts: Parts, settings: EfficiencySettings, seed: int
) -> tuple[NDArray[np.float64], float]:
    """Logistic regression on each slide's mean features: probabilities (test, C) and the loss in cross-validation.

    The penalty is chosen by cross-validation over the labelled cases; each case has one slide.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x = _summaries(store, settings.linear_spread)
    rows = parts.labelled
    folds = StratifiedKFold(min(5, int(np.bincount(labels[rows]).min())), shuffle=True, random_state=seed)
    losses = []
    for c in settings.c_grid:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=c, class_weight="balanced", max_iter=2000))
        scores = cross_val_score(model, x[rows], labels[rows], cv=folds, scoring="neg_log_loss")
        losses.append(-float(scores.mean()))
    chosen = settings.c_grid[int(np.argmin(losses))]
    model = make_pipeline(StandardScaler(), LogisticRegression(C=chosen, class_weight="balanced", max_iter=2000))
    model.fit(x[rows], labels[rows])
    return np.asarray(model.predict_proba(x[parts.test]), np.float64), min(losses)


def _summaries(store: FeatureStore, spread: bool) -> NDArray[np.float64]:
    bags = [np.asarray(store.bag(i), np.float64) for i in range(len(store))]
    means = np.stack([bag.mean(0) for bag in bags])
    return np.hstack([means, np.stack([bag.std(0) for bag in bags])]) if spread else means


def run_arms(
    features: CohortFeatures,
    labels: NDArray[np.int64],
    parts: Parts,
    settings: EfficiencySettings,
    seed: int,
    *,
    arms: Sequence[str] = ARMS,
    say: Callable[[str], object] = lambda text: None,
) -> dict[str, dict[str, Any]]:
    """By arm: "probabilities" of the test cases and, for choices that were made, what was chosen.

    labels: of all slides; those of ``parts.hidden`` and ``parts.test`` are not read by any arm.
    """
    known = np.zeros(len(labels), np.int64)
    known[parts.labelled] = labels[parts.labelled]
    names = settings.cohort.classes
    plain = settings.plain()
    found: dict[str, dict[str, Any]] = {}

    def mil(
        store: FeatureStore, fold: FoldIndices, how: TrainSettings, table: NDArray[np.int64], **teacher: Any
    ) -> TrainResult:
        return train(store, table, fold, dataclasses.replace(how, seed=seed), classes=names, **teacher)

    def keep(arm: str, probabilities: NDArray[np.float64], **facts: Any) -> None:
        found[arm] = {"probabilities": np.round(probabilities, 6).tolist(), **facts}
        say(arm)

    master = mil(features.hr, parts.fold(more=parts.hidden), plain, known)
    logits = np.array([p.logits for p in master.predictions if p.part == "test"])
    keep(HR, softmax(logits[: len(parts.test)]))
    # Teacher's classes of the slides whose labels are hidden: what stage 2 takes for labels there.
    pseudo = known.copy()
    pseudo[parts.hidden] = logits[len(parts.test) :].argmax(1)
    for arm, stores in (
        (HR_LINEAR, {0: features.hr}),
        (LR_LINEAR, features.lr),
        (STAGE1_LINEAR, {0: features.distilled}),
    ):
        if arm in arms:
            tried = {side: linear_model(store, known, parts, settings, seed) for side, store in stores.items()}
            side = min(tried, key=lambda s: tried[s][1])
            keep(arm, tried[side][0], tile_px=side or settings.tile_px)
    if HR_FEW in arms:
        few = thinned(features.hr, features.lr[settings.tile_px].lengths, seed)
        keep(HR_FEW, _probabilities(mil(few, parts.fold(), plain, known)))
    if LR in arms:
        choice = FoldIndices(parts.train, NOBODY, parts.val)
        tried_losses = {side: _loss(mil(store, choice, plain, known)) for side, store in features.lr.items()}
        side = min(tried_losses, key=lambda s: tried_losses[s])
        keep(LR, _probabilities(mil(features.lr[side], parts.fold(), plain, known)), tile_px=side)
    if STAGE1 in arms:
        keep(STAGE1, _probabilities(mil(features.distilled, parts.fold(), plain, known)))
    taught = dataclasses.replace(settings.mil, loss=settings.student_loss)
    fold = parts.fold(hidden=settings.stage2_unlabelled)
    undistilled = features.lr[settings.tile_px]
    for arm, store in ((STAGE2, undistilled), (BOTH, features.distilled)):
        if arm in arms:
            result = mil(store, fold, taught, pseudo, teacher=master.model, hr_store=features.hr)
            keep(arm, _probabilities(result))

    def end_to_end(arm: str, student: str | Path, taught: bool, how: EndToEndSettings) -> None:
        if arm not in arms:
            return
        learned = fold.train if taught else parts.labelled
        targets = None
        if taught:
            stores = (ResidentStore.of(features.hr, "cpu"), ResidentStore.of(undistilled, "cpu"))
            targets = teacher_targets(
                master.model, *stores, learned, attention=True, token_budget=settings.mil.token_budget
            )
        probabilities = train_end_to_end(
            features.tiles, pseudo if taught else known, learned.tolist(), parts.test.tolist(), classes=names,
            student=student, head=settings.mil.model, settings=how, seed=seed, targets=targets,
            loss=settings.student_loss if taught else None,
        )  # fmt: skip
        keep(arm, probabilities)

    how = settings.end_to_end
    end_to_end(END_TO_END, settings.student, False, how)
    end_to_end(TUNED_BOTH, features.student, True, how)
    end_to_end(TUNED, features.student, False, how)
    end_to_end(TAUGHT, settings.student, True, how)
    if settings.longer_steps:
        end_to_end(LONGER, settings.student, False, dataclasses.replace(how, steps=settings.longer_steps))
    return found


def _probabilities(result: TrainResult) -> NDArray[np.float64]:
    """Of the test bags, from logits: calibration changes no order."""
    return np.asarray(softmax(np.array([p.logits for p in result.predictions if p.part == "test"])), np.float64)


def _loss(result: TrainResult) -> float:
    """Mean cross-entropy of the bags that were predicted."""
    own = [p for p in result.predictions if p.part == "test"]
    p = softmax(np.array([x.logits for x in own]))
    return float(-np.log(np.maximum(p[np.arange(len(own)), [x.label for x in own]], 1e-12)).mean())
