"""LR tiles streamed from the slides, several slides mixed, in bounded memory; nothing is written out as images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lrmil.distill.augment import stain_jitter, turn_tile
from lrmil.distill.settings import DistillSettings
from lrmil.distill.targets import DistillSlide
from wsi_pipe.slides import open_slide
from wsi_pipe.tiles import stream_tiles

__all__ = ["PixelBatch", "PixelSource"]


class PixelBatch(NamedTuple):
    """pixels: uint8 (B, S, S, 3). slide, tile: int64 (B,), which. symmetry: int64 (B,), how each was turned."""

    pixels: NDArray[np.uint8]
    slide: NDArray[np.int64]
    tile: NDArray[np.int64]
    symmetry: NDArray[np.int64]


class PixelSource:
    """The LR tiles of some slides, in order or shuffled and augmented.

    They are kept decoded when all of them fit into ``cache_mib``; otherwise each pass reads them anew, the next group
    of slides while the last one is worked on.
    """

    def __init__(
        self, slides: Sequence[DistillSlide], settings: DistillSettings, progress: Callable[[str], object] | None = None
    ) -> None:
        self.slides = list(slides)
        self.settings = settings
        self.side_px = slides[0].lr.spec.size_px
        self.reads = 0
        size = sum(len(slide) for slide in slides) * self.side_px**2 * 3
        self._kept: list[NDArray[np.uint8]] | None = None
        if size <= settings.cache_mib << 20:
            with ThreadPoolExecutor(settings.threads) as pool:
                self._kept = []
                for slide, tiles in zip(self.slides, pool.map(self._read, range(len(self.slides))), strict=True):
                    self._kept.append(tiles)
                    if progress:
                        progress(slide.slide_id)

    def __len__(self) -> int:
        return sum(len(slide) for slide in self.slides)

    def _read(self, number: int) -> NDArray[np.uint8]:
        slide = self.slides[number]
        self.reads += 1
        out = np.empty((len(slide), self.side_px, self.side_px, 3), np.uint8)
        opened = open_slide(slide.path, mpp=slide.mpp, scene=slide.scene, z=slide.z)
        try:
            for batch in stream_tiles(opened, slide.lr, threads=1):
                out[batch.index] = batch.pixels
        finally:
            opened.close()
        return out

    def in_order(self) -> Iterator[PixelBatch]:
        """Every tile once, slide by slide, as it is."""
        for number, tiles in self._groups([[i] for i in range(len(self.slides))]):
            for start in range(0, len(tiles[0]), self.settings.batch_size):
                part = tiles[0][start : start + self.settings.batch_size]
                index = np.arange(start, start + len(part), dtype=np.int64)
                zeros = np.zeros(len(part), np.int64)
                yield PixelBatch(part, np.full(len(part), number[0], np.int64), index, zeros)

    def shuffled(self, seed: Sequence[int]) -> Iterator[PixelBatch]:
        """Every tile once, mixed over groups of slides and augmented; the same for the same seed."""
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(self.slides))
        groups = self._mixed(order.tolist())
        size = self.settings.batch_size
        for numbers, tiles in self._groups(groups):
            pairs = np.concatenate(
                [np.stack([np.full(len(t), i), np.arange(len(t))], 1) for i, t in enumerate(tiles)], dtype=np.int64
            )
            pairs = pairs[rng.permutation(len(pairs))]
            for start in range(0, len(pairs), size):
                part = pairs[start : start + size]
                symmetry = rng.integers(0, 8, len(part)) if self.settings.flips else np.zeros(len(part), np.int64)
                pixels = np.stack(
                    [
                        stain_jitter(turn_tile(tiles[i][j], int(s)), self.settings.stain, rng)
                        for (i, j), s in zip(part, symmetry, strict=True)
                    ]
                )
                yield PixelBatch(pixels, np.asarray(numbers, np.int64)[part[:, 0]], part[:, 1], symmetry)

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

    def _groups(self, groups: Sequence[Sequence[int]]) -> Iterator[tuple[Sequence[int], list[NDArray[np.uint8]]]]:
        if self._kept is not None:
            for group in groups:
                yield group, [self._kept[i] for i in group]
            return
        with ThreadPoolExecutor(self.settings.threads) as pool:
            ahead = [pool.submit(self._read, i) for i in groups[0]] if groups else []
            for number, group in enumerate(groups):
                futures = ahead
                if number + 1 < len(groups):
                    ahead = [pool.submit(self._read, i) for i in groups[number + 1]]
                yield group, [future.result() for future in futures]
