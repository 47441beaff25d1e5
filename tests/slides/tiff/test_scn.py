"""Leica SCN files made here: a picture at an offset on the canvas of its collection."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import openslide
import PIL.Image
import pytest
import tifffile
from numpy.typing import NDArray

from wsi_pipe.config import JobSettings, SegmentSettings, TileSettings
from wsi_pipe.errors import NotAPictureError, UnsupportedSlideError
from wsi_pipe.job import open_job
from wsi_pipe.job.run import process
from wsi_pipe.manifest import SlideEntry
from wsi_pipe.overview import read_overview
from wsi_pipe.slides import open_slide
from wsi_pipe.slides.array import ArraySlide
from wsi_pipe.slides.tiff.image import TiffImage
from wsi_pipe.slides.tiff.reader import open_tiff
from wsi_pipe.slides.tiff.scn import SCN_NAMESPACE
from wsi_pipe.tiles import read_tiles

Picture = NDArray[np.uint8]

NM_PER_PX = 250
CANVAS_PX = (900, 1000)


@pytest.fixture(scope="module")
def picture() -> Picture:
    rng = np.random.default_rng(4)
    noise = cv2.GaussianBlur(rng.normal(size=(400, 500, 3)), (0, 0), 2.5)
    return np.clip(180 + 180 * noise, 0, 255).astype(np.uint8)


def image_xml(size_px: tuple[int, int], offset_nm: tuple[int, int], dimensions: list[Any], light: str) -> str:
    inner = "".join(
        f'<dimension sizeX="{w}" sizeY="{h}" r="{i}" ifd="{ifd}"/>' for i, (ifd, w, h) in enumerate(dimensions)
    )
    return (
        f'<image><creationDate>x</creationDate><device model="SCN400" version="1"/><pixels>{inner}</pixels>'
        f'<view sizeX="{size_px[0] * NM_PER_PX}" sizeY="{size_px[1] * NM_PER_PX}" offsetX="{offset_nm[0]}" '
        f'offsetY="{offset_nm[1]}" spacingZ="0"/><scanSettings><objectiveSettings><objective>40</objective>'
        "</objectiveSettings><illuminationSettings><numericalAperture>0.65</numericalAperture>"
        f"<illuminationSource>{light}</illuminationSource></illuminationSettings></scanSettings></image>"
    )


def build(
    path: Path, picture: Picture, offset_nm: tuple[int, int], *, mains: int = 1, light: str = "brightfield"
) -> Path:
    quarter = cv2.resize(picture, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA).astype(np.uint8)
    main = image_xml((500, 400), offset_nm, [(1, 500, 400), (2, 125, 100)], light)
    macro = image_xml(CANVAS_PX, (0, 0), [(0, 90, 100)], "brightfield")
    xml = (
        f'<?xml version="1.0"?><scn xmlns="{SCN_NAMESPACE}"><collection sizeX="{CANVAS_PX[0] * NM_PER_PX}" '
        f'sizeY="{CANVAS_PX[1] * NM_PER_PX}"><barcode>x</barcode>{macro}{main * mains}</collection></scn>'
    )
    options: dict[str, Any] = {"tile": (128, 128), "photometric": "rgb", "compression": "zlib", "metadata": None}
    options["resolutionunit"] = "CENTIMETER"
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        file.write(picture[:100, :90], description=xml, resolution=(4000, 4000), **options)
        file.write(picture, resolution=(40000, 40000), **options)
        file.write(quarter, resolution=(10000, 10000), **options)
    return path


@pytest.mark.parametrize("offset_px", [(0, 0), (128, 256), (37, 51), (401, 602)])
def test_the_picture_lies_where_openslide_puts_it(tmp_path: Path, picture: Picture, offset_px: tuple[int, int]) -> None:
    offset_px = (min(offset_px[0], 400), min(offset_px[1], 600))
    # A little over the whole pixel, as scanners' offsets are.
    path = build(tmp_path / "slide.scn", picture, (offset_px[0] * NM_PER_PX + 90, offset_px[1] * NM_PER_PX + 90))
    with open_tiff(path) as slide, openslide.OpenSlide(path) as theirs:
        assert slide.info.vendor == "leica"
        assert tuple(level.size_px for level in slide.pyramid.levels) == theirs.level_dimensions
        assert slide.pyramid.mpp == pytest.approx((0.25, 0.25))
        assert slide.info.objective_power == 40
        assert slide.info.bounds_l0 == (*offset_px, 500, 400)
        # What QuPath crops to, and counts from.
        assert slide.info.bounds_l0 == tuple(
            int(theirs.properties[f"openslide.bounds-{side}"]) for side in ("x", "y", "width", "height")
        )
        x, y = offset_px
        expected = np.full((1000, 900, 3), 255, np.uint8)
        expected[y : y + 400, x : x + 500] = picture
        assert np.array_equal(slide.read_region(0, 0, 0, 900, 1000), expected)
        for level, size in enumerate(theirs.level_dimensions):
            image = theirs.read_region((0, 0), level, size)
            white = PIL.Image.new("RGB", size, (255, 255, 255))
            white.paste(image, mask=image.getchannel("A"))
            assert np.array_equal(slide.read_region(level, 0, 0, *size), np.asarray(white))
        assert slide.associated_images()["macro"].shape == (100, 90, 3)


@pytest.mark.parametrize("mpp", [0.25, 0.5, 1.0, 0.3, 1.1])
@pytest.mark.parametrize("offset_px", [(128, 256), (37, 51), (300, 334)])
def test_each_native_tile_is_decoded_once(
    tmp_path: Path, picture: Picture, offset_px: tuple[int, int], mpp: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles cut at any scale are those of the same picture in memory, and no native tile is decoded twice for them."""
    path = build(tmp_path / "slide.scn", picture, (offset_px[0] * NM_PER_PX + 90, offset_px[1] * NM_PER_PX + 90))
    decoded: Counter[tuple[int, tuple[int, int]]] = Counter()
    decode = TiffImage.decode

    def counting(image: TiffImage, cell: tuple[int, int], data: Any, reduce: int) -> Picture:
        decoded[image.size_px[0], cell] += 1
        return decode(image, cell, data, reduce)

    with open_tiff(path) as slide:
        monkeypatch.setattr(TiffImage, "decode", counting)
        levels = [slide.read_region(n, 0, 0, *level.size_px) for n, level in enumerate(slide.pyramid.levels)]
        assert decoded
        assert set(decoded.values()) == {1}
        plain = ArraySlide(levels, mpp=0.25, block_px=(128, 128))
        decoded.clear()
        ours = read_overview(slide, 4.0).rgb
        assert decoded
        assert set(decoded.values()) == {1}
        assert np.abs(ours.astype(int) - read_overview(plain, 4.0).rgb).max() <= 1
        # The whole canvas, and a rim around it.
        size_l0 = 100 * mpp / 0.25
        steps = [np.arange(-1, int(side / size_l0) + 2) for side in CANVAS_PX]
        corners = np.stack(np.meshgrid(*steps), axis=-1).reshape(-1, 2) * size_l0
        decoded.clear()
        found = read_tiles(slide, corners, size_l0, 100)
        assert set(decoded.values()) == {1}
        assert len(decoded) == (16 if mpp < 1 else 1)  # level 0 has 4 x 4 tiles, level 1 has one
        # Boxes may be averaged before or after patches are put together: rounding differs by one.
        assert np.abs(found.astype(int) - read_tiles(plain, corners, size_l0, 100)).max() <= 1


