"""Figures of the LRMIL experiment: accuracy of the arms, cost at inference, a table, a JSON and a picture."""

from __future__ import annotations

import dataclasses
import multiprocessing
import platform
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lrmil.distill import DistillResult
from lrmil.errors import FiguresError
from lrmil.experiment import evaluate_run, read_predictions
from lrmil.experiment.figures import PREDICTIONS_NAME, FoldPredictions, fold_folders, write_json
from lrmil.metrics import Difference, Estimate, compare, evaluate
from lrmil.pictures.canvas import COLOURS, canvas
from pipelines.experiment_settings import ExperimentSettings
from wsi_pipe import __version__
from wsi_pipe.benchmark.analysis import totals
from wsi_pipe.benchmark.measure import run_benchmark
from wsi_pipe.config import ExtractSettings, to_mapping
from wsi_pipe.files import write_text_atomically
from wsi_pipe.manifest import SlideEntry

__all__ = ["Arm", "Results", "measure_cost", "summarise", "write_results"]

FIGURES = ("auc", "balanced_accuracy", "ece")
NAMES = {"auc": "AUC", "balanced_accuracy": "balanced accuracy", "ece": "calibration error"}


@dataclass(frozen=True)
class Arm:
    """A way to classify slides. level: whose tiles it reads. encoder: what computes their features. run: its folds."""

    name: str
    level: str
    encoder: str
    run: Path


@dataclass(frozen=True)
class Results:
    """What the experiment found.

    figures: by arm, over the pooled test predictions of all folds; mean_auc: by arm, mean over folds. differences:
    arm -> reference arm -> figure. distillation: by fold, explained variance and cosine, with the linear baseline.
    synthetic: whether the slides were made here. cost: by level, per slide. ablation: variant -> figures of one fold.
    """

    settings: ExperimentSettings
    arms: tuple[Arm, ...]
    slides: int
    cases: int
    figures: Mapping[str, Mapping[str, Estimate]]
    mean_auc: Mapping[str, float]
    differences: Mapping[str, Mapping[str, Mapping[str, Difference]]]
    distillation: Mapping[str, Mapping[str, Any]]
    synthetic: bool = True
    cost: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    ablation: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def pooled(run: Path) -> FoldPredictions:
    """Test predictions of all folds of a run, one under the other."""
    parts = [read_predictions(folder / PREDICTIONS_NAME) for folder in fold_folders(run)]
    return FoldPredictions(
        parts[0].classes,
        tuple(slide for p in parts for slide in p.slide_ids),
        tuple(case for p in parts for case in p.case_ids),
        np.concatenate([p.labels for p in parts]),
        np.concatenate([p.logits for p in parts]),
        np.concatenate([p.probabilities for p in parts]),
    )


def summarise(settings: ExperimentSettings, arms: Sequence[Arm], students: Mapping[str, DistillResult]) -> Results:
    """Figures of every arm and its paired differences against the first two, all by case.

    Raises FiguresError when the arms predicted different slides.
    """
    found = {arm.name: pooled(arm.run) for arm in arms}
    for arm in arms[1:]:
        # What is paired must be the same slides in the same order.
        if found[arm.name].slide_ids != found[arms[0].name].slide_ids:
            raise FiguresError(f"{arm.run} predicted other slides than {arms[0].run}", remedy="delete both, run again")
    options: dict[str, Any] = {"replicates": settings.replicates}
    figures, differences, means = {}, {}, {}
    for arm in arms:
        p = found[arm.name]
        figures[arm.name] = evaluate(p.labels, p.probabilities, p.case_ids, classes=p.classes, **options)
        means[arm.name] = evaluate_run(arm.run, pictures=False, **options).mean["auc"].value
        differences[arm.name] = {
            other.name: compare(
                [p.labels], [p.probabilities], [found[other.name].probabilities], [p.case_ids], **options
            )
            for other in arms[:2]
            if other.name != arm.name
        }
    distillation = {
        fold: {
            "best_epoch": result.history.best,
            "student": dict(result.figures),
            "linear_baseline": {name: dataclasses.asdict(a) for name, a in result.baseline.items()},
        }
        for fold, result in students.items()
    }
    first = found[arms[0].name]
    return Results(
        settings, tuple(arms), len(first.slide_ids), len(set(first.case_ids)), figures, means, differences, distillation
    )


