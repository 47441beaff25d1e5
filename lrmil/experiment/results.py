"""Figures of the LRMIL experiment: accuracy of the arms, and cost at inference."""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lrmil.distill import DistillResult
from lrmil.errors import FiguresError
from lrmil.experiment.figures import PREDICTIONS_NAME, FoldPredictions, fold_folders, read_predictions
from lrmil.experiment.settings import ExperimentSettings
from lrmil.metrics import Difference, Estimate, compare, evaluate, evaluate_folds
from lrmil.metrics import figures as fold_figures
from wsi_pipe.benchmark.analysis import totals
from wsi_pipe.benchmark.measure import run_benchmark
from wsi_pipe.config import ExtractSettings
from wsi_pipe.manifest import SlideEntry

__all__ = ["Arm", "Results", "measure_cost", "summarise"]


@dataclass(frozen=True)
class Arm:
    """A way to classify slides. level: whose tiles it reads. encoder: what computes their features. run: its folds.
    cost_of: the arm whose cost it has, "" where it is its own. tiles: a slide on average, where no cost is measured."""

    name: str
    level: str
    encoder: str
    run: Path
    cost_of: str = ""
    tiles: float | None = None


@dataclass(frozen=True)
class Results:
    """What the experiment found.

    figures: by arm, means over the folds' test sets. Folds are not pooled for them: each has a model of its own, whose
    probabilities need not compare with another's, and a model that failed would pass unseen among the others. pooled:
    by arm, the same over all test predictions together. fold_auc: arm -> fold -> AUC. differences: arm -> reference arm
    -> figure, paired by case within folds. distillation: by fold, explained variance and cosine, with the linear
    baseline. synthetic: whether the slides were made here. cost: by arm, per slide. ablation: variant -> figures of one
    fold.
    """

    settings: ExperimentSettings
    arms: tuple[Arm, ...]
    slides: int
    cases: int
    figures: Mapping[str, Mapping[str, Estimate]]
    pooled: Mapping[str, Mapping[str, Estimate]]
    fold_auc: Mapping[str, Mapping[str, float]]
    differences: Mapping[str, Mapping[str, Mapping[str, Difference]]]
    distillation: Mapping[str, Mapping[str, Any]]
    synthetic: bool = True
    cost: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    ablation: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def cost_of(self, arm: Arm) -> Mapping[str, Any] | None:
        """The cost of an arm; all distilled ones have the same encoder and so the same. None where it is not
        measured."""
        return self.cost.get(arm.cost_of or arm.name)


def summarise(settings: ExperimentSettings, arms: Sequence[Arm], students: Mapping[str, DistillResult]) -> Results:
    """Figures of every arm and its paired differences against the first two, all by case and fold.

    Raises FiguresError when the arms predicted different slides.
    """
    found = {arm.name: _predictions(arm.run) for arm in arms}
    first = found[arms[0].name]
    for arm in arms[1:]:
        # What is paired must be the same slides in the same order.
        if {fold: p.slide_ids for fold, p in found[arm.name].items()} != {f: p.slide_ids for f, p in first.items()}:
            raise FiguresError(f"{arm.run} predicted other slides than {arms[0].run}", remedy="delete both, run again")
    options: dict[str, Any] = {"replicates": settings.replicates}
    labels, cases = [p.labels for p in first.values()], [p.case_ids for p in first.values()]
    scores = {name: [p.probabilities for p in parts.values()] for name, parts in found.items()}
    figures = {name: evaluate_folds(labels, scores[name], cases, **options) for name in found}
    together = [case for part in cases for case in part]
    pooled = {
        name: evaluate(
            np.concatenate(labels),
            np.concatenate(scores[name]),
            together,
            classes=next(iter(parts.values())).classes,
            **options,
        )
        for name, parts in found.items()
    }
    fold_auc = {
        name: {fold: fold_figures(p.labels, p.probabilities)["auc"] for fold, p in parts.items()}
        for name, parts in found.items()
    }
    differences = {
        arm.name: {
            other.name: compare(labels, scores[arm.name], scores[other.name], cases, **options)
            for other in arms[:2]
            if other.name != arm.name
        }
        for arm in arms
    }
    distillation = {
        fold: {
            "best_epoch": result.history.best,
            "student": dict(result.figures),
            "linear_baseline": {name: dataclasses.asdict(a) for name, a in result.baseline.items()},
            "mean_baseline": {name: dataclasses.asdict(a) for name, a in result.mean.items()},
        }
        for fold, result in students.items()
    }
    return Results(
        settings, tuple(arms), len(together), len(set(together)), figures, pooled, fold_auc, differences, distillation
    )


def _predictions(run: Path) -> dict[str, FoldPredictions]:
    """Test predictions of a run by fold."""
    return {folder.name: read_predictions(folder / PREDICTIONS_NAME) for folder in fold_folders(run)}


def measure_cost(
    settings: ExperimentSettings, lr_encoder: str, entries: Sequence[SlideEntry], names: tuple[str, str, str]
) -> dict[str, dict[str, Any]]:
    """Inference per slide by arm: tiles, bytes, seconds by stage and end to end, peak memory in bytes.

    names: of the arms HR with the teacher, LR with the teacher, LR with the distilled encoder. Each reads its own level
    alone, taking turns, in a process of their own, whose memory holds nothing of the training. Peak memory is that
    process's, the libraries included. The classifier itself, a few milliseconds, is not in it.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, settings, lr_encoder, entries, names).result()


def _measure(
    settings: ExperimentSettings, lr_encoder: str, entries: Sequence[SlideEntry], names: tuple[str, str, str]
) -> dict[str, dict[str, Any]]:
    job = settings.job()
    extract = ExtractSettings(
        encoders={settings.hr: (settings.teacher,), settings.lr: (settings.teacher, lr_encoder)},
        precision=settings.precision,
        random_weights=settings.random_teacher,
    )
    record = run_benchmark(entries, dataclasses.replace(job, extract=extract), repeats=settings.cost_repeats)
    cost = {}
    for arm, total in zip(record.arms, totals(record), strict=True):
        n = total.slides
        name = names[0] if arm.label == settings.hr else names[1 if arm.encoder == settings.teacher else 2]
        cost[name] = {
            "slides": n,
            "tiles": total.tiles / n,
            "native_tiles": total.native_tiles / n,
            "bytes_read": total.bytes_read / n,
            "bytes_written": total.bytes_written / n,
            "stages_s": {stage: wall / n for stage, (wall, _) in total.stages.items()},
            "stages_cpu_s": {stage: cpu / n for stage, (_, cpu) in total.stages.items()},
            "end_to_end_s": None if total.end_to_end_s is None else total.end_to_end_s / n,
            "end_to_end_cpu_s": None if total.end_to_end_cpu_s is None else total.end_to_end_cpu_s / n,
            "peak_memory_bytes": total.peak_memory_bytes,
            "peak_memory_growth_bytes": total.peak_memory_growth_bytes,
            "foreign_load": record.foreign_load,
        }
    return cost
