"""Synthetic slides: pure functions of their settings, with truths that hold on the pixels."""

from __future__ import annotations

import csv
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from wsi_pipe.errors import ConfigError, OutputError
from wsi_pipe.slides import open_slide
from wsi_pipe.slides.writing.write import write_pyramid
from wsi_pipe.synthetic import SIGNALS, Signal, SlideSpec, SyntheticSlide, make_cohort, plan_cohort
from wsi_pipe.synthetic.chance import uniform
from wsi_pipe.tissue import fill_polygons

Picture = NDArray[np.uint8]


def spec(seed: int = 7, **options: Any) -> SlideSpec:
    values: dict[str, Any] = {"size_px": (900, 700), "label": 1}
    return SlideSpec(seed, **(values | options))


def boxes(rgb: Picture, factor: int) -> NDArray[np.float64]:
    """Means over boxes, unrounded, computed by reshaping."""
    h, w = rgb.shape[0] // factor, rgb.shape[1] // factor
    part = rgb[: h * factor, : w * factor].reshape(h, factor, w, factor, 3).astype(np.float64)
    return np.asarray(part.mean(axis=(1, 3)))


# -- purity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mpp", [0.25, 0.2312, 0.5, 3.0])
def test_pixels_do_not_depend_on_how_they_are_asked_for(mpp: float) -> None:
    options: dict[str, Any] = {"mpp": mpp, "size_px": (1300, 500), "pen": True, "debris": True, "signal": "fine"}
    whole = SyntheticSlide(spec(**options)).region(0, 0, 1300, 500)
    other = SyntheticSlide(spec(**options))
    for x, y, w, h in [(900, 200, 300, 250), (1000, 150, 200, 200), (0, 0, 10, 10), (1023, 1, 3, 499)]:
        assert np.array_equal(other.region(x, y, w, h), whole[y : y + h, x : x + w])


def test_the_seed_decides() -> None:
    first, again, other = (SyntheticSlide(spec(seed)).region(0, 0, 300, 300) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_blocks_join_without_seams() -> None:
    """Differences across the border of two blocks are like those between other neighbours."""
    rgb = SyntheticSlide(spec(3, size_px=(2048, 600), mpp=0.5, tissue_fraction=1.0, stitching=False)).region(
        924, 0, 200, 600
    )
    steps = np.abs(np.diff(rgb.astype(int), axis=1)).mean(axis=(0, 2))
    assert abs(steps[99] - steps.mean()) < 5 * steps.std()


def test_off_the_slide_is_white() -> None:
    rgb = SyntheticSlide(spec(size_px=(100, 80))).region(-10, 70, 120, 20)
    assert (rgb[:, :10] == 255).all()
    assert (rgb[10:] == 255).all()
    assert (rgb[:, 110:] == 255).all()


@pytest.mark.parametrize("size", [(1, 1), (37, 260), (700, 5)])
def test_any_size_works(size: tuple[int, int]) -> None:
    slide = SyntheticSlide(spec(size_px=size, pen=True, debris=True, pale=True))
    assert slide.truth(size).lesion.any()
    assert slide.region(0, 0, *size).shape == (size[1], size[0], 3)
    assert slide.truth().tissue.mask.ndim == 2


def test_a_huge_slide_gives_tiles_at_once() -> None:
    slide = SyntheticSlide(spec(size_px=(60_000, 50_000), mpp=0.25))
    level = slide.level(4)
    assert level.size_px == (15_000, 12_500)
    tile = level.tile(30, 20)
    assert tile.shape == (256, 256, 3)
    full = slide.region(30 * 1024, 20 * 1024, 1024, 1024)
    assert np.abs(boxes(full, 4) - tile).max() <= 0.5 + 1e-9
    assert level.tile(58, 48).shape == (212, 152, 3)[::1]


def test_levels_and_tiles_are_the_same_pixels() -> None:
    slide = SyntheticSlide(spec(size_px=(903, 702)))
    levels = slide.levels((1, 4))
    assert [a.shape for a in levels] == [(702, 903, 3), (175, 225, 3)]
    view = slide.level(4, tile_px=64)
    rows = [np.concatenate([view.tile(c, r) for c in range(4)], axis=1) for r in range(3)]
    assert np.array_equal(np.concatenate(rows), levels[1])


def test_uniform_numbers_are_uniform_and_independent() -> None:
    u = uniform(5, np.arange(300)[:, None], np.arange(300)[None])
    assert ((u >= 0) & (u < 1)).all()
    assert np.abs(np.histogram(u, 10, (0, 1))[0] / u.size - 0.1).max() < 0.005
    assert abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(u[:, :-1].ravel(), u[:, 1:].ravel())[0, 1]) < 0.02
    assert not np.array_equal(u, uniform(6, np.arange(300)[:, None], np.arange(300)[None]))


