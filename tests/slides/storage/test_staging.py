"""Remote slides: by byte ranges where the format allows, else by a local copy; on a server of our own."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import cv2
import fsspec
import numpy as np
import pytest

from wsi_pipe.config import CacheSettings, ExtractSettings, JobSettings, TileSettings
from wsi_pipe.errors import SlideOpenError, UnsupportedSlideError
from wsi_pipe.execute import Where
from wsi_pipe.job import open_job
from wsi_pipe.job.dispatch import dispatch
from wsi_pipe.manifest import SlideEntry
from wsi_pipe.slides import open_slide
from wsi_pipe.slides.base import Slide
from wsi_pipe.slides.storage import in_use, remote, run_folder, staging, transfer
from wsi_pipe.slides.storage.in_use import alone, keep_copy
from wsi_pipe.slides.storage.staging import CACHE_VARIABLE, default_cache_dir, stage
from wsi_pipe.slides.writing.write import write_pyramid
from wsi_pipe.stopping import StopRequested, belongs_to

PICTURE = np.asarray(
    cv2.resize(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8), (1600, 1200)), np.uint8
)


class Server(ThreadingHTTPServer):
    """Serves ``files``. ranges: understands byte ranges. failures: how many of the next downloads break off.

    pause_s: before a download goes on. whole: what was asked for without a range.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.etag = "one"
        self.ranges = True
        self.failures = 0
        self.pause_s = 0.0
        self.sent = 0
        self.whole: list[str] = []
        self.sized, self.lies, self.drips = True, 0, False

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
        if not self.server.sized:
            # As of a page that is made while it is sent: its size is known when it is over.
            self.close_connection = True
        told = {"Content-Length": str(len(data) + self.server.lies)} if self.server.sized else {"Connection": "close"}
        for name, value in {**told, **extra}.items():
            self.send_header(name, value)
        self.end_headers()
        if not body:
            return
        if self.server.drips:
            for at in range(len(data)):
                self.wfile.write(data[at : at + 1])
                time.sleep(0.02)
            return
        if code == 200:
            self.server.whole.append(self.path.lstrip("/"))
            time.sleep(self.server.pause_s)
        if code == 200 and self.server.failures:
            self.server.failures -= 1
            self.close_connection = True
            data = data[: len(data) // 2]
        self.server.sent += len(data)
        self.wfile.write(data)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(transfer, "PAUSE_S", 0.01)
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
    found = sorted((cache / "slides").iterdir()) if (cache / "slides").is_dir() else []
    return [path for path in found if not path.name.endswith(".use")]


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


Fetch = Callable[[str, str], None]


def change_fetching(monkeypatch: pytest.MonkeyPatch, change: Callable[[Fetch, str, str], None]) -> None:
    """Have ``change`` copy files, with the real way to do so at hand."""
    real = remote.open_url

    class Files:
        def __init__(self, files: Any) -> None:
            self.files = files

        def get_file(self, inner: str, local: str, **options: Any) -> None:
            change(partial(self.files.get_file, **options), inner, local)

    def open_url(url: str) -> tuple[Any, str, dict[str, Any]]:
        files, inner, facts = real(url)
        return Files(files), inner, facts

    monkeypatch.setattr(remote, "open_url", open_url)


MARKING = """
import sys, time
from pathlib import Path
from wsi_pipe.slides.storage.in_use import mark
held = mark(Path(sys.argv[1]))
assert held is not None
print("marked", flush=True)
time.sleep(600)
"""


@contextmanager
def used_elsewhere(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has ``path`` in use until it is killed."""
    command = [sys.executable, "-c", MARKING, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "marked\n"
            yield process
        finally:
            process.kill()


def test_a_copy_in_use_by_another_process_stays_until_that_is_killed(
    server: Server, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = png()
    for name in "abc":
        server.files[f"{name}.png"] = data
    limit = len(data)
    first = stage(server.url("a.png"), cache, limit_bytes=limit)
    with used_elsewhere(first.path) as other:
        first.mark.release()
        second = stage(server.url("b.png"), cache, limit_bytes=limit)
        assert first.path.exists()
        assert "copies in use, or of other users, take" in caplog.text
        second.mark.release()
        other.kill()
        other.wait()
        third = stage(server.url("c.png"), cache, limit_bytes=limit)
    assert copies(cache) == [third.path]


def test_a_copy_stays_while_its_slide_is_open_and_between_openings(server: Server, cache: Path) -> None:
    data = png()
    for name in "abc":
        server.files[f"{name}.png"] = data

    def opened(name: str) -> Slide:
        return open_slide(server.url(f"{name}.png"), cache_dir=cache, cache_bytes=len(data))

    keep = keep_copy(server.url("a.png"))
    slide = opened("a")
    slide.close()
    (first,) = copies(cache)
    with closing(opened("b")):
        # Closed, but kept; and the one that is open.
        assert len(copies(cache)) == 2
        keep.release()
        keep.release()
        with closing(opened("c")):
            assert first not in copies(cache)
            assert len(copies(cache)) == 2
    with closing(opened("a")):
        assert len(copies(cache)) == 1


def test_a_copy_is_marked_from_its_first_byte(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A partial copy that seems to be old, as where its network stands still, is not taken for a leftover."""
    server.files["a.png"] = png()
    server.files["b.png"] = png()
    seen: list[str] = []

    def slow(fetch: Fetch, inner: str, local: str) -> None:
        if inner.endswith("a.png"):
            os.utime(local, (time.time() - 2 * staging.YOUNG_S,) * 2)
            stage(server.url("b.png"), cache)
            seen.extend(path.name for path in copies(cache) if path.name.endswith(".partial"))
        fetch(inner, local)

    change_fetching(monkeypatch, slow)
    assert stage(server.url("a.png"), cache).path.read_bytes() == png()
    assert len(seen) == 1


def test_two_that_want_one_slide_fetch_it_once(server: Server, cache: Path) -> None:
    server.files["a.png"] = png()
    server.pause_s = 0.5
    with ThreadPoolExecutor(4) as pool:
        staged = list(pool.map(lambda _: stage(server.url("a.png"), cache), range(4)))
    assert sorted(one.fetched for one in staged) == [False, False, False, True]
    assert server.whole == ["a.png"]
    assert copies(cache) == [staged[0].path]


def test_a_lock_file_of_a_killed_process_holds_nobody_up(server: Server, cache: Path) -> None:
    server.files["a.png"] = png()
    path = stage(server.url("a.png"), cache).path
    path.unlink()
    (path.parent / f".{path.name}.lock").touch()
    left = path.parent / ".other.lock"
    left.touch()
    os.utime(left, (time.time() - 2 * staging.YOUNG_S,) * 2)
    assert stage(server.url("a.png"), cache).fetched
    assert copies(cache) == [path]


@pytest.mark.parametrize("when", ["before", "while it is copied"])
def test_a_full_disk_of_the_cache_is_told_as_such(
    when: str, server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["a.png"] = png()
    if when == "before":
        usage = type(shutil.disk_usage(cache.parent))
        monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage(10**12, 10**12, 1000))
    else:

        def full(fetch: Fetch, inner: str, local: str) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        change_fetching(monkeypatch, full)
    with pytest.raises(SlideOpenError, match="the disk of the cache is full") as caught:
        stage(server.url("a.png"), cache)
    text = str(caught.value)
    assert text.startswith(str(cache / "slides"))
    for part in (server.url("a.png"), "free space", "--cache-size", "another folder with --cache", "GiB left"):
        assert part in text
    assert "output folder" not in text
    assert copies(cache) == []


@pytest.fixture
def lockless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks."""

    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(in_use.fcntl, "flock", flock)
    monkeypatch.setenv(run_folder.RUN_VARIABLE, "here")


@pytest.mark.usefixtures("lockless")
def test_without_locks_a_run_drops_what_it_fetched_and_does_not_use(
    server: Server, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = png()
    for name in "abc":
        server.files[f"{name}.png"] = data

    def get(name: str) -> staging.Staged:
        return stage(server.url(f"{name}.png"), cache, limit_bytes=len(data))

    first = get("a")
    mine = cache / "slides/run-here"
    assert first.path.parent == mine
    again = first.mark.again()
    first.mark.release()
    second = get("b")
    assert first.path.exists()
    assert "copies in use" in caplog.text
    again.release()
    third = get("c")
    assert {path.name for path in copies(cache)} == {"run-here"}
    assert {path for path in mine.iterdir() if not path.name.startswith(".")} == {second.path, third.path}
    # Another process of the run may use what it fetched, for all that this one can tell.
    other = mine / "other.png"
    other.write_bytes(data)
    os.utime(other, (1, 1))
    second.mark.release()
    get("a")
    assert other.exists()
    assert not second.path.exists()


@pytest.mark.usefixtures("lockless")
def test_without_locks_what_killed_runs_left_goes_after_a_week(server: Server, cache: Path) -> None:
    server.files["a.png"] = png()
    for name, days in (("run-old", 8), ("run-young", 6)):
        folder = cache / "slides" / name
        folder.mkdir(parents=True)
        (folder / "x.png").write_bytes(b"x")
        for path in (folder / "x.png", folder):
            os.utime(path, (time.time() - days * 86400,) * 2)
    stage(server.url("a.png"), cache)
    assert {path.name for path in copies(cache)} == {"run-here", "run-young"}


LOCKLESS_RUN = """
import errno, fcntl, subprocess, sys
from pathlib import Path
def flock(*_):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = flock
from wsi_pipe.slides.storage.run_folder import folder_for_run
folder = folder_for_run(Path(sys.argv[1]))
folder.mkdir(exist_ok=True)
print(folder.name, flush=True)
if len(sys.argv) == 2:
    subprocess.run([sys.executable, sys.argv[0], sys.argv[1], "child"], check=True)
    assert folder.is_dir()
"""


def test_without_locks_the_processes_of_a_run_share_a_folder_that_goes_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(run_folder.RUN_VARIABLE, raising=False)
    (tmp_path / "slides").mkdir()
    (tmp_path / "run.py").write_text(LOCKLESS_RUN)
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "slides")]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    first, second = ended.stdout.split()
    assert first == second
    assert list((tmp_path / "slides").iterdir()) == []


def test_a_copy_under_way_is_not_locked_itself(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On network drives of Windows a lock keeps everybody else from writing, the copy's own maker too."""
    server.files["a.png"] = png()

    def locking(fetch: Fetch, inner: str, local: str) -> None:
        with open(local, "ab") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fetch(inner, local)

    change_fetching(monkeypatch, locking)
    staged = stage(server.url("a.png"), cache)
    with open(staged.path, "rb") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_marks_come_and_go_with_their_copy(server: Server, cache: Path) -> None:
    data = png()
    for name in "abz":
        server.files[f"{name}.png"] = data
    first = stage(server.url("a.png"), cache, limit_bytes=len(data))
    left = cache / "slides/.gone.png.use"
    left.touch()
    os.utime(left, (time.time() - 2 * staging.YOUNG_S,) * 2)
    first.mark.release()
    second = stage(server.url("b.png"), cache, limit_bytes=len(data))
    assert {path.name for path in (cache / "slides").iterdir()} == {second.path.name, f".{second.path.name}.use"}
    second.mark.release()
    server.failures = 99
    with pytest.raises(SlideOpenError):
        stage(server.url("z.png"), cache, limit_bytes=len(data))
    assert list((cache / "slides").iterdir()) == []


def test_files_to_lock_are_for_every_user(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files["a.png"] = png()
    modes: dict[str, int] = {}

    def looking(fetch: Fetch, inner: str, local: str) -> None:
        for path in (cache / "slides").iterdir():
            modes[path.suffix] = path.stat().st_mode & 0o777
        fetch(inner, local)

    change_fetching(monkeypatch, looking)
    before = os.umask(0o077)
    try:
        stage(server.url("a.png"), cache)
    finally:
        os.umask(before)
    assert (modes[".lock"], modes[".use"]) == (0o666, 0o666)


def test_a_lock_file_of_another_user_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real, refused = tmp_path / ".a.lock", os.open, [os.O_RDWR | os.O_CREAT, os.O_RDWR]

    def opened(name: Any, flags: int, *mode: int) -> int:
        if flags & ~os.O_CLOEXEC in refused:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(name, flags, *mode)

    path.touch()
    with open(path) as others, monkeypatch.context() as patch:
        patch.setattr(os, "open", opened)
        fcntl.flock(others, fcntl.LOCK_EX)
        with alone(path) as mine:
            assert not mine
        fcntl.flock(others, fcntl.LOCK_UN)
        with alone(path) as mine:
            assert mine
        path.touch()
        refused.append(os.O_RDONLY)
        with alone(path) as mine:
            assert not mine
        path.unlink()
        with pytest.raises(PermissionError), alone(path):
            pass


def test_waiting_for_another_process_is_said_and_ends(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server.files["a.png"] = png()
    url = server.url("a.png")
    path = stage(url, cache).path
    path.unlink()
    for name, seconds in (("POLL_S", 0.02), ("WAIT_TOLD_S", 0.1), ("WAIT_LIMIT_S", 0.5)):
        monkeypatch.setattr(staging, name, seconds)
    lock = path.parent / f".{path.name}.lock"
    partial, stop = path.parent / f".{path.name}.0123456789ab.partial", time.monotonic() + 1.0

    def grow() -> None:
        while time.monotonic() < stop:
            with partial.open("ab") as handle:
                handle.write(b"x")
            time.sleep(0.02)

    with alone(lock) as held, ThreadPoolExecutor(1) as pool:
        assert held
        growing = pool.submit(grow)
        with pytest.raises(SlideOpenError, match="has not grown for") as caught:
            stage(url, cache)
        assert growing.done()
    assert time.monotonic() > stop + 0.4
    assert str(lock) in caught.value.message
    assert "delete the lock file" in str(caught.value.remedy)
    said = f"waiting for another process to copy {url} (lock file {lock})"
    assert [record.getMessage() for record in caplog.records] == [said]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2], ids=["here", "processes"])
def test_a_run_fetches_each_slide_once_however_small_the_cache(
    workers: int, server: Server, cache: Path, tmp_path: Path
) -> None:
    """Copies made ahead once dropped each other, and the copies of slides under way."""
    names = [f"{n}.png" for n in range(6)]
    for name in names:
        server.files[name] = png()
    settings = JobSettings(
        tile=TileSettings(resolutions=(2.0,)),
        extract=ExtractSettings(encoders={"*": ("texture",)}),
        cache=CacheSettings(str(cache), 1.1 * len(png()) / 2**30),
    )
    entries = [SlideEntry(Path(name).stem, server.url(name), name, mpp=(2.0, 2.0)) for name in names]
    paths = open_job(tmp_path / "job", settings, entries)
    outcomes = list(dispatch(entries, settings, paths, Where(workers=workers)))
    assert not [outcome.reason for outcome in outcomes if outcome.status == "failed"]
    assert sorted(server.whole) == names
    # The last one may stay.
    stage(server.url("0.png"), cache, limit_bytes=int(1.1 * len(png())))
    assert len(copies(cache)) == 1


def test_leftovers_of_dead_runs_go_and_those_of_living_ones_stay(server: Server, cache: Path) -> None:
    folder = cache / "slides"
    folder.mkdir(parents=True)
    old, new = folder / ".x.partial", folder / ".y.partial"
    for path in (old, new):
        path.write_bytes(b"half a slide")
    os.utime(old, (time.time() - 2 * staging.YOUNG_S,) * 2)
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
    with pytest.raises(SlideOpenError, match="file"):
        stage(server.url("a.png"), tmp_path / "file")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "wsi-pipe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "wsi-pipe"


def test_a_response_without_a_size_is_copied_within_the_limit(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.sized = server.ranges = False
    server.files["a.png"] = png()
    limit = len(server.files["a.png"])
    server.files["large.png"] = bytes(limit + 1)
    staged = stage(server.url("a.png"), cache, limit_bytes=limit)
    assert staged.path.read_bytes() == server.files["a.png"]
    with pytest.raises(SlideOpenError, match="does not tell its size, and it is larger than the cache") as caught:
        stage(server.url("large.png"), cache, limit_bytes=limit)
    assert "--cache-size" in str(caught.value)
    # Nothing of it stays, and it was not asked for again and again.
    assert copies(cache) == [staged.path]
    assert server.whole.count("large.png") == server.whole.count("a.png")


def test_room_is_looked_after_while_a_copy_of_unknown_size_grows(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.sized = server.ranges = False
    server.files["a.png"], server.files["b.png"] = png(), bytes(150_000)
    stage(server.url("a.png"), cache).mark.release()
    (old,) = copies(cache)
    monkeypatch.setattr(transfer, "LOOK_BYTES", 1)
    limit = old.stat().st_size + 150_000 - 1
    staged = stage(server.url("b.png"), cache, limit_bytes=limit)
    assert copies(cache) == [staged.path]
    usage = type(shutil.disk_usage(cache.parent))
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage(10**12, 10**12, 1000))
    server.etag = "another"
    with pytest.raises(SlideOpenError, match="the disk of the cache is full"):
        stage(server.url("b.png"), cache, limit_bytes=limit)


def test_a_server_that_drips_is_given_up(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.drips, server.ranges = True, False
    server.files["a.png"] = png()
    monkeypatch.setattr(transfer, "CRAWL_S", 0.2)
    with pytest.raises(SlideOpenError, match="fewer than 120 KiB came"):
        stage(server.url("a.png"), cache)
    assert copies(cache) == []


def test_a_copy_ends_when_it_is_told_to(server: Server, cache: Path) -> None:
    server.drips, server.ranges = True, False
    server.files["a.png"] = png()
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    with belongs_to(stop), pytest.raises(StopRequested):
        stage(server.url("a.png"), cache)
    assert copies(cache) == []
    # Its thread still serves others.
    server.drips = False
    stage(server.url("a.png"), cache).mark.release()
