"""Whether what a run writes has room on the disk of its job."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from wsi_pipe.files import output_error
from wsi_pipe.plan.calibrate import BYTES_PER_TILE, Calibration
from wsi_pipe.plan.survey import PlanTotals

__all__ = ["Space", "space_for"]

SLIDE_BYTES = 500_000
"""What a slide takes beside its tiles: three pictures of up to 1,024 px, mask, fixed parts of two HDF5 files. Slides of
one to ten mm take 200 to 350 kB; larger ones fill their pictures."""


@dataclass(frozen=True)
class Space:
    """Gigabytes (1e9 bytes) of a job.

    folder: of the job. needed_gb: everything that its slides will take, bags and the rest. held_gb: what lies there of
    that already, from an earlier run. free_gb: on its disk.
    """

    folder: str
    needed_gb: float
    held_gb: float
    free_gb: float

    @property
    def lacking_gb(self) -> float:
        """How much there is too little; 0 where it fits."""
        return max(self.needed_gb - self.held_gb - self.free_gb, 0.0)


def space_for(folder: Path, totals: PlanTotals, rates: Calibration) -> Space:
    """What the planned slides take in the job at ``folder``, which need not be there yet, against what is free.

    Slides that need staging are without tiles in it, as in all of a plan. Raises OutputError when the disk does not
    tell its free space.
    """
    slides, tiles = totals.slides - len(totals.failing), sum(totals.tiles.values())
    # Grids lie in a file of their own too.
    needed_gb = rates.gigabytes(totals) + (tiles * BYTES_PER_TILE + slides * SLIDE_BYTES) / 1e9
    there = folder = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        free = shutil.disk_usage(there).free
    except OSError as error:
        raise output_error(folder, error) from error
    return Space(str(folder), needed_gb, sum(_sizes(folder)) / 1e9, free / 1e9)


def _sizes(job: Path) -> Iterator[int]:
    for part in ("bags", "tiles", "thumbnails", "tissue"):
        try:
            with os.scandir(job / part) as entries:
                yield from (entry.stat().st_size for entry in entries if entry.is_file())
        except OSError:
            # Not there yet, or just being written anew: it counts as nothing.
            continue