# -- truth ------------------------------------------------------------------------------------------------------------


def test_tissue_has_the_share_that_was_asked_for() -> None:
    for share in (0.3, 0.6):
        slide = SyntheticSlide(spec(4, size_px=(2000, 2000), mpp=2.0, tissue_fraction=share, holes=False))
        assert slide.truth().tissue.mask.mean() == pytest.approx(share, abs=0.04)
    assert SyntheticSlide(spec(tissue_fraction=1.0, holes=False)).truth().tissue.mask.all()
    empty = SyntheticSlide(spec(tissue_fraction=0.0, label=0)).truth().tissue
    assert empty.is_empty
    assert empty.empty_reason


def test_truth_is_where_the_colour_is() -> None:
    slide = SyntheticSlide(spec(11, size_px=(1600, 1600), mpp=1.0, fat=False, stitching=False))
    rgb, _, _ = slide.overview(8.0)
    truth = slide.truth((rgb.shape[1], rgb.shape[0])).tissue.mask
    assert truth.shape == rgb.shape[:2]
    stained = rgb[..., 1] < rgb.max(axis=2) - 8.0
    inner, outer = ndimage.binary_erosion(truth, iterations=2), ~ndimage.binary_dilation(truth, iterations=2)
    assert stained[inner].mean() > 0.9  # the rest are lumens and clefts
    assert stained[outer].mean() < 0.001


def test_marks_are_where_truth_says() -> None:
    base = spec(5, size_px=(1200, 1200), mpp=1.0)
    plain = SyntheticSlide(base).overview(4.0)[0].astype(int)
    marked = SyntheticSlide(dataclasses.replace(base, pen=True, debris=True))
    changed = np.abs(marked.overview(4.0)[0] - plain).max(axis=2) > 12
    truth = marked.truth((300, 300))
    marks = truth.pen | truth.debris
    assert truth.pen.any()
    assert truth.debris.any()
    assert not (truth.tissue.mask & marks).any()
    assert (changed & ~ndimage.binary_dilation(marks, iterations=2)).sum() == 0
    assert changed[ndimage.binary_erosion(marks)].mean() > 0.99


def test_lesion_polygons_are_the_lesion_mask() -> None:
    slide = SyntheticSlide(spec(8, size_px=(1600, 1600), mpp=1.0))
    truth = slide.truth((400, 400))
    assert truth.lesion.any()
    filled = fill_polygons([[ring / 4.0] for ring in truth.lesion_polygons], (400, 400))
    filled &= ndimage.binary_fill_holes(truth.lesion)  # polygons are outer rings, and lesions end where tissue ends
    difference = filled ^ ndimage.binary_fill_holes(truth.lesion)
    assert difference.sum() < 0.02 * truth.lesion.sum()
    tissue = fill_polygons([[ring / 4.0] for ring in truth.tissue_polygons], (400, 400))
    assert (truth.tissue.mask & ~tissue).sum() < 0.01 * tissue.sum()


def test_lesions_have_the_share_that_was_asked_for() -> None:
    shares = []
    for seed in range(4):
        truth = SyntheticSlide(spec(seed, size_px=(1500, 1500), mpp=2.0, lesion_fraction=0.25)).truth()
        shares.append(truth.lesion.sum() / truth.tissue.mask.sum())
    assert np.mean(shares) == pytest.approx(0.25, abs=0.08)
    assert not SyntheticSlide(spec(label=0)).truth().lesion.any()


def test_pale_tissue_is_pale_and_still_tissue() -> None:
    base = spec(9, size_px=(1500, 1500), mpp=2.0, label=0)
    pale = SyntheticSlide(dataclasses.replace(base, pale=True))
    plain = SyntheticSlide(base)
    assert np.array_equal(pale.truth().tissue.mask, plain.truth().tissue.mask)
    lighter = pale.overview(8.0)[0][..., 1].astype(int) - plain.overview(8.0)[0][..., 1]
    assert 0.05 < (lighter > 20).sum() / plain.truth().tissue.mask.sum() < 0.4


# -- lesion signal ----------------------------------------------------------------------------------------------------


def pair(signal: Signal, **options: Any) -> tuple[Picture, Picture, NDArray[np.bool_]]:
    """A slide with and without its lesions, and where they are, by level-0 pixels."""
    size = (1024, 1024)
    slides = [SyntheticSlide(spec(21, size_px=size, signal=signal, label=k, **options)) for k in (0, 1)]
    return slides[0].region(0, 0, *size), slides[1].region(0, 0, *size), slides[1].truth(size).lesion


