"""LR tiles streamed from the slides, several slides mixed, in bounded memory; nothing is written out as images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lrmil.distill.augment import stain_mixes
from lrmil.distill.settings import DistillSettings
from lrmil.distill.targets import DistillSlide
from wsi_pipe.cores import available_cores
from wsi_pipe.slides import open_slide
from wsi_pipe.tiles import stream_tiles

__all__ = ["PixelBatch", "PixelSource"]


class PixelBatch(NamedTuple):
    """Tiles as they were read, and how they are to be changed, which happens where the student is.

    pixels: uint8 (B, S, S, 3). slide, tile: int64 (B,), which. symmetry: int64 (B,), how each is to be turned. stain:
    float32 (B, 4, 3), see ``augment.stained``, None where colours stay.
    """

    pixels: NDArray[np.uint8]
    slide: NDArray[np.int64]
    tile: NDArray[np.int64]
    symmetry: NDArray[np.int64]
    stain: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class _Planned:
    """A batch before its tiles are read: the fields of PixelBatch."""

    slide: NDArray[np.int64]
    tile: NDArray[np.int64]
    symmetry: NDArray[np.int64]
    stain: NDArray[np.float32] | None


class PixelSource:
    """The LR tiles of some slides, in order or shuffled, with the changes that augmentation is to make.

    They are kept decoded when all of them fit into ``cache_mib``; otherwise each pass reads them anew, the next group
    of slides while the last one is worked on. All cores read, unless ``threads`` says otherwise.
    """

    def __init__(
        self, slides: Sequence[DistillSlide], settings: DistillSettings, progress: Callable[[str], object] | None = None
    ) -> None:
        self.slides = list(slides)
        self.settings = settings
        self.threads = settings.threads or available_cores()
        self.side_px = slides[0].lr.spec.size_px
        self.reads = 0
        size = sum(len(slide) for slide in slides) * self.side_px**2 * 3
        self._kept: dict[int, NDArray[np.uint8]] | None = None
        if size <= settings.cache_mib << 20:
            with ThreadPoolExecutor(self.threads) as pool:
                self._kept = {}
                for number, future in self._reading(pool, range(len(self.slides))).items():
                    self._kept[number] = future.result()
                    if progress:
                        progress(self.slides[number].slide_id)

    def __len__(self) -> int:
        return sum(len(slide) for slide in self.slides)

    def _reading(self, pool: ThreadPoolExecutor, numbers: Sequence[int]) -> dict[int, Future[NDArray[np.uint8]]]:
        """The tiles of some slides on their way; where slides are fewer than threads, several work on each."""
        each = max(self.threads // max(len(numbers), 1), 1)
        return {number: pool.submit(self._read, number, each) for number in numbers}

    def _read(self, number: int, threads: int) -> NDArray[np.uint8]:
        slide = self.slides[number]
        self.reads += 1
        out = np.empty((len(slide), self.side_px, self.side_px, 3), np.uint8)
        opened = open_slide(slide.path, mpp=slide.mpp, scene=slide.scene, z=slide.z)
        try:
            for batch in stream_tiles(opened, slide.lr, threads=threads):
                out[batch.index] = batch.pixels
        finally:
            opened.close()
        return out

    def in_order(self) -> Iterator[PixelBatch]:
        """Every tile once, slide by slide, as it is."""
        size = self.settings.batch_size
        for number, tiles in self._groups([[i] for i in range(len(self.slides))]):
            for start in range(0, len(tiles[number[0]]), size):
                part = tiles[number[0]][start : start + size]
                index = np.arange(start, start + len(part), dtype=np.int64)
                zeros = np.zeros(len(part), np.int64)
                yield PixelBatch(part, np.full(len(part), number[0], np.int64), index, zeros)

    def shuffled(self, seed: Sequence[int]) -> Iterator[PixelBatch]:
        """Every tile once, mixed over groups of slides, to be augmented; the same for the same seed."""
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(self.slides))
        for numbers, tiles in self._groups(self._mixed(order.tolist())):
            for plan in self._planned(numbers, rng):
                pixels = np.empty((len(plan.tile), self.side_px, self.side_px, 3), np.uint8)
                for number in np.unique(plan.slide).tolist():
                    at = np.flatnonzero(plan.slide == number)
                    pixels[at] = tiles[number][plan.tile[at]]
                yield PixelBatch(pixels, plan.slide, plan.tile, plan.symmetry, plan.stain)

    def _planned(self, numbers: Sequence[int], rng: np.random.Generator) -> Iterator[_Planned]:
        """The batches of a group of slides."""
        settings = self.settings
        pairs = np.concatenate([np.stack([np.full(n, i), np.arange(n)], 1) for i, n in self._sizes(numbers)])
        pairs = pairs[rng.permutation(len(pairs))]
        for start in range(0, len(pairs), settings.batch_size):
            slide, tile = pairs[start : start + settings.batch_size].astype(np.int64).T
            symmetry = rng.integers(0, 8, len(tile)) if settings.flips else np.zeros(len(tile), np.int64)
            stain = stain_mixes(rng.random((len(tile), 2, 3)), settings.stain) if settings.stain else None
            yield _Planned(slide, tile, symmetry, stain)

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

    def _groups(self, groups: Sequence[Sequence[int]]) -> Iterator[tuple[Sequence[int], dict[int, NDArray[np.uint8]]]]:
        """Each group of slides with its tiles by slide, the next one on its way."""
        if self._kept is not None:
            for group in groups:
                yield group, self._kept
            return
        with ThreadPoolExecutor(self.threads) as pool:
            ahead = self._reading(pool, groups[0]) if groups else {}
            for number, group in enumerate(groups):
                futures = ahead
                if number + 1 < len(groups):
                    ahead = self._reading(pool, groups[number + 1])
                yield group, {i: future.result() for i, future in futures.items()}
