"""NDPI read by restart intervals, on files made here: one huge JPEG a level and a list of its restart markers."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
import tifffile
from numpy.typing import NDArray

from wsi_pipe.errors import NotAPictureError, UnsupportedSlideError
from wsi_pipe.slides.tiff.reader import open_tiff

Picture = NDArray[np.uint8]

SHORT, LONG, RATIONAL, FLOAT, SLONG = 3, 4, 5, 11, 9


@pytest.fixture(scope="module")
def picture() -> Picture:
    rng = np.random.default_rng(3)
    noise = cv2.GaussianBlur(rng.normal(size=(430, 500, 3)), (0, 0), 2.5)
    return np.clip(180 + 180 * noise, 0, 255).astype(np.uint8)


def jpeg_with_restarts(pixels: Picture, interval: int, subsampling: str = "444") -> tuple[bytes, list[int], int]:
    """A JPEG stream, where its entropy-coded pieces begin, and where the last ends."""
    sampling = {"444": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444, "422": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422}[subsampling]
    options = [cv2.IMWRITE_JPEG_QUALITY, 90, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling]
    options += [cv2.IMWRITE_JPEG_RST_INTERVAL, interval]
    done, stream = cv2.imencode(".jpg", np.ascontiguousarray(pixels[..., ::-1]), options)
    assert done
    data = stream.tobytes()
    scan = data.index(b"\xff\xda")
    first = scan + 2 + struct.unpack_from(">H", data, scan + 2)[0]
    starts = [first]
    at = first
    while True:
        at = data.index(b"\xff", at)
        if 0xD0 <= data[at + 1] <= 0xD7:
            starts.append(at + 2)
        if data[at + 1] == 0xD9:
            return data, starts, at
        at += 2


def write_ndpi(
    path: Path, pages: list[dict[int, tuple[int, list[Any]]]], streams: list[bytes], start: int = 16
) -> Path:
    """An NDPI file: little-endian TIFF whose directories end in an offset of 8 bytes and the values' upper halves.

    ``start``: where the pixels begin; what lies before is a hole.
    """
    formats = {SHORT: "H", LONG: "I", RATIONAL: "II", FLOAT: "f", SLONG: "i"}
    links: list[int] = []
    with open(path, "wb") as file:

        def append(data: bytes) -> int:
            file.seek(max(file.seek(0, 2), start))
            at = file.tell()
            file.write(data + bytes(-len(data) % 8))
            return at

        file.write(b"II*\0" + bytes(12))
        links.append(4)
        for tags, stream in zip(pages, streams, strict=True):
            at = append(stream)
            tags = {**tags, 273: (LONG, [at & 0xFFFFFFFF]), 279: (LONG, [len(stream)]), 65420: (LONG, [1])}
            entries, upper = b"", b""
            for tag in sorted(tags):
                kind, values = tags[tag]
                data = b"".join(
                    struct.pack("<" + formats[kind], *(v if isinstance(v, tuple) else (v,))) for v in values
                )
                where = append(data) if len(data) > 4 else 0
                low = struct.pack("<I", where & 0xFFFFFFFF) if where else data.ljust(4, b"\0")
                entries += struct.pack("<HHI", tag, kind, len(values)) + low
                upper += struct.pack("<I", at >> 32 if tag == 273 else where >> 32)
            directory = append(struct.pack("<H", len(tags)) + entries + bytes(8) + upper)
            file.seek(links[-1])
            file.write(struct.pack("<Q", directory))
            links.append(directory + 2 + len(entries))
    return path


def page(pixels: Picture, stream: bytes, starts: list[int] | None, lens: float = 40.0) -> dict[int, Any]:
    tags: dict[int, Any] = {
        256: (LONG, [pixels.shape[1]]), 257: (LONG, [pixels.shape[0]]), 258: (SHORT, [8, 8, 8]), 259: (SHORT, [7]),
        262: (SHORT, [6]), 277: (SHORT, [3]), 278: (LONG, [pixels.shape[0]]),
        282: (RATIONAL, [(439000, 10)]), 283: (RATIONAL, [(438000, 10)]), 296: (SHORT, [3]), 65421: (FLOAT, [lens]),
    }  # fmt: skip
    if starts is not None:
        tags[65426] = (LONG, starts)
    return tags


def build(
    path: Path, picture: Picture, interval: int, subsampling: str = "444", start: int = 16, **changes: Any
) -> Path:
    """Two levels: restart markers in the first, none in the second, and a macro image."""
    stream, starts, _ = jpeg_with_restarts(picture, interval, subsampling)
    half = cv2.resize(picture, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA).astype(np.uint8)
    small, macro = simplejpeg.encode_jpeg(half, 95), simplejpeg.encode_jpeg(picture[:40, :96].copy(), 95)
    first = {**page(picture, stream, starts), **changes.get("tags", {})}
    pages = [first, page(half, small, None, 20.0), page(picture[:40, :96], macro, None, -1.0)]
    return write_ndpi(path, pages, [stream, small, macro], start)


@pytest.mark.parametrize("subsampling", ["444", "422"])
@pytest.mark.parametrize(("interval", "columns"), [(63, 1), (21, 3), (9, 7)])
def test_blocks_of_restart_intervals_are_the_whole_picture(
    tmp_path: Path, picture: Picture, interval: int, columns: int, subsampling: str
) -> None:
    # 500 px are 63 blocks of 8 px, or 32 of 16 where chroma is halved.
    if subsampling == "422":
        interval, columns = {63: (32, 1), 21: (16, 2), 9: (4, 8)}[interval]
    path = build(tmp_path / "slide.ndpi", picture, interval, subsampling)
    stream, _, _ = jpeg_with_restarts(picture, interval, subsampling)
    whole = simplejpeg.decode_jpeg(stream)
    with open_tiff(path) as slide:
        assert slide.info.vendor == "hamamatsu"
        assert slide.planes[0].blocks[0] == columns
        assert slide.planes[0].blocks[1] >= 1
        pixels = slide.read_region(0, 0, 0, 500, 430)
        if subsampling == "444":
            assert np.array_equal(pixels, whole)
        else:
            # Chroma is interpolated within a block: its outermost columns know no neighbour.
            assert np.abs(pixels.astype(int) - whole).mean() < 0.2
        plane = next(p for p in slide.planes if (p.level, p.reduce) == (0, 2))
        data = slide.fetch(plane, [(0, 0)])[0]
        block = slide.decode(plane, (0, 0), data)
        h, w = (n // 2 * 2 for n in (min(plane.block_px[1] * 2, 430), min(plane.block_px[0] * 2, 500)))
        means = whole[:h, :w].astype(float).reshape(h // 2, 2, w // 2, 2, 3).mean((1, 3))
        assert np.abs(block[: h // 2, : w // 2] - means).mean() <= 1.5


def test_facts_levels_and_macro(tmp_path: Path, picture: Picture) -> None:
    path = build(tmp_path / "slide.ndpi", picture, 21)
    with open_tiff(path) as slide:
        assert [level.size_px for level in slide.pyramid.levels] == [(500, 430), (250, 215)]
        assert slide.pyramid.mpp == pytest.approx((10000 / 43900, 10000 / 43800))
        assert slide.info.mpp_source == "tiff.XResolution (cm)"
        assert slide.info.objective_power == 40
        half = cv2.resize(picture, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA).astype(np.uint8)
        assert np.abs(slide.read_region(1, 0, 0, 250, 215).astype(int) - half).mean() < 4
        assert set(slide.associated_images()) == {"macro"}
        assert slide.associated_images()["macro"].shape == (40, 96, 3)


def test_a_file_beyond_4_gib(tmp_path: Path, picture: Picture) -> None:
    small = build(tmp_path / "small.ndpi", picture, 21)
    large = build(tmp_path / "large.ndpi", picture, 21, start=(5 << 30) + 48)
    assert large.stat().st_size > 5 << 30
    with open_tiff(small) as a, open_tiff(large) as b:
        assert a.pyramid == b.pyramid
        for level, found in enumerate(a.pyramid.levels):
            x, y = (s.read_region(level, 0, 0, *found.size_px) for s in (a, b))
            assert np.array_equal(x, y)
        assert np.array_equal(a.associated_images()["macro"], b.associated_images()["macro"])
    with tifffile.TiffFile(large) as file:
        assert file.pages[0].dataoffsets[0] > 5 << 30


@pytest.mark.parametrize(
    ("offsets", "default"), [([0, 500], 0), ([0, -700], 0), ([-500, 0, 500], 0), ([500, 1000, 0, 1500, 2000], 1000)]
)
def test_focal_planes_are_told_and_chosen(tmp_path: Path, picture: Picture, offsets: list[int], default: int) -> None:
    pictures = {offset: np.roll(picture, offset // 100, axis=0) for offset in offsets}
    streams = {offset: jpeg_with_restarts(pixels, 63) for offset, pixels in pictures.items()}
    pages = [{**page(picture, *streams[offset][:2]), 65424: (SLONG, [offset])} for offset in offsets]
    path = write_ndpi(tmp_path / "slide.ndpi", pages, [streams[offset][0] for offset in offsets])
    with open_tiff(path) as slide:
        assert len(slide.pyramid.levels) == 1
        assert f"of {len(offsets)}" in slide.info.notes[0]
        assert slide.info.notes[0].endswith(
            f"the middle one, as none was asked for (--z); its focus offset is {default}"
        )
        assert np.abs(slide.read_region(0, 0, 0, 500, 430).astype(int) - pictures[default]).mean() < 3
    for z, offset in enumerate(sorted(offsets)):
        with open_tiff(path, z=z) as slide:
            assert np.abs(slide.read_region(0, 0, 0, 500, 430).astype(int) - pictures[offset]).mean() < 3
    with pytest.raises(NotAPictureError, match=f"has {len(offsets)} focal planes"):
        open_tiff(path, z=len(offsets))


@pytest.mark.parametrize(
    ("interval", "tags", "reason"),
    [
        (20, {}, "do not divide"),
        (21, {65426: (LONG, [700, 800, 900])}, "restart markers are listed"),
        (21, {259: (SHORT, [1])}, "one JPEG strip"),
        (21, {257: (LONG, [4000])}, "restart markers are listed"),
    ],
)
def test_what_cannot_be_taken_apart_is_declined(
    tmp_path: Path, picture: Picture, interval: int, tags: dict[int, Any], reason: str
) -> None:
    path = build(tmp_path / "slide.ndpi", picture, interval, tags=tags)
    with pytest.raises(UnsupportedSlideError, match=reason):
        open_tiff(path)


def test_a_large_level_without_restart_markers_is_declined(
    tmp_path: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsi_pipe.slides.tiff.ndpi.MAX_WHOLE_PX", 10_000)
    path = build(tmp_path / "slide.ndpi", picture, 21)
    with pytest.raises(UnsupportedSlideError, match="without a list of restart markers"):
        open_tiff(path)


def test_a_damaged_list_of_markers_is_declined(tmp_path: Path, picture: Picture) -> None:
    _, starts, _ = jpeg_with_restarts(picture, 63)
    backwards = [starts[0], *reversed(starts[1:])]
    path = build(tmp_path / "slide.ndpi", picture, 63, tags={65426: (LONG, backwards)})
    with pytest.raises(UnsupportedSlideError, match=r"slide\.ndpi.*list of restart markers is not in order"):
        open_tiff(path)


def test_a_real_slide_reads_only_the_rows_it_needs(shared_slides: Path) -> None:
    with open_tiff(shared_slides / "test3-DAPI-2-387.ndpi") as slide:
        slide.read_region(0, 0, 0, 16, 16)
        before = slide.stats.bytes_fetched
        slide.read_region(0, 0, 1024, 256, 64)
        assert slide.stats.bytes_fetched - before < 100_000
        assert slide.pyramid.mpp == pytest.approx((0.2282, 0.2282), abs=1e-4)


def test_a_list_of_markers_that_is_wrong_in_one_place_is_declined_on_opening(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    noise = cv2.GaussianBlur(rng.normal(size=(3000, 192, 3)), (0, 0), 2.5)
    tall = np.clip(180 + 180 * noise, 0, 255).astype(np.uint8)
    _, starts, _ = jpeg_with_restarts(tall, 24)
    with open_tiff(build(tmp_path / "good.ndpi", tall, 24)) as slide:
        blocks = slide.planes[0].blocks[1]
        assert blocks >= 5
    # The last markers, and those near a quarter: far from the middle in both cases.
    for name, first, last in (("end", len(starts) - 40, len(starts)), ("quarter", len(starts) // 8, len(starts) // 3)):
        wrong = [at + 3 if first <= i < last else at for i, at in enumerate(starts)]
        path = build(tmp_path / f"{name}.ndpi", tall, 24, tags={65426: (LONG, wrong)})
        with pytest.raises(UnsupportedSlideError, match="block column 0, row"):
            open_tiff(path)
    mixed = [*starts[:100], *reversed(starts[100:110]), *starts[110:]]
    path = build(tmp_path / "mixed.ndpi", tall, 24, tags={65426: (LONG, mixed)})
    with pytest.raises(UnsupportedSlideError, match="not in order"):
        open_tiff(path)
