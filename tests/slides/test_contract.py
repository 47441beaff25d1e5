"""One contract for all readers: what a Slide promises, on files of every kind with known pixels and on real slides."""

from __future__ import annotations

import functools
import itertools
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray

from tests.slides.czi.build import Tile, write_czi
from tests.slides.dicom.test_dicom import tiles_of
from tests.slides.dicom.test_dicom import write_level as write_dicom_level
from tests.slides.storage.test_source import Server
from tests.slides.tiff.test_ndpi import build as build_ndpi
from tests.slides.tiff.test_tiff import philips_file
from tests.slides.zarr.test_zarr import store as write_zarr
from wsi_pipe.errors import SlideReadError
from wsi_pipe.slides import open_slide
from wsi_pipe.slides.array import ArraySlide
from wsi_pipe.slides.base import Plane, RGBArray, Slide
from wsi_pipe.slides.writing.write import write_pyramid

SIZE_PX = (1001, 700)
LEVEL_1_PX = (500, 350)
MPP = 0.2527


@functools.cache
def picture() -> RGBArray:
    """Structure at several scales and in all channels, different everywhere, without edges that JPEG would ring at."""
    rng = np.random.default_rng(7)
    layers = [
        cv2.GaussianBlur(rng.normal(0, 1, (SIZE_PX[1], SIZE_PX[0], 3)).astype(np.float32), (0, 0), sigma) * sigma * 28
        for sigma in (4, 16)
    ]
    ramp = np.linspace(-40, 40, SIZE_PX[0], dtype=np.float32)[None, :, None]
    rgb = np.empty((SIZE_PX[1], SIZE_PX[0], 3), np.uint8)
    rgb[:] = np.clip(140 + layers[0] + layers[1] + ramp, 0, 255)
    rgb.setflags(write=False)
    return rgb


@functools.cache
def half_picture() -> RGBArray:
    return half(picture())


def half(rgb: RGBArray) -> RGBArray:
    """Means of 2 x 2 boxes; an odd last column or row is left out."""
    height, width = rgb.shape[0] // 2, rgb.shape[1] // 2
    boxes = rgb[: 2 * height, : 2 * width].astype(np.uint32).reshape(height, 2, width, 2, 3)
    return np.asarray((boxes.sum(axis=(1, 3)) + 2) // 4, np.uint8)


@dataclass(frozen=True)
class Case:
    """A slide to test. truth: its levels, None where it is a real slide. worst, mean: allowed difference from truth."""

    open: Callable[[], Slide]
    truth: tuple[RGBArray, ...] | None = None
    worst: int = 0
    mean: float = 0.0
    path: Path | None = None


def pyramid_file(reader: str, worst: int, mean: float, **options: Any) -> Callable[[Path], Case]:
    def build(folder: Path) -> Case:
        path = folder / "slide.svs"
        truth = (picture(), half_picture())
        write_pyramid(path, truth, mpp=MPP, **options)
        return Case(lambda: open_slide(path, reader=reader), truth, worst, mean, path)

    return build


def image_file(name: str, save: Callable[[Path, RGBArray], object], worst: int, mean: float) -> Callable[[Path], Case]:
    def build(folder: Path) -> Case:
        path = folder / name
        save(path, picture())
        return Case(lambda: open_slide(path, reader="image", mpp=MPP), (picture(),), worst, mean, path)

    return build


def array_case(folder: Path) -> Case:
    truth = (picture(), half_picture())
    return Case(lambda: ArraySlide(truth, mpp=MPP, block_px=(256, 192)), truth)


def ndpi_case(folder: Path) -> Case:
    # 126 blocks of 8 px a row, two restart intervals.
    per_cm = (282, (5, [(round(1e8 / MPP), 10000)])), (283, (5, [(round(1e8 / MPP), 10000)]))
    path = build_ndpi(folder / "slide.ndpi", picture(), 63, tags=dict(per_cm))
    return Case(lambda: open_slide(path, reader="tiff"), (picture(), half_picture()), 32, 3.0, path)


def dicom_case(folder: Path) -> Case:
    for name, pixels, factor in (("a.dcm", picture(), 1), ("b.dcm", half_picture(), 2)):
        # Whole chroma: halved, it would differ from box means by more than the luma that this is about.
        frames = [simplejpeg.encode_jpeg(tile, 95, colorsubsampling="444") for tile in tiles_of(pixels, 128)]
        spacing = factor * MPP / 1000
        write_dicom_level(folder / name, pixels, frames=frames, mm_per_px=(spacing, spacing))
    return Case(lambda: open_slide(folder, reader="tiff"), (picture(), half_picture()), 32, 3.0, folder)


def philips_case(folder: Path) -> Case:
    # Its level 0 counts the padding up to whole tiles, so the picture is not all of it.
    spacing = MPP / 1000
    spacings = [(spacing, spacing), (2 * spacing, 2 * spacing)]
    path = philips_file(folder / "slide.tiff", picture(), half_picture(), spacings)
    return Case(lambda: open_slide(path, reader="tiff"), path=path)


def zarr_case(**options: Any) -> Callable[[Path], Case]:
    def build(folder: Path) -> Case:
        path = write_zarr(folder / "slide.ome.zarr", [picture(), half_picture()], mpp=MPP, **options)
        return Case(lambda: open_slide(path), (picture(), half_picture()), path=path)

    return build


def czi_case(compression: str, worst: int, mean: float, step: int = 128) -> Callable[[Path], Case]:
    def build(folder: Path) -> Case:
        tiles = []
        for rgb, factor in ((picture(), 1), (half_picture(), 2)):
            for y in range(0, rgb.shape[0], step):
                for x in range(0, rgb.shape[1], step):
                    part = rgb[y : y + 128, x : x + 128]
                    size = (part.shape[1] * factor, part.shape[0] * factor)
                    at = (40 + x * factor, y * factor - 30)
                    tiles.append(Tile(part, at, size, compression, 2 * (factor - 1), {"M": len(tiles)}))
        path = write_czi(folder / "slide.czi", tiles, um=(MPP, MPP))
        return Case(lambda: open_slide(path), (picture(), half_picture()), worst, mean, path)

    return build


def http_case(folder: Path) -> Case:
    local = pyramid_file("tiff", 12, 1.5, jpeg_colour="rgb")(folder)
    assert local.path is not None
    server = Server()
    server.files["slide.svs"] = local.path.read_bytes()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return Case(lambda: open_slide(server.url("slide.svs"), reader="tiff"), local.truth, 12, 1.5)


def save_cv2(path: Path, rgb: RGBArray) -> None:
    assert cv2.imwrite(str(path), cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_WEBP_QUALITY, 101])