@pytest.mark.parametrize("signal", SIGNALS)
def test_the_label_changes_lesions_and_nothing_else(signal: Signal) -> None:
    without, with_, lesion = pair(signal)
    changed = (without != with_).any(axis=2)
    assert changed[lesion].mean() > 0.02
    margin_um = 130 if signal == "coarse" else 16  # sheets of tumour take the place of whole glands
    assert not changed[ndimage.distance_transform_edt(~lesion) * 0.5 > margin_um].any()


def test_the_coarse_signal_shows_in_colour_at_5x() -> None:
    without, with_, lesion = pair("coarse")
    assert (without[lesion].mean(axis=0) - with_[lesion].mean(axis=0)).max() > 25


def test_the_middle_signal_leaves_the_mean_and_a_trace_at_5x() -> None:
    without, with_, lesion = pair("middle")
    # The amount of stain is kept; light is not quite linear in it.
    assert np.abs(without[lesion].mean(axis=0) - with_[lesion].mean(axis=0)).max() < 2.5
    at_20x = np.abs(without[lesion].astype(float) - with_[lesion]).mean()
    small = lesion[::4, ::4]
    at_5x = np.abs(boxes(without, 4) - boxes(with_, 4))[small].mean()
    assert 0.2 * at_20x < at_5x < 0.95 * at_20x


@pytest.mark.parametrize("mpp", [0.5, 0.25])
def test_the_fine_signal_is_exactly_nothing_at_5x(mpp: float) -> None:
    without, with_, lesion = pair("fine", mpp=mpp)
    factor = round(2.0 / mpp)
    assert np.array_equal(boxes(without, factor), boxes(with_, factor))
    at_20x = round(0.5 / mpp)
    difference = np.abs(boxes(without, at_20x) - boxes(with_, at_20x)).max(axis=2)
    assert difference[lesion[::at_20x, ::at_20x]].max() > 15


@pytest.mark.parametrize("signal", SIGNALS)
def test_strength_scales_the_signal(signal: Signal) -> None:
    changes = []
    for strength in (0.0, 0.5, 1.0):
        without, with_, _ = pair(signal, strength=strength)
        changes.append(np.abs(without.astype(float) - with_).sum())
    assert changes[0] == 0
    assert changes[0] < changes[1] < changes[2]


# -- stain ------------------------------------------------------------------------------------------------------------


def test_stain_varies_between_slides_as_asked() -> None:
    def mean_colour(seed: int, much: float) -> NDArray[np.float64]:
        rgb = SyntheticSlide(
            spec(seed, size_px=(512, 512), tissue_fraction=1.0, fat=False, stain_variation=much, label=0, holes=False)
        ).region(0, 0, 512, 512)
        return np.asarray(rgb.reshape(-1, 3).mean(axis=0))

    varied = np.std([mean_colour(seed, 1.0) for seed in range(6)], axis=0).max()
    fixed = np.std([mean_colour(seed, 0.0) for seed in range(6)], axis=0).max()
    assert varied > 2 * fixed


def test_it_is_stained_like_haematoxylin_and_eosin() -> None:
    """Tissue absorbs green most; its dark part, nuclei, absorbs red far more than its bright part does."""
    rgb = SyntheticSlide(spec(2, tissue_fraction=1.0, fat=False, label=0)).region(0, 0, 900, 700).reshape(-1, 3)
    od = -np.log10((rgb + 1.0) / 245.0)
    stained = od[:, 1] > 0.15
    assert (od[stained, 1] >= od[stained, 0]).mean() > 0.97
    nuclei = stained & (od[:, 0] > 0.4)
    assert 0.02 < nuclei.mean() < 0.4
    ratio = od[:, 0] / np.maximum(od[:, 1], 1e-3)
    assert np.median(ratio[nuclei]) > 2 * np.median(ratio[stained & ~nuclei])


# -- settings and cohorts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"size_px": (0, 5)},
        {"mpp": 0.0},
        {"mpp": float("nan")},
        {"label": 2},
        {"signal": "loud"},
        {"strength": 1.1},
        {"lesion_fraction": -0.1},
        {"lesion_fraction": 0.0},
        {"tissue_fraction": 0.0},
    ],
)
def test_wrong_settings_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        spec(**options)


