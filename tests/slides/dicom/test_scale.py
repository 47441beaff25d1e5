"""The scale of DICOM levels: what the tags state, padding, rounded spacings, statements that are wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import ExplicitVRLittleEndian

from tests.slides.dicom.test_dicom import tiles_of, write_level
from wsi_pipe.overview import read_overview
from wsi_pipe.slides import open_slide
from wsi_pipe.slides.array import ArraySlide
from wsi_pipe.slides.dicom.likeness import shows_the_same
from wsi_pipe.tiles import read_tiles

Picture = NDArray[np.uint8]
TILE, MM = 32, 0.0005


def blobs(width: int, height: int, seed: int = 3) -> Picture:
    rng = np.random.default_rng(seed)
    noise = sum(cv2.GaussianBlur(rng.normal(size=(height, width, 3)), (0, 0), s) * s for s in (2.0, 9.0))
    return np.asarray(np.clip(180 + 60 * noise, 0, 255), np.uint8)


def box(picture: Picture, factor: int) -> Picture:
    height, width = picture.shape[0] // factor, picture.shape[1] // factor
    size = (width, height)
    return np.asarray(cv2.resize(picture[: height * factor, : width * factor], size, interpolation=cv2.INTER_AREA))


def level(
    path: Path, picture: Picture, spacing_mm: float, tiles: tuple[int, int] | None = None, **tags: Any
) -> Picture:
    """An uncompressed level, padded with grey to (columns, rows) of whole tiles; gives what was stored."""
    stored = picture
    if tiles is not None:
        stored = np.full((tiles[1] * TILE, tiles[0] * TILE, 3), 250, np.uint8)
        stored[: picture.shape[0], : picture.shape[1]] = picture
    frames = [tile.tobytes() for tile in tiles_of(stored, TILE)]
    options: dict[str, Any] = {"syntax": ExplicitVRLittleEndian, "colour": "RGB", "tile": TILE, "frames": frames}
    write_level(path, stored, mm_per_px=(spacing_mm, spacing_mm), **options, **tags)
    return stored


@pytest.mark.parametrize(
    "layout", [[(38, 27), (20, 14), (10, 8)], [(38, 27), (19, 14), (10, 7), (6, 4)], [(37, 27), (10, 8)]]
)
def test_levels_padded_to_whole_tiles_are_where_their_spacing_says(
    tmp_path: Path, layout: list[tuple[int, int]]
) -> None:
    picture = blobs(37 * TILE - 9, 27 * TILE - 5)
    factors = [1, 4] if len(layout) == 2 else [2**i for i in range(len(layout))]
    stored = [
        level(tmp_path / f"{i}.dcm", box(picture, factor), MM * factor, tiles)
        for i, (tiles, factor) in enumerate(zip(layout, factors, strict=True))
    ]
    full = stored[0]
    with open_slide(tmp_path / "0.dcm") as slide:
        assert slide.info.notes == ()
        assert [found.downsample for found in slide.pyramid.levels] == [(f, f) for f in factors]
        for i, factor in enumerate(factors):
            width, height = slide.pyramid.levels[i].size_px
            assert (width, height) == tuple(-(-n // factor) for n in slide.pyramid.size_l0)
            truth = box(picture, factor)[: height - 1, : width - 1]
            found = slide.read_region(i, 0, 0, truth.shape[1], truth.shape[0])
            assert np.array_equal(found, truth)
        overview = read_overview(slide, 8.0)
        truth = read_overview(ArraySlide([full], mpp=MM * 1000), 8.0).rgb
        assert overview.rgb.shape == truth.shape
        assert np.abs(overview.rgb.astype(int) - truth).mean() < 2
        # At the far end, where a wrong scale would be off most.
        side = 64 * factors[-1] * 1.05
        corner = np.array([[picture.shape[1] - side - 40, picture.shape[0] - side - 40]])
        got = read_tiles(slide, corner, side, 64)
        want = read_tiles(ArraySlide([full], mpp=MM * 1000), corner, side, 64)
        assert np.abs(got.astype(int) - want).mean() < 4


@pytest.mark.parametrize("digits", [0.0009985, 0.001004, 0.00099])
def test_a_rounded_spacing_means_the_whole_factor(tmp_path: Path, digits: float) -> None:
    picture = blobs(301, 203)
    level(tmp_path / "0.dcm", picture, MM)
    level(tmp_path / "1.dcm", box(picture, 2), digits)
    with open_slide(tmp_path / "0.dcm") as slide:
        assert [found.downsample for found in slide.pyramid.levels] == [(1, 1), (2, 2)]
        assert slide.pyramid.levels[1].size_px == (150, 101)


def test_a_scale_that_is_no_whole_number_is_kept(tmp_path: Path) -> None:
    picture = blobs(1000, 500)
    level(tmp_path / "0.dcm", picture, MM)
    small = np.asarray(cv2.resize(picture, (400, 200), interpolation=cv2.INTER_AREA), np.uint8)
    # 2.51 was written for 2.5: sizes are exact to a pixel.
    level(tmp_path / "1.dcm", small, MM * 2.51)
    with open_slide(tmp_path / "0.dcm") as slide:
        assert slide.pyramid.levels[1].downsample == (2.5, 2.5)


@pytest.mark.parametrize(("factor", "stated"), [(2, 1.0), (2, 4.0), (4, 2.0), (2, 3.0)])
def test_a_level_whose_spacing_goes_not_with_its_size_is_left_out(tmp_path: Path, factor: int, stated: float) -> None:
    picture = blobs(640, 480)
    level(tmp_path / "0.dcm", picture, MM)
    level(tmp_path / "1.dcm", box(picture, factor), MM * stated)
    level(tmp_path / "2.dcm", box(picture, 8), MM * 8)
    with open_slide(tmp_path / "0.dcm") as slide:
        assert [found.downsample for found in slide.pyramid.levels] == [(1, 1), (8, 8)]
        assert len(slide.info.notes) == 1
        assert "(1.dcm) is left out: the spacing of" in slide.info.notes[0]


def test_a_level_that_fills_its_tiles_is_not_taken_for_a_padded_one(tmp_path: Path) -> None:
    """Its size would fit a padded half, its picture is at another scale."""
    picture = blobs(36 * TILE, 26 * TILE)
    level(tmp_path / "0.dcm", picture, MM)
    squeezed = cv2.resize(picture, (19 * TILE, 14 * TILE), interpolation=cv2.INTER_AREA)
    level(tmp_path / "1.dcm", np.asarray(squeezed, np.uint8), MM * 2)
    with open_slide(tmp_path / "0.dcm") as slide:
        assert len(slide.pyramid.levels) == 1
        assert "its picture is not at the scale of 2 that its spacing states" in slide.info.notes[0]
    level(tmp_path / "1.dcm", blobs(18 * TILE, 13 * TILE, seed=9), MM * 2, (19, 14))
    with open_slide(tmp_path / "0.dcm") as slide:
        assert len(slide.pyramid.levels) == 1


def test_a_level_of_another_picture_is_left_out(tmp_path: Path) -> None:
    """Its size and its spacing agree."""
    for i, factor in enumerate((1, 2, 4)):
        level(tmp_path / f"{i}.dcm", box(blobs(640, 480, seed=7 if i == 1 else 3), factor), MM * factor)
    with open_slide(tmp_path / "0.dcm") as slide:
        assert [found.downsample for found in slide.pyramid.levels] == [(1, 1), (4, 4)]
        assert "(1.dcm) is left out: it shows another picture than the next finer one" in slide.info.notes[0]


def test_without_spacings_the_sizes_count(tmp_path: Path) -> None:
    picture = blobs(640, 480)
    for i, factor in enumerate((1, 4)):
        level(tmp_path / f"{i}.dcm", box(picture, factor) if i else picture, MM * factor)
        data = pydicom.dcmread(tmp_path / f"{i}.dcm")
        del data.SharedFunctionalGroupsSequence
        data.ImagedVolumeWidth, data.ImagedVolumeHeight = 640 * MM, 480 * MM
        data.save_as(tmp_path / f"{i}.dcm")
    with open_slide(tmp_path / "1.dcm") as slide:
        assert [found.downsample for found in slide.pyramid.levels] == [(1, 1), (4, 4)]
        assert slide.pyramid.mpp == pytest.approx((0.5, 0.5), rel=1e-6)
        assert slide.info.mpp_source == "dicom.ImagedVolumeWidth"


@pytest.mark.parametrize(("second", "mpp"), [(MM, (0.5, 0.5)), (2 * MM, None)])
def test_the_spacing_of_frames_counts_where_they_agree(
    tmp_path: Path, second: float, mpp: tuple[float, float] | None
) -> None:
    picture = blobs(2 * TILE, TILE)
    path = write_level(
        tmp_path / "a.dcm", picture, tile=TILE, frames=[t.tobytes() for t in tiles_of(picture, TILE)],
        cells=[(0, 0), (1, 0)], syntax=ExplicitVRLittleEndian, colour="RGB",
    )  # fmt: skip
    data = pydicom.dcmread(path)
    data.SharedFunctionalGroupsSequence = Items([Dataset()])
    for group, spacing in zip(data.PerFrameFunctionalGroupsSequence, (MM, second), strict=True):
        measures = Dataset()
        measures.PixelSpacing = [spacing, spacing]
        group.PixelMeasuresSequence = Items([measures])
    data.save_as(path)
    with open_slide(path) as slide:
        assert slide.pyramid.mpp == (None if mpp is None else pytest.approx(mpp))


def test_glass_tells_nothing_against_what_is_stated() -> None:
    flat = np.full((512, 640, 3), 240, np.uint8)
    finer, coarser = (ArraySlide([p], mpp=0.5, block_px=(64, 64)) for p in (flat, flat[:260, :330]))
    assert shows_the_same(_image(finer), _image(coarser), (2.0, 2.0), (1.94, 1.97))


def _image(slide: ArraySlide) -> Any:
    class Image:
        size_px, block_px, origin_px, reduces = slide.pyramid.size_l0, (64, 64), (0, 0), (1,)

        def fetch(self, cells: Any) -> Any:
            return slide.fetch(slide.planes[0], cells)

        def decode(self, cell: Any, data: Any, reduce: int) -> Any:
            return slide.decode(slide.planes[0], cell, data)

    return Image()
