"""Slides as written: read back by tifffile and OpenSlide, which know nothing of the writer."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_pipe.errors import OutputError
from wsi_pipe.slides import open_slide
from wsi_pipe.slides.base import RGBArray
from wsi_pipe.slides.writing.encode import split_tables, without_application_data
from wsi_pipe.slides.writing.write import write_pyramid


def smooth(width: int, height: int) -> RGBArray:
    """Gradients that JPEG keeps to a few grey levels, another in each channel."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([x, y, (x + 255 - y) / 2], axis=2).astype(np.uint8)


LEVELS = [smooth(600, 430), smooth(300, 215), smooth(150, 107)]


def pages(path: Path) -> Iterator[Any]:
    with tifffile.TiffFile(path) as file:
        yield from file.pages


@pytest.mark.parametrize("colour", ["ycbcr", "rgb"])
@pytest.mark.parametrize("tables", [False, True])
def test_aperio_as_openslide_sees_it(tmp_path: Path, colour: Any, tables: bool) -> None:
    path = tmp_path / "a.svs"
    write_pyramid(path, LEVELS, mpp=0.2527, jpeg_colour=colour, jpeg_tables=tables, quality=95)
    with openslide.OpenSlide(path) as slide:
        assert slide.properties["openslide.vendor"] == "aperio"
        assert float(slide.properties["openslide.mpp-x"]) == 0.2527
        assert slide.properties["openslide.objective-power"] == "40"
        assert slide.properties["aperio.AppMag"] == "40"
        assert slide.level_dimensions == ((600, 430), (300, 215), (150, 107))
        for level, truth in enumerate(LEVELS):
            found = np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]))[..., :3]
            assert np.abs(found.astype(np.int16) - truth).max() <= 8
    for page in pages(path):
        assert page.tilewidth == page.tilelength == 256
        assert page.photometric == (tifffile.PHOTOMETRIC.RGB if colour == "rgb" else tifffile.PHOTOMETRIC.YCBCR)
        assert (page.jpegtables is not None) == tables


def test_rgb_jpeg_says_nowhere_that_it_is_rgb(tmp_path: Path) -> None:
    path = tmp_path / "a.svs"
    write_pyramid(path, LEVELS[:1], mpp=0.5, jpeg_colour="rgb")
    with tifffile.TiffFile(path) as file:
        for data, _ in _segments(file):
            assert b"Adobe" not in data
            assert b"JFIF" not in data
            start = data.index(b"\xff\xc0")
            assert [data[start + 10 + 3 * i] for i in range(3)] == [1, 2, 3]


def _segments(file: Any) -> Iterator[tuple[bytes, int]]:
    page = file.pages[0]
    for index, (offset, count) in enumerate(zip(page.dataoffsets, page.databytecounts, strict=True)):
        file.filehandle.seek(offset)
        yield file.filehandle.read(count), index


def test_subsampling_is_as_stated(tmp_path: Path) -> None:
    for name, factors in (("444", (1, 1)), ("422", (2, 1)), ("420", (2, 2))):
        path = tmp_path / f"{name}.svs"
        write_pyramid(path, LEVELS[:1], mpp=0.5, subsampling=name)  # type: ignore[arg-type]
        with tifffile.TiffFile(path) as file:
            assert file.pages[0].aspage().subsampling == factors
            data, _ = next(_segments(file))
            start = data.index(b"\xff\xc0")
            assert data[start + 11] == factors[0] << 4 | factors[1]


@pytest.mark.parametrize(("colour", "tag"), [("ycbcr", 33003), ("rgb", 33005)])
def test_aperio_jpeg_2000(tmp_path: Path, colour: Any, tag: int) -> None:
    path = tmp_path / "a.svs"
    write_pyramid(path, LEVELS, mpp=0.5, compression="jpeg2000", quality=0, jpeg_colour=colour)
    assert [int(page.compression) for page in pages(path)] == [tag] * 3
    with openslide.OpenSlide(path) as slide:
        found = np.asarray(slide.read_region((0, 0), 0, (600, 430)))[..., :3]
        # RGB is stored without loss; conversion to YCbCr rounds.
        assert np.abs(found.astype(np.int16) - LEVELS[0]).max() <= (0 if tag == 33005 else 2)


