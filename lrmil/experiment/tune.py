"""Settings by search, inside the training cases of one fold: no validation or test case of the fold is ever read.

The training cases are divided into inner folds, stratified and by case. A trial is a set of settings; its figure is
the mean over inner folds of what a model of the other inner folds reaches on this one. *Random* search gives every
trial all inner folds (Bergstra and Bengio, Random search for hyper-parameter optimization, 2012); *halving* gives all
of them the first, the better half the second as well, and so on (Jamieson and Talwalkar, Non-stochastic best arm
identification and hyperparameter optimization, 2016, with inner folds as the resource).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lrmil.checkpoint import no_nan
from lrmil.config import deciding
from lrmil.errors import ResumeError, SettingsError, SplitError
from lrmil.experiment.cohort import Cohort
from lrmil.experiment.search_space import SearchSpace
from lrmil.metrics import LOWER_IS_BETTER, figures
from lrmil.splits import FoldIndices, SplitTable, make_splits
from lrmil.store import ResidentStore
from lrmil.trainer import choose_device, choose_precision, train
from wsi_pipe.config import dump_toml, fingerprint
from wsi_pipe.errors import ConfigError
from wsi_pipe.files import parse_json, write_text_atomically
from wsi_pipe.seen import case_mark
from wsi_pipe.tables import csv_text

__all__ = ["METHODS", "Trial", "TuneResult", "TuneSettings", "tune_fold"]

METHODS = ("random", "halving")
TRIALS_NAME = "trials.json"
TABLE_NAME = "trials.csv"
VAL_FRACTION = 0.2

Say = Callable[[str], object]


@dataclass(frozen=True)
class TuneSettings:
    """How is searched. trials: sets of settings, those to start from among them. metric: a figure of
    ``lrmil.metrics``, or "loss". seed: of the draws and of the inner folds."""

    method: str = "random"
    trials: int = 20
    inner_folds: int = 3
    metric: str = "loss"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"method {self.method!r} must be one of {', '.join(METHODS)}")
        if self.trials < 2 or self.inner_folds < 2:
            raise ConfigError(f"{self.trials} trials and {self.inner_folds} inner folds: both must be at least 2")

    def rungs(self, trials: int) -> list[int]:
        """How many trials are given each inner fold."""
        if self.method == "random":
            return [trials] * self.inner_folds
        return [max(math.ceil(trials / 2**rung), min(2, trials)) for rung in range(self.inner_folds)]


@dataclass
class Trial:
    """A set of settings, as changes to those that the search starts from, and its figure on each inner fold so far."""

    changes: tuple[str, ...]
    figures: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Over the inner folds it was given; NaN before the first."""
        return float(np.mean(self.figures)) if self.figures else math.nan


@dataclass(frozen=True)
class TuneResult:
    """best, first: the trial that was chosen, and the settings that the search started from. toml: None where only the
    cost was asked for. trainings, seconds: how many models the whole search is, and what it takes, estimated."""

    best: Trial | None
    first: Trial
    trials: tuple[Trial, ...]
    toml: Path | None
    trainings: int
    seconds: float


def tune_fold(
    cohort: Cohort,
    splits: SplitTable,
    fold: str,
    space: SearchSpace,
    settings: TuneSettings,
    out: Path,
    *,
    cost_only: bool = False,
    say: Say = str,
) -> TuneResult:
    """Search settings on the training cases of a fold; ``out/<fold>.toml`` is what ``lrmil train --config`` reads.

    ``out/<fold>`` gets every trial, after each training, so that an interrupted search goes on. The cost of the whole
    is told to ``say`` after the first training, before the others; cost_only: and then it ends.

    Raises ResumeError when the folder holds a search of other settings or cases, SplitError when a class has too few
    training cases for the inner folds, SettingsError when the figure is undefined on an inner fold, and as
    ``lrmil.trainer.train`` does.
    """
    name = splits.fold_name(fold)
    own = cohort.fold(splits, name).train
    cases = np.array(cohort.table.case_ids)
    inner = _inner_folds(cohort, own, settings)
    trials = [Trial(changes) for changes in space.trials(settings.trials, settings.seed)]
    parts = [[one.train.tolist(), one.val.tolist(), one.test.tolist()] for one in inner]
    mark = fingerprint(
        deciding(space.base), [repr(axis) for axis in space.axes], settings.method, len(trials), settings.inner_folds,
        settings.metric, settings.seed, cohort.store.content_hash, parts, cohort.table.labels[own].tolist(),
        list(cohort.table.classes),
    )  # fmt: skip
    path = out / name / TRIALS_NAME
    _resume(path, mark, trials)
    device = choose_device(space.base.device)
    resident = ResidentStore.of(cohort.store, device, choose_precision(space.base.precision, device))
    rungs = settings.rungs(len(trials))
    total = sum(rungs)
    better = min if settings.metric in LOWER_IS_BETTER else max

    def given(trial: Trial, rung: int) -> None:
        if len(trial.figures) > rung:
            return
        began = time.perf_counter()
        trial.figures.append(_figure(cohort, resident, inner[rung], space, trial, settings.metric))
        trial.seconds.append(time.perf_counter() - began)
        _keep(path, mark, trials)

    running = list(trials)
    for rung, count in enumerate(rungs):
        # The settings to start from stay to the end: what is found must be better than they are.
        ranked = sorted(running, key=lambda trial: trial.mean, reverse=better is max) if rung else running
        kept = ranked[:count]
        running = kept if trials[0] in kept else [trials[0], *kept[: count - 1]]
        for trial in running:
            done = sum(len(one.figures) for one in trials)
            known = len(trial.figures) > rung
            given(trial, rung)
            if trial is trials[0] and rung == 0:
                seconds = trials[0].seconds[0] * total
                left = max(total - max(done, 1), 0) * trials[0].seconds[0]
                say(
                    f"{name}: {len(trials)} trials on {settings.inner_folds} inner folds of {len(set(cases[own]))} "
                    f"training cases are {total} trainings; the first took {trials[0].seconds[0]:.1f} s, so about "
                    f"{_minutes(seconds)}, {_minutes(left)} of it to come"
                )
                if cost_only:
                    return TuneResult(None, trials[0], tuple(trials), None, total, seconds)
            if not known:
                say(f"{name}: {done + 1}/{total} {settings.metric} {trial.figures[rung]:.4f}: {_words(trial)}")
    finished = [trial for trial in running if len(trial.figures) == settings.inner_folds]
    best = better(finished, key=lambda trial: trial.mean)
    # Of equals, the settings to start from.
    best = trials[0] if trials[0].mean == best.mean else best
    toml = out / f"{name}.toml"
    marks = sorted({case_mark(case) for case in cases[own].tolist()})
    write_text_atomically(toml, _toml(space, settings, best, trials[0], name, marks))
    write_text_atomically(out / name / TABLE_NAME, _table(trials, settings))
    say(
        f"{name}: chose {_words(best)}: {settings.metric} {best.mean:.4f} over the inner folds, {trials[0].mean:.4f} "
        f"of the settings as they were; for lrmil train --fold {name.removeprefix('fold_')} --config {toml}"
    )
    return TuneResult(best, trials[0], tuple(trials), toml, total, trials[0].seconds[0] * total)


