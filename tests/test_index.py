"""A run that resumes asks for sizes and times; whatever differs is looked at in full."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wsi_pipe.bag import check_bag, read_attrs
from wsi_pipe.cli import group, run_group
from wsi_pipe.job import JobPaths, load_settings, load_slides, read_outcomes
from wsi_pipe.job import index as indexing
from wsi_pipe.job import run as job_run
from wsi_pipe.job.index import JobIndex, Mark, compact, files_of, stamps_of
from wsi_pipe.job.task import slide_task
from wsi_pipe.manifest import SlideEntry
from wsi_pipe.outcome import SlideOutcome

MakeSlide = Callable[..., Path]


def cli(*arguments: str | Path) -> int:
    return run_group(group, "wsi-pipe", [str(argument) for argument in arguments])


@pytest.fixture
def archive(tmp_path: Path, make_slide: MakeSlide) -> Path:
    for seed in range(3):
        make_slide(tmp_path / f"in/s{seed}.svs", seed=seed)
    return tmp_path / "in"


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the slides that were looked at in full."""
    seen: list[str] = []
    before = job_run.prepare

    def watched(entry: SlideEntry, *args: Any, **kwargs: Any) -> Any:
        seen.append(entry.slide_id)
        return before(entry, *args, **kwargs)

    monkeypatch.setattr(job_run, "prepare", watched)
    return seen


def test_a_run_that_resumes_opens_nothing(archive: Path, tmp_path: Path, looked: list[str]) -> None:
    job = tmp_path / "job"
    assert cli("run", archive, "-o", job, "-r", "5x") == 0
    # Several threads look, in any order.
    assert sorted(looked) == ["s0", "s1", "s2"]
    lines = (job / "outcomes.jsonl").read_text()
    looked.clear()
    assert cli("run", archive, "-o", job, "-r", "5x") == 0
    assert looked == []
    assert (job / "outcomes.jsonl").read_text() == lines
    assert [o.status for o in read_outcomes(job).values()] == ["done"] * 3


def _touched(path: Path, archive: Path, job: Path) -> None:
    path.touch()


def _same_size_and_time(path: Path, archive: Path, job: Path) -> None:
    status = path.stat()
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _deleted(path: Path, archive: Path, job: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("in/s1.svs", _touched),
        ("job/bags/s1.h5", _touched),
        ("job/bags/s1.h5", _deleted),
        ("job/tiles/s1.h5", _deleted),
        ("job/tissue/s1.geojson", _deleted),
        ("job/tissue/s1.geojson", _touched),
    ],
)
def test_what_changed_is_looked_at_in_full_and_alone(
    archive: Path, tmp_path: Path, looked: list[str], name: str, change: Callable[[Path, Path, Path], None]
) -> None:
    job = tmp_path / "job"
    # Stage by stage, so that grids have files of their own too.
    assert cli("tile", archive, "-o", job, "-r", "5x") == 0
    assert cli("run", archive, "-o", job, "-r", "5x") == 0
    looked.clear()
    change(tmp_path / name, archive, job)
    assert cli("run", archive, "-o", job, "-r", "5x") == 0
    assert looked == ["s1"]
    assert check_bag(job / "bags/s1.h5") == []
    looked.clear()
    # And is known from then on.
    assert cli("run", archive, "-o", job, "-r", "5x") == 0
    assert looked == []


@pytest.mark.parametrize("change", ["another picture", "a byte, at the same size and time"])
def test_a_replaced_slide_is_seen_and_made_anew_when_told(
    archive: Path, tmp_path: Path, looked: list[str], make_slide: MakeSlide, change: str
) -> None:
    job = tmp_path / "job"
    assert cli("run", archive, "-o", job, "-r", "5x") == 0
    before = read_attrs(job / "bags/s1.h5").slide_fingerprint
    if change == "another picture":
        make_slide(archive / "s1.svs", seed=9)
    else:
        _same_size_and_time(archive / "s1.svs", archive, job)
    looked.clear()
    # What was made of the other file is kept and not relabelled, and seen before any work.
    assert cli("run", archive, "-o", job, "-r", "5x") == 2
    assert looked == []
    assert read_attrs(job / "bags/s1.h5").slide_fingerprint == before
    assert cli("run", archive, "-o", job, "-r", "5x", "--redo", "--only", "s1") == 0
    assert read_attrs(job / "bags/s1.h5").slide_fingerprint != before


def test_what_is_wanted_decides(archive: Path, tmp_path: Path, looked: list[str]) -> None:
    job = tmp_path / "job"
    assert cli("run", archive, "-o", job, "-r", "5x") == 0
    settings, paths = load_settings(job), JobPaths(job)
    assert settings is not None
    entry = load_slides(job)[1]

    def done(entry: SlideEntry, **more: Any) -> bool:
        changed = replace(settings, **more)
        assert len(list(job_run.process([entry], changed, paths, record=False))) == 1
        return not looked or bool(looked.clear())

    looked.clear()
    assert done(entry)
    others = [
        replace(entry, case_id="other"),
        replace(entry, mpp=(0.51, 0.51)),
        replace(entry, overrides={"min_tissue": 0.3}),
    ]
    assert [done(other) for other in others] == [False] * 3
    assert not done(entry, segment=replace(settings.segment, mpp=7.0))
    assert not done(entry, tile=replace(settings.tile, min_tissue=0.3))
    assert not done(entry, extract=replace(settings.extract, dtype="float32"))
    assert not done(entry, reader="openslide")


