"""The report's table of focus, folds and bubbles."""

from __future__ import annotations

from collections.abc import Sequence

from wsi_pipe.outcome import FOCUS_FIGURES, SlideOutcome
from wsi_pipe.quality import BLURRED_BELOW, FOLDED_FROM

__all__ = ["focus_rows", "focus_text"]

MOST_ROWS = 100

HEADER = ("Slide", "Level", "Tiles", "Sharpness, 5 %", "median", "95 %", "Blurred", "Folded", "Bubble or dirt")


def focus_text(shown: int, in_all: int) -> str:
    """What the table says, in words."""
    least = (
        f"the {shown:,} of {in_all:,} with the largest blurred share" if shown < in_all else "the most blurred first"
    )
    return (
        f"Sharpness of tiles by slide and level, {least}. Blurred: below {BLURRED_BELOW:g}. Folded, bubble: on "
        f"{FOLDED_FROM:.0%} of the tile or more. --min-sharpness leaves out what is less sharp than it says."
    )


def focus_rows(outcomes: Sequence[SlideOutcome]) -> tuple[list[tuple[object, ...]], int]:
    """Rows under HEADER, the most blurred first, at most MOST_ROWS; and how many there are in all."""
    rows = []
    for outcome in outcomes:
        for label, tiles in outcome.tiles.items():
            counts = {name: outcome.counts.get(f"{name}.{label}") for name in FOCUS_FIGURES}
            if counts["sharpness_median"] is None or not tiles:
                continue
            shares = [(counts[name] or 0.0) / tiles for name in ("blurred_tiles", "folded_tiles", "bubble_tiles")]
            figures = [counts[name] or 0.0 for name in ("sharpness_p5", "sharpness_median", "sharpness_p95")]
            rows.append((shares[0], outcome.slide_id, label, tiles, figures, shares))
    rows.sort(key=lambda row: (-row[0], row[1]))
    shown: list[tuple[object, ...]] = [
        (slide_id, label, tiles, *(f"{v:.2f}" for v in figures), *(f"{v:.1%}" for v in shares))
        for _, slide_id, label, tiles, figures, shares in rows[:MOST_ROWS]
    ]
    return shown, len(rows)
