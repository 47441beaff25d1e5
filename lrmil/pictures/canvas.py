"""Figures that need no screen and touch none of matplotlib's global state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wsi_pipe.files import atomic_path

__all__ = ["COLOURS", "canvas"]

# Okabe and Ito (2008): told apart by readers with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
DPI = 150


@contextmanager
def canvas(path: Path, size_inches: tuple[float, float], *, columns: int = 1) -> Iterator[list[Any]]:
    """Axes in a row, saved to ``path`` (.png or .svg) on leaving. Raises OutputError when it cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size_inches, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0].tolist()
    yield axes
    with atomic_path(path) as temporary:
        # Without a date, equal figures are equal files.
        metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(temporary, format=path.suffix.lstrip(".") or "png", metadata=metadata)
