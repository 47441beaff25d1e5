"""Whole commands on a real CUDA device; everything here is skipped where there is none."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lrmil.distill import DistillRequest, DistillSettings, run_distillation
from lrmil.splits import SplitTable
from wsi_pipe.bag import check_bag, read_attrs, read_bag
from wsi_pipe.benchmark import read_record
from wsi_pipe.cli import group, run_group
from wsi_pipe.synthetic import make_cohort

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"), pytest.mark.slow]

DEVICE = "cuda:0"
ENCODER = "timm:vit_tiny_patch16_224"


def cli(*arguments: str | Path) -> int:
    return run_group(group, "wsi-pipe", [str(argument) for argument in arguments])


def features(job: Path) -> dict[tuple[str, str], Any]:
    found = {}
    for path in sorted((job / "bags").glob("*.h5")):
        assert check_bag(path) == []
        for level in read_bag(path).levels:
            for made in level.features.values():
                found[path.stem, level.grid.label] = np.asarray(made.values, np.float64)
    return found


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_killed_run_resumes_to_the_same_features(tmp_path: Path, precision: str) -> None:
    make_cohort(tmp_path / "slides", 8, seed=2, size_px=(2048, 2048), mpp=0.5)
    options = ["--slides", tmp_path / "slides" / "slides.csv", "-e", ENCODER, "--random-weights", "--devices", DEVICE]
    options += ["--precision", precision, "--dtype", "float32", "--batch-size", "64", "--no-report"]
    assert cli("run", *options, "-o", tmp_path / "whole") == 0
    job = tmp_path / "killed"
    command = [sys.executable, "-m", "wsi_pipe", "run", *map(str, options), "-o", str(job)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((job / "bags").glob("*.h5")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    made = len(list((job / "bags").glob("*.h5")))
    assert 1 <= made < 8  # killed while slides were under way
    assert cli("run", *options, "-o", job) == 0
    whole, resumed = features(tmp_path / "whole"), features(job)
    assert whole.keys() == resumed.keys()
    assert len(whole) == 16
    for key, values in whole.items():
        worst = np.linalg.norm(resumed[key] - values, axis=1) / np.linalg.norm(values, axis=1)
        print(precision, key, f"largest relative difference of a tile {worst.max():.2e}")
        # Batches are cut elsewhere after resuming; half precision then rounds elsewhere too.
        assert worst.max() < (1e-3 if precision == "float32" else 2e-2)
        cosines = (resumed[key] * values).sum(1) / np.linalg.norm(resumed[key], axis=1) / np.linalg.norm(values, axis=1)
        assert cosines.min() > 1 - 1e-3


def test_a_benchmark_counts_what_the_gpu_spent(tmp_path: Path) -> None:
    make_cohort(tmp_path / "slides", 2, seed=2, size_px=(4096, 4096), mpp=0.5)
    table = tmp_path / "slides" / "slides.csv"
    encoder = "timm:vit_base_patch16_224"
    options = ["-e", encoder, "--random-weights", "--devices", DEVICE, "--repeats", "2", "-o", tmp_path / "out"]
    assert cli("benchmark", "--slides", table, *options) == 0
    record = read_record(tmp_path / "out" / "benchmark.json")
    assert record.machine.gpu == torch.cuda.get_device_name()
    for measurement in record.measurements:
        spent = measurement.gpu
        assert spent is not None
        assert spent.peak_memory_bytes is not None
        assert spent.peak_memory_bytes > 100 << 20  # the weights alone are more
        assert spent.utilisation is not None
        assert 0 <= spent.utilisation <= 1
        assert spent.energy_j is not None
        assert spent.energy_j > 0
    assert torch.cuda.get_device_name() in (tmp_path / "out" / "benchmark.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("distill")
    make_cohort(root / "slides", 8, seed=3, size_px=(1024, 1024), mpp=0.5, max_slides_per_case=1)
    options = ["-e", "timm:test_vit", "--random-weights", "--devices", DEVICE, "--no-report", "-o", root / "job"]
    assert cli("run", "--slides", root / "slides" / "slides.csv", "--tile-px", "64", *options) == 0
    return root / "job"


def request_of(job: Path, out: Path, **settings: Any) -> DistillRequest:
    cases = tuple(read_attrs(bag).case_id for bag in sorted((job / "bags").glob("*.h5")))
    parts = tuple("test" if i < 2 else "train" for i in range(len(cases)))
    chosen = DistillSettings(epochs=4, batch_size=16, lr=1e-3, val_fraction=0.3, patience=9, layers=(0, -1))
    return DistillRequest(
        bags=job / "bags",
        teacher="timm:test_vit",
        student="timm:test_vit2",
        lr="5x",
        hr="20x",
        splits=SplitTable("case", cases, {"fold_1": parts}),  # type: ignore[dict-item]
        fold="1",
        out=out,
        settings=dataclasses.replace(chosen, device=DEVICE, **settings),
        compute=True,
        random_teacher=True,
        random_student=True,
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_distillation_learns_and_resumes(job: Path, tmp_path: Path, precision: str) -> None:
    lines: list[str] = []
    whole = run_distillation(request_of(job, tmp_path / "whole.safetensors", precision=precision), lines.append)
    epochs = whole.history.epochs
    assert epochs[-1]["val_loss"] < epochs[0]["val_loss"]
    request = request_of(job, tmp_path / "parts.safetensors", precision=precision)

    class StopError(Exception):
        pass

    def stop(line: str) -> None:
        if line.startswith("epoch 2/"):
            raise StopError

    with pytest.raises(StopError):
        run_distillation(request, stop)
    resumed = run_distillation(request)
    for one, other in zip(resumed.history.epochs, epochs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.02)


def test_classifiers_train_and_predict(job: Path, tmp_path: Path) -> None:
    from lrmil.cli import group as lrmil

    def run(*arguments: str | Path) -> int:
        return run_group(lrmil, "lrmil", [str(argument) for argument in arguments])

    labels = job.parent / "slides" / "labels.csv"
    assert run("split", "--labels", labels, "--folds", "2", "-o", tmp_path / "splits.csv") == 0
    options = ["--labels", labels, "--splits", tmp_path / "splits.csv", "-r", "5x", "--epochs", "3"]
    assert run("train", "--bags", job / "bags", *options, "--device", DEVICE, "-o", tmp_path / "runs") == 0
    assert list((tmp_path / "runs").rglob("model.safetensors"))
