"""AUC against seconds a slide, for every resolution and model of an audit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lrmil.pictures.canvas import COLOURS, canvas

__all__ = ["Point", "draw_audit"]

FILLED = {"reference": "full", "enough": "full", "undecided": "none", "loses": "none"}
MARKERS = {"reference": "s", "enough": "o", "undecided": "o", "loses": "X"}


class Point(NamedTuple):
    """One resolution: its name, seconds a slide (NaN where not known), AUC with interval, and what was found."""

    name: str
    seconds: float
    auc: float
    low: float
    high: float
    state: str


def draw_audit(path: Path, groups: Mapping[str, Sequence[Point]], margin: float) -> None:
    """Points with 95 % intervals, a colour a model; the finest resolution first, less the margin as a line.

    Where no seconds are known the resolutions stand beside each other. Raises OutputError when it cannot be written.
    """
    with canvas(path, (7.0, 4.2)) as (axes,):
        timed = all(math.isfinite(point.seconds) for points in groups.values() for point in points)
        for g, (model, points) in enumerate(groups.items()):
            colour = COLOURS[g % len(COLOURS)]
            # Models of one resolution would hide each other: each stands a little beside the other.
            shift = 1.0 + 0.03 * g
            xs = [point.seconds * shift if timed else i + 0.12 * g for i, point in enumerate(points)]
            axes.plot(xs, [point.auc for point in points], color=colour, linewidth=1, label=model)
            for x, point in zip(xs, points, strict=True):
                if math.isfinite(point.low):
                    axes.plot([x, x], [point.low, point.high], color=colour, linewidth=1.2, alpha=0.6)
                axes.plot(
                    [x], [point.auc], color=colour, marker=MARKERS[point.state], fillstyle=FILLED[point.state],
                    markersize=7, linestyle="",
                )  # fmt: skip
                if g == 0:
                    axes.annotate(point.name, (x, point.auc), xytext=(6, 6), textcoords="offset points", fontsize=9)
            if g == 0:
                axes.axhline(points[0].auc - margin, color="0.6", linestyle="--", linewidth=1)
        if timed:
            axes.set_xscale("log")
            # A few seconds are read as such, not as powers of ten.
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("{x:g}")
            axes.set_xlabel("seconds of work a slide, as the job measured them")
        else:
            first = next(iter(groups.values()))
            axes.set_xticks(range(len(first)), [point.name for point in first])
            axes.set_xlabel("resolution; the job's cost is not known")
        axes.set_ylabel("AUC, mean over folds")
        axes.margins(x=0.15)
        axes.legend(
            frameon=False,
            loc="lower right",
            title=f"square: finest; full: not worse by {margin:g} (dashed)\nopen: not shown; cross: worse",
            title_fontsize=8,
        )