@pytest.mark.parametrize("compression", ["deflate", "none"])
@pytest.mark.parametrize("style", ["aperio", "generic", "ome"])
@pytest.mark.parametrize("planar", [False, True])
def test_lossless_forms_are_exact(tmp_path: Path, compression: Any, style: Any, planar: bool) -> None:
    path = tmp_path / "a.tif"
    if planar and style == "aperio":
        with pytest.raises(ValueError, match="not planar"):
            write_pyramid(path, LEVELS, mpp=0.5, compression=compression, style=style, planar=planar)
        return
    write_pyramid(path, LEVELS, mpp=0.5, compression=compression, style=style, planar=planar, tile_px=64)
    with tifffile.TiffFile(path) as file:
        found = [file.pages[0], *(file.pages[0].pages or [])] if style == "ome" else list(file.pages)
        assert len(found) == 3
        for page, truth in zip(found, LEVELS, strict=True):
            pixels = page.asarray()
            assert np.array_equal(np.moveaxis(pixels, 0, 2) if planar else pixels, truth)


def test_ome_states_size_and_resolution(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    write_pyramid(path, LEVELS, mpp=(0.25, 0.26), style="ome")
    with tifffile.TiffFile(path) as file:
        assert file.is_ome
        assert [level.shape for level in file.series[0].levels] == [(430, 600, 3), (215, 300, 3), (107, 150, 3)]
        xml = file.ome_metadata or ""
    for stated in ('PhysicalSizeX="0.25"', 'PhysicalSizeY="0.26"', 'PhysicalSizeXUnit="µm"', 'SizeX="600"'):
        assert stated in xml


def test_generic_states_the_resolution_of_each_level(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    write_pyramid(path, LEVELS, mpp=0.5, style="generic")
    for page, downsample in zip(pages(path), (1, 2, 4), strict=True):
        x = page.tags["XResolution"].value
        assert 10000 * x[1] / x[0] == pytest.approx(0.5 * downsample, rel=1e-6)
        assert page.tags["ResolutionUnit"].value == tifffile.RESUNIT.CENTIMETER
        assert page.is_reduced == (downsample > 1)


def test_without_mpp_no_resolution_is_stated(tmp_path: Path) -> None:
    for style in ("aperio", "generic", "ome"):
        path = tmp_path / f"{style}.tif"
        write_pyramid(path, LEVELS, mpp=None, style=style)
        with closing(open_slide(path)) as slide:
            assert slide.pyramid.mpp is None
            assert slide.info.objective_power is None


def test_missing_tiles_have_no_bytes(tmp_path: Path) -> None:
    missing = {(0, 0, 0), (0, 1, 1), (1, 0, 0)}
    for compression in ("jpeg", "none"):
        path = tmp_path / f"{compression}.svs"
        write_pyramid(path, LEVELS, mpp=0.5, missing=missing, compression=compression)
        counts = [page.databytecounts for page in pages(path)]
        offsets = [page.dataoffsets for page in pages(path)]
        assert [i for i, n in enumerate(counts[0]) if n == 0] == [0, 4]
        assert [i for i, n in enumerate(counts[1]) if n == 0] == [0]
        assert [[n == 0 for n in level] for level in counts] == [[at == 0 for at in level] for level in offsets]
        with closing(open_slide(path)) as slide:
            assert (slide.read_region(0, 0, 0, 256, 256) == 255).all()
            assert (slide.read_region(0, 256, 0, 256, 256) != 255).any()


class Streamed:
    """A level of a slide larger than memory: each tile is made when asked for, and told by its place."""

    def __init__(self, size_px: tuple[int, int], tile_px: int) -> None:
        self.size_px, self.tile_px = size_px, tile_px
        self.asked: list[tuple[int, int]] = []

    def tile(self, column: int, row: int) -> RGBArray:
        self.asked.append((column, row))
        width = min(self.tile_px, self.size_px[0] - column * self.tile_px)
        height = min(self.tile_px, self.size_px[1] - row * self.tile_px)
        return np.full((height, width, 3), (column % 256, row % 256, 77), np.uint8)


def test_a_large_slide_streams_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.svs"
    level = Streamed((14_000, 14_100), 512)
    tracemalloc.start()
    try:
        write_pyramid(path, [level], mpp=0.25, tile_px=512, compression="jpeg", quality=95)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The level takes 590 MB; a tile 0.8 MB.
    assert peak < 20e6
    assert level.asked == [(c, r) for r in range(28) for c in range(28)]
    with closing(open_slide(path)) as slide:
        found = slide.read_region(0, 13_996, 14_096, 4, 4)
        assert np.abs(found.astype(np.int16) - (27, 27, 77)).max() <= 3


def test_large_slides_are_bigtiff(tmp_path: Path) -> None:
    small, forced = tmp_path / "a.svs", tmp_path / "b.svs"
    write_pyramid(small, LEVELS, mpp=0.5)
    write_pyramid(forced, LEVELS, mpp=0.5, bigtiff=True)
    assert small.read_bytes()[:4] == b"II*\0"
    assert forced.read_bytes()[:4] == b"II+\0"


@pytest.mark.parametrize(
    ("levels", "options", "cause"),
    [
        ([], {}, "at least one level"),
        ([LEVELS[0][..., 0]], {}, "uint8"),
        ([LEVELS[0].astype(np.uint16)], {}, "uint8"),
        (LEVELS, {"tile_px": 100}, "multiple of 16"),
        (LEVELS, {"compression": "lzw"}, "unknown compression"),
        (LEVELS, {"style": "zeiss"}, "unknown style"),
        (LEVELS, {"jpeg_colour": "cmyk"}, "unknown colour"),
        (LEVELS, {"compression": "deflate", "jpeg_tables": True}, "no JPEG tables"),
        (LEVELS, {"mpp": (0.25, 0.3)}, "one mpp for both axes"),
        (LEVELS, {"style": "ome", "associated": {"label": LEVELS[2]}}, "associated images"),
        (LEVELS, {"mpp": 0}, "mpp"),
        ([Streamed((500, 500), 128)], {}, "tiles of 128 px"),
    ],
)
def test_options_that_do_not_go_together(tmp_path: Path, levels: Any, options: dict[str, Any], cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        write_pyramid(tmp_path / "a.svs", levels, **({"mpp": 0.5} | options))
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_gives_wrong_tiles_leaves_nothing_behind(tmp_path: Path) -> None:
    class Wrong(Streamed):
        def tile(self, column: int, row: int) -> RGBArray:
            return super().tile(column, row)[:100] if (column, row) == (1, 1) else super().tile(column, row)

    with pytest.raises(ValueError, match="level 0, tile column 1, row 1"):
        write_pyramid(tmp_path / "a.svs", [Wrong((600, 600), 256)], mpp=0.5)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        write_pyramid(tmp_path / "file" / "a.svs", LEVELS, mpp=0.5)


@settings(max_examples=25, deadline=None)
@given(
    width=st.integers(1, 70),
    height=st.integers(1, 70),
    tile_px=st.sampled_from([16, 32, 64]),
    style=st.sampled_from(["aperio", "generic"]),
    compression=st.sampled_from(["deflate", "none"]),
    bigtiff=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_size_round_trips(
    tmp_path_factory: pytest.TempPathFactory,
    width: int,
    height: int,
    tile_px: int,
    style: Any,
    compression: Any,
    bigtiff: bool,
    seed: int,
) -> None:
    path = tmp_path_factory.mktemp("any") / "a.svs"
    rgb = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    write_pyramid(path, [rgb], mpp=0.5, tile_px=tile_px, style=style, compression=compression, bigtiff=bigtiff)
    for reader in ("tiff", "image"):
        with closing(open_slide(path, reader=reader)) as slide:
            assert np.array_equal(slide.read_region(0, 0, 0, width, height), rgb)


def test_tables_split_from_a_stream_join_to_it_again() -> None:
    import simplejpeg

    data = simplejpeg.encode_jpeg(np.ascontiguousarray(LEVELS[2]), 80, "RGB", "444")
    bare = without_application_data(data)
    assert len(bare) < len(data)
    tables, rest = split_tables(bare)
    assert b"\xff\xdb" not in rest[:20]
    joined = tables[:-2] + rest[2:]
    assert np.array_equal(simplejpeg.decode_jpeg(joined), simplejpeg.decode_jpeg(bare))
