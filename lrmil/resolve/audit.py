"""The same cases, folds and models at every resolution, and what they come to."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lrmil.checkpoint import no_nan
from lrmil.config import TrainSettings
from lrmil.errors import FiguresError, LabelError
from lrmil.experiment.cohort import Cohort, load_cohort, open_features
from lrmil.experiment.figures import PREDICTIONS_NAME, positive_class, read_predictions, write_json
from lrmil.experiment.folds import train_folds
from lrmil.resolve.cost import ArmCost, job_costs
from lrmil.resolve.verdict import Comparison, Fold, Verdict, compare_arms, decide, own_auc
from lrmil.splits import SPLITS_NAME, SplitTable, make_splits, read_splits
from lrmil.store import find_bags, inspect_bag
from wsi_pipe.geometry import level_label

__all__ = ["Arm", "Audit", "ModelAudit", "audit", "find_arms"]

Tell = Callable[[str], object]


@dataclass(frozen=True)
class Arm:
    """One resolution with one encoder. name: "5x", or "5x lr-net" where a resolution has several. slug: in bags."""

    name: str
    level: str
    mpp: float
    encoder: str
    slug: str

    @property
    def folder(self) -> str:
        """What its folder is called."""
        return re.sub(r"[^\w.-]+", "-", self.name)


@dataclass(frozen=True)
class ModelAudit:
    """One model at every resolution, finest first, and the verdict."""

    model: str
    comparisons: tuple[Comparison, ...]
    verdict: Verdict


@dataclass(frozen=True)
class Audit:
    """models: the first one's verdict is the audit's; the others are controls. costs: by arm's name, where known.

    slides, cases: that all arms share. margin: of the AUC.
    """

    margin: float
    slides: int
    cases: int
    arms: tuple[Arm, ...]
    costs: Mapping[str, ArmCost]
    models: tuple[ModelAudit, ...]

    @property
    def verdict(self) -> str:
        """In words, with what it costs, and whether the controls say something else."""
        first = self.models[0]
        text = first.verdict.text
        costs = {arm.level: self.costs[arm.name] for arm in reversed(self.arms) if arm.name in self.costs}
        finest = self.arms[0].level
        if first.verdict.kind == "enough" and {first.verdict.level, finest} <= costs.keys():
            own, all_of_it = costs[first.verdict.level].seconds, costs[finest].seconds
            text += f"; {own:.3g} s a slide against {all_of_it:.3g}"
        for control in self.models[1:]:
            if (control.verdict.kind, control.verdict.level) != (first.verdict.kind, first.verdict.level):
                text += f". With --model {control.model}: {control.verdict.text}"
        return text

    def to_json(self) -> dict[str, Any]:
        """JSON-able values; NaN becomes null."""
        plain: dict[str, Any] = no_nan(asdict(self) | {"verdict": self.verdict})
        return plain


def find_arms(bags: Path, resolutions: Sequence[float], encoders: Sequence[str]) -> tuple[Arm, ...]:
    """The arms, finest first. resolutions: um per pixel. encoders: NAME for all levels, LEVEL=NAME for one; none takes
    the bags' only or primary one at each level.

    Raises BagMismatchError where the first bag lacks one, FiguresError for fewer than two resolutions.
    """
    if len(set(map(level_label, resolutions))) < 2:
        raise FiguresError("an audit compares two resolutions or more", remedy="name them: -r 20x -r 5x")
    first = find_bags(bags)[0]
    found = []
    for mpp in sorted(set(resolutions)):
        label = level_label(mpp)
        names: list[str | None] = [e.partition("=")[2] for e in encoders if e.startswith(f"{label}=")]
        names = names or [e for e in encoders if "=" not in e] or [None]
        for name in names:
            info = inspect_bag(first, label, name)
            shown = label if len(names) == 1 else f"{label} {info.slug}"
            found.append(Arm(shown, label, mpp, info.encoder or name or "", info.slug))
    return tuple(found)


def _common(cohorts: Sequence[Cohort]) -> list[Cohort]:
    """The cohorts with the slides alone that all of them can use. Raises LabelError where there is none."""
    usable = [{c.store.slide_ids[i] for i in c.table.usable.tolist()} for c in cohorts]
    shared = set.intersection(*usable)
    if not shared:
        raise LabelError("no labelled slide has tiles at every resolution", remedy="check bags and labels")
    found = []
    for cohort in cohorts:
        rows = [i for i in cohort.table.usable.tolist() if cohort.store.slide_ids[i] in shared]
        table = dataclasses.replace(cohort.table, usable=np.array(rows, np.int64))
        found.append(dataclasses.replace(cohort, table=table))
    return found


def audit(
    bags: Path,
    labels: Path,
    arms: Sequence[Arm],
    out: Path,
    *,
    margin: float = 0.03,
    models: Sequence[str] = ("auto", "linear"),
    settings: TrainSettings | None = None,
    splits: SplitTable | None = None,
    folds: int = 5,
    positive: str | None = None,
    label_column: str | None = None,
    slide_table: Path | None = None,
    allow_seen: bool = False,
    allow_random: bool = False,
    say: Tell | None = None,
    progress: Callable[[str, Mapping[str, float | None]], object] | None = None,
    packing: Callable[[int, int], object] | None = None,
) -> Audit:
    """Train every model at every arm on the same folds of the slides that all arms have, and compare with the finest.

    out: gets ``splits.csv``, a folder ``ARM/MODEL`` for each run of ``train_folds``, ``audit.json`` and
    ``audit.png``; called again, trainings that are done are not repeated. splits: by default ``folds`` folds of the
    cases. Raises what ``train_folds`` and ``load_cohort`` do.
    """
    tell = say or (lambda text: None)
    cohorts = []
    for arm in arms:
        store = open_features(
            bags,
            level=arm.level,
            encoder=arm.encoder or None,
            store_dir=out / arm.folder / "store",
            allow_random=allow_random,
            progress=packing,
        )
        cohorts.append(load_cohort(store, labels, label_column=label_column, slide_table=slide_table))
    for note in dict.fromkeys(note for cohort in cohorts for note in cohort.notes(splits)):
        tell(note)
    cohorts = _common(cohorts)
    first = cohorts[0]
    sought = positive_class(first.table.classes, positive)
    split = splits or make_splits(first.table.case_labels(), folds)
    there = out / SPLITS_NAME
    if splits is None and there.is_file():
        split = read_splits(there)
    split.write(there)
    slides = [first.store.slide_ids[i] for i in first.table.usable.tolist()]
    found = []
    for model in models:
        base = settings or TrainSettings()
        own = dataclasses.replace(base, model=dataclasses.replace(base.model, name=model))
        tested: dict[str, list[Fold]] = {}
        for arm, cohort in zip(arms, cohorts, strict=True):
            tell(f"{arm.name}, {model}")
            run = out / arm.folder / model
            train_folds(cohort, split, list(split.folds), own, run, progress=progress, allow_seen=allow_seen, say=None)
            tested[arm.name] = [_tested(run / name) for name in split.folds]
        found.append(_judged(model, arms, tested, margin, sought))
    costs = {arm.name: cost for arm in arms if (cost := job_costs(bags, slides, arm.level, arm.slug)) is not None}
    cases = len({first.table.case_ids[i] for i in first.table.usable.tolist()})
    result = Audit(margin, len(slides), cases, tuple(arms), costs, tuple(found))
    write_json(out / "audit.json", result.to_json())
    _draw(out / "audit.png", result)
    return result


def _tested(folder: Path) -> Fold:
    """What a fold's model says of its test slides, in the order of their ids, so that arms can be paired."""
    p = read_predictions(folder / PREDICTIONS_NAME)
    order = np.argsort(np.array(p.slide_ids))
    return p.labels[order], p.probabilities[order], [p.case_ids[i] for i in order.tolist()]