def measure_cost(
    settings: ExperimentSettings, lr_encoder: str, entries: Sequence[SlideEntry]
) -> dict[str, dict[str, Any]]:
    """Inference per slide by level: tiles, bytes, seconds by stage and end to end, peak memory in bytes.

    HR with the teacher, LR with the distilled encoder, each reading its own level alone, taking turns, in a process of
    their own, whose memory holds nothing of the training. Peak memory is that process's, the libraries included.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, settings, lr_encoder, entries).result()


def _measure(settings: ExperimentSettings, lr_encoder: str, entries: Sequence[SlideEntry]) -> dict[str, dict[str, Any]]:
    job = settings.job()
    extract = ExtractSettings(
        encoders={settings.hr: (settings.teacher,), settings.lr: (lr_encoder,)},
        precision=settings.precision,
        random_weights=settings.random_teacher,
    )
    record = run_benchmark(entries, dataclasses.replace(job, extract=extract), repeats=settings.cost_repeats)
    cost = {}
    for arm, total in zip(record.arms, totals(record), strict=True):
        n = total.slides
        cost[arm.label] = {
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
            "foreign_load": record.foreign_load,
        }
    return cost


def write_results(out: Path, results: Results) -> None:
    """``results.json``, ``results.md`` and, once costs are known, ``results.png``."""
    values = dataclasses.asdict(results) | {
        "settings": to_mapping(results.settings),
        "arms": {arm.name: {"level": arm.level, "encoder": arm.encoder} for arm in results.arms},
        "versions": {"wsi-pipe": __version__, "python": platform.python_version()},
    }
    write_json(out / "results.json", values)
    write_text_atomically(out / "results.md", "\n\n".join(part for part in _markdown(results) if part) + "\n")
    if results.cost:
        _draw(out / "results.png", results)


def _interval(value: float, low: float, high: float, sign: str = "") -> str:
    return f"{value:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"


def _rows(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    return "\n".join(lines)


def _markdown(results: Results) -> list[str]:
    s, arms = results.settings, results.arms
    hr, lr = arms[0].name, arms[1].name
    header = ["arm", *NAMES.values(), f"AUC less {hr}", f"AUC less {lr}"]
    header += ["tiles a slide", "seconds a slide"] if results.cost else []
    rows = [header]
    for arm in arms:
        figures = [results.figures[arm.name][name] for name in FIGURES]
        row = [arm.name, *(_interval(f.value, f.low, f.high) for f in figures)]
        for other in (hr, lr):
            found = results.differences[arm.name].get(other)
            row.append(_interval(found["auc"].value, found["auc"].low, found["auc"].high, "+") if found else "")
        if results.cost:
            cost = results.cost[arm.level]
            # The plain LR arm was not timed: its encoder is the teacher's, its tiles are those of the others.
            row += [f"{cost['tiles']:.0f}", "" if arm.name == lr else f"{cost['end_to_end_s']:.3f}"]
        rows.append(row)
    signal = f", signal {s.cohort.signal}" if results.synthetic else ""
    text = (
        f"{results.slides} slides of {results.cases} cases{signal}; test predictions of {len(results.distillation)} "
        f"folds pooled; 95 % intervals by drawing cases. HR {s.hr}, LR {s.lr}, tiles of {s.tile_px} px; "
        f"teacher {s.teacher}, student {s.student}."
    )
    return [text, _rows(rows), _distillation(results), _cost(results), _ablation(results)]


def _distillation(results: Results) -> str:
    """Explained variance, as the mean over folds."""
    folds = list(results.distillation.values())
    names = [key.removesuffix("_cosine") for key in folds[0]["student"] if key.endswith("_cosine")] if folds else []
    if not names:
        return ""
    rows = [["HR features from LR pixels", "explained variance", "least fold", "linear map of LR features", "mean"]]
    for name in names:
        values = [fold["student"][f"{name}_explained_variance"] for fold in folds]
        linear = [fold["linear_baseline"].get(name, {}).get("explained_variance", float("nan")) for fold in folds]
        rows.append([name, f"{np.mean(values):.3f}", f"{min(values):.3f}", f"{np.mean(linear):.3f}", "0"])
    return _rows(rows)


def _cost(results: Results) -> str:
    if not results.cost:
        return ""
    high, low = results.settings.hr, results.settings.lr
    a, b = results.cost[high], results.cost[low]
    rows = [["a slide at inference", high, low, f"{high} over {low}"]]

    def add(name: str, x: float | None, y: float | None, unit: float = 1.0, digits: int = 3) -> None:
        if x is not None and y is not None:
            ratio = f"{x / y:.1f}" if y else ""
            rows.append([name, f"{x / unit:.{digits}f}", f"{y / unit:.{digits}f}", ratio])

    add("tiles", a["tiles"], b["tiles"], 1, 1)
    add("bytes read, MB", a["bytes_read"], b["bytes_read"], 1e6)
    for stage in a["stages_s"]:
        add(f"{stage}, s", a["stages_s"][stage], b["stages_s"].get(stage), 1, 4)
    add("end to end, s", a["end_to_end_s"], b["end_to_end_s"])
    add("end to end, processor s", a["end_to_end_cpu_s"], b["end_to_end_cpu_s"])
    add("peak memory, MiB", a["peak_memory_bytes"], b["peak_memory_bytes"], 2**20, 0)
    load = f"Mean over {a['slides']} slides; other programs used {a['foreign_load']:.0%} of the machine meanwhile."
    return f"{_rows(rows)}\n\n{load}" if a["foreign_load"] is not None else _rows(rows)


def _ablation(results: Results) -> str:
    if not results.ablation:
        return ""
    rows = [["one fold", "test AUC", "explained variance of final features", "of layers, mean"]]
    for name, found in results.ablation.items():
        layers = [v for k, v in found.items() if k.startswith("layer") and k.endswith("_explained_variance")]
        final = found.get("final_explained_variance")
        rows.append(
            [
                name,
                _interval(found["auc"], found["auc_low"], found["auc_high"]),
                "" if final is None else f"{final:.3f}",
                f"{np.mean(layers):.3f}" if layers else "",
            ]
        )
    return _rows(rows)


def _draw(path: Path, results: Results) -> None:
    """Accuracy against seconds a slide, one point an arm."""
    with canvas(path, (5.5, 4.0)) as (axes,):
        for colour, arm in zip(COLOURS, results.arms, strict=False):
            auc, cost = results.figures[arm.name]["auc"], results.cost[arm.level]
            bars = [[max(auc.value - auc.low, 0)], [max(auc.high - auc.value, 0)]]
            label = f"{arm.name} ({cost['tiles']:.0f} tiles)"
            axes.errorbar([cost["tiles"]], [auc.value], yerr=bars, fmt="o", color=colour, capsize=3, label=label)
        axes.set(xlabel="tiles read and encoded a slide", ylabel="AUC, 95 % interval by case", xscale="log")
        axes.legend(frameon=False)
