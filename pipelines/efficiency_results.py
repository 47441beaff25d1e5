"""Learning curves of the label-efficiency experiment: pooled AUCs, all differences, tables, a JSON and a picture.

An AUC is the mean over cohorts and draws of labelled cases; with several classes also over the classes against the
rest. Intervals are those of ``lrmil.metrics`` by test case, made wider for the choice of the labelled cases: the
variance between draws within cohorts is added, with Student's quantile for its degrees of freedom. They do not hold
for cohorts of another kind, and three cohorts say little of how cohorts differ: each cohort's figure stands beside.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lrmil.experiment.figures import write_json
from lrmil.metrics.auc import Auc, AucInterval, auc_difference, mean_auc, one_auc
from pipelines.efficiency_arms import ARMS
from pipelines.efficiency_pictures import draw_curves
from pipelines.efficiency_settings import EfficiencySettings
from wsi_pipe.config import to_mapping
from wsi_pipe.files import write_text_atomically

__all__ = ["Pooled", "Summary", "pooled_auc", "pooled_difference", "summarise", "write_summary"]

MARGIN = 0.03
"""An AUC this much lower than HR's still counts as not inferior."""

Runs = Sequence[Sequence[Sequence[Auc]]]
"""AUCs by cohort, draw and class."""


@dataclass(frozen=True)
class Pooled:
    """A figure with its 95 % interval. by_cohort: the same of each cohort alone."""

    value: float
    low: float
    high: float
    by_cohort: tuple[float, ...]


@dataclass(frozen=True)
class Summary:
    """aucs: labelled cases -> arm. differences: labelled cases -> arm -> other arm, the first less the second."""

    settings: EfficiencySettings
    arms: tuple[str, ...]
    aucs: Mapping[int, Mapping[str, Pooled]]
    differences: Mapping[int, Mapping[str, Mapping[str, Pooled]]]
    draws: Sequence[Mapping[str, Any]]


def pooled_auc(runs: Runs) -> Pooled:
    """The mean AUC over cohorts, draws and classes."""
    values = [[float(np.mean([auc.value for auc in draw])) for draw in cohort] for cohort in runs]
    found = mean_auc([auc for cohort in runs for draw in cohort for auc in draw])
    pooled = _widened(found, values)
    return Pooled(pooled.value, max(pooled.low, 0.0), min(pooled.high, 1.0), pooled.by_cohort)


def pooled_difference(a: Runs, b: Runs) -> Pooled:
    """The mean difference of the AUCs of two arms over the same cohorts, draws and classes, pair by pair."""
    values = [
        [
            float(np.mean([x.value - y.value for x, y in zip(first, second, strict=True)]))
            for first, second in zip(one, other, strict=True)
        ]
        for one, other in zip(a, b, strict=True)
    ]
    flat = [[auc for cohort in runs for draw in cohort for auc in draw] for runs in (a, b)]
    pooled = _widened(auc_difference(*flat), values)
    return Pooled(pooled.value, max(pooled.low, -1.0), min(pooled.high, 1.0), pooled.by_cohort)


def _widened(found: AucInterval, values: Sequence[Sequence[float]]) -> Pooled:
    """The interval with the variance between draws; values: by cohort and draw."""
    from scipy.stats import t

    free = sum(len(own) - 1 for own in values)
    half = 0.0
    if free:
        squares = sum(float(np.sum((np.array(own) - np.mean(own)) ** 2)) for own in values)
        half = float(t.isf(0.025, free)) * math.sqrt(squares / free / sum(map(len, values)))
    down, up = (math.hypot(end, half) for end in (found.value - found.low, found.high - found.value))
    return Pooled(found.value, found.value - down, found.value + up, tuple(float(np.mean(own)) for own in values))