def save_jpeg(path: Path, rgb: RGBArray) -> None:
    assert cv2.imwrite(str(path), cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 95])


def save_jp2(path: Path, rgb: RGBArray) -> None:
    import imagecodecs

    path.write_bytes(imagecodecs.jpeg2k_encode(rgb, level=0, reversible=True, codecformat="jp2"))


def save_tiff(**options: Any) -> Callable[[Path, RGBArray], None]:
    def save(path: Path, rgb: RGBArray) -> None:
        import tifffile

        planar = options.get("planarconfig") == "separate"
        tifffile.imwrite(path, np.moveaxis(rgb, 2, 0) if planar else rgb, photometric="rgb", metadata=None, **options)

    return save


WRITTEN: dict[str, Callable[[Path], Case]] = {
    "array": array_case,
    "tiff: SVS, JPEG as YCbCr": pyramid_file("tiff", 32, 3.0, subsampling="420"),
    "tiff: SVS, JPEG as RGB": pyramid_file("tiff", 12, 1.5, jpeg_colour="rgb"),
    "tiff: SVS, JPEG tables apart": pyramid_file("tiff", 12, 1.5, jpeg_colour="rgb", jpeg_tables=True),
    "tiff: SVS, JPEG 2000 33003": pyramid_file("tiff", 3, 1.0, compression="jpeg2000", quality=0),
    "tiff: SVS, JPEG 2000 33005": pyramid_file("tiff", 0, 0, compression="jpeg2000", quality=0, jpeg_colour="rgb"),
    "tiff: generic, deflate": pyramid_file("tiff", 0, 0, compression="deflate", style="generic"),
    "tiff: generic, raw, BigTIFF": pyramid_file("tiff", 0, 0, compression="none", style="generic", bigtiff=True),
    "tiff: OME, JPEG in planes": pyramid_file("tiff", 12, 1.5, style="ome", planar=True),
    "tiff: NDPI": ndpi_case,
    "tiff: DICOM": dicom_case,
    "tiff: Philips": philips_case,
    "tiff: SVS behind a URL": http_case,
    "zarr: version 2": zarr_case(version=2, chunk=200),
    "zarr: version 3, shards": zarr_case(chunk=128, shard=2, axes="yxc"),
    "czi: Zstandard": czi_case("zstd1", 0, 0),
    "czi: JPEG XR, tiles that overlap": czi_case("jpegxr", 0, 0, step=110),
    "czi: JPEG": czi_case("jpeg", 32, 3.0),
    "openslide: SVS, JPEG as RGB": pyramid_file("openslide", 12, 1.5, jpeg_colour="rgb"),
    "openslide: SVS, JPEG 2000": pyramid_file("openslide", 0, 0, compression="jpeg2000", quality=0, jpeg_colour="rgb"),
    "openslide: generic, deflate": pyramid_file("openslide", 0, 0, compression="deflate", style="generic"),
    "image: OME, JPEG in planes": pyramid_file("image", 12, 1.5, style="ome", planar=True),
    "image: PNG": image_file("a.png", save_cv2, 0, 0),
    "image: WebP": image_file("a.webp", save_cv2, 0, 0),
    "image: JPEG": image_file("a.jpg", save_jpeg, 16, 1.5),
    "image: JPEG 2000": image_file("a.jp2", save_jp2, 0, 0),
    "image: TIFF, one raw strip": image_file("a.tif", save_tiff(rowsperstrip=SIZE_PX[1]), 0, 0),
    "image: TIFF, LZW strips": image_file("b.tif", save_tiff(rowsperstrip=7, compression="lzw", predictor=True), 0, 0),
    "image: TIFF, planes": image_file(
        "c.tif", save_tiff(rowsperstrip=64, compression="zlib", planarconfig="separate"), 0, 0
    ),
    "image: TIFF, Zstandard tiles": image_file("d.tif", save_tiff(tile=(128, 256), compression="zstd"), 0, 0),
}
REAL = {
    f"{reader}: {name}": (reader, name)
    for name, readers in {
        "CMU-1-Small-Region.svs": ("tiff", "openslide", "image"),
        "CMU-1-Small-Region-dicom": ("tiff", "openslide"),
        "TCGA-CR-7395-01A-01-TS1.svs": ("tiff", "openslide"),
        "test3-DAPI-2-387.ndpi": ("tiff", "openslide"),
        "OS-1-detail.ome.tif": ("tiff", "image"),
    }.items()
    for reader in readers
}


