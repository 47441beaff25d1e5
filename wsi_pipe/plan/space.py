"""Whether what a run writes has room on the disk of its job."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from wsi_pipe.config import JobSettings
from wsi_pipe.encoders.naming import known_dim
from wsi_pipe.files import output_error
from wsi_pipe.plan.calibrate import BYTES_PER_TILE, bytes_per_tile
from wsi_pipe.plan.survey import PlanTotals, SlidePlan

__all__ = ["Space", "SpaceCount", "known_bytes_per_tile"]

SLIDE_BYTES = 500_000
"""What a slide takes beside its tiles: three pictures of up to 1,024 px, mask, fixed parts of two HDF5 files. Slides of
one to ten mm take 200 to 350 kB; larger ones fill their pictures."""


@dataclass(frozen=True)
class Space:
    """Gigabytes (1e9 bytes) of a job.

    folder: of the job. needed_gb: everything that its planned slides will take, bags and the rest. held_gb: how much of
    that they take already, from an earlier run; files of other slides are none of it. free_gb: on its disk.
    """

    folder: str
    needed_gb: float
    held_gb: float
    free_gb: float

    @property
    def lacking_gb(self) -> float:
        """How much there is too little; 0 where it fits."""
        return max(self.needed_gb - self.held_gb - self.free_gb, 0.0)


class SpaceCount:
    """Sees every plan go by and then tells what they take in the job at ``folder``, which need not be there yet.

    Of plans it keeps those whose slides have files in the job. Slides that need staging are without tiles in it, as in
    all of a plan.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self._held: dict[str, int] = {}
        for slide_id, size in _sizes(self._folder):
            self._held[slide_id] = self._held.get(slide_id, 0) + size
        self._begun: dict[str, tuple[tuple[str, int], ...]] = {}

    def see(self, plan: SlidePlan) -> None:
        """Take note of a slide that is planned."""
        if not plan.problem and plan.slide_id in self._held:
            self._begun[plan.slide_id] = tuple(plan.tiles.items())

    def space(self, totals: PlanTotals, tile_bytes: Mapping[str, int]) -> Space:
        """What all the plans that are in ``totals`` take. tile_bytes: of a tile in a bag, by label.

        Raises OutputError when the disk does not tell its free space.
        """
        # Grids lie in a file of their own too.
        each = {label: tile_bytes.get(label, 0) + BYTES_PER_TILE for label in totals.tiles}
        slides = totals.slides - len(totals.failing)
        needed = slides * SLIDE_BYTES + sum(each[label] * count for label, count in totals.tiles.items())
        # A file may be larger than what replaces it, as one with features that are not asked for any more.
        held = sum(
            min(self._held[slide_id], SLIDE_BYTES + sum(each.get(label, 0) * count for label, count in tiles))
            for slide_id, tiles in self._begun.items()
        )
        there = self._folder
        while not there.exists() and there != there.parent:
            there = there.parent
        try:
            free = shutil.disk_usage(there).free
        except OSError as error:
            raise output_error(self._folder, error) from error
        return Space(str(self._folder), needed / 1e9, held / 1e9, free / 1e9)


def known_bytes_per_tile(settings: JobSettings) -> dict[str, int] | None:
    """Bytes of a tile in a bag by label, as ``Calibration.bytes_per_tile`` has them, without loading encoders; None
    where one of them does not tell its dimension unless it is loaded."""
    labels = [spec.label for spec in settings.tile.specs]
    dims = {name: known_dim(name) for label in labels for name in settings.extract.encoders_of(label)}
    known = {name: dim for name, dim in dims.items() if dim is not None}
    return bytes_per_tile(settings, known) if known.keys() == dims.keys() else None


def _sizes(job: Path) -> Iterator[tuple[str, int]]:
    """Slide id and size in bytes of the files of a job, as ``JobPaths`` names them."""
    for part in ("bags", "tiles", "thumbnails", "tissue"):
        # A folder that is not there yet, or a file that is just being written anew, counts as nothing.
        with suppress(OSError), os.scandir(job / part) as entries:
            for entry in entries:
                with suppress(OSError):
                    if entry.is_file():
                        stem = entry.name.rpartition(".")[0]
                        if part == "thumbnails":
                            stem = stem.removesuffix(".raw").removesuffix(".grid")
                        yield stem, entry.stat().st_size
