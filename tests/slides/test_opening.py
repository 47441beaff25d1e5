"""Which reader a slide gets and why, and what is said of files that none can open."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from wsi_pipe.errors import ConfigError, NotAPictureError, SlideError, SlideOpenError, UnsupportedSlideError
from wsi_pipe.slides import READERS, open_slide
from wsi_pipe.slides.base import RGBArray
from wsi_pipe.slides.metadata import missing_mpp_error
from wsi_pipe.slides.writing.write import write_pyramid


@pytest.fixture(scope="module")
def rgb() -> RGBArray:
    rng = np.random.default_rng(0)
    pixels = cv2.GaussianBlur(rng.integers(0, 256, (600, 800, 3), np.uint8), (0, 0), 3)
    return np.asarray(cv2.normalize(pixels, None, 0, 255, cv2.NORM_MINMAX), np.uint8)  # type: ignore[call-overload]


@pytest.fixture
def svs(tmp_path: Path, rgb: RGBArray) -> Path:
    path = tmp_path / "slide.svs"
    write_pyramid(path, [rgb], mpp=0.5)
    return path


@pytest.fixture(autouse=True)
def nothing_on_stderr(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """C libraries print warnings past Python; none may reach the user."""
    yield
    assert capfd.readouterr().err == ""


def test_the_fast_reader_comes_first(svs: Path) -> None:
    with closing(open_slide(svs)) as slide:
        assert slide.info.reader == "tiff"
        assert "declined" not in slide.info.reader_reason
        assert slide.info.path == str(svs)


@pytest.mark.parametrize("reader", ["tiff", "openslide", "image"])
def test_a_reader_can_be_asked_for(svs: Path, reader: str) -> None:
    with closing(open_slide(svs, reader=reader)) as slide:
        assert slide.info.reader == reader


def test_openslide_reads_what_the_fast_reader_declines_and_the_reason_is_recorded(
    svs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decline(path: Path, mpp: object) -> None:
        raise UnsupportedSlideError(f"{path}: tiles of an unknown kind")

    monkeypatch.setattr("wsi_pipe.slides.tiff.reader.open_tiff", decline)
    with closing(open_slide(svs)) as slide:
        assert slide.info.reader == "openslide"
        assert slide.info.reader_reason.endswith("; declined by tiff: tiles of an unknown kind")
        assert "asked for" not in slide.info.reader_reason


def test_the_image_reader_comes_last(tmp_path: Path, rgb: RGBArray) -> None:
    path = tmp_path / "picture.png"
    cv2.imwrite(str(path), rgb)
    with closing(open_slide(path)) as slide:
        assert slide.info.reader == "image"
        assert "declined by tiff: is not a TIFF file; openslide: OpenSlide does not know" in slide.info.reader_reason


def test_damage_ends_the_search(svs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(path: Path, mpp: object) -> None:
        raise AssertionError("a damaged file was offered to another reader")

    monkeypatch.setattr("wsi_pipe.slides.openslide.open_openslide", unexpected)
    with open(svs, "r+b") as handle:
        handle.truncate(svs.stat().st_size // 2)
    with pytest.raises(SlideOpenError, match=r"slide\.svs: .* lie outside the file"):
        open_slide(svs)


@pytest.mark.parametrize("reader", ["fast", "", "Auto"])
def test_an_unknown_reader_is_an_error(svs: Path, reader: str) -> None:
    with pytest.raises(ConfigError, match="auto, tiff, openslide, image"):
        open_slide(svs, reader=reader)
    assert reader not in READERS


@pytest.mark.parametrize("mpp", [0, -0.5, float("nan"), float("inf"), (0.5, 0)])
def test_an_mpp_that_cannot_be_is_an_error(svs: Path, mpp: float | tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="mpp"):
        open_slide(svs, mpp=mpp)


def test_a_missing_mpp_is_none_and_its_error_names_both_remedies(tmp_path: Path, rgb: RGBArray) -> None:
    path = tmp_path / "slide.svs"
    write_pyramid(path, [rgb], mpp=None)
    for reader in ("tiff", "openslide"):
        with closing(open_slide(path, reader=reader)) as slide:
            assert slide.pyramid.mpp is None
            assert slide.info.mpp_source == "none"
    text = str(missing_mpp_error(path))
    assert str(path) in text
    assert "--slide-mpp" in text
    assert "column mpp" in text


@pytest.mark.parametrize("name", ["emoji 🧬 and  spaces.svs", 'ÄÖ\' "quoted".svs', "-r.svs", "a%20b#c?.svs"])
@pytest.mark.parametrize("reader", ["tiff", "openslide", "image"])
def test_odd_names(svs: Path, name: str, reader: str) -> None:
    path = svs.with_name(name)
    shutil.move(svs, path)
    with closing(open_slide(path, reader=reader)) as slide:
        assert slide.pyramid.size_l0 == (800, 600)


def bad_file(folder: Path, svs: Path, kind: str) -> Path:
    path = folder / "bad.svs"
    data = svs.read_bytes()
    if kind == "loop":
        os.symlink(folder / "other.svs", path)
        os.symlink(path, folder / "other.svs")
    elif kind == "dangling link":
        os.symlink(folder / "gone.svs", path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "under a file":
        return svs / "bad.svs"
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "missing":
        contents = {
            "empty": b"",
            "text": b"This is a note, not a slide.\n" * 9,
            "web page": b"<!DOCTYPE html><html><body>403 Forbidden</body></html>",
            "zeros": bytes(100_000),
            "noise": np.random.default_rng(1).bytes(100_000),
            "TIFF header alone": b"II*\0",
            "TIFF without images": b"II*\0\0\0\0\0",
            "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "DICOM header alone": bytes(128) + b"DICM" + b"\xff" * 50,
            "archive": b"PK\x03\x04" + bytes(50),
            "a tenth": data[: len(data) // 10],
        }
        path.write_bytes(contents[kind])
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "no such file"),
        ("dangling link", "no such file"),
        ("under a file", "Not a directory"),
        ("loop", "leads back to itself"),
        ("folder", "is a folder with no DICOM series"),
        ("pipe", "is no regular file"),
        ("empty", "is empty"),
        ("text", "looks like text"),
        ("web page", "looks like a web page"),
        ("zeros", "begins with zeros only"),
        ("noise", "no reader understands it"),
        ("TIFF header alone", "bad.svs"),
        ("TIFF without images", "bad.svs"),
        ("LFS pointer", "a Git LFS pointer"),
        ("archive", "a ZIP archive"),
        ("DICOM header alone", "bad.svs"),
        ("a tenth", "lie outside the file"),
    ],
)
def test_a_bad_file_gives_one_line_with_file_cause_and_remedy(tmp_path: Path, svs: Path, kind: str, words: str) -> None:
    path = bad_file(tmp_path, svs, kind)
    with pytest.raises(SlideError) as caught:
        open_slide(path)
    assert isinstance(caught.value, (SlideOpenError, UnsupportedSlideError))
    text = str(caught.value)
    assert text.startswith(str(path))
    assert words in text
    assert caught.value.remedy
    assert "\n" not in text


@pytest.mark.parametrize("reader", ["tiff", "image"])
def test_a_file_that_lost_its_end_is_an_error_at_the_latest_when_read(svs: Path, reader: str) -> None:
    with open(svs, "r+b") as handle:
        handle.truncate(svs.stat().st_size - 100)
    with pytest.raises(SlideError, match="truncated or damaged"), closing(open_slide(svs, reader=reader)) as slide:
        slide.read_region(0, 0, 0, 800, 600)


def test_an_unknown_format_names_what_every_reader_said(tmp_path: Path) -> None:
    path = tmp_path / "note.svs"
    path.write_text("not a slide")
    with pytest.raises(UnsupportedSlideError) as caught:
        open_slide(path)
    for said in ("tiff: is not a TIFF file", "openslide: OpenSlide does not know the format", "image: is no PNG"):
        assert said in str(caught.value)


WITHOUT_PERMISSION = """
import os, sys
from wsi_pipe.errors import SlideOpenError
from wsi_pipe.slides import open_slide
import wsi_pipe.slides.tiff.reader, wsi_pipe.slides.openslide, wsi_pipe.slides.plain.reader
import wsi_pipe.slides.discover, simplejpeg
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
open_slide(sys.argv[1]).close()
for path in sys.argv[2:]:
    try:
        open_slide(path)
    except SlideOpenError as error:
        print(error)