def test_a_worker_looks_into_the_index_too(archive: Path, tmp_path: Path, looked: list[str]) -> None:
    job = tmp_path / "job"
    assert cli("run", archive, "-o", job, "-r", "5x", "--workers", "2") == 0
    settings = load_settings(job)
    assert settings is not None
    for entry in load_slides(job):
        outcome = slide_task(settings, str(job), "assemble", False, entry)
        assert (outcome.status, outcome.nothing_new) == ("done", True)
    assert looked == []


def test_verify_reads_what_the_index_passes_over(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tmp_path / "job"
    assert cli("run", archive, "-o", job, "-r", "5x") == 0
    bag = job / "bags/s1.h5"
    raw = bytearray(bag.read_bytes())
    at = len(raw) - 2000
    bag.write_bytes(raw[:at] + bytes(64) + raw[at + 64 :])
    # As a disk that forgets: the file system says that nothing changed.
    lines = [json.loads(line) for line in (job / ".index.jsonl").read_text().splitlines()]
    for line in lines:
        line["files"] = [list(stamp) for stamp in stamps_of(file[0] for file in line["files"]) or ()]
    (job / ".index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cli("verify", job) == 1


def test_a_slide_that_changes_while_it_is_worked_on_is_not_marked(archive: Path, tmp_path: Path) -> None:
    job = tmp_path / "job"
    assert cli("run", archive, "-o", job, "-r", "5x") == 0
    index, entry = JobIndex(JobPaths(job), "run"), load_slides(job)[0]
    outcome = SlideOutcome(entry.slide_id, "done")
    begun = index.begin(entry)
    assert index.mark(entry, begun, outcome, {}) is not None
    assert index.mark(entry, begun, replace(outcome, status="failed"), {}) is None
    (archive / "s0.svs").touch()
    assert index.mark(entry, begun, outcome, {}) is None


def test_lines_that_are_none_are_passed_over(archive: Path, tmp_path: Path, looked: list[str]) -> None:
    job = tmp_path / "job"
    assert cli("run", archive, "-o", job, "-r", "5x") == 0
    index = job / ".index.jsonl"
    index.write_bytes(
        b'null\n[]\n{"version": 1}\n\xff\n' + b"[" * 100_000 + b"\n" + index.read_bytes() + b'{"version": 1, "sl'
    )
    looked.clear()
    assert cli("run", archive, "-o", job, "-r", "5x") == 0
    assert looked == []
    index.unlink()
    assert cli("run", archive, "-o", job, "-r", "5x") == 0
    # Several threads look, in any order.
    assert sorted(looked) == ["s0", "s1", "s2"]


def test_the_index_does_not_grow_without_end(tmp_path: Path) -> None:
    paths = JobPaths(tmp_path)
    mark = Mark("s", "w", (("/x" * 100, 1, 2, 3),), "done", None, {"5x": 3}, 1.5)
    old = [replace(mark, wanted=str(n)).to_json() for n in range(1000)]
    paths.index.write_text("".join(json.dumps(line) + "\n" for line in [*old, mark.to_json()]))
    compact(paths)
    assert [Mark.from_json(json.loads(line)) for line in paths.index.read_text().splitlines()] == [mark]
    before = paths.index.stat().st_mtime_ns
    compact(paths)
    assert paths.index.stat().st_mtime_ns == before


def test_slides_of_many_files_rest_on_all_of_them(tmp_path: Path) -> None:
    for name in (
        "a.svs",
        "b.mrxs",
        "b/Data1.dat",
        "b/more/Data2.dat",
        "dcm/1.dcm",
        "dcm/2.dcm",
        "z.ome.tif",
        "other/x",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"x")

    def of(name: str) -> set[str] | None:
        files = files_of(SlideEntry("s", str(tmp_path / name), "c"), JobPaths(tmp_path / "job"))
        return None if files is None else {str(Path(f).relative_to(tmp_path)) for f in files if "/job/" not in f}

    assert of("a.svs") == {"a.svs"}
    assert of("b.mrxs") == {"a.svs", "b.mrxs", "b/Data1.dat", "b/more/Data2.dat", "z.ome.tif"}
    assert of("dcm") == {"dcm/1.dcm", "dcm/2.dcm"}
    assert of("dcm/1.dcm") == {"dcm/1.dcm", "dcm/2.dcm"}
    assert of("z.ome.tif") == {"a.svs", "b.mrxs", "z.ome.tif"}
    assert files_of(SlideEntry("s", "https://x.org/a.svs", "c"), JobPaths(tmp_path)) is None


def test_masks_and_annotations_that_are_given_count_too(tmp_path: Path) -> None:
    entry = SlideEntry("s", str(tmp_path / "a.svs"), "c", mask="/m.geojson", annotations="/a.geojson")
    assert (files_of(entry, JobPaths(tmp_path)) or [])[1:3] == ["/m.geojson", "/a.geojson"]


def test_too_many_files_are_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "MOST_FILES", 2)
    for n in range(3):
        (tmp_path / f"{n}.dcm").write_bytes(b"x")
    assert files_of(SlideEntry("s", str(tmp_path), "c"), JobPaths(tmp_path)) is None


def test_a_job_that_was_copied_elsewhere_is_looked_at_in_full(archive: Path, tmp_path: Path, looked: list[str]) -> None:
    assert cli("run", archive, "-o", tmp_path / "job", "-r", "5x") == 0
    shutil.copytree(tmp_path / "job", tmp_path / "copy")
    looked.clear()
    assert cli("run", archive, "-o", tmp_path / "copy", "-r", "5x") == 0
    # Several threads look, in any order.
    assert sorted(looked) == ["s0", "s1", "s2"]
