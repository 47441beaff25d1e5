"""Which images are a slide's levels, at which scale, and what is said of those that are none."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from tests.slides.tiff.test_meaning import OTHER, RGB, TILED, half, scene, write
from wsi_pipe.errors import ResolutionError
from wsi_pipe.slides import open_slide
from wsi_pipe.slides.tiff.levels import Candidate, Placed, is_whole_fraction, place

PLAIN: dict[str, Any] = {**TILED, "photometric": "rgb"}
REDUCED: dict[str, Any] = {**PLAIN, "subfiletype": 1}
BY_FAST = ["zlib", "zstd"]
"""Compressions of the fast reader, and of the reader for other TIFFs: the rule is one."""


def sizes(path: Path, **options: Any) -> list[tuple[int, int]]:
    with closing(open_slide(path, **options)) as slide:
        return [level.size_px for level in slide.pyramid.levels]


@pytest.mark.parametrize("compression", BY_FAST)
def test_levels_without_a_mark_in_any_order(tmp_path: Path, compression: str) -> None:
    options = {**PLAIN, "compression": compression}
    pages = [half(RGB, 4), RGB, half(RGB), half(RGB, 8)]
    path = write(tmp_path / "a.tif", [(page, options) for page in pages])
    with closing(open_slide(path)) as slide:
        assert [level.size_px for level in slide.pyramid.levels] == [(640, 480), (320, 240), (160, 120), (80, 60)]
        assert slide.info.notes == ()
        for level, right in enumerate((RGB, half(RGB), half(RGB, 4), half(RGB, 8))):
            assert np.array_equal(slide.read_region(level, 0, 0, right.shape[1], right.shape[0]), right)


@pytest.mark.parametrize("compression", BY_FAST)
def test_levels_as_sub_images(tmp_path: Path, compression: str) -> None:
    options = {**PLAIN, "compression": compression}
    pages = [(RGB, {**options, "subifds": 2}), *((half(RGB, k), {**options, "subfiletype": 1}) for k in (2, 4))]
    assert sizes(write(tmp_path / "a.tif", pages)) == [(640, 480), (320, 240), (160, 120)]


@pytest.mark.parametrize("interpolation", [cv2.INTER_AREA, cv2.INTER_NEAREST, cv2.INTER_LANCZOS4])
@pytest.mark.parametrize("factor", [2, 3, 8])
def test_levels_by_any_filter_are_alike(tmp_path: Path, interpolation: int, factor: int) -> None:
    picture = scene(11, 1440, 1200)
    size = (1440 // factor, 1200 // factor)
    small = cv2.resize(picture, size, interpolation=interpolation)
    jpeg = {**PLAIN, "compression": "jpeg", "compressionargs": {"level": 60}}
    path = write(tmp_path / "a.tif", [(picture, PLAIN), (small, jpeg)])
    assert sizes(path) == [(1440, 1200), size]


@pytest.mark.parametrize("compression", BY_FAST)
@pytest.mark.parametrize("mark", [0, 1])
@pytest.mark.parametrize(
    "picture", [half(OTHER, 4), half(RGB, 4)[:, ::-1], 255 - half(RGB, 4), half(RGB, 4)[..., ::-1], half(RGB, 4) // 2]
)
def test_a_picture_of_fitting_size_that_shows_something_else_is_none(
    tmp_path: Path, picture: np.ndarray[Any, Any], mark: int, compression: str
) -> None:
    options = {**PLAIN, "compression": compression}
    pages = [(RGB, options), (half(RGB), {**options, "subfiletype": 1}), (picture, {**options, "subfiletype": mark})]
    path = write(tmp_path / "a.tif", pages)
    with closing(open_slide(path)) as slide:
        assert [level.size_px for level in slide.pyramid.levels] == [(640, 480), (320, 240)]
        assert slide.info.notes == ("image 2 of 160 x 120 px is left out as a level: it shows another picture",)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"subfiletype": 9}, "macro"),
        ({"description": "Label Image"}, "label"),
        ({"description": "macro", "subfiletype": 1}, "macro"),
        ({"description": '{"name": "Thumbnail"}'}, "thumbnail"),
        ({"extratags": [(285, 2, 0, "Overview", True)]}, "macro"),
        ({"description": "<QPI><ImageType>Label</ImageType></QPI>"}, "label"),
    ],
)
def test_what_is_marked_or_named_is_no_level_even_if_it_is_alike(
    tmp_path: Path, options: dict[str, Any], name: str
) -> None:
    path = write(tmp_path / "a.tif", [(RGB, PLAIN), (half(RGB), REDUCED), (half(RGB, 4), {**PLAIN, **options})])
    with closing(open_slide(path)) as slide:
        assert [level.size_px for level in slide.pyramid.levels] == [(640, 480), (320, 240)]
        assert list(slide.associated_images()) == [name]
        assert slide.info.notes == ()


def test_a_slides_own_description_may_say_label(tmp_path: Path) -> None:
    described = {**PLAIN, "description": "scanned for the label study; macro included | file = macro.tif"}
    assert sizes(write(tmp_path / "a.tif", [(RGB, described), (half(RGB), REDUCED)])) == [(640, 480), (320, 240)]


def test_an_aperio_macro_in_tiles_is_no_level(tmp_path: Path) -> None:
    words = "Aperio Image Library v12.0.5\r\n"
    pages = [
        (RGB, {**PLAIN, "description": words + "640x480 [0,0 640x480] (128x128) JPEG/RGB Q=70|MPP = 0.25"}),
        (half(RGB), {**PLAIN, "description": words + "640x480 (128x128) -> 320x240 JPEG/RGB Q=70"}),
        (half(OTHER, 4), {**PLAIN, "subfiletype": 9, "description": words + "macro 160x120"}),
        (half(OTHER, 8), {**PLAIN, "description": words + "label 80x60"}),
    ]
    path = write(tmp_path / "a.svs", pages)
    for reader in ("tiff", "image"):
        assert sizes(path, reader=reader) == [(640, 480), (320, 240)]


def test_padding_up_to_whole_tiles_is_cut_off_where_the_scale_is_stated(tmp_path: Path) -> None:
    picture = RGB[:430, :610]
    small = half(picture)
    padded = np.full((256, 384, 3), 255, np.uint8)
    padded[:215, :305] = small
    for compression in BY_FAST:
        options = {**PLAIN, "compression": compression}
        # 1.996 is what rounded tags say; the file means 2.
        tags = {"subfiletype": 1, "resolution": (40000 / 1.996, 40000 / 1.996)}
        path = write(tmp_path / f"{compression}.tif", [(picture, options), (padded, {**options, **tags})])
        with closing(open_slide(path)) as slide:
            assert [level.size_px for level in slide.pyramid.levels] == [(610, 430), (305, 215)]
            assert slide.pyramid.levels[1].downsample == (2.0, 2.0)
            assert np.array_equal(slide.read_region(1, 0, 0, 305, 215), small)


def test_a_level_whose_statement_disagrees_with_it_is_left_out_by_every_reader(tmp_path: Path) -> None:
    level = {**REDUCED, "resolution": (10000, 10000)}
    path = write(tmp_path / "a.tif", [(RGB, PLAIN), (half(RGB), level)])
    for reader in ("tiff", "image"):
        with closing(open_slide(path, reader=reader)) as slide:
            assert len(slide.pyramid.levels) == 1
            assert "it states 1/4 of the slide, and its size is 1/2" in slide.info.notes[0]


@pytest.mark.parametrize(
    ("candidate", "placed"),
    [
        (Candidate("a", (500, 400), (1, 1), False), Placed((500, 400), (2.0, 2.0))),
        (Candidate("a", (333, 266), (1, 1), False), Placed((333, 266), (1000 / 333, 800 / 266))),
        (Candidate("a", (334, 267), (1, 1), False), Placed((334, 267), (1000 / 334, 800 / 267))),
        (Candidate("a", (333, 266), (1, 1), True, stated=(2.99, 3.01)), Placed((333, 266), (3.0, 3.0))),
        (Candidate("a", (512, 512), (256, 256), True, stated=(2.0, 2.0)), Placed((500, 400), (2.0, 2.0))),
        (Candidate("a", (768, 512), (256, 256), True, stated=(2.0, 2.0)), "it states"),
        (Candidate("a", (500, 400), (1, 1), True, stated=(4.0, 4.0)), "it states"),
        (Candidate("a", (400, 320), (1, 1), True, stated=(2.5, 2.5)), Placed((400, 320), (2.5, 2.5))),
        (Candidate("a", (400, 320), (1, 1), False), "neither marked"),
        (Candidate("a", (500, 200), (1, 1), True), "another shape"),
    ],
)
def test_where_a_candidate_lies(candidate: Candidate, placed: Placed | str) -> None:
    found = place((1000, 800), candidate)
    assert placed in found if isinstance(placed, str) and isinstance(found, str) else found == placed


def test_whole_fractions() -> None:
    assert is_whole_fraction((1001, 700), (500, 350))
    assert is_whole_fraction((1001, 700), (501, 350))
    assert not is_whole_fraction((1001, 700), (502, 350))
    assert not is_whole_fraction((1001, 700), (1001, 700))
    assert not is_whole_fraction((1000, 700), (500, 233))


@pytest.mark.parametrize(
    ("words", "source"),
    [
        ("Motic V1.2|AppMag = 20|MPP = 0.34", "description.MPP"),
        ("Scanner X\nmpp: 0.34\nobjective: 20", "description.MPP"),
        ("AppMag=20;MPP=0,34;Date=x", "description.MPP"),
        ("Aperio Image Library v12\r\n640x480 (128x128)|AppMag = 20|MPP = 0.34", "aperio.MPP"),
    ],
)
@pytest.mark.parametrize("compression", BY_FAST)
def test_a_resolution_in_the_description_goes_before_the_tags(
    tmp_path: Path, words: str, source: str, compression: str
) -> None:
    path = write(tmp_path / "a.tif", [(RGB, {**PLAIN, "compression": compression, "description": words})])
    with closing(open_slide(path)) as slide:
        assert slide.pyramid.mpp == (0.34, 0.34)
        assert slide.info.mpp_source in (source, "openslide.mpp-x")


def test_resolution_tags_count_where_the_vendors_field_is_missing(tmp_path: Path) -> None:
    words = "Aperio Image Library v12\r\n640x480 (128x128)|AppMag = 20"
    path = write(tmp_path / "a.svs", [(RGB, {**PLAIN, "description": words})])
    for reader in ("tiff", "openslide", "image"):
        with closing(open_slide(path, reader=reader)) as slide:
            assert slide.pyramid.mpp == (0.25, 0.25)
            assert slide.info.mpp_source == "tiff.XResolution (cm)"


@pytest.mark.parametrize("value", ["0.04", "25"])
def test_a_resolution_that_no_microscope_has_is_an_error_that_says_so(tmp_path: Path, value: str) -> None:
    words = f"Aperio Image Library v12\r\n640x480 (128x128)|AppMag = 20|MPP = {value}"
    path = write(tmp_path / "a.svs", [(RGB, {**PLAIN, "description": words})])
    for reader in ("auto", "tiff", "openslide", "image"):
        with pytest.raises(
            ResolutionError, match=rf"states {value} x {value} um/px .*outside 0.05 to 20; give .*--slide-mpp"
        ):
            open_slide(path, reader=reader)
        open_slide(path, reader=reader, mpp=0.25).close()