def _judged(
    model: str, arms: Sequence[Arm], tested: Mapping[str, Sequence[Fold]], margin: float, positive: int
) -> ModelAudit:
    finest = arms[0]
    alone = own_auc(tested[finest.name], positive)
    cases = len({case for _, _, ids in tested[finest.name] for case in ids})
    rows = [
        Comparison(
            finest.name, finest.level, alone.value, alone.low, alone.high, 0.0, 0.0, 0.0, 0.0, cases, "reference",
            reason=alone.reason,
        )
    ]  # fmt: skip
    for arm in arms[1:]:
        count = sum(other.level == arm.level for other in arms)
        rows.append(
            compare_arms(
                arm.name, arm.level, tested[arm.name], tested[finest.name], margin, positive=positive, of=count
            )
        )
    return ModelAudit(model, tuple(rows), decide(rows, margin))


def _draw(path: Path, result: Audit) -> None:
    from lrmil.pictures.resolve import Point, draw_audit

    groups = {}
    for own in result.models:
        points = []
        for arm, c in zip(result.arms, own.comparisons, strict=True):
            cost = result.costs.get(arm.name)
            seconds = cost.seconds if cost else float("nan")
            points.append(Point(arm.name, seconds, c.auc, c.low_auc, c.high_auc, c.state))
        groups[own.model] = points
    draw_audit(path, groups, result.margin)
