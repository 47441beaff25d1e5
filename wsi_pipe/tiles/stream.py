"""Batches of tiles in grid order, in bounded memory, on several threads.

Tiles are dealt into *groups* of neighbours. A group's *job* fetches, at once, the blocks that no earlier group needed,
decodes each and copies its parts to where they belong: into the tiles of this group, and into those of later groups
that share the block, whose batches are set up for that. So every block is decoded once, and a batch is ready when
the jobs up to its last group are. The job that completes a group also resamples its tiles.

Where a tile's pixels come from depends on the tile alone, so neither threads nor batch size can change them.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.errors import SlideReadError, WsiPipeError
from wsi_pipe.geometry import FloatPair, TileGrid
from wsi_pipe.slides.base import WHITE, RGBArray, Slide
from wsi_pipe.tiles.plan import BlockPlan, Cut, choose_cut, plan_blocks
from wsi_pipe.tiles.resample import Resampler

__all__ = ["DEFAULT_MEMORY_BYTES", "StreamStats", "TileBatch", "read_tiles", "stream_tiles"]

DEFAULT_MEMORY_BYTES = 512 * 1024 * 1024

GROUP_TILES = 16
"""Tiles to a group: enough for a fetch of several kilobytes in a row, few enough to stay in the cache."""

BATCHES_AHEAD = 2
"""Batches that are begun, if memory allows, before the one asked for is taken."""


@dataclass(frozen=True)
class TileBatch:
    """Neighbouring tiles of a grid.

    pixels: uint8 (B, S, S, 3), RGB; the receiver's own. index: int64 (B,), rows of the grid.
    """

    pixels: RGBArray
    index: NDArray[np.int64]


@dataclass
class StreamStats:
    """Where a stream's time went, summed over its threads, in seconds; the streams that share it add to it.

    ``*_s`` is time on the clock, ``*_cpu_s`` processor time of the reading threads. decode covers decompressing blocks,
    copy putting them where they belong, resample averaging and filtering.
    """

    fetch_s: float = 0.0
    fetch_cpu_s: float = 0.0
    decode_s: float = 0.0
    decode_cpu_s: float = 0.0
    copy_s: float = 0.0
    copy_cpu_s: float = 0.0
    resample_s: float = 0.0
    resample_cpu_s: float = 0.0
    tiles: int = 0
    blocks: int = 0
    peak_bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, clock: _Stopwatch, blocks: int) -> None:
        """Add a job's times."""
        with self._lock:
            self.blocks += blocks
            for stage in ("fetch", "decode", "copy", "resample"):
                wall, cpu = clock.spent.get(stage, (0.0, 0.0))
                setattr(self, f"{stage}_s", getattr(self, f"{stage}_s") + wall)
                setattr(self, f"{stage}_cpu_s", getattr(self, f"{stage}_cpu_s") + cpu)


class _Stopwatch:
    """Time of one job by stage: each lap goes to the stage that it ends."""

    def __init__(self) -> None:
        self.spent: dict[str, tuple[float, float]] = {}
        self._wall, self._cpu = time.perf_counter(), time.thread_time()

    def lap(self, stage: str) -> None:
        wall, cpu = time.perf_counter(), time.thread_time()
        before = self.spent.get(stage, (0.0, 0.0))
        self.spent[stage] = (before[0] + wall - self._wall, before[1] + cpu - self._cpu)
        self._wall, self._cpu = wall, cpu


def stream_tiles(
    slide: Slide,
    grid: TileGrid,
    *,
    batch_size: int = 64,
    threads: int | None = None,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    stats: StreamStats | None = None,
) -> Iterator[TileBatch]:
    """The tiles of ``grid`` in its order, in batches of ``batch_size`` (the last may be smaller).

    threads: readers and decoders (default: the cores that this process may use). memory_bytes: what decoded pixels
    that were not handed out yet may take; never less is used than one batch and the blocks under it need. stats:
    collects times.

    Every native block is fetched and decoded at most once. Off the slide and in missing blocks tiles are white. Pixels
    depend neither on ``batch_size`` nor on ``threads``. Closing the iterator stops the threads.

    Raises SlideReadError, naming slide and tile, when a block cannot be read.
    """
    if batch_size < 1 or (threads is not None and threads < 1):
        raise ValueError(f"batch_size {batch_size} and threads {threads} must be at least 1")
    cut = choose_cut(slide.planes, grid.scale_l0, grid.corners_l0)
    corners = grid.corners_l0 / np.asarray(cut.sample_l0)
    stream = _Stream(slide, cut, corners, grid.spec.size_px, batch_size, threads, memory_bytes, stats)
    return stream.batches()


