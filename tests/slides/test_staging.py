"""Remote slides: by byte ranges where the format allows, else by a local copy; on a server of our own."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import cv2
import fsspec
import numpy as np
import pytest

from wsi_pipe.errors import OutputError, SlideOpenError, UnsupportedSlideError
from wsi_pipe.slides import open_slide, remote, staging
from wsi_pipe.slides.staging import CACHE_VARIABLE, default_cache_dir, stage
from wsi_pipe.slides.write import write_pyramid

PICTURE = np.asarray(
    cv2.resize(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8), (1600, 1200)), np.uint8
)


class Server(ThreadingHTTPServer):
    """Serves ``files``. ranges: understands byte ranges. failures: how many of the next downloads break off."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.etag = "one"
        self.ranges = True
        self.failures = 0
        self.sent = 0

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
        data = self.server.files.get(self.path.lstrip("/").split("?")[0])
        code, extra = 200, {"ETag": self.server.etag}
        if data is None:
            code, data = 404, b""
        match = re.match(r"bytes=(\d+)-(\d+)$", self.headers.get("Range", ""))
        if match and self.server.ranges and code == 200:
            total, start = len(data), int(match[1])
            data, code = data[start : int(match[2]) + 1], 206
            extra["Content-Range"] = f"bytes {start}-{start + len(data) - 1}/{total}"
        if self.server.ranges:
            extra["Accept-Ranges"] = "bytes"
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **extra}.items():
            self.send_header(name, value)
        self.end_headers()
        if not body:
            return
        if code == 200 and self.server.failures:
            self.server.failures -= 1
            self.close_connection = True
            data = data[: len(data) // 2]
        self.server.sent += len(data)
        self.wfile.write(data)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(staging, "PAUSE_S", 0.01)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()
    fsspec.filesystem("http").clear_instance_cache()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def copies(cache: Path) -> list[Path]:
    return sorted((cache / "slides").iterdir()) if (cache / "slides").is_dir() else []


def png() -> bytes:
    return bytes(cv2.imencode(".png", PICTURE[..., ::-1])[1])


def test_a_tiled_tiff_is_read_by_ranges_and_not_copied(server: Server, cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.svs"
    noise = np.random.default_rng(1).integers(0, 256, (2048, 2048, 3), np.uint8)
    write_pyramid(path, [noise, noise[::4, ::4]], mpp=0.25)
    server.files["a.svs"] = path.read_bytes()
    with closing(open_slide(server.url("a.svs"), cache_dir=cache)) as slide, closing(open_slide(path)) as local:
        assert slide.info.reader == "tiff"
        assert slide.info.path == server.url("a.svs")
        assert slide.info.fingerprint == local.info.fingerprint
        assert np.array_equal(slide.read_region(1, 0, 0, 512, 512), local.read_region(1, 0, 0, 512, 512))
        # One byte was asked for to see whether the server gives ranges.
        assert slide.stats.bytes_fetched == server.sent - 1
    assert copies(cache) == []


def test_a_plain_image_is_copied_once_and_said_so(server: Server, cache: Path) -> None:
    server.files["my picture.png"] = png()
    url = server.url("my%20picture.png")
    server.files["my%20picture.png"] = png()
    with closing(open_slide(url, cache_dir=cache)) as slide:
        assert slide.info.reader == "image"
        assert slide.info.path == url
        assert "not read by byte ranges (is not a TIFF file), so copied to" in slide.info.reader_reason
        assert np.array_equal(slide.read_region(0, 0, 0, 1600, 1200), PICTURE)
    sent = server.sent
    with closing(open_slide(url, cache_dir=cache)) as slide:
        assert "found at" in slide.info.reader_reason
    assert server.sent - sent < len(png()) / 2
    (copy,) = copies(cache)
    assert copy.read_bytes() == png()
    assert copy.suffix == ".png"


def test_openslide_reads_a_copy(server: Server, cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.svs"
    write_pyramid(path, [PICTURE], mpp=0.25)
    server.files["a.svs"] = path.read_bytes()
    with closing(open_slide(server.url("a.svs?token=x"), reader="openslide", cache_dir=cache)) as slide:
        assert slide.info.reader == "openslide"
        assert slide.pyramid.size_l0 == (1600, 1200)
    (copy,) = copies(cache)
    assert copy.name.endswith("-a.svs")


def test_a_server_without_ranges_gets_a_copy_made(server: Server, cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.svs"
    write_pyramid(path, [PICTURE], mpp=0.25)
    server.files["a.svs"] = path.read_bytes()
    server.ranges = False
    with closing(open_slide(server.url("a.svs"), cache_dir=cache)) as slide, closing(open_slide(path)) as local:
        assert slide.info.reader == "tiff"
        assert "the server does not give byte ranges" in slide.info.reader_reason
        assert np.array_equal(slide.read_region(0, 0, 0, 1600, 1200), local.read_region(0, 0, 0, 1600, 1200))
    assert len(copies(cache)) == 1


def test_a_file_that_changed_at_its_url_is_copied_anew(server: Server, cache: Path) -> None:
    server.files["a.png"] = png()
    first = stage(server.url("a.png"), cache)
    server.etag = "two"
    second = stage(server.url("a.png"), cache)
    assert first.fetched
    assert second.fetched
    assert first.path != second.path


def test_a_broken_download_is_tried_again(server: Server, cache: Path) -> None:
    server.files["a.png"] = png()
    server.failures = 2
    assert stage(server.url("a.png"), cache).path.read_bytes() == png()


def test_a_download_that_never_ends_well_leaves_nothing_behind(server: Server, cache: Path) -> None:
    server.files["a.png"] = png()
    server.failures = 99
    with pytest.raises(SlideOpenError, match="check the connection") as caught:
        stage(server.url("a.png"), cache)
    assert server.url("a.png") in str(caught.value)
    assert copies(cache) == []


def test_what_is_not_there_and_what_cannot_be_copied(server: Server, cache: Path) -> None:
    with pytest.raises(SlideOpenError, match="cannot be reached"):
        open_slide(server.url("gone.png"), cache_dir=cache)
    server.files["empty.png"] = b""
    with pytest.raises(SlideOpenError, match="empty"):
        open_slide(server.url("empty.png"), cache_dir=cache)
    for name in ("a.mrxs", "a.dcm", "a.vms"):
        server.files[name] = b"x" * 5000
        with pytest.raises(SlideOpenError, match="files beside this one"):
            open_slide(server.url(name), cache_dir=cache)
    server.files["note.svs"] = b"hello " * 2000
    with pytest.raises(UnsupportedSlideError, match="no reader understands it") as caught:
        open_slide(server.url("note.svs"), cache_dir=cache)
    assert str(caught.value).startswith(server.url("note.svs"))
    with pytest.raises(SlideOpenError, match="nosuch"):
        open_slide("nosuch://bucket/a.svs", cache_dir=cache)


def test_any_fsspec_file_system_will_do(cache: Path) -> None:
    files = fsspec.filesystem("memory")
    files.pipe_file("/slides/a.png", png())
    try:
        with closing(open_slide("memory://slides/a.png", cache_dir=cache)) as slide:
            assert slide.pyramid.size_l0 == (1600, 1200)
    finally:
        files.rm("/slides", recursive=True)


def test_the_cache_drops_what_was_unused_longest(server: Server, cache: Path) -> None:
    data = png()
    for name in "abcd":
        server.files[f"{name}.png"] = data
    limit = 3 * len(data)
    paths = {name: stage(server.url(f"{name}.png"), cache, limit_bytes=limit).path for name in "abc"}
    for age, name in ((30, "b"), (20, "a"), (10, "c")):
        os.utime(paths[name], (time.time() - age,) * 2)
    assert not stage(server.url("b.png"), cache, limit_bytes=limit).fetched
    paths["d"] = stage(server.url("d.png"), cache, limit_bytes=limit).path
    assert {name: path.exists() for name, path in paths.items()} == {"a": False, "b": True, "c": True, "d": True}
    with pytest.raises(SlideOpenError, match="more than the cache"):
        stage(server.url("a.png"), cache, limit_bytes=len(data) - 1)


def test_leftovers_of_dead_runs_go_and_those_of_living_ones_stay(server: Server, cache: Path) -> None:
    folder = cache / "slides"
    folder.mkdir(parents=True)
    old, new = folder / ".x.partial", folder / ".y.partial"
    for path in (old, new):
        path.write_bytes(b"half a slide")
    os.utime(old, (time.time() - 2 * staging.STALE_S,) * 2)
    server.files["a.png"] = png()
    stage(server.url("a.png"), cache)
    assert not old.exists()
    assert new.exists()


def test_a_dropped_copy_stays_readable_while_it_is_open(server: Server, cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    write_pyramid(path, [PICTURE], mpp=0.25, compression="deflate", style="generic")
    server.files["a.tif"] = path.read_bytes()
    server.ranges = False
    with closing(open_slide(server.url("a.tif"), cache_dir=cache)) as slide:
        for copy in copies(cache):
            copy.unlink()
        assert np.array_equal(slide.read_region(0, 0, 0, 1600, 1200), PICTURE)


def test_a_cache_that_cannot_be_written(server: Server, tmp_path: Path) -> None:
    server.files["a.png"] = png()
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        stage(server.url("a.png"), tmp_path / "file")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "wsi-pipe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "wsi-pipe"
