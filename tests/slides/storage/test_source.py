"""Byte ranges of files and URLs, on a server of our own that counts what it sends."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import cv2
import fsspec
import numpy as np
import pytest
import simplejpeg
import tifffile
from hypothesis import given
from hypothesis import strategies as st

from wsi_pipe.config import TileSettings
from wsi_pipe.errors import SlideOpenError, SlideReadError, UnsupportedSlideError
from wsi_pipe.geometry import TissueMask
from wsi_pipe.overview import read_overview
from wsi_pipe.slides.base import ReadStats
from wsi_pipe.slides.dicom.reader import open_dicom
from wsi_pipe.slides.storage import remote
from wsi_pipe.slides.storage.remote import RemoteSource, coalesce
from wsi_pipe.slides.storage.source import FileSource, SourceFile, is_url, open_source, slide_fingerprint
from wsi_pipe.slides.tiff.reader import open_tiff
from wsi_pipe.tiles import stream_tiles
from wsi_pipe.tiling import plan_grids
from wsi_pipe.tissue import find_tissue


class Server(ThreadingHTTPServer):
    """Serves ``files`` with byte ranges; ``mode`` makes it misbehave."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.mode = "ranges"
        self.sent = 0
        self.requests = 0
        self.lock = threading.Lock()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        data = self.server.files.get(self.path.lstrip("/"))
        mode = self.server.mode
        if data is None or mode == "gone":
            self.reply(404, b"", body)
            return
        match = re.match(r"bytes=(\d+)-(\d+)$", self.headers.get("Range", ""))
        if not match or mode == "whole":
            self.reply(200, data, body)
            return
        start, stop = int(match[1]), min(int(match[2]) + 1, len(data))
        headers = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
        if mode == "cut" and stop - start > 64:
            # The length is announced, and half of it comes before the connection ends.
            self.reply(206, data[start:stop], body, headers, cut=True)
        elif mode == "short" and stop - start > 64:
            self.reply(206, data[start : stop - 10], body, headers)
        elif mode == "flaky" and self.server.requests % 2:
            self.reply(503, b"", body)
        else:
            self.reply(206, data[start:stop], body, headers)

    def reply(self, code: int, data: bytes, body: bool, headers: Any = None, *, cut: bool = False) -> None:
        with self.server.lock:
            self.server.requests += 1
            self.server.sent += len(data) if body else 0
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), "Accept-Ranges": "bytes", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.01)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()
    fsspec.filesystem("http").clear_instance_cache()


BYTES = np.random.default_rng(0).bytes(1 << 20)


@pytest.fixture(params=["file", "http", "memory"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    if request.param == "file":
        path = tmp_path / "data.bin"
        path.write_bytes(BYTES)
        opened = open_source(path)
    elif request.param == "memory":
        fsspec.filesystem("memory").pipe("/data.bin", BYTES)
        opened = open_source("memory://data.bin")
    else:
        running: Server = request.getfixturevalue("server")
        running.files["data.bin"] = BYTES
        opened = open_source(running.url("data.bin"))
    yield opened
    opened.close()


def test_every_source_gives_the_same_bytes(source: Any) -> None:
    assert source.size == len(BYTES)
    ranges = [(0, 10), (5, 200_000), (len(BYTES) - 7, 7), (300_000, 0), (5, 200_000), (70_000, 1)]
    assert source.read_many(ranges) == [BYTES[o : o + n] for o, n in ranges]
    for offset, length in ranges:
        assert source.read(offset, length) == BYTES[offset : offset + length]


def test_every_source_refuses_what_lies_outside(source: Any) -> None:
    for offset, length in ((len(BYTES), 1), (-1, 4), (0, len(BYTES) + 1), (1 << 40, 1), (3, -1)):
        with pytest.raises(SlideReadError, match=re.escape(source.name)):
            source.read(offset, length)
        with pytest.raises(SlideReadError):
            source.read_many([(0, 4), (offset, length)])


def test_a_closed_source_is_an_error(source: Any) -> None:
    source.close()
    source.close()
    with pytest.raises(SlideReadError, match="closed"):
        source.read(0, 4)


def test_every_source_serves_many_threads(source: Any) -> None:
    rng = np.random.default_rng(1)
    ranges = [
        (int(o), int(n)) for o, n in zip(rng.integers(0, 900_000, 200), rng.integers(1, 100_000, 200), strict=True)
    ]
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda r: source.read_many([r])[0], ranges))
    assert answers == [BYTES[o : o + n] for o, n in ranges]


def test_a_source_is_a_file_for_libraries(source: Any) -> None:
    with SourceFile(source, limit=200_000) as handle:
        assert handle.read(4) == BYTES[:4]
        assert handle.seek(-10, 2) == len(BYTES) - 10
        assert handle.read() == BYTES[-10:]
        assert handle.read(5) == b""
        handle.seek(0)
        with pytest.raises(SlideOpenError, match="out of bounds"):
            handle.read()


