"""Calling ``run`` again: what becomes of what is there. Each row of the table in docs/jobs.md is a test here."""

from __future__ import annotations

import csv
import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from wsi_pipe.bag import check_bag, read_attrs, read_bag
from wsi_pipe.care import Wish, prune_list
from wsi_pipe.cli import group, run_group
from wsi_pipe.job import fingerprints, load_settings, load_slides, read_outcomes
from wsi_pipe.job import run as job_run
from wsi_pipe.job.drawing import SlidePictures, draw_slide
from wsi_pipe.job.lock import hold_job
from wsi_pipe.job.paths import JobPaths
from wsi_pipe.outcome import focus_of

MakeSlide = Callable[..., Path]
DATA = Path(__file__).parent / "data"


def cli(*arguments: object) -> int:
    return run_group(group, "wsi-pipe", [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def template(
    tmp_path_factory: pytest.TempPathFactory, make_slide: MakeSlide, tissue_picture: Callable[..., NDArray[np.uint8]]
) -> Path:
    """A folder with two slides in ``in`` and their job, 5x and 20x, in ``job``."""
    root = tmp_path_factory.mktemp("jobs")
    for seed, name in enumerate("ab"):
        make_slide(root / "in" / f"{name}.svs", picture=tissue_picture(768, 640, seed))
    make_slide(root / "other.svs", picture=tissue_picture(768, 640, 7))
    assert cli("run", root / "in", "-o", root / "job", "-r", "5x", "-r", "20x", "--no-report") == 0
    return root


@pytest.fixture
def job(template: Path, tmp_path: Path) -> Path:
    """A job of two slides of one's own; its slides lie beside it in ``in``."""
    shutil.copytree(template / "job", tmp_path / "job")
    shutil.copytree(template / "in", tmp_path / "in")
    listed = tmp_path / "job/slides.csv"
    listed.write_text(listed.read_text().replace(str(template), str(tmp_path)))
    assert cli("run", "-o", tmp_path / "job", "--no-report") == 0, "the slides were moved"
    return tmp_path / "job"


@pytest.fixture
def again(job: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """Call ``run`` once more: exit code, outcomes by slide, and what was said on standard error."""

    def call(*arguments: object, out: Path = job, command: str = "run") -> tuple[int, dict[str, Any], str]:
        capsys.readouterr()
        report = ["--no-report"] if command == "run" else []
        code = cli(command, "-o", out, *report, "--json", *arguments)
        said = capsys.readouterr()
        outcomes = json.loads(said.out)["outcomes"] if said.out.strip() else []
        return code, {outcome["slide_id"]: outcome for outcome in outcomes}, said.err

    return call


Again = Callable[..., tuple[int, dict[str, Any], str]]
ALL = {"segment", "tile", "extract", "assemble"}


def state(job: Path) -> dict[str, bytes]:
    """Every file of a job that says what it holds."""
    kept = ("config.toml", "slides.csv", "tissue", "tiles", "bags")
    files = [path for name in kept for path in ([job / name] if (job / name).is_file() else (job / name).rglob("*"))]
    return {str(path.relative_to(job)): path.read_bytes() for path in files if path.is_file()}


def features(job: Path, slide: str = "a") -> dict[str, NDArray[Any]]:
    bag = read_bag(job / "bags" / f"{slide}.h5")
    return {f"{level.grid.label}/{slug}": f.values for level in bag.levels for slug, f in level.features.items()}


def write_list(path: Path, *rows: dict[str, object]) -> Path:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


def changes(job: Path) -> list[tuple[str, str, str, str]]:
    lines = (job / "changes.jsonl").read_text().splitlines() if (job / "changes.jsonl").is_file() else []
    found = [json.loads(line) for line in lines]
    return [(c["slide_id"], c["what"], c["old"], c["new"]) for c in found if c["what"] != "path"]


def test_nothing_new(job: Path, again: Again) -> None:
    before = state(job)
    code, outcomes, said = again()
    assert (code, {tuple(sorted(o["cached"])) for o in outcomes.values()}) == (0, {tuple(sorted(ALL))})
    assert state(job) == before
    assert "changed" not in said


def test_new_slides_are_added(job: Path, again: Again, template: Path) -> None:
    before = features(job)
    code, outcomes, _ = again(template / "other.svs")
    assert (code, set(outcomes)) == (0, {"other"})
    assert [entry.slide_id for entry in load_slides(job)] == ["a", "b", "other"]
    np.testing.assert_array_equal(features(job)["20x/texture"], before["20x/texture"])
    assert set(features(job, "other")) == {"5x/texture", "20x/texture"}


def test_fewer_slides_take_nothing_away(job: Path, again: Again) -> None:
    before = state(job)
    code, outcomes, _ = again(job.parent / "in/a.svs")
    assert (code, set(outcomes)) == (0, {"a"})
    assert state(job) == before


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--min-tissue", "0.9"], "min_tissue 0.25 -> 0.9"),
        (["--mask-mpp", "6"], "mpp 8 -> 6"),
        (["--method", "od"], "method stain -> od"),
        (["--tile-px", "128"], "tile_px 256 -> 128"),
        (["--dtype", "float32"], "dtype float16 -> float32"),
        (["--reader", "openslide"], "reader auto -> openslide"),
        (["--slide-mpp", "0.25", "--override-mpp"], "mpp 0.5x0.5 -> 0.25x0.25"),
    ],
)
def test_another_setting_ends_the_call_before_any_work(job: Path, again: Again, options: list[str], why: str) -> None:
    before = state(job)
    code, _, said = again(*options)
    assert code == 2
    assert why in said
    assert "finished work of 2 slides" in said
    assert "by the job's own timings" in said
    assert "--redo" in said
    assert "-o" in said
    assert len(said.strip().splitlines()) == 1
    assert state(job) == before
    code, outcomes, said = again(*options, "--redo")
    assert code == 0
    assert all(set(outcome["cached"]) < ALL for outcome in outcomes.values())
    assert set(features(job)) == {"5x/texture", "20x/texture"}
    assert cli("verify", job) == 0
    code, outcomes, _ = again()
    assert (code, {tuple(sorted(o["cached"])) for o in outcomes.values()}) == (0, {tuple(sorted(ALL))})


def test_settings_that_change_no_result_change_nothing(job: Path, again: Again) -> None:
    code, outcomes, _ = again("--batch-size", 3, "--memory", 128, "--read-threads", 1)
    assert (code, {tuple(sorted(o["cached"])) for o in outcomes.values()}) == (0, {tuple(sorted(ALL))})


def test_a_change_of_masks_also_counts_where_only_masks_are(tmp_path: Path, template: Path, again: Again) -> None:
    out = tmp_path / "masks"
    assert again(template / "in", out=out, command="segment")[0] == 0
    code, _, said = again(template / "in", "--method", "od", out=out, command="segment")
    assert code == 2
    assert "masks of 2" in said
    assert again(template / "in", "--method", "od", "--redo", out=out, command="segment")[0] == 0


def test_another_resolution_is_added_and_one_left_out_stays(job: Path, again: Again) -> None:
    before = features(job)
    code, outcomes, _ = again("-r", "10x")
    assert (code, "extract" in outcomes["a"]["cached"]) == (0, False)
    now = features(job)
    assert set(now) == {"5x/texture", "10x/texture", "20x/texture"}
    for place in before:
        np.testing.assert_array_equal(now[place], before[place])
    settings = load_settings(job)
    assert settings is not None
    assert sorted(settings.tile.resolutions) == [0.5, 1.0, 2.0]
    assert check_bag(job / "bags/a.h5") == []
    assert cli("verify", job) == 0
    held = state(job)
    assert again("-r", "5x")[0] == 0
    assert state(job) == held


def test_how_sharp_tiles_are_is_known_as_long_as_they_are_there(job: Path, again: Again) -> None:
    before = focus_of(read_outcomes(job)["a"].counts)
    assert before
    assert again("-r", "10x")[0] == 0
    after = focus_of(read_outcomes(job)["a"].counts)
    assert before.items() < after.items()
    slide = Path(load_slides(job)[0].path)
    slide.rename(slide.with_suffix(".away"))
    assert again()[0] == 1
    slide.with_suffix(".away").rename(slide)
    assert again()[0] == 0
    assert focus_of(read_outcomes(job)["a"].counts) == after


def test_a_bag_follows_its_own_grids_where_tiles_were_deleted(job: Path, again: Again) -> None:
    """A run keeps grids in the bag alone; the stage that ends with them writes a file, and takes them from there."""
    before = (job / "bags/a.h5").read_bytes()
    assert not (job / "tiles").exists()
    code, outcomes, _ = again(command="tile")
    assert (code, outcomes["a"]["cached"]) == (0, ["segment", "tile"])
    (low, _), (own, _) = (read_bag(job / folder / "a.h5").levels for folder in ("bags", "tiles"))
    np.testing.assert_array_equal(low.grid.cells, own.grid.cells)
    (job / "tiles/a.h5").unlink()
    assert again()[0] == 0
    assert (job / "bags/a.h5").read_bytes() == before
    assert not (job / "tiles/a.h5").is_file()


def test_a_run_writes_one_hdf5_file_a_slide_and_its_pictures_after_it(
    job: Path, again: Again, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted(str(path.relative_to(job)) for path in job.rglob("*") if path.is_file() and path.stem[:1] in "ab")
    each = ("bags/{}.h5", "thumbnails/{}.grid.jpg", "thumbnails/{}.jpg", "thumbnails/{}.raw.jpg", "tissue/{}.geojson")
    assert files == sorted(name.format(slide) for slide in "ab" for name in each)
    # Broken off between the bag and its pictures: they are drawn by the next run, and nothing else is made.
    bag = (job / "bags/a.h5").read_bytes()
    for path in (job / "thumbnails").glob("a.*"):
        path.unlink()
    (job / ".index.jsonl").unlink()
    seen = []

    def drawing(pictures: SlidePictures, paths: JobPaths) -> None:
        seen.append((pictures.slide_id, paths.bag(pictures.slide_id).is_file()))
        draw_slide(pictures, paths)

    monkeypatch.setattr(job_run, "draw_slide", drawing)
    code, outcomes, _ = again()
    assert (code, seen, set(outcomes["a"]["cached"])) == (0, [("a", True)], ALL)
    assert (job / "bags/a.h5").read_bytes() == bag
    assert len(list((job / "thumbnails").glob("a.*"))) == 3


def test_prune_lists_first_and_then_takes_out(job: Path, again: Again, capsys: pytest.CaptureFixture[str]) -> None:
    assert again("-r", "10x")[0] == 0
    before, values = state(job), features(job)
    capsys.readouterr()
    assert cli("prune", job, "-r", "10x") == 0
    assert "10x/texture" in capsys.readouterr().out
    assert state(job) == before
    assert cli("prune", job, "-r", "10x", "--yes") == 0
    now = features(job)
    assert set(now) == {"5x/texture", "20x/texture"}
    for place, kept in now.items():
        np.testing.assert_array_equal(kept, values[place])
    low, high = read_bag(job / "bags/a.h5").levels
    assert high.grid.parent is not None
    np.testing.assert_array_equal(low.grid.cells[high.grid.parent], high.grid.cells // 4)
    assert cli("verify", job) == 0
    code, outcomes, _ = again()
    assert (code, set(outcomes["a"]["cached"])) == (0, ALL)
    assert set(features(job)) == {"5x/texture", "20x/texture"}
    assert cli("prune", job, "-e", "texture") == 2, "a job without encoders is none"
    assert cli("prune", job, "-r", "5x", "--yes") == 0
    assert set(features(job)) == {"20x/texture"}
    assert check_bag(job / "bags/a.h5") == []
    assert again()[0] == 0


def test_prune_takes_feature_files_and_what_is_kept_of_half_done_slides(
    job: Path, again: Again, weights: tuple[str, Path]
) -> None:
    own = f"timm-test_vit-{Path(weights[0]).stem}"
    assert again(command="tile")[0] == 0
    assert again("-r", "10x", "--keep-features")[0] == 0
    assert again("-e", weights[0], "-r", "5x", "-r", "20x", "--keep-features")[0] == 0
    mine = job / "features/a/20x.mine.h5"
    mine.write_text("notes")
    # A slide that has no bag any more, and something of a run that was stopped.
    (job / "bags/b.h5").unlink()
    partial = job / "partial/b.npz"
    partial.parent.mkdir()
    about = {"weights": "", "fingerprint": "0", "layout": "", "layers": [], "encode_s": 0.0, "source": ""}
    rows = [
        {"label": label, "slug": slug, **about} for label, slug in (("5x", own), ("20x", "texture"), ("10x", "texture"))
    ]
    arrays = {f"{place}.{name}": np.arange(3) for place in range(3) for name in ("index", "values")}
    text = json.dumps({"version": 1, "slide_id": "b", "rows": rows}).encode()
    np.savez(partial, about=np.frombuffer(text, np.uint8), **arrays)

    def files() -> set[str]:
        return {str(path.relative_to(job / "features")) for path in (job / "features").rglob("*.h5")}

    held = files()
    wish = Wish(encoders=(("*", weights[0]),))
    listed = {item.slide_id: set(item.features) for item in prune_list(job, wish)}
    assert listed == {slide: {f"20x/{own}", f"5x/{own}"} for slide in "ab"}
    assert files() == held
    assert cli("prune", job, "-e", weights[0], "--yes") == 0
    assert files() == held - {f"{slide}/{label}.{own}.h5" for slide in "ab" for label in ("5x", "20x")}
    assert cli("prune", job, "-r", "10x", "--yes") == 0
    assert files() == {"a/20x.mine.h5"}, "the other features are in the bag alone"
    assert [level.grid.label for level in read_bag(job / "tiles/b.h5").levels] == ["5x", "20x"]
    with np.load(partial) as left:
        assert [(row["label"], row["slug"]) for row in json.loads(left["about"].tobytes())["rows"]] == [
            ("20x", "texture")
        ]
    assert mine.read_text() == "notes"
    assert again()[0] == 0
    assert set(features(job, "b")) == {"5x/texture", "20x/texture"}
    assert cli("verify", job) == 0


def test_a_slide_that_has_nothing_but_what_is_pruned_is_made_anew(job: Path, again: Again, template: Path) -> None:
    assert again(template / "other.svs", "-r", "10x")[0] == 0
    assert cli("prune", job, "-r", "10x", "--yes") == 0
    assert not (job / "bags/other.h5").exists()
    code, outcomes, _ = again()
    assert (code, outcomes["other"]["status"]) == (0, "done")
    assert set(features(job, "other")) == {"5x/texture", "20x/texture"}


def test_only_and_limit_leave_the_jobs_settings(job: Path, again: Again) -> None:
    config = (job / "config.toml").read_bytes()
    before = state(job)
    code, _, said = again("--only", "a", "--min-tissue", "0.9")
    assert (code, state(job) == before) == (2, True)
    assert "min_tissue 0.25 -> 0.9" in said
    code, outcomes, said = again("--only", "a", "--min-tissue", "0.9", "--redo")
    assert (code, set(outcomes)) == (0, {"a"})
    assert "changed: a: min_tissue as the job's -> 0.9" in said
    assert (job / "config.toml").read_bytes() == config
    assert {e.slide_id: dict(e.overrides) for e in load_slides(job)} == {"a": {"min_tissue": 0.9}, "b": {}}
    code, outcomes, _ = again()
    assert code == 0
    assert all(set(outcome["cached"]) == ALL for outcome in outcomes.values())
    assert read_bag(job / "bags/a.h5").levels[0].grid.min_tissue == 0.9
    code, _, said = again("--limit", "1", "--tile-px", "128")
    assert code == 2
    assert "tile_px 256 -> 128 is a setting of the whole job" in said
    assert (job / "config.toml").read_bytes() == config
    assert again("--only", "b", "-r", "10x")[0] == 0
    assert (job / "config.toml").read_bytes() == config
    assert set(features(job, "b")) == {"5x/texture", "10x/texture", "20x/texture"}
    assert set(features(job)) == {"5x/texture", "20x/texture"}


def test_naming_slides_again_changes_what_is_stated(job: Path, again: Again, tmp_path: Path) -> None:
    folder = job.parent / "in"
    mask = tmp_path / "mask.geojson"
    square = {"type": "Polygon", "coordinates": [[[0, 0], [512, 0], [512, 512], [0, 512], [0, 0]]]}
    mask.write_text(json.dumps({"type": "FeatureCollection", "features": [{"type": "Feature", "geometry": square}]}))
    first = {"slide": folder / "a.svs", "case_id": "patient", "mask": mask, "min_tissue": 0.1}
    listed = write_list(tmp_path / "first.csv", first)
    assert again("--slides", listed)[0] == 2
    assert changes(job) == []
    code, _, said = again("--slides", listed, "--redo")
    assert code == 0
    assert f"changed: a: mask none -> {mask}" in said
    assert set(changes(job)) == {
        ("a", "case_id", "a", "patient"), ("a", "mask", "none", str(mask)), ("a", "min_tissue", "as the job's", "0.1"),
    }  # fmt: skip
    held = {entry.slide_id: entry for entry in load_slides(job)}
    assert (held["a"].case_id, held["a"].mask, dict(held["a"].overrides)) == ("patient", str(mask), {"min_tissue": 0.1})
    # The folder, and a list with fewer columns, say nothing of case, mask and settings: they stay.
    before = state(job)
    for named in ([folder], ["--slides", write_list(tmp_path / "bare.csv", {"slide": folder / "a.svs"})]):
        code, outcomes, said = again(*named)
        assert (code, set(outcomes["a"]["cached"])) == (0, ALL)
        assert "changed" not in said
        assert state(job) == before
    # A case is corrected without any work, and taken back with "-"; so is a mask, which is work.
    other = write_list(tmp_path / "case.csv", {"slide": folder / "a.svs", "case_id": "another"})
    code, outcomes, said = again("--slides", other)
    assert (code, "extract" in outcomes["a"]["cached"]) == (0, True)
    assert "changed: a: case_id patient -> another" in said
    assert read_attrs(job / "bags/a.h5").case_id == "another"
    cleared = write_list(tmp_path / "none.csv", {"slide": folder / "a.svs", "mask": "-", "min_tissue": "-"})
    assert again("--slides", cleared)[0] == 2
    assert again("--slides", cleared, "--redo")[0] == 0
    held = {entry.slide_id: entry for entry in load_slides(job)}
    assert (held["a"].case_id, held["a"].mask, dict(held["a"].overrides)) == ("another", None, {})
    assert cli("verify", job) == 0


def test_slide_mpp_fills_gaps(
    tmp_path: Path, make_slide: MakeSlide, tissue_picture: Callable[..., NDArray[np.uint8]], again: Again
) -> None:
    picture = tissue_picture(768, 640, 3)
    make_slide(tmp_path / "mixed/bare.tif", mpp=None, style="generic", picture=picture)
    make_slide(tmp_path / "mixed/states.svs", mpp=0.5, picture=picture)
    make_slide(tmp_path / "mixed/near.svs", mpp=0.252, picture=picture)
    out = tmp_path / "mpp"
    code, outcomes, _ = again(tmp_path / "mixed", "-r", "5x", out=out)
    assert code == 1
    remedy = outcomes["bare"]["remedy"]
    rows = (out / "slides.csv").read_text().splitlines()
    row = next(number for number, line in enumerate(rows, start=1) if ",bare," in line)
    assert f"column mpp of row {row} of {out / 'slides.csv'}" in remedy
    kept = (out / "bags/states.h5").read_bytes()
    # Given to all, it serves the slide without, and harms no other.
    code, outcomes, _ = again("--slide-mpp", "0.25", out=out)
    assert code == 0
    assert (out / "bags/states.h5").read_bytes() == kept
    assert {name: (o["mpp"], o["mpp_source"]) for name, o in outcomes.items()} == {
        "bare": ([0.25, 0.25], "user"), "states": ([0.5, 0.5], "aperio.MPP"), "near": ([0.252, 0.252], "aperio.MPP"),
    }  # fmt: skip
    note = next(note for note in outcomes["states"]["notes"] if "--override-mpp" in note)
    assert "the file states 0.5x0.5 um/px" in note
    assert not any("--slide-mpp" in note for note in outcomes["near"]["notes"]), "less than 2 % apart"
    assert again(out=out)[0] == 0, "the job remembers it"
    code, _, said = again("--slide-mpp", "0.25", "--override-mpp", out=out)
    assert code == 2
    assert "finished work of 2 slides" in said
    assert again("--slide-mpp", "0.25", "--override-mpp", "--redo", out=out)[0] == 0
    assert read_attrs(out / "bags/states.h5").mpp_l0 == (0.25, 0.25)


def test_the_remedy_for_one_slide_works(
    tmp_path: Path, make_slide: MakeSlide, tissue_picture: Callable[..., NDArray[np.uint8]], again: Again
) -> None:
    for name in ("one", "two"):
        make_slide(tmp_path / f"bare/{name}.tif", mpp=None, style="generic", picture=tissue_picture(768, 640, 3))
    out = tmp_path / "bare-job"
    assert again(tmp_path / "bare", "-r", "5x", out=out)[0] == 1
    listed = out / "slides.csv"
    listed.write_text(listed.read_text().replace(",one,one,", ",one,one,0.5"))
    code, outcomes, _ = again(out=out)
    assert (code, outcomes["one"]["status"], outcomes["two"]["status"]) == (1, "done", "failed")


def test_a_moved_archive_is_adopted(job: Path, again: Again) -> None:
    before = features(job)
    (job.parent / "in").rename(job.parent / "elsewhere")
    code, outcomes, said = again(job.parent / "elsewhere")
    assert (code, set(outcomes)) == (0, {"a", "b"})
    assert all({"segment", "tile", "extract"} <= set(outcome["cached"]) for outcome in outcomes.values())
    assert "moved: 2 slides" in said
    assert read_attrs(job / "bags/a.h5").slide_path == str(job.parent / "elsewhere/a.svs")
    np.testing.assert_array_equal(features(job)["20x/texture"], before["20x/texture"])
    assert [entry.path for entry in load_slides(job)] == [str(job.parent / f"elsewhere/{n}.svs") for n in "ab"]


def test_a_replaced_slide_ends_the_call_before_any_work(
    job: Path, again: Again, template: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, noted = state(job), (job / "outcomes.jsonl").read_bytes()
    slide = job.parent / "in/a.svs"
    shutil.copyfile(template / "other.svs", slide)
    for call, *options in (("run",), ("extract",), ("segment",), ("run", "-r", "10x"), ("run", "--workers", "2")):
        code, _, said = again(*options, command=call)
        assert code == 2
        assert "another file in the place of a would make finished work of 1 slide stale" in said
        assert "stale (masks of 1, grids of 1, features of 1)" in said
        assert "put what the work was made of back" in said
        assert "--redo makes it anew here, another -o keeps both" in said
        assert len(said.strip().splitlines()) == 1
    message = said.partition("error: ")[2].strip()
    assert cli("plan", "-o", job, "--calibrate", 0) == 1
    assert message in capsys.readouterr().err
    assert cli("plan", "-o", job, "--calibrate", 0, "--only", "b") == 0
    assert again("--only", "b")[0] == 0, "others go on"
    assert (state(job), (job / "outcomes.jsonl").read_bytes()) == (before, noted)
    # A file that is broken, or gone, is told when its turn comes, and holds back no other.
    slide.write_bytes(slide.read_bytes()[:3000])
    code, outcomes, _ = again()
    assert (code, outcomes["a"]["status"], outcomes["b"]["status"]) == (1, "failed", "done")
    shutil.copyfile(template / "other.svs", slide)
    assert again()[0] == 2, "also once it has failed"
    code, outcomes, _ = again("--only", "a", "--redo")
    assert (code, set(outcomes)) == (0, {"a"})
    assert state(job)["bags/b.h5"] == before["bags/b.h5"]
    assert state(job)["bags/a.h5"] != before["bags/a.h5"]
    assert cli("verify", job) == 0


def test_a_slide_that_is_touched_or_copied_is_the_same(job: Path, again: Again) -> None:
    slide = job.parent / "in/a.svs"
    shutil.copyfile(slide, slide.with_suffix(".new"))
    slide.with_suffix(".new").replace(slide)
    before = state(job)
    assert again()[0] == 0
    assert state(job) == before


def test_a_slide_that_is_replaced_while_a_run_is_at_work_fails_alone(
    job: Path, again: Again, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wsi_pipe.job import replaced

    monkeypatch.setattr(replaced, "replaced_slides", lambda root, call, found: None)
    before = state(job)
    shutil.copyfile(template / "other.svs", job.parent / "in/a.svs")
    code, outcomes, _ = again()
    assert code == 1
    assert outcomes["a"]["error"] == "StaleWorkError"
    assert "is another file than the one" in outcomes["a"]["reason"]
    assert "--redo --only a" in outcomes["a"]["remedy"]
    assert outcomes["b"]["status"] == "done"
    assert state(job) == before
    assert read_outcomes(job)["a"].seconds, "what the work took is not forgotten"


def test_status_tells_done_from_stale(
    job: Path, again: Again, template: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def counts() -> tuple[int, int, int]:
        capsys.readouterr()
        code = cli("status", job, "--json")
        found = json.loads(capsys.readouterr().out)
        assert code == (1 if found["failed"] else 0)
        return found["done"], found["stale"], found["failed"]

    assert counts() == (2, 0, 0)
    shutil.copyfile(template / "other.svs", job.parent / "in/a.svs")
    assert counts() == (1, 1, 0)
    assert again()[0] == 2
    assert counts() == (1, 1, 0)
    shutil.copyfile(template / "in/a.svs", job.parent / "in/a.svs")
    assert again()[0] == 0
    assert counts() == (2, 0, 0)
    config = job / "config.toml"
    config.write_text(config.read_text().replace("min_tissue = 0.25", "min_tissue = 0.9"))
    assert counts() == (0, 2, 0)
    assert cli("status", job) == 0
    assert "min_tissue 0.25 -> 0.9" in capsys.readouterr().out


def test_status_and_report_show_resolutions_and_what_stands_alone(
    tmp_path: Path,
    make_slide: MakeSlide,
    tissue_picture: Callable[..., NDArray[np.uint8]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for number, mpp in enumerate((0.5, 0.501, 0.499, 0.5, 0.25)):
        make_slide(tmp_path / f"in/s{number}.svs", mpp=mpp, picture=tissue_picture(768, 640, number))
    assert cli("run", tmp_path / "in", "-o", tmp_path / "mpp", "-r", "5x") == 0
    capsys.readouterr()
    assert cli("status", tmp_path / "mpp") == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert "0.501" in lines["s1"]
    assert "aperio.MPP" in lines["s1"]
    assert [name for name, line in lines.items() if "stands alone" in line] == ["s4"]
    with (tmp_path / "mpp/report.csv").open() as handle:
        rows = {row["slide_id"]: row for row in csv.DictReader(handle)}
    assert (rows["s4"]["mpp"], rows["s4"]["mpp_source"], rows["s4"]["outliers"]) == ("0.25", "aperio.MPP", "mpp")
    assert rows["s0"]["outliers"] == ""


@pytest.mark.parametrize("stage", ["SEGMENT_VERSION", "TILE_VERSION", "EXTRACT_VERSION"])
def test_a_newer_version_keeps_and_extends(
    job: Path, again: Again, stage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = state(job)
    monkeypatch.setattr(fingerprints, stage, 3)
    code, outcomes, _ = again()
    assert code == 0
    assert all(set(outcome["cached"]) == ALL for outcome in outcomes.values())
    assert state(job) == before
    assert cli("verify", job) == 0
    capsys.readouterr()
    assert cli("status", job) == 0
    shown = capsys.readouterr().out
    assert ("of an earlier version" in shown) == (stage != "EXTRACT_VERSION")
    assert again("-r", "10x")[0] == 0
    assert set(features(job)) == {"5x/texture", "10x/texture", "20x/texture"}
    assert again("--min-tissue", "0.9")[0] == 2, "another setting is another setting"
    code, outcomes, _ = again("--redo")
    assert code == 0
    # Grids that were laid again to add one, and came out the same, are the new version's.
    assert (set(outcomes["a"]["cached"]) >= ALL) == (stage == "TILE_VERSION")
    code, outcomes, _ = again("--redo")
    assert (code, set(outcomes["a"]["cached"])) == (0, ALL), "what fits is not made twice"
    assert cli("verify", job) == 0


@pytest.fixture
def first_version(tmp_path: Path) -> Path:
    """A job as version 0.1.0 made it at 5x and 20x, and its archive beside it: it was at /archive then."""
    shutil.copytree(DATA / "job_of_0_1_0", tmp_path / "old")
    return tmp_path / "old"


def test_a_job_of_the_first_version_opens_verifies_and_goes_on(
    first_version: Path, again: Again, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, archive = first_version / "job", first_version / "archive"
    values = features(out, "first")
    assert cli("verify", out) == 0
    assert cli("status", out) == 0
    for stage in ("SEGMENT_VERSION", "TILE_VERSION", "EXTRACT_VERSION"):
        monkeypatch.setattr(fingerprints, stage, 4)
    code, outcomes, said = again(archive, out=out)
    assert (code, {name: o["status"] for name, o in outcomes.items()}) == (
        0, {"blank": "empty", "first": "done", "second": "done"},
    )  # fmt: skip
    assert all({"segment", "tile", "extract"} <= set(outcome["cached"]) for outcome in outcomes.values()), said
    held = {entry.slide_id: entry for entry in load_slides(out)}
    assert {name: entry.case_id for name, entry in held.items()} == {
        "blank": "patient1", "first": "patient1", "second": "patient2",
    }  # fmt: skip
    assert dict(held["second"].overrides) == {"min_tissue": 0.3}
    assert held["second"].path == str(archive / "b/second.svs")
    bag = read_attrs(out / "bags/second.h5")
    assert (bag.slide_path, bag.case_id) == (str(archive / "b/second.svs"), "patient2")
    for place, kept in features(out, "first").items():
        np.testing.assert_array_equal(kept, values[place])
    assert again(out=out)[0] == 0
    assert cli("verify", out) == 0
    capsys.readouterr()
    assert cli("status", out) == 0
    assert "made by 0.1.0 (tissue, grids)" in " ".join(capsys.readouterr().out.split())
    # It is extended on the old grids, refused where a setting is another, and made anew when told.
    assert again("-r", "10x", out=out)[0] == 0
    assert set(features(out, "first")) == {"5x/texture", "10x/texture", "20x/texture"}
    np.testing.assert_array_equal(features(out, "first")["20x/texture"], values["20x/texture"])
    assert again("--min-tissue", "0.5", out=out)[0] == 2
    code, outcomes, _ = again("--redo", out=out)
    assert (code, "segment" in outcomes["first"]["cached"]) == (0, False)
    assert cli("verify", out) == 0
    capsys.readouterr()
    assert cli("status", out) == 0
    assert "earlier version" not in capsys.readouterr().out


def test_a_resolution_is_pruned_from_a_job_of_the_first_version(first_version: Path, again: Again) -> None:
    out = first_version / "job"
    assert again(first_version / "archive", out=out)[0] == 0
    assert cli("prune", out, "-r", "5x", "--yes") == 0
    assert set(features(out, "second")) == {"20x/texture"}
    code, outcomes, _ = again(out=out)
    assert (code, set(outcomes["second"]["cached"])) == (0, ALL)
    assert cli("verify", out) == 0


def test_a_file_is_known_again_where_a_later_version_finds_other_levels(first_version: Path) -> None:
    from wsi_pipe.job.fits import Identity
    from wsi_pipe.slides import open_slide
    from wsi_pipe.slides.base import ReadStats
    from wsi_pipe.slides.storage.source import FileSource, slide_fingerprint

    path = first_version / "archive/first.svs"
    attrs = read_attrs(first_version / "job/bags/first.h5")
    slide = open_slide(path)
    try:
        identity = Identity(slide, str(path))
        assert identity.knows(attrs)
        sizes = [level.size_px for level in slide.pyramid.levels]
        source = FileSource(path, ReadStats())
        fewer = slide_fingerprint([source], sizes[:1])
        source.close()
        assert fewer != attrs.slide_fingerprint
        assert identity.knows(dataclasses.replace(attrs, slide_fingerprint=fewer))
        assert not identity.knows(dataclasses.replace(attrs, slide_fingerprint="0" * 64))
    finally:
        slide.close()


def test_settings_that_were_none_then_count_as_their_defaults() -> None:
    from wsi_pipe.config import SegmentSettings, to_mapping
    from wsi_pipe.job.fits import differences

    made = to_mapping(SegmentSettings())
    del made["edge_share"]
    assert differences(made, SegmentSettings()) == ()
    assert differences(made, SegmentSettings(edge_share=0.5)) == ("edge_share 0.3 -> 0.5",)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """An encoder with weights in a file, by its name, and an LR encoder of the same network for 5x."""
    from safetensors.torch import save_file

    from wsi_pipe.encoders import load_encoder
    from wsi_pipe.encoders.lr_file import write_lr_encoder
    from wsi_pipe.geometry import TileSpec

    folder = tmp_path_factory.mktemp("weights")
    encoder: Any = load_encoder("timm:test_vit", device="cpu", random_weights=True)
    state = {key: value.contiguous() for key, value in encoder.network.trunk.state_dict().items()}
    save_file(state, folder / "own.safetensors")
    lr = folder / "lr.safetensors"
    write_lr_encoder(lr, encoder.network, recipe=encoder.recipe, tile=TileSpec(2.0, 256), licence="none")
    return f"timm:test_vit@{folder / 'own.safetensors'}", lr


def test_another_encoder_is_added_and_one_left_out_stays(
    job: Path, again: Again, weights: tuple[str, Path], first_version: Path
) -> None:
    before = features(job)
    assert again("-e", weights[0])[0] == 0
    now = features(job)
    assert set(now) == {f"{label}/{slug}" for label in ("5x", "20x") for slug in ("texture", "timm-test_vit-own")}
    for place in before:
        np.testing.assert_array_equal(now[place], before[place])
    assert read_attrs(job / "bags/a.h5").primary_encoder == "texture"
    assert read_outcomes(job)["a"].costs.keys() == now.keys(), "what the others cost is not forgotten"
    held = state(job)
    assert again("-e", "texture", "-r", "5x")[0] == 0
    assert again()[0] == 0
    assert state(job) == held
    settings = load_settings(job)
    assert settings is not None
    assert settings.extract.encoders == {"*": ("texture", weights[0])}
    # A redo of the grids takes the features of all encoders with it, which of them is named or not.
    assert again("-e", "texture", "-r", "5x", "--min-tissue", "0.9", "--redo")[0] == 0
    assert features(job).keys() == now.keys()
    assert cli("verify", job) == 0
    assert cli("prune", job, "-e", weights[0], "--yes") == 0
    assert set(features(job)) == {"5x/texture", "20x/texture"}
    assert again()[0] == 0
    assert set(features(job)) == {"5x/texture", "20x/texture"}
    # Of one slide alone: the job's settings stay as they are, and the features too.
    assert again("-e", weights[0], "--only", "a")[0] == 0
    assert again()[0] == 0
    assert features(job).keys() == now.keys()
    assert set(features(job, "b")) == {"5x/texture", "20x/texture"}
    out = first_version / "job"
    assert again(first_version / "archive", "-e", weights[0], out=out)[0] == 0
    assert features(out, "first").keys() == now.keys()
    assert cli("verify", out) == 0


def test_other_weights_of_an_encoder_end_the_call_before_any_work(
    job: Path, again: Again, weights: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    own = tmp_path / "own.safetensors"
    shutil.copyfile(weights[0].partition("@")[2], own)
    name = f"timm:test_vit@{own}"
    assert again("-e", name)[0] == 0
    before = state(job)
    changed = {key: value * 1.01 for key, value in load_file(own).items()}
    save_file(changed, own)
    (job / ".index.jsonl").unlink()
    for options in (["-e", name], ["-e", name, "--workers", "2"], ["-e", name, "-r", "10x"], []):
        code, _, said = again(*options)
        assert code == 2
        assert f"weights of {name}" in said
        assert "finished work of 2 slides stale (features of 2)" in said
        assert "put the earlier weights back (features of a, b)" in said
        assert "--redo" in said
        assert state(job) == before
    capsys.readouterr()
    assert cli("plan", "-o", job, "--calibrate", 0) == 1
    assert f"weights of {name}" in capsys.readouterr().err
    assert again("-e", "texture")[0] == 0, "what does not ask for them goes on"
    code, _, _ = again("-e", name, "--redo")
    assert code == 0
    assert state(job)["bags/a.h5"] != before["bags/a.h5"]
    assert cli("verify", job) == 0


def test_random_weights_never_look_real(
    job: Path, again: Again, capsys: pytest.CaptureFixture[str], weights: tuple[str, Path], tmp_path: Path
) -> None:
    import h5py

    code, _, _ = again("-e", "timm:test_vit", "-e", weights[0], "--random-weights", "-r", "5x")
    assert code == 0
    assert set(features(job)) == {"5x/texture", "20x/texture", "5x/timm-test_vit-random", "5x/timm-test_vit-own"}
    with h5py.File(job / "bags/a.h5") as file:
        attrs = file["levels/5x/features/timm-test_vit-random"].attrs
        assert (attrs["weights"], attrs["encoder"]) == ("random", "timm:test_vit-random")
        assert "weights" not in file["levels/5x/features/timm-test_vit-own"].attrs
    assert "random" not in (job / "config.toml").read_text().replace("timm:test_vit-random", "")
    capsys.readouterr()
    assert cli("verify", job) == 0
    assert "5x/timm-test_vit-random are of random weights" in capsys.readouterr().out
    assert cli("status", job) == 0
    assert "random weights" in capsys.readouterr().out
    assert cli("report", job) == 0
    assert "5x/timm-test_vit-random: features of random weights mean nothing" in capsys.readouterr().out
    assert "5x/timm-test_vit-random of random weights" in (job / "report.html").read_text()
    assert cli("info", job / "bags/a.h5") == 0
    assert "5x/timm-test_vit-random: random weights" in capsys.readouterr().out
    # Another call does not draw, whatever a settings file or the environment say.
    config = job / "config.toml"
    config.write_text(config.read_text().replace("[extract]", "[extract]\nrandom_weights = true"))
    code, _, said = again("-e", "timm:test_vit", "-r", "5x")
    assert code == 2
    assert "extract.random_weights in the job is ignored: --random-weights is said in each call" in said
    assert "weights of encoder timm:test_vit are not on this machine" in said
    settings = load_settings(job)
    assert settings is not None
    assert not settings.extract.random_weights
    assert cli("prune", job, "--random", "--yes") == 0
    assert set(features(job)) == {"5x/texture", "20x/texture", "5x/timm-test_vit-own"}


def test_random_weights_of_the_first_version_are_known(
    job: Path, again: Again, capsys: pytest.CaptureFixture[str], weights: tuple[str, Path]
) -> None:
    from wsi_pipe.bag import write_bag
    from wsi_pipe.encoders.random_id import _id, is_random_id

    bag = read_bag(job / "bags/a.h5")
    low = bag.levels[0]
    drawn = dataclasses.replace(
        low.features["texture"], encoder="timm:test_vit", weights_sha256=_id("timm-test_vit", "2.6.0+cu124", "1.0.26")
    )
    low = dataclasses.replace(low, features={**low.features, "timm-test_vit": drawn})
    write_bag(job / "bags/a.h5", dataclasses.replace(bag, levels=(low, *bag.levels[1:])))
    assert read_bag(job / "bags/a.h5").levels[0].features["timm-test_vit"].weights == "random"
    assert not is_random_id("timm-test_vit", "0" * 64)
    assert again("-e", weights[0])[0] == 0
    assert set(features(job)) >= {"5x/timm-test_vit-random", "5x/timm-test_vit-own", "5x/texture"}


def test_bad_encoders_end_a_run_before_its_first_tile_and_a_plan_says_so(
    tmp_path: Path, template: Path, weights: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for options, message in (
        (["-e", f"20x={weights[1]}", "-e", "5x=texture"], "was made for 2 um/px (5x), but is asked for at 20x"),
        (["-e", f"5x={weights[1]}", "-e", "20x=texture", "--tile-px", "128"], "--tile-px 256"),
        (["-e", "no-such-encoder"], "there is no encoder 'no-such-encoder'"),
        (["-e", "uni"], "weights of encoder uni are not on this machine"),
        (["-e", "lost.safetensors"], "there is no such file"),
    ):
        for workers in ([], ["--workers", "2"]):
            capsys.readouterr()
            assert cli("run", template / "in", "-o", tmp_path / "none", *options, *workers) == 2
            said = capsys.readouterr().err
            assert message in said
        assert not (tmp_path / "none").exists()
        assert cli("plan", template / "in", *options, "--workers", 3) == 1
        plan = capsys.readouterr()
        assert message in plan.err
        assert "tiles at 20x" in plan.out


def test_a_plan_of_a_job_says_what_a_run_would(job: Path, again: Again, capsys: pytest.CaptureFixture[str]) -> None:
    said = again("--min-tissue", "0.9")[2].partition("error: ")[2].strip()
    assert cli("plan", "-o", job, "--min-tissue", "0.9", "--calibrate", 0) == 1
    assert said in capsys.readouterr().err
    assert cli("plan", "-o", job, "--min-tissue", "0.9", "--redo", "--calibrate", 0) == 0
    assert cli("plan", "-o", job, "--calibrate", 0) == 0
    # Of some slides alone, as run.
    for options in (["--only", "a", "--tile-px", "128"], ["--limit", "1", "--tile-px", "128"], ["--only", "c"]):
        assert again(*options)[0] == 2
        capsys.readouterr()
        assert cli("plan", "-o", job, "--calibrate", 0, *options) == 2
    assert "no slide has the id c" in capsys.readouterr().err
    assert cli("plan", "-o", job, "--calibrate", 0, "--only", "b", "--json") == 0
    assert json.loads(capsys.readouterr().out)["slides"] == 1


@pytest.mark.parametrize("how", ["copied", "moved"])
def test_a_job_in_another_folder_goes_on_there(job: Path, tmp_path: Path, again: Again, how: str) -> None:
    elsewhere = tmp_path / "other disk" / "renamed"
    elsewhere.parent.mkdir()
    before = state(job)
    if how == "copied":
        shutil.copytree(job, elsewhere)
    else:
        job.rename(elsewhere)
    code, outcomes, _ = again(out=elsewhere)
    assert (code, {tuple(sorted(o["cached"])) for o in outcomes.values()}) == (0, {tuple(sorted(ALL))})
    assert state(elsewhere) == before
    assert cli("verify", elsewhere) == 0
    # The copy is a job of its own: what is added there is not in the first one.
    assert again("-r", "10x", out=elsewhere)[0] == 0
    assert state(elsewhere) != before
    assert how == "moved" or state(job) == before


def test_a_second_call_at_the_same_time_is_refused_and_others_may_look(
    job: Path, again: Again, capsys: pytest.CaptureFixture[str]
) -> None:
    before = state(job)
    with hold_job(job, {"command": "wsi-pipe run"}):
        for command in ("run", "segment", "tile"):
            code, outcomes, said = again(command=command)
            assert (code, outcomes) == (2, {})
            assert f"process {os.getpid()}" in said, "who holds it"
        assert cli("prune", job, "-r", "5x", "--yes") == 2
        for looks in (["plan", "-o", job, "--calibrate", 0], ["status", job], ["verify", job], ["report", job]):
            assert cli(*looks) == 0, looks
    assert state(job) == before
    assert again()[0] == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_or_a_quota_that_is_full_ends_the_run_and_the_same_call_goes_on(
    tmp_path: Path, template: Path, again: Again, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    out = tmp_path / "full"
    real = os.replace

    def full(source: Any, target: Any, **options: Any) -> None:
        if Path(target).name == "b.h5" and Path(target).parent.name == "bags":
            raise OSError(number, os.strerror(number), str(target))
        real(source, target, **options)

    monkeypatch.setattr(os, "replace", full)
    code, outcomes, said = again(template / "in", "-r", "5x", out=out)
    assert code == 1
    assert outcomes["a"]["status"] == "done"
    assert os.strerror(number) in said
    assert "b.h5" in said
    kept = (out / "bags/a.h5").read_bytes()
    monkeypatch.undo()
    code, outcomes, _ = again(template / "in", "-r", "5x", out=out)
    assert (code, outcomes["b"]["status"]) == (0, "done")
    assert set(outcomes["a"]["cached"]) == ALL
    assert (out / "bags/a.h5").read_bytes() == kept
    assert cli("verify", out) == 0


def test_a_plan_names_a_mask_that_was_edited_in_the_job(
    job: Path, again: Again, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        mask = job / f"tissue/{name}.geojson"
        edited = json.loads(mask.read_text())
        del edited["wsi_pipe"]
        mask.write_text(json.dumps(edited))
    assert cli("plan", "-o", job, "--calibrate", 0) == 1
    said = capsys.readouterr().out
    assert "2 slides will fail" in said, "one cause"
    assert "a, b" in said
    assert "--mask" in said
    code, outcomes, _ = again("-r", "10x")
    assert (code, {o["status"] for o in outcomes.values()}) == (1, {"failed"})
    assert "was changed by another program" in outcomes["a"]["reason"]


def test_a_plan_says_that_a_folder_is_not_a_job_or_cannot_be_written(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.toml").write_text("of another program")
    slides = job.parent / "in"
    assert cli("run", slides, "-o", mine) == 2
    said = capsys.readouterr().err.partition("error: ")[2].strip()
    assert cli("plan", slides, "-o", mine, "--calibrate", 0) == 1
    assert said in capsys.readouterr().err
    (job / "bags/c.h5").write_bytes(b"mine")
    shutil.copyfile(slides / "a.svs", slides / "c.svs")
    assert cli("run", slides, "-o", job) == 2
    said = capsys.readouterr().err.partition("error: ")[2].strip()
    assert cli("plan", slides, "-o", job, "--calibrate", 0) == 1
    assert said in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda *arguments, **options: False)
    assert cli("plan", slides / "a.svs", "-o", tmp_path / "new/job", "--calibrate", 0) == 1
    assert f"cannot write {tmp_path / 'new/job'}: Permission denied" in capsys.readouterr().err
    assert cli("plan", slides / "a.svs", "--calibrate", 0) == 0, "without a folder there is nothing to write"


def test_no_room_ends_a_run_before_its_first_tile(
    tmp_path: Path, template: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - 200_000, 200_000))
    assert cli("run", template / "in", "-o", tmp_path / "none") == 2
    run = capsys.readouterr().err
    assert "GB are lacking" in run
    assert "--out" in run
    assert not (tmp_path / "none").exists()
    assert cli("plan", template / "in", "-o", tmp_path / "none", "--calibrate", 0) == 1
    assert "GB are lacking" in capsys.readouterr().err


def test_workers_share_the_cores() -> None:
    from wsi_pipe.plan import Calibration, PlanTotals

    totals = PlanTotals(slides=10, tiles={"20x": 1000})
    rates = Calibration(slide_s=3600.0, tile_s={"20x": 36.0}, cores=4, slide_cores=1.0, tile_cores=2.0)
    assert [rates.hours(totals, n) for n in (1, 2, 4, 64)] == pytest.approx([20.0, 10.0, 7.5, 7.5])
    rates.shares_device = True
    assert rates.hours(totals, 64) == pytest.approx(12.5)


def test_segment_and_run_agree_on_what_is_empty(tmp_path: Path, make_slide: MakeSlide, again: Again) -> None:
    picture = np.full((640, 768, 3), 243, np.uint8)
    make_slide(tmp_path / "in2/blank.svs", picture=picture)
    picture = picture.copy()
    picture[100:180, 100:180] = (180, 80, 150)
    make_slide(tmp_path / "in2/speck.svs", picture=picture)
    found = {}
    for command in ("segment", "run"):
        options = ["--min-tissue", "0.9"] if command == "run" else []
        out = tmp_path / command
        if command == "segment":
            assert cli("tile", tmp_path / "in2", "-o", out, "--min-tissue", "0.9", "--limit", 1) == 0
        found[command] = again(tmp_path / "in2", *options, out=out, command=command)[1]
    assert {name: (o["status"], o["reason"]) for name, o in found["segment"].items()} == {
        name: (o["status"], o["reason"]) for name, o in found["run"].items()
    }
    assert {o["status"] for o in found["run"].values()} == {"empty"}


def test_defaults_of_stages_that_were_not_reached_are_not_asked_for(template: Path, tmp_path: Path) -> None:
    """Stage by stage at one resolution, the job once wanted the default ones and the default encoder as well."""
    job, slides = tmp_path / "job", template / "in"
    assert cli("segment", slides, "-o", job) == 0
    assert cli("tile", slides, "-o", job, "-r", "10x") == 0
    held = load_settings(job)
    assert held is not None
    assert held.tile.resolutions == (1.0,)
    assert cli("assemble", slides, "-o", job, "-r", "10x", "-e", "texture") == 0
    assert set(features(job)) == {"10x/texture"}
    assert cli("verify", job) == 0
    # What was made is kept and asked for, as ever.
    assert cli("run", slides, "-o", job, "-r", "5x", "--no-report") == 0
    held = load_settings(job)
    assert held is not None
    assert held.tile.resolutions == (1.0, 2.0)
