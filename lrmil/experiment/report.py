"""What the LRMIL experiment found, to read: a table, a JSON and a picture."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lrmil.experiment.figures import write_json
from lrmil.experiment.results import Results
from wsi_pipe import __version__
from wsi_pipe.config import to_mapping
from wsi_pipe.files import write_text_atomically

__all__ = ["write_results"]

FIGURES = ("auc", "balanced_accuracy", "ece")
MARGIN = 0.03
"""An AUC this much lower than HR's still counts as not inferior."""
WEAK_AUC = 0.6
"""Below this a teacher's fold is warned of."""
FIXED_STAGES = ("open", "segment", "plan")
"""Stages whose cost does not depend on the resolution."""
TRANSFER = "transfer"
"""Measured once more by itself; ``encode`` holds it."""
NAMES = {"auc": "AUC", "balanced_accuracy": "balanced accuracy", "ece": "calibration error"}


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
            cost = results.cost_of(arm)
            tiles = cost["tiles"] if cost else arm.tiles
            row += ["" if tiles is None else f"{tiles:.0f}", f"{cost['end_to_end_s']:.3f}" if cost else ""]
        rows.append(row)
    signal = f", signal {s.cohort.signal}" if results.synthetic else ""
    text = (
        f"{results.slides} slides of {results.cases} cases{signal}. Means over the test sets of "
        f"{len(results.distillation)} folds, 95 % intervals by drawing cases: they hold for the models as trained, not "
        f"for training again. HR {s.hr}, LR {s.lr}, tiles of {s.tile_px} px; teacher {s.teacher}, student {s.student}."
    )
    parts = [text, _rows(rows), _verdicts(results), _folds(results)]
    return [*parts, _distillation(results), _cost(results), _ablation(results)]


def _verdicts(results: Results) -> str:
    """Whether each distilled arm is as good as HR and better than plain LR, by the intervals of the AUC."""
    (hr, lr), lines = (arm.name for arm in results.arms[:2]), []
    for arm in results.arms[2:]:
        to_hr, to_lr = (results.differences[arm.name][other]["auc"] for other in (hr, lr))
        lines.append(
            f"- {arm.name}: not inferior to {hr} at a margin of {MARGIN:g}: {_yes(to_hr.low > -MARGIN)} (interval from "
            f"{to_hr.low:+.3f}); better than {lr}: {_yes(to_lr.low > 0)} (from {to_lr.low:+.3f})."
        )
    return "\n".join(lines)


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


def _folds(results: Results) -> str:
    """AUC fold by fold and pooled, and a warning where a teacher has learned nothing."""
    hr = results.arms[0].name
    folds = list(results.fold_auc[hr])
    rows = [["AUC", *folds, "pooled"]]
    for arm in results.arms:
        values = results.fold_auc[arm.name]
        rows.append(
            [arm.name, *(f"{values[fold]:.3f}" for fold in folds), f"{results.pooled[arm.name]['auc'].value:.3f}"]
        )
    weak = [fold for fold in folds if results.fold_auc[hr][fold] < WEAK_AUC]
    warning = (
        f"\n\n**The {hr} classifier of {', '.join(weak)} is near chance**: what is distilled from it, and compared "
        "with it, means little there. Train it longer, or otherwise."
    )
    return _rows(rows) + (warning if weak else "")


def _distillation(results: Results) -> str:
    """Explained variance, as the mean over folds."""
    folds = list(results.distillation.values())
    names = [key.removesuffix("_cosine") for key in folds[0]["student"] if key.endswith("_cosine")] if folds else []
    if not names:
        return ""
    rows = [
        [
            "HR features from LR pixels",
            "explained variance",
            "least fold",
            "linear map of LR features",
            "mean HR feature",
        ]
    ]
    for name in names:
        values = [fold["student"][f"{name}_explained_variance"] for fold in folds]
        linear = [fold["linear_baseline"].get(name, {}).get("explained_variance", float("nan")) for fold in folds]
        mean = [fold["mean_baseline"].get(name, {}).get("explained_variance", float("nan")) for fold in folds]
        rows.append([name, *(f"{v:.3f}" for v in (np.mean(values), min(values), np.mean(linear), np.mean(mean)))])
    return _rows(rows)


def _cost(results: Results) -> str:
    if not results.cost:
        return ""
    high, plain, low = (arm.name for arm in results.arms[:3])
    a, p, b = (results.cost[name] for name in (high, plain, low))
    rows = [["a slide at inference", high, plain, low, f"{high} over {low}"]]

    def add(name: str, values: Sequence[float | None], unit: float = 1.0, digits: int = 3) -> None:
        known = [value for value in values if value is not None]
        if len(known) == len(values):
            ratio = f"{known[0] / known[-1]:.1f}" if known[-1] else ""
            rows.append([name, *(f"{value / unit:.{digits}f}" for value in known), ratio])

    def sums(kind: str, *, fixed: bool) -> list[float]:
        # The copy to the device is a part of encoding, and is there once more by itself.
        own = [{k: v for k, v in c[kind].items() if k != TRANSFER} for c in (a, p, b)]
        return [sum(v for k, v in stages.items() if (k in FIXED_STAGES) == fixed) for stages in own]

    add("tiles", [c["tiles"] for c in (a, p, b)], 1, 1)
    add("bytes read, MB", [c["bytes_read"] for c in (a, p, b)], 1e6)
    for stage in a["stages_s"]:
        name = f"{stage} (a part of encode)" if stage == TRANSFER else stage
        add(f"{name}, s", [c["stages_s"].get(stage) for c in (a, p, b)], 1, 4)
    add(f"fixed ({', '.join(FIXED_STAGES)}), s", sums("stages_s", fixed=True))
    add("all other stages, s", sums("stages_s", fixed=False))
    add("all other stages, processor s", sums("stages_cpu_s", fixed=False))
    add("end to end, s", [c["end_to_end_s"] for c in (a, p, b)])
    add("end to end, processor s", [c["end_to_end_cpu_s"] for c in (a, p, b)])
    # Not the peak itself: the process holds the encoders of all arms. Older results do not have it.
    add("memory that a pass adds, MiB", [c.get("peak_memory_growth_bytes") for c in (a, p, b)], 2**20, 0)
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
    from matplotlib.ticker import LogLocator, NullFormatter

    from lrmil.pictures.canvas import COLOURS, canvas

    with canvas(path, (5.5, 4.0)) as (axes,):
        for colour, arm in zip(COLOURS, results.arms, strict=False):
            auc, cost = results.figures[arm.name]["auc"], results.cost_of(arm)
            if cost is None:
                continue
            bars = [[max(auc.value - auc.low, 0)], [max(auc.high - auc.value, 0)]]
            label = f"{arm.name} ({cost['tiles']:.0f} tiles)"
            axes.errorbar([cost["end_to_end_s"]], [auc.value], yerr=bars, fmt="o", color=colour, capsize=3, label=label)
        axes.set(xlabel="seconds a slide at inference, end to end", ylabel="AUC, 95 % interval by case", xscale="log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.legend(frameon=False)
