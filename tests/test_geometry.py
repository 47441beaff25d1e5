"""Pyramids, resolutions and grids as values."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi_pipe.errors import ConfigError, MaskError
from wsi_pipe.geometry import Pyramid, TileGrid, TileSpec, TissueMask, level_label, parse_resolution


@given(
    width=st.integers(2_000, 300_000),
    height=st.integers(2_000, 300_000),
    power=st.integers(1, 6),
    up=st.booleans(),
)
def test_a_level_over_a_power_of_two_is_at_exactly_that(width: int, height: int, power: int, up: bool) -> None:
    factor = 2**power
    size = (-(-width // factor), -(-height // factor)) if up else (width // factor, height // factor)
    level = Pyramid.from_sizes([(width, height), size]).levels[1]
    assert level.downsample == (float(factor), float(factor))
    assert level.size_px == size


@given(width=st.integers(20_000, 300_000), height=st.integers(20_000, 300_000), factor=st.integers(2, 100))
def test_whole_numbers_that_fit_are_found(width: int, height: int, factor: int) -> None:
    size = (width // factor, height // factor)
    x, y = Pyramid.from_sizes([(width, height), size]).levels[1].downsample
    assert x == y
    assert x == int(x)
    # Small levels fit several whole numbers; whichever is taken gives that size by rounding.
    assert all(n // x == s or math.ceil(n / x) == s for n, s in zip((width, height), size, strict=True))


@pytest.mark.parametrize(
    ("sizes", "downsamples"),
    [
        ([(2220, 2967), (1110, 1483)], [2.0]),
        ([(46_000, 32_914), (11_500, 8_228), (2_875, 2_057)], [4.0, 16.0]),
        ([(3567, 2001), (1783, 1000)], [2.0]),
        ([(3567, 2001), (1784, 1001)], [2.0]),
        ([(99_999, 50_001), (33_333, 16_667)], [3.0]),
    ],
)
def test_downsamples_of_real_pyramids(sizes: list[tuple[int, int]], downsamples: list[float]) -> None:
    got = [level.downsample for level in Pyramid.from_sizes(sizes).levels[1:]]
    assert got == [(d, d) for d in downsamples]


def test_a_ratio_that_is_not_whole_counts_as_it_is() -> None:
    level = Pyramid.from_sizes([(10_000, 8_000), (4_000, 3_200)]).levels[1]
    assert level.downsample == (2.5, 2.5)
    padded = Pyramid.from_sizes([(10_000, 8_000), (5_120, 4_096)]).levels[1]
    assert padded.downsample == (10_000 / 5_120, 8_000 / 4_096)


def test_mpp_within_one_per_cent_counts_as_one() -> None:
    sizes = [(100, 100)]
    assert Pyramid.from_sizes(sizes, (0.2520, 0.2530)).isotropic_mpp == pytest.approx((0.2525, 0.2525))
    assert Pyramid.from_sizes(sizes, (0.25, 0.26)).isotropic_mpp == (0.25, 0.26)
    assert Pyramid.from_sizes(sizes).isotropic_mpp is None
    assert Pyramid.from_sizes(sizes).with_mpp((0.5, 0.5)).isotropic_mpp == (0.5, 0.5)


@pytest.mark.parametrize(
    ("text", "mpp"),
    [
        ("20x", 0.5),
        ("5X", 2.0),
        ("2.5x", 4.0),
        ("0.5um", 0.5),
        (" 0.33 um ", 0.33),
        ("1µm", 1.0),
        ("2mpp", 2.0),
        ("0.25um/px", 0.25),
        (".5um", 0.5),
        ("5e-1um", 0.5),
    ],
)
def test_resolutions_are_understood(text: str, mpp: float) -> None:
    assert parse_resolution(text) == pytest.approx(mpp)


@pytest.mark.parametrize("text", ["20", "x", "", "0x", "-5x", "0um", "20 x 20", "1e999um", "nanx", "5 x um", "20xx"])
def test_other_resolutions_are_refused_with_a_remedy(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not understood; write a magnification such as 20x or"):
        parse_resolution(text)


@given(st.floats(0.01, 100))
def test_labels_say_the_magnification(mpp: float) -> None:
    assert level_label(mpp) == f"{10 / mpp:g}x"
    assert parse_resolution(level_label(mpp)) == pytest.approx(mpp, rel=1e-5)


def test_labels_of_the_design() -> None:
    assert [level_label(m) for m in (0.5, 4, 0.3)] == ["20x", "2.5x", "33.3333x"]


def test_tile_specs_refuse_what_cannot_be() -> None:
    assert TileSpec(0.5, 256).size_um == 128.0
    for wrong in ({"mpp": 0.0}, {"mpp": math.nan}, {"mpp": 0.5, "size_px": 0}, {"mpp": 0.5, "overlap_px": 256}):
        with pytest.raises(ConfigError):
            TileSpec(**wrong)  # type: ignore[arg-type]


def test_masks_are_flat_and_bool() -> None:
    with pytest.raises(MaskError):
        TissueMask(np.zeros((3, 3), np.uint8), (1.0, 1.0))  # type: ignore[arg-type]
    mask = TissueMask(np.eye(4, dtype=bool), (32.0, 32.0))
    assert not mask.is_empty
    assert mask.area_um2((0.25, 0.25)) == 4 * 64.0


def grid(cells: list[list[int]], stride: float = 553.6332) -> TileGrid:
    return TileGrid(
        spec=TileSpec(0.5),
        mpp_effective=(0.5, 0.5),
        origin_l0=(10.0, 20.0),
        stride_l0=(stride, stride),
        tile_size_l0=(stride, stride),
        cells=np.asarray(cells, np.int32).reshape(-1, 2),
        tissue=np.ones(len(cells), np.float32),
    )


def test_corners_follow_cells_in_floating_point_and_coords_round_them() -> None:
    g = grid([[0, 0], [1, 0], [180, 3]])
    assert g.corners_l0[:, 0].tolist() == [10.0, 563.6332, 10 + 180 * 553.6332]
    assert g.coords.tolist() == [[10, 20], [564, 20], [99_664, 1_681]]
    assert g.coords.dtype == np.int64
    assert len(g) == 3
    assert g.scale_l0 == pytest.approx((553.6332 / 256,) * 2)
    assert g.label == "20x"


def test_grids_refuse_arrays_that_do_not_belong_together() -> None:
    good = grid([[0, 0], [1, 0]])
    for wrong in ({"tissue": np.ones(3, np.float32)}, {"parent": np.zeros(1, np.int32)}):
        values = {name: getattr(good, name) for name in good.__dataclass_fields__}
        with pytest.raises(ValueError, match="belong"):
            TileGrid(**{**values, **wrong})


def test_some_tiles_keep_their_places_and_parents() -> None:
    g = dataclasses.replace(
        grid([[c, 0] for c in range(10)]),
        tissue=np.linspace(0, 1, 10, dtype=np.float32),
        parent=np.arange(10, dtype=np.int32) // 4,
        min_tissue=0.25,
    )
    some = g.take(np.array([7, 2]))
    assert some.cells.tolist() == [[7, 0], [2, 0]]
    assert some.parent is not None
    assert some.parent.tolist() == [1, 0]
    assert np.array_equal(some.corners_l0, g.corners_l0[[7, 2]])
    assert (some.tissue.tolist(), some.min_tissue) == (g.tissue[[7, 2]].tolist(), 0.25)
    assert len(g.take(slice(3))) == 3
    assert dataclasses.replace(g, parent=None).take(slice(3)).parent is None
    assert g.spread(4).cells[:, 0].tolist() == [0, 3, 6, 9]
    assert len(g.spread(99)) == 10
    assert len(g.take(slice(0)).spread(3)) == 0
