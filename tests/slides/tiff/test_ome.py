"""OME-TIFF: colours in three planes, focal planes, several images, and what is none of a slide."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from tests.slides.tiff.test_meaning import OTHER, RGB, half, level_0, refusals
from wsi_pipe.errors import NotAPictureError
from wsi_pipe.slides import open_slide
from wsi_pipe.slides.room import ReadsInto

SIZES = {"PhysicalSizeX": 0.25, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.25, "PhysicalSizeYUnit": "µm"}


def planes(path: Path, picture: NDArray[np.uint8], channels: dict[str, Any] | None, **options: Any) -> Path:
    """Three grey planes with one reduced level, as bioformats2raw and raw2ometiff write them."""
    options = {"tile": (128, 128), "photometric": "minisblack", "compression": "zlib", **options}
    with tifffile.TiffWriter(path, ome=True) as file:
        metadata = {"axes": "CYX", **SIZES} | ({"Channel": channels} if channels else {})
        file.write(np.ascontiguousarray(np.moveaxis(picture, 2, 0)), subifds=1, metadata=metadata, **options)
        small = np.ascontiguousarray(np.moveaxis(half(picture), 2, 0))
        file.write(small, subfiletype=1, metadata=None, **options)
    return path


@pytest.mark.parametrize(
    "channels",
    [{"Name": ["Red", "Green", "Blue"]}, {"Name": ["r", "g", "b"]}, {"Color": [-16776961, 16711935, 65535]}],
)
@pytest.mark.parametrize(("compression", "reader"), [("zlib", "tiff"), ("jpeg2000", "tiff"), ("zstd", "image")])
def test_planes_of_red_green_and_blue_are_a_colour_slide(
    tmp_path: Path, channels: dict[str, Any], compression: str, reader: str
) -> None:
    path = planes(tmp_path / "a.ome.tif", RGB, channels, compression=compression)
    with closing(open_slide(path)) as slide:
        assert slide.info.reader == reader
        assert [level.size_px for level in slide.pyramid.levels] == [(640, 480), (320, 240)]
        assert slide.pyramid.mpp == (0.25, 0.25)
        assert slide.info.notes == ()
        assert np.array_equal(slide.read_region(0, 0, 0, 640, 480), RGB)
        assert np.array_equal(slide.read_region(1, 37, 11, 200, 180), half(RGB)[11:191, 37:237])
        # Odd sizes at the edge, off the slide, and the codec's reductions.
        assert (slide.read_region(0, 600, 440, 80, 80)[40:, 40:] == 255).all()
        if compression == "jpeg2000":
            assert {plane.reduce for plane in slide.planes} > {1, 2}
        assert not isinstance(slide, ReadsInto) or not slide.reads_into(slide.planes[0])


def test_planes_without_names_are_colours_where_their_background_is_bright(tmp_path: Path) -> None:
    path = planes(tmp_path / "a.ome.tif", RGB, None)
    with closing(open_slide(path)) as slide:
        assert np.array_equal(slide.read_region(0, 0, 0, 640, 480), RGB)
        assert "three channels without names are taken for red, green and blue" in slide.info.notes[0]
    for text in refusals(planes(tmp_path / "b.ome.tif", 255 - RGB, None)):
        assert "red, green and blue" in text


@pytest.mark.parametrize(
    "channels",
    [
        {"Name": ["DAPI", "FITC", "Cy3"]},
        {"Name": ["CD8", "CD4", "PanCK"]},
        {"Name": ["Blue", "Green", "Red"]},
        {"Name": ["CD8", "CD4", "PanCK"], "Color": [-16776961, 16711935, 65535]},
        {"Name": ["R", "G", "B"], "EmissionWavelength": [600, 520, 460]},
    ],
)
def test_planes_of_anything_else_are_channels(tmp_path: Path, channels: dict[str, Any]) -> None:
    for text in refusals(planes(tmp_path / "a.ome.tif", RGB, channels)):
        assert "3 channels" in text


@pytest.mark.parametrize("axes", ["ZCYX", "CZYX"])
@pytest.mark.parametrize("tile", [(128, 128), None])
def test_focal_planes_of_separate_colours(tmp_path: Path, axes: str, tile: tuple[int, int] | None) -> None:
    path = tmp_path / "a.ome.tif"
    stack = np.stack([255 - RGB, 255 - OTHER, RGB, OTHER])
    stored = np.ascontiguousarray(np.moveaxis(stack, 3, axes.index("C")))
    metadata = {"axes": axes, **SIZES, "Channel": {"Name": ["R", "G", "B"]}}
    tifffile.imwrite(path, stored, ome=True, tile=tile, photometric="minisblack", metadata=metadata)
    with closing(open_slide(path)) as slide:
        assert np.array_equal(slide.read_region(0, 0, 0, 640, 480), RGB)
        assert slide.info.notes == ("focal plane 2 of 4 (0 to 3), the middle one, as none was asked for (--z)",)
    assert np.array_equal(level_0(path, z=3), OTHER)
    with pytest.raises(NotAPictureError, match="has 4 focal planes, --z 4"):
        open_slide(path, z=4)


def test_focal_planes_with_levels(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    stack = np.stack([OTHER, RGB, 255 - OTHER])
    options: dict[str, Any] = {"tile": (128, 128), "photometric": "rgb", "compression": "zlib"}
    with tifffile.TiffWriter(path, ome=True) as file:
        file.write(stack, subifds=1, metadata={"axes": "ZYXS", **SIZES}, **options)
        file.write(np.stack([half(p) for p in stack]), subfiletype=1, metadata=None, **options)
    for z, right in ((None, RGB), (0, OTHER), (2, 255 - OTHER)):
        with closing(open_slide(path, z=z)) as slide:
            assert slide.info.reader == "tiff"
            assert np.array_equal(slide.read_region(0, 0, 0, 640, 480), right)
            assert np.array_equal(slide.read_region(1, 0, 0, 320, 240), half(right))


def test_time_points_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    options: dict[str, Any] = {"ome": True, "tile": (128, 128), "photometric": "rgb"}
    tifffile.imwrite(path, np.stack([RGB, OTHER]), metadata={"axes": "TYXS"}, **options)
    for text in refusals(path):
        assert "2 time points" in text


def test_the_largest_image_is_the_slide_with_its_own_resolution(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    options: dict[str, Any] = {"tile": (128, 128), "photometric": "rgb", "compression": "zlib"}
    with tifffile.TiffWriter(path, ome=True) as file:
        file.write(OTHER[:100, :300], metadata={"axes": "YXS", "Name": "slide.scn [macro]"}, **options)
        far = {**SIZES, "PhysicalSizeX": 14.0, "PhysicalSizeY": 14.0}
        file.write(OTHER[:400, :200], metadata={"axes": "YXS", **far}, **options)
        file.write(RGB, metadata={"axes": "YXS", "Name": "slide.scn #1", **SIZES}, **options)
        file.write(half(RGB), metadata={"axes": "YXS", **SIZES, "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}, **options)
    with closing(open_slide(path)) as slide:
        assert [level.size_px for level in slide.pyramid.levels] == [(640, 480), (320, 240)]
        assert slide.pyramid.mpp == (0.25, 0.25)
        assert np.array_equal(slide.read_region(0, 0, 0, 640, 480), RGB)
        assert list(slide.associated_images()) == ["macro", "image 1"]


def test_a_word_in_the_files_name_makes_no_macro(tmp_path: Path) -> None:
    """A slide called "macro_012.svs" was passed over for the small picture beside it."""
    path = tmp_path / "a.ome.tif"
    options: dict[str, Any] = {"tile": (128, 128), "photometric": "rgb", "compression": "zlib"}
    with tifffile.TiffWriter(path, ome=True) as file:
        file.write(RGB, metadata={"axes": "YXS", "Name": "macro_012.svs", **SIZES}, **options)
        file.write(OTHER[:130, :150], metadata={"axes": "YXS", "Name": "Series 1"}, **options)
        file.write(OTHER[:100, :300], metadata={"axes": "YXS", "Name": "macro_012.svs label"}, **options)
    with closing(open_slide(path)) as slide:
        assert np.array_equal(slide.read_region(0, 0, 0, 640, 480), RGB)
        assert "label" in slide.associated_images()


def test_scans_of_one_lens_are_listed_with_their_names(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    options: dict[str, Any] = {"tile": (128, 128), "photometric": "rgb", "compression": "zlib"}
    with tifffile.TiffWriter(path, ome=True) as file:
        file.write(RGB, metadata={"axes": "YXS", "Name": "left", **SIZES}, **options)
        file.write(OTHER[:240, :320], metadata={"axes": "YXS", "Name": "right", **SIZES}, **options)
    for text in refusals(path):
        assert "0: 640 x 480 px at 0.25 um/px (left); 1: 320 x 240 px at 0.25 um/px (right)" in text
    assert np.array_equal(level_0(path, scene=1), OTHER[:240, :320])


@pytest.mark.parametrize(
    "channel",
    [{"IlluminationType": "Epifluorescence"}, {"ContrastMethod": "Fluorescence"}, {"Name": "Hoechst 33342"}],
)
def test_a_colour_picture_of_stated_fluorescence_is_refused(tmp_path: Path, channel: dict[str, str]) -> None:
    for text in refusals(coloured(tmp_path / "a.ome.tif", channel)):
        assert "a fluorescence picture, as its OME description says" in text


def coloured(path: Path, channel: dict[str, str]) -> Path:
    """An RGB slide whose one channel has these attributes."""
    tifffile.imwrite(path, RGB, ome=True, tile=(128, 128), photometric="rgb", metadata={"axes": "YXS"})
    words = " ".join(f'{key}="{value}"' for key, value in channel.items())
    changed = tifffile.tiffcomment(path).replace("<Channel ", f"<Channel {words} ")
    assert changed.count(words) == 1
    tifffile.tiffcomment(path, changed.encode())
    return path


def test_light_that_is_let_through_may_have_a_wavelength(tmp_path: Path) -> None:
    """Zeiss's scanners write one, and a "fluor", for brightfield too."""
    zeiss = {"Name": "TL", "IlluminationType": "Transmitted", "EmissionWavelength": "585", "Fluor": "TL Brightfield"}
    assert np.array_equal(level_0(coloured(tmp_path / "a.ome.tif", zeiss)), RGB)
    for text in refusals(coloured(tmp_path / "b.ome.tif", {"EmissionWavelength": "461"})):
        assert "a fluorescence picture" in text


def test_sixteen_bits_are_refused_by_the_description_too(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    options: dict[str, Any] = {"ome": True, "tile": (128, 128), "photometric": "rgb"}
    tifffile.imwrite(path, RGB.astype(np.uint16) << 8, metadata={"axes": "YXS"}, **options)
    for text in refusals(path):
        assert "uint16 samples" in text


def test_planes_in_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, RGB, ome=True, tile=(128, 128), photometric="rgb", metadata={"axes": "YXS"})
    text = tifffile.tiffcomment(path)
    start = text.index("<TiffData")
    stop = text.index("/>", start) + 2
    blocks = "".join(
        f'<TiffData IFD="0" FirstZ="{z}" PlaneCount="1"><UUID FileName="z{z}.ome.tif">urn:uuid:{z}</UUID></TiffData>'
        for z in range(3)
    )
    changed = (text[:start] + blocks + text[stop:]).replace('SizeZ="1"', 'SizeZ="3"')
    tifffile.tiffcomment(path, changed.encode())
    for said in refusals(path):
        assert "lie in other files" in said