def test_a_cohort_is_balanced_by_case_and_blind_to_order() -> None:
    slides = plan_cohort(Path("x"), 200, seed=4, size_px=(256, 256))
    assert len(slides) == 200
    assert len({s.slide_id for s in slides}) == 200
    assert len({s.spec.seed for s in slides}) == 200
    labels = np.array([s.spec.label for s in slides])
    assert abs(labels.mean() - 0.5) <= 0.02
    by_case: dict[str, set[int]] = {}
    for s in slides:
        by_case.setdefault(s.case_id, set()).add(s.spec.label)
    assert all(len(v) == 1 for v in by_case.values())
    assert 60 < len(by_case) < 180
    assert abs(np.corrcoef(np.arange(200), labels)[0, 1]) < 0.2
    few = plan_cohort(Path("x"), 100, seed=4, positive_fraction=0.2, max_slides_per_case=1)
    assert len({s.case_id for s in few}) == 100
    assert sum(s.spec.label for s in few) == pytest.approx(20, abs=1)


@pytest.mark.parametrize(
    "options", [{"n_slides": 0}, {"positive_fraction": 1.5}, {"colour": "red"}, {"max_slides_per_case": 0}]
)
def test_a_cohort_that_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        plan_cohort(Path("x"), **({"n_slides": 3} | options))


def test_a_cohort_on_disk(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    slides = make_cohort(
        tmp_path / "cohort", 5, seed=2, size_px=(512, 384), signal="middle", progress=lambda a, b: seen.append((a, b))
    )
    assert seen == [(k, 5) for k in range(1, 6)]
    with open(tmp_path / "cohort" / "labels.csv", newline="") as handle:
        labels = list(csv.DictReader(handle))
    assert [(r["slide_id"], r["case_id"], r["label"]) for r in labels] == [
        (s.slide_id, s.case_id, ("negative", "positive")[s.spec.label]) for s in slides
    ]
    with open(tmp_path / "cohort" / "slides.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    for item, row in zip(slides, rows, strict=True):
        path = tmp_path / "cohort" / row["slide"]
        assert path == item.path
        slide = open_slide(path)
        assert [level.size_px for level in slide.pyramid.levels] == [(512, 384), (128, 96)]
        assert slide.pyramid.mpp == pytest.approx((0.5, 0.5), rel=1e-4)
        drawn = SyntheticSlide(item.spec).region(0, 0, 512, 384)
        stored = slide.read_region(0, 0, 0, 512, 384)
        assert np.abs(stored.astype(int) - drawn).mean() < 4
        slide.close()
    make_cohort(tmp_path / "again", 5, seed=2, size_px=(512, 384), signal="middle")
    for item in slides:
        assert (tmp_path / "again" / item.path.name).read_bytes() == item.path.read_bytes()


@pytest.mark.slow
def test_several_processes_write_the_same_files(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    one = make_cohort(tmp_path / "one", 3, seed=9, size_px=(512, 512), downsamples=(1, 4, 16))
    two = make_cohort(
        tmp_path / "two", 3, seed=9, size_px=(512, 512), downsamples=(1, 4, 16), workers=2,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert [s.spec for s in one] == [s.spec for s in two]
    files = [{p.name: p.read_bytes() for p in sorted((tmp_path / name).iterdir())} for name in ("one", "two")]
    assert len(files[0]) == 5
    assert files[0] == files[1]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(ConfigError, match="0 processes"):
        make_cohort(tmp_path / "none", 3, workers=0)
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_what_a_drawing_process_raises_reaches_the_caller(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutputError):
        make_cohort(tmp_path / "file", 4, size_px=(256, 256), workers=2)


def test_a_script_without_a_guard_is_told_of_it(tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text(
        "from wsi_pipe.synthetic import make_cohort\nmake_cohort('x', 2, size_px=(256, 256), workers=2)\n"
    )
    ended = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    # Python's tracker of resources may have a word of its own after it.
    errors = [line for line in ended.stderr.splitlines() if line.startswith("wsi_pipe.errors.")]
    assert errors[-1].startswith("wsi_pipe.errors.WorkerError: a process that draws slides died; keep")
    assert 'below if __name__ == "__main__"' in ended.stderr


def test_a_slide_streams_to_a_file(tmp_path: Path) -> None:
    slide = SyntheticSlide(spec(6, size_px=(1300, 1100)))
    path = tmp_path / "streamed.svs"
    write_pyramid(path, [slide.level(1), slide.level(4)], mpp=0.5, compression="deflate")
    stored = open_slide(path)
    levels = slide.levels((1, 4))
    assert np.array_equal(stored.read_region(0, 0, 0, 1300, 1100), levels[0])
    assert np.array_equal(stored.read_region(1, 0, 0, 325, 275), levels[1])
    stored.close()
