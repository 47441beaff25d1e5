"""Searching folders: which files are slides, what is passed over and named, and that no file ends the search."""

from __future__ import annotations

import builtins
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.uid import generate_uid

from tests.slides.dicom.test_dicom import write_level
from tests.slides.test_metadata import dicom
from wsi_pipe.cli import group, run_group
from wsi_pipe.errors import ManifestError
from wsi_pipe.job import load_settings
from wsi_pipe.job.left_out import note_passed_over, read_passed_over
from wsi_pipe.job.paths import JobPaths
from wsi_pipe.manifest import collect_slides
from wsi_pipe.report import write_report
from wsi_pipe.slides import open_slide
from wsi_pipe.slides.discover import find_slide_files
from wsi_pipe.slides.kinds import NOT_READ, companion_folder, may_be_dicom
from wsi_pipe.slides.parts import dicom_identity
from wsi_pipe.slides.passed_over import FIRST_NAMES, PassedOver
from wsi_pipe.slides.writing.write import write_pyramid

PICTURE = np.asarray(np.random.default_rng(0).integers(120, 250, (160, 200, 3)), np.uint8)


def search(folder: Path) -> tuple[list[str], dict[str, int]]:
    """Names found, from the folder on, and how many of each kind were passed over."""
    passed = PassedOver()
    found = [str(path.relative_to(folder)) for path in find_slide_files(folder, passed)]
    return found, {kind: count for kind, count, _ in passed}


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def test_slides_of_every_reader_are_found(tmp_path: Path) -> None:
    names = ["a.SVS", "b.qptiff", "c.ptif", "d.ptiff", "e.czi", "f.jp2", "g.tf2", "h.svslide", "i.dcm"]
    touch(tmp_path, *names, "notes.txt", "features.h5", "sub/j.bif")
    (tmp_path / "k.ome.zarr" / "0").mkdir(parents=True)
    touch(tmp_path, "k.ome.zarr/.zattrs", "k.ome.zarr/0/.zarray", "k.ome.zarr/labels/a.tif")
    touch(tmp_path, "stores/converted/zarr.json", "stores/converted/0/c/0/0.tif")
    found, passed = search(tmp_path)
    assert sorted(found) == sorted([*names, "k.ome.zarr", "stores/converted", "sub/j.bif"])
    assert passed == {}