@pytest.mark.parametrize("scene", [0, 1])
def test_of_several_scans_each_has_the_bounds_of_all(tmp_path: Path, picture: Picture, scene: int) -> None:
    """OpenSlide shows all scans of a file on one canvas and QuPath crops to them together, whichever is read here."""
    small = picture[:200, :300]
    offsets = [(37 * NM_PER_PX + 90, 601 * NM_PER_PX + 10), (500 * NM_PER_PX, 251 * NM_PER_PX + 90)]
    mains = "".join(
        image_xml((300, 200), offset, [(n + 1, 300, 200)], "brightfield") for n, offset in enumerate(offsets)
    )
    macro = image_xml(CANVAS_PX, (0, 0), [(0, 90, 100)], "brightfield")
    xml = (
        f'<?xml version="1.0"?><scn xmlns="{SCN_NAMESPACE}"><collection sizeX="{CANVAS_PX[0] * NM_PER_PX}" '
        f'sizeY="{CANVAS_PX[1] * NM_PER_PX}"><barcode>x</barcode>{macro}{mains}</collection></scn>'
    )
    options: dict[str, Any] = {"tile": (128, 128), "photometric": "rgb", "compression": "zlib", "metadata": None}
    with tifffile.TiffWriter(tmp_path / "slide.scn", bigtiff=True) as file:
        for page, text in ((picture[:100, :90], xml), (small, None), (small, None)):
            file.write(page, description=text, resolution=(40000, 40000), resolutionunit="CENTIMETER", **options)
    with open_tiff(tmp_path / "slide.scn", scene=scene) as slide, openslide.OpenSlide(tmp_path / "slide.scn") as theirs:
        theirs_l0 = [int(theirs.properties[f"openslide.bounds-{side}"]) for side in ("x", "y", "width", "height")]
        assert slide.info.bounds_l0 is not None
        assert slide.info.bounds_l0[:2] == tuple(theirs_l0[:2]) == (37, 251)
        assert np.abs(np.subtract(slide.info.bounds_l0, theirs_l0)).max() <= 1


