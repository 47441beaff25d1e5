"""The picture of a whole slide, against means taken another way."""

from __future__ import annotations

import threading
import tracemalloc
from collections import Counter
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from wsi_pipe.errors import MissingMppError, ResolutionError, SlideReadError
from wsi_pipe.geometry import FloatPair, IntPair, Pyramid
from wsi_pipe.overview import overview_scale, read_overview
from wsi_pipe.slides import open_slide
from wsi_pipe.slides.array import ArraySlide
from wsi_pipe.slides.base import BaseSlide, Plane, SlideInfo
from wsi_pipe.slides.writing.write import write_pyramid

RGBArray = NDArray[np.uint8]


def picture(width: int, height: int, seed: int = 0) -> RGBArray:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR), np.uint8)


def exact_mean(level: RGBArray, down: int, scale: int, column: int, row: int) -> list[float]:
    """Mean over one picture pixel, from a level at ``down``; white beyond the slide. In rational numbers."""
    height, width = level.shape[:2]
    total = [Fraction(0)] * 3
    covered = Fraction(0)
    x0, y0 = Fraction(column * scale, down), Fraction(row * scale, down)
    x1, y1 = x0 + Fraction(scale, down), y0 + Fraction(scale, down)
    for y in range(int(y0), min(-(-y1.numerator // y1.denominator), height)):
        for x in range(int(x0), min(-(-x1.numerator // x1.denominator), width)):
            part = (min(x1, x + 1) - max(x0, x)) * (min(y1, y + 1) - max(y0, y))
            covered += part
            total = [t + part * int(v) for t, v in zip(total, level[y, x], strict=True)]
    area = (x1 - x0) * (y1 - y0)
    return [float((t + (area - covered) * 255) / area) for t in total]


@pytest.mark.parametrize(
    ("mpp", "wanted", "scale"),
    [
        (0.25, 8.0, 32),
        (0.2527, 8.0, 32),
        (0.2312, 8.0, 32),
        (0.5, 8.0, 16),
        (0.33, 8.0, 24),
        (1.0, 8.0, 8),
        (0.25, 3.0, 12),
    ],
)
def test_pixels_are_means_over_their_area(mpp: float, wanted: float, scale: int) -> None:
    full = picture(1_003, 771)
    slide = ArraySlide([full], mpp=mpp, block_px=(240, 130))
    view = read_overview(slide, wanted)
    assert view.scale_l0 == (scale, scale)
    assert view.um_per_px == pytest.approx((scale * mpp, scale * mpp))
    assert view.rgb.dtype == np.uint8
    height, width = -(-771 // scale), -(-1_003 // scale)
    assert view.rgb.shape == (height, width, 3)
    for row, column in ((0, 0), (height // 2, width // 3), (height - 1, 0), (1, width - 1), (height - 1, width - 1)):
        want = exact_mean(full, 1, scale, column, row)
        assert np.abs(view.rgb[row, column] - want).max() <= 0.51


def test_fractions_of_a_levels_pixels_count_by_their_part() -> None:
    """24 level-0 pixels from a level at 16: one and a half each way."""
    full = picture(1_600, 1_200)
    coarse = np.asarray(cv2.resize(full, (100, 75), interpolation=cv2.INTER_AREA), np.uint8)
    slide = ArraySlide([full, coarse], mpp=0.33, block_px=(32, 50))
    view = read_overview(slide, 8.0)
    assert view.scale_l0 == (24.0, 24.0)
    for row in (0, 1, 21, view.rgb.shape[0] - 1):
        for column in (0, 20, 21, view.rgb.shape[1] - 1):
            assert np.abs(view.rgb[row, column] - exact_mean(coarse, 16, 24, column, row)).max() <= 0.51
    # Nothing of the full level was read: it would be 1,600 x 1,200 x 3 bytes more.
    assert slide.stats.bytes_fetched == coarse.nbytes


def test_it_takes_the_cheapest_plane_that_is_fine_enough() -> None:
    class Recorded(BaseSlide):
        def __init__(self, planes: list[tuple[int, int]], sizes: list[IntPair]) -> None:
            super().__init__()
            self.pyramid = Pyramid.from_sizes(sizes, (0.25, 0.25))
            self.info = SlideInfo("drawn", "generic", "drawn", "made for a test", "0" * 64)
            self.planes = tuple(
                sorted(
                    (
                        Plane(i, r, (d[0] * r, d[1] * r), (-(-s[0] // r), -(-s[1] // r)), (256 // r, 256 // r))
                        for i, r in planes
                        for s, d in [(sizes[i], self.pyramid.levels[i].downsample)]
                    ),
                    key=lambda p: (p.downsample, p.reduce),
                )
            )
            self.decoded: Counter[tuple[int, int, IntPair]] = Counter()
            self.lock = threading.Lock()

        def decode(self, plane: Plane, cell: IntPair, data: Any) -> RGBArray:
            with self.lock:
                self.decoded[plane.level, plane.reduce, cell] += 1
            (w, h), (width, height) = plane.block_px, plane.size_px
            return np.full((min(h, height - cell[1] * h), min(w, width - cell[0] * w), 3), 90, np.uint8)

    sizes = [(8_192, 6_144), (2_048, 1_536), (512, 384)]
    reduced = [(i, r) for i in range(3) for r in (1, 2, 4, 8)]
    for planes, used in (
        (reduced, {(2, 2)}),
        ([(0, 1), (1, 1), (2, 1)], {(2, 1)}),
        ([(0, 1), (0, 8), (1, 1)], {(1, 1)}),
        ([(0, 1), (0, 2), (0, 4), (0, 8)], {(0, 8)}),
    ):
        slide = Recorded(planes, sizes)
        view = read_overview(slide, 8.0)
        assert {key[:2] for key in slide.decoded} == used
        assert set(slide.decoded.values()) == {1}
        assert np.all(view.rgb == 90)


@given(st.floats(1, 5_000))
def test_the_scale_is_whole_and_near(wanted: float) -> None:
    scale = overview_scale(wanted)
    assert isinstance(scale, int)
    assert abs(scale - wanted) <= max(wanted / 8, 0.5) + 1e-9


def test_a_slide_coarser_than_the_request_is_taken_as_it_is() -> None:
    full = picture(60, 40)
    view = read_overview(ArraySlide([full], mpp=20.0), 8.0)
    assert view.scale_l0 == (1.0, 1.0)
    assert np.array_equal(view.rgb, full)


def test_anisotropic_slides_give_nearly_square_pixels() -> None:
    slide = ArraySlide([picture(640, 640)], mpp=(0.25, 0.5))
    view = read_overview(slide, 8.0)
    assert view.scale_l0 == (32.0, 16.0)
    assert view.um_per_px == (8.0, 8.0)
    assert view.rgb.shape == (40, 20, 3)


def test_missing_blocks_and_what_lies_beyond_the_slide_are_white() -> None:
    full = np.full((512, 500, 3), 60, np.uint8)
    slide = ArraySlide([full], mpp=0.25, block_px=(128, 128), missing={(0, 1, 2)})
    view = read_overview(slide, 8.0)
    assert np.all(view.rgb[8:12, 4:8] == 255)
    rest = view.rgb.astype(int).copy()
    rest[8:12, 4:8] = 60
    assert np.all(rest[:, :15] == 60)
    # The last column has 20 of 32 pixels on the slide.
    last = np.delete(rest[:, 15], slice(0, 0), axis=0)
    assert np.abs(last - (60 * 20 + 255 * 12) / 32).max() <= 0.51
    assert slide.stats.blocks_missing == 1


def test_threads_change_nothing() -> None:
    full = picture(3_000, 2_000)
    views = [read_overview(ArraySlide([full], mpp=0.33, block_px=(100, 90)), 8.0, threads=n) for n in (1, 2, 5)]
    assert all(np.array_equal(views[0].rgb, view.rgb) for view in views[1:])


def test_missing_mpp_names_the_remedy() -> None:
    with pytest.raises(MissingMppError, match=r"^memory states no resolution.*--slide-mpp X, or the column mpp"):
        read_overview(ArraySlide([picture(100, 100)]), 8.0)


def test_a_bad_block_surfaces_and_the_threads_end() -> None:
    class Broken(ArraySlide):
        def decode(self, plane: Plane, cell: IntPair, data: Any) -> RGBArray:
            if cell == (5, 3):
                raise SlideReadError("memory: bad Huffman code")
            return super().decode(plane, cell, data)

    with pytest.raises(SlideReadError, match="bad Huffman code"):
        read_overview(Broken([picture(2_000, 1_500)], mpp=0.25, block_px=(100, 100)), 8.0)
    assert not [t for t in threading.enumerate() if t.name.startswith("overview")]


@pytest.mark.parametrize("side", [1, 2, 4])
@pytest.mark.parametrize("origin_px", [(0, 0), (-64, -96)])
def test_means_of_whole_boxes_are_the_sums_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, side: int, origin_px: IntPair
) -> None:
    """Of noise, whose means end in halves, with blocks that hang over all edges and some that are missing."""

    class Blocks(BaseSlide):
        def __init__(self, level: RGBArray) -> None:
            super().__init__()
            size = (level.shape[1], level.shape[0])
            self.level, self.pyramid = level, Pyramid.from_sizes([size], (8 / side, 8 / side))
            self.info = SlideInfo("blocks", "generic", "drawn", "made for a test", "0" * 64)
            self.planes = (Plane(0, 1, (1.0, 1.0), size, (128, 160), origin_px),)

        def fetch(self, plane: Plane, cells: Any) -> list[Any]:
            return [None if cell == (2, 1) else cell for cell in cells]

        def decode(self, plane: Plane, cell: IntPair, data: Any) -> RGBArray:
            x, y = plane.corner_px(cell)
            height, width = min(160, plane.size_px[1] - y), min(128, plane.size_px[0] - x)
            block = np.full((height, width, 3), 255, np.uint8)
            part = self.level[max(y, 0) : y + height, max(x, 0) : x + width]
            block[max(-y, 0) :, max(-x, 0) :] = part
            return block

    slide = Blocks(np.random.default_rng(7).integers(0, 256, (701, 523, 3), dtype=np.uint8))
    boxes = read_overview(slide, 8.0, threads=3)
    assert slide.stats.blocks_missing == 1
    monkeypatch.setattr("wsi_pipe.overview._whole_boxes", lambda plane, factor: None)
    sums = read_overview(slide, 8.0, threads=3)
    assert boxes.scale_l0 == sums.scale_l0 == (side, side)
    assert np.array_equal(boxes.rgb, sums.rgb)


def test_a_level_is_read_in_a_few_calls_at_the_codec_s_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of the lowest level that does, each decoded once and at 1/2, a row of them in one call."""
    full = picture(4_096, 3_072)
    levels = [full, full[::4, ::4].copy(), full[::16, ::16].copy()]
    write_pyramid(tmp_path / "a.svs", levels, mpp=0.25, tile_px=64)
    with closing(open_slide(tmp_path / "a.svs")) as slide:
        reader: Any = slide
        if not reader.reads_into(slide.planes[0]):
            pytest.skip("the decoder was not built")
        calls: list[tuple[int, int, int]] = []
        plain = reader.read_into

        def counting(plane: Plane, cells: Any, room: Any) -> Any:
            calls.append((plane.level, plane.reduce, len(cells)))
            return plain(plane, cells, room)

        monkeypatch.setattr(reader, "read_into", counting)
        before = slide.stats.blocks_decoded
        view = read_overview(slide, 8.0, threads=1)
        assert view.rgb.shape == (96, 128, 3)
        assert calls == [(2, 2, 4)] * 3
        assert slide.stats.blocks_decoded - before == 12


def test_memory_is_the_picture_and_a_few_blocks() -> None:
    """A single level of 60,000 x 2,000 px, 360 MB of pixels."""

    class Endless(BaseSlide):
        def __init__(self, size: IntPair, block_px: IntPair, mpp: FloatPair) -> None:
            super().__init__()
            self.pyramid = Pyramid.from_sizes([size], mpp)
            self.info = SlideInfo("endless", "generic", "drawn", "made for a test", "0" * 64)
            self.planes = (Plane(0, 1, (1.0, 1.0), size, block_px),)

        def decode(self, plane: Plane, cell: IntPair, data: Any) -> RGBArray:
            (w, h), (width, height) = plane.block_px, plane.size_px
            block: RGBArray = np.full((min(h, height - cell[1] * h), min(w, width - cell[0] * w), 3), 10, np.uint8)
            return block

    slide = Endless((60_000, 2_000), (1_000, 1_000), (0.25, 0.25))
    tracemalloc.start()
    try:
        view = read_overview(slide, 8.0, threads=2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.all(view.rgb[:-1] == 10)
    assert peak < view.rgb.size * 12 + 2 * 40 * 2**20


def test_a_picture_larger_than_the_limit_is_made_coarser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsi_pipe.overview.MAX_PIXELS", 3_000)
    slide = ArraySlide([picture(2_000, 1_500)], mpp=0.5)
    view = read_overview(slide, 8.0)
    assert view.rgb.shape[0] * view.rgb.shape[1] <= 3_000
    assert 8.0 < view.um_per_px[0] <= 33.0
    assert view.scale_l0[0] == view.um_per_px[0] / 0.5


def test_a_magnification_given_as_resolution_is_told_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 um/px on a large slide asked for 8 billion pixels."""
    monkeypatch.setattr("wsi_pipe.overview.MAX_PIXELS", 10_000)
    slide = ArraySlide([picture(2_000, 1_500)], mpp=20.0)
    with pytest.raises(ResolutionError, match="40 x 30 mm, larger than any slide") as caught:
        read_overview(slide, 8.0)
    assert "--slide-mpp" in str(caught.value.remedy)
    assert slide.stats.blocks_decoded == 0
