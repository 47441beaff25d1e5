"""Which level of a bag other programs find: the coarsest, or the one that is chosen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from wsi_pipe.bag import check_bag, read_attrs
from wsi_pipe.cli import group, run_group
from wsi_pipe.job import load_settings

MakeSlide = Callable[..., Path]


def cli(*arguments: str | Path) -> int:
    return run_group(group, "wsi-pipe", [str(argument) for argument in arguments])


def found_by_others(bag: Path) -> tuple[str, int]:
    """Where /features leads to, and how many tiles /coords has."""
    with h5py.File(bag) as file:
        assert len(file["features"]) == len(file["coords"])
        return file.get("features", getlink=True).path, len(file["coords"])


def test_the_primary_level_is_chosen_and_changed(
    tmp_path: Path, make_slide: MakeSlide, capsys: pytest.CaptureFixture[str]
) -> None:
    slide, job = make_slide(tmp_path / "s.svs"), tmp_path / "job"
    bag = job / "bags/s.h5"
    run = ("run", slide, "-o", job, "--no-report")
    assert cli(*run, "-r", "20x", "-r", "5x") == 0
    assert found_by_others(bag)[0] == "/levels/5x/features/texture"
    with h5py.File(bag) as file:
        before = {label: file[f"levels/{label}/features/texture"][:] for label in ("5x", "20x")}
    assert cli(*run, "--primary", "20x") == 0
    assert "changed: primary none -> 20x" in capsys.readouterr().err
    assert found_by_others(bag) == ("/levels/20x/features/texture", len(before["20x"]))
    assert read_attrs(bag).primary_level == "20x"
    assert check_bag(bag) == []
    with h5py.File(bag) as file:
        for label, values in before.items():
            assert np.array_equal(file[f"levels/{label}/features/texture"], values)
    # Remembered, and nothing is written again.
    written = bag.stat().st_mtime_ns
    assert cli(*run) == 0
    assert cli(*run, "-r", "5x") == 0
    assert cli("verify", job) == 0
    assert bag.stat().st_mtime_ns == written
    capsys.readouterr()
    assert cli(*run, "--primary", "10x") == 2
    assert "--primary 10x is none of the resolutions 20x, 5x; add -r 10x" in capsys.readouterr().err
    # A coarser level that comes later does not take its place.
    assert cli(*run, "-r", "2.5x") == 0
    assert found_by_others(bag)[0] == "/levels/20x/features/texture"
    assert cli("prune", job, "-r", "20x", "--yes") == 0
    assert found_by_others(bag)[0] == "/levels/2.5x/features/texture"
    settings = load_settings(job)
    assert settings is not None
    assert settings.primary is None


def test_a_new_job_begins_with_it(tmp_path: Path, make_slide: MakeSlide) -> None:
    slide = make_slide(tmp_path / "s.svs")
    assert cli("tile", slide, "-o", tmp_path / "job", "--primary", "0.5um") == 0
    assert cli("assemble", "-o", tmp_path / "job") == 0
    assert found_by_others(tmp_path / "job/bags/s.h5")[0] == "/levels/20x/features/texture"
