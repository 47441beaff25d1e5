"""Grids: where tiles lie, which are kept, and who is whose parent; recomputed tile by tile in plain loops."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from wsi_pipe.config import TileSettings
from wsi_pipe.errors import MissingMppError, ResolutionError
from wsi_pipe.geometry import FloatPair, IntPair, Pyramid, TileGrid, TissueMask
from wsi_pipe.tiling import plan_grids, tissue_fractions


def pyramid(size: IntPair, mpp: float | FloatPair | None) -> Pyramid:
    return Pyramid.from_sizes([size], (mpp, mpp) if isinstance(mpp, (int, float)) else mpp)


def all_tissue(size: IntPair, scale: float = 32.0) -> TissueMask:
    return TissueMask(np.ones((math.ceil(size[1] / scale), math.ceil(size[0] / scale)), bool), (scale, scale))


def ellipse(size: IntPair, scale: float = 32.0) -> TissueMask:
    width, height = math.ceil(size[0] / scale), math.ceil(size[1] / scale)
    y, x = np.mgrid[:height, :width]
    inside = ((x + 0.5) / width - 0.5) ** 2 / 0.13 + ((y + 0.5) / height - 0.5) ** 2 / 0.1 < 1
    return TissueMask(inside & ~((x - width // 2) ** 2 + (y - height // 2) ** 2 < (height / 9) ** 2), (scale, scale))


def fraction_by_pixels(mask: TissueMask, size_l0: IntPair, x0: float, y0: float, x1: float, y1: float) -> float:
    """Tissue fraction of one rectangle, pixel by pixel, in rational numbers."""
    tissue = Fraction(0)
    sx, sy = Fraction(mask.scale_l0[0]), Fraction(mask.scale_l0[1])
    left, top, right, bottom = (Fraction(v) for v in (x0, y0, min(x1, size_l0[0]), min(y1, size_l0[1])))
    for r in range(max(math.floor(top / sy), 0), min(math.ceil(bottom / sy), mask.mask.shape[0])):
        for c in range(max(math.floor(left / sx), 0), min(math.ceil(right / sx), mask.mask.shape[1])):
            if mask.mask[r, c]:
                w = min((c + 1) * sx, right) - max(c * sx, left)
                h = min((r + 1) * sy, bottom) - max(r * sy, top)
                tissue += max(w, Fraction(0)) * max(h, Fraction(0))
    return float(tissue / ((Fraction(x1) - Fraction(x0)) * (Fraction(y1) - Fraction(y0))))


# Resolution -----------------------------------------------------------------------------------------------------


def test_a_dyadic_scale_near_the_request_is_cut_pixel_for_pixel() -> None:
    size = (50_000, 40_000)
    lr, hr = plan_grids(pyramid(size, 0.2527), all_tissue(size), TileSettings())
    assert hr.spec.mpp == 0.5
    assert hr.mpp_effective == (0.5054, 0.5054)
    assert hr.tile_size_l0 == (512.0, 512.0)
    assert hr.stride_l0 == (512.0, 512.0)
    assert hr.scale_l0 == (2.0, 2.0)
    assert lr.mpp_effective == (4 * 0.5054, 4 * 0.5054)
    assert lr.tile_size_l0 == (2048.0, 2048.0)
    assert not hr.upsampled
    assert not lr.upsampled
    assert (lr.label, hr.label) == ("5x", "20x")


def test_other_scales_are_cut_at_exactly_what_was_asked_for_and_do_not_drift() -> None:
    size = (100_000, 3_000)
    (lr, hr) = plan_grids(pyramid(size, 0.2312), all_tissue(size), TileSettings())
    assert hr.mpp_effective == (0.5, 0.5)
    assert lr.mpp_effective == (2.0, 2.0)
    last = int(hr.cells[:, 0].max())
    exact = Fraction(256) * Fraction(1, 2) / Fraction(2312, 10000) * last
    at = hr.cells[:, 0] == last
    assert np.all(np.abs(hr.corners_l0[at, 0] - float(exact)) < 1e-6)
    assert np.all(np.abs(hr.coords[at, 0] - float(exact)) <= 0.5)
    assert float(exact) > 99_000


def test_tolerance_is_measured_on_the_finest_request() -> None:
    size = (20_000, 20_000)
    for mpp, effective in ((0.25 * 1.0249, 0.5 * 1.0249), (0.25 * 1.0251, 0.5), (0.25 * 0.9751, 0.5 * 0.9751)):
        _, hr = plan_grids(pyramid(size, mpp), all_tissue(size), TileSettings())
        assert hr.mpp_effective[0] == pytest.approx(effective, rel=1e-12)
    (wide,) = plan_grids(pyramid(size, 0.27), all_tissue(size), TileSettings(resolutions=(0.5,), mpp_tolerance=0.1))
    assert wide.mpp_effective == (0.54, 0.54)
    (exact,) = plan_grids(pyramid(size, 0.2527), all_tissue(size), TileSettings(resolutions=(0.5,), mpp_tolerance=0))
    assert exact.mpp_effective == (0.5, 0.5)


@pytest.mark.parametrize("mpp", [0.2312, 0.25, 0.2527, 0.2450, 0.33, 0.499, 0.5119, 0.55, 0.1214])
@pytest.mark.parametrize("size_px", [256, 224, 192, 512, 1000])
def test_the_coarse_grid_is_the_same_with_and_without_the_fine_one(mpp: float, size_px: int) -> None:
    size = (23_456, 17_891)
    mask = ellipse(size)
    both = plan_grids(pyramid(size, mpp), mask, TileSettings(tile_px=size_px))
    (alone,) = plan_grids(pyramid(size, mpp), mask, TileSettings(tile_px=size_px, resolutions=(2.0,)))
    three = plan_grids(pyramid(size, mpp), mask, TileSettings(tile_px=size_px, resolutions=(1.0, 0.5, 2.0)))
    for grid in (both[0], three[0]):
        assert grid.mpp_effective == pytest.approx(alone.mpp_effective, rel=1e-12)
        assert grid.tile_size_l0 == pytest.approx(alone.tile_size_l0, rel=1e-12)
        assert np.array_equal(grid.cells, alone.cells)
        assert np.allclose(grid.tissue, alone.tissue, atol=1e-7)


def test_far_upsampling_that_is_allowed_leaves_the_coarser_grid_where_it_was() -> None:
    size = (9_000, 9_000)
    options = {"allow_upsampling": True}
    lr, hr = plan_grids(pyramid(size, 0.505), all_tissue(size), TileSettings(resolutions=(0.25, 1.0), **options))
    (alone,) = plan_grids(pyramid(size, 0.505), all_tissue(size), TileSettings(resolutions=(1.0,), **options))
    assert lr.mpp_effective == alone.mpp_effective == (1.01, 1.01)
    assert hr.mpp_effective == (0.2525, 0.2525)
    assert hr.upsampled
    assert not lr.upsampled


def test_with_a_factor_that_is_no_power_of_two_the_finest_decides() -> None:
    size = (9_000, 9_000)
    lr, hr = plan_grids(pyramid(size, 0.2527), all_tissue(size), TileSettings(resolutions=(0.5, 1.5)))
    (alone,) = plan_grids(pyramid(size, 0.2527), all_tissue(size), TileSettings(resolutions=(1.5,)))
    assert hr.mpp_effective == (0.5054, 0.5054)
    assert lr.mpp_effective == pytest.approx((1.5162, 1.5162))
    assert alone.mpp_effective == (1.5, 1.5)


def test_slight_upsampling_is_served_and_recorded() -> None:
    size = (9_000, 9_000)
    lr, hr = plan_grids(pyramid(size, 0.55), all_tissue(size), TileSettings())
    assert hr.mpp_effective == (0.5, 0.5)
    assert hr.upsampled
    assert not lr.upsampled
    # Exactly a tenth finer is the limit.
    (grid,) = plan_grids(pyramid(size, 0.5), all_tissue(size), TileSettings(resolutions=(0.45,)))
    assert grid.upsampled


def test_a_slide_slightly_coarser_within_the_tolerance_is_not_upsampled_but_cut() -> None:
    size = (9_000, 9_000)
    (grid,) = plan_grids(pyramid(size, 0.51), all_tissue(size), TileSettings(resolutions=(0.5,)))
    assert grid.scale_l0 == (1.0, 1.0)
    assert not grid.upsampled


def test_finer_requests_are_an_error_unless_allowed() -> None:
    size = (9_000, 9_000)
    with pytest.raises(ResolutionError, match=r"0\.44 um/px is 12\.0% finer than the slide's 0\.5 um/px.*0\.5um"):
        plan_grids(pyramid(size, 0.5), all_tissue(size), TileSettings(resolutions=(0.44,)))
    allowed = TileSettings(resolutions=(0.44,), allow_upsampling=True)
    (grid,) = plan_grids(pyramid(size, 0.5), all_tissue(size), allowed)
    assert grid.upsampled
    assert grid.mpp_effective == (0.44, 0.44)
    wider = TileSettings(resolutions=(0.44,), max_upsampling=0.2)
    assert plan_grids(pyramid(size, 0.5), all_tissue(size), wider)[0].upsampled


def test_missing_mpp_names_option_and_column() -> None:
    with pytest.raises(MissingMppError, match=r"--slide-mpp X, or the column mpp"):
        plan_grids(pyramid((9_000, 9_000), None), all_tissue((9_000, 9_000)), TileSettings())


def test_grids_that_do_not_align_are_an_error_that_names_the_factor() -> None:
    with pytest.raises(ResolutionError, match=r"factor is 2\.5, which.*1um or 1\.5um with 0\.5um"):
        plan_grids(pyramid((9_000, 9_000), 0.25), all_tissue((9_000, 9_000)), TileSettings(resolutions=(0.5, 1.25)))
    with pytest.raises(ResolutionError, match=r"factor is 1\.5, which.*ask for 2um with 1um"):
        plan_grids(pyramid((9_000, 9_000), 0.25), all_tissue((9_000, 9_000)), TileSettings(resolutions=(0.5, 1.0, 1.5)))
    # 10 / 30 and 10 / 10 are whole though the decimals are not.
    plan_grids(pyramid((9_000, 9_000), 0.25), all_tissue((9_000, 9_000)), TileSettings(resolutions=(10 / 30, 1.0)))


def test_anisotropic_slides_are_resampled_each_axis_by_its_own() -> None:
    size = (9_000, 9_000)
    lr, hr = plan_grids(pyramid(size, (0.25, 0.26)), all_tissue(size), TileSettings())
    assert hr.mpp_effective == (0.5, 0.5)
    assert hr.tile_size_l0 == pytest.approx((512.0, 256 * 0.5 / 0.26))
    assert lr.tile_size_l0 == pytest.approx((2048.0, 4 * 256 * 0.5 / 0.26))
    (same,) = plan_grids(pyramid(size, (0.2520, 0.2534)), all_tissue(size), TileSettings(resolutions=(0.5,)))
    assert same.tile_size_l0 == (512.0, 512.0)
    assert same.mpp_effective == pytest.approx((0.5054, 0.5054))


# Tissue ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.tuples(st.floats(1, 40), st.floats(1, 40)),
    tile=st.tuples(st.floats(3, 300), st.floats(3, 300)),
    step=st.floats(0.3, 1.0),
    shortfall=st.floats(0, 1.5),
)
def test_tissue_fractions_are_exact(
    seed: int, scale: FloatPair, tile: FloatPair, step: float, shortfall: float
) -> None:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 12, 2)
    mask = TissueMask(rng.random((height, width)) < 0.6, scale)
    # The slide may end inside the mask's last pixel, or beyond the mask.
    size = (max(int((width - shortfall) * scale[0]), 1), max(int((height + 0.5 - shortfall) * scale[1]), 1))
    stride = (tile[0] * step, tile[1] * step)
    got = tissue_fractions(mask, size, (0.0, 0.0), stride, tile, (4, 3))
    assert got.shape == (3, 4)
    for r in range(3):
        for c in range(4):
            x, y = c * stride[0], r * stride[1]
            want = fraction_by_pixels(mask, size, x, y, x + tile[0], y + tile[1])
            assert got[r, c] == pytest.approx(want, abs=1e-9)


def kept_by_loops(
    size: IntPair, mask: TissueMask, tile_l0: float, cells_per_tile: int, min_tissue: float
) -> set[IntPair]:
    """The rule of the design, tile by tile: one judging cell in the tile has enough tissue."""
    kept = set()
    side = tile_l0 / cells_per_tile
    for row in range(math.ceil(size[1] / tile_l0)):
        for column in range(math.ceil(size[0] / tile_l0)):
            for i in range(cells_per_tile):
                for j in range(cells_per_tile):
                    x, y = column * tile_l0 + i * side, row * tile_l0 + j * side
                    if fraction_by_pixels(mask, size, x, y, x + side, y + side) >= min_tissue - 1e-12:
                        kept.add((column, row))
    return kept


@pytest.mark.parametrize(("mpp", "size_px", "per_lr"), [(0.2527, 256, 4), (0.25, 512, 8), (0.2312, 256, 4)])
def test_tiles_are_kept_by_judging_cells(mpp: float, size_px: int, per_lr: int) -> None:
    size = (9_100, 7_300)
    mask = ellipse(size)
    lr, hr = plan_grids(pyramid(size, mpp), mask, TileSettings(tile_px=size_px, min_tissue=0.3))
    assert {tuple(c) for c in lr.cells.tolist()} == kept_by_loops(size, mask, lr.tile_size_l0[0], per_lr, 0.3)
    assert {tuple(c) for c in hr.cells.tolist()} == kept_by_loops(size, mask, hr.tile_size_l0[0], per_lr // 4, 0.3)
    for grid in (lr, hr):
        for (x, y), fraction in zip(grid.corners_l0[::7].tolist(), grid.tissue[::7].tolist(), strict=True):
            w, h = grid.tile_size_l0
            assert fraction == pytest.approx(fraction_by_pixels(mask, size, x, y, x + w, y + h), abs=1e-6)
        order = np.lexsort((grid.cells[:, 0], grid.cells[:, 1]))
        assert np.array_equal(order, np.arange(len(grid))), "row by row"
        assert grid.min_tissue == 0.3
        assert grid.cells.dtype == np.int32
        assert grid.tissue.dtype == np.float32


def test_one_judging_cell_is_enough_and_keeps_its_parent() -> None:
    size = (8_192, 8_192)
    mask = np.zeros((256, 256), bool)
    mask[16 * 5 : 16 * 5 + 8, 16 * 6 : 16 * 6 + 8] = True  # a quarter of the HR tile in column 6, row 5
    lr, hr = plan_grids(pyramid(size, 0.25), TissueMask(mask, (32.0, 32.0)), TileSettings())
    assert hr.cells.tolist() == [[6, 5]]
    assert lr.cells.tolist() == [[1, 1]]
    assert hr.tissue.tolist() == [0.25]
    assert lr.tissue.tolist() == [0.25 / 16]
    assert hr.parent is not None
    assert hr.parent.tolist() == [0]


def test_tiles_smaller_than_a_judging_cell_are_judged_by_their_own() -> None:
    size = (4_096, 4_096)
    mask = np.zeros((128, 128), bool)
    mask[:4, :4] = True  # 128 x 128 level-0 pixels, a quarter of a 40x tile, a sixteenth of a 20x one
    settings_40x = TileSettings(resolutions=(0.25,))
    (grid,) = plan_grids(pyramid(size, 0.25), TissueMask(mask, (32.0, 32.0)), settings_40x)
    assert grid.cells.tolist() == [[0, 0]]
    assert grid.tissue.tolist() == [0.25]
    # With the 20x grid above it, whose tile is not kept, there is no parent, so it goes too.
    both = plan_grids(pyramid(size, 0.25), TissueMask(mask, (32.0, 32.0)), TileSettings(resolutions=(0.25, 0.5)))
    assert [len(g) for g in both] == [0, 0]


def test_tiles_that_reach_beyond_the_edge_are_kept_as_tissue_allows() -> None:
    size = (1_200, 700)  # 512-pixel tiles: 2.34 columns, 1.37 rows
    (grid,) = plan_grids(pyramid(size, 0.25), all_tissue(size, 8.0), TileSettings(resolutions=(0.5,)))
    assert grid.cells.tolist() == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1]]
    assert grid.tissue.tolist() == pytest.approx([1, 1, 176 / 512, 188 / 512, 188 / 512], abs=1e-6)
    # The corner tile has 0.344 * 0.367 = 0.126 on the slide.
    (low,) = plan_grids(pyramid(size, 0.25), all_tissue(size, 8.0), TileSettings(resolutions=(0.5,), min_tissue=0.12))
    assert low.cells.tolist()[-1] == [2, 1]


def test_no_tissue_gives_empty_grids_and_no_minimum_gives_all() -> None:
    size = (5_000, 4_000)
    nothing = TissueMask(np.zeros((125, 157), bool), (32.0, 32.0))
    grids = plan_grids(pyramid(size, 0.25), nothing, TileSettings())
    assert [len(g) for g in grids] == [0, 0]
    assert grids[1].cells.shape == (0, 2)
    assert grids[1].parent is not None
    assert grids[1].parent.dtype == np.int32
    lr, hr = plan_grids(pyramid(size, 0.25), nothing, TileSettings(min_tissue=0.0))
    assert (len(lr), len(hr)) == (3 * 2, 10 * 8)
    # A slide that is a whole number of tiles gets no extra row for the rounding of a quotient.
    (grid,) = plan_grids(pyramid((5_120, 5_120), 0.2527), nothing, TileSettings(resolutions=(0.5,), min_tissue=0.0))
    assert len(grid) == 100


# Parents --------------------------------------------------------------------------------------------------------


def footprints(grid: TileGrid) -> NDArray[np.float64]:
    return np.concatenate([grid.corners_l0, grid.corners_l0 + np.asarray(grid.tile_size_l0)], axis=1)


@pytest.mark.parametrize("mpp", [0.2312, 0.2527, 0.25, 0.33])
def test_every_tile_lies_in_its_parent(mpp: float) -> None:
    size = (31_000, 22_000)
    grids = plan_grids(pyramid(size, mpp), ellipse(size), TileSettings(resolutions=(0.5, 1.0, 4.0)))
    assert [g.spec.mpp for g in grids] == [4.0, 1.0, 0.5]
    assert grids[0].parent is None
    for coarse, fine, factor in ((grids[0], grids[1], 4), (grids[1], grids[2], 2)):
        assert fine.parent is not None
        assert fine.parent.dtype == np.int32
        assert np.array_equal(coarse.cells[fine.parent], fine.cells // factor)
        parent, child = footprints(coarse)[fine.parent], footprints(fine)
        assert np.all(child[:, :2] >= parent[:, :2] - 1e-6)
        assert np.all(child[:, 2:] <= parent[:, 2:] + 1e-6)
    # Kept LR tiles are kept for a judging cell, which here is an HR tile at 0.5: none is childless.
    lr, hr = plan_grids(pyramid(size, mpp), ellipse(size), TileSettings())
    assert set(hr.parent.tolist() if hr.parent is not None else []) == set(range(len(lr)))


@pytest.mark.parametrize("overlap_px", [1, 32, 64, 127, 128, 160, 200, 240])
def test_with_overlap_the_parent_holds_the_centre(overlap_px: int) -> None:
    size = (6_000, 5_000)
    wanted = TileSettings(overlap_px=overlap_px, resolutions=(0.5, 2.0))
    lr, hr = plan_grids(pyramid(size, 0.2527), ellipse(size, 16.0), wanted)
    assert hr.stride_l0 == pytest.approx(((256 - overlap_px) * 2.0,) * 2)
    assert lr.stride_l0 == pytest.approx(((256 - overlap_px) * 8.0,) * 2)
    assert hr.parent is not None
    assert len(hr) > 40
    centre = hr.corners_l0 + np.asarray(hr.tile_size_l0) / 2
    cell = lr.corners_l0[hr.parent]
    assert np.all(centre >= cell)
    assert np.all(centre <= cell + np.asarray(lr.stride_l0))
    if overlap_px <= 128:
        parent, child = footprints(lr)[hr.parent], footprints(hr)
        assert np.all(child[:, :2] >= parent[:, :2])
        assert np.all(child[:, 2:] <= parent[:, 2:])


def test_overlap_covers_tissue_at_the_far_edge() -> None:
    size = (4_000, 4_000)
    mask = np.zeros((500, 500), bool)
    mask[-70:, -70:] = True
    for overlap_px in (0, 64, 128):
        lr, hr = plan_grids(pyramid(size, 0.25), TissueMask(mask, (8.0, 8.0)), TileSettings(overlap_px=overlap_px))
        for grid in (lr, hr):
            assert footprints(grid)[:, 2:].max(axis=0).min() >= 4_000


# Size -----------------------------------------------------------------------------------------------------------


def test_a_large_slide_gives_many_tiles() -> None:
    size = (100_000, 100_000)
    grids = plan_grids(pyramid(size, 0.125), all_tissue(size, 64.0), TileSettings(resolutions=(0.125, 0.5, 2.0)))
    assert len(grids[-1]) == 391**2
    assert grids[-1].parent is not None
    assert len(grids[-2]) == 98**2
