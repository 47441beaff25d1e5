"""The JPEG decoder in C against libjpeg-turbo: the same bytes, or nothing."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from wsi_pipe.config import TileSettings
from wsi_pipe.geometry import IntPair, TissueMask
from wsi_pipe.slides.base import DecodesInto
from wsi_pipe.slides.codecs import fastjpeg
from wsi_pipe.slides.codecs.decode import CodecError, JpegDecoder
from wsi_pipe.slides.codecs.fastjpeg import decode_tiles, jpeg_decoder_name, read_tiles
from wsi_pipe.slides.room import Room
from wsi_pipe.slides.tiff.reader import open_tiff
from wsi_pipe.slides.writing.write import write_pyramid
from wsi_pipe.tiles import StreamStats, stream_tiles
from wsi_pipe.tiling import plan_grids

Picture = NDArray[np.uint8]

built = pytest.mark.skipif(
    not jpeg_decoder_name().startswith("this package's own"), reason=f"decoded by {jpeg_decoder_name()}"
)


@pytest.fixture
def libjpeg_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("WSI_PIPE_JPEG", "libjpeg")
    fastjpeg._library.cache_clear()
    yield
    fastjpeg._library.cache_clear()


def drawn(width: int, height: int, seed: int = 0, grain: float = 1.2) -> Picture:
    """Blobs and grain in full range, with hard edges."""
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 256, (height, width, 3)).astype(np.float32)
    picture = (cv2.GaussianBlur(picture, (0, 0), grain) - 128) * 3 + 150 if grain else picture
    out = np.ascontiguousarray(np.clip(picture, 0, 255).astype(np.uint8))
    cv2.circle(out, (width // 2, height // 2), min(width, height) // 4, (10, 250, 30), -1)
    return out


def encoded(
    picture: Picture,
    *,
    quality: int = 85,
    subsampling: int = 2,
    restart: int = 0,
    rgb: bool = False,
    grey: bool = False,
) -> bytes:
    """A stream without a word on colour, as scanners write it; subsampling as in Pillow: 4:4:4, 4:2:2, 4:2:0."""
    image, memory = Image.fromarray(picture), io.BytesIO()
    options: dict[str, object] = {"keep_rgb": True} if rgb else {}
    (image.convert("L") if grey else image).save(
        memory, "JPEG", quality=quality, subsampling=subsampling, restart_marker_blocks=restart, **options
    )
    stream = memory.getvalue()
    if stream[2:4] in (b"\xff\xe0", b"\xff\xee"):
        stream = stream[:2] + stream[4 + int.from_bytes(stream[4:6], "big") :]
    return stream


def by_libjpeg(stream: bytes, size_px: IntPair, reduce: int, *, ycbcr: bool = True, components: int = 3) -> Picture:
    """What libjpeg-turbo makes of it, without a warning."""
    complete = JpegDecoder(size_px, components, ycbcr=ycbcr).stream(stream)
    options = {"min_height": -(-size_px[1] // reduce), "min_width": -(-size_px[0] // reduce), "min_factor": reduce}
    pixels: Picture = simplejpeg.decode_jpeg(
        complete, "RGB" if components == 3 else "GRAY", **(options if reduce > 1 else {})
    )
    return pixels


def by_us(
    stream: bytes, size_px: IntPair, reduce: int, *, ycbcr: bool = True, components: int = 3, portable: bool = False
) -> Picture | None:
    out = np.zeros((-(-size_px[1] // reduce), -(-size_px[0] // reduce), components), np.uint8)
    done = decode_tiles([stream], [out], size_px, components, ycbcr=ycbcr, reduce=reduce, portable=portable)
    return out if done[0] else None


@built
@pytest.mark.parametrize("portable", [False, True], ids=["vector", "portable"])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("reduce", [1, 2, 4, 8])
def test_pixels_are_libjpegs(reduce: int, subsampling: int, portable: bool) -> None:
    compared = 0
    for seed, (width, height) in enumerate([(256, 256), (240, 100), (97, 63), (17, 130), (8, 9), (31, 16), (33, 33)]):
        for quality in (8, 30, 60, 85, 95, 100):
            for grain in (0.7, 1.5, 6.0):
                stream = encoded(drawn(width, height, seed, grain), quality=quality, subsampling=subsampling)
                ours = by_us(stream, (width, height), reduce, portable=portable)
                assert ours is not None
                compared += 1
                np.testing.assert_array_equal(ours, by_libjpeg(stream, (width, height), reduce))
    assert compared == 7 * 6 * 3


@built
@pytest.mark.parametrize("reduce", [1, 2, 4, 8])
def test_extremes_are_libjpegs_or_left_to_it(reduce: int) -> None:
    rng = np.random.default_rng(1)
    accepted = 0
    for quality in (1, 5, 20, 50, 90, 100):
        for period in (1, 2, 4, 8):
            cells = rng.integers(0, 2, (-(-96 // period), -(-96 // period), 3)) * 255
            hard = np.kron(cells, np.ones((period, period, 1)))[:96, :96].astype(np.uint8)
            for subsampling in (0, 1, 2):
                stream = encoded(hard, quality=quality, subsampling=subsampling)
                for portable in (False, True):
                    ours = by_us(stream, (96, 96), reduce, portable=portable)
                    if ours is not None:
                        accepted += 1
                        np.testing.assert_array_equal(ours, by_libjpeg(stream, (96, 96), reduce))
    assert accepted > 90


@built
@pytest.mark.parametrize("restart", [1, 3, 16, 1000])
@pytest.mark.parametrize("subsampling", [1, 2])
def test_restart_intervals(restart: int, subsampling: int) -> None:
    stream = encoded(drawn(200, 120), subsampling=subsampling, restart=restart)
    for reduce in (1, 2, 4, 8):
        ours = by_us(stream, (200, 120), reduce)
        assert ours is not None
        np.testing.assert_array_equal(ours, by_libjpeg(stream, (200, 120), reduce))


@built
@pytest.mark.parametrize("reduce", [1, 2, 4, 8])
def test_grey_and_colour_stored_as_rgb(reduce: int) -> None:
    grey = encoded(drawn(90, 70), grey=True)
    expected = by_libjpeg(grey, (90, 70), reduce, components=1)
    ours = by_us(grey, (90, 70), reduce, components=1)
    assert ours is not None
    np.testing.assert_array_equal(ours, expected)
    # Asked for colour, grey is repeated.
    out = np.zeros((*expected.shape[:2], 3), np.uint8)
    assert decode_tiles([grey], [out], (90, 70), 1, ycbcr=False, reduce=reduce) == [True]
    np.testing.assert_array_equal(out, np.repeat(expected, 3, axis=2))
    stored = encoded(drawn(90, 70), subsampling=0, rgb=True)
    ours = by_us(stored, (90, 70), reduce, ycbcr=False)
    assert ours is not None
    np.testing.assert_array_equal(ours, by_libjpeg(stored, (90, 70), reduce, ycbcr=False))


@built
def test_tables_apart_from_the_tiles() -> None:
    stream = encoded(drawn(64, 64))
    start, end, at, marker = b"", b"", 2, 0
    while marker != 0xDA:
        marker, after = stream[at + 1], at + 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
        if marker in (0xDB, 0xC4):
            start += stream[at:after]
        else:
            end += stream[at:after]
        at = after
    short = b"\xff\xd8" + end + stream[at:]
    decoder = JpegDecoder((64, 64), 3, ycbcr=True, tables=b"\xff\xd8" + start + b"\xff\xd9")
    out = np.zeros((32, 32, 3), np.uint8)
    assert decoder.decode_into([short], [out], 2) == [True]
    np.testing.assert_array_equal(out, by_libjpeg(stream, (64, 64), 2))
    assert JpegDecoder((64, 64), 3, ycbcr=True).decode_into([short], [out], 2) == [False]


@built
def test_places_with_strides_and_nothing_beside_them() -> None:
    streams = [encoded(drawn(64, 48, seed)) for seed in range(3)]
    tile = np.full((100, 101, 3), 7, np.uint8)
    outs = [tile[3:27, 5:37], tile[30:54, 5:37], tile[70:94, 60:92]]
    assert decode_tiles(streams, outs, (64, 48), 3, ycbcr=True, reduce=2) == [True] * 3
    expected = np.full_like(tile, 7)
    for (y, x), stream in zip(((3, 5), (30, 5), (70, 60)), streams, strict=True):
        expected[y : y + 24, x : x + 32] = by_libjpeg(stream, (64, 48), 2)
    np.testing.assert_array_equal(tile, expected)
    # Data as a view, ends without a marker, and a neighbour that is damaged.
    part = memoryview(b"xx" + streams[0])[2:-2]
    outs = [np.zeros((24, 32, 3), np.uint8) for _ in range(3)]
    assert decode_tiles([part, streams[1][:500], b""], outs, (64, 48), 3, ycbcr=True, reduce=2) == [True, False, False]
    np.testing.assert_array_equal(outs[0], expected[3:27, 5:37])


@built
def test_places_that_do_not_fit_are_refused() -> None:
    stream = encoded(drawn(64, 48))
    for out in (
        np.zeros((24, 31, 3), np.uint8),
        np.zeros((24, 32, 3), np.int8),
        np.zeros((24, 32, 6), np.uint8)[:, :, ::2],
        np.zeros((24, 64, 3), np.uint8)[:, ::2],
        np.broadcast_to(np.uint8(0), (24, 32, 3)),
    ):
        with pytest.raises(ValueError, match="an array"):
            decode_tiles([stream], [out], (64, 48), 3, ycbcr=True, reduce=2)  # type: ignore[list-item]


@built
def test_what_is_unusual_is_left_to_libjpeg() -> None:
    memory = io.BytesIO()
    Image.fromarray(drawn(64, 64)).save(memory, "JPEG", progressive=True)
    assert by_us(memory.getvalue(), (64, 64), 2) is None
    memory = io.BytesIO()
    Image.fromarray(drawn(64, 64)).convert("CMYK").save(memory, "JPEG")
    assert by_us(memory.getvalue(), (64, 64), 2) is None
    stream = encoded(drawn(64, 64))
    assert by_us(stream, (64, 72), 2) is None
    assert by_us(stream, (64, 64), 2, components=1) is None
    assert by_us(stream, (64, 64), 2, ycbcr=False) is None
    assert by_us(stream, (64, 64), 2) is not None
    # Stray bytes before the end marker cost libjpeg a warning.
    assert by_us(stream[:-2] + b"\x12\x34\x56\xff\xd9", (64, 64), 2) is None


@built
def test_what_is_accepted_of_damaged_streams_is_what_libjpeg_accepts() -> None:
    chance = random.Random(4)
    accepted = refused = 0
    for round_ in range(60):
        size = chance.choice([(64, 64), (40, 25), (16, 16)])
        stream = encoded(
            drawn(*size, round_, chance.choice([0.0, 1.0, 3.0])),
            quality=chance.choice([20, 75, 95]),
            subsampling=chance.choice([0, 1, 2]),
            restart=chance.choice([0, 0, 2]),
        )
        for _ in range(40):
            data = bytearray(stream)
            for _ in range(chance.choice([1, 1, 3])):
                at = chance.randrange(len(data) or 1)
                match chance.randrange(5):
                    case 0:
                        del data[at : at + chance.randint(1, 3)]
                    case 1:
                        data[at:at] = chance.choice([b"\xff", b"\xff\xd0", b"\xff\xd9", b"\0"])
                    case 2:
                        del data[max(at, 2) :]
                    case _:
                        data[at : at + 1] = bytes(b ^ 1 << chance.randrange(8) for b in data[at : at + 1])
            reduce = chance.choice([1, 2, 4, 8])
            ours = by_us(bytes(data), size, reduce, portable=chance.random() < 0.3)
            if ours is None:
                refused += 1
                continue
            accepted += 1
            np.testing.assert_array_equal(ours, by_libjpeg(bytes(data), size, reduce))
    assert accepted > 300
    assert refused > 300


@built
def test_tiles_are_read_out_of_a_file_and_decoded_in_one_call(tmp_path: Path) -> None:
    """In any order, side by side or not, twice the same, missing, damaged, or beyond the end of the file."""
    streams = [encoded(drawn(64, 48, seed), quality=50 + 5 * seed) for seed in range(6)]
    broken = bytearray(streams[5])
    broken[len(broken) // 2 :] = b""
    pieces = [b"head", streams[0], streams[1], b"gap", streams[2], bytes(broken), streams[3]]
    path = tmp_path / "tiles"
    path.write_bytes(b"".join(pieces))
    ends = np.cumsum([len(piece) for piece in pieces])
    at = [(int(end) - len(piece), len(piece)) for piece, end in zip(pieces, ends, strict=True)]
    size = path.stat().st_size
    #        stream 3, 0, missing, 1, 2, 0 again, damaged, cut by the end, far beyond it
    spans = [at[6], at[1], (0, 0), at[2], at[4], at[1], at[5], (at[6][0] + 9, at[6][1]), (size + 5, 100)]
    expected = [3, 0, None, 1, 2, 0, None, None, None]
    tile = np.full((2, 100, 101, 3), 7, np.uint8)
    places = np.array([(5, 3), (5, 30), (60, 70), (0, 0), (60, 0)])
    numbers = np.array([0, 0, 0, 1, 1])
    alone = [np.zeros((24, 32, 3), np.uint8) for _ in range(4)]
    starts = (numbers * 100 * 101 + places[:, 1] * 101 + places[:, 0]) * 3
    room = Room.at(tile, starts, (32, 24)).join(Room.of(alone, (32, 24)))
    offsets, sizes = (np.array(values, np.int64) for values in zip(*spans, strict=True))
    with path.open("rb") as file:
        found = read_tiles(file.fileno(), offsets, sizes, room, (64, 48), 3, ycbcr=True, reduce=2)
    assert found.done.tolist() == [number is not None for number in expected]
    # Two runs of neighbours and the tile that is asked for twice, and the two that are not there.
    assert found.requests == 5
    assert found.read_s >= 0
    wanted = np.full_like(tile, 7)
    for i, (x, y) in enumerate(places.tolist()):
        number = expected[i]
        if number is not None:
            wanted[numbers[i], y : y + 24, x : x + 32] = by_libjpeg(streams[number], (64, 48), 2)
    untouched = np.ones(tile.shape, bool)
    untouched[0, 70:94, 60:92] = False  # undefined: not done
    np.testing.assert_array_equal(tile[untouched], wanted[untouched])
    np.testing.assert_array_equal(alone[0], by_libjpeg(streams[0], (64, 48), 2))
    closed = read_tiles(-1, offsets, sizes, room, (64, 48), 3, ycbcr=True, reduce=2)
    assert not closed.done.any()


def test_blocks_go_nowhere_but_into_their_arrays() -> None:
    tiles = np.zeros((2, 64, 64, 3), np.uint8)
    last = ((64 + 40) * 64 + 32) * 3  # in the second tile, 40 rows down and 32 pixels across
    assert len(Room.at(tiles, np.array([0, last]), (32, 24))) == 2
    for offset in (-1, last + 1, tiles.nbytes):
        with pytest.raises(ValueError, match="do not lie in tiles"):
            Room.at(tiles, np.array([0, offset]), (32, 24))
    for wrong in (tiles[:, ::2], tiles.astype(np.int8), tiles[0], np.broadcast_to(np.uint8(0), tiles.shape)):
        with pytest.raises(ValueError, match="blocks do not go into"):
            Room.at(wrong, np.array([0]), (32, 24))  # type: ignore[arg-type]
    for block in (
        np.zeros((24, 31, 3), np.uint8),
        np.zeros((24, 64, 3), np.uint8)[:, ::2],
        np.zeros((24, 32, 3), "i1"),
    ):
        with pytest.raises(ValueError, match="block"):
            Room.of([block], (32, 24))
    stack = np.zeros((3, 24, 32, 3), np.uint8)
    room = Room.stack(stack)
    assert room.addresses.tolist() == [block.ctypes.data for block in stack]
    assert room.size_px == (32, 24)
    for wrong in (
        stack[:, ::2],
        stack.astype(np.int8),
        stack[0],
        stack[..., :1],
        np.broadcast_to(stack[:1], (2, 24, 32, 3)),
    ):
        with pytest.raises(ValueError, match="block"):
            Room.stack(wrong)  # type: ignore[arg-type]
    room = Room.of([np.zeros((24, 32, 3), np.uint8)], (32, 24))
    with pytest.raises(ValueError, match="room for 1 blocks"):
        read_tiles(0, np.array([1, 1]), np.array([1, 1]), room, (64, 48), 3, ycbcr=True, reduce=2)
    with pytest.raises(ValueError, match="room for 1 blocks"):
        read_tiles(0, np.array([1]), np.array([1]), room, (64, 48), 3, ycbcr=True, reduce=1)


@built
def test_threads_share_nothing() -> None:
    streams = [encoded(drawn(128, 128, seed), quality=60 + seed) for seed in range(24)]
    expected = [by_libjpeg(stream, (128, 128), 2) for stream in streams]

    def read(order: list[int]) -> bool:
        outs = [np.zeros((64, 64, 3), np.uint8) for _ in order]
        done = decode_tiles([streams[i] for i in order], outs, (128, 128), 3, ycbcr=True, reduce=2)
        return all(done) and all(np.array_equal(out, expected[i]) for out, i in zip(outs, order, strict=True))

    chance = random.Random(2)
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, [chance.sample(range(24), 24) for _ in range(40)]))


def slide_tiles(path: Path, stats: StreamStats | None = None) -> tuple[list[Picture], int]:
    with open_tiff(path, mpp=0.25) as slide:
        assert isinstance(slide, DecodesInto)
        width, height = slide.pyramid.size_l0
        mask = TissueMask(np.ones((-(-height // 32), -(-width // 32)), bool), (32.0, 32.0))
        tiles = []
        for grid in plan_grids(slide.pyramid, mask, TileSettings(resolutions=(0.5, 2.0), tile_px=128)):
            for batch in stream_tiles(slide, grid, batch_size=5, threads=2, stats=stats):
                tiles += list(batch.pixels)
        return tiles, slide.stats.blocks_decoded


@pytest.fixture
def slide_path(tmp_path: Path) -> Path:
    path = tmp_path / "slide.svs"
    picture = drawn(1100, 900, grain=2.0)
    write_pyramid(path, [picture, cv2.resize(picture, (275, 225))], mpp=0.25, tile_px=128, missing={(0, 3, 2)})
    return path


@built
def test_tiles_of_a_slide_are_the_same_either_way(slide_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stats, plain = StreamStats(), StreamStats()
    tiles, decoded = slide_tiles(slide_path, stats)
    monkeypatch.setenv("WSI_PIPE_JPEG", "libjpeg")
    fastjpeg._library.cache_clear()
    try:
        assert "WSI_PIPE_JPEG" in jpeg_decoder_name()
        others, decoded_by_libjpeg = slide_tiles(slide_path, plain)
    finally:
        fastjpeg._library.cache_clear()
    assert decoded == decoded_by_libjpeg
    assert (stats.tiles, stats.blocks) == (plain.tiles, plain.blocks)
    assert len(tiles) == len(others) > 8
    assert all(np.array_equal(a, b) for a, b in zip(tiles, others, strict=True))


@built
def test_blocks_decoded_at_once_are_those_decoded_one_by_one(slide_path: Path) -> None:
    with open_tiff(slide_path, mpp=0.25) as slide:
        for plane in slide.planes:
            if plane.reduce == 1:
                continue
            cells = [(c, r) for r in range(plane.blocks[1]) for c in range(plane.blocks[0])]
            fetched = slide.fetch(plane, cells)
            cells = [cell for cell, data in zip(cells, fetched, strict=True) if data is not None]
            datas = [data for data in fetched if data is not None]
            before = slide.stats.blocks_decoded
            outs = [np.zeros((plane.block_px[1], plane.block_px[0], 3), np.uint8) for _ in cells]
            done = slide.decode_into(plane, cells, datas, outs)
            assert slide.stats.blocks_decoded - before == sum(done)
            # Blocks at the edge are clipped, so they come one by one.
            whole = [(c + 1) * plane.block_px[0] <= plane.size_px[0] and (r + 1) * plane.block_px[1] <= plane.size_px[1]
                     for c, r in cells]  # fmt: skip
            assert done == whole
            for cell, data, out, good in zip(cells, datas, outs, done, strict=True):
                if good:
                    np.testing.assert_array_equal(out, slide.decode(plane, cell, data))


@pytest.mark.usefixtures("libjpeg_alone")
def test_without_it_everything_is_left_to_libjpeg(slide_path: Path) -> None:
    stream = encoded(drawn(64, 64))
    assert by_us(stream, (64, 64), 2) is None
    assert JpegDecoder((64, 64), 3, ycbcr=True).decode(stream, 2).shape == (32, 32, 3)
    tiles, decoded = slide_tiles(slide_path)
    assert len(tiles) > 8
    assert decoded > 8


@built
def test_errors_are_libjpegs() -> None:
    stream = encoded(drawn(64, 64))
    with pytest.raises(CodecError, match="premature end of data segment"):
        JpegDecoder((64, 64), 3, ycbcr=True).decode(stream[:-200], 2)


def test_what_another_version_left_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastjpeg, "__file__", str(tmp_path / "fastjpeg.py"))
    fastjpeg._library.cache_clear()
    try:
        assert "not built" in jpeg_decoder_name()
        (tmp_path / f"_jpeg{EXTENSION_SUFFIXES[0]}").write_bytes(b"no library")
        fastjpeg._library.cache_clear()
        assert "not built" in jpeg_decoder_name()
    finally:
        fastjpeg._library.cache_clear()
