"""Status, repair and the lock of a job; resuming after kills and interruptions."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from wsi_pipe.bag import check_bag, read_bag
from wsi_pipe.care import job_status, quarantine_of, repair_job, sources, verify_job
from wsi_pipe.cli import group, run_group
from wsi_pipe.encoders.architectures import build, timm_recipe
from wsi_pipe.encoders.lr_file import write_lr_encoder
from wsi_pipe.errors import JobLockedError, ManifestError, OutputError, WorkerError
from wsi_pipe.execute import run_bounded
from wsi_pipe.geometry import TileSpec
from wsi_pipe.job import JobPaths, OutcomeLog, read_outcomes, replaced
from wsi_pipe.job import run as job_run
from wsi_pipe.job.lock import hold_job, holder_of
from wsi_pipe.manifest import SlideEntry
from wsi_pipe.outcome import SlideOutcome
from wsi_pipe.ownership import claim_folder
from wsi_pipe.report.summary import summarise

MakeSlide = Callable[..., Path]
MAIN = [sys.executable, "-m", "wsi_pipe"]


def cli(*arguments: str | Path) -> int:
    return run_group(group, "wsi-pipe", [str(argument) for argument in arguments])


@pytest.fixture
def archive(tmp_path: Path, make_slide: MakeSlide, tissue_picture: Any) -> Path:
    """Six small slides."""
    for seed in range(6):
        make_slide(tmp_path / "in" / f"s{seed}.svs", picture=tissue_picture(900, 800, seed=seed))
    return tmp_path / "in"


def features(job: Path) -> dict[str, bytes]:
    """The features of every bag, byte for byte."""
    found = {}
    for path in sorted((job / "bags").glob("*.h5")):
        for level in read_bag(path).levels:
            found[f"{path.stem} {level.grid.label}"] = level.features["texture"].values.tobytes()
    return found


def zero_heap(path: Path) -> None:
    """Zeros where an HDF5 file keeps its strings: the library then looks for their end for ever."""
    raw = bytearray(path.read_bytes())
    start = raw.index(b"GCOL") + 512
    raw[start : start + 512] = bytes(512)
    path.write_bytes(raw)


@pytest.mark.slow
def test_a_bag_that_hdf5_loops_on_is_found_put_aside_and_made_anew(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from wsi_pipe import execute
    from wsi_pipe.job import guard

    monkeypatch.setattr(guard, "CPU_S", 1.0)
    job = tmp_path / "job"
    assert cli("tile", archive, "-o", job, "-r", "5x", "--limit", "3") == 0
    assert cli("run", archive, "-o", job, "-r", "5x", "--limit", "3") == 0
    before = features(job)
    try:
        for name in ("bags/s0.h5", "bags/s1.h5", "tiles/s2.h5"):
            zero_heap(job / name)
        # What is done is looked at by the same means as in verify, and made anew.
        assert cli("run", "-o", job, "--only", "s0") == 0
    finally:
        execute.end_own_workers()
    assert check_bag(job / "bags/s0.h5") == []
    capsys.readouterr()
    assert cli("verify", job) == 1
    assert "unreadable: HDF5 did not return within 1 s of computing" in capsys.readouterr().out
    assert {Path(repair.path).name for repair in repair_job(job)} == {"s1.h5", "s2.h5"}
    assert cli("run", "-o", job) == 0
    assert features(job) == before
    assert not [finding for finding in verify_job(job) if finding.problems]


def test_bags_are_checked_in_one_process(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wsi_pipe import execute
    from wsi_pipe.execute import worker

    job = tmp_path / "job"
    assert cli("run", archive, "-o", job, "-r", "5x") == 0
    started = []
    popen = worker.subprocess.Popen

    def counting(*arguments: Any, **options: Any) -> Any:
        started.append(arguments)
        return popen(*arguments, **options)

    execute.end_own_workers()
    monkeypatch.setattr(worker.subprocess, "Popen", counting)
    assert len(list(verify_job(job))) == 6
    monkeypatch.chdir(tmp_path)
    made = {bag: bag.stat().st_mtime_ns for bag in (job / "bags").glob("*.h5")}
    assert cli("run", "-o", "job") == 0
    assert {bag: bag.stat().st_mtime_ns for bag in made} == made
    assert cli("verify", "job/bags/s0.h5") == 0
    assert len(started) == 1


def test_repair_puts_aside_what_is_wrong_and_nothing_else(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tmp_path / "job"
    assert cli("tile", archive, "-o", job, "-r", "5x") == 0
    assert cli("run", archive, "-o", job, "-r", "5x", "--keep-features") == 0
    before = features(job)
    untouched = {p: p.stat().st_mtime_ns for p in (job / "bags").glob("s[345].h5")}
    bags = job / "bags"
    (bags / "s0.h5").write_bytes((bags / "s0.h5").read_bytes()[:3000])
    with h5py.File(bags / "s1.h5", "r+") as file:
        file["levels/5x/features/texture"][0] = np.nan
    (bags / "s2.h5").write_bytes((bags / "s3.h5").read_bytes())
    # A bag of this program; a file of others would be named and left.
    (bags / "stray.h5").write_bytes((bags / "s3.h5").read_bytes())
    (job / "tiles/s4.h5").write_bytes(b"x")
    (bags / ".s9.h5.0123456789ab.partial").write_bytes(b"half")
    moved = {Path(repair.path).name: repair for repair in repair_job(job)}
    assert set(moved) == {"s0.h5", "s1.h5", "s2.h5", "stray.h5", "s4.h5", ".s9.h5.0123456789ab.partial"}
    assert "not a readable HDF5 file" in moved["s0.h5"].problems[0]
    assert Path(moved["s1.h5"].moved_to) == job / "quarantine/bags/s1.h5"
    assert Path(moved["s1.h5"].moved_to).is_file()
    assert not list(job.rglob("*.partial"))
    assert repair_job(job) == []
    held = quarantine_of(job)
    assert held.files == 5
    assert held.size_bytes == sum(Path(repair.moved_to).stat().st_size for repair in moved.values() if repair.moved_to)
    capsys.readouterr()
    assert cli("verify", job, "--repair") == 0
    assert f"{job / 'quarantine'} holds 5 files, 0." in capsys.readouterr().out
    shutil.rmtree(job / "quarantine")
    assert cli("verify", job, "--repair") == 0
    assert "quarantine" not in capsys.readouterr().out
    assert job_status(job).waiting == 3
    assert cli("run", "-o", job) == 0
    assert features(job) == before
    assert {p: p.stat().st_mtime_ns for p in untouched} == untouched
    assert not [finding for finding in verify_job(job) if finding.problems]


def test_repair_leaves_what_the_next_run_brings_up_to_date(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second resolution, and features of another type: sound bags, whose features are good or simply not wanted."""
    job = tmp_path / "job"
    assert cli("run", archive, "-o", job, "-r", "5x", "--limit", "3") == 0
    before = features(job)
    # --limit would leave the job's settings as they are.
    assert cli("tile", "-o", job, "-r", "5x", "-r", "20x") == 0
    shutil.copy(job / "bags/s1.h5", job / "bags/s2.h5")
    findings = {finding.slide_id: finding for finding in verify_job(job)}
    assert {name: (finding.status, finding.stale) for name, finding in findings.items()} == {
        "s0": ("stale", True),
        "s1": ("stale", True),
        "s2": ("done", False),
    }
    capsys.readouterr()
    assert cli("verify", job, "--repair") == 1
    assert "1 files put aside, 2 stale ones left for the next run" in capsys.readouterr().out
    assert [path.name for path in (job / "quarantine").rglob("*.h5")] == ["s2.h5"]
    assert {name: data for name, data in before.items() if not name.startswith("s2")} == features(job)
    asked: list[tuple[str, str]] = []
    extract = job_run.extract_features

    def noting(items: Any, *more: Any, **options: Any) -> Any:
        listed = list(items)
        asked.extend((item.slide_id, grid.label) for item in listed for grid in item.grids)
        return extract(listed, *more, **options)

    monkeypatch.setattr(job_run, "extract_features", noting)
    assert cli("run", "-o", job) == 0
    # The features of the stale bags at 5x are in the new ones without having been computed again.
    assert sorted(asked) == [("s0", "20x"), ("s1", "20x"), ("s2", "20x"), ("s2", "5x")]
    assert {name: data for name, data in features(job).items() if name.endswith(" 5x")} == before
    assert cli("tile", "-o", job) == 0
    config = job / "config.toml"
    config.write_text(config.read_text().replace('dtype = "float16"', 'dtype = "float32"'))
    assert {repair.action for repair in repair_job(job)} == {"left"}


