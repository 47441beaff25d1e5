"""Filters in C are those of the matrix products, whatever the scale, the size and the edge."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from wsi_pipe.tiles import resample
from wsi_pipe.tiles.resample import AxisFilter, Resampler

built = pytest.mark.skipif(resample._function() is None, reason="not built, or not for this processor")


def patch_for(resampler: Resampler, seed: int = 0) -> NDArray[np.uint8]:
    """Noise of black and white: its sums go far below 0 and above 255."""
    width, height = resampler.patch_px
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    noise[rng.random((height, width, 3)) < 0.5] = 255
    noise[rng.random((height, width, 3)) < 0.4] = 0
    return noise


def both(resampler: Resampler, across: AxisFilter, down: AxisFilter) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    patch, size = patch_for(resampler), resampler.size_px
    ours, products = (np.full((size, size, 3), 7, np.uint8) for _ in range(2))
    assert resampler._in_c(patch, across, down, ours)
    resampler._by_products(patch, across, down, products)
    return ours, products


@built
@settings(max_examples=60, deadline=None)
@given(
    ratio=st.tuples(st.floats(0.3, 9), st.floats(0.3, 9)),
    downsample=st.sampled_from([1.0, 2.0, 3.5, 8.0]),
    size=st.integers(1, 70),
    at=st.tuples(st.floats(-60, 300), st.floats(-60, 300)),
)
def test_pixels_are_those_of_the_products(
    ratio: tuple[float, float], downsample: float, size: int, at: tuple[float, float]
) -> None:
    """Also where tiles lie over the edges of a plane of 200 x 200 px, and at its far end."""
    resampler = Resampler(ratio, (downsample, downsample), size, (200, 200))
    across, down = resampler.axis_filter(at[0], 0), resampler.axis_filter(at[1], 1)
    ours, products = both(resampler, across, down)
    difference = np.abs(ours.astype(int) - products)
    assert difference.max(initial=0) <= 1
    # Only where the sum is a half, but for the last digits.
    assert np.count_nonzero(difference) <= 1 + difference.size // 1000


@built
def test_a_tile_pixel_may_be_made_of_hundreds() -> None:
    """Blocks of odd sides cannot be shrunk first."""
    resampler = Resampler((70.3, 130.0), (1.0, 1.0), 3, (2000, 2000))
    ours, products = both(resampler, resampler.axis_filter(100.0, 0), resampler.axis_filter(33.3, 1))
    assert np.abs(ours.astype(int) - products).max() <= 1


@built
def test_it_is_used_and_products_are_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    resampler = Resampler((1.3, 1.3), (1.0, 1.0), 40, (500, 500))
    patch, out = patch_for(resampler), np.empty((40, 40, 3), np.uint8)
    filters = resampler.axis_filter(20.2, 0), resampler.axis_filter(10.7, 1)
    used: list[str] = []
    products = Resampler._by_products
    monkeypatch.setattr(Resampler, "_by_products", lambda *values: (used.append("products"), products(*values)))
    resampler.run(patch, *filters, out)
    assert not used
    again = np.empty_like(out)
    monkeypatch.setattr(resample, "_function", lambda: None)
    resampler.run(patch, *filters, again)
    assert used == ["products"]
    assert np.abs(out.astype(int) - again).max() <= 1


@built
def test_threads_share_nothing() -> None:
    from concurrent.futures import ThreadPoolExecutor

    resampler = Resampler((1.7, 1.7), (1.0, 1.0), 60, (5000, 5000))
    filters = resampler.axis_filter(20.2, 0), resampler.axis_filter(10.7, 1)

    def one(seed: int) -> NDArray[np.uint8]:
        out = np.empty((60, 60, 3), np.uint8)
        resampler.run(patch_for(resampler, seed), *filters, out)
        return out

    alone = [one(seed) for seed in range(12)]
    with ThreadPoolExecutor(4) as pool:
        for wanted, got in zip(alone * 4, pool.map(one, list(range(12)) * 4), strict=True):
            np.testing.assert_array_equal(got, wanted)


@built
def test_nothing_beyond_the_arrays_is_touched() -> None:
    resampler = Resampler((1.3, 1.3), (1.0, 1.0), 40, (500, 500))
    patch, out = patch_for(resampler), np.empty((40, 40, 3), np.uint8)
    axis = resampler.axis_filter(20.2, 0)
    read_only = out.copy()
    read_only.flags.writeable = False
    for wrong_patch, wrong_out, message in [
        (patch[:-1], out, "a patch"),
        (patch, out[:39], "a patch"),
        (patch[:, ::-1], out, "not contiguous"),
        (patch, np.empty((40, 80, 3), np.uint8)[:, ::2], "not contiguous"),
        (patch, read_only, "cannot be written"),
    ]:
        with pytest.raises(ValueError, match=message):
            resampler._in_c(wrong_patch, axis, axis, wrong_out)
    for first in (axis.first - axis.first[0] - 1, axis.first + len(patch), axis.first[::-1].copy()):
        with pytest.raises(ValueError, match="beyond its patch"):
            resampler._in_c(patch, AxisFilter(first, axis.weights, axis.on_slide), axis, out)
        with pytest.raises(ValueError, match="beyond its patch"):
            resampler._in_c(patch, axis, AxisFilter(first, axis.weights, axis.on_slide), out)
    for first, weights in [
        (axis.first.astype(np.int64), axis.weights),
        (axis.first, axis.weights.astype(np.float64)),
        (axis.first[1:], axis.weights),
        (axis.first, axis.weights[1:]),
    ]:
        with pytest.raises(ValueError, match="a filter of"):
            resampler._in_c(patch, axis, AxisFilter(first, weights, axis.on_slide), out)
    wide = AxisFilter(np.zeros(40, np.int32), np.zeros((40, len(patch) + 1), np.float32), (0, 40))
    with pytest.raises(ValueError, match="beyond its patch"):
        resampler._in_c(patch, wide, axis, out)


def test_plain_c_gives_the_very_same_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ARM64 and others run, built here: sums in the same order, rounded as often."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    function = resample._function()
    if compiler is None or function is None:
        pytest.skip("no C compiler, or nothing built to compare with")
    source = Path(resample.__file__).with_name("_resample.c")
    built = tmp_path / "plain.so"
    command = [compiler, "-O2", "-std=gnu11", "-shared", "-fPIC", "-DWSI_PLAIN", str(source), "-o", str(built)]
    subprocess.run([*command, *(["-mfma"] if platform.machine() == "x86_64" else [])], check=True)
    library = ctypes.CDLL(str(built))
    assert library.wsi_resample_abi() == 1
    plain = library.wsi_resample
    plain.restype, plain.argtypes = function.restype, function.argtypes
    for ratio, at, size in [((1.3, 1.3), (20.2, 10.7), 64), ((2.163, 0.7), (-3.4, 180.9), 37), ((9.1, 5.3), (0, 0), 8)]:
        resampler = Resampler(ratio, (2.0, 2.0), size, (400, 400))
        filters = resampler.axis_filter(at[0], 0), resampler.axis_filter(at[1], 1)
        patch, wanted, got = patch_for(resampler), *(np.zeros((size, size, 3), np.uint8) for _ in range(2))
        assert resampler._in_c(patch, *filters, wanted)
        with monkeypatch.context() as patched:
            patched.setattr(resample, "_function", lambda: plain)
            assert resampler._in_c(patch, *filters, got)
        assert wanted.std() > 10
        np.testing.assert_array_equal(got, wanted)
