"""A scan or focal plane that is named goes through all stages: list, options, masks, tiles, bags, report and plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tifffile

from tests.slides.tiff.test_meaning import OTHER, RGB, TILED, write
from wsi_pipe.bag import read_attrs
from wsi_pipe.cli import group, run_group


@dataclass(frozen=True)
class Said:
    exit_code: int
    output: str
    stderr: str


Call = Callable[..., Said]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*words: object) -> Said:
        code = run_group(group, "wsi-pipe", [str(word) for word in words])
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    return run


@pytest.fixture
def stack(tmp_path: Path) -> Path:
    path = tmp_path / "stack.ome.tif"
    sizes = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    options: dict[str, Any] = {"tile": (128, 128), "photometric": "rgb", "compression": "zlib", "ome": True}
    tifffile.imwrite(path, np.stack([OTHER, RGB, 255 - RGB]), metadata={"axes": "ZYXS", **sizes}, **options)
    return path


def features(job: Path, slide_id: str) -> Any:
    with h5py.File(job / "bags" / f"{slide_id}.h5") as file:
        return np.asarray(file["features"])


def test_a_plane_of_a_list_and_of_an_option(tmp_path: Path, stack: Path, call: Call) -> None:
    table = tmp_path / "slides.csv"
    table.write_text(f"slide,slide_id,z\n{stack},middle,\n{stack},first,0\n")
    common = ("-r", "20x", "--tile-px", 64, "--min-tissue", 0.05)
    done = call("run", "--slides", table, "-o", tmp_path / "job", *common)
    assert done.exit_code == 0, done.output
    assert read_attrs(tmp_path / "job/bags/middle.h5").z is None
    assert read_attrs(tmp_path / "job/bags/first.h5").z == 0
    prints = {read_attrs(tmp_path / f"job/bags/{name}.h5").slide_fingerprint for name in ("middle", "first")}
    assert len(prints) == 2
    report = (tmp_path / "job/report.html").read_text()
    assert "focal plane 1 of 3 (0 to 2), the middle one" in report
    assert "focal plane 0 of 3 (0 to 2), as asked for" in report
    assert "focal plane" in (tmp_path / "job/report.csv").read_text()
    assert (tmp_path / "job/slides.csv").read_text().splitlines()[0] == "slide,slide_id,case_id,mpp,mask,z"
    # The same planes by the option.
    for z, name in ((0, "first"), (1, "middle")):
        done = call("run", stack, "-o", tmp_path / f"job{z}", *common, "--z", z)
        assert done.exit_code == 0, done.output
        assert np.array_equal(features(tmp_path / f"job{z}", "stack"), features(tmp_path / "job", name))
    # A second run of the job finds all of it, without the option.
    again = call("run", "-o", tmp_path / "job0", "--json")
    assert [set(o["cached"]) >= {"segment", "tile"} for o in json.loads(again.output)["outcomes"]] == [True]


def test_info_and_plan_take_the_options(tmp_path: Path, stack: Path, call: Call) -> None:
    said = call("info", stack).output
    assert "stack: focal plane 1 of 3 (0 to 2), the middle one, as none was asked for (--z)" in said
    assert call("info", stack, "--z", 3).exit_code == 1
    assert "has 3 focal planes" in call("info", stack, "--z", 3).stderr
    scans = write(
        tmp_path / "two.tif", [(RGB, {**TILED, "photometric": "rgb"}), (OTHER, {**TILED, "photometric": "rgb"})]
    )
    assert "--scene 0 to 1" in call("info", scans).stderr
    assert call("info", scans, "--scene", 1).exit_code == 0
    facts = tmp_path / "facts.sqlite"
    assert call("plan", scans, "--metadata", facts).exit_code != 0
    assert call("plan", scans, "--scene", 1, "--metadata", facts, "-r", "5x").exit_code == 0


def test_an_option_out_of_bounds_stops_at_once(stack: Path, call: Call) -> None:
    for value in ("0.01", "0.5x30"):
        done = call("info", stack, "--slide-mpp", value)
        assert done.exit_code == 2
        assert f"--slide-mpp {value!r} is outside 0.05 to 20 um/px" in done.stderr
