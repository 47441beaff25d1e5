"""LR tiles streamed from the slides, several slides mixed, in bounded memory; nothing is written out as images."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lrmil.distill.augment import stain_mixes
from lrmil.distill.ranks import ALONE, Ranks
from lrmil.distill.settings import DistillSettings
from lrmil.distill.targets import DistillSlide
from wsi_pipe.cores import available_cores
from wsi_pipe.slides import open_slide
from wsi_pipe.tiles import stream_tiles

__all__ = ["PixelBatch", "PixelSource"]


class PixelBatch(NamedTuple):
    """Tiles as they were read, and how they are to be changed, which happens where the student is.

    pixels: uint8 (B, S, S, 3). slide, tile: int64 (B,), which. symmetry: int64 (B,), how each is to be turned. stain:
    float32 (B, 4, 3), see ``augment.stained``, None where colours stay. shares: of several processes, what makes the
    mean over this one's children, and over its tiles, its part of the mean of all of them; 1 for a process alone.
    tiles: of the batch of all processes together, where there are several.
    """

    pixels: NDArray[np.uint8]
    slide: NDArray[np.int64]
    tile: NDArray[np.int64]
    symmetry: NDArray[np.int64]
    stain: NDArray[np.float32] | None = None
    shares: tuple[float, float] = (1.0, 1.0)
    tiles: int = 0


@dataclass(frozen=True)
class _Planned:
    """A batch before its tiles are read: the fields of PixelBatch."""

    slide: NDArray[np.int64]
    tile: NDArray[np.int64]
    symmetry: NDArray[np.int64]
    stain: NDArray[np.float32] | None
    shares: tuple[float, float] = (1.0, 1.0)
    tiles: int = 0

    def dealt(self, ranks: Ranks, children: NDArray[np.int64]) -> _Planned:
        """A process's own tiles of the batch; where there are too few for all, the first tile, which does not count.

        children: (B,), how many each tile has.
        """
        own = np.arange(ranks.rank, len(self.tile), ranks.count)
        counted = len(own) > 0
        own = own if counted else np.zeros(1, np.int64)
        shares = (
            ranks.count * float(children[own].sum()) / float(children.sum()) * counted,
            ranks.count * len(own) / len(self.tile) * counted,
        )
        stain = None if self.stain is None else self.stain[own]
        return _Planned(self.slide[own], self.tile[own], self.symmetry[own], stain, shares, len(self.tile))


class _Tiles(NamedTuple):
    """pixels: of the tiles ``rows`` of a slide, ascending, or of all of them."""

    pixels: NDArray[np.uint8]
    rows: NDArray[np.int64] | None = None

    def of(self, tile: NDArray[np.int64]) -> NDArray[np.uint8]:
        return self.pixels[tile if self.rows is None else np.searchsorted(self.rows, tile)]


Wanted = Mapping[int, NDArray[np.int64] | None]
"""Tiles to read: slide -> rows, None for all."""


class PixelSource:
    """The LR tiles of some slides, in order or shuffled, with the changes that augmentation is to make.

    They are kept decoded when all of them fit into ``cache_mib``; otherwise each pass reads them anew, the next group
    of slides while the last one is worked on. All cores read, unless ``threads`` says otherwise. ranks: of several
    processes each has its share of every shuffled batch, and reads no more, as long as tiles are not kept.
    """

    def __init__(
        self,
        slides: Sequence[DistillSlide],
        settings: DistillSettings,
        progress: Callable[[str], object] | None = None,
        *,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        self.slides = list(slides)
        self.settings = settings
        self.threads = settings.threads or available_cores()
        self.side_px = slides[0].lr.spec.size_px
        self.reads = 0
        size = sum(len(slide) for slide in slides) * self.side_px**2 * 3
        self._kept: dict[int, _Tiles] | None = None
        if size <= settings.cache_mib << 20:
            with ThreadPoolExecutor(self.threads) as pool:
                self._kept = {}
                for number, future in self._reading(pool, dict.fromkeys(range(len(self.slides)))).items():
                    self._kept[number] = future.result()
                    if progress:
                        progress(self.slides[number].slide_id)

    def __len__(self) -> int:
        return sum(len(slide) for slide in self.slides)

    def _reading(self, pool: ThreadPoolExecutor, wanted: Wanted) -> dict[int, Future[_Tiles]]:
        """The tiles of some slides on their way; where slides are fewer than threads, several work on each."""
        each = max(self.threads // max(len(wanted), 1), 1)
        return {number: pool.submit(self._read, number, rows, each) for number, rows in wanted.items()}

    def _read(self, number: int, rows: NDArray[np.int64] | None, threads: int) -> _Tiles:
        slide = self.slides[number]
        self.reads += 1
        grid = slide.lr if rows is None else slide.lr.take(rows)
        out = np.empty((len(grid), self.side_px, self.side_px, 3), np.uint8)
        opened = open_slide(slide.path, mpp=slide.mpp, scene=slide.scene, z=slide.z)
        try:
            for batch in stream_tiles(opened, grid, threads=threads):
                out[batch.index] = batch.pixels
        finally:
            opened.close()
        return _Tiles(out, rows)

    def in_order(self) -> Iterator[PixelBatch]:
        """Every tile once, slide by slide, as it is."""
        size = self.settings.batch_size
        for tiles in self._passed({i: None} for i in range(len(self.slides))):
            ((number, own),) = tiles.items()
            for start in range(0, len(own.pixels), size):
                part = own.pixels[start : start + size]
                index = np.arange(start, start + len(part), dtype=np.int64)
                zeros = np.zeros(len(part), np.int64)
                yield PixelBatch(part, np.full(len(part), number, np.int64), index, zeros)

    def shuffled(self, seed: Sequence[int]) -> Iterator[PixelBatch]:
        """Every tile once, mixed over groups of slides, to be augmented; the same for the same seed."""
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(self.slides))
        plans: deque[list[_Planned]] = deque()

        def wanted() -> Iterator[Wanted]:
            for group in self._mixed(order.tolist()):
                plans.append([*self._planned(group, rng)])
                yield self._rows(plans[-1]) if self.ranks.count > 1 else dict.fromkeys(group)

        for tiles in self._passed(wanted()):
            for plan in plans.popleft():
                pixels = np.empty((len(plan.tile), self.side_px, self.side_px, 3), np.uint8)
                for number in np.unique(plan.slide).tolist():
                    at = np.flatnonzero(plan.slide == number)
                    pixels[at] = tiles[number].of(plan.tile[at])
                yield PixelBatch(pixels, plan.slide, plan.tile, plan.symmetry, plan.stain, plan.shares, plan.tiles)

    def _rows(self, plans: Sequence[_Planned]) -> dict[int, NDArray[np.int64] | None]:
        """Which tiles some batches need, slide by slide."""
        slides = np.concatenate([plan.slide for plan in plans])
        tiles = np.concatenate([plan.tile for plan in plans])
        return {number: np.unique(tiles[slides == number]) for number in np.unique(slides).tolist()}

    def _planned(self, numbers: Sequence[int], rng: np.random.Generator) -> Iterator[_Planned]:
        """The batches of a group of slides."""
        settings = self.settings
        pairs = np.concatenate([np.stack([np.full(n, i), np.arange(n)], 1) for i, n in self._sizes(numbers)])
        pairs = pairs[rng.permutation(len(pairs))]
        for start in range(0, len(pairs), settings.batch_size):
            slide, tile = pairs[start : start + settings.batch_size].astype(np.int64).T
            symmetry = rng.integers(0, 8, len(tile)) if settings.flips else np.zeros(len(tile), np.int64)
            stain = stain_mixes(rng.random((len(tile), 2, 3)), settings.stain) if settings.stain else None
            plan = _Planned(slide, tile, symmetry, stain)
            yield plan if self.ranks.count == 1 else plan.dealt(self.ranks, self._children(slide, tile))

    def _children(self, slide: NDArray[np.int64], tile: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many children each of some tiles has."""
        found = [self.slides[i].children.children[t] for i, t in zip(slide.tolist(), tile.tolist(), strict=True)]
        return np.asarray((np.stack(found) >= 0).sum(1), np.int64)

    def _sizes(self, numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
        return ((number, len(self.slides[number])) for number in numbers)

    def _mixed(self, order: Sequence[int]) -> list[list[int]]:
        """Slides in groups of about ``mix_mib``, the same whether or not their tiles are kept."""
        groups: list[list[int]] = [[]]
        size = 0
        for number in order:
            more = len(self.slides[number]) * self.side_px**2 * 3
            if groups[-1] and size + more > self.settings.mix_mib << 20:
                groups.append([])
                size = 0
            groups[-1].append(number)
            size += more
        return groups

    def _passed(self, wanted: Iterable[Wanted]) -> Iterator[dict[int, _Tiles]]:
        """What is wanted, part by part, the next one on its way."""
        if self._kept is not None:
            for part in wanted:
                yield {number: self._kept[number] for number in part}
            return
        with ThreadPoolExecutor(self.threads) as pool:
            ahead: dict[int, Future[_Tiles]] | None = None
            for part in wanted:
                futures, ahead = ahead, self._reading(pool, part)
                if futures is not None:
                    yield {i: future.result() for i, future in futures.items()}
            if ahead is not None:
                yield {i: future.result() for i, future in ahead.items()}
