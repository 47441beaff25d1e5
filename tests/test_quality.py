"""Sharpness against blur of a known radius; folds and bubbles against slides that were made with them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from wsi_pipe.bag import read_bag, read_header
from wsi_pipe.cli import group, run_group
from wsi_pipe.config import TileSettings
from wsi_pipe.errors import ConfigError
from wsi_pipe.job import read_outcomes
from wsi_pipe.quality import QUALITY_METHODS, LevelQuality, measure_tiles, quality_counts
from wsi_pipe.slides.writing.write import write_pyramid
from wsi_pipe.synthetic import SlideSpec, SyntheticSlide

RADII_UM = (0.0, 0.5, 1.0, 1.5, 3.0)


def tiles_of(rgb: NDArray[np.uint8], size: int = 256) -> NDArray[np.uint8]:
    n, m = rgb.shape[0] // size, rgb.shape[1] // size
    cut = rgb[: n * size, : m * size].reshape(n, size, m, size, 3).swapaxes(1, 2)
    return np.ascontiguousarray(cut.reshape(-1, size, size, 3))


def medians(radii: tuple[float, ...], mpp: float = 0.5, shrink: int = 1, **options: Any) -> list[float]:
    found = []
    for radius in radii:
        spec = SlideSpec(3, (768, 768), mpp, tissue_fraction=1.0, holes=False, blur_um=radius, **options)
        rgb = SyntheticSlide(spec).region(0, 0, 768, 768)
        small = rgb
        if shrink > 1:
            size = (768 // shrink, 768 // shrink)
            small = np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), np.uint8)
        found.append(float(np.median(measure_tiles(tiles_of(small), mpp * shrink).sharpness)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"stain": "dab"}, {"stain": "pas"}, {"pale": True}])
def test_sharpness_falls_with_the_radius_whatever_the_stain(options: dict[str, Any]) -> None:
    values = medians(RADII_UM, **options)
    assert all(a > b or b == 0 for a, b in pairwise(values)), values
    assert values[0] > 0.7
    assert 0.2 < values[2] < 0.5
    assert values[-1] < 0.1


def test_sharpness_falls_with_the_radius_at_a_coarser_level() -> None:
    values = medians((0.0, 2.0, 4.0, 8.0), shrink=3)
    assert all(a > b for a, b in pairwise(values)), values


def test_a_sharp_pale_tile_beats_a_blurred_dark_one() -> None:
    rgb = SyntheticSlide(SlideSpec(3, (512, 512), 0.5, tissue_fraction=1.0, holes=False)).region(0, 0, 512, 512)
    pale = np.clip(245 - (245 - rgb.astype(float)) * 0.2, 0, 255).astype(np.uint8)
    dark = np.asarray(cv2.GaussianBlur(rgb, (0, 0), 2.5), np.uint8)
    sharp, blurred = (measure_tiles(tiles_of(p), 0.5).sharpness for p in (pale, dark))
    assert sharp.min() > 1.5 * blurred.max()


def test_what_a_tile_measures_does_not_depend_on_its_batch() -> None:
    tiles = tiles_of(SyntheticSlide(SlideSpec(5, (1024, 1024), 0.5, folds=True)).region(0, 0, 1024, 1024))
    whole = LevelQuality(len(tiles), 0.5)
    whole.add(np.arange(len(tiles)), tiles)
    parts = LevelQuality(len(tiles), 0.5)
    for start in (9, 3, 0):
        stop = {9: len(tiles), 3: 9, 0: 3}[start]
        parts.add(np.arange(start, stop), tiles[start:stop])
    for name, values in whole.values().items():
        np.testing.assert_array_equal(values, parts.values()[name])
        assert name in QUALITY_METHODS


def test_glass_noise_and_tiny_tiles_have_no_sharpness() -> None:
    rng = np.random.default_rng(0)
    noise = np.clip(rng.normal(240, 1.5, (2, 256, 256, 3)), 0, 255).astype(np.uint8)
    assert measure_tiles(noise, 0.5).sharpness.max() < 0.2
    assert measure_tiles(noise[:, :16, :16], 0.5).sharpness.max() == 0
    assert measure_tiles(noise[:0], 0.5).density.shape[0] == 0


def test_folds_and_bubbles_stand_out() -> None:
    made = SyntheticSlide(SlideSpec(2, (3072, 3072), 0.5, folds=True, bubbles=True, fat=False))
    tiles = tiles_of(made.region(0, 0, 3072, 3072))
    truth = made.truth((192, 192))

    def shares(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
        return np.asarray(mask.reshape(12, 16, 12, 16).mean(axis=(1, 3)).ravel(), np.float64)

    level = LevelQuality(len(tiles), 0.5)
    level.add(np.arange(len(tiles)), tiles)
    values = level.values()
    fold, tissue = shares(truth.fold), shares(truth.tissue.mask) > 0.5
    assert (fold > 0.3).sum() >= 3
    assert values["fold"][fold > 0.3].mean() > 2.5 * values["fold"][tissue & (fold == 0)].mean()
    assert values["bubble"][shares(truth.bubble) == 0].mean() < 0.002
    assert values["bubble"].max() > 0.02


def test_figures_of_a_level() -> None:
    values = {"sharpness": np.array([0.1, 0.5, 0.9], np.float32), "fold": np.array([0, 0.2, 0.1], np.float32)}
    counts = quality_counts("20x", values)
    assert counts["sharpness_median.20x"] == pytest.approx(0.5)
    assert (counts["blurred_tiles.20x"], counts["folded_tiles.20x"]) == (1, 2)
    assert quality_counts("5x", {}) == {}


def test_a_wrong_threshold_is_refused() -> None:
    with pytest.raises(ConfigError, match="min_sharpness"):
        TileSettings(min_sharpness=float("nan"))


@pytest.fixture(scope="module")
def blurred_job(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A slide of which about half is out of focus, with all tiles and with the sharp ones alone."""
    folder = tmp_path_factory.mktemp("focus")
    made = SyntheticSlide(SlideSpec(7, (2048, 2048), 0.5, blur_um=3.0, blur_fraction=0.5))
    write_pyramid(folder / "a.tif", made.levels((1, 4)), mpp=0.5)
    for name, more in (("all", []), ("sharp", ["--min-sharpness", "0.3"])):
        arguments = ["run", str(folder / "a.tif"), "-o", str(folder / name), *more]
        assert run_group(group, "wsi-pipe", arguments) == 0
    return folder


