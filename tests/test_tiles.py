"""Streams of tiles: pixels against other ways to compute them, each block decoded once, in bounded memory."""

from __future__ import annotations

import errno
import gc
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from wsi_pipe.errors import OutputError, SlideReadError
from wsi_pipe.geometry import FloatPair, IntPair, Pyramid, TileGrid, TileSpec
from wsi_pipe.slides import open_slide
from wsi_pipe.slides.base import BaseSlide, Plane, Slide, SlideInfo
from wsi_pipe.slides.codecs.fastjpeg import jpeg_decoder_name
from wsi_pipe.slides.native import NativeSlide
from wsi_pipe.slides.writing.write import write_pyramid
from wsi_pipe.tiles import StreamStats, read_tiles, stream_tiles
from wsi_pipe.tiles.paste import hold
from wsi_pipe.tiles.shelf import BlockShelf

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


@lru_cache(maxsize=4)
def seamless(seed: int) -> RGBArray:
    """Blobs and grain with about the spectrum of stained tissue, mirrored to 1024 x 1024 px without a seam."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((512, 512, 3), np.float32)
    for sigma, amplitude in ((24, 30), (8, 25), (3, 22), (1.2, 12)):
        noise = cv2.GaussianBlur(rng.normal(0, 1, (512, 512)).astype(np.float32), (0, 0), sigma)
        picture += (noise / noise.std() * amplitude)[..., None] * np.float32([0.6, 1.0, 0.7])
    quarter = np.clip(picture + np.float32([190, 130, 180]), 0, 255).astype(np.uint8)
    half = np.concatenate([quarter, quarter[:, ::-1]], axis=1)
    return np.concatenate([half, half[::-1]], axis=0)


def tissue_like(width: int, height: int, seed: int = 0) -> RGBArray:
    """A picture of any size that looks like tissue."""
    pattern = seamless(seed)
    return np.tile(pattern, (-(-height // 1024), -(-width // 1024), 1))[:height, :width].copy()


def full_grid(slide: Slide, scale: float, size_px: int = 256, overlap_px: int = 0) -> TileGrid:
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


def collect(slide: Slide, grid: TileGrid, **options: Any) -> RGBArray:
    batches = list(stream_tiles(slide, grid, **options))
    assert [i for b in batches for i in b.index.tolist()] == list(range(len(grid)))
    if not batches:
        return np.zeros((0, grid.spec.size_px, grid.spec.size_px, 3), np.uint8)
    return np.concatenate([b.pixels for b in batches])


def whole(picture: RGBArray, scale: int, size_px: int = 256) -> RGBArray:
    """The slide at a whole scale by box means, in white room for tiles that reach beyond it."""
    height, width = picture.shape[:2]
    room = np.full((height + 2 * size_px * scale, width + 2 * size_px * scale, 3), 255, np.uint8)
    room[:height, :width] = picture
    room = room[: room.shape[0] // scale * scale, : room.shape[1] // scale * scale]
    return boxes(room, scale)


def cut_plainly(level: RGBArray, grid: TileGrid, scale: float) -> RGBArray:
    """Tiles sliced out of a whole level."""
    size = grid.spec.size_px
    corners = np.rint(grid.corners_l0 / scale).astype(int)
    return np.stack([level[y : y + size, x : x + size] for x, y in corners.tolist()])


# Which way ------------------------------------------------------------------------------------------------------


def test_a_plane_of_that_scale_is_cut_pixel_for_pixel() -> None:
    picture = tissue_like(2_048, 1_536)
    slide = DrawnSlide(picture, reduces=(1, 2, 4, 8))
    for scale in (1, 2, 4, 8):
        slide.decoded.clear()
        grid = full_grid(slide, float(scale), size_px=64)
        assert np.array_equal(collect(slide, grid, threads=2), cut_plainly(whole(picture, scale), grid, scale))
        assert {plane.downsample[0] for plane, _ in slide.decoded} == {scale}
        assert set(slide.decoded.values()) == {1}


def test_the_cheapest_plane_of_a_scale_is_taken() -> None:
    slide = DrawnSlide(tissue_like(2_048, 2_048), downsamples=(1, 4), reduces=(1, 2, 4, 8))
    collect(slide, full_grid(slide, 8.0, size_px=64))
    assert {(plane.level, plane.reduce) for plane, _ in slide.decoded} == {(1, 2)}
    assert set(slide.decoded.values()) == {1}


@pytest.mark.parametrize("block", [(256, 256), (240, 240), (250, 130), (37, 511)])
@pytest.mark.parametrize("scale", [2, 8, 16, 32])
def test_between_levels_a_dyadic_scale_is_boxes_of_the_finer_level(block: IntPair, scale: int) -> None:
    """OpenSlide's levels at 1, 4, 16: 2x comes from level 0, 8x from level 1; blocks need not hold whole boxes."""
    picture = tissue_like(1_664, 1_152)
    slide = DrawnSlide(picture, downsamples=(1, 4, 16), block_px=block)
    grid = full_grid(slide, float(scale), size_px=32)
    level = {2: 0, 8: 1, 16: 2, 32: 2}[scale]
    own = 4**level
    expected = cut_plainly(whole(slide.levels[level], scale // own, 32), grid, scale)
    got = collect(slide, grid, batch_size=5)
    assert {plane.level for plane, _ in slide.decoded} == {level}
    assert set(slide.decoded.values()) == {1}
    # Halves may round either way.
    assert np.abs(got.astype(int) - expected).max() <= 1


def test_levels_that_round_are_cut_at_their_whole_scale() -> None:
    picture = tissue_like(3_567, 2_001)
    slide = DrawnSlide(picture[:2_000, :3_566], downsamples=(1, 2))
    full = DrawnSlide(picture, downsamples=(1,))
    slide.levels[0] = picture
    slide.pyramid = Pyramid.from_sizes([(3_567, 2_001), (1_783, 1_000)], (0.25, 0.25))
    first = full.planes[0]
    slide.planes = (first, Plane(1, 1, (2.0, 2.0), (1_783, 1_000), (256, 256)))
    grid = full_grid(slide, 2.0)
    got = collect(slide, grid)
    assert {plane.level for plane, _ in slide.decoded} == {1}
    inside = np.all(grid.corners_l0 + 512 <= (3_566, 2_000), axis=1)
    assert np.array_equal(got[inside], cut_plainly(whole(picture[:2_000, :3_566], 2), grid, 2.0)[inside])


# Quality --------------------------------------------------------------------------------------------------------


def detail(picture: RGBArray) -> float:
    """Energy above a Gaussian of 2 px."""
    values = picture.astype(np.float32)
    return float(((values - cv2.GaussianBlur(values, (0, 0), 2)) ** 2).mean())


def psnr(a: RGBArray, b: RGBArray) -> float:
    return float(10 * np.log10(255**2 / max(((a.astype(np.float64) - b) ** 2).mean(), 1e-9)))


def pillow(picture: RGBArray, x: float, y: float, scale: FloatPair, size_px: int = 256) -> RGBArray:
    """The reference: Pillow's bicubic from full resolution, with a fractional box."""
    box = (x, y, x + size_px * scale[0], y + size_px * scale[1])
    return np.asarray(Image.fromarray(picture).resize((size_px, size_px), Image.Resampling.BICUBIC, box=box))


def check_quality(
    slide: DrawnSlide, picture: RGBArray, scale: float, least: float, off: float, size_px: int = 256
) -> None:
    grid = full_grid(slide, scale, size_px)
    inside = np.flatnonzero(np.all(grid.corners_l0 + np.asarray(grid.tile_size_l0) <= slide.pyramid.size_l0, axis=1))
    assert len(inside) >= 4
    got = collect(slide, grid)
    energies = []
    for i in inside:
        x, y = grid.corners_l0[i].tolist()
        reference = pillow(picture, x, y, (scale, scale), size_px)
        assert psnr(got[i], reference) >= least
        energies.append(detail(got[i]) / detail(reference))
    assert np.mean(energies) == pytest.approx(1, abs=off)


@pytest.mark.parametrize("scale", [0.5 / 0.2312, 2.5, 3.3, 0.5 / 0.13, 1.3, 1.0001])
def test_resampling_from_full_resolution_is_pillows(scale: float) -> None:
    picture = tissue_like(round(128 * 2.2 * scale) + 10, round(128 * 2.1 * scale))
    check_quality(DrawnSlide(picture, block_px=(240, 240)), picture, scale, 52, 0.002, size_px=128)


@pytest.mark.parametrize("scale", [0.5 / 0.2312, 2.05, 2.5, 3.3, 0.5 / 0.13])
def test_resampling_from_a_reduced_plane_keeps_detail(scale: float) -> None:
    """From means over boxes, as the codec's half scale is, a cubic alone would lose 8 % at 0.2312."""
    picture = tissue_like(round(128 * 3.1 * scale), round(128 * 3.1 * scale))
    check_quality(DrawnSlide(picture, reduces=(1, 2, 4, 8)), picture, scale, 38, 0.03, size_px=128)


@pytest.mark.parametrize("scale", [5.3, 8.65, 11.0, 17.3])
def test_far_scales_of_a_single_level_are_shrunk_first(scale: float) -> None:
    picture = tissue_like(round(64 * 3.2 * scale), round(64 * 2.2 * scale), seed=4)
    slide = DrawnSlide(picture)
    check_quality(slide, picture, scale, 38, 0.03, size_px=64)
    assert set(slide.decoded.values()) == {1}


@pytest.mark.parametrize(("scale", "size_px"), [(16, 64), (16, 32), (32, 32)])
def test_blocks_that_are_shrunk_do_not_go_straight_into_tiles(tmp_path: Path, scale: int, size_px: int) -> None:
    """A single level of JPEG, decoded at 1/8 and shrunk once more: the block is no larger than the tile."""
    rng = np.random.default_rng(0)
    picture = cv2.resize(
        rng.integers(60, 200, (48, 48, 3)).astype(np.uint8), (2048, 2048), interpolation=cv2.INTER_CUBIC
    )
    path = tmp_path / "single.tif"
    write_pyramid(path, [picture], mpp=0.25, quality=95)
    with closing(open_slide(path)) as slide:
        side = scale * size_px
        corners = np.array([(x, y) for y in range(0, 2049 - side, side) for x in range(0, 2049 - side, side)])
        for tile, (x, y) in zip(read_tiles(slide, corners, side, size_px), corners.tolist(), strict=True):
            expected = picture[y : y + side, x : x + side].reshape(size_px, scale, size_px, scale, 3).mean((1, 3))
            assert np.abs(tile - expected).max() < 6


@pytest.mark.skipif("own decoder, and" not in jpeg_decoder_name(), reason="the JPEG decoder in C was not built")
def test_tiles_of_a_local_jpeg_file_are_read_without_pythons_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every whole block, whether tiles share it or not; pixels and counts are those of the other way."""
    path = tmp_path / "slide.tif"
    write_pyramid(path, [tissue_like(1100, 900)], mpp=0.5)
    fetched: list[IntPair] = []
    original = NativeSlide.fetch

    def fetch(slide: NativeSlide, plane: Plane, cells: Sequence[IntPair]) -> list[Any]:
        fetched.extend(cells)
        return original(slide, plane, cells)

    monkeypatch.setattr(NativeSlide, "fetch", fetch)
    for scale, size_px, overlap_px in [(2.0, 128, 0), (1.0, 200, 0), (1.0, 256, 64), (1.7, 150, 0)]:
        found = []
        for in_one_call in (True, False):
            with closing(open_slide(path)) as slide, monkeypatch.context() as patch:
                fetched.clear()
                if not in_one_call:
                    patch.setattr(NativeSlide, "reads_into", lambda *_: False)
                pixels = collect(slide, full_grid(slide, scale, size_px, overlap_px))
                counts = slide.stats.bytes_fetched, slide.stats.blocks_decoded
                found.append((pixels, counts, list(fetched)))
        (fast, fast_counts, fast_fetched), (plain, plain_counts, plain_fetched) = found
        np.testing.assert_array_equal(fast, plain)
        assert fast_counts == plain_counts
        # Blocks of 256 px: those at the right and lower edge are clipped, and go the other way.
        assert sorted(fast_fetched) == sorted(cell for cell in plain_fetched if cell[0] == 4 or cell[1] == 3)
        assert len(plain_fetched) > len(fast_fetched)


@pytest.mark.skipif("own decoder, and" not in jpeg_decoder_name(), reason="the JPEG decoder in C was not built")
@pytest.mark.parametrize("levels", [(1,), (1, 4)], ids=["one level", "two levels"])
def test_blocks_at_once_are_blocks_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, levels: tuple[int, ...]
) -> None:
    """Whatever the scale, the tile, its overlap and the corner, and whichever way a block goes."""
    chance = random.Random(len(levels))
    picture = tissue_like(1500, 1300)
    path = tmp_path / "slide.tif"
    sizes = [(1500 // factor, 1300 // factor) for factor in levels]
    written = [picture if size == (1500, 1300) else cv2.resize(picture, size) for size in sizes]
    write_pyramid(path, written, mpp=0.25)
    ways: list[tuple[str, ...]] = [(), ("reads_into",), ("reads_into", "decode_into")]
    for _ in range(40):
        scale = chance.choice([1, 2, 4, 8, 16, 32, 1.3, 2.7, 4.04, 9.0, 17.0])
        size_px = chance.choice([16, 24, 32, 64, 100, 128, 256])
        if scale * size_px > 1300:
            continue
        step = chance.choice([1, scale])
        corners = np.array([[chance.randrange(-64, 1400) // step * step for _ in "xy"] for _ in range(9)], float)
        found = []
        for without in ways:
            with closing(open_slide(path)) as slide, monkeypatch.context() as patch:
                if "reads_into" in without:
                    patch.setattr(NativeSlide, "reads_into", lambda *_: False)
                if "decode_into" in without:
                    patch.setattr(NativeSlide, "decode_into", lambda *given: [False] * len(given[2]))
                found.append(read_tiles(slide, corners, scale * size_px, size_px))
        for other in found[:2]:
            np.testing.assert_array_equal(other, found[2], err_msg=f"scale {scale}, tiles of {size_px} px")


def test_resampled_tiles_are_registered_to_a_fraction_of_a_pixel() -> None:
    """Of shifts of the reference by tenths of a pixel, none fits better than no shift."""
    picture = tissue_like(1_400, 1_300)
    for reduces in ((1,), (1, 2)):
        slide = DrawnSlide(picture, reduces=reduces)
        scale = 0.5 / 0.2312
        grid = full_grid(slide, scale)
        tile = collect(slide, grid)[0 + 1]
        x, y = grid.corners_l0[1].tolist()
        shifts = [-0.3, -0.1, 0.0, 0.1, 0.3]
        errors = {
            (dx, dy): float(
                ((pillow(picture, x + dx * scale, y + dy * scale, (scale, scale)) - tile.astype(float)) ** 2).mean()
            )
            for dx in shifts
            for dy in (max(s, -y / scale) for s in shifts)
        }
        assert min(errors, key=lambda key: errors[key]) == (0.0, 0.0)


def test_a_ramp_comes_out_where_it_should() -> None:
    """A linear ramp has a known value at each tile pixel's centre, whatever the plane."""
    columns = np.arange(2_000) + 0.5
    picture = np.repeat(np.rint(columns / 8).astype(np.uint8)[None, :, None], 1_200, axis=0).repeat(3, axis=2)
    for reduces in ((1,), (1, 2, 4)):
        slide = DrawnSlide(picture, reduces=reduces)
        scale = 2.7
        grid = full_grid(slide, scale, size_px=100)
        tiles = collect(slide, grid)
        for i in np.flatnonzero(grid.cells[:, 0] == 3):
            if grid.corners_l0[i, 1] + 270 > 1_200:
                continue
            centres = grid.corners_l0[i, 0] + (np.arange(100) + 0.5) * scale
            assert np.abs(tiles[i, :, :, 1].mean(axis=0) - centres / 8).max() < 0.75
            assert abs((tiles[i, :, :, 1].mean(axis=0) - centres / 8).mean()) < 0.05


def test_anisotropic_tiles_are_resampled_each_axis_by_its_own() -> None:
    picture = tissue_like(1_900, 1_900)
    slide = DrawnSlide(picture)
    corners = np.array([[310.25, 120.5], [700.0, 900.75]])
    got = read_tiles(slide, corners, (2.0 * 256, 1.9 * 256), 256)
    for tile, (x, y) in zip(got, corners.tolist(), strict=True):
        assert psnr(tile, pillow(picture, x, y, (2.0, 1.9))) > 45


def test_upsampling_follows_pillow_too() -> None:
    picture = tissue_like(600, 500)
    slide = DrawnSlide(picture)
    check_quality(slide, picture, 0.91, 50, 0.01)
    check_quality(slide, picture, 0.5, 50, 0.01)


# White ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2.0, 2.1626, 1.0, 4.0])
def test_off_the_slide_is_white_and_the_edge_is_sharp(scale: float) -> None:
    picture = np.full((700, 1_100, 3), (120, 60, 140), np.uint8)
    slide = DrawnSlide(picture, reduces=(1, 2))
    grid = full_grid(slide, scale, size_px=128)
    for tile, (x, y) in zip(collect(slide, grid), grid.corners_l0.tolist(), strict=True):
        centre_x, centre_y = (o + (np.arange(128) + 0.5) * scale for o in (x, y))
        on = (centre_y[:, None] < 700) & (centre_x[None] < 1_100)
        # No white bleeds into the slide, but for the pixel that the edge cuts.
        cut = (np.abs(centre_y - 700) < scale)[:, None] | (np.abs(centre_x - 1_100) < scale)[None]
        assert np.all(tile[~on & ~cut] == 255)
        assert np.abs(tile[on & ~cut].astype(int) - (120, 60, 140)).max(initial=0) <= 1


@pytest.mark.parametrize("scale", [2.0, 1.0, 2.3, 8.0])
def test_missing_blocks_are_white(scale: float) -> None:
    picture = np.full((1_536, 1_536, 3), 77, np.uint8)
    slide = DrawnSlide(picture, missing=[(1, 1), (4, 2)])
    shown = picture.copy()
    shown[256:512, 256:512] = 255
    shown[512:768, 1024:1280] = 255
    grid = full_grid(slide, scale, size_px=64)
    expected = collect(DrawnSlide(shown), grid)
    assert np.array_equal(collect(slide, grid), expected)
    assert slide.stats.blocks_missing == 2


def test_tiles_wholly_off_the_slide_are_white() -> None:
    slide = DrawnSlide(tissue_like(600, 600))
    corners = np.array([[-5_000.0, 10.0], [700.0, 700.0], [620.5, 3.25]])
    for size in (512, 537.0):
        assert np.all(read_tiles(slide, corners, size, 256) == 255)
    assert not slide.decoded


# Once, in order, the same whatever the threads ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "size_px", "overlap_px", "block"),
    [
        (2.0, 256, 0, (256, 256)),
        (2.0, 256, 64, (256, 256)),
        (2.0, 64, 48, (512, 512)),
        (2.0, 224, 0, (240, 240)),
        (1.0, 32, 0, (512, 512)),
        (2.1626, 256, 0, (256, 256)),
        (2.1626, 64, 32, (1_000, 300)),
        (7.7, 100, 10, (256, 256)),
        (0.9, 100, 0, (2_100, 64)),
    ],
)
def test_each_block_is_decoded_once_and_threads_and_batches_change_nothing(
    scale: float, size_px: int, overlap_px: int, block: IntPair
) -> None:
    picture = tissue_like(2_100, 1_700)
    results = []
    for threads, batch_size in ((1, 64), (3, 7), (2, 1), (4, 1_000)):
        slide = DrawnSlide(picture, downsamples=(1, 4), reduces=(1, 2) if block[0] % 2 == 0 else (1,), block_px=block)
        grid = full_grid(slide, scale, size_px, overlap_px)
        stats = StreamStats()
        results.append(collect(slide, grid, threads=threads, batch_size=batch_size, stats=stats))
        assert set(slide.decoded.values()) == {1}
        assert set(slide.fetched.values()) == {1}
        assert len({plane for plane, _ in slide.decoded}) == 1
        assert stats.tiles == len(grid)
        assert stats.blocks == len(slide.decoded)
        assert slide.stats.blocks_decoded == len(slide.decoded)
    assert all(np.array_equal(results[0], other) for other in results[1:])


@settings(max_examples=40, deadline=None)
@given(
    block=st.tuples(st.integers(16, 300), st.integers(16, 300)),
    scale=st.sampled_from([1.0, 2.0, 4.0, 1.21, 2.1626, 3.9]),
    size_px=st.integers(8, 90),
    overlap=st.floats(0, 0.9),
    threads=st.integers(1, 4),
    batch_size=st.integers(1, 40),
    memory_bytes=st.sampled_from([1 << 14, 1 << 20, 1 << 28]),
    picked=st.integers(0, 2**32 - 1),
)
def test_tiles_do_not_depend_on_how_the_file_is_cut_into_blocks(
    block: IntPair,
    scale: float,
    size_px: int,
    overlap: float,
    threads: int,
    batch_size: int,
    memory_bytes: int,
    picked: int,
) -> None:
    picture = tissue_like(430, 370)
    one = DrawnSlide(picture, block_px=(430, 370))
    many = DrawnSlide(picture, block_px=block)
    full = full_grid(one, scale, size_px, int(size_px * overlap))
    rows = np.flatnonzero(np.random.default_rng(picked).random(len(full)) < 0.5)[:300]
    fields = {name: getattr(full, name) for name in full.__dataclass_fields__}
    grid = TileGrid(**{**fields, "cells": full.cells[rows], "tissue": full.tissue[rows]})
    got = collect(many, grid, threads=threads, batch_size=batch_size, memory_bytes=memory_bytes)
    assert np.array_equal(got, collect(one, grid, threads=1))
    assert set(many.decoded.values()) <= {1}


def test_a_scattered_grid_reads_only_what_it_needs() -> None:
    slide = DrawnSlide(tissue_like(2_048, 2_048), reduces=(1, 2))
    full = full_grid(slide, 2.0, size_px=128)
    fields = {name: getattr(full, name) for name in full.__dataclass_fields__}
    chosen = [0, 3, 17, 18, 40, 63]
    grid = TileGrid(**{**fields, "cells": full.cells[chosen], "tissue": full.tissue[chosen]})
    everything = collect(slide, full)
    slide.decoded.clear()
    assert np.array_equal(collect(slide, grid), everything[chosen])
    assert len(slide.decoded) == len(chosen)


def test_no_tiles_give_no_batches() -> None:
    slide = DrawnSlide(tissue_like(300, 300))
    full = full_grid(slide, 2.0)
    fields = {name: getattr(full, name) for name in full.__dataclass_fields__}
    grid = TileGrid(**{**fields, "cells": full.cells[:0], "tissue": full.tissue[:0]})
    assert list(stream_tiles(slide, grid)) == []
    assert read_tiles(slide, np.zeros((0, 2)), 512, 256).shape == (0, 256, 256, 3)


def test_batches_belong_to_the_receiver() -> None:
    slide = DrawnSlide(tissue_like(2_048, 1_024), reduces=(1, 2))
    grid = full_grid(slide, 2.0)
    expected = collect(slide, grid)
    seen = []
    for batch in stream_tiles(slide, grid, batch_size=2, threads=2):
        seen.append(batch.pixels.copy())
        batch.pixels[:] = 0
    assert np.array_equal(np.concatenate(seen), expected)


def test_wrong_numbers_are_refused() -> None:
    slide = DrawnSlide(tissue_like(300, 300))
    grid = full_grid(slide, 2.0)
    for options in ({"batch_size": 0}, {"threads": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            stream_tiles(slide, grid, **options)


# Errors and closing ---------------------------------------------------------------------------------------------


def reading_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("tiles")]


@pytest.mark.parametrize(
    ("scale", "tile"), [(2.0, "tile 5 at level-0 x 512, y 512"), (2.1, "tile 5 at level-0 x 538, y 538")]
)
def test_a_bad_block_names_slide_and_tile_after_the_tiles_before_it(scale: float, tile: str) -> None:
    slide = DrawnSlide(tissue_like(2_048, 2_048), broken=[(3, 3)])
    done = []
    stream = stream_tiles(slide, full_grid(slide, scale), batch_size=1, threads=2)
    with pytest.raises(SlideReadError, match=rf"^drawn\.svs: bad Huffman code \(needed for {tile}.*copy the file"):
        done.extend(batch.index.tolist() for batch in stream)
    done = [row for rows in done for row in rows]
    assert done == list(range(len(done)))
    assert len(done) <= 5
    assert not reading_threads()


def test_other_exceptions_in_a_thread_surface_as_read_errors() -> None:
    slide = DrawnSlide(tissue_like(1_024, 1_024))

    def fail(plane: Plane, cells: Sequence[IntPair]) -> list[Any]:
        raise RuntimeError("the network went away")

    slide.fetch = fail  # type: ignore[method-assign]
    with pytest.raises(SlideReadError, match=r"^drawn\.svs: tile 0 at level-0 x 0, y 0: the network went away"):
        next(iter(stream_tiles(slide, full_grid(slide, 2.0))))


def test_closing_early_stops_the_threads() -> None:
    slide = DrawnSlide(tissue_like(2_048, 2_048), reduces=(1, 2), block_px=(128, 128))
    plain = slide.decode

    def slow(plane: Plane, cell: IntPair, data: Any) -> RGBArray:
        time.sleep(0.002)
        return plain(plane, cell, data)

    slide.decode = slow  # type: ignore[method-assign]
    stream = stream_tiles(slide, full_grid(slide, 2.0), batch_size=2, threads=3)
    next(stream)
    assert reading_threads()
    stream.close()  # type: ignore[attr-defined]
    assert not reading_threads()
    decoded = sum(slide.decoded.values())
    assert decoded < 256
    time.sleep(0.02)
    assert sum(slide.decoded.values()) == decoded
    # Dropping it does the same.
    stream = stream_tiles(slide, full_grid(slide, 2.0), batch_size=2)
    next(stream)
    del stream
    gc.collect()
    assert not reading_threads()


# Memory ---------------------------------------------------------------------------------------------------------


class EndlessSlide(BaseSlide):
    """A slide of any size whose blocks are made up, each of one colour that tells where it is."""

    def __init__(self, size: IntPair, block_px: IntPair = (256, 256)) -> None:
        super().__init__()
        self.pyramid = Pyramid.from_sizes([size], (0.25, 0.25))
        self.info = SlideInfo("endless", "generic", "drawn", "made for a test", "0" * 64)
        self.planes = (Plane(0, 1, (1.0, 1.0), size, block_px),)
        self.decoded: Counter[IntPair] = Counter()

    def decode(self, plane: Plane, cell: IntPair, data: Any) -> RGBArray:
        self.decoded[cell] += 1
        (w, h), (width, height) = plane.block_px, plane.size_px
        block = np.empty((min(h, height - cell[1] * h), min(w, width - cell[0] * w), 3), np.uint8)
        block[:] = (cell[0] % 251, cell[1] % 241, (cell[0] + cell[1]) % 239)
        return block


@pytest.mark.parametrize(
    ("scale", "size_px", "overlap_px", "block", "budget_mib"),
    [
        (2.0, 224, 0, (256, 256), 96),
        (2.1626, 256, 0, (256, 256), 96),
        (2.1626, 64, 40, (512, 512), 64),
        (8.0, 256, 0, (1_000, 1_000), 96),
        (1.0, 256, 0, (1_024, 1_024), 96),
    ],
)
def test_memory_stays_within_the_budget_on_a_wide_slide(
    scale: float, size_px: int, overlap_px: int, block: IntPair, budget_mib: int
) -> None:
    """Two rows of tiles on a slide 100,000 px wide; blocks that wait for the second row go to disk where they must."""
    import tracemalloc

    width = 100_000 if size_px > 200 and scale > 1 else 30_000
    height = round((2 * size_px - overlap_px) * scale)
    slide = EndlessSlide((width, height), block)
    grid = full_grid(slide, scale, size_px, overlap_px)
    rows = grid.cells[:, 1].max() + 1
    assert rows >= 2
    stats = StreamStats()
    tracemalloc.start()
    seen = checked = 0
    try:
        for batch in stream_tiles(slide, grid, batch_size=16, threads=2, memory_bytes=budget_mib << 20, stats=stats):
            seen += len(batch.index)
            # A tile's middle has the colour of the block it lies in, but near the block's edge.
            middle = grid.corners_l0[batch.index[0]] + (size_px // 2 + 0.5) * scale
            (column, row), (x, y) = (middle // block).astype(int).tolist(), (middle % block).tolist()
            if min(x, y, block[0] - x, block[1] - y) > 6 * scale and middle[0] < width and middle[1] < height:
                colour = (column % 251, row % 241, (column + row) % 239)
                assert np.abs(batch.pixels[0, size_px // 2, size_px // 2].astype(int) - colour).max() <= 1
                checked += 1
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert seen == len(grid)
    assert checked > 0
    assert set(slide.decoded.values()) == {1}
    assert stats.peak_bytes <= budget_mib << 20
    # The plan, the filters and the threads' scratch space come on top of decoded pixels.
    assert peak <= (budget_mib + 64) << 20


@pytest.mark.parametrize(("size_px", "block_px"), [(128, 1024), (96, 512), (250, 1024)])
def test_many_threads_on_large_blocks_stay_near_the_budget(size_px: int, block_px: int) -> None:
    """Blocks of which each serves many tiles come back from disk one at a time, not a copy for every tile of a job."""
    import tracemalloc

    budget = 64 << 20
    slide = EndlessSlide((16_384, 2_048), (block_px, block_px))
    stats = StreamStats()
    tracemalloc.start()
    try:
        for _ in stream_tiles(
            slide, full_grid(slide, 1.0, size_px), batch_size=64, threads=16, memory_bytes=budget, stats=stats
        ):
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert stats.spilled_bytes > 0
    assert set(slide.decoded.values()) == {1}
    # A block in the hands of each thread comes on top.
    assert peak <= budget + 16 * 3 * block_px**2 + (16 << 20)


def test_spilled_blocks_come_back_the_same() -> None:
    picture = tissue_like(4_000, 900)
    slide = DrawnSlide(picture, block_px=(512, 512))
    grid = full_grid(slide, 1.7, 96, 24)
    expected = collect(slide, grid, batch_size=8)
    stats = StreamStats()
    tight = collect(slide, grid, batch_size=8, memory_bytes=1 << 20, threads=3, stats=stats)
    assert stats.spilled_bytes > 1 << 20
    assert np.array_equal(tight, expected)


# Any coordinates ------------------------------------------------------------------------------------------------


def test_tiles_at_any_coordinates() -> None:
    picture = tissue_like(2_000, 1_800)
    slide = DrawnSlide(picture, reduces=(1, 2, 4))
    padded = np.full((3_000, 3_000, 3), 255, np.uint8)
    padded[500 : 500 + 1_800, 500 : 500 + 2_000] = picture
    even, odd = (642, 318), (643, 317)
    tiles = read_tiles(slide, np.array([even, odd, (-130, 1_700), even]), 512, 256)
    # Whole pixels of level 0 suffice for box means; the codec's half scale only serves even corners.
    assert {plane.downsample[0] for plane, _ in slide.decoded} == {1.0, 2.0}
    for tile, (x, y) in zip(tiles, (even, odd, (-130, 1_700), even), strict=True):
        expected = boxes(padded[500 + y : 1_012 + y, 500 + x : 1_012 + x], 2)
        assert np.abs(tile.astype(int) - expected).max() <= 1
    fractional = np.array([[100.3, 200.7], [901.9, 77.1]])
    for tile, (x, y) in zip(read_tiles(slide, fractional, 512, 256), fractional.tolist(), strict=True):
        assert psnr(tile, pillow(picture, x, y, (2.0, 2.0))) > 50


def test_tiles_at_a_grids_corners_are_the_grids() -> None:
    slide = DrawnSlide(tissue_like(2_000, 1_800), reduces=(1, 2, 4))
    for scale in (2.0, 2.3):
        grid = full_grid(slide, scale)
        assert np.array_equal(read_tiles(slide, grid.corners_l0, grid.tile_size_l0, 256), collect(slide, grid))


# Real slides ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_picture(shared_slides: Path) -> RGBArray:
    """All of a small real slide."""
    with open_slide(shared_slides / "CMU-1-Small-Region.svs", reader="openslide") as slide:
        return slide.read_region(0, 0, 0, *slide.pyramid.size_l0)


@pytest.mark.parametrize("reader", ["tiff", "openslide"])
@pytest.mark.parametrize("mpp", [0.2312, 0.2428, 0.2, 0.13])
def test_real_tissue_keeps_its_detail_when_resampled(
    shared_slides: Path, real_picture: RGBArray, reader: str, mpp: float
) -> None:
    with open_slide(shared_slides / "CMU-1-Small-Region.svs", reader=reader, mpp=mpp) as slide:
        grid = full_grid(slide, 0.5 / mpp)
        size = slide.pyramid.size_l0
        tiles = collect(slide, grid)
    got, wanted = [], []
    for tile, corner in zip(tiles, grid.corners_l0, strict=True):
        x, y = corner.tolist()
        if x + grid.tile_size_l0[0] <= size[0] and y + grid.tile_size_l0[1] <= size[1]:
            reference = pillow(real_picture, x, y, grid.scale_l0)
            if detail(reference) > 10:
                assert psnr(tile, reference) >= 34
                got.append(detail(tile))
                wanted.append(detail(reference))
    assert len(got) >= 5
    assert np.mean(got) == pytest.approx(np.mean(wanted), rel=0.03)


def test_real_tissue_at_half_scale_is_the_mean_of_boxes(shared_slides: Path, real_picture: RGBArray) -> None:
    """Whether the codec halves (tiff) or boxes are averaged (openslide), the tiles are the same but for rounding."""
    height, width = (side // 2 * 2 for side in real_picture.shape[:2])
    expected = boxes(real_picture[:height, :width], 2)
    for reader, most in (("tiff", 1.5), ("openslide", 0.5)):
        with open_slide(shared_slides / "CMU-1-Small-Region.svs", reader=reader, mpp=0.2527) as slide:
            grid = full_grid(slide, 2.0)
            tiles = collect(slide, grid)
        for tile, (column, row) in zip(tiles, grid.cells.tolist(), strict=True):
            part = expected[row * 256 : (row + 1) * 256, column * 256 : (column + 1) * 256]
            if part.shape == (256, 256, 3):
                assert np.abs(tile.astype(int) - part).mean() <= most


# The shelf ------------------------------------------------------------------------------------------------------


def test_the_shelf_keeps_blocks_as_long_as_they_are_needed_and_spills_what_is_too_much() -> None:
    blocks = [np.full((20, 10 + i, 3), i, np.uint8) for i in range(6)]
    shelf = BlockShelf([1, 2, 3, 1, 1, 2], limit_bytes=2_000)
    shelf.put({number: hold(block, (20, 20)) for number, block in enumerate(blocks[:5])})
    shelf.put({5: hold(None, (20, 20))})
    assert shelf.nbytes == sum(block.nbytes for block in blocks[:5])
    shelf.spill([2, 4, 5])
    assert shelf.spilled_bytes == blocks[2].nbytes + blocks[4].nbytes
    shelf.spill([0, 1, 3])
    assert shelf.nbytes <= 2_000
    for block, held in zip(blocks, shelf.get(range(5)), strict=False):
        assert held.pixels is not None
        assert np.array_equal(held.pixels, block)
        assert held.where == (held.pixels.ctypes.data, *block.shape[1::-1])
    assert shelf.get([5])[0].pixels is None
    shelf.release([0, 1, 2, 2, 3, 5])
    assert shelf.get([1])[0].pixels is not None
    with pytest.raises(KeyError):
        shelf.get([1, 0])
    shelf.release([1, 2, 4, 5])
    assert shelf.nbytes == 0
    shelf.close()


def test_a_full_disk_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("wsi_pipe.tiles.shelf.os.pwrite", full)
    slide = DrawnSlide(tissue_like(4_000, 900), block_px=(512, 512))
    with pytest.raises(
        OutputError, match=r"do not fit into .*No space left on device; give more memory, or set TMPDIR"
    ):
        collect(slide, full_grid(slide, 1.7, 96, 24), batch_size=8, memory_bytes=1 << 20)
    assert not reading_threads()


def test_times_add_up() -> None:
    slide = DrawnSlide(tissue_like(2_000, 1_500))
    stats = StreamStats()
    for scale in (2.3, 2.0):
        collect(slide, full_grid(slide, scale), stats=stats, threads=1)
    assert min(stats.fetch_s, stats.decode_s, stats.copy_s, stats.resample_s) > 0
    assert min(stats.decode_cpu_s, stats.copy_cpu_s, stats.resample_cpu_s) > 0
    assert stats.tiles == sum(len(full_grid(slide, scale)) for scale in (2.3, 2.0))
    assert stats.peak_bytes > 0