def summarise(settings: EfficiencySettings, draws: Sequence[Mapping[str, Any]]) -> Summary:
    """Everything that is shown, from the files of draws; a cohort without draws of some number is left out there."""
    classes = len(settings.cohort.classes)
    total = settings.cohort.test * len(settings.seeds)
    arms = tuple(arm for arm in ARMS if any(arm in draw["arms"] for draw in draws))

    def runs(arm: str, count: int) -> Runs:
        found = []
        for number, seed in enumerate(settings.seeds):
            own = [draw for draw in draws if draw["seed"] == seed and draw["labelled"] == count]
            own.sort(key=lambda draw: int(draw["draw"]))
            if not own:
                # A run that was cut off: the other cohorts stand for themselves.
                continue
            # Each cohort has cases of its own.
            cases = np.arange(len(own[0]["cases"])) + number * settings.cohort.test
            found.append([_aucs(draw, arm, classes, cases, total) for draw in own])
        return found

    aucs, differences = {}, {}
    for count in settings.labelled:
        # Some arms are run at some numbers of labelled cases alone.
        there = [arm for arm in arms if all(arm in draw["arms"] for draw in draws if draw["labelled"] == count)]
        by_arm = {arm: runs(arm, count) for arm in there}
        aucs[count] = {arm: pooled_auc(by_arm[arm]) for arm in there}
        differences[count] = {a: {b: pooled_difference(by_arm[a], by_arm[b]) for b in there if b != a} for a in there}
    return Summary(settings, arms, aucs, differences, draws)


def _aucs(draw: Mapping[str, Any], arm: str, classes: int, cases: Any, total: int) -> list[Auc]:
    y, p = np.array(draw["labels"]), np.array(draw["arms"][arm]["probabilities"])
    wanted = [1] if classes == 2 else list(range(classes))
    return [one_auc(y == c, p[:, c], cases, total, c) for c in wanted]


def write_summary(out: Path, summary: Summary) -> None:
    """``results.json``, ``results.md`` and ``results.png`` in a folder."""
    settings = summary.settings
    origins = [draw["origin"] for draw in summary.draws]
    distinct = [origin for i, origin in enumerate(origins) if origin not in origins[:i]]
    plain = {
        "settings": to_mapping(settings),
        "origins": distinct,
        "auc": {str(n): {arm: asdict(p) for arm, p in own.items()} for n, own in summary.aucs.items()},
        "differences": {
            str(n): {a: {b: asdict(p) for b, p in row.items()} for a, row in own.items()}
            for n, own in summary.differences.items()
        },
        "runs": [
            {
                "seed": draw["seed"],
                "labelled": draw["labelled"],
                "draw": draw["draw"],
                "chosen": {
                    arm: {key: value for key, value in draw["arms"][arm].items() if key != "probabilities"}
                    for arm in draw["arms"]
                },
            }
            for draw in summary.draws
        ],
    }
    write_json(out / "results.json", plain)
    write_text_atomically(out / "results.md", tables(summary))
    draw_curves(out / "results.png", settings.name, {n: dict(own) for n, own in summary.aucs.items()})


def tables(summary: Summary) -> str:
    """AUC by arm and number of labelled cases, and the differences of every pair of arms at each number."""
    counts = list(summary.settings.labelled)
    lines = [f"| AUC, {summary.settings.name} | " + " | ".join(f"{n} labelled" for n in counts) + " |"]
    lines.append("|---" * (len(counts) + 1) + "|")
    for arm in summary.arms:
        cells = [_shown(summary.aucs[n].get(arm)) for n in counts]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    for n in counts:
        there = list(summary.aucs[n])
        lines += ["", f"| {n} labelled: row less column | " + " | ".join(there[:-1]) + " |"]
        lines.append("|---" * len(there) + "|")
        for i, a in enumerate(there[1:], start=1):
            cells = [_signed(summary.differences[n][a][b]) for b in there[:i]]
            lines.append(f"| {a} | " + " | ".join(cells + [""] * (len(there) - 1 - i)) + " |")
    return "\n".join(lines) + "\n"


def _shown(p: Pooled | None) -> str:
    return "" if p is None else f"{p.value:.3f} ({p.low:.3f} to {p.high:.3f})"


def _signed(p: Pooled) -> str:
    return f"{p.value:+.3f} ({p.low:+.3f} to {p.high:+.3f})"
