"""The main job on real slides: two encodings of one image, none of resolution, fluorescence, an unusual OME-TIFF."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wsi_pipe.bag import read_bag
from wsi_pipe.cli import group, run_group

SVS, DICOM = "CMU-1-Small-Region", "CMU-1-Small-Region-dicom"
TCGA, NDPI, OME = "TCGA-CR-7395-01A-01-TS1", "test3-DAPI-2-387", "OS-1-detail"


@pytest.fixture(scope="module")
def job(shared_slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run over all of them; one slide of the five fails."""
    folder = tmp_path_factory.mktemp("real")
    assert run_group(group, "wsi-pipe", ["run", str(shared_slides), "-o", str(folder), "--no-report"]) == 1
    return folder


def outcomes(job: Path) -> dict[str, dict[str, Any]]:
    lines = (job / "outcomes.jsonl").read_text(encoding="utf-8").splitlines()
    return {line["slide_id"]: line for line in map(json.loads, lines)}


def test_each_slide_ends_as_it_should(job: Path) -> None:
    ends = outcomes(job)
    assert {name: end["status"] for name, end in ends.items()} == {
        SVS: "done", DICOM: "done", OME: "done", NDPI: "empty", TCGA: "failed",
    }  # fmt: skip
    assert "dark background" in ends[NDPI]["reason"]
    assert "--slide-mpp" in ends[TCGA]["remedy"]
    assert run_group(group, "wsi-pipe", ["verify", str(job)]) == 0


def test_two_encodings_of_one_slide_agree(job: Path) -> None:
    svs, dicom = (read_bag(job / "bags" / f"{name}.h5") for name in (SVS, DICOM))
    for ours, theirs in zip(svs.levels, dicom.levels, strict=True):
        np.testing.assert_array_equal(ours.grid.cells, theirs.grid.cells)
        values = [level.features["texture"].values.astype(np.float64) for level in (ours, theirs)]
        both = np.concatenate(values)
        scaled = [(v - both.mean(0)) / (both.std(0) + 1e-9) for v in values]
        distance = ((scaled[0][:, None] - scaled[1][None]) ** 2).sum(-1)
        assert (distance.argmin(1) == np.arange(len(distance))).mean() >= 0.95


def test_a_slide_without_resolution_runs_with_one(shared_slides: Path, tmp_path: Path) -> None:
    arguments = ["tile", str(shared_slides / f"{TCGA}.svs"), "-o", str(tmp_path), "--slide-mpp", "1.0"]
    assert run_group(group, "wsi-pipe", [*arguments, "-r", "1um", "-r", "4um"]) == 0
    coarse, fine = read_bag(tmp_path / "tiles" / f"{TCGA}.h5").levels
    assert (coarse.grid.label, fine.grid.label) == ("2.5x", "10x")
    assert len(fine.grid) > 8 * len(coarse.grid) > 0
