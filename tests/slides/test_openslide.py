"""What is added to OpenSlide: white under transparency, bounds, fresh handles after errors, honest planes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from wsi_pipe.errors import SlideOpenError, SlideReadError, UnsupportedSlideError
from wsi_pipe.slides.openslide import flatten, open_openslide
from wsi_pipe.slides.writing.write import write_pyramid


@given(hnp.arrays(np.uint8, (3, 4, 4)))
def test_flatten_is_the_weighted_mean_with_white(rgba: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    alpha = rgba[..., 3:].astype(np.float64) / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    found = flatten(rgba)
    assert found.dtype == np.uint8
    assert found.shape == (3, 4, 3)
    assert np.abs(found - expected).max() <= 0.5 + 1e-9


class Library:
    """Stands in for openslide.OpenSlide: a slide of given levels whose pixels tell where they were read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, sizes: list[tuple[int, int]], **properties: str) -> None:
        self.opened = self.closed = 0
        self.fail: Callable[[tuple[int, int]], bool] = lambda corner: False
        self.alpha = 255
        self.calls: list[tuple[tuple[int, int], int, tuple[int, int]]] = []
        self.properties: dict[str, str] = {"openslide.vendor": "test"} | {
            f"openslide.{key.replace('_', '-')}": value for key, value in properties.items()
        }
        library = self

        class Handle:
            level_dimensions = tuple(sizes)
            level_downsamples = tuple((sizes[0][0] / w + sizes[0][1] / h) / 2 for w, h in sizes)
            color_profile = None
            associated_images: dict[str, Image.Image] = {}  # noqa: RUF012

            def __init__(self, path: str) -> None:
                library.opened += 1
                self.properties = library.properties
                self.broken = self.gone = False

            def read_region(self, corner: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
                assert not self.gone, "read from a closed handle"
                library.calls.append((corner, level, size))
                if self.broken or library.fail(corner):
                    self.broken = True
                    raise openslide.OpenSlideError("the tile is damaged")
                pixels = np.full((size[1], size[0], 4), (corner[0] % 251, corner[1] % 251, level, 0), np.uint8)
                pixels[..., 3] = library.alpha
                return Image.fromarray(pixels)

            def close(self) -> None:
                assert not self.gone, "closed twice"
                self.gone = True
                library.closed += 1

        monkeypatch.setattr("wsi_pipe.slides.openslide.api.OpenSlide", Handle)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "slide.mrxs"
    file.write_bytes(b"not read by the stand-in, but fingerprinted")
    return file


def test_transparency_is_white(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Library(monkeypatch, [(1000, 800)]).alpha = 0
    with closing(open_openslide(path)) as slide:
        assert (slide.read_region(0, 100, 100, 50, 40) == 255).all()
        assert (slide.decode(slide.planes[0], (0, 0), (0, 0)) == 255).all()


def test_bounds_are_recorded_and_do_not_move_coordinates(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = {"bounds_x": "100", "bounds_y": "50", "bounds_width": "600", "bounds_height": "700"}
    library = Library(monkeypatch, [(1000, 800)], **bounds)
    with closing(open_openslide(path)) as slide:
        assert slide.info.bounds_l0 == (100, 50, 600, 700)
        slide.read_region(0, 7, 9, 20, 30)
        assert library.calls[-1] == ((7, 9), 0, (20, 30))


def test_bounds_are_clipped_to_the_image_and_dropped_where_damaged(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {"bounds_x": "-5", "bounds_y": "0", "bounds_width": "5000", "bounds_height": "700"}
    Library(monkeypatch, [(1000, 800)], **whole)
    with closing(open_openslide(path)) as slide:
        assert slide.info.bounds_l0 == (0, 0, 1000, 700)
    for damaged in ({"bounds_x": "x"}, {"bounds_width": "0"}, {"bounds_y": "900"}):
        Library(monkeypatch, [(1000, 800)], **(whole | damaged))
        with closing(open_openslide(path)) as slide:
            assert slide.info.bounds_l0 is None


@pytest.mark.parametrize(
    ("properties", "mpp"),
    [
        ({"mpp_x": "0.25", "mpp_y": "0.26"}, (0.25, 0.26)),
        ({"mpp_x": "0.25"}, None),
        ({"mpp_x": "0,25", "mpp_y": "0,25"}, None),
        ({"mpp_x": "nan", "mpp_y": "0.25"}, None),
        ({"mpp_x": "0", "mpp_y": "0.25"}, None),
        ({"vendor": "generic-tiff", "mpp_x": "352.8", "mpp_y": "352.8"}, None),
        ({"vendor": "generic-tiff", "mpp_x": "0.5", "mpp_y": "0.5"}, (0.5, 0.5)),
        ({"objective_power": "20"}, None),
    ],
)
def test_mpp_is_what_the_file_states_and_plausible(
    path: Path, monkeypatch: pytest.MonkeyPatch, properties: dict[str, str], mpp: tuple[float, float] | None
) -> None:
    Library(monkeypatch, [(1000, 800)], **properties)
    with closing(open_openslide(path)) as slide:
        assert slide.pyramid.mpp == mpp
        assert slide.info.mpp_source == ("none" if mpp is None else "openslide.mpp-x")


def test_a_property_whose_name_is_damaged_is_left_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties(dict[str, str]):
        def __getitem__(self, name: str) -> str:
            if name == "aperio.\ufffd":
                raise KeyError
            return super().__getitem__(name)

    library = Library(monkeypatch, [(1000, 800)])
    library.properties = Properties({"aperio.\ufffd": "?", "openslide.vendor": "aperio"})
    with closing(open_openslide(path)) as slide:
        assert slide.info.properties == {"openslide.vendor": "aperio"}


def test_level_coordinates_are_asked_for_at_the_nearest_level_0_pixel(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Library(monkeypatch, [(4443, 3567), (1110, 891)])
    downsample = (4443 / 1110 + 3567 / 891) / 2
    with closing(open_openslide(path)) as slide:
        assert slide.pyramid.levels[1].downsample == (4.0, 4.0)
        slide.read_region(1, 1000, 800, 10, 10)
    assert library.calls[-1] == ((round(1000 * downsample), round(800 * downsample)), 1, (10, 10))


def test_a_level_that_openslide_would_blur_is_no_plane(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # At 2.0005 a level pixel lies up to a quarter of its width beside a level-0 pixel; at 16.01, a 32nd.
    Library(monkeypatch, [(4443, 3567), (2221, 1783), (277, 222)])
    with closing(open_openslide(path)) as slide:
        assert [level.downsample[0] for level in slide.pyramid.levels] == [1, 2, 16]
        assert [plane.level for plane in slide.planes] == [0, 2]
        assert slide.read_region(1, 0, 0, 20, 10).shape == (10, 20, 3)
    Library(monkeypatch, [(4444, 3568), (2222, 1784)])
    with closing(open_openslide(path)) as slide:
        assert [plane.level for plane in slide.planes] == [0, 1]


def test_blocks_are_whole_native_tiles_near_1024_px(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = {"level[0].tile_width": "240", "level[0].tile_height": "8", "level[1].tile_width": "3000"}
    Library(monkeypatch, [(8000, 8000), (4000, 4000)], **properties)
    with closing(open_openslide(path)) as slide:
        assert [plane.block_px for plane in slide.planes] == [(960, 1024), (1024, 1024)]


def test_a_failed_read_does_not_spoil_the_next(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(monkeypatch, [(1000, 800)])
    library.fail = lambda corner: corner == (100, 100)
    with closing(open_openslide(path)) as slide:
        slide.read_region(0, 0, 0, 10, 10)
        for _ in range(3):
            with pytest.raises(SlideReadError, match=r"slide\.mrxs: OpenSlide cannot read .* the tile is damaged"):
                slide.read_region(0, 100, 100, 10, 10)
            assert (slide.read_region(0, 5, 6, 10, 10)[..., :2] == (5, 6)).all()
    assert library.opened == library.closed


def test_errors_in_some_threads_reach_no_other(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(monkeypatch, [(1000, 800)])
    library.fail = lambda corner: corner[0] % 3 == 0
    with closing(open_openslide(path)) as slide, ThreadPoolExecutor(8) as pool:

        def read(x: int) -> bool:
            try:
                return bool((slide.read_region(0, x, 4, 3, 3)[..., 0] == x).all())
            except SlideReadError:
                return x % 3 == 0

        assert all(pool.map(read, range(1, 240)))
    assert library.opened == library.closed


def test_close_waits_for_readers_and_forbids_new_ones(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(monkeypatch, [(1000, 800)])
    reading, go_on = threading.Event(), threading.Event()

    def wait(corner: tuple[int, int]) -> bool:
        reading.set()
        go_on.wait(10)
        return False

    library.fail = wait
    slide = open_openslide(path)
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(slide.read_region, 0, 9, 9, 4, 4)
        assert reading.wait(10)
        slide.close()
        assert library.closed == 0
        go_on.set()
        assert (pending.result(10)[..., 0] == 9).all()
    assert library.closed == library.opened == 1
    with pytest.raises(SlideReadError, match="closed"):
        slide.read_region(0, 0, 0, 4, 4)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (openslide.OpenSlideUnsupportedFormatError("Unsupported or missing image file"), UnsupportedSlideError),
        (openslide.OpenSlideError("Unsupported TIFF compression: 34712"), UnsupportedSlideError),
        (openslide.OpenSlideError("Cannot read TIFF directory"), SlideOpenError),
        (PermissionError(13, "Permission denied"), SlideOpenError),
    ],
)
def test_errors_on_opening(
    path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception]
) -> None:
    def fail(path: str) -> None:
        raise error

    monkeypatch.setattr("wsi_pipe.slides.openslide.api.OpenSlide", fail)
    with pytest.raises(kind, match=r"slide\.mrxs: OpenSlide"):
        open_openslide(path)


def test_a_damaged_tile_of_a_real_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    path = tmp_path / "slide.svs"
    write_pyramid(path, [rng.integers(0, 256, (512, 2048, 3), np.uint8)], mpp=0.5, compression="deflate")
    with closing(open_openslide(path)) as slide:
        good = slide.read_region(0, 1500, 0, 500, 500)
    data = bytearray(path.read_bytes())
    # Tiles follow each other in order; the first lies right behind the headers.
    data[8000:40000] = bytes(32000)
    path.write_bytes(data)
    with closing(open_openslide(path)) as slide:
        for _ in range(2):
            with pytest.raises(SlideReadError, match="the file is damaged"):
                slide.read_region(0, 0, 0, 2048, 256)
            assert np.array_equal(slide.read_region(0, 1500, 0, 500, 500), good)


def test_associated_images_and_colour_profile_of_a_real_file(tmp_path: Path) -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    rgb = np.full((300, 400, 3), 120, np.uint8)
    extra = {"thumbnail": np.full((75, 100, 3), 10, np.uint8), "label": np.full((50, 60, 3), 20, np.uint8)}
    extra["macro"] = np.full((40, 90, 3), 30, np.uint8)
    path = tmp_path / "slide.svs"
    write_pyramid(path, [rgb], mpp=0.25, associated=extra, icc=profile)
    with closing(open_openslide(path)) as slide:
        assert slide.info.icc == profile
        assert slide.info.objective_power == 40
        found = slide.associated_images()
    assert {name: image.shape for name, image in found.items()} == {name: image.shape for name, image in extra.items()}
    for name, image in extra.items():
        assert np.array_equal(found[name], image)


@given(st.integers(0, 40), st.integers(0, 40))
def test_flatten_of_opaque_pixels_changes_nothing(height: int, width: int) -> None:
    rgba = np.full((height + 1, width + 1, 4), 255, np.uint8)
    rgba[..., 1] = 7
    assert np.array_equal(flatten(rgba), rgba[..., :3])
