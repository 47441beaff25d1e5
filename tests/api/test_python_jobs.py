"""Jobs and data sets from Python: what the command line does, with its refusals as exceptions."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import wsi_pipe as wp
from wsi_pipe.cli import group, run_group
from wsi_pipe.errors import (
    BagError,
    ConfigError,
    JobLockedError,
    ManifestError,
    NotOursError,
    ResolutionError,
    SlideError,
    StaleWorkError,
    UnknownEncoderError,
)
from wsi_pipe.job.lock import hold_job


def test_a_job_run_from_python_is_the_job_of_the_command_line(
    slides: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.svs"
    bad.write_bytes(b"no slide")
    job = wp.Job(tmp_path / "job")
    assert "not there yet" in job._repr_html_()
    ran = job.run([*slides, bad], resolutions=["20x", 2.0], encoder="texture", tile_px=128, min_tissue=0.3)
    assert sorted(ran["status"]) == ["done", "done", "failed"]
    assert capsys.readouterr().out == ""
    (row,) = ran[ran["status"] == "failed"].to_dict("records")
    assert row["slide_id"] == "bad"
    assert row["reason"]
    assert (tmp_path / "job" / "report.html").is_file()
    # The command line finds nothing to do, and neither does Python.
    command = ["run", *map(str, slides), "-o", str(job.root), "--json"]
    assert run_group(group, "wsi-pipe", command) == 0
    said = json.loads(capsys.readouterr().out)
    assert all("assemble" in outcome["cached"] for outcome in said["outcomes"])
    before = {path: path.stat().st_mtime_ns for path in job.bags}
    assert job.run(slides[0])["slide_id"].tolist() == ["a"]
    assert {path: path.stat().st_mtime_ns for path in job.bags} == before

    state = job.status()
    assert state.set_index("slide_id")["status"].to_dict() == {"a": "done", "b": "done", "bad": "failed"}
    assert state.attrs["job"].failed == 1
    assert state.set_index("slide_id").loc["a", "tiles_20x"] == len(job.bag("a")["20x"])
    assert state["tiles_20x"].isna().sum() == 1
    assert job.slide_ids == ["a", "b", "bad"]
    assert "bad" in job._repr_html_()
    with pytest.raises(BagError, match="has no bag of bad: "):
        job.bag("bad")
    assert [finding.slide_id for finding in job.verify() if finding.problems] == []
    job.bag_path("b").unlink()
    assert job.status().set_index("slide_id")["status"].to_dict() == {"a": "done", "b": "waiting", "bad": "failed"}


def test_what_the_command_line_refuses_is_raised_before_any_work(
    slides: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = wp.Job(tmp_path / "job")
    refused: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ConfigError, "there is no setting 'tile'", {"tile": 256}),
        (ConfigError, "there is no setting 'redone'", {"redone": True}),
        (UnknownEncoderError, "no encoder 'univ'", {"encoder": "univ"}),
        (ConfigError, "an encoder is given for 10x", {"encoder": {"10x": "texture"}, "resolutions": "5x"}),
        (ConfigError, "min_tissue", {"min_tissue": 3.0}),
        (ConfigError, "not understood", {"resolutions": "often"}),
        (ConfigError, "--salt needs --anonymise", {"salt": tmp_path / "salt"}),
        (ConfigError, "--resources needs --scheduler", {"resources": "GPU=1"}),
        (ConfigError, "is outside", {"slide_mpp": 100.0}),
        (ConfigError, "--override-mpp needs --slide-mpp", {"override_mpp": True}),
        (ManifestError, "no slide has the id z", {"only": "z"}),
        (ConfigError, "is not a valid int", {"tile_px": 128.5}),
        (ConfigError, "is not a valid float", {"min_tissue": "half"}),
        (ConfigError, "workers 0 must be at least 1", {"workers": 0}),
        (ConfigError, "limit 0 must be at least 1", {"limit": 0}),
        (ConfigError, "timeout_s 0 must be at least 1", {"timeout_s": 0}),
        (ConfigError, "until 'train' is no stage", {"until": "train"}),
        (ConfigError, "the frame 'glass' is unknown", {"frame": "glass"}),
        (ConfigError, "holds nothing", {"cache_gib": 0.0}),
    ]
    for kind, text, options in refused:
        with pytest.raises(kind, match=text):
            job.run(slides, **options)
        assert not job.root.exists(), options
    with pytest.raises(ManifestError, match="no slides are given"):
        job.run()
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "thesis.doc").write_text("not a job")
    with pytest.raises(NotOursError):
        wp.Job(tmp_path / "others").run(slides)
    assert job.run(slides[0], resolutions="5x")["status"].tolist() == ["done"]
    with pytest.raises(StaleWorkError):
        job.run(slides[0], resolutions="5x", tile_px=128)
    with caplog.at_level("WARNING"):
        assert job.run(slides[0], resolutions="5x", tile_px=128, redo=True)["status"].tolist() == ["done"]
    # What becomes another is told, and by default not lost.
    assert "changed: tile_px 256 -> 128" in caplog.messages
    assert job.bag("a")["5x"].tile_px == 128
    with hold_job(job.root, {}), pytest.raises(JobLockedError):
        job.run()
    told: list[str] = []
    seen: list[tuple[str, str, int]] = []
    job.run(slides[1], resolutions="5x", say=told.append, progress=lambda *step: seen.append(step))
    assert sum(count for slide, what, count in seen if (slide, what) == ("b", "5x")) == len(job.bag("b")["5x"])


def test_bars_count_slides_and_tiles(
    slides: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    job = wp.Job(tmp_path / "job")
    job.run(slides[:2], resolutions="5x", progress=True)
    said = capsys.readouterr()
    tiles = sum(len(job.bag(name)["5x"]) for name in "ab")
    assert re.search(r"slides +\S+ 2/2", said.err), said.err
    assert re.search(rf"tiles +\S+ {tiles}/{tiles}", said.err), said.err
    assert said.out == ""
    job.run(progress=False)
    assert capsys.readouterr().err == ""


@pytest.fixture(scope="module")
def dataset(slides: list[Path]) -> wp.TileDataset:
    return wp.TileDataset(slides, "20x", tile_px=96, with_resolutions=["5x"])


def test_items_are_the_tiles_of_the_grids(slides: list[Path], dataset: wp.TileDataset) -> None:
    with wp.open(slides[0]) as one, wp.open(slides[1]) as two:
        grids = [slide.grids("20x", "5x", tile_px=96)["20x"] for slide in (one, two)]
        assert len(dataset) == sum(map(len, grids))
        first = len(grids[0])
        for index, (slide, row) in {0: (0, 0), first - 1: (0, first - 1), first + 4: (1, 4), -1: (1, -1)}.items():
            item = dataset[index]
            wanted = grids[slide].tile(row)
            assert np.array_equal(item["image"].numpy().transpose(1, 2, 0), wanted)
            assert item["slide_id"] == "ab"[slide]
            assert item["row"] == row % len(grids[slide])
            assert np.array_equal(item["coords"], grids[slide].coords[row])
        # In the order asked for, with repeats, over slides.
        asked = [first + 3, 2, 0, 2, first]
        items = dataset.__getitems__(asked)
        assert [(item["slide"], item["row"]) for item in items] == [(1, 3), (0, 2), (0, 0), (0, 2), (1, 0)]
        assert np.array_equal(items[1]["image"], items[3]["image"])
        assert np.array_equal(items[0]["image"].numpy().transpose(1, 2, 0), grids[1].tile(3))
    with pytest.raises(IndexError):
        _ = dataset[len(dataset)]
    assert np.bincount(dataset.slide_of_tile).tolist() == [first, len(dataset) - first]
    batches = list(dataset.chunks(50, seed=1))
    assert sorted(i for batch in batches for i in batch) == list(range(len(dataset)))
    assert all(len({dataset.slide_of_tile[i] for i in batch}) == 1 for batch in batches)
    assert batches != list(dataset.chunks(50))


@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_loader_s_workers_read_the_same_tiles(dataset: wp.TileDataset, context: str) -> None:
    from torch.utils.data import DataLoader

    # Open here already, so that a forked worker inherits an open file that it must not use.
    expected = {i: dataset[i]["image"].numpy() for i in (0, len(dataset) - 1)}
    loader: Any = DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=list(dataset.chunks(64)),
        num_workers=2,
        multiprocessing_context=multiprocessing.get_context(context),
    )
    images = [image for batch in loader for image in batch["image"].numpy()]
    assert len(images) == len(dataset)
    assert all(np.array_equal(images[i], image) for i, image in expected.items())


def test_a_data_set_pickles_small_and_a_forked_process_opens_its_own_file(dataset: wp.TileDataset) -> None:
    _ = dataset[0]
    other: wp.TileDataset = pickle.loads(pickle.dumps(dataset))
    assert len(pickle.dumps(dataset)) < 50_000
    assert np.array_equal(other[5]["image"], dataset[5]["image"])
    source = dataset._parts[0].source
    parents, other_source = source.slide, other._parts[0].source
    assert other_source.slide is not parents
    source._owner = -1  # As a forked child finds it.
    assert source.slide is not parents
    assert source._inherited == [parents]


def test_neighbours_of_one_batch_share_blocks(slides: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = wp.TileDataset(slides[0], "20x", tile_px=64)
    stats = dataset._parts[0].source.slide.stats
    together = stats.blocks_decoded
    dataset.__getitems__(range(40))
    together = stats.blocks_decoded - together
    singly = stats.blocks_decoded
    for index in range(40):
        _ = dataset[index]
    assert together * 3 < stats.blocks_decoded - singly


def test_a_transform_gets_the_tile_and_a_resolution_finer_than_the_slide_is_refused(
    slides: list[Path], make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    dataset = wp.TileDataset(slides[0], "5x", transform=lambda tile: (tile.dtype, tile.shape))
    assert dataset[0]["image"] == (np.uint8, (256, 256, 3))
    with pytest.raises(ResolutionError):
        wp.TileDataset(slides, "40x")
    bare = make_slide(tmp_path / "bare.tif", mpp=None)
    assert len(wp.TileDataset(bare, "5x", mpp=0.5)) > 0
    with wp.open(slides[0]) as slide:
        assert len(wp.TileDataset([slide], "5x")) == len(dataset)


def test_a_bad_slide_is_left_out_of_a_data_set_where_that_is_asked_for(
    slides: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = tmp_path / "bad.svs"
    bad.write_bytes(b"no slide")
    with pytest.raises(SlideError, match=r"bad\.svs"):
        wp.TileDataset([bad, slides[0]], "5x")
    dataset = wp.TileDataset([bad, slides[0]], "5x", skip_bad=True)
    assert dataset.slide_ids == ["a"]
    assert "bad.svs" in dataset.failures["bad"]
    assert "bad is left out" in caplog.text


def test_a_data_set_keeps_few_slides_open(slides: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsi_pipe.api.dataset.MOST_OPEN", 1)
    dataset = wp.TileDataset(slides, "5x")
    first = int(np.bincount(dataset.slide_of_tile)[0])
    before = dataset[0]["image"]
    _ = dataset[first]
    assert [part.source._slide is not None for part in dataset._parts] == [False, True]
    assert np.array_equal(dataset[0]["image"], before)
