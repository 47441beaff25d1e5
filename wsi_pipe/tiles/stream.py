"""Batches of tiles in grid order, in bounded memory, on several threads.

Tiles are dealt into *groups* of neighbours. A group's *job* fetches, at once, the blocks that no earlier group needed,
and decodes each. What is one tile's alone goes straight into it; other blocks are put on a shelf until the last tile
that touches them is made. The job that brings a group's last block, often a later group's neighbour in the same row,
puts its tiles together and resamples them. So every block is decoded once, and a batch is ready when the jobs up to its
last group are.

Where a tile's pixels come from depends on the tile alone, so neither threads nor batch size can change them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.cores import available_cores
from wsi_pipe.errors import SlideError, SlideReadError
from wsi_pipe.geometry import FloatPair, IntPair, TileGrid
from wsi_pipe.slides.base import WHITE, RGBArray, Slide
from wsi_pipe.slides.room import ReadsInto
from wsi_pipe.tiles.blocks import Decoded, Targets, decode_at_once, read_at_once
from wsi_pipe.tiles.paste import Held, hold, paste_blocks
from wsi_pipe.tiles.plan import Cut, alike, choose_cut, plan_blocks
from wsi_pipe.tiles.resample import Resampler
from wsi_pipe.tiles.shelf import BlockShelf
from wsi_pipe.tiles.sizing import group_size, share_memory
from wsi_pipe.tiles.timing import Stopwatch, StreamStats

__all__ = ["DEFAULT_MEMORY_BYTES", "NewTiles", "TileBatch", "read_tiles", "stream_tiles"]

DEFAULT_MEMORY_BYTES = 512 * 1024 * 1024

NewTiles = Callable[[tuple[int, int, int, int]], RGBArray]
"""Gives an array uint8 of a shape, contiguous, with anything in it."""


def _new_tiles(shape: tuple[int, int, int, int]) -> RGBArray:
    return np.empty(shape, np.uint8)


@dataclass(frozen=True)
class TileBatch:
    """Neighbouring tiles of a grid.

    pixels: uint8 (B, S, S, 3), RGB; the receiver's own. index: int64 (B,), rows of the grid.
    """

    pixels: RGBArray
    index: NDArray[np.int64]


def stream_tiles(
    slide: Slide,
    grid: TileGrid,
    *,
    batch_size: int = 64,
    threads: int | None = None,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    stats: StreamStats | None = None,
    new_tiles: NewTiles | None = None,
) -> Iterator[TileBatch]:
    """The tiles of ``grid`` in its order, in batches of ``batch_size`` (the last may be smaller).

    threads: readers and decoders (default: the cores that this process may use). memory_bytes: what decoded pixels
    that were not handed out yet may take; never less is used than one batch and the blocks under it need. stats:
    collects times. new_tiles: gives the arrays that tiles are made in, uint8 (B, S, S, 3), contiguous, where any memory
    will not do.

    Every native block is fetched and decoded at most once. Off the slide and in missing blocks tiles are white. Pixels
    depend neither on ``batch_size`` nor on ``threads``. Closing the iterator stops the threads.

    Raises SlideReadError, naming slide and tile, when a block cannot be read.
    """
    if batch_size < 1 or (threads is not None and threads < 1):
        raise ValueError(f"batch_size {batch_size} and threads {threads} must be at least 1")
    cut = choose_cut(slide.planes, grid.scale_l0, grid.corners_l0)
    corners = grid.corners_l0 / np.asarray(cut.sample_l0)
    stream = _Stream(slide, cut, corners, grid.spec.size_px, batch_size, threads, memory_bytes, stats, new_tiles)
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
    ways: dict[Cut, list[NDArray[np.int64]]] = {}
    for rows in alike(slide.planes, scale, corners):
        ways.setdefault(choose_cut(slide.planes, scale, corners[rows]), []).append(rows)
    for cut, parts in ways.items():
        rows = np.concatenate(parts)
        # Neighbours together, so that blocks are not kept longer than needed.
        order = rows[np.lexsort((corners[rows, 0], corners[rows, 1] // size[1]))]
        at = corners[order] / np.asarray(cut.sample_l0)
        for batch in _Stream(slide, cut, at, size_px, 64, threads, memory_bytes, None).batches():
            out[order[batch.index]] = batch.pixels
    return out


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
        new_tiles: NewTiles | None = None,
    ) -> None:
        self.slide, self.cut, self.corners, self.size_px = slide, cut, corners, size_px
        self.batch_size, self.memory_bytes = batch_size, memory_bytes
        self.threads = threads or available_cores()
        self.stats = stats if stats is not None else StreamStats()
        self.new_tiles: NewTiles = new_tiles or _new_tiles
        plane = cut.plane
        by_block = cut.shrink if cut.by_block else 1
        self.block_px = (plane.block_px[0] // by_block, plane.block_px[1] // by_block)
        self.block_origin = np.asarray(plane.origin_px, np.int64) // by_block
        self.resampler: Resampler | None = None
        if not cut.pixel_for_pixel:
            edge = (plane.size_px[0] / by_block, plane.size_px[1] / by_block)
            self.resampler = Resampler(cut.ratio, cut.sample_l0, size_px, edge)
            self.patch_px = self.resampler.patch_px
            starts = [self.resampler.patch_corner(corners[:, axis], axis) for axis in (0, 1)]
            self.patch_corners = np.stack(starts, axis=1)
        else:
            by_patch = cut.shrink // by_block
            self.patch_px = (size_px * by_patch, size_px * by_patch)
            self.patch_corners = np.rint(corners * by_patch).astype(np.int64)
        self.reads_into = slide if isinstance(slide, ReadsInto) and slide.reads_into(plane) else None
        self.shrunk = cut.by_block and cut.shrink > 1
        # Where tiles are patches, a block that one tile alone needs goes straight into it.
        self.direct = self.patch_px == (size_px, size_px) and self.resampler is None

        # Groups fill batches evenly and never straddle two.
        index = np.arange(len(corners))
        corners_laid = self.patch_corners - self.block_origin
        read_px = int(np.prod([p * by_block * plane.reduce for p in self.patch_px]))
        whole = self.direct and not self.shrunk and not any(size_px % side for side in self.block_px)
        whole = whole and not (corners_laid % self.block_px).any()
        group_tiles = group_size(
            len(corners), self.threads, read_px, self.patch_px, self.block_px, memory_bytes, whole=whole
        )
        per_batch = -(-min(batch_size, max(len(corners), 1)) // group_tiles)
        group = (index // batch_size) * per_batch + (index % batch_size) * per_batch // batch_size
        _, group_of_tile, counts = np.unique(group, return_inverse=True, return_counts=True)
        self.group_of_tile = group_of_tile.astype(np.int64)
        self.group_start = np.concatenate([[0], np.cumsum(counts)]).tolist()
        # Shrunk, the last pixels of a plane may be parts of boxes; their missing part counts as white.
        plane_px = (-(-plane.size_px[0] // by_block), -(-plane.size_px[1] // by_block))
        # From where the blocks begin, which may be before the plane does.
        x, y = self.block_origin.tolist()
        laid_px = (plane_px[0] - x, plane_px[1] - y)
        self.plan = plan_blocks(corners_laid, self.patch_px, self.block_px, laid_px, self.group_of_tile)
        # How many jobs must end before a group's blocks are all there.
        self.awaited = np.bincount([g for groups in self.plan.serves for g in groups], minlength=len(counts)).tolist()
        beyond = (self.patch_corners < 0) | (self.patch_corners + self.patch_px > plane_px)
        self.off_slide: NDArray[np.bool_] = np.logical_or(beyond[:, 0], beyond[:, 1])

        self.offsets = self._offsets()
        self.batch_bytes = 3 * size_px**2 * min(batch_size, len(corners))
        job_bytes = int(np.diff(self.plan.job_start).max(initial=0)) * 3 * int(np.prod(self.block_px))
        self.sizes = share_memory(memory_bytes, self.threads, batch_size, self.batch_bytes, group_tiles, job_bytes)
        self.shelf = BlockShelf(self.plan.uses.tolist(), self.sizes.shelf_bytes)
        self.live: dict[int, RGBArray] = {}
        self.lock = threading.Lock()
        self.local = threading.local()
        self.stopped = threading.Event()

    def batches(self) -> Iterator[TileBatch]:
        jobs = len(self.group_start) - 1
        running: deque[Future[None]] = deque()
        submitted = 0
        with ThreadPoolExecutor(self.threads, thread_name_prefix="tiles") as pool:
            try:
                for b, first in enumerate(range(0, len(self.corners), self.batch_size)):
                    end = min(first + self.batch_size, len(self.corners))
                    # A group is served by its own job and by earlier ones alone, so the batch is ready with the last.
                    awaited = int(self.group_of_tile[end - 1]) + 1 - (submitted - len(running))
                    while True:
                        while submitted < jobs and self._may_begin(submitted, b, must=awaited > 0 and not running):
                            self._begin_batch(self._batch_of(self.group_start[submitted]))
                            running.append(pool.submit(self._run, submitted))
                            submitted += 1
                        if awaited <= 0:
                            break
                        running.popleft().result()
                        awaited -= 1
                    self.stats.tiles += end - first
                    yield TileBatch(self.live.pop(b), np.arange(first, end))
            finally:
                self.stopped.set()
                for future in running:
                    future.cancel()
                pool.shutdown()
                self.shelf.close()

    def _batch_of(self, tile: int) -> int:
        return tile // self.batch_size

    def _held_bytes(self) -> int:
        return len(self.live) * self.batch_bytes + self.shelf.nbytes

    def _may_begin(self, job: int, batch: int, must: bool) -> bool:
        """Whether a job may be submitted while ``batch`` is waited for; it must where nothing else would go on."""
        own = self._batch_of(self.group_start[job])
        if must:
            return True
        if own > batch + self.sizes.ahead or len(self.live) > self.sizes.ahead + 1:
            return False
        return own in self.live or self._held_bytes() + self.batch_bytes <= self.memory_bytes

    def _begin_batch(self, number: int) -> None:
        if number in self.live:
            return
        first = number * self.batch_size
        count = min(self.batch_size, len(self.corners) - first)
        pixels = self.new_tiles((count, self.size_px, self.size_px, 3))
        if self.direct:
            pixels[self.off_slide[first : first + count]] = WHITE
        self.live[number] = pixels

    def _run(self, job: int) -> None:
        """Fetch and decode a job's blocks, then put together the groups whose blocks are all there."""
        plan = self.plan
        clock = Stopwatch()
        begin, end = int(plan.job_start[job]), int(plan.job_start[job + 1])
        pixels = self.live[self._batch_of(self.group_start[job])]
        later = plan.last_group[begin:end] > job
        targets = Targets(pixels, self.offsets[begin:end], later, self.cut.plane.block_px)
        self._read(begin, plan.cells[begin:end], targets, clock)
        if self.stopped.is_set():
            return
        for group in self._completed(job):
            self._assemble(group, clock)
        if self.shelf.nbytes > self.shelf.limit_bytes:
            held = np.flatnonzero(plan.last_group[begin:end] > job + self.sizes.near) + begin
            self.shelf.spill(held.tolist())
        with self.lock:
            self.stats.peak_bytes = max(self.stats.peak_bytes, self._held_bytes())
            self.stats.spilled_bytes = max(self.stats.spilled_bytes, self.shelf.spilled_bytes)
        self.stats.add(clock, end - begin)

    def _read(self, begin: int, cells: NDArray[np.int64], targets: Targets, clock: Stopwatch) -> None:
        """Fetch and decode blocks, the first of which is number ``begin``, into their tiles or onto the shelf."""
        plane = self.cut.plane
        at_once = Decoded()
        if self.reads_into is not None:
            at_once = read_at_once(self.reads_into, plane, cells, targets, clock)
        if len(at_once.in_place) == len(cells):
            return
        left = [i for i in range(len(cells)) if i not in at_once]
        wanted = {i: (int(cells[i, 0]), int(cells[i, 1])) for i in left}
        fetched: dict[int, Any] = {}
        i = 0
        straight: dict[int, Held] = {}
        kept: dict[int, Held] = {}
        try:
            if left:
                i = left[0]
                fetched = dict(zip(left, self.slide.fetch(plane, list(wanted.values())), strict=True))
                clock.lap("fetch")
                others = decode_at_once(self.slide, plane, wanted, fetched, targets)
                at_once = Decoded(at_once.in_place | others.in_place, at_once.alone | others.alone)
                clock.lap("decode")
            one_tile = ((self.plan.uses[begin : begin + len(cells)] == 1) & self.direct).tolist()
            for i in range(len(cells)):
                if i in at_once.in_place:
                    continue
                block = at_once.alone.get(i)
                if block is None or self.shrunk:
                    if self.stopped.is_set():
                        return
                    block = self._decode(wanted.get(i), fetched.get(i), block, clock)
                    if one_tile[i]:  # at once, so that it is not held until the job's end
                        self._paste_own({begin + i: block}, targets.pixels)
                        continue
                (straight if one_tile[i] else kept)[begin + i] = block
        except SlideError as error:
            where = self._name(int(self.plan.first_tile[begin + i]))
            raise SlideReadError(f"{error.message} (needed for {where})", remedy=error.remedy) from error
        except Exception as error:
            cause = str(error) or type(error).__name__
            where = self._name(int(self.plan.first_tile[begin + i]))
            raise SlideReadError(f"{self.slide.info.path}: {where}: {cause}") from error
        self.shelf.put(kept)
        if straight:
            self._paste_own(straight, targets.pixels)
        clock.lap("copy")

    def _paste_own(self, blocks: Mapping[int, Held], pixels: RGBArray) -> None:
        """Paste blocks, by number, each into the one tile that needs it."""
        numbers = np.fromiter(blocks, np.int64, len(blocks))
        tiles = self.plan.first_tile[numbers]
        paste_blocks(list(blocks.values()), self._places(numbers, tiles), pixels, tiles % self.batch_size)

    def _decode(self, cell: IntPair | None, data: Any, block: Held | None, clock: Stopwatch) -> Held:
        """A block in sample pixels, of one that is decoded or of the data of one at ``cell``, which may be missing."""
        pixels = None if block is None else block.pixels
        if pixels is None and cell is not None and data is not None:
            pixels = self.slide.decode(self.cut.plane, cell, data)
            clock.lap("decode")
        if pixels is None:
            self.slide.stats.add(missing=1)
        elif self.shrunk:
            pixels = shrink(pixels, self.cut.shrink)
            clock.lap("resample")
        return hold(pixels, self.block_px)

    def _name(self, tile: int) -> str:
        x, y = (self.corners[tile] * np.asarray(self.cut.sample_l0)).tolist()
        return f"tile {tile} at level-0 x {x:.0f}, y {y:.0f}"

    def _places(self, blocks: NDArray[np.int64] | slice, tiles: NDArray[np.int64] | int) -> NDArray[np.int64]:
        """Where the corner of each block lies, (x, y) (n, 2), in the patch of each tile, or of the one tile."""
        corners: NDArray[np.int64] = self.plan.cells[blocks] * self.block_px + self.block_origin
        return corners - self.patch_corners[tiles]

    def _offsets(self) -> NDArray[np.int64]:
        """Where blocks go straight into their batch, see Targets: those that, as decoded, are of one tile alone."""
        plan = self.plan
        if not self.direct or self.shrunk:
            return np.full(len(plan.cells), -1, np.int64)
        places = self._places(slice(None), plan.first_tile)
        last = np.array([self.size_px - self.block_px[0], self.size_px - self.block_px[1]])
        within = (plan.uses == 1) & ((places >= 0) & (places <= last)).all(1)
        rows = (plan.first_tile % self.batch_size) * self.size_px + places[:, 1]
        return np.where(within, (rows * self.size_px + places[:, 0]) * 3, -1)

    def _completed(self, job: int) -> list[int]:
        """Groups for which this was the last job; each is named to one job only."""
        complete = []
        with self.lock:
            for group in self.plan.serves[job]:
                self.awaited[group] -= 1
                if self.awaited[group] == 0:
                    complete.append(group)
        return complete

    def _assemble(self, group: int, clock: Stopwatch) -> None:
        """Make a group's tiles of the blocks on the shelf."""
        plan = self.plan
        first, end = self.group_start[group], self.group_start[group + 1]
        uses = slice(int(plan.tile_start[first]), int(plan.tile_start[end]))
        numbers = plan.tile_block[uses]
        tiles = np.repeat(np.arange(first, end), np.diff(plan.tile_start[first : end + 1]))
        if self.direct:  # what is one tile's alone is there already
            shared = np.flatnonzero(plan.uses[numbers] > 1)
            if not len(shared):
                return
            numbers, tiles = numbers[shared], tiles[shared]
        places = self._places(numbers, tiles)
        taken: list[int] = numbers.tolist()
        pixels = self.live[self._batch_of(first)]
        if self.direct:
            self._paste_shelved(taken, places, pixels, tiles % self.batch_size)
            clock.lap("copy")
        else:
            bounds = np.searchsorted(tiles, np.arange(first, end + 1)).tolist()
            for tile, (begin, stop) in zip(range(first, end), pairwise(bounds), strict=True):
                if self.stopped.is_set():
                    return
                patch = self._patch(white=bool(self.off_slide[tile]))
                self._paste_shelved(
                    taken[begin:stop], places[begin:stop], patch[None], np.zeros(stop - begin, np.int64)
                )
                clock.lap("copy")
                self._reduce(tile, patch, pixels[tile % self.batch_size])
                clock.lap("resample")
        self.shelf.release(taken)

    def _paste_shelved(
        self, numbers: list[int], places: NDArray[np.int64], pixels: RGBArray, tiles: NDArray[np.int64]
    ) -> None:
        """Paste blocks from the shelf: in one call, or one by one where some may have to come back from the file."""
        step = 1 if self.shelf.spilled_bytes else max(len(numbers), 1)
        for first in range(0, len(numbers), step):
            part = slice(first, first + step)
            paste_blocks(self.shelf.get(numbers[part]), places[part], pixels, tiles[part])

    def _reduce(self, tile: int, patch: RGBArray, out: RGBArray) -> None:
        """Make a tile of its patch."""
        if self.resampler is None:
            out[:] = shrink(patch, self.cut.shrink)
            return
        across, down = (self.resampler.axis_filter(float(self.corners[tile, axis]), axis) for axis in (0, 1))
        self.resampler.run(patch, across, down, out)

    def _patch(self, white: bool) -> RGBArray:
        """Room of the calling thread for one tile's patch."""
        patch: RGBArray | None = getattr(self.local, "patch", None)
        if patch is None:
            patch = self.local.patch = np.empty((self.patch_px[1], self.patch_px[0], 3), np.uint8)
        if white:
            patch.fill(WHITE)
        return patch


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
