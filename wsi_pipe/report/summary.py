"""Figures of a job from the outcomes of its slides: as JSON-able values, text and CSV."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from wsi_pipe.encoders.random_id import RANDOM_SUFFIX
from wsi_pipe.errors import ConfigError
from wsi_pipe.geometry import parse_resolution
from wsi_pipe.outcome import MPP_OUTLIER_RULE, STAGE_TIMES, SlideOutcome, mpp_outliers
from wsi_pipe.tables import csv_text

__all__ = [
    "OUTLIER_RULE",
    "cause_of",
    "histogram_bars",
    "labels_of",
    "level_seconds",
    "mpp_text",
    "outlier_flags",
    "random_places",
    "slides_csv",
    "stage_seconds",
    "summarise",
    "summary_table",
]

OUTLIER_SCORE = 3.5
OUTLIER_MIN_SLIDES = 8
OUTLIER_RULE = (
    f"A slide is an outlier where the logarithm of its figure lies more than {OUTLIER_SCORE} scaled median absolute "
    f"deviations from the job's median (Iglewicz and Hoaglin 1993); jobs of fewer than {OUTLIER_MIN_SLIDES} slides "
    f"with tissue have none. {MPP_OUTLIER_RULE}"
)
MAX_FAILURES_IN_TABLE = 20


def labels_of(outcomes: Iterable[SlideOutcome]) -> list[str]:
    """Labels of all levels that any slide has, coarsest first."""
    found = {label for outcome in outcomes for label in outcome.tiles}
    return sorted(found, key=_mpp_of, reverse=True)


def _mpp_of(label: str) -> float:
    try:
        return parse_resolution(label)
    except ConfigError:
        return math.inf


def stage_seconds(outcome: SlideOutcome) -> dict[str, float]:
    """Wall seconds by stage, in the order of work."""
    named = {key: float(value) for key, value in outcome.seconds.items()}
    order = [*STAGE_TIMES, *sorted(set(named) - set(STAGE_TIMES))]
    return {stage: named[stage] for stage in order if stage in named}


def level_seconds(outcome: SlideOutcome) -> dict[str, dict[str, float]]:
    """Seconds by level and stage, {"20x": {"read": 1.2, "encode": 3.4}}, from counts such as ``read_s.20x``."""
    found: dict[str, dict[str, float]] = {}
    for key, value in outcome.counts.items():
        # A label may hold a point itself (2.5x), what stands before the first does not.
        stage, _, label = key.partition("_s.")
        if label:
            found.setdefault(label, {})[stage] = float(value)
    return found


def robust_scores(values: Sequence[float]) -> list[float]:
    """Modified z-scores of the logarithms, 0.6745 (x - median) / MAD (Iglewicz and Hoaglin 1993).

    0 for values that are not above zero, and for all where fewer than eight are. The MAD counts as at least 2 % so
    that slides all but alike have no outliers.
    """
    logs = [math.log(v) for v in values if v > 0]
    if len(logs) < OUTLIER_MIN_SLIDES:
        return [0.0] * len(values)
    middle = statistics.median(logs)
    spread = max(statistics.median(abs(x - middle) for x in logs), 0.02)
    return [0.6745 * (math.log(v) - middle) / spread if v > 0 else 0.0 for v in values]


def outlier_flags(outcomes: Sequence[SlideOutcome], label: str | None) -> list[list[str]]:
    """For each slide, in words, which of its figures is an outlier among those that are done.

    label: the level whose tiles count.
    """
    flags: list[list[str]] = [[] for _ in outcomes]
    done = [i for i, outcome in enumerate(outcomes) if outcome.status == "done"]
    figures = {
        ("few tiles", "many tiles"): [float(outcomes[i].tiles.get(label, 0)) if label else 0.0 for i in done],
        ("little tissue", "much tissue"): [float(outcomes[i].counts.get("tissue_mm2", 0.0)) for i in done],
        ("quick", "slow"): [sum(stage_seconds(outcomes[i]).values()) if not outcomes[i].cached else 0.0 for i in done],
    }
    for (low, high), values in figures.items():
        for i, score in zip(done, robust_scores(values), strict=True):
            if score < -OUTLIER_SCORE and low != "quick":
                flags[i].append(low)
            elif score > OUTLIER_SCORE:
                flags[i].append(high)
    alone = set(mpp_outliers({str(i): outcome.mpp for i, outcome in enumerate(outcomes)}))
    for i, own in enumerate(flags):
        own += ["mpp"] if str(i) in alone else []
    return flags


def histogram_bars(values: Sequence[float], marked: Sequence[bool]) -> dict[str, Any] | None:
    """Bars of a histogram: {"log": bool, "bars": [{"from", "to", "count", "marked"}]}, None without values above 0.

    The axis is logarithmic where the values span more than a factor of 20.
    """
    pairs = [(v, m) for v, m in zip(values, marked, strict=True) if v > 0]
    if not pairs:
        return None
    low, high = min(v for v, _ in pairs), max(v for v, _ in pairs)
    log = high > 20 * low
    forward = math.log10 if log else float
    a, b = forward(low), forward(high)
    if a == b:
        a, b = (a - 0.5, b + 0.5) if log else (a * 0.9, b * 1.1)
    n = min(max(round(1.5 * math.sqrt(len(pairs))), 5), 40)
    counts, marks = [0] * n, [0] * n
    for v, m in pairs:
        k = min(int((forward(v) - a) / (b - a) * n), n - 1)
        counts[k] += 1
        marks[k] += m
    edges = [a + (b - a) * k / n for k in range(n + 1)]
    ends = [10**e if log else e for e in edges]
    bars = [{"from": ends[k], "to": ends[k + 1], "count": counts[k], "marked": marks[k]} for k in range(n)]
    return {"log": log, "bars": bars}


def summarise(outcomes: Sequence[SlideOutcome]) -> dict[str, Any]:
    """The figures of a job, JSON-able.

    Keys: ``slides`` (counts: total, done, empty, failed), ``tiles`` (by label, coarsest first), ``hr_per_lr`` (tiles
    of the finest level to one of the coarsest, None with one level or no tiles), ``tissue_mm2``, ``seconds`` (by
    stage, summed over slides), ``seconds_total``, ``seconds_by_level`` (label -> part -> seconds, as far as outcomes
    have them), ``random_weights`` (places of such features), ``cached_slides``.
    """
    labels = labels_of(outcomes)
    tiles = {label: sum(int(o.tiles.get(label, 0)) for o in outcomes) for label in labels}
    by_stage = [stage_seconds(o) for o in outcomes]
    stages = [*STAGE_TIMES, *sorted({stage for s in by_stage for stage in s} - set(STAGE_TIMES))]
    seconds = {stage: math.fsum(s.get(stage, 0.0) for s in by_stage) for stage in stages}
    by_level: dict[str, dict[str, float]] = {}
    for outcome in outcomes:
        for label, parts in level_seconds(outcome).items():
            for part, value in parts.items():
                own = by_level.setdefault(label, {})
                own[part] = own.get(part, 0.0) + value
    ratio = tiles[labels[-1]] / tiles[labels[0]] if len(labels) > 1 and tiles[labels[0]] else None
    return {
        "slides": {
            "total": len(outcomes),
            **{status: sum(o.status == status for o in outcomes) for status in ("done", "empty", "failed")},
        },
        "tiles": tiles,
        "hr_per_lr": ratio,
        "tissue_mm2": math.fsum(float(o.counts.get("tissue_mm2", 0.0)) for o in outcomes),
        "seconds": {stage: value for stage, value in seconds.items() if any(stage in s for s in by_stage)},
        "seconds_total": math.fsum(seconds.values()),
        "seconds_by_level": by_level,
        "random_weights": sorted({place for o in outcomes for place in random_places(o)}),
        "cached_slides": sum(bool(o.cached) for o in outcomes),
    }


def summary_table(outcomes: Iterable[SlideOutcome]) -> str:
    """A few lines of text for the end of a run: slides, tiles, tissue, seconds by stage, and failures with remedies."""
    listed = list(outcomes)
    figures = summarise(listed)
    counts = figures["slides"]
    lines = [f"slides   {counts['done']:,} done, {counts['empty']:,} empty, {counts['failed']:,} failed"]
    if figures["tiles"]:
        tiles = ", ".join(f"{n:,} at {label}" for label, n in figures["tiles"].items())
        ratio = f" ({figures['hr_per_lr']:.1f} fine to one coarse)" if figures["hr_per_lr"] else ""
        lines.append(f"tiles    {tiles}{ratio}")
    if figures["tissue_mm2"]:
        lines.append(f"tissue   {figures['tissue_mm2']:,.1f} mm2")
    if figures["seconds"]:
        stages = ", ".join(f"{stage} {value:,.1f}" for stage, value in figures["seconds"].items())
        lines.append(f"seconds  {stages}; {figures['seconds_total']:,.1f} in all")
    places = sorted({place for o in listed for place in random_places(o)})
    if places:
        lines.append(f"random   {', '.join(places)}: features of random weights mean nothing")
    empty = [o for o in listed if o.status == "empty"]
    lines += [f"empty    {o.slide_id}: {o.reason}" for o in empty[:MAX_FAILURES_IN_TABLE]]
    if len(empty) > MAX_FAILURES_IN_TABLE:
        lines.append(f"         and {len(empty) - MAX_FAILURES_IN_TABLE:,} more without tissue")
    noted = [(o.slide_id, note) for o in listed for note in o.notes]
    lines += [f"note     {slide_id}: {note}" for slide_id, note in noted[:MAX_FAILURES_IN_TABLE]]
    if len(noted) > MAX_FAILURES_IN_TABLE:
        lines.append(f"         and {len(noted) - MAX_FAILURES_IN_TABLE:,} more notes: see report.csv")
    failed = [o for o in listed if o.status == "failed"]
    for outcome in failed[:MAX_FAILURES_IN_TABLE]:
        remedy = f"; {outcome.remedy}" if outcome.remedy else ""
        stage = f" ({outcome.stage})" if outcome.stage else ""
        lines.append(f"failed   {outcome.slide_id}{stage}: {outcome.reason}{remedy}")
    if len(failed) > MAX_FAILURES_IN_TABLE:
        lines.append(f"         and {len(failed) - MAX_FAILURES_IN_TABLE:,} more: see failures.csv")
    return "\n".join(lines)


def mpp_text(outcome: SlideOutcome) -> str:
    """um per level-0 pixel as text, one number where both axes have it; "" where it is not known."""
    return "x".join(f"{value:.6g}" for value in dict.fromkeys(outcome.mpp or ()))


def random_places(outcome: SlideOutcome) -> list[str]:
    """Features, "20x/uni-random", that were made with random weights, as their names say."""
    return [place for place in outcome.costs if place.endswith(RANDOM_SUFFIX)]


def slides_csv(outcomes: Iterable[SlideOutcome]) -> str:
    """CSV of slides: slide_id, status, path, mpp, mpp_source, tissue_mm2, tiles_<label>, seconds_<stage>, outliers,
    reason, notes."""
    listed = list(outcomes)
    labels = labels_of(listed)
    flags = outlier_flags(listed, labels[-1] if labels else None)
    header = ["slide_id", "status", "path", "mpp", "mpp_source", "tissue_mm2", *(f"tiles_{label}" for label in labels)]
    header += [*(f"seconds_{stage}" for stage in STAGE_TIMES), "outliers", "reason", "notes"]
    rows = [
        [
            o.slide_id,
            o.status,
            o.path,
            mpp_text(o),
            o.mpp_source,
            _optional(o.counts, "tissue_mm2", 6),
            *(o.tiles.get(label, "") for label in labels),
            *(_optional(o.seconds, stage, 4) for stage in STAGE_TIMES),
            "; ".join(flag),
            o.reason or "",
            "; ".join([*o.notes, *(f"{place} of random weights" for place in random_places(o))]),
        ]
        for o, flag in zip(listed, flags, strict=True)
    ]
    return csv_text(header, rows)


def cause_of(outcome: SlideOutcome) -> tuple[str, str, str]:
    """What failures have in common: stage, kind of error, and the reason without the slide's names and numbers."""
    reason = outcome.reason or ""
    last = outcome.path.rstrip("/").rpartition("/")[2]
    for name in sorted({outcome.path, last, outcome.slide_id}, key=len, reverse=True):
        # A short name is a part of many words: only as the name of a file is it the slide's.
        part = re.escape(name) if len(name) > 2 else rf"(?<=/){re.escape(name)}(?=\.)"
        reason = re.sub(part, "...", reason) if name else reason
    return outcome.stage or "", outcome.error or "", re.sub(r"\d+", "#", reason)


def _optional(values: Mapping[str, float], key: str, digits: int) -> object:
    return round(float(values[key]), digits) if key in values else ""
