"""What is not ours stays: a job has a folder of its own, and no file of others is written over or removed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from wsi_pipe.bag import check_bag, check_feature_file
from wsi_pipe.cli import group, run_group
from wsi_pipe.config import JobSettings
from wsi_pipe.errors import NotOursError, OutputError
from wsi_pipe.job import JobPaths, open_job
from wsi_pipe.job.lock import hold_job
from wsi_pipe.manifest import collect_slides
from wsi_pipe.ownership import claim_folder

MakeSlide = Callable[..., Path]


def cli(*arguments: str | Path) -> int:
    return run_group(group, "wsi-pipe", [str(argument) for argument in arguments])


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def slides(tmp_path: Path, make_slide: MakeSlide) -> Path:
    make_slide(tmp_path / "in/a.svs")
    return tmp_path / "in"


@pytest.mark.parametrize("command", ["segment", "tile", "run"])
@pytest.mark.parametrize(
    "name", ["features/a/mine.pt", "notes.txt", ".hidden", "report.html", "bags/a.h5", "config.toml", ".lock"]
)
def test_a_folder_that_holds_files_and_is_no_job_is_refused(
    slides: Path, tmp_path: Path, name: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("[mine]")
    before = everything(out)
    assert cli(command, slides, "-o", out) == 2
    told = capsys.readouterr().err
    assert f"{out}: holds files already ({name.split('/')[0]}) and is not a job: nothing was written" in told
    assert "give an empty folder or one that does not exist yet" in told
    assert everything(out) == before


def test_the_folder_of_the_slides_is_refused(slides: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("run", slides, "-o", slides) == 2
    assert "is not a job" in capsys.readouterr().err
    assert [path.name for path in slides.iterdir()] == ["a.svs"]


def test_a_slide_list_of_the_user_is_not_written_over(slides: Path, tmp_path: Path) -> None:
    table = tmp_path / "project/slides.csv"
    table.parent.mkdir()
    table.write_text(f"slide,slide_id\n{slides / 'a.svs'},first\n")
    before = table.read_text()
    assert cli("segment", table, "-o", table.parent) == 2
    assert table.read_text() == before


def test_the_list_in_the_job_that_is_also_given_stays_as_it_is(slides: Path, tmp_path: Path) -> None:
    job = tmp_path / "job"
    assert cli("segment", slides, "-o", job) == 0
    table = job / "slides.csv"
    # The same said otherwise, as a spreadsheet does.
    table.write_text("slide_id,slide\na," + str(slides / "a.svs") + "\n")
    before = table.read_text()
    assert cli("segment", table, "-o", job) == 0
    assert table.read_text() == before


def test_files_of_the_user_beside_features_stay(slides: Path, tmp_path: Path) -> None:
    job = tmp_path / "job"
    assert cli("extract", slides, "-o", job, "-r", "5x") == 0
    mine = [job / "features/a/mine.pt", job / "features/a/5x.other.h5", job / "tiles/notes.txt"]
    for path in mine:
        path.write_bytes(b"mine")
    assert cli("run", slides, "-o", job, "-r", "5x") == 0
    assert check_bag(job / "bags/a.h5") == []
    assert [path.read_bytes() for path in mine] == [b"mine"] * 3
    assert not (job / "features/a/5x.texture.h5").exists()
    for path in mine[:2]:
        path.unlink()
    (job / "bags/a.h5").unlink()
    assert cli("run", slides, "-o", job, "-r", "5x") == 0
    assert not (job / "features/a").exists()


@pytest.mark.parametrize(
    "name", ["bags/a.h5", "tiles/a.h5", "thumbnails/a.jpg", "report.html", "report.csv", "report.json", "failures.csv"]
)
def test_a_foreign_file_in_the_place_of_an_output_is_named_before_work(
    slides: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tmp_path / "job"
    claim_folder(job, ".wsi-pipe-job", "a job")
    (job / name).parent.mkdir(exist_ok=True)
    (job / name).write_bytes(b"mine")
    before = everything(job)
    assert cli("run", slides, "-o", job) == 2
    assert f"{job / name}: was not made by this program and would be written over; move it" in capsys.readouterr().err
    left = everything(job)
    left.pop(".lock", None)
    assert left == before
    (job / name).unlink()
    assert cli("run", slides, "-o", job) == 0


@pytest.mark.parametrize("kind", ["bags", "tiles"])
def test_another_s_hdf5_file_in_the_place_of_a_finished_output_fails_its_slide(
    slides: Path, tmp_path: Path, kind: str, make_slide: MakeSlide
) -> None:
    job = tmp_path / "job"
    make_slide(slides / "b.svs", seed=1)
    assert cli("run", slides, "-o", job, "-r", "5x") == 0
    path = job / kind / "a.h5"
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w") as file:
        file["mine"] = np.arange(3)
    before = path.read_bytes()
    assert cli("run", slides, "-o", job, "-r", "5x") == 1
    assert path.read_bytes() == before
    failures = (job / "failures.csv").read_text().splitlines()
    assert len(failures) == 2
    assert "was not made by this program" in failures[1]


def test_another_s_file_in_the_place_of_a_half_done_slide_stays(slides: Path, tmp_path: Path) -> None:
    job = tmp_path / "job"
    assert cli("segment", slides, "-o", job) == 0
    kept = {path.stem: job / "partial" / f"{path.stem}.npz" for path in (job / "tissue").iterdir()}
    (job / "partial").mkdir()
    for number, path in enumerate(kept.values()):
        if number % 2:
            path.write_bytes(b"notes of mine")
        else:
            np.savez(path, mine=np.arange(3))
    before = {path: path.read_bytes() for path in kept.values()}
    assert before
    assert cli("run", "-o", job, "-r", "20x", "--no-report") == 0
    assert {path: path.read_bytes() for path in kept.values()} == before


@pytest.mark.parametrize("command", [["run", "--keep-features"], ["extract"]])
def test_another_s_file_in_the_place_of_a_feature_file_fails_its_slide_before_its_tiles(
    slides: Path, tmp_path: Path, command: list[str], make_slide: MakeSlide, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wsi_pipe.job import run

    make_slide(slides / "b.svs", seed=1)
    job = tmp_path / "job"
    assert cli("tile", slides, "-o", job, "-r", "5x") == 0
    mine, damaged = job / "features/a/5x.texture.h5", job / "features/b/5x.texture.h5"
    for path, content in ((mine, b"notes of mine"), (damaged, bytes(5000))):
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    begun = []
    load = run.load_part
    monkeypatch.setattr(run, "load_part", lambda p, *rest: begun.append(p.entry.slide_id) or load(p, *rest))
    assert cli(*command, "-o", job) == 1
    assert mine.read_bytes() == b"notes of mine"
    assert begun == ["b"]
    failures = (job / "failures.csv").read_text().splitlines()
    assert len(failures) == 2
    assert f"{mine}: was not made by this program and would be written over" in failures[1]
    assert check_feature_file(damaged) == [], "a damaged one of ours is made again"
    if command[0] == "run":
        assert cli("run", "-o", job) == 0, "nothing is written there without --keep-features"
        assert mine.read_bytes() == b"notes of mine"


def test_a_damaged_bag_of_ours_is_made_again(slides: Path, tmp_path: Path) -> None:
    job = tmp_path / "job"
    assert cli("run", slides, "-o", job, "-r", "5x") == 0
    (job / "bags/a.h5").write_bytes(bytes(100))
    assert cli("run", slides, "-o", job, "-r", "5x") == 0
    assert check_bag(job / "bags/a.h5") == []


def test_what_a_killed_run_left_is_ours(slides: Path, tmp_path: Path) -> None:
    """Its files without its outcomes: killed between the two."""
    job = tmp_path / "job"
    assert cli("run", slides, "-o", job, "-r", "5x") == 0
    bag = (job / "bags/a.h5").stat().st_ino
    (job / "outcomes.jsonl").unlink()
    assert cli("run", slides, "-o", job, "-r", "5x") == 0
    assert (job / "bags/a.h5").stat().st_ino == bag


def test_a_job_of_an_earlier_version_is_adopted_and_what_is_foreign_in_it_is_named(
    slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tmp_path / "job"
    assert cli("run", slides, "-o", job, "-r", "5x") == 0
    (job / ".wsi-pipe-job").unlink()
    mine = [job / "notes.txt", job / "bags/zz.h5", job / "features/a/mine.pt", job / "thumbnails/me.jpg"]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"mine")
    capsys.readouterr()
    assert cli("run", slides, "-o", job, "-r", "5x") == 0
    told = capsys.readouterr().err
    assert f"{job} was made by an earlier version and is marked as a job now" in told
    assert [str(path) in told for path in mine] == [True] * 4
    assert str(job / "bags/a.h5") not in told
    assert json.loads((job / ".wsi-pipe-job").read_text())["adopted"] is True
    assert [path.read_bytes() for path in mine] == [b"mine"] * 4
    assert cli("run", slides, "-o", job, "-r", "5x") == 0
    assert "earlier version" not in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["config", "outcomes"])
def test_a_folder_that_only_looks_like_an_earlier_job_is_refused(slides: Path, tmp_path: Path, damage: str) -> None:
    job = tmp_path / "job"
    assert cli("segment", slides, "-o", job) == 0
    (job / ".wsi-pipe-job").unlink()
    (job / {"config": "config.toml", "outcomes": "outcomes.jsonl"}[damage]).write_text('{"mine": 1}\n')
    before = everything(job)
    assert cli("segment", slides, "-o", job) == 2
    assert everything(job) == before


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema": "other", "version": 1}', "\udcff"])
def test_a_mark_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / ".wsi-pipe-job").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(NotOursError, match="is not a mark"), hold_job(tmp_path, {}):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".wsi-pipe-job"]


def test_a_job_of_a_later_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".wsi-pipe-job").write_text('{"schema": "wsi-pipe-job", "version": 2}')
    with pytest.raises(NotOursError, match="belongs to a later version"):
        open_job(tmp_path, JobSettings(), [])


def test_a_mark_that_cannot_be_read_says_nothing_of_whose_the_folder_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_job(tmp_path, JobSettings(), [])
    read = Path.read_text

    def stale(path: Path, *args: object, **kwargs: object) -> str:
        if path.name == ".wsi-pipe-job":
            raise OSError(116, os.strerror(116), str(path))
        return read(path, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "read_text", stale)
    with pytest.raises(OutputError, match=r"cannot be read .*whose the folder is cannot be told"):
        open_job(tmp_path, JobSettings(), [])


def test_what_systems_put_into_folders_counts_for_nothing(tmp_path: Path) -> None:
    for name in (".DS_Store", "lost+found", "..wsi-pipe-job.0123456789ab.partial", ".lock"):
        (tmp_path / name).write_bytes(b"")
    assert open_job(tmp_path, JobSettings(), []).marker.is_file()


def test_claims_of_two_processes_at_once_agree(tmp_path: Path) -> None:
    assert claim_folder(tmp_path / "x", ".mark", "a thing") is False
    assert claim_folder(tmp_path / "x", ".mark", "a thing") is False
    with pytest.raises(NotOursError, match="and is not another thing"):
        claim_folder(tmp_path / "x", ".other", "another thing")


def test_looking_changes_nothing(tmp_path: Path) -> None:
    assert claim_folder(tmp_path / "x", ".mark", "a thing", make=False) is False
    assert not (tmp_path / "x").exists()


def test_the_check_before_work_reads_only_what_has_no_outcome(slides: Path, tmp_path: Path) -> None:
    from wsi_pipe.job import ownership

    job = tmp_path / "job"
    assert cli("run", slides, "-o", job, "-r", "5x") == 0
    looked: list[Path] = []
    before = ownership.is_ours
    try:
        ownership.is_ours = lambda path: looked.append(path) or True  # type: ignore[func-returns-value]
        open_job(job, JobSettings(), collect_slides([str(slides)]))
    finally:
        ownership.is_ours = before
    assert looked == []
    assert JobPaths(job).bag("a").is_file()


def test_a_benchmark_writes_over_no_file_of_users(
    slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench"
    out.mkdir()
    for name in ("benchmark.json", "benchmark.md", "benchmark.html"):
        (out / name).write_text("mine")
        assert cli("benchmark", slides, "-o", out) == 2
        assert f"{out / name}: was not made by this program" in capsys.readouterr().err
        assert everything(out) == {name: b"mine"}
        (out / name).unlink()


def test_a_folder_in_the_place_of_the_report_is_named(
    slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tmp_path / "job"
    claim_folder(job, ".wsi-pipe-job", "a job")
    (job / "report.html").mkdir()
    assert cli("run", slides, "-o", job) == 2
    assert f"{job / 'report.html'}: was not made by this program" in capsys.readouterr().err


def test_a_demo_wants_a_folder_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "splits.csv").write_text("mine")
    assert cli("demo", "-o", tmp_path) == 2
    assert "holds files already (splits.csv) and is not a demo" in capsys.readouterr().err
    assert everything(tmp_path) == {"splits.csv": b"mine"}


def test_predictions_are_not_written_over_a_table_of_the_user(tmp_path: Path) -> None:
    from lrmil.cli import group as lrmil_group

    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "predictions.csv").write_text("mine")
    before = everything(tmp_path)
    arguments = [
        "predict",
        "--model",
        str(tmp_path / "model.safetensors"),
        "--bags",
        str(tmp_path),
        "-o",
        str(tmp_path),
    ]
    assert run_group(lrmil_group, "lrmil", arguments) == 2
    assert everything(tmp_path) == before


def test_a_report_that_cannot_be_written_does_not_hide_that_the_slides_are_done(
    slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tmp_path / "job"

    def full(*args: object, **kwargs: object) -> None:
        raise OutputError(f"cannot write {job / 'report.html'}: No space left on device", remedy="free some space")

    monkeypatch.setattr("wsi_pipe.report.write_report", full)
    assert cli("run", slides, "-o", job, "-r", "5x") == 1
    told = capsys.readouterr()
    assert "1 done" in told.out
    assert "the slides are through, but cannot write" in told.err
    assert f"wsi-pipe report {job}" in told.err
    assert check_bag(job / "bags/a.h5") == []
