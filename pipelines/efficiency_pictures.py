"""The learning curves as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from lrmil.pictures.canvas import COLOURS, canvas

__all__ = ["draw_curves"]

PANELS = (
    (
        "HR",
        "LR, stages 1 and 2, fine-tuned",
        "LR, end to end",
        "LR, stage 1, fine-tuned",
        "LR, stage 2, end to end",
        "LR, end to end, longer",
    ),
    ("HR, linear", "LR, stages 1 and 2", "LR, stage 1", "LR, stage 1, linear", "LR, linear"),
    ("HR, LR's number of tiles", "LR", "LR, stage 2 alone"),
)
TITLES = ("HR, and networks that learn", "frozen features", "undistilled features and fewer tiles")
MARKERS = "osD^vP"
BLUE, RED, GREEN, PINK, ORANGE, SKY = COLOURS[:6]
SHADES = (BLUE, GREEN, ORANGE, RED, PINK, SKY)


class Point(Protocol):
    """A value with its interval."""

    value: float
    low: float
    high: float


def draw_curves(path: Path, title: str, aucs: Mapping[int, Mapping[str, Any]]) -> None:
    """AUC with intervals against the number of labelled cases, all arms over three panels of one scale."""
    counts = sorted(aucs)
    least = min(point.low for own in aucs.values() for point in own.values())
    with canvas(path, (14.0, 4.8), columns=3) as axes:
        for ax, arms, heading in zip(axes, PANELS, TITLES, strict=True):
            there = [arm for arm in arms if any(arm in aucs[n] for n in counts)]
            for number, arm in enumerate(there):
                # Side by side, so that no interval hides another.
                own = [n for n in counts if arm in aucs[n]]
                x = [n * 1.035 ** (number - (len(there) - 1) / 2) for n in own]
                points = [aucs[n][arm] for n in own]
                y = [p.value for p in points]
                reach = [[p.value - p.low for p in points], [p.high - p.value for p in points]]
                ax.errorbar(
                    x, y, yerr=reach, color=SHADES[number], marker=MARKERS[number], markersize=5, linewidth=1.6,
                    elinewidth=1, capsize=2.5, label=arm,
                )  # fmt: skip
            ax.set_xscale("log")
            ax.set_xticks(counts, [str(n) for n in counts])
            ax.minorticks_off()
            # Room for the legend below the lowest interval.
            ax.set_ylim(max(least - 0.18, 0.0), 1.005)
            ax.axhline(0.5, color="#999999", linewidth=0.8, linestyle=":")
            ax.set_xlabel("labelled training cases")
            ax.set_ylabel("AUC on test cases")
            ax.set_title(f"{title}: {heading}", fontsize=10)
            ax.grid(axis="y", color="#dddddd", linewidth=0.6)
            ax.legend(fontsize=8, loc="lower right", framealpha=0.9)
