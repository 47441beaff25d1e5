"""Plans: what will fail, how many tiles, and an archive of any length in bounded memory."""

from __future__ import annotations

import errno
import json
import shutil
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import fsspec
import numpy as np
import pytest

from wsi_pipe.cli import group, run_group
from wsi_pipe.config import JobSettings
from wsi_pipe.extract import ExtractItem, extract_features
from wsi_pipe.geometry import TileGrid, TileSpec
from wsi_pipe.job.opening import open_entry
from wsi_pipe.job.run import load_encoders
from wsi_pipe.manifest import SlideEntry
from wsi_pipe.plan import (
    NEEDS_STAGING,
    Calibration,
    MetadataCache,
    PlanTotals,
    SlideFacts,
    SlidePlan,
    SpaceCount,
    calibrate,
    exact_tiles,
    known_bytes_per_tile,
    slide_facts,
    space,
    spread_sample,
    survey,
    total,
)
from wsi_pipe.plan.calibrate import BYTES_PER_TILE, _apart

MakeSlide = Callable[..., Path]
SETTINGS = JobSettings()


def entry(path: Path | str, **more: object) -> SlideEntry:
    return SlideEntry(Path(path).stem, str(path), "case", **more)  # type: ignore[arg-type]


def test_counted_tiles_are_those_of_a_run(tmp_path: Path, make_slide: MakeSlide) -> None:
    slide = make_slide(tmp_path / "s.svs")
    with MetadataCache() as cache:
        (quick,) = survey([entry(slide)], SETTINGS, cache)
    assert not quick.counted
    # 1536 x 1280 px in tiles of 256 px at 0.5 and at 2 um/px: 6 x 5 and 2 x 2.
    assert quick.covering == {"5x": 4, "20x": 30}
    exact = exact_tiles(entry(slide), quick, SETTINGS)
    assert run_group(group, "wsi-pipe", ["tile", str(slide), "-o", str(tmp_path / "job")]) == 0
    (line,) = (tmp_path / "job/outcomes.jsonl").read_text().splitlines()
    assert dict(exact.tiles) == json.loads(line)["tiles"]


def test_a_mask_that_is_given_is_counted_as_a_run_counts_it(tmp_path: Path, make_slide: MakeSlide) -> None:
    slide = make_slide(tmp_path / "s.svs")
    square = {"type": "Polygon", "coordinates": [[[0, 0], [512, 0], [512, 512], [0, 512], [0, 0]]]}
    mask = tmp_path / "m.geojson"
    mask.write_text(json.dumps({"type": "FeatureCollection", "features": [{"type": "Feature", "geometry": square}]}))
    one = entry(slide, mask=str(mask))
    with MetadataCache() as cache:
        (quick,) = survey([one], SETTINGS, cache)
    # 512 x 512 px in tiles of 256 px at 0.5 and at 2 um/px.
    assert exact_tiles(one, quick, SETTINGS).tiles == {"5x": 1, "20x": 4}
    mask.write_text("no")
    assert "is not JSON" in str(exact_tiles(one, quick, SETTINGS).problem)


