"""The command line from end to end: stages, resume, bad input, start-up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from wsi_pipe.bag import check_bag, read_attrs, read_bag
from wsi_pipe.cli import group, run_group
from wsi_pipe.execute import Where
from wsi_pipe.ownership import claim_folder

MakeSlide = Callable[..., Path]


def cli(*arguments: str | Path) -> int:
    return run_group(group, "wsi-pipe", [str(argument) for argument in arguments])


@pytest.fixture
def run_json(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Run a command with --json; its exit code and what it printed."""

    def run(*arguments: str | Path) -> tuple[int, dict[str, Any]]:
        capsys.readouterr()
        code = cli(*arguments, "--json")
        return code, json.loads(capsys.readouterr().out)

    return run


RunJson = Callable[..., tuple[int, dict[str, Any]]]


def datasets(path: Path) -> dict[str, Any]:
    """Every data set and attribute of a bag but its date."""
    found: dict[str, Any] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = item[()].tobytes()
        found.update({f"{name}@{key}": np.asarray(value).tolist() for key, value in item.attrs.items()})

    with h5py.File(path) as file:
        visit("", file)
        file.visititems(visit)
    return {key: value for key, value in found.items() if key != "@created_utc"}


def test_features_go_straight_into_the_bag(
    tmp_path: Path, make_slide: MakeSlide, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of features in between is written where it is to be kept, and only there."""
    from wsi_pipe.job import features

    written: list[Path] = []
    write = features.write_feature_file

    def counting(path: Path, *arguments: Any) -> None:
        written.append(path)
        write(path, *arguments)

    monkeypatch.setattr(features, "write_feature_file", counting)
    slide = make_slide(tmp_path / "s.svs")
    assert cli("run", slide, "-o", tmp_path / "a", "-r", "20x", "-r", "5x") == 0
    assert not written
    assert not (tmp_path / "a/features").exists()
    assert cli("run", slide, "-o", tmp_path / "b", "-r", "20x", "-r", "5x", "--keep-features") == 0
    assert len(written) == 2
    one, other = (read_bag(tmp_path / job / "bags/s.h5") for job in "ab")
    for ours, theirs in zip(one.levels, other.levels, strict=True):
        assert np.array_equal(ours.features["texture"].values, theirs.features["texture"].values)
        assert ours.features["texture"].fingerprint == theirs.features["texture"].fingerprint
    # Another encoder's grid is added to the bag: what it holds stays, only the new goes through the engine.
    assert cli("run", slide, "-o", tmp_path / "a", "-r", "20x", "-r", "5x", "-r", "10x") == 0
    assert [level.grid.label for level in read_bag(tmp_path / "a/bags/s.h5").levels] == ["5x", "10x", "20x"]
    assert check_bag(tmp_path / "a/bags/s.h5") == []


def test_run_makes_a_valid_bag_with_aligned_grids(tmp_path: Path, make_slide: MakeSlide, run_json: RunJson) -> None:
    make_slide(tmp_path / "in" / "my slide 🔬.svs")
    code, result = run_json("run", tmp_path / "in", "-o", tmp_path / "job")
    assert code == 0
    (outcome,) = result["outcomes"]
    assert (outcome["status"], outcome["slide_id"]) == ("done", "my slide 🔬")
    path = tmp_path / "job/bags/my slide 🔬.h5"
    assert check_bag(path) == []
    low, high = read_bag(path).levels
    assert (low.grid.label, high.grid.label) == ("5x", "20x")
    assert len(low.grid) == outcome["tiles"]["5x"] > 0
    assert high.grid.parent is not None
    np.testing.assert_array_equal(low.grid.cells[high.grid.parent], high.grid.cells // 4)
    assert low.features["texture"].values.shape[1] >= 128
    for name in ("tissue/my slide 🔬.geojson", "thumbnails/my slide 🔬.jpg", "thumbnails/my slide 🔬.grid.jpg"):
        assert (tmp_path / "job" / name).stat().st_size > 1000
    for name in ("config.toml", "slides.csv", "outcomes.jsonl", "report.html"):
        assert (tmp_path / "job" / name).is_file()
    assert not (tmp_path / "job/features/my slide 🔬").exists()
    assert not list((tmp_path / "job").rglob("*.partial"))


def test_four_commands_give_what_run_gives(tmp_path: Path, make_slide: MakeSlide) -> None:
    make_slide(tmp_path / "s.svs")
    assert cli("run", tmp_path / "s.svs", "-o", tmp_path / "one") == 0
    for command in ("segment", "tile", "extract", "assemble"):
        assert cli(command, tmp_path / "s.svs", "-o", tmp_path / "four") == 0
    assert datasets(tmp_path / "one/bags/s.h5") == datasets(tmp_path / "four/bags/s.h5")
    assert (tmp_path / "one/tissue/s.geojson").read_bytes() == (tmp_path / "four/tissue/s.geojson").read_bytes()


def test_run_again_does_only_what_is_stale(tmp_path: Path, make_slide: MakeSlide, run_json: RunJson) -> None:
    slide, job = make_slide(tmp_path / "s.svs"), tmp_path / "job"

    def cached(*options: str) -> set[str]:
        code, result = run_json("run", slide, "-o", job, *options)
        assert code == 0
        return set(result["outcomes"][0]["cached"])

    everything = {"segment", "tile", "extract", "assemble"}
    assert cached("-r", "5x") == set()
    made = (job / "bags/s.h5").stat().st_mtime_ns
    assert cached() == everything, "without options a job keeps its settings"
    assert (job / "bags/s.h5").stat().st_mtime_ns == made
    features = read_bag(job / "bags/s.h5").levels[0].features["texture"]
    assert cached("-r", "5x", "-r", "20x") == {"segment"}
    both = read_bag(job / "bags/s.h5")
    assert [level.grid.label for level in both.levels] == ["5x", "20x"]
    assert both.levels[0].features["texture"].fingerprint == features.fingerprint
    # What is finished is made anew only where that is said.
    assert cli("run", slide, "-o", job, "--min-tissue", "0.9") == 2
    assert cached() == everything
    assert cached("--min-tissue", "0.9", "--redo") == {"segment"}
    # Another mask may keep just the same tiles: then their features stay.
    assert cached("--mask-mpp", "6", "--redo") <= {"extract"}
    assert cached() == everything
    (job / "bags/s.h5").write_bytes((job / "bags/s.h5").read_bytes()[:-100])
    # The grids were in the bag.
    assert cached() == {"segment"}
    assert check_bag(job / "bags/s.h5") == []


def test_a_moved_slide_keeps_its_features(tmp_path: Path, make_slide: MakeSlide, run_json: RunJson) -> None:
    slide, job = make_slide(tmp_path / "s.svs"), tmp_path / "job"
    assert cli("run", slide, "-o", job, "-r", "5x") == 0
    (tmp_path / "elsewhere").mkdir()
    moved = slide.rename(tmp_path / "elsewhere" / "s.svs")
    code, result = run_json("run", moved, "-o", job)
    assert code == 0
    assert {"segment", "extract"} <= set(result["outcomes"][0]["cached"])
    assert read_attrs(job / "bags/s.h5").slide_path == str(moved)


def test_a_changed_slide_is_done_anew_if_told(
    tmp_path: Path, make_slide: MakeSlide, run_json: RunJson, capsys: pytest.CaptureFixture[str]
) -> None:
    slide, job = make_slide(tmp_path / "s.svs"), tmp_path / "job"
    assert cli("run", slide, "-o", job, "-r", "5x") == 0
    before = datasets(job / "bags/s.h5")
    make_slide(slide, seed=5)
    assert cli("run", slide, "-o", job) == 2
    assert "--redo" in capsys.readouterr().err
    assert datasets(job / "bags/s.h5") == before
    code, result = run_json("run", slide, "-o", job, "--redo")
    assert code == 0
    assert result["outcomes"][0]["cached"] == []
    assert datasets(job / "bags/s.h5")["levels/5x/features/texture"] != before["levels/5x/features/texture"]


def test_bad_slides_among_good_ones(tmp_path: Path, make_slide: MakeSlide, run_json: RunJson) -> None:
    folder = tmp_path / "in"
    make_slide(folder / "a.svs")
    make_slide(folder / "z.svs", seed=1)
    (folder / "empty.svs").write_bytes(b"")
    (folder / "text.svs").write_text("this is not a slide\n" * 50)
    (folder / "cut.svs").write_bytes((folder / "a.svs").read_bytes()[:20_000])
    code, result = run_json("run", folder, "-o", tmp_path / "job", "-r", "5x")
    assert code == 1
    outcomes = {outcome["slide_id"]: outcome for outcome in result["outcomes"]}
    assert {name: outcome["status"] for name, outcome in outcomes.items()} == {
        "a": "done", "z": "done", "empty": "failed", "text": "failed", "cut": "failed",
    }  # fmt: skip
    for name in ("empty", "text", "cut"):
        assert outcomes[name]["stage"] in ("open", "segment", "extract")
        assert name in outcomes[name]["reason"], outcomes[name]["reason"]
        assert "Traceback" not in outcomes[name]["reason"]
        assert outcomes[name]["error"] in ("SlideOpenError", "SlideReadError", "UnsupportedSlideError")
    assert sorted(path.name for path in (tmp_path / "job/bags").iterdir()) == ["a.h5", "z.h5"]
    assert cli("verify", tmp_path / "job") == 0


def test_blank_slide_is_empty_with_a_reason(tmp_path: Path, make_slide: MakeSlide, run_json: RunJson) -> None:
    make_slide(tmp_path / "blank.svs", picture=np.full((1024, 1024, 3), 244, np.uint8))
    code, result = run_json("run", tmp_path / "blank.svs", "-o", tmp_path / "job")
    assert code == 0
    assert result["outcomes"][0]["status"] == "empty"
    assert result["outcomes"][0]["reason"]
    bag = read_bag(tmp_path / "job/bags/blank.h5")
    assert bag.attrs.status == "empty"
    assert bag.attrs.empty_reason == result["outcomes"][0]["reason"]
    assert [level.features["texture"].values.shape[0] for level in bag.levels] == [0, 0]
    assert check_bag(tmp_path / "job/bags/blank.h5") == []


def test_missing_mpp_names_the_remedy_and_the_remedy_works(
    tmp_path: Path, make_slide: MakeSlide, run_json: RunJson
) -> None:
    slide = make_slide(tmp_path / "s.tif", mpp=None, style="generic")
    code, result = run_json("run", slide, "-o", tmp_path / "job", "-r", "5x")
    assert code == 1
    assert "--slide-mpp" in result["outcomes"][0]["remedy"]
    assert "column mpp" in result["outcomes"][0]["remedy"]
    code, result = run_json("run", slide, "-o", tmp_path / "job", "-r", "5x", "--slide-mpp", "0.5")
    assert code == 0
    attrs = read_attrs(tmp_path / "job/bags/s.h5")
    assert attrs.mpp_source == "user"
    assert attrs.mpp_l0 == (0.5, 0.5)


def test_upsampling_is_refused_unless_allowed(tmp_path: Path, make_slide: MakeSlide, run_json: RunJson) -> None:
    slide = make_slide(tmp_path / "s.svs", mpp=1.0)
    code, result = run_json("run", slide, "-o", tmp_path / "job", "-r", "20x")
    assert code == 1
    assert result["outcomes"][0]["error"] == "ResolutionError"
    assert "--allow-upsampling" in (result["outcomes"][0]["reason"] + str(result["outcomes"][0]["remedy"]))
    code, result = run_json("tile", slide, "-o", tmp_path / "job", "-r", "20x", "--allow-upsampling")
    assert code == 0
    assert result["outcomes"][0]["tiles"]["20x"] > 0


def test_mask_given_and_mask_edited(tmp_path: Path, make_slide: MakeSlide, run_json: RunJson) -> None:
    slide, job = make_slide(tmp_path / "s.svs"), tmp_path / "job"
    square = {"type": "Polygon", "coordinates": [[[0, 0], [512, 0], [512, 512], [0, 512], [0, 0]]]}
    mask = tmp_path / "edited.geojson"
    mask.write_text(json.dumps({"type": "FeatureCollection", "features": [{"type": "Feature", "geometry": square}]}))
    assert cli("tile", slide, "-o", job, "-r", "20x", "--mask", mask) == 0
    assert read_bag(job / "tiles/s.h5").levels[0].grid.cells.tolist() == [[0, 0], [1, 0], [0, 1], [1, 1]]
    # What another program wrote over the job's own mask is the user's work: refused, not written over.
    stored = job / "tissue/s.geojson"
    stored.write_text(mask.read_text())
    code, result = run_json("tile", slide, "-o", job, "-r", "20x")
    assert code == 1
    assert "--mask" in result["outcomes"][0]["remedy"]
    assert stored.read_text() == mask.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.svs", "-o", "job"], "nowhere.svs: no such file or folder"),
        (["run", "s.svs", "-o", "job", "-e", "no-such-encoder"], "no-such-encoder"),
        (["run", "s.svs", "-o", "job", "-r", "20y"], "20y"),
        (["run", "s.svs", "-o", "job", "-r", "20x", "-r", "7x"], ""),
        (
            ["run", "s.svs", "-o", "job", "-r", "20x", "-e", "5x=texture"],
            "an encoder is given for 5x, but the grids are 20x",
        ),
        (["run", "s.svs", "-o", "job", "--slide-mpp", "20x"], "--slide-mpp '20x' is not a resolution"),
        (["run", "s.svs", "-o", "job", "--slides", "bad.csv"], "unknown column 'mp': did you mean 'mpp'"),
        (["run", "s.svs", "-o", "job", "--only", "x"], "no slide has the id x"),
        (["run", "s.svs", "-o", "job", "--config", "no.toml"], "no.toml"),
        (["run", "-o", "job"], "no slides are given"),
        (["run", "s.svs"], "'-o' / '--out'"),
        (["run", "s.svs", "-o", "s.svs"], "s.svs"),
        (["run", "s.svs", "-o", "job", "--min-tissue", "2"], "--min-tissue"),
        (["verify", "in"], "is not a job directory"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(
    tmp_path: Path,
    make_slide: MakeSlide,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    make_slide(tmp_path / "s.svs")
    (tmp_path / "in").mkdir()
    (tmp_path / "bad.csv").write_text("slide,mp\ns.svs,red\n")
    if arguments[-1] == "7x":
        # Grids that do not divide each other are a property of the request, but found where grids are laid.
        assert cli(*arguments) in (1, 2)
        return
    assert cli(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "job/bags").exists()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.toml", b"[tile", "config.toml is not valid TOML"),
        ("config.toml", b"reader = 'best'", "reader 'best' must be one of auto"),
        ("config.toml", b"[extract]\nmemory_mib = 0", "memory_mib 0 must be at least 16"),
        ("config.toml", b"[extract]\nencoders = {}", "no encoder is given"),
        ("config.toml", b"[tile]\njudge_um = 0", "judge_um 0.0 must be above zero"),
        ("slides.csv", b"", "slides.csv is empty; the slide list needs a header row"),
        ("slides.csv", b"\xff\xfe", "give a CSV in UTF-8"),
    ],
)
def test_damaged_files_of_a_job_are_named(
    tmp_path: Path, make_slide: MakeSlide, capsys: pytest.CaptureFixture[str], file: str, content: bytes, message: str
) -> None:
    slide, job = make_slide(tmp_path / "s.svs"), tmp_path / "job"
    claim_folder(job, ".wsi-pipe-job", "a job")
    (job / file).write_bytes(content)
    assert cli("run", slide, "-o", job) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(job / file) in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-e", "no-such-encoder", "--workers", "2"], "no-such-encoder"),
        (["--layers", "1", "--workers", "2"], "texture"),
        (["--layers", "1"], "texture"),
        (["--scheduler", "tcp://127.0.0.1:1"], "no Dask scheduler answers at tcp://127.0.0.1:1"),
        (["--log-json", "gone/log.jsonl"], "gone"),
    ],
)
def test_where_nothing_can_be_done_the_exit_code_is_2(
    tmp_path: Path,
    make_slide: MakeSlide,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("wsi_pipe.asked.Where", partial(Where, connect_s=1.0))
    slide = make_slide(tmp_path / "s.svs")
    assert cli("run", slide, "-o", tmp_path / "job", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "job/bags").exists()


def test_an_unreadable_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("plan", tmp_path, "--each", tmp_path / "gone/plan.jsonl") == 2
    (tmp_path / "s.svs").write_bytes(b"no")
    assert cli("plan", tmp_path, "--each", tmp_path / "gone/plan.jsonl") == 2
    assert f"{tmp_path}/gone/plan.jsonl: No such file or directory" in capsys.readouterr().err


def test_retry_failed_goes_before_limit(tmp_path: Path, make_slide: MakeSlide, run_json: RunJson) -> None:
    make_slide(tmp_path / "in/a.svs")
    (tmp_path / "in/b.svs").write_bytes(b"no")
    assert cli("run", tmp_path / "in", "-o", tmp_path / "job", "-r", "5x") == 1
    code, result = run_json("run", "-o", tmp_path / "job", "--retry-failed", "--limit", "1")
    assert code == 1
    assert [outcome["slide_id"] for outcome in result["outcomes"]] == ["b"]


def test_a_slide_of_the_same_name_elsewhere_replaces_nothing(
    tmp_path: Path, make_slide: MakeSlide, run_json: RunJson
) -> None:
    job = tmp_path / "job"
    assert cli("run", make_slide(tmp_path / "a/s.svs"), "-o", job, "-r", "5x") == 0
    code, result = run_json("run", make_slide(tmp_path / "b/s.svs", seed=1), "-o", job)
    assert code == 0
    assert [outcome["slide_id"] for outcome in result["outcomes"]] == ["b--s"]
    assert read_attrs(job / "bags/s.h5").slide_path == str(tmp_path / "a/s.svs")


def test_relative_and_absolute_paths_are_one_slide(
    tmp_path: Path, make_slide: MakeSlide, run_json: RunJson, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_slide(tmp_path / "s.svs")
    monkeypatch.chdir(tmp_path)
    assert cli("run", "s.svs", "-o", "job", "-r", "5x") == 0
    code, result = run_json("run", "-o", "job")
    assert code == 0
    assert set(result["outcomes"][0]["cached"]) == {"segment", "tile", "extract", "assemble"}


def test_info_of_slides_that_all_fail_shows_no_empty_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.svs").write_bytes(b"nothing")
    assert cli("info", tmp_path / "bad.svs") == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "bad.svs" in shown.err


MAIN = "import sys; from wsi_pipe.cli import group, run_group; sys.exit(run_group(group, 'wsi-pipe', sys.argv[1:]))"

AS_NOBODY = """
import os, sys, tempfile
from contextlib import redirect_stderr, redirect_stdout
from wsi_pipe.cli import group, run_group
warm, arguments = sys.argv[1], sys.argv[2:]
# The interpreter itself may lie where only root can read: import everything first.
with tempfile.TemporaryDirectory() as job, open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
    assert run_group(group, "wsi-pipe", ["run", warm, "-o", job, "-r", "5x"]) == 0
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
sys.exit(run_group(group, "wsi-pipe", arguments))
"""


def as_nobody(warm: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command as a user who is not root, after one on the slide ``warm`` as ourselves."""
    command = [sys.executable, "-c", AS_NOBODY, str(warm), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def open_folder(tmp_path: Path) -> Path:
    """A folder that every user may enter."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() in ("root",) and folder.stat().st_uid == os.geteuid() and str(folder).startswith("/tmp/"):
            folder.chmod(0o755)
    return tmp_path


def test_no_permission_to_read(open_folder: Path, make_slide: MakeSlide) -> None:
    slide = make_slide(open_folder / "s.svs")
    good = make_slide(open_folder / "t.svs")
    slide.chmod(0)
    good.chmod(0o644)
    job = open_folder / "job"
    job.mkdir()
    job.chmod(0o777)
    done = as_nobody(good, "run", slide, good, "-o", job, "-r", "5x", "--json")
    assert done.returncode == 1, done.stderr
    outcomes = {outcome["slide_id"]: outcome for outcome in json.loads(done.stdout)["outcomes"]}
    assert outcomes["t"]["status"] == "done"
    assert outcomes["s"]["error"] == "SlideOpenError"
    assert "ermission" in outcomes["s"]["reason"]


def test_output_folder_read_only(open_folder: Path, make_slide: MakeSlide) -> None:
    slide = make_slide(open_folder / "s.svs")
    slide.chmod(0o644)
    sealed = open_folder / "sealed"
    sealed.mkdir()
    sealed.chmod(0o555)
    done = as_nobody(slide, "run", slide, "-o", sealed / "job")
    assert done.returncode == 2, done.stderr
    assert "cannot write" in done.stderr
    assert "check the folder's permissions" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_disk_full_stops_clearly_and_resumes(tmp_path: Path, make_slide: MakeSlide) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    slides, job = tmp_path / "in", tmp_path / "job"
    for seed, name in enumerate("abcdef"):
        make_slide(slides / f"{name}.svs", seed=seed)
    job.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(job)], capture_output=True)
    if mount.returncode:
        pytest.skip("this machine does not let us mount a small file system")
    try:
        done = subprocess.run(
            [sys.executable, "-c", MAIN, "run", str(slides), "-o", str(job)],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 1, done.stderr
        assert "No space left" in done.stderr
        assert "free some space" in done.stderr
        assert "Traceback" not in done.stderr
        for bag in (job / "bags").glob("*.h5"):
            assert check_bag(bag) == []
        assert not list(job.rglob("*.partial"))
        subprocess.run(["mount", "-o", "remount,size=100m", str(job)], check=True)
        assert cli("run", slides, "-o", job) == 0
        assert len(list((job / "bags").glob("*.h5"))) == 6
    finally:
        subprocess.run(["umount", str(job)], check=False)


def test_csv_gives_ids_cases_and_settings(tmp_path: Path, make_slide: MakeSlide, run_json: RunJson) -> None:
    make_slide(tmp_path / "in/a.svs")
    make_slide(tmp_path / "in/b.svs")
    (tmp_path / "slides.csv").write_text(
        "slide,slide_id,case_id,mpp,min_tissue\nin/a.svs,A,patient,,0.1\nin/b.svs,B,patient,1.0,0.99\n"
    )
    code, _ = run_json("tile", "--slides", tmp_path / "slides.csv", "-o", tmp_path / "job", "-r", "5x")
    assert code == 0
    a, b = read_bag(tmp_path / "job/tiles/A.h5"), read_bag(tmp_path / "job/tiles/B.h5")
    assert a.attrs.case_id == b.attrs.case_id == "patient"
    assert (a.levels[0].grid.min_tissue, b.levels[0].grid.min_tissue) == (0.1, 0.99)
    assert b.attrs.mpp_l0 == (1.0, 1.0)
    assert cli("tile", "-o", tmp_path / "job", "-r", "5x") == 0, "a job remembers its slides"


def test_tiles_as_images(tmp_path: Path, make_slide: MakeSlide) -> None:
    import cv2

    slide = make_slide(tmp_path / "s.svs")
    assert cli("tile", slide, "-o", tmp_path / "job", "--save-tiles", "png", "--save-most", "5") == 0
    for label in ("5x", "20x"):
        files = list((tmp_path / "job/tiles/s" / label).glob("*.png"))
        assert 1 <= len(files) <= 5
        picture = cv2.imread(str(files[0]))
        assert picture is not None
        assert picture.shape == (256, 256, 3)


def test_info(tmp_path: Path, make_slide: MakeSlide, capsys: pytest.CaptureFixture[str]) -> None:
    slide = make_slide(tmp_path / "s.svs", mpp=0.25)
    (tmp_path / "bad.svs").write_bytes(b"nothing")
    assert cli("info", slide) == 0
    shown = capsys.readouterr().out
    for part in ("aperio", "1,536 x 1,280", "0.25", "1, 4", "JPEG tiles are decoded by "):
        assert part in shown
    assert cli("info", slide, tmp_path / "bad.svs", "--json") == 1
    facts, bad = json.loads(capsys.readouterr().out)
    assert (facts["width"], facts["height"], facts["mpp"]) == (1536, 1280, [0.25, 0.25])
    # 1536 x 1280 px at 0.25 um/px in tiles of 128 um (20x) and 512 um (5x).
    assert facts["tiles"] == {"5x": 1, "20x": 6} or facts["tiles"] == {"5x": 1, "20x": 9}
    assert "bad.svs" in bad["error"]


def test_verify_finds_what_is_wrong(tmp_path: Path, make_slide: MakeSlide, run_json: RunJson) -> None:
    for name in "abc":
        make_slide(tmp_path / "in" / f"{name}.svs", seed=ord(name))
    job = tmp_path / "job"
    assert cli("run", tmp_path / "in", "-o", job, "-r", "5x") == 0
    assert cli("verify", job) == 0
    with h5py.File(job / "bags/a.h5", "r+") as file:
        file["levels/5x/features/texture"][0, 0] = np.nan
    (job / "bags/b.h5").write_bytes((job / "bags/c.h5").read_bytes())
    (job / "bags/stray.h5").write_bytes(b"")
    code, findings = run_json("verify", job)
    assert code == 1
    found = {finding["slide_id"]: " ".join(finding["problems"]) for finding in findings}
    assert "NaN or infinity in 1 rows" in found["a"]
    assert "bag of another slide" in found["b"]
    assert found["c"] == ""
    assert "belongs to no slide" in found["stray"]


def test_help_starts_without_heavy_imports() -> None:
    code = (
        "import sys, resource; from wsi_pipe.cli import group, run_group\n"
        "assert run_group(group, 'wsi-pipe', ['--help']) == 0\n"
        "heavy = {'torch', 'timm', 'cv2', 'h5py', 'pandas', 'matplotlib', 'dask', 'openslide'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "benchmark" in done.stdout


@pytest.mark.parametrize("command", ["segment", "tile", "run"])
def test_torch_is_not_imported_without_need(tmp_path: Path, make_slide: MakeSlide, command: str) -> None:
    slide = make_slide(tmp_path / "s.svs")
    code = (
        "import sys; from wsi_pipe.cli import group, run_group\n"
        "assert run_group(group, 'wsi-pipe', sys.argv[1:]) == 0\n"
        "heavy = {'torch', 'timm', 'pandas', 'dask', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, command, str(slide), "-o", str(tmp_path / "job")],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
