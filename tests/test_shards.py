"""Shards: every slide in one of them, whatever the order, and jobs of shards that become one."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from wsi_pipe.cli import group, run_group
from wsi_pipe.errors import ConfigError
from wsi_pipe.job import load_slides, read_outcomes
from wsi_pipe.shards import Shard, parse_shard


def cli(*arguments: object) -> int:
    return run_group(group, "wsi-pipe", [str(argument) for argument in arguments])


@settings(max_examples=50, deadline=None)
@given(st.sets(st.text(min_size=1), max_size=30), st.integers(1, 40))
def test_each_slide_is_in_one_shard(ids: set[str], count: int) -> None:
    shards = [Shard(number, count) for number in range(1, count + 1)]
    for slide_id in ids:
        assert sum(shard.holds(slide_id) for shard in shards) == 1


def test_shards_are_about_of_one_size_and_stay_what_they_are() -> None:
    ids = [f"TCGA-{n:04d}-01Z-00-DX1" for n in range(16_000)]
    sizes = [sum(Shard(number, 16).holds(slide_id) for slide_id in ids) for number in range(1, 17)]
    # 1,000 slides a shard, spread as chance does: a standard deviation of 31.
    assert min(sizes) > 850
    assert max(sizes) < 1150
    # Jobs of an earlier version go on: these must never change.
    assert [Shard(number, 4).holds("a") for number in range(1, 5)] == [False, False, True, False]
    assert [Shard(number, 16).holds("a") for number in (3, 11)] == [False, True]
    # Accents in two spellings are one slide, on machines of two kinds too.
    assert all(Shard(n, 97).holds("caf\u00e9") == Shard(n, 97).holds("cafe\u0301") for n in range(1, 98))


@pytest.mark.parametrize(
    "text", ["", "3", "0/4", "5/4", "-1/4", "1/0", "1/1/1", "a/b", "1.5/4", "1/4x", "١/٤", "1/1000000"]
)
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="write K/N"):
        parse_shard(text)
    assert parse_shard(" 3/16 ") == Shard(3, 16)
    assert str(Shard(3, 16)) == "3/16"


@pytest.fixture(scope="module")
def archive(
    tmp_path_factory: pytest.TempPathFactory,
    make_slide: Callable[..., Path],
    tissue_picture: Callable[..., NDArray[np.uint8]],
) -> Path:
    """Six small slides, two of one name."""
    root = tmp_path_factory.mktemp("shards") / "archive"
    for seed, name in enumerate(("a", "b", "c", "d", "sub/a", "e")):
        make_slide(root / f"{name}.svs", picture=tissue_picture(512, 448, seed))
    return root


def slides_of(archive: Path, seed: int) -> list[Path]:
    slides = sorted(archive.rglob("*.svs"))
    random.Random(seed).shuffle(slides)
    return slides


def test_jobs_of_shards_become_one(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As docs/scaling.md says it: one job copied, the others' files beside its own, and a run over the archive."""
    held: dict[str, str] = {}
    for number in (1, 2, 3):
        job = tmp_path / f"shard-{number}"
        # Each machine may list the slides in its own order.
        assert cli("run", *slides_of(archive, number), "-o", job, "-r", "5x", "--shard", f"{number}/3") == 0
        for entry in load_slides(job):
            assert Shard(number, 3).holds(entry.slide_id)
            held[entry.path] = entry.slide_id
    assert set(held) == {str(path) for path in archive.rglob("*.svs")}
    assert len(set(held.values())) == 6
    merged = tmp_path / "job"
    shutil.copytree(tmp_path / "shard-1", merged)
    for number in (2, 3):
        for name in ("tissue", "tiles", "thumbnails", "bags"):
            if (tmp_path / f"shard-{number}" / name).is_dir():
                shutil.copytree(tmp_path / f"shard-{number}" / name, merged / name, dirs_exist_ok=True)
    before = {path: path.stat().st_mtime_ns for path in merged.glob("bags/*.h5")}
    capsys.readouterr()
    assert cli("run", archive, "-o", merged, "--json") == 0
    outcomes: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["outcomes"]
    assert {outcome["slide_id"] for outcome in outcomes} == set(held.values())
    for outcome in outcomes:
        assert set(outcome["cached"]) == {"segment", "tile", "extract", "assemble"}
    assert before == {path: path.stat().st_mtime_ns for path in merged.glob("bags/*.h5")}
    assert {entry.path: entry.slide_id for entry in load_slides(merged)} == held
    assert cli("verify", merged) == 0


def test_a_shard_without_slides_is_done(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    number = next(
        n for n in range(1, 51) if not any(Shard(n, 50).holds(i) for i in ("a", "archive--a", "sub--a", *"bcde"))
    )
    assert cli("run", archive, "-o", tmp_path / "job", "-r", "5x", "--shard", f"{number}/50") == 0
    assert f"note: shard {number}/50 holds 0 of 6 slides" in capsys.readouterr().err
    assert read_outcomes(tmp_path / "job") == {}


def test_anonymised_shards_are_those_of_the_names(archive: Path, tmp_path: Path) -> None:
    """Every job hides ids with a salt of its own: by the hidden ids a slide would be in two shards, or in none."""
    seen = []
    for number in (1, 2):
        job = tmp_path / f"hidden-{number}"
        assert cli("segment", archive, "-o", job, "--anonymise", "--shard", f"{number}/2") == 0
        seen += [entry.hides[0] for entry in load_slides(job)]
    assert sorted(seen) == sorted({*seen})
    assert len(seen) == 6


def test_a_slide_of_another_shard_is_not_taken(archive: Path, tmp_path: Path) -> None:
    other = next(n for n in (1, 2) if not Shard(n, 2).holds("b"))
    assert cli("segment", archive, "-o", tmp_path / "job", "--only", "b", "--shard", f"{other}/2") == 0
    assert load_slides(tmp_path / "job") == []
    # The next stage finds the job as the one before left it.
    assert cli("tile", archive, "-o", tmp_path / "job", "--only", "b", "--shard", f"{other}/2") == 0
    assert cli("segment", archive, "-o", tmp_path / "job", "--only", "nobody", "--shard", "1/2") == 2
    assert cli("segment", archive, "-o", tmp_path / "job", "--shard", "3/2") == 2