def test_an_error_that_nobody_foresaw_costs_its_own_slide(
    tmp_path: Path, make_slide: MakeSlide, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, odd = make_slide(tmp_path / "good.svs"), make_slide(tmp_path / "odd.svs")

    def opened(one: SlideEntry, *more: Any, **options: Any) -> Any:
        if one.slide_id == "odd":
            raise ZeroDivisionError("division by zero")
        return open_entry(one, *more, **options)

    for module in ("wsi_pipe.plan.metadata", "wsi_pipe.job.describe"):
        monkeypatch.setattr(f"{module}.open_entry", opened)
    with MetadataCache() as cache:
        plans = {p.slide_id: p for p in survey([entry(odd), entry(good)], SETTINGS, cache)}
    assert plans["odd"].problem == "ZeroDivisionError: division by zero"
    assert plans["good"].problem is None
    assert run_group(group, "wsi-pipe", ["info", str(good), str(odd)]) == 1


def test_what_will_fail_is_said_with_its_remedy(tmp_path: Path, make_slide: MakeSlide) -> None:
    (tmp_path / "bad.svs").write_bytes(b"nothing")
    bare = make_slide(tmp_path / "bare.tif", mpp=None, style="generic")
    coarse = make_slide(tmp_path / "coarse.svs", mpp=2.0)
    good = make_slide(tmp_path / "good.svs")
    entries = [entry(p) for p in (tmp_path / "bad.svs", bare, coarse, good)]
    entries.append(entry(good, mask=str(tmp_path / "none.geojson")))
    entries.append(entry(bare, mpp=(0.5, 0.5)))
    with MetadataCache() as cache:
        bad, unknown, upsampled, fine, maskless, told = survey(entries, SETTINGS, cache)
    assert bad.problem is not None
    assert "--slide-mpp" in str(unknown.remedy)
    assert "finer" in str(upsampled.problem)
    assert fine.problem is None
    assert "none.geojson is not there" in str(maskless.problem)
    assert told.problem is None
    assert told.mpp_source == "user"


def test_metadata_is_read_once_and_again_when_the_file_changes(tmp_path: Path, make_slide: MakeSlide) -> None:
    slide = make_slide(tmp_path / "s.svs")
    looked = []

    def describe(one: SlideEntry, reader: str) -> SlideFacts:
        looked.append(one.path)
        return slide_facts(one, reader)

    for _ in range(2):
        with MetadataCache(tmp_path / "facts.sqlite") as cache:
            (first,) = survey([entry(slide)], SETTINGS, cache, describe=describe)
    assert looked == [str(slide)]
    make_slide(slide, mpp=0.25, seed=3)
    with MetadataCache(tmp_path / "facts.sqlite") as cache:
        (second,) = survey([entry(slide)], SETTINGS, cache, describe=describe)
    assert len(looked) == 2
    assert (first.mpp, second.mpp) == ((0.5, 0.5), (0.25, 0.25))


@pytest.fixture
def remote_png(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a picture, which is read from a copy only."""
    monkeypatch.setenv("WSI_PIPE_CACHE", str(tmp_path / "cache"))
    files = fsspec.filesystem("memory")
    files.pipe("/plan/a.png", bytes(cv2.imencode(".png", np.full((600, 800, 3), 120, np.uint8))[1]))
    yield "memory://plan/a.png"
    files.rm("/plan", recursive=True)


def test_what_would_have_to_be_copied_is_said_and_not_copied(
    tmp_path: Path, make_slide: MakeSlide, remote_png: str, capsys: pytest.CaptureFixture[str]
) -> None:
    away, here = entry(remote_png, mpp=(0.5, 0.5)), entry(make_slide(tmp_path / "s.svs"))
    with MetadataCache() as cache:
        first, second = survey([away, here], SETTINGS, cache)
    assert (first.problem, first.note, dict(first.tiles)) == (None, NEEDS_STAGING, {})
    assert (second.problem, second.note) == (None, "")
    assert exact_tiles(away, first, SETTINGS) == first
    sums = total([first, second])
    assert (sums.slides, sums.staging, sums.failing, sums.tiles) == (2, 1, [], dict(second.tiles))
    rates = calibrate([away], SETTINGS, load_encoders(SETTINGS), tiles=2)
    assert rates.slides == 0
    assert Calibration(slide_s=3600.0).hours(sums) == pytest.approx(1.0)
    assert run_group(group, "wsi-pipe", ["plan", remote_png, here.path, "--slide-mpp", "0.5", "--sample", "2"]) == 0
    printed = capsys.readouterr().out
    assert "needs staging  1, copied before they are read" in " ".join(printed.split("\n"))
    assert not (tmp_path / "cache").exists()


def test_what_was_copied_before_is_planned_from_the_copy(remote_png: str) -> None:
    away = entry(remote_png, mpp=(0.5, 0.5))
    open_entry(away, "auto").close()
    with MetadataCache() as cache:
        (plan,) = survey([away], SETTINGS, cache)
    assert plan.note == ""
    assert plan.covering == {"5x": 1, "20x": 12}


@pytest.mark.parametrize("most", [2, 5, 1000])
def test_what_is_timed_was_not_read_just_before(
    tmp_path: Path, make_slide: MakeSlide, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    tried: list[tuple[str, list[tuple[int, int]]]] = []

    def extract(items: list[ExtractItem], *more: Any, **options: Any) -> Any:
        (grid,) = items[0].grids
        tried.append((grid.label, [(int(c), int(r)) for c, r in grid.cells]))
        return extract_features(items, *more, **options)

    # By name, since the package has a function of the module's name.
    monkeypatch.setattr(sys.modules["wsi_pipe.plan.calibrate"], "extract_features", extract)
    entries = [entry(make_slide(tmp_path / f"{name}.svs", seed=seed)) for seed, name in enumerate("ab")]
    found = calibrate(entries, SETTINGS, load_encoders(SETTINGS), tiles=most)
    assert found.slides == 2
    for label in ("5x", "20x"):
        # The second slide has no need of warming up.
        warm, first, second = (cells for name, cells in tried if name == label)
        assert warm
        assert first
        assert second
        assert max(map(len, (warm, first, second))) <= most
        assert not set(warm) & set(first)
    assert found.tiles == sum(len(cells) for _, cells in tried) - sum(
        len(next(cells for name, cells in tried if name == label)) for label in ("5x", "20x")
    )
    assert all(seconds > 0 for seconds in found.tile_s.values())


def test_a_single_tile_is_warmed_up_on_and_timed() -> None:
    cells = np.array([[3, 4]], np.int32)
    one = TileGrid(
        TileSpec(0.5, 256), (0.5, 0.5), (0.0, 0.0), (256.0, 256.0), (256.0, 256.0), cells, np.ones(1, np.float32)
    )
    assert [len(grid) for grid in _apart(one, 128)] == [1, 1]


def test_a_long_list_plans_in_bounded_memory() -> None:
    def entries() -> Iterator[SlideEntry]:
        for n in range(5000):
            yield SlideEntry(f"s{n}", f"https://127.0.0.1/s{n}.svs", "case")

    def describe(one: SlideEntry, reader: str) -> SlideFacts:
        return SlideFacts(sizes_px=((100_000, 80_000), (25_000, 20_000)), mpp=(0.25, 0.25), mpp_source="stub")

    with MetadataCache() as cache:
        tracemalloc.start()
        totals = total(survey(entries(), SETTINGS, cache, kept={"5x": 0.5, "20x": 0.5}, describe=describe))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    # 100,000 x 80,000 px at 0.25 um/px: 49 x 40 tiles of 512 um, 196 x 157 of 128 um (rounded up), half of them kept.
    assert totals.tiles == {"5x": 5000 * 980, "20x": 5000 * 15386}
    assert peak < 20e6


def test_sample_is_spread_over_the_list() -> None:
    entries = [SlideEntry(str(n), str(n), "c") for n in range(100)]
    assert [e.slide_id for e in spread_sample(entries, 3)] == ["0", "50", "99"]
    assert spread_sample(entries[:2], 3) == entries[:2]
    assert spread_sample(entries, 0) == []


def test_a_small_archive_takes_seconds_not_no_hours() -> None:
    from wsi_pipe.job.changes import duration

    assert [duration(s) for s in (0.4, 90, 600, 7200, 3.6e6)] == ["0.4 s", "90.0 s", "10 min", "2.0 h", "1,000.0 h"]


def test_command(tmp_path: Path, make_slide: MakeSlide, capsys: pytest.CaptureFixture[str]) -> None:
    make_slide(tmp_path / "in/a.svs")
    make_slide(tmp_path / "in/b.svs", seed=1)
    (tmp_path / "in/bad.svs").write_bytes(b"no")
    each = tmp_path / "each.jsonl"
    arguments = ["plan", str(tmp_path / "in"), "--sample", "1", "--json", "--each", str(each)]
    assert run_group(group, "wsi-pipe", arguments) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["slides"] == 3
    assert [plan["slide_id"] for plan in result["failing"]] == ["bad"]
    assert result["hours"] > 0
    assert result["gigabytes"] == pytest.approx(
        sum(n * result["calibration"]["bytes_per_tile"][label] for label, n in result["tiles"].items()) / 1e9
    )
    assert len(each.read_text().splitlines()) == 3
    assert run_group(group, "wsi-pipe", ["plan", str(tmp_path / "in"), "--calibrate", "0"]) == 1
    assert "1 will fail" in capsys.readouterr().out


def test_a_disk_without_room_is_warned_of_with_figures(
    tmp_path: Path, make_slide: MakeSlide, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Path] = []
    usage = type(shutil.disk_usage(tmp_path))

    def full(path: Path) -> Any:
        asked.append(path)
        return usage(10**12, 10**12, 1_000_000_000)

    monkeypatch.setattr(space.shutil, "disk_usage", full)
    tile_bytes = {"20x": 1000 - BYTES_PER_TILE}
    planned = PlanTotals(slides=2001, tiles={"20x": 4_000_000}, failing=[SlidePlan("bad", "bad", problem="no")])
    job = tmp_path / "none/job"
    found = SpaceCount(job).space(planned, tile_bytes)
    # 4 million tiles of 1 kB, in bags and grids, and 2,000 slides of half a MB.
    assert (found.needed_gb, found.held_gb, found.free_gb) == (pytest.approx(5.0), 0.0, 1.0)
    assert found.lacking_gb == pytest.approx(4.0)
    assert asked == [tmp_path]
    assert SpaceCount(job).space(PlanTotals(slides=1999), tile_bytes).lacking_gb == 0.0

    make_slide(tmp_path / "in/a.svs")
    arguments = ["plan", str(tmp_path / "in"), "-o", str(job)]
    assert run_group(group, "wsi-pipe", arguments) == 0
    printed = capsys.readouterr()
    assert "1.0 GB free" in printed.out
    assert "warning" not in printed.err
    monkeypatch.setattr(space, "SLIDE_BYTES", 10_000_000_000)
    assert run_group(group, "wsi-pipe", [*arguments, "--json"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out)["space"]["lacking_gb"] == pytest.approx(9.0, abs=0.01)
    assert f"about 10.0 GB and the disk of {job} has 1.0 GB free: 9.0 GB are lacking" in printed.err
    assert "--out" in printed.err


def test_only_files_of_planned_slides_are_there_already(tmp_path: Path) -> None:
    names = ("bags/{}.h5", "tiles/{}.h5", "tissue/{}.geojson", "thumbnails/{}.jpg", "thumbnails/{}.raw.jpg")
    for slide_id, size in (("a", 100_000), ("large", 3_000_000), ("other", 5_000_000), ("bad", 5_000_000)):
        for name in (*names, "thumbnails/{}.grid.jpg"):
            path = tmp_path / name.format(slide_id)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(bytes(size))
    room = SpaceCount(tmp_path)
    plans = [
        SlidePlan("a", "a", tiles={"20x": 1000}),
        SlidePlan("large", "large", tiles={"20x": 1000}),
        SlidePlan("new", "new", tiles={"20x": 1000}),
        SlidePlan("bad", "bad", problem="no"),
    ]
    found = room.space(total(plans, room.see), {"20x": 1000 - BYTES_PER_TILE})
    # Three slides of 1,000 tiles of 1 kB and half a MB beside; of the large one no more than that is of use.
    assert found.needed_gb == pytest.approx(4.5e-3)
    assert found.held_gb == pytest.approx(0.6e-3 + 1.5e-3)


@pytest.mark.parametrize(("encoder", "known"), [("texture", True), ("timm:test_vit", False), ("uni", True)])
def test_room_is_looked_at_without_a_trial_where_encoders_are_known(
    tmp_path: Path, make_slide: MakeSlide, capsys: pytest.CaptureFixture[str], encoder: str, known: bool
) -> None:
    make_slide(tmp_path / "in/a.svs")
    plan = ["plan", str(tmp_path / "in"), "-o", str(tmp_path / "job"), "-e", encoder, "--calibrate", "0"]
    # Weights that are not there would end a run, and keep nothing from being counted.
    assert run_group(group, "wsi-pipe", plan) == (0 if encoder == "texture" else 1)
    printed = capsys.readouterr()
    assert "tiles at 20x  17" in printed.out
    assert ("a run would stop before its first tile" in printed.err) == (encoder != "texture")
    assert (f"GB free at {tmp_path / 'job'}" in printed.out) == known
    assert ("not checked: how much encoders give is not known without --calibrate" in printed.out) == (not known)
    assert ("warning: room on the disk: not checked" in printed.err) == (not known)


def test_what_a_tile_takes_is_the_same_with_and_without_loading() -> None:
    rates = calibrate([], SETTINGS, load_encoders(SETTINGS))
    assert known_bytes_per_tile(SETTINGS) == rates.bytes_per_tile


def test_a_disk_that_does_not_answer_does_not_cost_the_plan(
    tmp_path: Path, make_slide: MakeSlide, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lost(path: Path) -> Any:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(space.shutil, "disk_usage", lost)
    make_slide(tmp_path / "in/a.svs")
    arguments = ["plan", str(tmp_path / "in"), "-o", str(tmp_path / "job"), "--calibrate", "0", "--json"]
    assert run_group(group, "wsi-pipe", arguments) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert (result["slides"], result["space"]) == (1, None)
    assert f"not checked: cannot write {tmp_path / 'job'}: Stale file handle" in printed.err


def test_facts_of_a_folder_are_not_kept(tmp_path: Path) -> None:
    """Of a store of chunks, the folder's own size and time do not change with its contents."""
    (tmp_path / "a.zarr").mkdir()
    (tmp_path / "b.svs").write_bytes(b"x")
    with MetadataCache(tmp_path / "facts.sqlite") as cache:
        for name in ("a.zarr", "b.svs"):
            cache.put(str(tmp_path / name), "auto", SlideFacts(sizes_px=((10, 10),)))
        assert cache.get(str(tmp_path / "a.zarr"), "auto") is None
        assert cache.get(str(tmp_path / "b.svs"), "auto") is not None