"""


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions of POSIX systems")
def test_without_permission(svs: Path) -> None:
    # pytest's own folders are closed to others: a file in them would be refused for that alone.
    folder = Path(tempfile.mkdtemp(prefix="wsi-pipe-test-", dir=tempfile.gettempdir()))
    try:
        folder.chmod(0o755)
        allowed, forbidden, closed = folder / "allowed.svs", folder / "forbidden.svs", folder / "closed"
        closed.mkdir()
        for path in (allowed, forbidden, closed / "slide.svs"):
            shutil.copyfile(svs, path)
            path.chmod(0o644)
        forbidden.chmod(0)
        closed.chmod(0)
        paths = [allowed, forbidden, closed / "slide.svs", closed]
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT_PERMISSION, *map(str, paths)], capture_output=True, text=True, timeout=120
        )
        assert done.stderr == ""
        assert done.returncode == 0
        lines = done.stdout.splitlines()
        assert len(lines) == 3
        for line, path in zip(lines, paths[1:], strict=True):
            assert line.startswith(str(path))
            assert "ermission denied" in line
            assert "ask for read permission" in line
    finally:
        closed.chmod(0o700)
        shutil.rmtree(folder)


def test_a_folder_of_one_dicom_series_is_a_slide(shared_slides: Path, tmp_path: Path) -> None:
    folder = shared_slides / "CMU-1-Small-Region-dicom"
    one_file = next(iter(sorted(folder.iterdir())))
    with closing(open_slide(folder)) as slide, closing(open_slide(one_file)) as same:
        assert slide.info.path == str(folder)
        assert slide.info.fingerprint == same.info.fingerprint
        assert slide.pyramid.levels == same.pyramid.levels
    with closing(open_slide(folder, reader="openslide")) as slow:
        assert slow.pyramid.size_l0 == same.pyramid.size_l0


def test_a_refusal_for_what_a_file_means_is_final(svs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, mpp: object) -> None:
        raise NotAPictureError(f"{path}: seven channels", remedy="export one")

    def unexpected(path: Path, mpp: object) -> None:
        raise AssertionError("what is no picture was offered to another reader")

    monkeypatch.setattr("wsi_pipe.slides.tiff.reader.open_tiff", refuse)
    monkeypatch.setattr("wsi_pipe.slides.openslide.open_openslide", unexpected)
    monkeypatch.setattr("wsi_pipe.slides.plain.reader.open_image", unexpected)
    with pytest.raises(NotAPictureError, match=r"slide\.svs: seven channels; export one"):
        open_slide(svs)


def test_a_known_reason_is_not_replaced_by_damage(svs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def decline(path: Path, mpp: object) -> None:
        raise UnsupportedSlideError(f"{path}: several focal planes are not read", remedy="export one")

    def fail(path: Path, mpp: object, reason: str) -> None:
        raise SlideOpenError(f"{path}: OpenSlide: value 2 != 1", remedy="the file is damaged: copy it again")

    monkeypatch.setattr("wsi_pipe.slides.tiff.reader.open_tiff", decline)
    monkeypatch.setattr("wsi_pipe.slides.openslide.open_openslide", fail)
    monkeypatch.setattr("wsi_pipe.slides.plain.reader.open_image", decline)
    with pytest.raises(UnsupportedSlideError, match=r"focal planes are not read.*value 2 != 1.*; export one") as caught:
        open_slide(svs)
    assert "damaged" not in str(caught.value)


def test_damage_is_said_where_no_reader_knew_the_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.mrxs"
    path.write_bytes(bytes(range(256)))

    def fail(path: Path, mpp: object, reason: str) -> None:
        raise SlideOpenError(f"{path}: OpenSlide: no Slidedat.ini", remedy="the file is damaged: copy it again")

    monkeypatch.setattr("wsi_pipe.slides.openslide.open_openslide", fail)
    with pytest.raises(SlideOpenError, match=r"no Slidedat\.ini; the file is damaged"):
        open_slide(path)


@pytest.mark.parametrize("mpp", [0.049, 20.1, (0.25, 30.0)])
def test_a_given_resolution_out_of_bounds_is_an_error(svs: Path, mpp: float | tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match=r"outside 0\.05 to 20 um"):
        open_slide(svs, mpp=mpp)


@pytest.mark.parametrize("options", [{"scene": -1}, {"z": -2}, {"z": 0.5}, {"scene": True}])
def test_a_scene_or_plane_is_a_number_from_0(svs: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="is not a whole number from 0"):
        open_slide(svs, **options)


def test_scene_and_plane_are_in_the_fingerprint_where_they_are_given(svs: Path) -> None:
    prints = []
    for options in ({}, {"scene": 0}, {"z": 0}, {"scene": 0, "z": 0}):
        with closing(open_slide(svs, **options)) as slide:
            prints.append(slide.info.fingerprint)
            assert (slide.info.scene, slide.info.z) == (options.get("scene"), options.get("z"))
    assert len(set(prints)) == 4