def test_the_mask_of_a_cropped_slide_is_written_as_qupath_counts(tmp_path: Path) -> None:
    """One piece of tissue, whose place in the scan is known; QuPath shows the scan alone."""
    picture = np.full((400, 500, 3), 240, np.uint8)
    # With grain: a smooth patch with straight edges is a field of tinted glass.
    grain = np.random.default_rng(0).integers(-25, 26, (200, 250, 1))
    picture[100:300, 150:400] = np.clip(np.array([200, 120, 180]) + grain, 0, 255)
    path = build(tmp_path / "slide.scn", picture, (300 * NM_PER_PX, 500 * NM_PER_PX))
    # Tiles that fit: a mask in which none does is of an empty slide.
    tile = TileSettings(resolutions=(0.5,), tile_px=64)
    settings = JobSettings(segment=SegmentSettings(mpp=2.0, min_area_um2=100.0), tile=tile)
    entry = SlideEntry("s", str(path), "s")
    paths = open_job(tmp_path / "job", settings, [entry])
    (outcome,) = process([entry], settings, paths, until="segment")
    assert outcome.status == "done"
    stored = json.loads(paths.tissue("s").read_text())
    (feature,) = stored["features"]
    ring = np.array(feature["geometry"]["coordinates"][0])
    assert np.abs(np.concatenate([ring.min(0), ring.max(0)]) - [150, 100, 400, 300]).max() <= 16
    assert stored["wsi_pipe"]["origin_l0"] == [300, 500]
    # Back through QuPath, which drops what it does not know.
    (tmp_path / "edited.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    again = dataclasses.replace(entry, mask=str(tmp_path / "edited.geojson"))
    anew = dataclasses.replace(settings, redo=True)
    (outcome,) = process([again], anew, paths, until="segment")
    assert "corner of the scan's bounds at (300, 500)" in outcome.notes[0]
    assert json.loads(paths.tissue("s").read_text())["features"] == stored["features"]


def test_blocks_beside_the_picture_are_missing(tmp_path: Path, picture: Picture) -> None:
    path = build(tmp_path / "slide.scn", picture, (300 * NM_PER_PX, 300 * NM_PER_PX))
    with open_tiff(path) as slide:
        assert slide.planes[0].origin_px == (-84, -84)
        data = slide.fetch(slide.planes[0], [(0, 0), (3, 3), (7, 7)])
        assert [d is None for d in data] == [True, False, True]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"mains": 2}, "2 brightfield main images"), ({"light": "fluorescence"}, "0 brightfield main images")],
)
def test_other_collections_are_declined(tmp_path: Path, picture: Picture, changes: Any, reason: str) -> None:
    path = build(tmp_path / "slide.scn", picture, (1000, 1000), **changes)
    with pytest.raises(UnsupportedSlideError, match=reason):
        open_tiff(path)


