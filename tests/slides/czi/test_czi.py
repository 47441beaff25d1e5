"""CZI slides: every compression, mosaics, pyramids, scenes, planes, refusals, damage; Zeiss's own reader compares."""

from __future__ import annotations

import functools
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray

from tests.slides.czi.build import Tile, write_czi, xml
from tests.slides.storage.test_source import Server
from wsi_pipe.errors import NotAPictureError, SlideError, SlideOpenError, SlideReadError, UnsupportedSlideError
from wsi_pipe.slides import open_slide
from wsi_pipe.slides.czi.image import CziImage
from wsi_pipe.slides.czi.reader import open_czi
from wsi_pipe.slides.czi.tiles import decode_tile

pyczi = pytest.importorskip("pylibCZIrw.czi")

Picture = NDArray[np.uint8]
CORNER = (-700, 1300)
"""Where the slide begins on the stage."""


@functools.cache
def picture(seed: int = 1, width: int = 300, height: int = 220) -> Picture:
    rng = np.random.default_rng(seed)
    noise = cv2.GaussianBlur(rng.normal(size=(height, width, 3)), (0, 0), 2.0)
    found = np.clip(170 + 150 * noise, 0, 255).astype(np.uint8)
    found.setflags(write=False)
    return found


def box(pixels: Picture, factor: int) -> Picture:
    size = (pixels.shape[1] // factor, pixels.shape[0] // factor)
    whole = np.ascontiguousarray(pixels[: size[1] * factor, : size[0] * factor])
    return np.asarray(cv2.resize(whole, size, interpolation=cv2.INTER_AREA), np.uint8)


def mosaic(
    pixels: Picture, side: int = 128, step: int = 0, *, corner: tuple[int, int] = CORNER, **options: Any
) -> list[Tile]:
    """Tiles of a picture; with a ``step`` below their side they overlap."""
    step = step or side
    height, width = pixels.shape[:2]
    places = [(x, y) for y in range(0, height, step) for x in range(0, width, step)]
    dimensions = options.pop("dimensions", {})
    return [
        Tile(
            pixels[y : y + side, x : x + side],
            (x + corner[0], y + corner[1]),
            dimensions={**dimensions, "M": i},
            **options,
        )
        for i, (x, y) in enumerate(places)
    ]


def coarse(pixels: Picture, factor: int, corner: tuple[int, int] = CORNER, **options: Any) -> Tile:
    """One tile with the whole picture, smaller."""
    return Tile(box(pixels, factor), corner, (pixels.shape[1], pixels.shape[0]), pyramid=2, **options)


def whole(slide: Any, level: int = 0) -> Picture:
    return np.asarray(slide.read_region(level, 0, 0, *slide.pyramid.levels[level].size_px), np.uint8)


def difference(a: Picture, b: Picture) -> int:
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b).max())


@pytest.mark.parametrize(
    ("compression", "worst"), [("none", 0), ("zstd0", 0), ("zstd1", 0), ("jpegxr", 0), ("jpeg", 40)]
)
def test_every_compression_is_read_as_zeiss_does(tmp_path: Path, compression: str, worst: int) -> None:
    tiles = [*mosaic(picture(), compression=compression), coarse(picture(), 2, compression=compression)]
    path = write_czi(tmp_path / "a.czi", tiles, um=(0.22, 0.23))
    with open_slide(path) as slide:
        assert slide.info.reader == "czi"
        assert slide.info.vendor == "zeiss"
        assert slide.info.notes == ()
        assert slide.pyramid.mpp == pytest.approx((0.22, 0.23))
        assert slide.info.objective_power == 20
        assert [level.size_px for level in slide.pyramid.levels] == [(300, 220), (150, 110)]
        assert [level.downsample for level in slide.pyramid.levels] == [(1, 1), (2, 2)]
        assert slide.planes[0].block_px == (128, 128)
        assert difference(whole(slide), picture()) <= worst
        assert difference(whole(slide, 1), box(picture(), 2)) <= worst
        if compression != "jpeg":
            with pyczi.open_czi(str(path)) as theirs:
                assert difference(whole(slide), theirs.read(plane={"C": 0})[..., ::-1]) == 0


