"""What a TIFF's pictures mean: each kind of file is read rightly or refused with its reason, by whichever reader."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from wsi_pipe.errors import NotAPictureError, UnsupportedSlideError
from wsi_pipe.slides import open_slide

Picture = NDArray[np.uint8]

TAGS: dict[str, Any] = {"resolution": (40000, 40000), "resolutionunit": "CENTIMETER"}
TILED: dict[str, Any] = {"tile": (128, 128), "compression": "zlib", "metadata": None, **TAGS}
READERS = ("auto", "tiff", "openslide", "image")


def scene(seed: int, width: int = 640, height: int = 480) -> Picture:
    """Tissue on glass, different everywhere."""
    rng = np.random.default_rng(seed)
    field = cv2.GaussianBlur(rng.normal(0, 1, (height, width)).astype(np.float32), (0, 0), 30)
    rough = cv2.GaussianBlur(rng.normal(0, 1, (height, width, 3)).astype(np.float32), (0, 0), 3) * 90
    rgb = np.clip(np.array((190, 120, 170)) + rough, 0, 255)
    rgb[field < 0] = (243, 242, 244)
    return rgb.astype(np.uint8)


def half(rgb: Picture, factor: int = 2) -> Picture:
    size = (rgb.shape[1] // factor, rgb.shape[0] // factor)
    return np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), np.uint8)


def write(path: Path, pages: Sequence[tuple[NDArray[Any], dict[str, Any]]], **options: Any) -> Path:
    with tifffile.TiffWriter(path, **options) as file:
        for pixels, more in pages:
            file.write(np.ascontiguousarray(pixels), **more)
    return path


def level_0(path: Path, **options: Any) -> Picture:
    with closing(open_slide(path, **options)) as slide:
        return slide.read_region(0, 0, 0, *slide.pyramid.size_l0)


def refusals(path: Path, **options: Any) -> list[str]:
    """What each reader says; none may open the file, whichever is asked, and what is final is said by ``auto``."""
    found = []
    for reader in READERS:
        with pytest.raises(UnsupportedSlideError) as caught:
            open_slide(path, reader=reader, **options).close()
        found.append(str(caught.value))
        if reader == "auto":
            assert isinstance(caught.value, NotAPictureError)
        assert "damaged" not in found[-1]
    return found


RGB = scene(1)
OTHER = scene(2)


@pytest.mark.parametrize("tile", [(128, 128), None])
@pytest.mark.parametrize(
    ("values", "options", "words"),
    [
        (RGB.astype(np.uint16) * 16, {"photometric": "rgb"}, "16-bit uint16"),
        (RGB[..., 0].astype(np.int16), {"photometric": "minisblack"}, "16-bit int16"),
        (RGB.astype(np.float64) / 255, {"photometric": "rgb"}, "64-bit float64"),
        (RGB[..., 0] > 128, {"photometric": "minisblack"}, "1-bit"),
        (np.dstack([RGB, RGB[..., 0]]), {"photometric": "separated"}, "inks"),
        (np.dstack([RGB, RGB]), {"photometric": "rgb", "extrasamples": ["UNSPECIFIED"] * 3}, "6 samples"),
        (RGB, {"photometric": "icclab"}, r"Lab|L\*a\*b\*"),
        (np.dstack([RGB[..., 0]] * 3), {"photometric": "minisblack", "planarconfig": "contig"}, "3 samples"),
    ],
)
def test_samples_of_another_kind_are_refused_by_every_reader(
    tmp_path: Path, values: NDArray[Any], options: dict[str, Any], words: str, tile: tuple[int, int] | None
) -> None:
    options = {**TILED, **options, "tile": tile, "compression": None}
    path = write(tmp_path / "a.tif", [(values, options)], bigtiff=True)
    for text in refusals(path):
        assert re.search(words, text), text


@pytest.mark.parametrize(
    ("values", "options", "right"),
    [
        (np.dstack([RGB, np.full(RGB.shape[:2], 255, np.uint8)]), {"photometric": "rgb", "extrasamples": [2]}, RGB),
        (RGB[..., 1], {"photometric": "minisblack"}, np.repeat(RGB[..., 1:2], 3, 2)),
        (255 - RGB[..., 1], {"photometric": "miniswhite"}, np.repeat(RGB[..., 1:2], 3, 2)),
        (np.moveaxis(RGB, 2, 0), {"photometric": "rgb", "planarconfig": "separate"}, RGB),
    ],
)
def test_samples_of_eight_bits_are_read(
    tmp_path: Path, values: NDArray[Any], options: dict[str, Any], right: Picture
) -> None:
    path = write(tmp_path / "a.tif", [(values, {**TILED, **options})])
    assert np.array_equal(level_0(path), right)


def test_grey_pages_of_one_size_are_refused_by_every_reader(tmp_path: Path) -> None:
    pages = [(255 - RGB[..., c], {**TILED, "photometric": "minisblack"}) for c in (0, 2)]
    for text in refusals(write(tmp_path / "a.tif", pages)):
        assert "2 grey images of 640 x 480 px (channels, focal planes or times)" in text


def test_colour_pages_that_nothing_tells_apart_are_listed_and_can_be_chosen(tmp_path: Path) -> None:
    options = {**TILED, "photometric": "rgb"}
    path = write(tmp_path / "a.tif", [(RGB, options), (OTHER, options)])
    for text in refusals(path):
        assert "0: 640 x 480 px at 0.25 um/px; 1: 640 x 480 px at 0.25 um/px" in text
        assert "--scene 0 to 1" in text
    assert np.array_equal(level_0(path, scene=0), RGB)
    assert np.array_equal(level_0(path, scene=1), OTHER)
    with pytest.raises(NotAPictureError, match="--scene 2 is not there"):
        open_slide(path, scene=2)


def test_a_second_scan_of_another_size_is_not_left_out_in_silence(tmp_path: Path) -> None:
    options = {**TILED, "photometric": "rgb"}
    second = scene(3, 500, 420)
    path = write(tmp_path / "a.tif", [(second, options), (RGB, options)])
    with pytest.raises(NotAPictureError, match=r"holds 2 pictures.*0: 500 x 420 px.*1: 640 x 480 px"):
        open_slide(path)
    assert np.array_equal(level_0(path, scene=0), second)


def test_a_scan_that_could_be_a_level_by_its_size_is_told_by_what_it_shows(tmp_path: Path) -> None:
    options = {**TILED, "photometric": "rgb"}
    small = half(OTHER)
    path = write(tmp_path / "a.tif", [(RGB, options), (small, options)])
    with pytest.raises(NotAPictureError, match=r"holds 2 pictures.*1: 320 x 240 px"):
        open_slide(path)
    assert np.array_equal(level_0(path, scene=1), small)
    with closing(open_slide(path, scene=0)) as slide:
        assert len(slide.pyramid.levels) == 1
        assert slide.info.notes == ("image 1 of 320 x 240 px is left out as a level: it shows another picture",)


def test_imagej_stacks(tmp_path: Path) -> None:
    stack = np.stack([255 - RGB, RGB, OTHER])
    tifffile.imwrite(tmp_path / "z.tif", stack, imagej=True, metadata={"axes": "ZYXS"})
    assert np.array_equal(level_0(tmp_path / "z.tif"), RGB)
    assert np.array_equal(level_0(tmp_path / "z.tif", z=2), OTHER)
    for axes, word in (("CYXS", "channels"), ("TYXS", "time points")):
        path = tmp_path / f"{axes}.tif"
        tifffile.imwrite(path, stack, imagej=True, metadata={"axes": axes})
        for text in refusals(path):
            assert f"an ImageJ stack of 3 {word}" in text


def test_an_imagej_stack_of_which_one_page_is_listed_is_refused(tmp_path: Path) -> None:
    # Beyond 4 GiB ImageJ lists the first page only, and the others follow it in the file.
    words = "ImageJ=1.53t\nimages=40\nslices=40\nloop=false\n"
    path = write(tmp_path / "a.tif", [(RGB, {**TILED, "photometric": "rgb", "description": words})])
    for text in refusals(path):
        assert "40 images, of which 1 are listed" in text


def test_an_array_of_which_one_page_is_listed_is_refused(tmp_path: Path) -> None:
    words = '{"shape": [7, 480, 640, 3], "truncated": true}'
    path = write(tmp_path / "a.tif", [(RGB, {**TILED, "photometric": "rgb", "description": words})])
    assert "an array of shape (7, 480, 640, 3)" in refusals(path)[0]


@pytest.mark.parametrize("field", ["Illumination = Fluorescence", "Fluorescence = 1", "ScanMode=fluorescent"])
def test_a_slide_that_says_fluorescence_is_refused_by_every_reader(tmp_path: Path, field: str) -> None:
    words = f"Aperio Image Library v12.0.5\r\n640x480 (128x128) JPEG/RGB Q=70|AppMag = 40|MPP = 0.25|{field}"
    path = write(tmp_path / "a.svs", [(RGB, {**TILED, "photometric": "rgb", "description": words})])
    for text in refusals(path):
        assert "a fluorescence scan, as it says" in text


@pytest.mark.parametrize("field", ["Filename = fluorescence control", "Fluorescence = 0", "Title=no fluorescence"])
def test_a_mention_of_fluorescence_is_no_statement(tmp_path: Path, field: str) -> None:
    words = f"Aperio Image Library v12.0.5\r\n640x480 (128x128) JPEG/RGB Q=70|AppMag = 40|MPP = 0.25|{field}"
    path = write(tmp_path / "a.svs", [(RGB, {**TILED, "photometric": "rgb", "description": words})])
    assert np.array_equal(level_0(path), RGB)


def test_private_tags_of_confocal_programs_are_refused(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.lsm", [(RGB, {**TILED, "photometric": "rgb", "extratags": [(34412, 1, 4, b"1234", True)]})]
    )
    assert "LSM" in refusals(path)[0]


def test_aperio_focal_planes(tmp_path: Path) -> None:
    words = "Aperio Image Library v12.0.5\r\n640x480 (128x128) JPEG/RGB Q=70|MPP = 0.25|OffsetZ = {}"
    planes = [255 - RGB, RGB, OTHER]
    pages = [(p, {**TILED, "photometric": "rgb", "description": words.format(z)}) for z, p in enumerate(planes)]
    path = write(tmp_path / "a.svs", pages)
    with closing(open_slide(path)) as slide:
        assert slide.info.notes == ("focal plane 1 of 3 (0 to 2), the middle one, as none was asked for (--z)",)
        assert slide.info.vendor == "aperio"
    assert np.array_equal(level_0(path), RGB)
    assert np.array_equal(level_0(path, z=0), 255 - RGB)


def test_a_slide_of_one_picture_has_no_other_scan_or_plane(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", [(RGB, {**TILED, "photometric": "rgb"})])
    assert np.array_equal(level_0(path, scene=0, z=0), RGB)
    for reader in READERS:
        for options in ({"scene": 1}, {"z": 1}):
            with pytest.raises(NotAPictureError, match=r"scene 1|--z 1"):
                open_slide(path, reader=reader, **options)
    png = tmp_path / "a.png"
    cv2.imwrite(str(png), RGB[..., ::-1])
    with pytest.raises(UnsupportedSlideError, match="--z 3 was asked for"):
        open_slide(png, z=3)
