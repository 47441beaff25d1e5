"""Distillation by its command: layers out of bags, slides that have moved, half precision."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from lrmil.cli import group as lrmil_group
from lrmil.distill import lessons
from lrmil.distill import run as run_module
from lrmil.splits import SplitTable
from wsi_pipe.bag import read_attrs, read_grids, read_level
from wsi_pipe.cli import group as wsi_pipe_group
from wsi_pipe.cli import run_group
from wsi_pipe.encoders import load_encoder
from wsi_pipe.encoders.lr_file import read_lr_header
from wsi_pipe.slides import open_slide
from wsi_pipe.tiles import stream_tiles


def distil(bags: Path, out: Path, *options: str | Path) -> int:
    """``lrmil distill`` on all but the first two cases of the bags, a quick one."""
    cases = tuple(read_attrs(bag).case_id for bag in sorted(bags.glob("*.h5")))
    parts = tuple("test" if i < 2 else "train" for i in range(len(cases)))
    out.parent.mkdir(exist_ok=True)
    splits = out.with_suffix(".csv")
    SplitTable("case", cases, {"fold_1": parts}).write(splits)  # type: ignore[dict-item]
    arguments = ["distill", "--bags", bags, "--splits", splits, "--fold", "1", "--out", out, "--device", "cpu"]
    arguments += ["--batch-size", "8", "--val-fraction", "0.3", "--threads", "1", *options]
    return run_group(lrmil_group, "lrmil", [str(argument) for argument in arguments])


def epochs_of(out: Path) -> list[dict[str, float]]:
    found: list[dict[str, float]] = json.loads(out.with_name(f"{out.stem}.history.json").read_text())["epochs"]
    return found


def test_layers_that_extraction_stored_are_learnt(
    distill_cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = distill_cohort / "slides" / "slides.csv"
    grids = ["-r", "20x", "-r", "5x", "--tile-px", "64"]
    # Compared with float32 below: on some processors "auto" is bfloat16.
    encoder = ["--encoder", "timm:test_vit", "--random-weights", "--layers", "0,1,-2", "--precision", "float32"]
    for command in (["tile", manifest, *grids], ["extract", manifest, *grids, *encoder], ["assemble", *encoder]):
        arguments = [str(part) for part in (*command, "-o", tmp_path / "job")]
        assert run_group(wsi_pipe_group, "wsi-pipe", arguments) == 0
    bags = tmp_path / "job" / "bags"
    seen: list[Any] = []
    original = run_module.distill

    def spy(student: Any, preprocessing: Any, train: Any, val: Any, *args: Any, **kwargs: Any) -> Any:
        seen.extend([*train, *val])
        return original(student, preprocessing, train, val, *args, **kwargs)

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the teacher is run though the bags hold what is needed")

    monkeypatch.setattr(run_module, "distill", spy)
    monkeypatch.setattr(lessons, "compute_targets", never)
    options = ["--teacher", "timm:test_vit", "--random-teacher", "--student", "copy", "--epochs", "2"]
    out = tmp_path / "lr" / "lr-fold1.safetensors"
    assert distil(bags, out, *options) == 0
    assert read_lr_header(out).training["layers"] == [0, 1, 4]
    figures = epochs_of(out)[-1]
    assert {key.split("_")[0] for key in figures if key.endswith("cosine")} == {"layer0", "layer1", "layer2", "final"}
    # Each layer is the teacher's CLS after that block, of the very tiles that are the children.
    teacher = load_encoder("timm:test_vit", precision="float32", random_weights=True)
    assert len(seen) == 4
    one = seen[0]
    slide = open_slide(one.path)
    bag = bags / f"{one.slide_id}.h5"
    grid = next(g for g in read_grids(bag) if g.label == "20x")
    pixels = np.concatenate([batch.pixels for batch in stream_tiles(slide, grid)])
    slide.close()
    encoded = teacher.encode_layers(pixels, (0, 1, 4))
    expected = (*(encoded.cls[n] for n in (0, 1, 4)), encoded.features)
    for found, wanted in zip((*one.layers, one.final), expected, strict=True):
        assert found.dtype == np.float16
        assert np.allclose(found, wanted, atol=5e-3, rtol=5e-3)
    assert np.array_equal(one.final, read_level(bag, "20x", "timm:test_vit-random").features)
    # Some of the layers may be left out, and blocks may be counted from the other end.
    assert distil(bags, tmp_path / "few" / "lr.safetensors", *options, "--layers", "4,-5") == 0
    assert read_lr_header(tmp_path / "few" / "lr.safetensors").training["layers"] == [4, 1]
    assert distil(bags, tmp_path / "other" / "lr.safetensors", *options, "--layers", "2") == 2


@pytest.mark.slow
def test_slides_that_have_moved_are_read_where_the_list_says(
    distill_cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--teacher", "texture", "--student", "timm:test_resnet", "--random-student", "--epochs", "1"]
    plain = tmp_path / "plain" / "lr.safetensors"
    assert distil(distill_cohort / "job" / "bags", plain, *options) == 0
    bags = tmp_path / "bags"
    shutil.copytree(distill_cohort / "job" / "bags", bags)
    for bag in bags.glob("*.h5"):
        with h5py.File(bag, "r+") as file:
            file.attrs["slide_path"] = f"/nowhere/{bag.stem}.tif"
    moved = tmp_path / "moved"
    shutil.copytree(distill_cohort / "slides", moved)
    # The list says where slides are, whatever they are called there.
    rows = (distill_cohort / "slides" / "slides.csv").read_text().splitlines()
    for row in rows[1:]:
        name = row.split(",")[0]
        (moved / name).rename(moved / f"new-{name}")
    (moved / "slides.csv").write_text("\n".join([rows[0], *(f"new-{row}" for row in rows[1:])]) + "\n")
    capsys.readouterr()
    assert distil(bags, tmp_path / "lost" / "lr.safetensors", *options) == 2
    assert "/nowhere/" in capsys.readouterr().err
    for name, more in (("moved", []), ("jittered", ["--jitters", "1"])):
        out = tmp_path / name / "lr.safetensors"
        assert distil(bags, out, *options, "--slides", moved / "slides.csv", *more) == 0
    assert (tmp_path / "moved" / "lr.safetensors").read_bytes() == plain.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("student", ["timm:test_vit", "timm:test_resnet"])
def test_half_precision_learns_on_a_cpu(distill_cohort: Path, tmp_path: Path, student: str) -> None:
    options = ["--teacher", "texture", "--student", student, "--random-student", "--epochs", "6", "--lr", "3e-3"]
    found = {}
    for precision in ("bfloat16", "float32"):
        out = tmp_path / precision / "lr.safetensors"
        assert distil(distill_cohort / "job" / "bags", out, *options, "--precision", precision) == 0
        found[precision] = epochs_of(out)
    half, full = found["bfloat16"], found["float32"]
    assert len(half) == 6
    assert all(math.isfinite(value) for figures in half for value in figures.values())
    assert half[-1]["loss"] < 0.8 * half[0]["loss"]
    # Other arithmetic, and the same thing learnt.
    assert half[0]["loss"] != full[0]["loss"]
    assert half[0]["loss"] == pytest.approx(full[0]["loss"], rel=0.05)
    assert half[-1]["loss"] == pytest.approx(full[-1]["loss"], rel=0.2)