@given(
    st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 900)), max_size=30),
    st.integers(0, 500),
    st.integers(1, 3000),
)
def test_coalesced_spans_cover_every_range_and_little_else(ranges: list[Any], gap: int, longest: int) -> None:
    spans = coalesce(sorted(set(ranges)), gap, longest)
    assert [r for _, members in spans for r in members] == sorted(set(ranges))
    for (start, length), members in spans:
        assert all(start <= o and o + n <= start + length for o, n in members)
        assert length <= longest or len(members) == 1
        covered = np.zeros(length, bool)
        for o, n in members:
            covered[o - start : o - start + n] = True
        # No hole within a span is wider than the gap.
        holes = np.diff(np.flatnonzero(np.concatenate([[True], covered, [True]]))) - 1
        assert holes.max() <= gap


def test_near_ranges_share_a_request(server: Server) -> None:
    server.files["data.bin"] = BYTES
    source = open_source(server.url("data.bin"))
    before = server.requests
    near = [(100_000 + 3000 * i, 2000) for i in range(20)]
    assert source.read_many([*near, (900_000, 100)]) == [BYTES[o : o + n] for o, n in [*near, (900_000, 100)]]
    assert server.requests - before == 2
    source.close()


def test_the_cache_answers_again_and_stays_bounded(server: Server) -> None:
    server.files["data.bin"] = BYTES
    source = RemoteSource(server.url("data.bin"), ReadStats(), cache_bytes=200_000)
    source.read_many([(0, 40_000)])
    before = server.requests
    source.read_many([(0, 40_000)])
    assert server.requests == before
    for i in range(20):
        source.read_many([(i * 50_000, 45_000)])
        assert source._cached_bytes == sum(map(len, source._cache.values())) <= 200_000
    source.read_many([(0, 40_000)])
    assert server.requests > before + 20
    source.close()


def test_counts_are_what_the_server_sent(server: Server) -> None:
    server.files["data.bin"] = BYTES
    stats = ReadStats()
    source = open_source(server.url("data.bin"), stats)
    before = (server.sent, server.requests)
    source.read_many([(0, 1000), (500_000, 300_000)])
    assert stats.bytes_fetched == server.sent - before[0] == 301_000
    assert stats.requests == server.requests - before[1] == 2
    source.close()


def test_a_server_without_ranges_is_declined(server: Server) -> None:
    server.files["data.bin"] = BYTES
    server.mode = "whole"
    with pytest.raises(UnsupportedSlideError, match="byte ranges") as caught:
        open_source(server.url("data.bin"))
    assert server.url("data.bin") in str(caught.value)


def test_urls_that_cannot_be_opened(server: Server) -> None:
    server.files["empty"] = b""
    with pytest.raises(SlideOpenError, match="404") as caught:
        open_source(server.url("none.svs"))
    assert "check the URL" in str(caught.value)
    with pytest.raises(SlideOpenError, match="empty"):
        open_source(server.url("empty"))
    with pytest.raises(SlideOpenError, match="nosuch"):
        open_source("nosuch://bucket/slide.svs")
    with pytest.raises(SlideOpenError, match="cannot be reached"):
        open_source("http://127.0.0.1:9/slide.svs")


@pytest.mark.parametrize("mode", ["cut", "short", "gone"])
def test_a_source_that_dies_half_way_names_the_url(server: Server, mode: str) -> None:
    server.files["data.bin"] = BYTES
    source = open_source(server.url("data.bin"))
    assert source.read(0, 100) == BYTES[:100]
    server.mode = mode
    with pytest.raises(SlideReadError, match="attempts") as caught:
        source.read_many([(500_000, 5000)])
    assert server.url("data.bin") in str(caught.value)
    assert "run again" in str(caught.value)
    # What was cached still comes, and the source recovers with the server.
    assert source.read(0, 100) == BYTES[:100]
    server.mode = "ranges"
    assert source.read_many([(500_000, 5000)]) == [BYTES[500_000:505_000]]
    source.close()


def test_a_server_that_fails_now_and_then_is_asked_again(server: Server) -> None:
    server.files["data.bin"] = BYTES
    source = open_source(server.url("data.bin"))
    server.mode = "flaky"
    for i in range(4):
        assert source.read_many([(i * 200_000, 90_000)]) == [BYTES[i * 200_000 : i * 200_000 + 90_000]]
    source.close()


def test_fingerprints_follow_size_ends_and_levels(tmp_path: Path) -> None:
    def of(data: bytes, sizes: list[tuple[int, int]]) -> str:
        path = tmp_path / "x"
        path.write_bytes(data)
        source = FileSource(path, ReadStats())
        try:
            return slide_fingerprint([source], sizes)
        finally:
            source.close()

    data = bytes(3 << 20)
    base = of(data, [(8, 8)])
    assert of(data, [(8, 8)]) == base
    assert of(data[:-1] + b"x", [(8, 8)]) != base
    assert of(b"x" + data[1:], [(8, 8)]) != base
    assert of(data + b"\0", [(8, 8)]) != base
    assert of(data, [(8, 8), (4, 4)]) != base
    assert of(data[: 3 << 19] + b"x" + data[(3 << 19) + 1 :], [(8, 8)]) == base


