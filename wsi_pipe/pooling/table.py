"""The vectors of a cohort in one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wsi_pipe.files import write_text_atomically
from wsi_pipe.tables import csv_text

if TYPE_CHECKING:
    from wsi_pipe.pooling.pool import Pooled

__all__ = ["write_slide_table"]


def write_slide_table(path: Path, found: Sequence[Pooled]) -> int:
    """Write a CSV with ``slide_id``, ``case_id`` and a column a number, ``f0`` and so on; how many slides it has.

    Slides without a vector are left out. Raises OutputError.
    """
    there = [item for item in found if item.vector is not None]
    width = max((len(item.vector) for item in there if item.vector is not None), default=0)
    header = ["slide_id", "case_id", *(f"f{place}" for place in range(width))]
    rows = (
        [item.slide_id, item.case_id, *(f"{value:.9g}" for value in item.vector.tolist())]
        for item in there
        if item.vector is not None
    )
    write_text_atomically(path, csv_text(header, rows))
    return len(there)