@pytest.mark.parametrize("compression", ["uncompressed:", "zstd0:ExplicitLevel=3", "zstd1:ExplicitLevel=3"])
def test_what_zeiss_s_library_writes(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "a.czi"
    with pyczi.create_czi(str(path), compression_options=compression) as out:
        for tile in mosaic(picture(), 100):
            out.write(
                data=np.ascontiguousarray(tile.pixels[..., ::-1]), plane={"C": 0, "Z": 0, "T": 0}, location=tile.at
            )
        out.write_metadata("a", channel_names={0: "brightfield"}, scale_x=0.25e-6, scale_y=0.25e-6)
    with open_slide(path) as slide:
        assert np.array_equal(whole(slide), picture())
        assert slide.pyramid.mpp == pytest.approx((0.25, 0.25))
        assert slide.info.mpp_source == "czi.Scaling"


def test_each_tile_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    monkeypatch.setattr(
        "wsi_pipe.slides.czi.image.decode_tile",
        lambda tile, data: decoded.append(tile.position) or decode_tile(tile, data),
    )
    for step in (64, 50):
        tiles = mosaic(picture(), 64, step, compression="zstd1")
        with open_czi(write_czi(tmp_path / f"{step}.czi", tiles)) as slide:
            decoded.clear()
            whole(slide)
            assert len(decoded) == len(set(decoded)) == len(tiles)


@pytest.mark.parametrize(("side", "step"), [(64, 50), (90, 70), (128, 128)])
def test_tiles_that_overlap_are_pasted_in_their_order(tmp_path: Path, side: int, step: int) -> None:
    """Each tile is a shade of its own, so that it shows which one is on top."""
    tiles = mosaic(picture(), side, step)
    for i, tile in enumerate(tiles):
        tile.pixels = np.full_like(tile.pixels, 5 * i % 250)
    path = write_czi(tmp_path / "a.czi", tiles[::-1])
    with open_czi(path) as slide, pyczi.open_czi(str(path)) as theirs:
        assert np.array_equal(whole(slide), theirs.read(plane={"C": 0})[..., ::-1])


def test_tiles_anywhere_leave_white_between_them(tmp_path: Path) -> None:
    parts = [(0, 0), (1500, 40), (700, 1203)]
    tiles = [Tile(picture(i), (x + CORNER[0], y + CORNER[1])) for i, (x, y) in enumerate(parts)]
    truth = np.full((1423, 1800, 3), 255, np.uint8)
    for i, (x, y) in enumerate(parts):
        truth[y : y + 220, x : x + 300] = picture(i)
    with open_czi(write_czi(tmp_path / "a.czi", tiles)) as slide:
        assert slide.pyramid.size_l0 == (1800, 1423)
        assert np.array_equal(whole(slide), truth)
        with ThreadPoolExecutor(4) as pool:
            places = [(x, y) for x in range(-20, 1800, 310) for y in range(-20, 1400, 290)]
            regions = pool.map(lambda place: slide.read_region(0, *place, 200, 200), places)
            padded = np.pad(truth, ((20, 300), (20, 300), (0, 0)), constant_values=255)
            for (x, y), found in zip(places, regions, strict=True):
                assert np.array_equal(found, padded[y + 20 : y + 220, x + 20 : x + 220])


def test_a_level_that_does_not_cover_the_slide_is_left_out(tmp_path: Path) -> None:
    full = picture(1, 512, 400)
    quarter = coarse(full[:200, :256], 4)
    with open_czi(write_czi(tmp_path / "a.czi", [*mosaic(full), coarse(full, 2), quarter])) as slide:
        assert [level.downsample for level in slide.pyramid.levels] == [(1, 1), (2, 2)]
        assert slide.info.notes == ("the level at 1/4 is left out: its tiles do not cover the slide",)


def test_sides_that_do_not_divide_are_rounded(tmp_path: Path) -> None:
    full = picture(2, 301, 223)
    with open_czi(write_czi(tmp_path / "a.czi", [*mosaic(full), coarse(full, 2), coarse(full, 3)])) as slide:
        assert [level.downsample for level in slide.pyramid.levels] == [(1, 1), (2, 2), (3, 3)]
        assert slide.pyramid.levels[1].size_px == (150, 111)
        assert np.array_equal(whole(slide, 1), box(full, 2))


def test_scenes(tmp_path: Path) -> None:
    tiles = []
    for scene, corner in ((0, CORNER), (1, (900, 2000)), (4, (-3000, 10))):
        tiles += mosaic(picture(scene), corner=corner, dimensions={"S": scene})
        tiles.append(coarse(picture(scene), 2, corner, dimensions={"S": scene}))
    path = write_czi(tmp_path / "a.czi", tiles)
    with pytest.raises(NotAPictureError, match=r"3 scenes: 0 \(300 x 220 px\), 1 \(300 x 220 px\), 4 .*--scene N"):
        open_slide(path)
    prints = set()
    for scene in (0, 1, 4):
        with open_slide(path, scene=scene) as slide:
            assert np.array_equal(whole(slide), picture(scene))
            assert np.array_equal(whole(slide, 1), box(picture(scene), 2))
            assert slide.info.notes == (f"scene {scene} of 3 is read",)
            prints.add(slide.info.fingerprint)
    assert len(prints) == 3
    with pytest.raises(NotAPictureError, match="--scene 2 was asked for, but the file holds the scenes 0, 1, 4"):
        open_slide(path, scene=2)
    one = write_czi(tmp_path / "b.czi", mosaic(picture(), dimensions={"S": 0}))
    open_slide(one, scene=0).close()
    with pytest.raises(NotAPictureError, match="holds one scene"):
        open_slide(one, scene=1)


def test_focal_planes(tmp_path: Path) -> None:
    tiles = [tile for z in range(4) for tile in mosaic(picture(z), dimensions={"Z": 10 + z})]
    path = write_czi(tmp_path / "a.czi", tiles)
    with open_slide(path) as slide:
        assert np.array_equal(whole(slide), picture(1))
        assert slide.info.notes == ("focal plane 1 of 0 to 3, the middle one is read (--z N takes another)",)
    for z in range(4):
        with open_slide(path, z=z) as slide:
            assert np.array_equal(whole(slide), picture(z))
    with pytest.raises(NotAPictureError, match="has 4 focal planes"):
        open_slide(path, z=4)
    with pytest.raises(NotAPictureError, match="one focal plane"):
        open_slide(write_czi(tmp_path / "b.czi", mosaic(picture())), z=2)


def several(axis: str) -> list[Tile]:
    return [tile for i in range(3) for tile in mosaic(picture(i), dimensions={axis: i})]


def grey(bits: int) -> list[Tile]:
    pixels = np.ascontiguousarray(picture()[..., 0])
    return [Tile(pixels, CORNER, pixel_type=0 if bits == 8 else 1, data=bytes(pixels.size * bits // 8))]


@pytest.mark.parametrize(
    ("tiles", "channel", "reason"),
    [
        (several("C"), "", "3 channels"),
        (several("T"), "", "3 time points"),
        (several("H"), "", "3 phases"),
        (grey(8), "", "pixels of 8-bit grey"),
        (grey(16), "", "pixels of 16-bit grey"),
        ([Tile(picture(), CORNER, pixel_type=4)], "", "pixels of 16-bit colour"),
        ([Tile(picture(), CORNER, pixel_type=9)], "", "8-bit colour with alpha"),
        (mosaic(picture()), "<ContrastMethod>Fluorescence</ContrastMethod>", "ContrastMethod is Fluorescence"),
        (mosaic(picture()), "<IlluminationType>Epifluorescence</IlluminationType>", "IlluminationType is Epi"),
        (mosaic(picture()), "<Fluor>DAPI</Fluor>", "fluorescent"),
    ],
)
def test_what_is_no_brightfield_slide_in_colour_is_refused_for_good(
    tmp_path: Path, tiles: list[Tile], channel: str, reason: str
) -> None:
    path = write_czi(tmp_path / "a.czi", tiles, metadata=xml((0.25, 0.25), channel=channel))
    with pytest.raises(NotAPictureError, match=reason) as caught:
        open_slide(path)
    assert "damaged" not in str(caught.value)


@pytest.mark.parametrize("channel", ["", "<ContrastMethod>Brightfield</ContrastMethod>",
                                     "<IlluminationType>Transmitted</IlluminationType>",
                                     "<ContrastMethod>Brightfield</ContrastMethod><EmissionWavelength/><Fluor>TL</Fluor>",
                                     "<Fluor>TL Brightfield</Fluor>"])  # fmt: skip
def test_brightfield_is_read_and_metadata_may_be_missing(tmp_path: Path, channel: str) -> None:
    for i, text in enumerate((xml((0.5, 0.5), channel=channel), xml(None, channel=channel), "<Image", "")):
        with open_slide(write_czi(tmp_path / f"{i}.czi", mosaic(picture()), metadata=text)) as slide:
            assert slide.pyramid.mpp == (pytest.approx((0.5, 0.5)) if i == 0 else None)
            assert slide.info.mpp_source == ("czi.Scaling" if i == 0 else "none")
    with open_slide(tmp_path / "0.czi", mpp=0.3) as given:
        assert given.pyramid.mpp == (0.3, 0.3)


def test_pictures_beside_the_slide(tmp_path: Path) -> None:
    jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(picture(5, 60, 40)), 95)
    attached = {"Thumbnail": ("JPG", jpeg), "Label": ("CZI", b"nested"), "SlidePreview": ("JPG", b"no JPEG")}
    with open_slide(write_czi(tmp_path / "a.czi", mosaic(picture()), attachments=attached)) as slide:
        found = slide.associated_images()
        assert set(found) == {"thumbnail"}
        assert found["thumbnail"].shape == (40, 60, 3)


def test_a_czi_by_its_bytes_and_behind_a_url(tmp_path: Path) -> None:
    path = write_czi(tmp_path / "a.bin", mosaic(picture(), compression="zstd1"))
    server = Server()
    server.files["a.czi"] = path.read_bytes()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with open_slide(path) as local, open_slide(server.url("a.czi")) as remote:
        assert np.array_equal(whole(remote), whole(local))
        assert remote.info.fingerprint == local.info.fingerprint
        assert "copied" not in remote.info.reader_reason
    server.shutdown()
    server.server_close()


def changed(path: Path, at: int, data: bytes) -> Path:
    whole_file = bytearray(path.read_bytes())
    whole_file[at : at + len(data)] = data
    path.write_bytes(whole_file)
    return path


@pytest.mark.parametrize(
    ("at", "data", "error", "reason"),
    [
        (32 + 48, struct.pack("<i", 1), UnsupportedSlideError, "part 1 of a CZI of several files"),
        (32 + 52, struct.pack("<q", 0), SlideOpenError, "writing was not finished"),
        (32 + 52, struct.pack("<q", 1 << 40), SlideOpenError, "outside the file"),
        (32 + 52, struct.pack("<q", 32), SlideOpenError, "no segment ZISRAWDIRECTORY"),
        (32 + 60, struct.pack("<q", 1 << 40), SlideOpenError, "ZISRAWMETADATA"),
    ],
)
def test_a_damaged_structure_is_an_error(
    tmp_path: Path, at: int, data: bytes, error: type[Exception], reason: str
) -> None:
    path = changed(write_czi(tmp_path / "a.czi", mosaic(picture())), at, data)
    with pytest.raises(error, match=reason) as caught:
        open_czi(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("compression", ["none", "zstd0", "zstd1", "jpegxr", "jpeg"])
@pytest.mark.parametrize("kind", ["cut", "noise", "empty", "wrong size"])
def test_a_damaged_tile_is_an_error_with_its_place(tmp_path: Path, compression: str, kind: str) -> None:
    from tests.slides.czi.build import encoded

    tiles = mosaic(picture(), compression=compression)
    good = encoded(tiles[4].pixels, compression)
    tiles[4].data = {
        "cut": good[: len(good) // 3],
        "noise": b"\x9a" * len(good),
        "empty": b"\x01",
        "wrong size": encoded(picture()[:40, :40], compression),
    }[kind]
    if (compression, kind) == ("none", "noise"):
        pytest.skip("any bytes are pixels")
    with open_czi(write_czi(tmp_path / "a.czi", tiles)) as slide:
        with pytest.raises(SlideReadError, match=r"a\.czi: level 0, tile column 1, row 1"):
            whole(slide)
        assert np.array_equal(slide.read_region(0, 0, 0, 128, 128), slide.read_region(0, 0, 0, 128, 128))


def test_every_truncation_is_an_error_or_the_right_pixels(tmp_path: Path) -> None:
    path = write_czi(tmp_path / "a.czi", [*mosaic(picture(), compression="jpegxr"), coarse(picture(), 2)])
    data = path.read_bytes()
    for length in range(0, len(data), max(len(data) // 50, 1)):
        path.write_bytes(data[:length])
        try:
            with open_czi(path) as slide:
                found = whole(slide)
        except SlideError:
            continue
        assert np.array_equal(found, picture())


def test_huge_sizes_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    small = Tile(picture()[:8, :8], CORNER)
    path = write_czi(tmp_path / "a.czi", [small])
    entry = path.read_bytes()
    at = entry.index(b"DV", entry.index(b"ZISRAWDIRECTORY")) + 32 + 8
    for size in (1 << 14, (1 << 31) - 1, -5):
        for stored in (size, 8):
            path.write_bytes(entry[:at] + struct.pack("<ifi", size, 0.0, stored) + entry[at + 12 :])
            with pytest.raises((SlideOpenError, UnsupportedSlideError)), open_czi(path) as slide:
                whole(slide)


def test_many_tiles_on_one_place_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsi_pipe.slides.czi.image.MAX_TILES_IN_BLOCK", 3)
    tiles = [Tile(picture()[:8, :8], (CORNER[0] + i, CORNER[1])) for i in range(5)]
    with pytest.raises(UnsupportedSlideError, match="more than 3 tiles lie on one place"):
        open_czi(write_czi(tmp_path / "a.czi", tiles))


def test_a_closed_slide_says_so(tmp_path: Path) -> None:
    slide = open_czi(write_czi(tmp_path / "a.czi", mosaic(picture())))
    slide.close()
    slide.close()
    with pytest.raises(SlideReadError, match="closed"):
        slide.read_region(0, 0, 0, 10, 10)


def test_waiting_threads_get_the_error_of_the_one_that_decodes() -> None:
    from wsi_pipe.slides.codecs.decode import CodecError
    from wsi_pipe.slides.czi.image import Kept
    from wsi_pipe.slides.czi.segments import SubBlock

    tile = SubBlock((0, 0), (8, 8), (8, 8), {}, 99, 256, 3, 0, 0)
    kept = Kept(limit_bytes=400)
    with pytest.raises(CodecError):
        kept.get(tile, b"short")
    assert kept.get(tile, bytes(192)).shape == (8, 8, 3)
    other: Callable[[int], SubBlock] = lambda i: SubBlock((0, 0), (8, 8), (8, 8), {}, i, 256, 3, 0, 0)  # noqa: E731
    for i in range(5):
        kept.get(other(i), bytes(192))
    assert kept.decoded == 6
    assert len(kept._found) == 2
    assert CziImage.reduces == (1,)