def test_what_is_not_read_is_counted_by_kind_with_the_first_names(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{i}.isyntax" for i in range(9)), "a.svs", "x/b.VSI", "x/_b_/stack1/frame_t.ets", "c.lif")
    touch(tmp_path, "label.png", "thumb.jpeg", ".hidden.svs", "._a.svs", "report.pdf")
    passed = PassedOver()
    assert [path.name for path in find_slide_files(tmp_path, passed)] == ["a.svs"]
    found = {kind: (count, [Path(name).name for name in names]) for kind, count, names in passed}
    assert {kind.split(",")[0]: count for kind, (count, _) in found.items()} == {
        "hidden files": 1,
        "Philips iSyntax (*.isyntax)": 9,
        "Leica LIF (*.lif)": 1,
        "plain images": 2,
        "Olympus or Evident cellSens (*.vsi)": 1,
    }
    _, names = next(value for kind, value in found.items() if "iSyntax" in kind)
    assert names == [f"{i}.isyntax" for i in range(FIRST_NAMES)]
    line = next(line for line in passed.lines() if "iSyntax" in line)
    assert line.startswith("passed over: 9 files, Philips iSyntax")
    assert line.endswith("4.isyntax and 4 more")
    assert PassedOver.from_json(json.loads(json.dumps(passed.to_json()))).to_json() == passed.to_json()


@pytest.mark.parametrize("data", [None, {}, [1], [{"kind": "a"}], [{"kind": "a", "count": "b", "names": []}]])
def test_a_damaged_note_of_what_was_passed_over_is_none(data: object) -> None:
    assert not PassedOver.from_json(data)


def test_a_slide_s_own_folder_is_not_searched(tmp_path: Path) -> None:
    touch(tmp_path, "a.mrxs", "a/Slidedat.ini", "a/Data0001.dat", "a/left.tif", "b/c.tif")
    assert search(tmp_path) == (["a.mrxs", "b/c.tif"], {})
    assert companion_folder("x.svs") is None


def test_dicom_files_without_an_ending_are_one_slide_a_series(tmp_path: Path) -> None:
    series = [str(generate_uid(entropy_srcs=[f"of {i}"])) for i in range(3)]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for i, size in enumerate((2, 1)):
        write_level(tmp_path / "a" / f"DCM_{i}", PICTURE[::i + 1, ::i + 1].copy(), series=series[0], tile=64,
                    mm_per_px=(0.0005 * (i + 1),) * 2)  # fmt: skip
        assert size
    write_level(tmp_path / "b" / "1.2.840.113619.2", PICTURE, series=series[1])
    write_level(tmp_path / "b" / "1.2.840.113619.3", PICTURE, series=series[2])
    (tmp_path / "b" / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    touch(tmp_path, "a/README", "b/checksums")
    assert search(tmp_path) == (["a/DCM_0", "b/1.2.840.113619.2", "b/1.2.840.113619.3"], {})
    entries = collect_slides([str(tmp_path)])
    assert [entry.slide_id for entry in entries] == ["a", "1.2.840.113619.2", "1.2.840.113619.3"]
    with open_slide(tmp_path / "a") as slide, open_slide(entries[0].path) as same:
        assert len(slide.pyramid.levels) == 2
        assert slide.info.fingerprint == same.info.fingerprint


def test_dicom_objects_that_are_no_slides_are_named(tmp_path: Path) -> None:
    write_level(tmp_path / "slide.dcm", PICTURE)
    for i, name in enumerate(("annotations.dcm", "IM0001", "IM0002")):
        path = dicom(tmp_path / name, f"1.2.3.{i}", f"1.2.3.4.{i}")
        path.write_bytes(
            path.read_bytes().replace(b"1.2.840.10008.5.1.4.1.1.77.1.6", b"1.2.840.10008.5.1.4.1.1.88.1.1")
        )
    assert search(tmp_path) == (["slide.dcm"], {"DICOM files that are no whole-slide images": 3})
    with open_slide(tmp_path) as slide:
        assert slide.info.vendor == "dicom"


def malformed() -> dict[str, bytes]:
    head = bytes(128) + b"DICM"
    long = struct.pack("<HH2sHI", 0x0008, 0x0016, b"UN", 0, 0xFFFFFFF0)
    open_sequence = struct.pack("<HH2sHI", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF)
    item = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    return {
        "empty": b"",
        "head alone": head,
        "cut": head + b"\x02\x00\x00\x00UL\x04",
        "noise": head + b"\xff" * 500,
        "long": head + long,
        "nested": head + (open_sequence + item) * 5000,
        "no VR": head + struct.pack("<HH2sH", 0x0008, 0x0016, b"??", 6) + b"abcdef",
        "group length": head + struct.pack("<HH2sHI", 0x0002, 0x0000, b"UL", 4, 0xFFFFFFFF),
        "no number": head + struct.pack("<HH2sH", 0x0002, 0x0000, b"UL", 3) + b"abc",
        "deflated": head + b"\x02\x00\x10\x00UI\x16\x00" + b"1.2.840.10008.1.2.1.99",
        "text": b"not DICOM at all",
    }


@pytest.mark.parametrize("kind", malformed())
def test_a_malformed_dicom_file_stands_for_itself_and_the_search_goes_on(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.dcm"
    path.write_bytes(malformed()[kind])
    write_level(tmp_path / "good.dcm", PICTURE)
    touch(tmp_path, "z.svs")
    assert dicom_identity(path) is None or not dicom_identity(path).series  # type: ignore[union-attr]
    assert search(tmp_path) == (["z.svs", "broken.dcm", "good.dcm"], {})
    assert run_group(group, "wsi-pipe", ["info", str(tmp_path / "broken.dcm"), str(tmp_path / "good.dcm")]) == 1
    said = "".join(capsys.readouterr())
    assert "200 x 160" in said
    assert "broken" in said
    assert "Traceback" not in said


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300))
def test_any_bytes_after_the_mark_are_survived(tmp_path: Path, data: bytes) -> None:
    for name in ("a.dcm", "IM1"):
        (tmp_path / name).write_bytes(bytes(128) + b"DICM" + data)
    search(tmp_path)


def test_pipes_links_and_names_do_not_end_the_search(tmp_path: Path) -> None:
    touch(tmp_path, "a.svs", "sub/b.svs")
    for name in ("pipe.dcm", "pipe"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "loop.dcm").symlink_to("loop.dcm")
    (tmp_path / "gone.svs").symlink_to("nowhere.svs")
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    (tmp_path / "sub" / "self").symlink_to("self")
    os.close(os.open(os.fsencode(tmp_path) + b"/M\xfcller.svs", os.O_CREAT | os.O_WRONLY))
    (tmp_path / "folder.svs").mkdir()
    found, passed = search(tmp_path)
    # Each of them is tried, and fails with its reason.
    assert found == ["a.svs", "gone.svs", "loop.dcm", "pipe.dcm", "sub/b.svs"]
    assert passed == {"whose name is not UTF-8; rename it (convmv -f latin1 -t utf8)": 1}
    assert len(collect_slides([str(tmp_path)])) == 5


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.svs", "closed/b.svs")
    (tmp_path / "closed").chmod(0)
    try:
        assert search(tmp_path) == (["a.svs"], {"folders that cannot be read": 1})
    finally:
        (tmp_path / "closed").chmod(0o755)


def test_a_folder_that_goes_away_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.svs", "b/c.svs")
    real = os.stat

    def stale(path: Any, *args: Any, **options: Any) -> os.stat_result:
        if str(path) == str(tmp_path / "b"):
            raise OSError(116, "Stale file handle", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(os, "stat", stale)
    assert search(tmp_path) == (["a.svs"], {"folders that cannot be read": 1})


def test_files_of_known_endings_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder may hold 100,000 of them, on a network file system."""
    names = [f"{i}{end}" for i, end in enumerate((".svs", ".tif", ".png", ".json", ".h5", ".isyntax", ".czi", ".xml"))]
    touch(tmp_path, *names)
    opened: list[str] = []
    real = builtins.open
    monkeypatch.setattr(builtins, "open", lambda path, *a, **o: opened.append(str(path)) or real(path, *a, **o))
    search(tmp_path)
    assert opened == []
    assert not any(may_be_dicom(name) for name in names)
    for name in ("IM0001", "1.2.840.1", "a.dcm", "a.unknown"):
        assert may_be_dicom(name)
    assert not may_be_dicom("DICOMDIR")


def test_a_series_is_told_once_for_each_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each slide of a folder asks of all its files."""
    import wsi_pipe.slides.parts as parts

    for i in range(4):
        write_level(tmp_path / f"{i}.dcm", PICTURE, series=str(generate_uid()))
    read: list[object] = []
    real = parts._read_identity
    monkeypatch.setattr(parts, "_read_identity", lambda source, size: read.append(source) or real(source, size))
    for path in find_slide_files(tmp_path):
        open_slide(path).close()
    assert len(read) == 4


def test_commands_name_what_was_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, job = tmp_path / "in", tmp_path / "job"
    folder.mkdir()
    write_pyramid(folder / "a.svs", [PICTURE], mpp=0.5)
    touch(folder, "b.isyntax", "c.png")
    line = "passed over: 1 file, Philips iSyntax (*.isyntax), a format that is not read"
    plan = ["plan", str(folder), "--calibrate", "0"]
    for words in (["info", str(folder)], plan, ["run", str(folder), "-o", str(job), "--encoder", "texture"]):
        assert run_group(group, "wsi-pipe", words) == 0
        said = capsys.readouterr().err
        assert line in said
        assert "b.isyntax" in said
    run_group(group, "wsi-pipe", [*plan, "--json"])
    assert [item["count"] for item in json.loads(capsys.readouterr().out)["passed_over"]] == [1, 1]
    page = (job / "report.html").read_text(encoding="utf-8")
    assert "Passed over" in page
    assert "b.isyntax" in page
    assert [item["count"] for item in json.loads((job / "report.json").read_text())["passed_over"]] == [1, 1]
    # A page made later still tells.
    settings_ = load_settings(job)
    assert settings_ is not None
    assert "b.isyntax" in write_report(job, [], settings_).read_text(encoding="utf-8")
    note_passed_over(JobPaths(job), PassedOver())
    assert not read_passed_over(job)
    (job / "passed_over.json").write_text("[[[")
    assert not read_passed_over(job)


def test_a_folder_of_nothing_but_what_is_not_read_says_so(tmp_path: Path) -> None:
    touch(tmp_path, "a.vsi")
    with pytest.raises(
        ManifestError, match="no slides in this folder; passed over: 1 file, Olympus or Evident cellSens"
    ):
        collect_slides([str(tmp_path)])
    assert all(end.startswith(".") and end == end.lower() for end in NOT_READ)


def test_a_zarr_folder_given_by_name_is_a_slide(tmp_path: Path) -> None:
    for name in ("a.ome.zarr", "b.zarr", "plain"):
        touch(tmp_path, f"{name}/zarr.json")
    entries = collect_slides([str(tmp_path / name) for name in ("a.ome.zarr", "b.zarr", "plain")])
    assert [(entry.slide_id, Path(entry.path).name) for entry in entries] == [
        ("a", "a.ome.zarr"), ("b", "b.zarr"), ("plain", "plain"),
    ]  # fmt: skip