def test_repair_refuses_what_is_no_job(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="is not a job directory"):
        repair_job(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_verify_finds_bags_of_other_settings(archive: Path, tmp_path: Path) -> None:
    job = tmp_path / "job"
    assert cli("run", archive, "-o", job, "-r", "5x", "--limit", "2") == 0
    assert cli("tile", "-o", job, "--only", "s0", "-r", "5x", "-r", "20x") == 0
    problems = {finding.slide_id: " ".join(finding.problems) for finding in verify_job(job)}
    assert "made from other grids" in problems["s0"]
    assert problems["s1"] == "", "the job's settings are those of before"
    assert cli("tile", "-o", job, "-r", "20x") == 0
    problems = {finding.slide_id: " ".join(finding.problems) for finding in verify_job(job)}
    assert all("has grids at 5x, the job wants 5x, 20x" in problem for problem in problems.values())


def test_verify_finds_slides_that_were_replaced(
    archive: Path, tmp_path: Path, make_slide: MakeSlide, tissue_picture: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tmp_path / "job"
    assert cli("run", archive, "-o", job, "-r", "5x", "--limit", "4") == 0
    before, times = features(job), (archive / "s0.svs").stat()
    make_slide(archive / "s0.svs", picture=tissue_picture(900, 800, seed=50))
    # As a copy that keeps times: only what is in the file tells.
    os.utime(archive / "s0.svs", ns=(times.st_atime_ns, times.st_mtime_ns))
    (archive / "s1.svs").write_bytes(b"cut short")
    (archive / "s2.svs").unlink()
    (archive / "s3.svs").touch()
    found = {finding.slide_id: finding for finding in verify_job(job)}
    assert {name: (finding.status, finding.stale) for name, finding in found.items()} == {
        "s0": ("stale", True),
        "s1": ("done", False),
        "s2": ("done", False),
        "s3": ("done", False),
    }
    assert found["s0"].problems == (
        f"its slide {archive / 's0.svs'} was replaced or changed since: run --redo makes it anew",
    )
    # Whether it was changed, or cannot be read here and now, nobody can tell.
    (remark,) = found["s1"].remarks
    assert remark.startswith(f"its slide {archive / 's1.svs'} cannot be opened (")
    assert remark.endswith("): not compared")
    assert [found[name].remarks for name in ("s0", "s2", "s3")] == [()] * 3
    capsys.readouterr()
    assert cli("verify", job) == 1
    assert f"s1: {remark}" in capsys.readouterr().out
    assert cli("verify", job, "--repair") == 1
    assert "0 files put aside, 1 stale ones left for the next run" in capsys.readouterr().out
    assert cli("verify", job, "--no-sources") == 0
    assert "not compared" not in capsys.readouterr().out
    assert cli("verify", job, "--no-sources", "--repair") == 0
    assert cli("run", "-o", job, "--only", "s0") == 2
    assert features(job) == before
    assert cli("run", "-o", job, "--only", "s0", "--redo") == 0
    assert features(job)["s0 5x"] != before["s0 5x"]
    assert not [finding for finding in verify_job(job) if finding.problems]


def test_verify_goes_on_where_slides_cannot_be_looked_at(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, stat = tmp_path / "job", os.stat
    assert cli("run", archive, "-o", job, "-r", "5x", "--limit", "3") == 0

    def lost(path: Any, **options: Any) -> os.stat_result:
        if Path(path).name == "s0.svs":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return stat(path, **options)

    def crashing(fn: Any, cpu_s: float, entry: SlideEntry) -> Any:
        if entry.slide_id == "s1":
            raise WorkerError("its process died of SIGSEGV")
        return run_bounded(fn, cpu_s, entry)

    monkeypatch.setattr(sources.os, "stat", lost)
    monkeypatch.setattr(replaced, "run_bounded", crashing)
    found = list(verify_job(job))
    assert [(one.status, one.problems, one.stale) for one in found] == [("done", (), False)] * 3
    assert [one.remarks for one in found] == [
        (f"its slide {archive / 's0.svs'} cannot be looked at (Stale file handle): not compared",),
        (f"its slide {archive / 's1.svs'} cannot be opened (its process died of SIGSEGV): not compared",),
        (),
    ]
    assert repair_job(job) == []


def distil(encoder: Path, seed: int) -> None:
    """Write an LR encoder for 5x; no two seeds give the same."""
    recipe, _ = timm_recipe("test_vit")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build(recipe, name="student")
    write_lr_encoder(encoder, network, recipe=recipe, tile=TileSpec(2.0, 256), licence="MIT")


@pytest.mark.slow
def test_verify_finds_an_encoder_that_was_made_anew_under_its_name(archive: Path, tmp_path: Path) -> None:
    job, encoder = tmp_path / "job", tmp_path / "lr.safetensors"

    def of(slug: str) -> dict[str, bytes]:
        levels = {path.stem: read_bag(path).levels[0] for path in sorted((job / "bags").glob("*.h5"))}
        return {name: level.features[slug].values.tobytes() for name, level in levels.items()}

    distil(encoder, 0)
    run = ("run", "-o", job, "-r", "5x", "-e", "texture", "-e", encoder, "--limit", "2", "--devices", "cpu")
    assert cli(*run, archive) == 0
    assert not [finding for finding in verify_job(job) if finding.problems]
    texture, distilled = of("texture"), of("lr")
    distil(encoder, 1)
    found = list(verify_job(job))
    assert [(finding.status, finding.stale, finding.problems) for finding in found] == [
        ("stale", True, (f"5x: {encoder} holds other weights than those of its features: run --redo makes them anew",))
    ] * 2
    assert {repair.action for repair in repair_job(job)} == {"left"}
    assert cli(*run, archive) == 2
    assert of("lr") == distilled
    assert cli(*run, archive, "--redo") == 0
    assert not [finding for finding in verify_job(job) if finding.problems]
    assert of("texture") == texture
    assert of("lr") != distilled
    encoder.unlink()
    assert not [finding for finding in verify_job(job) if finding.problems]


def test_asking_for_the_state_of_a_job_does_not_keep_a_run_out(tmp_path: Path) -> None:
    with hold_job(tmp_path, {}):
        pass
    handle = os.open(tmp_path / ".lock", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)
    threading.Timer(0.05, os.close, [handle]).start()
    with hold_job(tmp_path, {}):
        assert holder_of(tmp_path) is not None


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_not_taken_for_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Lustre without -o flock, NFS without its lock daemon."""

    def flock(handle: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OutputError, match=r"gives no locks \(.*Lustre: -o flock") as caught, hold_job(tmp_path, {}):
        pass
    assert not isinstance(caught.value, JobLockedError)
    assert holder_of(tmp_path) is None


def test_status_counts_and_paces(archive: Path, tmp_path: Path) -> None:
    job = tmp_path / "job"
    (archive / "bad.svs").write_bytes(b"no")
    assert cli("run", archive, "-o", job, "-r", "5x", "--limit", "3") == 1
    state = job_status(job)
    assert (state.slides, state.done, state.failed, state.waiting, state.run) == (3, 2, 1, 0, None)
    assert [failure.slide_id for failure in state.failures] == ["bad"]
    started = datetime.now(UTC) - timedelta(hours=1)
    with hold_job(job, {"started_utc": started.strftime("%Y-%m-%dT%H:%M:%SZ"), "slides": 9}):
        state = job_status(job, started + timedelta(hours=1))
    assert state.run is not None
    assert state.run["pid"] == os.getpid()
    assert state.finished_in_run == 3
    assert state.slides_per_hour == pytest.approx(3, rel=1e-3)
    assert state.hours_left == pytest.approx(2, rel=1e-3)
    with pytest.raises(ManifestError, match="is not a job directory"):
        job_status(archive)
    assert cli("status", job) == 1


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--workers", "2"]], ids=["here", "workers"])
def test_a_run_that_finds_all_done_leaves_what_the_slides_cost(
    archive: Path, tmp_path: Path, options: list[str]
) -> None:
    job = tmp_path / "job"
    assert cli("run", archive, "-o", job, "-r", "5x", "--limit", "3", *options) == 0
    lines = (job / "outcomes.jsonl").read_bytes()
    figures = summarise(list(read_outcomes(job).values()))
    assert figures["seconds"].keys() >= {"read", "encode"}
    assert figures["seconds_by_level"]["5x"].keys() >= {"read", "encode"}
    for command in ("run", "assemble", "extract", "tile", "segment") if not options else ("run",):
        assert cli(command, "-o", job, *options) == 0
        assert (job / "outcomes.jsonl").read_bytes() == lines, command
    # What is made anew is noted with its own times; the stages that were valid keep theirs.
    before = read_outcomes(job)["s1"]
    (job / "bags/s1.h5").unlink()
    (job / "tissue/s0.geojson").unlink()
    assert cli("run", "-o", job, *options) == 0
    after = read_outcomes(job)
    assert len((job / "outcomes.jsonl").read_text().splitlines()) == 5
    assert after["s1"].seconds["segment"] == before.seconds["segment"]
    assert after["s1"].seconds["read"] != before.seconds["read"]
    assert after["s0"].cached == ("tile", "extract", "assemble")
    assert after["s0"].counts.keys() >= {"read_s.5x", "encode_s.5x"}


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--workers", "2"]], ids=["here", "workers"])
def test_an_encoder_that_is_added_leaves_what_the_others_cost(
    archive: Path, tmp_path: Path, options: list[str]
) -> None:
    job, encoder = tmp_path / "job", tmp_path / "lr.safetensors"
    distil(encoder, 0)
    more = ("--limit", "2", "--devices", "cpu", *options)
    assert cli("run", archive, "-o", job, "-r", "5x", "-e", "texture", *more) == 0
    first = read_outcomes(job)["s1"]
    assert first.costs["5x/texture"] == {part: pytest.approx(first.seconds[part]) for part in ("read", "encode")}

    def both(after: SlideOutcome) -> None:
        """What a slide cost is what each of its features cost."""
        assert after.costs.keys() == {"5x/texture", "5x/lr"}
        for part in ("read", "encode"):
            total = sum(cost[part] for cost in after.costs.values())
            assert after.seconds[part] == pytest.approx(total)
            assert 0 < after.counts[f"{part}_s.5x"] <= total * (1 + 1e-9)

    assert cli("run", archive, "-o", job, "-e", "texture", "-e", encoder, *more) == 0
    second = read_outcomes(job)["s1"]
    both(second)
    assert second.costs["5x/texture"] == first.costs["5x/texture"]
    assert min(second.costs["5x/lr"].values()) > 0
    # A run in between that makes no features takes nothing away.
    (job / "tissue/s1.geojson").unlink()
    assert cli("segment", "-o", job, *options) == 0
    # Other weights under the same name: what is there is not made anew unless that is said.
    distil(encoder, 1)
    again = ("-e", "texture", "-e", encoder, *more)
    assert cli("run", "-o", job, *again) == 2
    assert read_outcomes(job)["s1"].costs == second.costs
    # Made anew, the one's times are replaced and the other's stay.
    assert cli("run", "-o", job, *again, "--redo") == 0
    third = read_outcomes(job)["s1"]
    both(third)
    assert third.costs["5x/texture"] == first.costs["5x/texture"]
    assert third.costs["5x/lr"] != second.costs["5x/lr"]


def test_times_of_outcomes_that_knew_no_costs_are_not_made_up() -> None:
    before = SlideOutcome("s", "done", seconds={"read": 5.0, "encode": 7.0})
    now = SlideOutcome("s", "done", seconds={"read": 1.0, "encode": 2.0}, costs={"5x/a": {}, "5x/b": {"read": 1.0}})
    assert now.keeping(before) == now


def of_run(**more: Any) -> SlideOutcome:
    return SlideOutcome("s", **({"status": "done", "path": "s.svs"} | more))


FULL = of_run(
    seconds={"open": 1.0, "segment": 1.0, "tile": 1.0, "read": 5.0, "encode": 7.0, "extract": 0.5, "assemble": 1.0},
    counts={"read_s.5x": 5.0, "encode_s.5x": 7.0},
    costs={"5x/a": {"read": 5.0, "encode": 7.0}},
)


def noted(tmp_path: Path, *outcomes: SlideOutcome) -> SlideOutcome:
    """What is known of the slide after these runs."""
    paths = JobPaths(tmp_path)
    for outcome in outcomes:
        OutcomeLog(paths).note(outcome)
    return read_outcomes(tmp_path)["s"]


def test_a_run_that_stops_before_features_takes_nothing_from_their_times(tmp_path: Path) -> None:
    tiled = of_run(seconds={"open": 1.0, "segment": 2.0, "tile": 2.0})
    valid = of_run(
        seconds={"open": 1.0, "segment": 0.1, "tile": 0.1, "assemble": 0.1},
        cached=("segment", "tile", "extract", "assemble"),
        costs={"5x/a": {}},
    )
    last = noted(tmp_path, FULL, tiled, valid)
    assert last.seconds["segment"] == 2.0
    for names in ("read", "encode"):
        assert last.seconds[names] == FULL.seconds[names]
    assert last.counts == FULL.counts
    assert last.costs == FULL.costs
    # Said again, it is not added again.
    assert noted(tmp_path, valid, valid) == last


def test_a_failure_in_between_takes_nothing_from_what_features_cost(tmp_path: Path) -> None:
    failed = of_run(status="failed", stage="extract", seconds={"open": 1.0, "segment": 9.0}, reason="no memory")
    both = of_run(
        seconds={"open": 1.0, "segment": 0.1, "tile": 0.1, "read": 1.0, "encode": 2.0},
        counts={"read_s.5x": 1.0, "encode_s.5x": 2.0},
        cached=("segment", "tile"),
        costs={"5x/a": {}, "5x/b": {"read": 1.0, "encode": 2.0}},
    )
    last = noted(tmp_path, FULL, failed, both)
    assert last.costs == {"5x/a": {"read": 5.0, "encode": 7.0}, "5x/b": {"read": 1.0, "encode": 2.0}}
    assert (last.seconds["read"], last.seconds["encode"]) == (6.0, 9.0)
    assert last.counts == {"read_s.5x": 6.0, "encode_s.5x": 9.0}
    assert last.seconds["segment"] == 0.1


def test_pace_counts_only_slides_that_were_made(archive: Path, tmp_path: Path) -> None:
    job = tmp_path / "job"
    assert cli("run", archive, "-o", job, "-r", "5x", "--limit", "2") == 0
    lines = job / "outcomes.jsonl"
    lines.write_text(lines.read_text().replace('"finished_utc": "20', '"finished_utc": "19'))
    started = datetime.now(UTC) - timedelta(hours=1)
    assert cli("run", archive, "-o", job, "-r", "5x", "--limit", "3") == 0
    told = json.loads((job / ".lock").read_text())
    assert told["unchanged"] == 2
    begun = started.strftime("%Y-%m-%dT%H:%M:%SZ")
    with hold_job(job, {"started_utc": begun, "slides": 10}) as tell:
        tell(unchanged=2)
        state = job_status(job, started + timedelta(hours=1))
        cli("status", job)
    assert (state.finished_in_run, state.unchanged_in_run) == (1, 2)
    assert state.slides_per_hour == pytest.approx(1, rel=1e-3)
    assert state.hours_left == pytest.approx(7, rel=1e-3)


def test_failures_are_listed_with_remedies_and_retried_alone(
    archive: Path, tmp_path: Path, make_slide: MakeSlide, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tmp_path / "job"
    (archive / "bad.svs").write_bytes(b"no")
    assert cli("run", archive, "-o", job, "-r", "5x") == 1
    text = (job / "failures.csv").read_text()
    assert text.startswith("slide_id,slide,stage,cause,remedy\nbad,")
    make_slide(archive / "bad.svs")
    capsys.readouterr()
    assert cli("run", archive, "-o", job, "--retry-failed", "--json") == 0
    assert [o["slide_id"] for o in json.loads(capsys.readouterr().out)["outcomes"]] == ["bad"]
    assert (job / "failures.csv").read_text() == "slide_id,slide,stage,cause,remedy\n"


def test_a_second_run_refuses(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = tmp_path / "job"
    with hold_job(job, {"started_utc": "2026-01-01T00:00:00Z"}):
        assert cli("run", archive, "-o", job) == 2
        assert f"process {os.getpid()} on" in capsys.readouterr().err
        with pytest.raises(JobLockedError), hold_job(job, {}):
            pass
        assert holder_of(job) is not None
    assert holder_of(job) is None
    assert cli("run", archive, "-o", job, "-r", "5x") == 0


@pytest.mark.slow
def test_workers_give_the_same_bags(archive: Path, tmp_path: Path) -> None:
    assert cli("run", archive, "-o", tmp_path / "one", "-r", "5x", "-r", "20x") == 0
    assert (
        cli("run", archive, "-o", tmp_path / "two", "-r", "5x", "-r", "20x", "--workers", "2", "--timeout", "120") == 0
    )
    assert features(tmp_path / "one") == features(tmp_path / "two")
    assert sorted(read_outcomes(tmp_path / "one")) == sorted(read_outcomes(tmp_path / "two"))
    assert len((tmp_path / "two/outcomes.jsonl").read_text().splitlines()) == 6


@pytest.fixture
def long_archive(archive: Path) -> Path:
    """The six slides, each many times: more than is done before a signal arrives."""
    for copy in range(20):
        for path in sorted(archive.glob("s?.svs")):
            (archive / f"{path.stem}-{copy}.svs").hardlink_to(path)
    return archive


def started(job: Path, process: subprocess.Popen[str]) -> bool:
    """Wait for the first slide to be finished."""
    deadline = time.monotonic() + 60
    while not (job / "outcomes.jsonl").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    return (job / "outcomes.jsonl").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: str(number.name))
@pytest.mark.parametrize("options", [[], ["--workers", "2"]], ids=["here", "workers"])
def test_ctrl_c_and_sigterm_end_within_seconds_and_the_run_resumes(
    long_archive: Path, tmp_path: Path, options: list[str], number: signal.Signals
) -> None:
    job = tmp_path / "job"
    (long_archive / "a-bad.svs").write_bytes(b"no")
    process = subprocess.Popen(
        [*MAIN, "run", str(long_archive), "-o", str(job), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert started(job, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    assert "run the same command again to go on" in err
    assert not list(job.rglob("*.partial"))
    done = read_outcomes(job)
    assert 0 < len(done) < 127
    # What is told of failures and in the report is as of now.
    assert ("a-bad," in (job / "failures.csv").read_text()) == ("a-bad" in done)
    assert json.loads((job / "report.json").read_text())["slides"]["total"] == len(done)
    (job / "bags").mkdir(exist_ok=True)
    (job / "bags/.s9.h5.0123456789ab.partial").write_bytes(b"left by a run that was killed")
    assert cli("run", "-o", job, "--only", "s0", "--only", "s1") == 0
    assert not list(job.rglob("*.partial"))
    assert all(check_bag(path) == [] for path in (job / "bags").glob("*.h5"))


def test_only_the_job_s_own_leavings_are_deleted(archive: Path, tmp_path: Path) -> None:
    """Another job below this one, which may be running, and files of users are none of this job's business."""
    job = tmp_path / "job"
    others = [
        job / "inner" / "bags" / ".s1.h5.0123456789ab.partial",
        job / ".mine.partial",
        job / "bags" / ".notes.partial",
    ]
    claim_folder(job, ".wsi-pipe-job", "a job")
    own = [job / ".slides.csv.0123456789ab.partial", job / "tiles" / "s0" / "5x" / ".1.png.0123456789ab.partial"]
    for path in (*others, *own):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    assert cli("segment", archive, "-o", job, "--only", "s0") == 0
    assert [path for path in (*others, *own) if path.exists()] == others
    own[0].write_bytes(b"half")
    cli("verify", job, "--repair")
    assert [path for path in (*others, *own) if path.exists()] == others


def interruptible(archive: Path, job: Path, change: str) -> subprocess.Popen[str]:
    """A run of one slide in which ``hang(file)``, which makes the file, has come in somewhere."""
    code = (
        "import time, pathlib; from wsi_pipe.cli import main; from wsi_pipe.job import run\n"
        f"def hang(mark): pathlib.Path(mark).touch(); time.sleep(600)\n{change}; main()\n"
    )
    command = [sys.executable, "-c", code, "run", str(archive), "-o", str(job), "--limit", "1"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def reached(mark: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not mark.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    assert mark.exists(), process.communicate(timeout=60)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: str(number.name))
def test_the_end_does_not_wait_for_a_dead_mount(archive: Path, tmp_path: Path, number: signal.Signals) -> None:
    """A thread that reads hangs in it, which nothing but the end of the process ends."""
    job, mark = tmp_path / "job", tmp_path / "hangs"
    process = interruptible(archive, job, f"run.open_entry = lambda *_: hang({str(mark)!r})")
    reached(mark, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert "stopping" in err
    assert "Traceback" not in err, err
    assert holder_of(job) is None


def test_a_second_ctrl_c_ends_at_once(archive: Path, tmp_path: Path) -> None:
    """The first waits for what there is to be written, which hangs here."""
    job, mark, late = tmp_path / "job", tmp_path / "hangs", tmp_path / "late"
    hangs = f"run.open_entry = lambda *_: hang({str(mark)!r}); run._Run.release_copies = lambda _: hang({str(late)!r})"
    process = interruptible(archive, job, hangs)
    for file in (mark, late):
        reached(file, process)
        # A second one right behind the first is the same, which a wrapper has passed on.
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "ended at once" in err
    assert "Traceback" not in err, err
    assert holder_of(job) is None


def test_lrmil_ends_on_sigterm_with_a_word() -> None:
    code = (
        "import sys, time, types, click; from lrmil import cli\n"
        "@click.command()\ndef wait(): print('begun', flush=True); time.sleep(600)\n"
        "module = sys.modules['waits'] = types.ModuleType('waits'); module.wait = wait\n"
        "cli.group.table['wait'] = ('waits:wait', ''); sys.argv = ['lrmil', 'wait']; cli.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert [line for line in err.splitlines() if line] == [
        "lrmil: stopping ... (once more ends at once)",
        "lrmil: terminated; run the same command again to go on",
    ]


def test_an_interrupt_that_a_library_swallows_comes_again() -> None:
    code = (
        "import signal, time; from wsi_pipe.cli import keep_interrupts\n"
        "keep_interrupts()\n"
        "try:\n    signal.raise_signal(signal.SIGTERM)\nexcept BaseException:\n    print('swallowed')\n"
        "try:\n    time.sleep(60)\nexcept KeyboardInterrupt as error:\n    print(type(error).__name__)\n"
        "    try:\n        time.sleep(1.0)\n    finally:\n        print('and left alone on the way out')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "swallowed\nTerminatedError\nand left alone on the way out\n"
    assert "Traceback" not in done.stderr


def test_the_end_does_not_wait_for_a_copy_under_way(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wsi_pipe.config import JobSettings
    from wsi_pipe.execute import Where
    from wsi_pipe.job import dispatch as dispatching
    from wsi_pipe.job import open_job, staged
    from wsi_pipe.manifest import SlideEntry, collect_slides

    arrives = threading.Event()
    monkeypatch.setattr(staged, "open_entry", lambda *_: arrives.wait(600))
    entries = [*collect_slides([str(archive)])[:2], SlideEntry("far", "https://127.0.0.1:1/far.svs", "far")]
    paths = open_job(tmp_path / "job", JobSettings(), entries)
    results = dispatching.dispatch(entries, JobSettings(), paths, Where())
    try:
        assert next(results).slide_id == "s0"
        start = time.monotonic()
        results.close()
        assert time.monotonic() - start < 10
    finally:
        arrives.set()
    assert "far" not in read_outcomes(tmp_path / "job")


def test_an_interrupt_inside_a_callback_is_heard() -> None:
    code = (
        "import signal, time, weakref; from wsi_pipe.cli import keep_interrupts\n"
        "class Thing: pass\n"
        "keep_interrupts(); thing = Thing()\n"
        "link = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))\n"
        "try:\n    del thing; time.sleep(20)\nexcept KeyboardInterrupt:\n    print('heard')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "heard\n"
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--workers", "2"]], ids=["here", "workers"])
def test_killed_at_any_moment_nothing_is_lost(archive: Path, tmp_path: Path, options: list[str]) -> None:
    assert cli("run", archive, "-o", tmp_path / "whole") == 0
    job = tmp_path / "job"
    rng = np.random.default_rng(3)
    for delay in rng.uniform(0.3, 2.5, 5):
        process = subprocess.Popen(
            [*MAIN, "run", str(archive), "-o", str(job), *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(float(delay))
        process.kill()
        process.wait()
        for path in (job / "bags").glob("*.h5"):
            assert check_bag(path) == []
    assert cli("run", archive, "-o", job, *options) == 0
    assert features(job) == features(tmp_path / "whole")


def test_log_lines(archive: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert cli("run", archive, "-o", tmp_path / "job", "-r", "5x", "--limit", "2", "--log-json", log) == 0
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert [event["event"] for event in events] == ["start", "slide", "slide", "end"]
    assert events[1]["status"] == "done"
