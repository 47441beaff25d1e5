"""How fast this machine is, from a short trial on some of the slides with the encoders asked for."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from wsi_pipe.config import JobSettings
from wsi_pipe.cores import available_cores
from wsi_pipe.encoders.base import Encoder
from wsi_pipe.errors import WsiPipeError
from wsi_pipe.extract import ExtractItem, SlideFailure, extract_features
from wsi_pipe.geometry import TileGrid
from wsi_pipe.job.masks import slide_mask
from wsi_pipe.job.opening import open_entry
from wsi_pipe.manifest import SlideEntry, settings_of
from wsi_pipe.plan.survey import PlanTotals
from wsi_pipe.tiling import plan_grids

__all__ = ["Calibration", "bytes_per_tile", "calibrate"]

BYTES_PER_TILE = 8 + 16 + 4 + 4
"""Cells, coordinates, tissue and parent of a tile in a bag."""


@dataclass
class Calibration:
    """Rates of this machine.

    slide_s: seconds a slide before its first tile (open, find tissue, lay grids). tile_s: by label, seconds a tile,
    reading and all its encoders together. bytes_per_tile: by label, in the bag. slides, tiles: how many were tried.
    cores: that this process may use; slide_cores, tile_cores: how many it kept busy before the tiles and with them, so
    that ``hours`` knows how many workers find room. shares_device: tiles are encoded on a device that all share.
    """

    slide_s: float = 0.0
    tile_s: dict[str, float] = field(default_factory=dict)
    bytes_per_tile: dict[str, int] = field(default_factory=dict)
    slides: int = 0
    tiles: int = 0
    cores: int = 1
    slide_cores: float = 1.0
    tile_cores: float = 1.0
    shares_device: bool = False

    def hours(self, totals: PlanTotals, workers: int = 1) -> float:
        """Hours that the planned slides take, over ``workers`` that share this machine's cores and devices.

        Without slides that need staging.
        """
        slides = (totals.slides - len(totals.failing) - totals.staging) * self.slide_s
        tiles = sum(self.tile_s.get(label, 0.0) * count for label, count in totals.tiles.items())
        return (slides / self.gain(self.slide_cores, workers) + tiles / self.tile_gain(workers)) / 3600

    def gain(self, busy: float, workers: int) -> float:
        """How many times faster ``workers`` are than one that keeps ``busy`` cores busy."""
        return max(min(float(workers), self.cores / max(busy, 1e-6)), 1.0)

    def tile_gain(self, workers: int) -> float:
        """``gain`` for tiles; a device that all workers share does not get faster by it."""
        return 1.0 if self.shares_device else self.gain(self.tile_cores, workers)

    def gigabytes(self, totals: PlanTotals) -> float:
        """Gigabytes (1e9 bytes) of bags."""
        return sum(self.bytes_per_tile.get(label, 0) * count for label, count in totals.tiles.items()) / 1e9


def _apart(grid: TileGrid, most: int) -> tuple[TileGrid, TileGrid]:
    """Tiles to warm up on (kernels, batch size), and others to time, at most ``most`` of each.

    Tiles that were read just now come out of the system's memory, and the hours would lack the time of the disk. The
    first are taken for warming up, a third of a small grid; the others are spread over the rest. A single tile is both.
    """
    first = min(most, len(grid) // 3 or 1)
    rest = grid.take(slice(first, None)) if len(grid) > 1 else grid
    return grid.take(slice(0, first)), rest.spread(most)


def calibrate(
    entries: Sequence[SlideEntry], settings: JobSettings, encoders: Mapping[str, Encoder], tiles: int = 128
) -> Calibration:
    """Read and encode up to ``tiles`` tiles of each grid of the given slides; what fails is passed over, and so is what
    would have to be copied first.

    With no slide that works, all rates are zero and ``slides`` says so.
    """
    found = Calibration()
    extract = settings.extract
    spent_before: list[float] = []
    spent: dict[str, float] = {}
    counts: dict[str, int] = {}
    cpu_before = cpu_tiles = 0.0
    for entry in entries:
        try:
            start, busy = time.perf_counter(), time.process_time()
            segment, tile = settings_of(entry, settings.segment, settings.tile)
            slide = open_entry(entry, settings.reader, settings.cache, copy=False)
            try:
                mask = slide_mask(entry, slide, segment)
                grids = plan_grids(slide.pyramid, mask, tile)
            finally:
                slide.close()
            spent_before.append(time.perf_counter() - start)
            cpu_before += time.process_time() - busy
        except WsiPipeError:
            continue
        found.slides += 1
        for warm, timed in (_apart(g, tiles) for g in grids if len(g)):
            for grid in (timed,) if timed.label in counts else (warm, timed):
                names = extract.encoders_of(grid.label)
                item = ExtractItem(
                    entry.slide_id,
                    partial(open_entry, entry, settings.reader, settings.cache, copy=False),
                    [grid],
                    {grid.label: names},
                )
                start, busy = time.perf_counter(), time.process_time()
                (result,) = extract_features(
                    [item],
                    encoders,
                    batch_size=extract.batch_size,
                    read_threads=extract.read_threads,
                    memory_bytes=extract.memory_mib << 20,
                    dtype=extract.dtype,
                    layers=extract.layers,
                )
                if grid is timed and not isinstance(result, SlideFailure):
                    spent[grid.label] = spent.get(grid.label, 0.0) + time.perf_counter() - start
                    counts[grid.label] = counts.get(grid.label, 0) + len(grid)
                    cpu_tiles += time.process_time() - busy
    found.slide_s = sum(spent_before) / len(spent_before) if spent_before else 0.0
    found.tile_s = {label: spent[label] / counts[label] for label in spent}
    found.tiles = sum(counts.values())
    found.cores = available_cores()
    # A core that waits for the disk is none that another worker lacks.
    found.slide_cores = cpu_before / max(sum(spent_before), 1e-9) if spent_before else 1.0
    found.tile_cores = cpu_tiles / max(sum(spent.values()), 1e-9) if spent else 1.0
    found.shares_device = any(_on_a_device(encoder) for encoder in encoders.values())
    found.bytes_per_tile = bytes_per_tile(settings, {name: encoder.info.dim for name, encoder in encoders.items()})
    return found


def _on_a_device(encoder: Encoder) -> bool:
    """Whether an encoder computes elsewhere than on the processor's cores."""
    replicas = getattr(encoder, "replicas", None) or [encoder]
    return any(getattr(getattr(one, "device", None), "type", "cpu") != "cpu" for one in replicas)


def bytes_per_tile(settings: JobSettings, dims: Mapping[str, int]) -> dict[str, int]:
    """By label, what a tile takes in a bag. dims: features of each encoder."""
    extract = settings.extract
    size = 2 if extract.dtype == "float16" else 4
    return {
        spec.label: sum(dims[name] for name in extract.encoders_of(spec.label)) * (1 + len(extract.layers)) * size
        + BYTES_PER_TILE
        for spec in settings.tile.specs
    }