def test_urls_and_paths_are_told_apart() -> None:
    assert is_url("http://host/slide.svs")
    assert is_url("s3://bucket/slide.svs")
    assert not is_url("/data/slide.svs")
    assert not is_url(Path("http://host"))


def repeated_tile_slide(path: Path) -> None:
    """16,384 px at 0.25 um/px, levels 1, 4 and 16: tiles of the size that real ones have, a few of them many times."""
    rng = np.random.default_rng(2)
    noise = cv2.GaussianBlur(rng.normal(size=(1024, 1024, 3)), (0, 0), 1.0)
    picture = np.clip(190 + 80 * noise, 0, 255).astype(np.uint8)
    tiles = [
        simplejpeg.encode_jpeg(picture[y : y + 256, x : x + 256].copy(), 85, colorsubsampling="422")
        for y in range(0, 1024, 256)
        for x in range(0, 1024, 256)
    ]
    options: dict[str, Any] = {"tile": (256, 256), "photometric": "ycbcr", "subsampling": (2, 1), "metadata": None}
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for side in (16384, 4096, 1024):
            count = (side // 256) ** 2
            file.write(
                (tiles[i % 16] for i in range(count)),
                shape=(side, side, 3),
                dtype=np.uint8,
                compression="jpeg",
                description=f"Aperio x\n{side}x{side} Q=85|AppMag = 40|MPP = 0.25",
                subfiletype=0 if side == 16384 else 1,
                **options,
            )


def test_a_5x_pass_over_a_remote_40x_slide_fetches_a_tenth_at_most(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "slide.svs"
    repeated_tile_slide(path)
    server.files["slide.svs"] = path.read_bytes()
    size = path.stat().st_size
    assert size > 50 << 20
    with open_tiff(server.url("slide.svs")) as slide, open_tiff(path) as local:
        assert slide.pyramid == local.pyramid
        assert slide.info.fingerprint == local.info.fingerprint
        # The stages as a job runs them, and the most tiles that there can be: tissue everywhere.
        overview = read_overview(slide)
        find_tissue(overview.rgb, overview.um_per_px, overview.scale_l0)
        mask = TissueMask(np.ones(overview.rgb.shape[:2], bool), overview.scale_l0)
        (grid,) = plan_grids(slide.pyramid, mask, TileSettings(resolutions=(2.0,)))
        assert len(grid) == 64
        tiles = np.concatenate([batch.pixels for batch in stream_tiles(slide, grid)])
        assert np.array_equal(tiles, np.concatenate([batch.pixels for batch in stream_tiles(local, grid)]))
        print(f"{server.sent} of {size} bytes ({server.sent / size:.1%}) in {server.requests} requests")
        assert server.sent < 0.1 * size
        assert server.requests < 60
        assert slide.stats.bytes_fetched <= server.sent


def test_a_remote_slide_that_dies_half_way_names_the_url(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "slide.svs"
    picture = np.random.default_rng(0).integers(0, 255, (600, 600, 3), dtype=np.uint8)
    tifffile.imwrite(path, picture, tile=(128, 128), photometric="rgb", metadata=None)
    server.files["slide.svs"] = path.read_bytes()
    with open_tiff(server.url("slide.svs")) as slide:
        assert np.array_equal(slide.read_region(0, 0, 0, 128, 128), picture[:128, :128])
        server.mode = "gone"
        with pytest.raises(SlideReadError, match=r"127\.0\.0\.1"):
            slide.read_region(0, 0, 0, 600, 600)


def test_a_dicom_series_behind_urls(server: Server, shared_slides: Path) -> None:
    folder = shared_slides / "CMU-1-Small-Region-dicom"
    names = sorted(path.name for path in folder.iterdir())
    for name in names:
        server.files[f"series/{name}"] = (folder / name).read_bytes()
    url = server.url("series/level-2-frames-0-4.dcm")
    with pytest.raises(UnsupportedSlideError, match="cannot be listed"):
        open_dicom(url)
    index = "".join(f'<a href="{name}">{name}</a>' for name in names)
    server.files["series/"] = f"<html>{index}</html>".encode()
    with open_dicom(url) as slide, open_dicom(folder / "level-2-frames-0-4.dcm") as local:
        assert slide.pyramid == local.pyramid
        assert slide.info.fingerprint == local.info.fingerprint
        assert np.array_equal(slide.read_region(1, 300, 300, 400, 400), local.read_region(1, 300, 300, 400, 400))