def _inner_folds(cohort: Cohort, own: np.ndarray[Any, np.dtype[np.int64]], settings: TuneSettings) -> list[FoldIndices]:
    """Inner folds as places of bags of the whole store, all among ``own``."""
    labels: dict[str, str] = {}
    for i in own.tolist():
        labels[cohort.table.case_ids[i]] = cohort.table.classes[int(cohort.table.labels[i])]
    try:
        table = make_splits(labels, settings.inner_folds, settings.seed, VAL_FRACTION)
    except SplitError as error:
        raise SplitError(
            f"inside the training cases: {error.message}", remedy="give fewer --inner-folds, or more cases"
        ) from error
    slides, cases = cohort.store.slide_ids, cohort.table.case_ids
    wanted = set(own.tolist())
    found = []
    for name in table.folds:
        parts = table.indices(name, slides, cases)
        train_part, val, test = (
            np.array([i for i in part.tolist() if i in wanted], np.int64)
            for part in (parts.train, parts.val, parts.test)
        )
        found.append(FoldIndices(train_part, val, test))
    return found


def _figure(
    cohort: Cohort, resident: ResidentStore, split: FoldIndices, space: SearchSpace, trial: Trial, metric: str
) -> float:
    """What a model of these settings reaches on one inner fold."""
    result = train(resident, cohort.table, split, space.settings(trial.changes))
    rows = [p for p in result.predictions if p.part == "test"]
    probabilities = result.card.probabilities([p.logits for p in rows])
    value = figures([p.label for p in rows], probabilities)[metric]
    if math.isnan(value):
        raise SettingsError(f"{metric} is undefined on an inner fold", remedy="search by the loss: --metric loss")
    return value


def _resume(path: Path, mark: str, trials: Sequence[Trial]) -> None:
    """Fill in what an earlier call has found."""
    if not path.is_file():
        return
    try:
        held = parse_json(path.read_text(encoding="utf-8"))
        same = held["search"] == mark and [tuple(one["changes"]) for one in held["trials"]] == [
            trial.changes for trial in trials
        ]
        rows = [(list(map(float, one["figures"])), list(map(float, one["seconds"]))) for one in held["trials"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResumeError(f"{path} cannot be read: {error}", remedy="delete it to search anew") from error
    if not same:
        raise ResumeError(
            f"{path} is a search of other settings, cases or features", remedy="give another --out, or delete it"
        )
    for trial, (found, seconds) in zip(trials, rows, strict=True):
        trial.figures, trial.seconds = found, seconds


def _keep(path: Path, mark: str, trials: Sequence[Trial]) -> None:
    rows = [{"changes": list(t.changes), "figures": t.figures, "seconds": t.seconds} for t in trials]
    write_text_atomically(path, json.dumps(no_nan({"search": mark, "trials": rows}), indent=1) + "\n")


def _toml(
    space: SearchSpace, settings: TuneSettings, best: Trial, first: Trial, fold: str, marks: Sequence[str]
) -> str:
    """The settings, and below them whose cases they were chosen on, which ``lrmil train`` checks."""
    said = f"{settings.metric} {best.mean:.4f} over {settings.inner_folds} inner folds; as they were {first.mean:.4f}"
    head = f"# Chosen by lrmil tune on the training cases of {fold}, for that fold alone.\n"
    # Words and marks are plain ASCII without quotes, so that they are TOML as they stand.
    tuned = f'\n[tuned]\nfold = "{fold}"\nsaid = "{said}"\ncases = {json.dumps(list(marks))}\n'
    return head + dump_toml(space.settings(best.changes)) + tuned


def _table(trials: Sequence[Trial], settings: TuneSettings) -> str:
    names = [f"{settings.metric}_inner_{i + 1}" for i in range(settings.inner_folds)]
    rows = []
    for trial in trials:
        values = [f"{value:.6g}" for value in trial.figures]
        rows.append([_words(trial), f"{trial.mean:.6g}", *values, *[""] * (len(names) - len(values))])
    return csv_text(["settings", f"{settings.metric}_mean", *names], rows)


def _words(trial: Trial) -> str:
    return " ".join(trial.changes) or "the settings as they were"


def _minutes(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