def read_tiles(
    slide: Slide,
    corners_l0: NDArray[np.float64] | NDArray[np.int64],
    tile_size_l0: float | FloatPair,
    size_px: int,
    *,
    threads: int | None = None,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
) -> RGBArray:
    """Tiles at any coordinates, uint8 (N, size_px, size_px, 3), in their order.

    corners_l0: (N, 2), top-left corners (x, y) in level-0 pixels, whole or not. tile_size_l0: side of the footprint in
    level-0 pixels, one number or (x, y). Pixels are those that a grid with such tiles gives.

    Raises SlideReadError, naming slide and tile, when a block cannot be read.
    """
    size = tile_size_l0 if isinstance(tile_size_l0, tuple) else (float(tile_size_l0), float(tile_size_l0))
    scale = (size[0] / size_px, size[1] / size_px)
    corners = np.asarray(corners_l0, dtype=np.float64).reshape(-1, 2)
    out = np.empty((len(corners), size_px, size_px, 3), np.uint8)
    # Corners that meet the pixels of the best plane are cut from it; the others, each in the way that suits it.
    ways: dict[Cut, list[int]] = {}
    for i in range(len(corners)):
        ways.setdefault(choose_cut(slide.planes, scale, corners[i : i + 1]), []).append(i)
    for cut, rows in ways.items():
        # Neighbours together, so that blocks are not kept longer than needed.
        order = np.asarray(sorted(rows, key=lambda i: (corners[i, 1] // size[1], corners[i, 0])), np.int64)
        stream = _Stream(
            slide, cut, corners[order] / np.asarray(cut.sample_l0), size_px, 64, threads, memory_bytes, None
        )
        for batch in stream.batches():
            out[order[batch.index]] = batch.pixels
    return out


def available_cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


class _Batch:
    """A batch under way: its tiles, and the patches they are made from where those are not the tiles themselves."""

    def __init__(self, count: int, size_px: int, patch_px: tuple[int, int] | None) -> None:
        self.pixels: RGBArray = np.empty((count, size_px, size_px, 3), np.uint8)
        self.patches: RGBArray = (
            self.pixels if patch_px is None else np.empty((count, patch_px[1], patch_px[0], 3), np.uint8)
        )

    @property
    def nbytes(self) -> int:
        own = self.pixels.nbytes
        return own if self.patches is self.pixels else own + self.patches.nbytes


class _Stream:
    """One pass over the tiles at ``corners`` (sample pixels, float64 (N, 2)) of one slide."""

    def __init__(
        self,
        slide: Slide,
        cut: Cut,
        corners: NDArray[np.float64],
        size_px: int,
        batch_size: int,
        threads: int | None,
        memory_bytes: int,
        stats: StreamStats | None,
    ) -> None:
        self.slide, self.cut, self.corners, self.size_px = slide, cut, corners, size_px
        self.batch_size, self.memory_bytes = batch_size, memory_bytes
        self.threads = threads or available_cores()
        self.stats = stats if stats is not None else StreamStats()
        plane = cut.plane
        by_block = cut.shrink if cut.by_block else 1
        self.block_px = (plane.block_px[0] // by_block, plane.block_px[1] // by_block)
        # Shrunk, the last pixels of a plane may be parts of boxes; their missing part counts as white.
        self.sample_px = (-(-plane.size_px[0] // by_block), -(-plane.size_px[1] // by_block))
        self.resampler: Resampler | None = None
        self.patch_px: tuple[int, int] | None = None
        if not cut.pixel_for_pixel:
            edge = (plane.size_px[0] / by_block, plane.size_px[1] / by_block)
            self.resampler = Resampler(cut.ratio, cut.sample_l0, size_px, edge)
            self.patch_px = self.resampler.patch_px
            starts = [self.resampler.patch_corner(corners[:, axis], axis) for axis in (0, 1)]
            self.patch_corners = np.stack(starts, axis=1)
        elif cut.by_block:
            self.patch_corners = np.rint(corners).astype(np.int64)
        else:
            self.patch_px = (size_px * cut.shrink, size_px * cut.shrink)
            self.patch_corners = np.rint(corners * cut.shrink).astype(np.int64)

        # Groups fill batches evenly and never straddle two.
        index = np.arange(len(corners))
        per_batch = -(-min(batch_size, max(len(corners), 1)) // GROUP_TILES)
        group = (index // batch_size) * per_batch + (index % batch_size) * per_batch // batch_size
        _, self.group_of_tile, counts = np.unique(group, return_inverse=True, return_counts=True)
        self.group_start = np.concatenate([[0], np.cumsum(counts)])
        extent = self.patch_px or (size_px, size_px)
        self.plan: BlockPlan = plan_blocks(
            self.patch_corners, extent, self.block_px, plane.blocks, self.group_of_tile.astype(np.int64)
        )
        # How many jobs must end before a group is complete.
        self.awaited = np.bincount([g for groups in self.plan.groups for g in groups], minlength=len(counts)).tolist()
        beyond = (self.patch_corners < 0) | (self.patch_corners + np.asarray(extent) > np.asarray(self.sample_px))
        self.off_slide = beyond.any(axis=1)

        self.live: dict[int, _Batch] = {}
        self.live_bytes = 0
        self.lock = threading.Lock()
        self.stopped = threading.Event()

    def batches(self) -> Iterator[TileBatch]:
        jobs = len(self.group_start) - 1
        running: deque[Future[None]] = deque()
        submitted = 0
        with ThreadPoolExecutor(self.threads, thread_name_prefix="tiles") as pool:
            try:
                for b, first in enumerate(range(0, len(self.corners), self.batch_size)):
                    end = min(first + self.batch_size, len(self.corners))
                    last_job = int(self.group_of_tile[end - 1])
                    awaited = last_job + 1 - (submitted - len(running))
                    while True:
                        while submitted < jobs and self._may_begin(submitted, b, needed=not running):
                            self._prepare(submitted)
                            running.append(pool.submit(self._run, submitted))
                            submitted += 1
                        if awaited <= 0:
                            break
                        running.popleft().result()
                        awaited -= 1
                    batch = self.live.pop(b)
                    self.live_bytes -= batch.nbytes
                    self.stats.tiles += end - first
                    yield TileBatch(batch.pixels, np.arange(first, end))
            finally:
                self.stopped.set()
                for future in running:
                    future.cancel()

    def _may_begin(self, job: int, batch: int, needed: bool) -> bool:
        """Whether a job may be submitted while ``batch`` is waited for."""
        if needed and self._batch_of_group(job) == batch:
            return True
        if self._batch_of_group(job) > batch + BATCHES_AHEAD:
            return False
        fresh = {b for g in self.plan.groups[job] if (b := self._batch_of_group(g)) not in self.live}
        return self.live_bytes + sum(self._batch_bytes(b) for b in fresh) <= self.memory_bytes

    def _batch_of_group(self, group: int) -> int:
        return int(self.group_start[group]) // self.batch_size

    def _batch_tiles(self, batch: int) -> range:
        first = batch * self.batch_size
        return range(first, min(first + self.batch_size, len(self.corners)))

    def _batch_bytes(self, batch: int) -> int:
        count = len(self._batch_tiles(batch))
        patch = self.patch_px[0] * self.patch_px[1] if self.patch_px else 0
        return count * 3 * (self.size_px**2 + patch)

    def _prepare(self, job: int) -> None:
        """Set up the batches that a job writes to."""
        for group in self.plan.groups[job]:
            number = self._batch_of_group(group)
            if number in self.live:
                continue
            tiles = self._batch_tiles(number)
            batch = _Batch(len(tiles), self.size_px, self.patch_px)
            for i in np.flatnonzero(self.off_slide[tiles.start : tiles.stop]):
                batch.patches[i] = WHITE
            self.live[number] = batch
            self.live_bytes += batch.nbytes
            self.stats.peak_bytes = max(self.stats.peak_bytes, self.live_bytes)

    def _run(self, job: int) -> None:
        """Fetch, decode and copy a job's blocks, then finish the groups that are complete."""
        if self.stopped.is_set():
            return
        plan, plane = self.plan, self.cut.plane
        clock = _Stopwatch()
        begin, end = int(plan.job_start[job]), int(plan.job_start[job + 1])
        cells = [(c, r) for c, r in plan.cells[begin:end].tolist()]
        batches = {self._batch_of_group(g): self.live[self._batch_of_group(g)] for g in plan.groups[job]}
        tile = int(self.group_start[job])
        try:
            fetched = self.slide.fetch(plane, cells)
            clock.lap("fetch")
            part_starts = plan.part_start[begin : end + 1].tolist()
            for i, (cell, data) in enumerate(zip(cells, fetched, strict=True)):
                if self.stopped.is_set():
                    return
                tiles = plan.part_tile[part_starts[i] : part_starts[i + 1]].tolist()
                tile = tiles[0]
                block = None if data is None else self.slide.decode(plane, cell, data)
                clock.lap("decode")
                if block is not None and self.cut.by_block and self.cut.shrink > 1:
                    block = shrink(block, self.cut.shrink)
                    clock.lap("resample")
                x, y = cell[0] * self.block_px[0], cell[1] * self.block_px[1]
                for t in tiles:
                    batch = batches[t // self.batch_size]
                    self._copy(block, x, y, t, batch.patches[t % self.batch_size])
                if block is None:
                    self.slide.stats.add(missing=1)
                clock.lap("copy")
        except WsiPipeError as error:
            raise SlideReadError(f"{error.message} (needed for {self._name(tile)})", remedy=error.remedy) from error
        except Exception as error:
            raise SlideReadError(
                f"{self.slide.info.path}: {self._name(tile)} cannot be read: {type(error).__name__}: {error}"
            ) from error
        for group in self._completed(job):
            self._finish(group, batches[self._batch_of_group(group)])
        clock.lap("resample")
        self.stats.add(clock, len(cells))

    def _name(self, tile: int) -> str:
        x, y = (self.corners[tile] * np.asarray(self.cut.sample_l0)).tolist()
        return f"tile {tile} at level-0 x {x:.0f}, y {y:.0f}"

    def _copy(self, block: RGBArray | None, x: int, y: int, tile: int, patch: RGBArray) -> None:
        """Copy what a block at (x, y), sample pixels, has of a tile's patch; white where the block is missing."""
        left, top = x - int(self.patch_corners[tile, 0]), y - int(self.patch_corners[tile, 1])
        height, width = (self.block_px[1], self.block_px[0]) if block is None else block.shape[:2]
        x0, y0 = max(left, 0), max(top, 0)
        x1, y1 = min(left + width, patch.shape[1]), min(top + height, patch.shape[0])
        if x0 < x1 and y0 < y1:
            patch[y0:y1, x0:x1] = WHITE if block is None else block[y0 - top : y1 - top, x0 - left : x1 - left]

    def _completed(self, job: int) -> list[int]:
        """Groups for which this was the last job; each is named to one job only."""
        complete = []
        with self.lock:
            for group in self.plan.groups[job]:
                self.awaited[group] -= 1
                if self.awaited[group] == 0:
                    complete.append(group)
        return complete

    def _finish(self, group: int, batch: _Batch) -> None:
        """Make tiles of patches."""
        if batch.patches is batch.pixels:
            return
        for tile in range(int(self.group_start[group]), int(self.group_start[group + 1])):
            if self.stopped.is_set():
                return
            i = tile % self.batch_size
            if self.resampler is None:
                batch.pixels[i] = shrink(batch.patches[i], self.cut.shrink)
            else:
                across, down = (self.resampler.axis_filter(float(self.corners[tile, axis]), axis) for axis in (0, 1))
                self.resampler.run(batch.patches[i], across, down, batch.pixels[i])


def shrink(block: RGBArray, factor: int) -> RGBArray:
    """Means over boxes of ``factor`` x ``factor`` pixels; parts of boxes at the right and bottom edge meet white."""
    import cv2

    height, width = block.shape[:2]
    if height % factor or width % factor:
        whole = np.full((height + -height % factor, width + -width % factor, 3), WHITE, np.uint8)
        whole[:height, :width] = block
        block = whole
    size = (block.shape[1] // factor, block.shape[0] // factor)
    return np.asarray(cv2.resize(block, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