def test_a_picture_that_leaves_the_canvas_is_declined(tmp_path: Path, picture: Picture) -> None:
    path = build(tmp_path / "slide.scn", picture, (700 * NM_PER_PX, 0))
    with pytest.raises(UnsupportedSlideError, match="within the collection"):
        open_tiff(path)


def test_scans_are_chosen_and_other_light_is_said(tmp_path: Path, picture: Picture) -> None:
    first = image_xml((500, 400), (0, 25000), [(1, 500, 400)], "brightfield")
    second = image_xml((500, 400), (25000, 125000), [(2, 500, 400)], "brightfield")
    dark = image_xml((500, 400), (75000, 25000), [(3, 500, 400)], "fluorescence")
    path = tmp_path / "slide.scn"
    collection(path, [picture, picture[::-1], 255 - picture], first + second + dark)
    with pytest.raises(NotAPictureError, match=r"holds 2 brightfield main images.*choose one with --scene 0 to 1"):
        open_slide(path)
    for scene, right, corner in ((0, picture, (0, 100)), (1, picture[::-1], (100, 500))):
        with closing(open_slide(path, scene=scene)) as slide:
            # QuPath crops to all scans of the file, whichever is read.
            assert slide.info.bounds_l0 == (0, 100, 600, 800)
            assert np.array_equal(slide.read_region(0, *corner, 500, 400), right)
            assert slide.info.notes == ("a picture of 500 x 400 px is left out: it is taken by fluorescence",)


def test_focal_planes(tmp_path: Path, picture: Picture) -> None:
    main = image_xml((500, 400), (0, 25000), [(1, 500, 400), (2, 500, 400), (3, 500, 400)], "brightfield")
    for z in range(3):
        main = main.replace(f'r="{z}" ifd="{z + 1}"', f'r="0" z="{z}" ifd="{z + 1}"')
    path = tmp_path / "slide.scn"
    collection(path, [255 - picture, picture, picture[::-1]], main)
    with closing(open_slide(path)) as slide:
        assert np.array_equal(slide.read_region(0, 0, 100, 500, 400), picture)
        assert slide.info.notes[0].startswith("focal plane 1 of 3")
    with closing(open_slide(path, z=2)) as slide:
        assert np.array_equal(slide.read_region(0, 0, 100, 500, 400), picture[::-1])


def collection(path: Path, pages: list[Picture], images: str) -> None:
    macro = image_xml(CANVAS_PX, (0, 0), [(0, 90, 100)], "brightfield")
    xml = (
        f'<?xml version="1.0"?><scn xmlns="{SCN_NAMESPACE}"><collection sizeX="{CANVAS_PX[0] * NM_PER_PX}" '
        f'sizeY="{CANVAS_PX[1] * NM_PER_PX}"><barcode>x</barcode>{macro}{images}</collection></scn>'
    )
    options: dict[str, Any] = {"tile": (128, 128), "photometric": "rgb", "compression": "zlib", "metadata": None}
    options |= {"resolutionunit": "CENTIMETER", "resolution": (40000, 40000)}
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        file.write(pages[0][:100, :90], description=xml, **options)
        for page in pages:
            file.write(np.ascontiguousarray(page), **options)