def test_bags_hold_the_quality_of_each_tile(blurred_job: Any) -> None:
    bag = read_bag(blurred_job / "all" / "bags" / "a.h5")
    for level in bag.levels:
        assert set(level.quality) == {"sharpness", "fold", "bubble"}
        for name, item in level.quality.items():
            assert item.values.shape == (len(level.grid),)
            assert item.attrs == {"method": QUALITY_METHODS[name], "version": 1.0}
    assert "Focus and folds" in (blurred_job / "all" / "report.html").read_text(encoding="utf-8")
    counts = read_outcomes(blurred_job / "all")["a"].counts
    sharpness = bag.levels[-1].quality["sharpness"].values
    assert counts["blurred_tiles.20x"] == (sharpness < 0.3).sum() > 5


def test_blurred_tiles_are_left_out_by_option_and_that_is_told(blurred_job: Any) -> None:
    everything, sharp = (read_bag(blurred_job / name / "bags" / "a.h5") for name in ("all", "sharp"))
    kept_parents: set[tuple[int, int]] | None = None
    for old, new in zip(everything.levels, sharp.levels, strict=True):
        values = dict(zip(map(tuple, old.grid.cells.tolist()), old.quality["sharpness"].values, strict=True))
        wanted = {cell for cell, value in values.items() if value >= 0.3}
        if kept_parents is not None:
            wanted = {cell for cell in wanted if (cell[0] // 4, cell[1] // 4) in kept_parents}
        kept_parents = {(int(c), int(r)) for c, r in new.grid.cells}
        assert kept_parents == wanted
    left = len(everything.levels[-1].grid) - len(sharp.levels[-1].grid)
    assert left > 5
    outcome = read_outcomes(blurred_job / "sharp")["a"]
    assert any(f"{left} of" in note and "sharpness 0.3" in note for note in outcome.notes)
    assert run_group(group, "wsi-pipe", ["verify", str(blurred_job / "sharp")]) == 0


def test_another_threshold_makes_other_grids_and_none_keeps_the_old(blurred_job: Any) -> None:
    tiles = read_header(blurred_job / "all" / "bags" / "a.h5").attrs.fingerprint_tile
    sharp = read_header(blurred_job / "sharp" / "bags" / "a.h5").attrs.fingerprint_tile
    assert tiles != sharp
    # A run that adds nothing finds all of it valid, notes included.
    assert run_group(group, "wsi-pipe", ["run", "-o", str(blurred_job / "sharp")]) == 0
    assert read_header(blurred_job / "sharp" / "bags" / "a.h5").attrs.fingerprint_tile == sharp
    assert read_outcomes(blurred_job / "sharp")["a"].notes


def test_extract_keeps_quality_until_the_bag_is_assembled(blurred_job: Any) -> None:
    out = str(blurred_job / "steps")
    assert run_group(group, "wsi-pipe", ["extract", str(blurred_job / "a.tif"), "-o", out, "-r", "20x"]) == 0
    assert run_group(group, "wsi-pipe", ["assemble", "-o", out]) == 0
    (level,) = read_bag(blurred_job / "steps" / "bags" / "a.h5").levels
    whole = read_bag(blurred_job / "all" / "bags" / "a.h5").levels[-1]
    np.testing.assert_array_equal(level.quality["sharpness"].values, whole.quality["sharpness"].values)
