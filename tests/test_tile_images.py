"""Tiles as pictures and in tar shards: all of them, the same bytes each time, and keys that lead back."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from wsi_pipe.bag import read_grids
from wsi_pipe.cli import group, run_group
from wsi_pipe.slides import open_slide
from wsi_pipe.tiles import read_tiles

MakeSlide = Callable[..., Path]
NAME = "TCGA-AA.1"


def cli(*arguments: str | Path) -> int:
    return run_group(group, "wsi-pipe", [str(argument) for argument in arguments])


@pytest.fixture
def slide(tmp_path: Path, make_slide: MakeSlide) -> Path:
    return make_slide(tmp_path / f"in/{NAME}.svs")


def tile(slide: Path, job: Path, *more: str) -> int:
    return cli("tile", slide, "-o", job, "-r", "2.5x", "-r", "20x", "--tile-px", "64", *more)


def pixels_by_cell(slide: Path, job: Path, label: str) -> dict[tuple[int, int], NDArray[np.uint8]]:
    """The tiles, read in another way than they were saved."""
    grid = next(grid for grid in read_grids(job / f"tiles/{NAME}.h5") if grid.label == label)
    with open_slide(slide) as opened:
        pixels = read_tiles(opened, grid.corners_l0, grid.tile_size_l0, grid.spec.size_px)
    return {(int(c), int(r)): tile for (c, r), tile in zip(grid.cells, pixels, strict=True)}


@pytest.mark.parametrize(("kind", "loss"), [("png", 0.0), ("jpg", 6.0), ("webp", 9.0)])
def test_every_tile_is_saved(slide: Path, tmp_path: Path, kind: str, loss: float) -> None:
    job = tmp_path / "job"
    assert tile(slide, job, "--save-tiles", kind) == 0
    for label in ("2.5x", "20x"):
        tiles = pixels_by_cell(slide, job, label)
        files = list((job / "tiles" / NAME / label).glob(f"*.{kind}"))
        assert len(files) == len(tiles)
        for file in files:
            column, row = map(int, file.stem.split("_"))
            saved = np.asarray(Image.open(file).convert("RGB"), float)
            assert np.abs(saved - tiles[column, row]).mean() <= loss
    assert len(pixels_by_cell(slide, job, "20x")) > 200, "more than the limit of earlier versions"


def members(shard: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(shard) as archive:
        found = [(item, archive.extractfile(item)) for item in archive.getmembers()]
        for item, _ in found:
            assert (item.mtime, item.uid, item.gid, item.uname, item.gname) == (0, 0, 0, "", "")
        return [(item.name, file.read()) for item, file in found if file is not None]


def test_shards_lead_back_and_are_the_same_each_time(slide: Path, tmp_path: Path) -> None:
    job = tmp_path / "job"
    shards = ("--save-tiles", "shards", "--shard-size", "100", "--shard-images", "png")
    assert tile(slide, job, *shards) == 0
    tiles = pixels_by_cell(slide, job, "20x")
    folder = job / "tiles" / NAME / "20x"
    files = sorted(folder.glob("*.tar"))
    count = -(-len(tiles) // 100)
    assert [file.name for file in files] == [f"{NAME}-20x-{i:06d}.tar" for i in range(count)]
    seen = {}
    for file in files:
        held = members(file)
        for (picture, data), (text, raw) in zip(held[::2], held[1::2], strict=True):
            # WebDataset's key: all up to the first dot behind the last slash.
            key, suffix = re.fullmatch(r"((?:.*/|)[^.]+)[.]([^/]*)", picture).groups()  # type: ignore[union-attr]
            assert (suffix, text) == ("png", f"{key}.json")
            slide_id, level, column, row = re.fullmatch(r"(.*)/(.*)/(\d+)_(\d+)", key).groups()  # type: ignore[union-attr]
            told = json.loads(raw)
            assert (told["slide_id"], told["level"]) == (slide_id, level) == (NAME, "20x")
            assert (told["column"], told["row"]) == (int(column), int(row))
            seen[told["column"], told["row"]] = np.asarray(Image.open(io.BytesIO(data)))
            assert told["x_l0"] == int(column) * 64
    assert seen.keys() == tiles.keys()
    assert all(np.array_equal(seen[cell], tiles[cell]) for cell in tiles)
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}
    assert tile(slide, job, *shards) == 0
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files} == before, "written again"
    other = tmp_path / "other"
    assert tile(slide, other, *shards) == 0
    for file in files:
        assert (other / file.relative_to(job)).read_bytes() == before[file][0]
    # Larger shards: those that are too many go, and nothing else.
    (folder / "of-the-user.tar").write_bytes(b"mine")
    assert tile(slide, job, *shards[:2], "--shard-size", "100000", *shards[4:]) == 0
    assert sorted(file.name for file in folder.glob("*.tar")) == [f"{NAME}-20x-000000.tar", "of-the-user.tar"]
    assert not list(folder.glob(".*.partial"))


def test_webdataset_reads_shards(slide: Path, tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset.tariterators")
    job = tmp_path / "job"
    assert tile(slide, job, "--save-tiles", "shards", "--shard-size", "150") == 0
    tiles = pixels_by_cell(slide, job, "20x")
    found = {}
    for file in sorted((job / "tiles" / NAME / "20x").glob("*.tar")):
        # Its own pipeline leaves files open, which is an error here.
        with file.open("rb") as stream:
            samples = list(wds.group_by_keys(wds.tar_file_expander([{"url": str(file), "stream": stream}])))
        for sample in samples:
            told = json.loads(sample["json"])
            assert sample["__key__"] == f"{NAME}/20x/{told['column']}_{told['row']}"
            found[told["column"], told["row"]] = np.asarray(Image.open(io.BytesIO(sample["jpg"])))
    assert found.keys() == tiles.keys()
    assert all(np.abs(found[cell].astype(float) - tiles[cell]).mean() < 6 for cell in tiles)


def test_a_slide_that_cannot_be_read_stops_no_other(
    tmp_path: Path, make_slide: MakeSlide, capsys: pytest.CaptureFixture[str]
) -> None:
    job, archive = tmp_path / "job", tmp_path / "in"
    for name in "ab":
        make_slide(archive / f"{name}.svs")
    assert cli("tile", archive, "-o", job, "-r", "5x") == 0
    for path in (job / "tiles").glob("a.h5"):
        path.write_bytes(path.read_bytes()[:2000])
    (archive / "a.svs").write_bytes(b"no slide any more")
    assert cli("tile", archive, "-o", job, "-r", "5x", "--save-tiles", "jpg") == 1
    assert list((job / "tiles/b/5x").glob("*.jpg"))


def test_options_that_need_each_other(slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tile(slide, tmp_path / "job", "--shard-size", "5") == 2
    assert tile(slide, tmp_path / "job", "--save-tiles", "png", "--shard-size", "5") == 2
    assert "need --save-tiles shards" in capsys.readouterr().err
