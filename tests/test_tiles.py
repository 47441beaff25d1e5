"""Streams of tiles: pixels against other ways to compute them, each block decoded once, in bounded memory."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from wsi_pipe.errors import SlideReadError
from wsi_pipe.geometry import FloatPair, IntPair, Pyramid, TileGrid, TileSpec
from wsi_pipe.slides.base import BaseSlide, Plane, SlideInfo
from wsi_pipe.tiles import StreamStats, read_tiles, stream_tiles

RGBArray = NDArray[np.uint8]


class DrawnSlide(BaseSlide):
    """A slide in memory: levels by the given downsamples of one picture, with planes reduced by box means, as JPEG's.

    It counts which block was fetched and decoded how often, and fails or pauses on request.
    """

    def __init__(
        self,
        picture: RGBArray,
        *,
        downsamples: Sequence[int] = (1,),
        reduces: Sequence[int] = (1,),
        block_px: IntPair = (256, 256),
        missing: Sequence[IntPair] = (),
        broken: Sequence[IntPair] = (),
        mpp: FloatPair | None = (0.25, 0.25),
    ) -> None:
        super().__init__()
        height, width = picture.shape[:2]
        self.levels = [boxes(picture, d) for d in downsamples]
        self.pyramid = Pyramid.from_sizes([(level.shape[1], level.shape[0]) for level in self.levels], mpp)
        self.info = SlideInfo("drawn.svs", "generic", "drawn", "made for a test", "0" * 64)
        planes = []
        for i, level in enumerate(self.levels):
            down = self.pyramid.levels[i].downsample
            for reduce in reduces:
                size = (-(-level.shape[1] // reduce), -(-level.shape[0] // reduce))
                block = (block_px[0] // reduce, block_px[1] // reduce)
                planes.append(Plane(i, reduce, (down[0] * reduce, down[1] * reduce), size, block))
        self.planes = tuple(sorted(planes, key=lambda p: (p.downsample, p.reduce)))
        self.missing, self.broken = set(missing), set(broken)
        self.fetched: Counter[tuple[Plane, IntPair]] = Counter()
        self.decoded: Counter[tuple[Plane, IntPair]] = Counter()
        self.lock = threading.Lock()

    def fetch(self, plane: Plane, cells: Sequence[IntPair]) -> list[Any]:
        with self.lock:
            self.fetched.update((plane, cell) for cell in cells)
        return [None if cell in self.missing else cell for cell in cells]

    def decode(self, plane: Plane, cell: IntPair, data: Any) -> RGBArray:
        assert data == cell
        if cell in self.broken:
            raise SlideReadError("drawn.svs: bad Huffman code", remedy="copy the file again")
        with self.lock:
            self.decoded[plane, cell] += 1
        self.stats.add(decoded=1)
        (w, h), r = plane.block_px, plane.reduce
        x, y = cell[0] * w * r, cell[1] * h * r
        return boxes(self.levels[plane.level][y : y + h * r, x : x + w * r], r)


def boxes(picture: RGBArray, factor: int) -> RGBArray:
    """Means over whole boxes; what is left over at the edges is repeated from its neighbour."""
    if factor == 1:
        return picture
    height, width = picture.shape[:2]
    padded = np.pad(picture, ((0, -height % factor), (0, -width % factor), (0, 0)), mode="edge")
    shape = (padded.shape[0] // factor, factor, padded.shape[1] // factor, factor, 3)
    return np.rint(padded.reshape(shape).mean(axis=(1, 3))).astype(np.uint8)


def tissue_like(width: int, height: int, seed: int = 0) -> RGBArray:
    """Blobs and grain with about the spectrum of stained tissue."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((height, width, 3), np.float32)
    for sigma, amplitude in ((24, 30), (8, 25), (3, 22), (1.2, 12)):
        noise = cv2.GaussianBlur(rng.normal(0, 1, (height, width)).astype(np.float32), (0, 0), sigma)
        picture += (noise / noise.std() * amplitude)[..., None] * np.float32([0.6, 1.0, 0.7])
    return np.clip(picture + np.float32([190, 130, 180]), 0, 255).astype(np.uint8)


def full_grid(slide: DrawnSlide, scale: float, size_px: int = 256, overlap_px: int = 0) -> TileGrid:
    """All tiles that begin on the slide, at ``scale`` level-0 pixels to a tile pixel."""
    step = (size_px - overlap_px) * scale
    width, height = slide.pyramid.size_l0
    columns, rows = int(np.ceil(width / step)), int(np.ceil(height / step))
    cells = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1).reshape(-1, 2).astype(np.int32)
    return TileGrid(
        spec=TileSpec(0.25 * scale, size_px, overlap_px),
        mpp_effective=(0.25 * scale, 0.25 * scale),
        origin_l0=(0.0, 0.0),
        stride_l0=(step, step),
        tile_size_l0=(size_px * scale, size_px * scale),
        cells=cells,
        tissue=np.ones(len(cells), np.float32),
    )


def collect(slide: DrawnSlide, grid: TileGrid, **options: Any) -> RGBArray:
    batches = list(stream_tiles(slide, grid, **options))
    assert [i for b in batches for i in b.index.tolist()] == list(range(len(grid)))
    if not batches:
        return np.zeros((0, grid.spec.size_px, grid.spec.size_px, 3), np.uint8)
    return np.concatenate([b.pixels for b in batches])


def test_first() -> None:
    picture = tissue_like(2100, 1900)
    slide = DrawnSlide(picture, reduces=(1, 2, 4, 8), block_px=(256, 256))
    grid = full_grid(slide, 2.0)
    tiles = collect(slide, grid, threads=2)
    half = np.full((4096, 4096, 3), 255, np.uint8)
    b = boxes(picture, 2)
    half[: b.shape[0], : b.shape[1]] = b
    for t, (c, r) in zip(tiles, grid.cells):
        assert np.array_equal(t, half[r * 256 : r * 256 + 256, c * 256 : c * 256 + 256])
    assert set(slide.decoded.values()) == {1}
