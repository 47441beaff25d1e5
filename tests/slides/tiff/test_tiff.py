"""The fast TIFF reader against the arrays that were written, other readers, and files that are not what they seem."""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import openslide
import PIL.Image
import pytest
import simplejpeg
import tifffile
from numpy.typing import NDArray

from wsi_pipe.errors import SlideOpenError, SlideReadError, UnsupportedSlideError
from wsi_pipe.slides.base import Plane, Slide
from wsi_pipe.slides.storage.source import open_source
from wsi_pipe.slides.tiff.ifd import read_directories
from wsi_pipe.slides.tiff.layout import positive
from wsi_pipe.slides.tiff.reader import open_tiff
from wsi_pipe.slides.writing.write import write_pyramid

Picture = NDArray[np.uint8]

MAX_DIFFERENCE, MEAN_DIFFERENCE = 2, 0.5
"""What reading a whole level may differ from OpenSlide, in grey levels."""


@pytest.fixture(scope="module")
def picture() -> Picture:
    """700 x 530 px, smooth enough for JPEG, unlike along both axes."""
    rng = np.random.default_rng(11)
    noise = cv2.GaussianBlur(rng.normal(size=(530, 700, 3)), (0, 0), 2.5)
    return np.clip(180 + 180 * noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def half(picture: Picture) -> Picture:
    return cv2.resize(picture, (350, 265), interpolation=cv2.INTER_AREA).astype(np.uint8)


def plane_picture(slide: Slide, plane: Plane) -> Picture:
    """A whole plane, block by block; fails if a block has another size than the plane says."""
    out = np.zeros((plane.size_px[1], plane.size_px[0], 3), np.uint8)
    cells = [(c, r) for r in range(plane.blocks[1]) for c in range(plane.blocks[0])]
    for (c, r), data in zip(cells, slide.fetch(plane, cells), strict=True):
        view = out[r * plane.block_px[1] :, c * plane.block_px[0] :][: plane.block_px[1], : plane.block_px[0]]
        view[:] = 255 if data is None else slide.decode(plane, (c, r), data)
    return out


def by_openslide(path: Path, level: int) -> Picture:
    with openslide.OpenSlide(path) as slide:
        size = slide.level_dimensions[level]
        image = slide.read_region((0, 0), level, size)
        white = PIL.Image.new("RGB", size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return np.asarray(white)


def difference(a: Picture, b: Picture) -> tuple[int, float]:
    assert a.shape == b.shape
    d = np.abs(a.astype(int) - b)
    return int(d.max()), float(d.mean())


def assert_like_openslide(slide: Slide, path: Path) -> None:
    for level, found in enumerate(slide.pyramid.levels):
        most, mean = difference(slide.read_region(level, 0, 0, *found.size_px), by_openslide(path, level))
        print(f"{path.name} level {level} {found.size_px}: max {most}, mean {mean:.4f}")
        assert most <= MAX_DIFFERENCE
        assert mean <= MEAN_DIFFERENCE


@pytest.mark.parametrize("style", ["aperio", "generic"])
@pytest.mark.parametrize(
    "options",
    [
        {"jpeg_colour": "ycbcr", "subsampling": "420"},
        {"jpeg_colour": "ycbcr", "subsampling": "422", "jpeg_tables": True},
        {"jpeg_colour": "rgb", "subsampling": "444"},
        {"jpeg_colour": "rgb", "subsampling": "444", "jpeg_tables": True, "bigtiff": True},
        {"compression": "deflate"},
        {"compression": "none"},
    ],
    ids=str,
)
def test_levels_are_what_openslide_reads(
    tmp_path: Path, picture: Picture, half: Picture, style: Any, options: dict[str, Any]
) -> None:
    path = tmp_path / "slide.tif"
    # OpenSlide cannot read plain tiles of 240 px that tifffile wrote: the last one is padded.
    tile_px = 240 if style == "aperio" and options.get("compression") != "none" else 128
    write_pyramid(path, [picture, half], mpp=0.25, tile_px=tile_px, style=style, **options)
    with open_tiff(path) as slide:
        assert [level.size_px for level in slide.pyramid.levels] == [(700, 530), (350, 265)]
        assert slide.pyramid.mpp == pytest.approx((0.25, 0.25), rel=1e-4)
        assert_like_openslide(slide, path)


@pytest.mark.parametrize("jpeg_colour", ["ycbcr", "rgb"])
def test_jpeg_2000_levels_are_what_openslide_reads(
    tmp_path: Path, picture: Picture, half: Picture, jpeg_colour: Any
) -> None:
    path = tmp_path / "slide.svs"
    write_pyramid(path, [picture, half], mpp=0.25, compression="jpeg2000", quality=45, jpeg_colour=jpeg_colour)
    with tifffile.TiffFile(path) as file:
        assert int(file.pages[0].compression) == {"ycbcr": 33003, "rgb": 33005}[jpeg_colour]
    with open_tiff(path) as slide:
        assert_like_openslide(slide, path)
        assert difference(slide.read_region(0, 0, 0, 700, 530), picture)[1] < 3


@pytest.mark.parametrize(("byteorder", "bigtiff"), list(itertools.product("<>", (False, True))))
@pytest.mark.parametrize(
    "options",
    [
        {"compression": "lzw", "predictor": True},
        {"compression": "lzw"},
        {"compression": "zlib", "predictor": True},
        {"compression": None},
        {"compression": "zlib", "planarconfig": "separate"},
    ],
    ids=str,
)
def test_lossless_tiles_come_back_exactly(
    tmp_path: Path, picture: Picture, byteorder: Any, bigtiff: bool, options: dict[str, Any]
) -> None:
    path = tmp_path / "slide.tif"
    pixels = np.moveaxis(picture, 2, 0) if options.get("planarconfig") else picture
    with tifffile.TiffWriter(path, byteorder=byteorder, bigtiff=bigtiff) as file:
        file.write(pixels, tile=(128, 160), photometric="rgb", metadata=None, **options)
    with open_tiff(path) as slide:
        assert slide.planes[0].block_px == (160, 128)
        assert np.array_equal(slide.read_region(0, 0, 0, 700, 530), picture)
        # A window that begins off the slide and ends off it.
        window = slide.read_region(0, -10, 500, 720, 60)
        expected = np.full((60, 720, 3), 255, np.uint8)
        expected[:30, 10:710] = picture[500:]
        assert np.array_equal(window, expected)


def test_directories_are_those_that_tifffile_reads(tmp_path: Path, picture: Picture, half: Picture) -> None:
    for byteorder, bigtiff in itertools.product("<>", (False, True)):
        path = tmp_path / "slide.tif"
        with tifffile.TiffWriter(path, byteorder=byteorder, bigtiff=bigtiff) as file:
            options: dict[str, Any] = {"tile": (64, 64), "compression": "zlib", "resolution": (40000, 39000)}
            file.write(picture, description="a note", metadata=None, resolutionunit="CENTIMETER", **options)
            file.write(half, subfiletype=1, metadata=None, **options)
        source = open_source(path)
        found = read_directories(source)
        with tifffile.TiffFile(path) as file:
            assert len(found) == len(file.pages)
            for mine, theirs in zip(found, file.pages, strict=True):
                tags = theirs.tags
                for tag in tags:
                    assert tag.code in mine
                    if tag.dtype in (3, 4, 16):
                        value = tag.value if isinstance(tag.value, tuple) else (tag.value,)
                        assert mine.numbers(tag.code) == tuple(int(v) for v in value), tag.name
                        assert [mine.item(tag.code, i) for i in range(len(value))] == [int(v) for v in value]
                assert mine.rational(282) == pytest.approx(40000)
        assert found[0].text(270) == "a note"
        source.close()


@pytest.mark.parametrize("options", [{"subsampling": "420"}, {"jpeg_colour": "rgb", "subsampling": "444"}], ids=str)
def test_planes_at_every_scale_are_the_means_of_boxes(tmp_path: Path, picture: Picture, options: Any) -> None:
    path = tmp_path / "slide.svs"
    write_pyramid(path, [picture], mpp=0.25, tile_px=240, **options)
    with open_tiff(path) as slide:
        full = slide.read_region(0, 0, 0, 700, 530).astype(np.float64)
        assert [(p.level, p.reduce) for p in slide.planes] == [(0, 1), (0, 2), (0, 4), (0, 8)]
        for plane in slide.planes:
            k = plane.reduce
            assert plane.downsample == (k, k)
            assert plane.size_px == (-(-700 // k), -(-530 // k))
            assert plane.block_px == (240 // k, 240 // k)
            white = np.full((plane.size_px[1] * k, plane.size_px[0] * k, 3), 255.0)
            white[:530, :700] = full
            means = white.reshape(plane.size_px[1], k, plane.size_px[0], k, 3).mean((1, 3))
            found = plane_picture(slide, plane)
            assert np.abs(found - means).mean() <= (0 if k == 1 else 1.5)
            # Edge tiles hold padding that the encoder made up: none of it may leak into what lies on the slide.
            assert np.abs(found[:, 480 // k :] - means[:, 480 // k :]).max() <= 1
            assert np.abs(found[480 // k :] - means[480 // k :]).max() <= 1


def test_planes_of_one_scale_stand_with_the_cheapest_first(tmp_path: Path, picture: Picture, half: Picture) -> None:
    path = tmp_path / "slide.svs"
    write_pyramid(path, [picture, half], mpp=0.25)
    with open_tiff(path) as slide:
        scales = [p.downsample[0] for p in slide.planes]
        assert scales == sorted(scales)
        assert [(p.level, p.reduce) for p in slide.planes if p.downsample[0] == 2] == [(1, 1), (0, 2)]
        assert [(p.level, p.reduce) for p in slide.planes if p.downsample[0] == 4] == [(1, 2), (0, 4)]


def test_missing_tiles_are_none_and_white(tmp_path: Path, picture: Picture, half: Picture) -> None:
    path = tmp_path / "slide.svs"
    write_pyramid(path, [picture, half], mpp=0.25, missing={(0, 1, 1), (1, 0, 0)})
    with open_tiff(path) as slide:
        plane = slide.planes[0]
        data = slide.fetch(plane, [(0, 0), (1, 1), (2, 1)])
        assert [item is None for item in data] == [False, True, False]
        pixels = slide.read_region(0, 0, 0, 700, 530)
        assert (pixels[256:512, 256:512] == 255).all()
        assert difference(pixels[:256], picture[:256])[1] < 4
        assert slide.stats.blocks_missing == 1
        assert slide.stats.blocks_decoded == 8


def box_means(pixels: Picture, k: int) -> Picture:
    h, w = pixels.shape[0] // k, pixels.shape[1] // k
    means = pixels[: h * k, : w * k].astype(float).reshape(h, k, w, k, 3).mean((1, 3))
    return np.rint(means).astype(np.uint8)


@pytest.mark.parametrize(("compression", "allowed"), [("deflate", 0.3), ("jpeg", 6)])
def test_empty_tiles_of_aperio_s_lower_levels_are_filled_from_the_finer_one(
    tmp_path: Path, picture: Picture, compression: Any, allowed: float
) -> None:
    path = tmp_path / "slide.svs"
    full = picture[:528, :696]
    levels = [full, box_means(full, 2), box_means(full, 4)]
    # Level 2's first tile is empty, and so is a quarter of what covers it in level 1; some lie at the right edge.
    missing = {(1, 0, 0), (1, 2, 1), (1, 5, 4), (2, 0, 0), (2, 2, 2)}
    write_pyramid(path, levels, mpp=0.25, tile_px=64, missing=missing, compression=compression, quality=95)
    with open_tiff(path) as slide:
        for level, truth in enumerate(levels):
            mine = slide.read_region(level, 0, 0, truth.shape[1], truth.shape[0])
            assert difference(mine, truth)[1] < allowed
            # OpenSlide scales the finer level by another filter.
            assert difference(mine, by_openslide(path, level))[1] < 1
        assert slide.stats.blocks_missing == 0
        for plane in (plane for plane in slide.planes if plane.level):
            means = box_means(full, int(plane.downsample[0]))[:8, :20]
            assert difference(plane_picture(slide, plane)[: len(means), : means.shape[1]], means)[1] < allowed, plane


def test_what_no_level_of_an_aperio_slide_holds_is_white(tmp_path: Path, picture: Picture) -> None:
    path = tmp_path / "slide.svs"
    full = picture[:512, :640]
    missing = {(0, 0, 0), (0, 4, 2), (0, 5, 2), (0, 4, 3), (0, 5, 3), (1, 0, 0), (1, 2, 1)}
    write_pyramid(path, [full, box_means(full, 2)], mpp=0.25, tile_px=64, missing=missing, quality=95)
    with open_tiff(path) as slide:
        # One of the four tiles above the first, and all four above the other.
        found = slide.read_region(1, 0, 0, 320, 256)
        assert (found[:32, :32] == 255).all()
        assert difference(found[32:64, :64], box_means(full, 2)[32:64, :64])[1] < 3
        assert (found[64:128, 128:192] == 255).all()
        assert slide.fetch(next(p for p in slide.planes if p.level == 1), [(2, 1)]) == [None]
        assert slide.stats.blocks_missing == 1
        assert difference(found, by_openslide(path, 1))[1] < 3


def test_an_aperio_level_with_empty_tiles_that_no_finer_one_fits_is_left_out(tmp_path: Path, picture: Picture) -> None:
    small = cv2.resize(picture, (270, 204), interpolation=cv2.INTER_AREA).astype(np.uint8)
    for name, missing, count in (("a.svs", {(1, 0, 0)}, 1), ("b.svs", set[tuple[int, int, int]](), 2)):
        write_pyramid(tmp_path / name, [picture, small], mpp=0.25, tile_px=64, missing=missing)
        with open_tiff(tmp_path / name) as slide:
            assert len(slide.pyramid.levels) == count
            assert ("270 x 204 px with empty tiles is left out" in slide.info.reader_reason) == (count == 1)


def test_a_whole_number_is_exact_whatever_the_sizes_say(tmp_path: Path, picture: Picture) -> None:
    path = tmp_path / "slide.svs"
    odd = picture[:529, :699]
    write_pyramid(path, [odd, cv2.resize(odd, (349, 264)).astype(np.uint8)], mpp=0.25)
    with open_tiff(path) as slide:
        assert slide.pyramid.levels[1].downsample == (2.0, 2.0)
        assert 699 / 349 != 2.0


@pytest.mark.parametrize(("planar", "compression"), [(False, "jpeg"), (True, "jpeg"), (False, "jpeg2000")])
def test_ome_tiff_with_sub_images(
    tmp_path: Path, picture: Picture, half: Picture, planar: bool, compression: Literal["jpeg", "jpeg2000"]
) -> None:
    path = tmp_path / "slide.ome.tif"
    options: dict[str, Any] = {"jpeg_colour": "rgb", "subsampling": "444"} if planar else {}
    options |= {"compression": compression, "quality": 95 if compression == "jpeg" else 45}
    write_pyramid(path, [picture, half], mpp=(0.25, 0.24), style="ome", planar=planar, **options)
    with open_tiff(path) as slide, tifffile.TiffFile(path) as file:
        assert slide.info.vendor == "ome"
        assert slide.pyramid.mpp == pytest.approx((0.25, 0.24))
        assert slide.info.mpp_source == "ome.PhysicalSize"
        assert ("separate planes" in slide.info.reader_reason) == planar
        assert len(slide.pyramid.levels) == 2
        for level, pixels in enumerate((picture, half)):
            mine = slide.read_region(level, 0, 0, pixels.shape[1], pixels.shape[0])
            assert difference(mine, pixels)[1] < 5
            if not planar:  # tifffile does not decode grey JPEG tiles under an RGB tag
                assert difference(mine, file.series[0].levels[level].asarray()) <= (MAX_DIFFERENCE, MEAN_DIFFERENCE)


def philips_xml(spacings_mm: list[tuple[float, float]]) -> str:
    items = "".join(
        '<DataObject ObjectType="PixelDataRepresentation"><Attribute Name="DICOM_PIXEL_SPACING" Group="0x0028" '
        f'Element="0x0030" PMSVR="IDoubleArray">&quot;{y}&quot; &quot;{x}&quot;</Attribute></DataObject>'
        for x, y in spacings_mm
    )
    y, x = spacings_mm[0][1], spacings_mm[0][0]
    return (
        '<?xml version="1.0" encoding="UTF-8" ?>\n<DataObject ObjectType="DPUfsImport">'
        '<Attribute Name="PIM_DP_SCANNED_IMAGES"><Array>'
        '<DataObject ObjectType="DPScannedImage">'
        '<Attribute Name="PIM_DP_IMAGE_TYPE">MACROIMAGE</Attribute></DataObject>'
        '<DataObject ObjectType="DPScannedImage"><Attribute Name="PIM_DP_IMAGE_TYPE">WSI</Attribute>'
        f'<Attribute Name="DICOM_PIXEL_SPACING">&quot;{y}&quot; &quot;{x}&quot;</Attribute>'
        f'<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE"><Array>{items}</Array></Attribute>'
        "</DataObject></Array></Attribute></DataObject>"
    )


def philips_file(path: Path, picture: Picture, half: Picture, spacings_mm: list[tuple[float, float]]) -> Path:
    """A Philips TIFF: both levels padded to whole tiles, the true size of the lower one only in the XML."""

    def padded(pixels: Picture) -> Picture:
        h, w = (-(-n // 256) * 256 for n in pixels.shape[:2])
        return np.pad(pixels, ((0, h - pixels.shape[0]), (0, w - pixels.shape[1]), (0, 0)))

    options: dict[str, Any] = {"tile": (256, 256), "compression": "jpeg", "photometric": "ycbcr", "metadata": None}
    with tifffile.TiffWriter(path) as file:
        file.write(padded(picture), description=philips_xml(spacings_mm), software="Philips DP v1.0", **options)
        file.write(padded(half), subfiletype=1, **options)
        file.write(picture[:64, :96], description="Macro -offset=(0,0)", compression="jpeg", metadata=None)
    return path


def test_philips_levels_end_where_the_description_says(tmp_path: Path, picture: Picture) -> None:
    # Level 0 is 768 x 768 with its padding; level 2 is a quarter, 192 x 192, stored in a tile of 256.
    quarter = cv2.resize(np.pad(picture, ((0, 238), (0, 68), (0, 0))), (192, 192)).astype(np.uint8)
    spacing = (0.000227, 0.000228)
    path = philips_file(tmp_path / "slide.tiff", picture, quarter, [spacing, (4 * spacing[0], 4 * spacing[1])])
    with open_tiff(path) as slide:
        assert slide.info.vendor == "philips"
        assert [level.size_px for level in slide.pyramid.levels] == [(768, 768), (192, 192)]
        assert slide.pyramid.levels[1].downsample == (4.0, 4.0)
        assert slide.pyramid.mpp == pytest.approx((0.227, 0.228))
        assert slide.info.mpp_source == "philips.DICOM_PIXEL_SPACING"
        with openslide.OpenSlide(path) as theirs:
            assert theirs.properties["openslide.vendor"] == "philips"
            assert theirs.level_dimensions == ((768, 768), (192, 192))
            assert float(theirs.properties["openslide.mpp-x"]) == pytest.approx(0.227)
        assert_like_openslide(slide, path)
        assert slide.associated_images()["macro"].shape == (64, 96, 3)


def test_a_philips_level_that_is_described_larger_than_it_is_stored_is_left_out(
    tmp_path: Path, picture: Picture
) -> None:
    # The description says that the level is half the size of level 0; it is a quarter.
    quarter = cv2.resize(np.pad(picture, ((0, 238), (0, 68), (0, 0))), (192, 192)).astype(np.uint8)
    spacing = (0.00025, 0.00025)
    path = philips_file(tmp_path / "slide.tiff", picture, quarter, [spacing, (2 * spacing[0], 2 * spacing[1])])
    with open_tiff(path) as slide:
        assert len(slide.pyramid.levels) == 1
        assert "256 x 256 px is left out as a level: it states 1/2 of the slide" in slide.info.notes[0]


def test_philips_without_a_spacing_for_each_level_is_declined(tmp_path: Path, picture: Picture, half: Picture) -> None:
    path = philips_file(tmp_path / "slide.tiff", picture, half, [(0.000227, 0.000227)])
    with pytest.raises(UnsupportedSlideError, match="pixel spacings"):
        open_tiff(path)


def test_facts_of_an_aperio_slide(tmp_path: Path, picture: Picture) -> None:
    path = tmp_path / "slide.svs"
    icc = b"a profile of colours" * 20
    images = {"thumbnail": picture[::4, ::4], "label": picture[:48, :64], "macro": picture[100:180, 100:260]}
    write_pyramid(path, [picture], mpp=0.2527, objective_power=40, icc=icc, associated=images)
    with open_tiff(path) as slide:
        info = slide.info
        assert (info.vendor, info.reader, info.mpp_source) == ("aperio", "tiff", "aperio.MPP")
        assert slide.pyramid.mpp == (0.2527, 0.2527)
        assert info.objective_power == 40
        assert info.icc == icc
        assert info.properties["aperio.MPP"] == "0.2527"
        found = slide.associated_images()
        assert set(found) == set(images)
        for name, pixels in images.items():
            assert difference(found[name], pixels)[1] < 6, name
    with open_tiff(path, mpp=0.3) as slide:
        assert slide.pyramid.mpp == (0.3, 0.3)
        assert slide.info.mpp_source == "user"
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="above zero"):
            open_tiff(path, mpp=wrong)


def test_the_fingerprint_follows_the_content_and_not_the_path(tmp_path: Path, picture: Picture) -> None:
    first, second, other = (tmp_path / name for name in ("a.svs", "b.svs", "c.svs"))
    write_pyramid(first, [picture], mpp=0.25)
    second.write_bytes(first.read_bytes())
    os.utime(second, (1, 1))
    write_pyramid(other, [picture[::-1].copy()], mpp=0.25)
    prints = []
    for path in (first, second, other):
        with open_tiff(path) as slide:
            prints.append(slide.info.fingerprint)
    assert prints[0] == prints[1]
    assert prints[0] != prints[2]


@pytest.mark.parametrize(
    ("resolution", "unit", "mpp"),
    [
        ((40000, 40000), "CENTIMETER", 0.25),
        ((101600, 101600), "INCH", 0.25),
        ((72, 72), "INCH", None),
        ((40000, 40000), "NONE", None),
    ],
)
def test_resolution_tags_count_only_where_they_can_be_true(
    tmp_path: Path, picture: Picture, resolution: Any, unit: Any, mpp: float | None
) -> None:
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, picture, tile=(128, 128), resolution=resolution, resolutionunit=unit, metadata=None)
    with open_tiff(path) as slide:
        assert slide.pyramid.mpp == (None if mpp is None else pytest.approx((mpp, mpp)))
        assert (slide.info.mpp_source == "none") == (mpp is None)


def write_plain(path: Path, pixels: Picture, **options: Any) -> None:
    tifffile.imwrite(path, pixels, metadata=None, **{"tile": (128, 128), "photometric": "rgb", **options})


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda p, x: tifffile.imwrite(p, x, rowsperstrip=64), "not tiled"),
        (lambda p, x: tifffile.imwrite(p, x.astype(np.uint16), tile=(128, 128), photometric="rgb"), "8-bit"),
        (lambda p, x: write_plain(p, np.stack([x] * 4), volumetric=True), "volume"),
        (lambda p, x: write_plain(p, x, compression="zstd"), "compression"),
        (lambda p, x: write_plain(p, x, extratags=[(700, 1, 12, b"<iScan x='1'", True)]), "Ventana"),
        (lambda p, x: write_plain(p, x, software="MedScan 1.0"), "Trestle"),
        (lambda p, x: p.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100)), "not a TIFF"),
        (lambda p, x: p.write_bytes(b"II*\0"), "not a TIFF"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_declined_with_the_reason(
    tmp_path: Path, picture: Picture, write: Callable[[Path, Picture], object], reason: str
) -> None:
    path = tmp_path / "slide.tif"
    write(path, picture)
    with pytest.raises(UnsupportedSlideError, match=reason) as caught:
        open_tiff(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [("0.25", 0.25), (" 0,2498 ", 0.2498), ("4e-1", 0.4)]
    + [(text, None) for text in ("", "0", "-1", "1.2.3", "1,000.5", "nan", "1e999", "20x")],
)
def test_numbers_in_descriptions(text: str, value: float | None) -> None:
    assert positive(text) == value


def test_levels_of_another_shape_are_left_out(tmp_path: Path, picture: Picture) -> None:
    path = tmp_path / "slide.tif"
    with tifffile.TiffWriter(path) as file:
        file.write(picture, tile=(128, 128), metadata=None)
        file.write(picture[:200, :300], tile=(128, 128), subfiletype=1, metadata=None)
    with open_tiff(path) as slide:
        assert len(slide.pyramid.levels) == 1
        assert slide.info.notes == (
            "image 1 of 300 x 200 px is left out as a level: it is of another shape than the slide",
        )


def test_a_jpeg_of_another_size_than_its_tile_is_declined(tmp_path: Path, picture: Picture) -> None:
    path = tmp_path / "slide.tif"
    tiles = iter([simplejpeg.encode_jpeg(picture[:64, :64].copy()) for _ in range(4)])
    with tifffile.TiffWriter(path) as file:
        options: dict[str, Any] = {"tile": (128, 128), "photometric": "ycbcr", "compression": "jpeg"}
        file.write(tiles, shape=(256, 256, 3), dtype=np.uint8, metadata=None, **options)
    with pytest.raises(UnsupportedSlideError, match="64 x 64"):
        open_tiff(path)


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    empty = tmp_path / "empty.svs"
    empty.touch()
    for path, match in ((tmp_path / "none.svs", "No such file"), (empty, "empty"), (tmp_path, "file|directory")):
        with pytest.raises(SlideOpenError, match=match):
            open_tiff(path)


def test_a_damaged_tile_names_its_place(tmp_path: Path, picture: Picture) -> None:
    path = tmp_path / "slide.svs"
    write_pyramid(path, [picture], mpp=0.25)
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        offset, length = page.dataoffsets[1], page.databytecounts[1]
    with open(path, "r+b") as handle:
        handle.seek(offset + length // 2)
        handle.write(b"\xff\xd9" + bytes(length // 4))
    with open_tiff(path) as slide:
        with pytest.raises(SlideReadError, match=r"slide\.svs: level 0, tile column 1, row 0") as caught:
            slide.read_region(0, 0, 0, 700, 530)
        assert "copy it again" in str(caught.value)
        assert slide.read_region(0, 0, 256, 256, 256).shape == (256, 256, 3)


def test_a_file_that_shrinks_is_an_error(tmp_path: Path, picture: Picture) -> None:
    path = tmp_path / "slide.svs"
    write_pyramid(path, [picture], mpp=0.25)
    with open_tiff(path) as slide:
        os.truncate(path, path.stat().st_size // 3)
        with pytest.raises(SlideReadError, match=r"slide\.svs"):
            slide.read_region(0, 0, 0, 700, 530)


def test_a_closed_slide_is_an_error(tmp_path: Path, picture: Picture) -> None:
    path = tmp_path / "slide.svs"
    write_pyramid(path, [picture], mpp=0.25)
    slide = open_tiff(path)
    slide.close()
    slide.close()
    with pytest.raises(SlideReadError, match="closed"):
        slide.read_region(0, 0, 0, 10, 10)


@pytest.mark.parametrize("compression", ["jpeg", "jpeg2000"])
def test_many_threads_decode_what_one_does(
    tmp_path: Path, picture: Picture, half: Picture, compression: Literal["jpeg", "jpeg2000"]
) -> None:
    path = tmp_path / "slide.svs"
    write_pyramid(path, [picture, half], mpp=0.25, tile_px=64, compression=compression, quality=45)
    with open_tiff(path) as slide:
        work = [(p, (c, r)) for p in slide.planes for r in range(p.blocks[1]) for c in range(p.blocks[0])]

        def read(plane: Plane, cell: tuple[int, int]) -> Picture:
            return slide.decode(plane, cell, slide.fetch(plane, [cell])[0])

        alone = [read(*item) for item in work]
        with ThreadPoolExecutor(8) as threads:
            together = list(threads.map(lambda item: read(*item), work))
        assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))
        assert slide.stats.blocks_decoded == 2 * len(work)


def test_reading_counts_bytes_requests_and_decodes(tmp_path: Path, picture: Picture) -> None:
    path = tmp_path / "slide.svs"
    write_pyramid(path, [picture], mpp=0.25)
    with open_tiff(path) as slide, tifffile.TiffFile(path) as file:
        plane = slide.planes[0]
        slide.fetch(plane, [(0, 0)])
        before = (slide.stats.bytes_fetched, slide.stats.requests, slide.stats.blocks_decoded)
        data = slide.fetch(plane, [(1, 0), (2, 1)])
        slide.decode(plane, (1, 0), data[0])
        counts = file.pages[0].databytecounts
        assert slide.stats.bytes_fetched - before[0] == counts[1] + counts[5]
        assert slide.stats.requests - before[1] == 2
        assert slide.stats.blocks_decoded - before[2] == 1


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "TCGA-CR-7395-01A-01-TS1.svs", "test3-DAPI-2-387.ndpi"])
def test_real_slides_are_what_openslide_reads(shared_slides: Path, name: str) -> None:
    with open_tiff(shared_slides / name) as slide:
        assert_like_openslide(slide, shared_slides / name)


def test_a_real_ome_tiff_that_openslide_rejects(shared_slides: Path) -> None:
    path = shared_slides / "OS-1-detail.ome.tif"
    with open_tiff(path) as slide:
        assert difference(slide.read_region(0, 0, 0, 1101, 1101), tifffile.imread(path)) <= (2, 0.5)
        assert slide.pyramid.mpp == pytest.approx((0.2271, 0.2271), rel=1e-4)


def test_half_scale_of_a_real_slide_is_near_the_mean_of_boxes(shared_slides: Path) -> None:
    with open_tiff(shared_slides / "CMU-1-Small-Region.svs") as slide:
        full = slide.read_region(0, 0, 0, 2220, 2966).astype(np.float64)
        means = full.reshape(1483, 2, 1110, 2, 3).mean((1, 3))
        plane = next(p for p in slide.planes if p.reduce == 2)
        assert np.abs(plane_picture(slide, plane)[:1483] - means).mean() <= 1.5


def test_a_truncated_file_shows_on_opening(tmp_path: Path, picture: Picture) -> None:
    path = tmp_path / "slide.tif"
    # The directory stands before the tiles, as in a copy that stopped half-way.
    tifffile.imwrite(path, picture, tile=(128, 128), photometric="rgb", metadata=None)
    with tifffile.TiffFile(path) as file:
        assert max(file.pages[0].tags[324].value) > 5000
    os.truncate(path, path.stat().st_size - 1000)
    with pytest.raises(SlideOpenError, match=r"1 of 30 tiles lie outside the file, the first at column 5, row 4"):
        open_tiff(path)


@pytest.mark.parametrize("side", [5000, 65536])
def test_tiles_larger_than_any_scanner_writes_are_declined(tmp_path: Path, picture: Picture, side: int) -> None:
    path = tmp_path / "slide.tif"
    write_plain(path, picture)
    with tifffile.TiffFile(path) as file:
        places = [file.pages[0].tags[tag].offset for tag in (322, 323)]
    with open(path, "r+b") as handle:
        for place in places:
            handle.seek(place + 2)
            handle.write(struct.pack("<HII", 4, 1, side))
    with pytest.raises(UnsupportedSlideError, match=rf"tiles of {side} x {side} px is out of bounds"):
        open_tiff(path)