@pytest.fixture(scope="module", params=[*WRITTEN, *REAL])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    if request.param in WRITTEN:
        return WRITTEN[request.param](tmp_path_factory.mktemp("contract"))
    reader, name = REAL[request.param]
    folder: Path = request.getfixturevalue("shared_slides")
    return Case(lambda: open_slide(folder / name, reader=reader), path=folder / name)


@pytest.fixture
def slide(case: Case) -> Iterator[Slide]:
    opened = case.open()
    yield opened
    opened.close()


MANY_BLOCKS = 12
"""Of a plane with more blocks than this, those in its corners and a few others are tested."""


def blocks_of(slide: Slide, plane: Plane) -> Iterator[tuple[int, int, RGBArray]]:
    """(x, y, pixels) of blocks, all of them or a sample, each of the size that it must have."""
    columns, rows = plane.blocks
    cells = list(itertools.product(range(columns), range(rows)))
    if len(cells) > MANY_BLOCKS:
        corners = {(0, 0), (columns - 1, 0), (0, rows - 1), (columns - 1, rows - 1)}
        cells = sorted(corners | set(cells[len(cells) // 5 :: max(1, len(cells) // 5)]))
    for cell, data in zip(cells, slide.fetch(plane, cells), strict=True):
        assert data is not None
        block = slide.decode(plane, cell, data)
        x, y = cell[0] * plane.block_px[0], cell[1] * plane.block_px[1]
        expected = (min(plane.block_px[1], plane.size_px[1] - y), min(plane.block_px[0], plane.size_px[0] - x), 3)
        assert block.shape == expected
        assert block.dtype == np.uint8
        yield x, y, block


def assert_close(found: NDArray[np.uint8], truth: NDArray[np.uint8], worst: int, mean: float) -> None:
    assert found.shape == truth.shape
    difference = np.abs(found.astype(np.int16) - truth)
    assert difference.max() <= worst
    assert difference.mean() <= mean


def test_it_is_a_slide_that_says_what_it_is(slide: Slide) -> None:
    assert isinstance(slide, Slide)
    info = slide.info
    assert info.vendor
    assert info.reader in ("array", "tiff", "openslide", "image", "zarr", "czi")
    assert info.reader_reason
    assert "\n" not in info.reader_reason
    assert re.fullmatch("[0-9a-f]{64}", info.fingerprint)
    assert (info.mpp_source == "none") == (slide.pyramid.mpp is None)


def test_pixels_are_those_of_the_picture(slide: Slide, case: Case) -> None:
    if case.truth is None:
        pytest.skip("a real slide has no truth but its readers; test_readers_agree compares those")
    assert [level.size_px for level in slide.pyramid.levels] == [SIZE_PX, LEVEL_1_PX][: len(case.truth)]
    assert slide.pyramid.mpp == pytest.approx((MPP, MPP), rel=1e-6)
    for level, truth in enumerate(case.truth):
        found = slide.read_region(level, 0, 0, truth.shape[1], truth.shape[0])
        assert found.dtype == np.uint8
        assert_close(found, truth, case.worst, case.mean)


def test_a_region_is_the_part_of_the_whole(slide: Slide) -> None:
    x0, y0 = (max(side - 900, 0) for side in slide.pyramid.size_l0)
    whole = slide.read_region(0, x0, y0, 900, 700)
    for x, y, w, h in [(0, 0, 1, 1), (899, 699, 1, 1), (253, 255, 300, 290), (511, 17, 3, 400)]:
        assert np.array_equal(slide.read_region(0, x0 + x, y0 + y, w, h), whole[y : y + h, x : x + w])


def test_off_the_slide_is_white(slide: Slide) -> None:
    for level, size in enumerate(found.size_px for found in slide.pyramid.levels):
        w, h = min(size[0], 200), min(size[1], 200)
        inside = slide.read_region(level, 0, 0, w, h)
        around = slide.read_region(level, -7, -5, w + 7, h + 5)
        assert around.shape == (h + 5, w + 7, 3)
        assert np.array_equal(around[5:, 7:], inside)
        assert (around[:5] == 255).all()
        assert (around[:, :7] == 255).all()
        last = slide.read_region(level, size[0] - w, size[1] - h, w + 13, h + 25)
        assert last.shape == (h + 25, w + 13, 3)
        assert np.array_equal(last[:h, :w], slide.read_region(level, size[0] - w, size[1] - h, w, h))
        assert (last[h:] == 255).all()
        assert (last[:, w:] == 255).all()
        assert (slide.read_region(level, size[0] + 5, 0, 16, 8) == 255).all()
        assert (slide.read_region(level, -40, -40, 16, 8) == 255).all()


def test_a_level_or_size_that_does_not_exist_is_an_error(slide: Slide) -> None:
    for level in (-1, len(slide.pyramid.levels)):
        with pytest.raises(ValueError, match=f"level {level} does not exist"):
            slide.read_region(level, 0, 0, 10, 10)
    for width, height in ((0, 10), (10, 0), (-3, 10)):
        with pytest.raises(ValueError, match="at least 1"):
            slide.read_region(0, 0, 0, width, height)


def test_planes_cover_their_level_and_agree_with_regions(slide: Slide) -> None:
    for plane in slide.planes:
        level = slide.pyramid.levels[plane.level]
        assert plane.size_px == tuple(-(-side // plane.reduce) for side in level.size_px)
        assert plane.downsample == tuple(d * plane.reduce for d in level.downsample)
        reduce = plane.reduce
        differences = []
        for x, y, block in blocks_of(slide, plane):
            height, width = block.shape[:2]
            if reduce == 1:
                region = slide.read_region(plane.level, x, y, width, height)
                assert np.abs(block.astype(np.int16) - region).max() <= offset_tolerance(slide, plane)
                continue
            # An edge block may hang over the level by a part of a box; whole boxes are compared.
            width = min(width, level.size_px[0] // reduce - x)
            height = min(height, level.size_px[1] // reduce - y)
            if width < 1 or height < 1:
                continue
            full = slide.read_region(plane.level, x * reduce, y * reduce, width * reduce, height * reduce)
            boxes = cv2.resize(full, (width, height), interpolation=cv2.INTER_AREA)
            differences.append(np.abs(block[:height, :width].astype(np.int16) - boxes).ravel())
        if differences:
            # Wavelets keep more of the finest detail than boxes do; half a pixel of shift would come to 10 and more.
            assert np.concatenate(differences).mean() <= (4.5 if "2000" in slide.info.reader_reason else 1.5)


def offset_tolerance(slide: Slide, plane: Plane) -> int:
    """Grey levels by which blocks of a plane may differ from one read of the whole level.

    OpenSlide interpolates where a level pixel lies between two pixels of level 0; see its module.
    """
    sizes = zip(slide.pyramid.size_l0, plane.size_px, strict=True)
    between = slide.info.reader == "openslide" and any(full % size for full, size in sizes)
    return 12 if between and slide.info.vendor == "dicom" else 0


def test_planes_come_finest_first_and_hold_level_0(slide: Slide) -> None:
    areas = [plane.downsample[0] * plane.downsample[1] for plane in slide.planes]
    assert areas == sorted(areas)
    assert (slide.planes[0].level, slide.planes[0].reduce, slide.planes[0].downsample) == (0, 1, (1.0, 1.0))
    assert len({(plane.level, plane.reduce) for plane in slide.planes}) == len(slide.planes)


def test_a_level_that_is_a_whole_fraction_has_that_downsample(slide: Slide) -> None:
    width, height = slide.pyramid.size_l0
    for level in slide.pyramid.levels:
        x, y = level.downsample
        if max(level.size_px) > 64:
            # Every pyramid here is made by halving.
            assert x == y == 2 ** round(np.log2(x))
        assert abs(x - width / level.size_px[0]) <= x / level.size_px[0]
        assert abs(y - height / level.size_px[1]) <= y / level.size_px[1]


def test_eight_threads_read_what_one_does(slide: Slide, case: Case) -> None:
    rng = np.random.default_rng(3)
    regions = []
    for _ in range(24):
        level = int(rng.integers(len(slide.pyramid.levels)))
        width, height = slide.pyramid.levels[level].size_px
        x, y = int(rng.integers(-20, width)), int(rng.integers(-20, height))
        regions.append((level, x, y, int(rng.integers(1, 200)), int(rng.integers(1, 200))))
    expected = [slide.read_region(*region) for region in regions]
    fresh = case.open()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda region: fresh.read_region(*region), regions))
    fresh.close()
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one, other)


def test_what_is_read_is_counted(slide: Slide) -> None:
    plane = slide.planes[0]
    assert slide.stats.blocks_decoded == 0
    cells = [(0, 0), (plane.blocks[0] - 1, plane.blocks[1] - 1)]
    for cell, data in zip(cells, slide.fetch(plane, cells), strict=True):
        slide.decode(plane, cell, data)
    assert slide.stats.blocks_decoded == 2
    assert slide.stats.blocks_missing == 0


def test_closing_twice_is_fine_and_a_closed_file_says_so(case: Case) -> None:
    slide = case.open()
    slide.close()
    slide.close()
    if case.path is not None:
        with pytest.raises(SlideReadError, match="closed"):
            slide.read_region(0, 0, 0, 10, 10)


def test_the_fingerprint_is_of_the_contents_and_not_the_place(case: Case, tmp_path: Path) -> None:
    if case.path is None or case.path.is_dir():
        pytest.skip("no single file")
    with closing(case.open()) as slide:
        reader, fingerprint = slide.info.reader, slide.info.fingerprint
    other = tmp_path / f"elsewhere{case.path.suffix}"
    shutil.copyfile(case.path, other)
    with closing(open_slide(other, reader=reader)) as moved:
        assert moved.info.fingerprint == fingerprint
    with open(other, "ab") as handle:
        handle.write(b"\0")
    with closing(open_slide(other, reader=reader)) as changed:
        assert changed.info.fingerprint != fingerprint


def test_the_user_s_mpp_goes_before_the_file_s(case: Case) -> None:
    if case.path is None:
        pytest.skip("not a file")
    with closing(open_slide(case.path, mpp=(0.5, 0.6))) as slide:
        assert slide.pyramid.mpp == (0.5, 0.6)
        assert slide.info.mpp_source == "user"


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "TCGA-CR-7395-01A-01-TS1.svs", "test3-DAPI-2-387.ndpi"])
def test_readers_agree(shared_slides: Path, name: str) -> None:
    fast, slow = (open_slide(shared_slides / name, reader=reader) for reader in ("tiff", "openslide"))
    width, height = fast.pyramid.size_l0
    region = (0, width // 5, height // 5, min(width, 2000), min(height, 2000))
    difference = np.abs(fast.read_region(*region).astype(np.int16) - slow.read_region(*region))
    assert difference.max() <= 2
    assert difference.mean() <= 0.5
    assert fast.info.fingerprint == slow.info.fingerprint or fast.pyramid.levels != slow.pyramid.levels
    fast.close()
    slow.close()
