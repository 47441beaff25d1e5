"""Ctrl-C and SIGTERM in the middle of ``lrmil train``, ``distill``, ``finetune`` and ``predict``: what is finished is
kept, and the same command goes on."""

from __future__ import annotations

import csv
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from lrmil.checkpoint import ModelCard, save_model
from lrmil.config import ModelSettings
from lrmil.model import build_model
from wsi_pipe.bag import check_bag, read_bag

MakeBag = Callable[..., Path]
ENDLESS = "1000000"
pytestmark = pytest.mark.slow


class Lines:
    """A command as a process of its own, and what it says on standard error, line by line."""

    def __init__(self, *arguments: object, change: str = "") -> None:
        code = f"import sys, time; from lrmil.cli import main; sys.argv[0] = 'lrmil'\n{change}\nmain()\n"
        command = [sys.executable, "-c", code, *map(str, arguments)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self.said: list[str] = []

    def until(self, pattern: str) -> re.Match[str]:
        """The first line that fits. Fails where the process ends without one."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if found := re.search(pattern, line):
                return found
        raise AssertionError("".join(self.said))

    def stop(self, number: signal.Signals) -> str:
        """Send a signal, wait for the end, and check that it ended as it should; all that was said."""
        self.process.send_signal(number)
        _, rest = self.process.communicate(timeout=120)
        said = "".join(self.said) + rest
        assert self.process.returncode == 128 + number, said
        assert "lrmil: stopping ..." in rest
        assert "Traceback" not in said
        return said

    def end(self) -> str:
        """Wait for the end of its own; all that was said."""
        _, rest = self.process.communicate(timeout=600)
        said = "".join(self.said) + rest
        assert self.process.returncode == 0, said
        return said


@pytest.fixture
def lines() -> Iterator[Callable[..., Lines]]:
    """``Lines``, ended with the test whatever became of it."""
    begun: list[Lines] = []

    def begin(*arguments: object, change: str = "") -> Lines:
        begun.append(Lines(*arguments, change=change))
        return begun[-1]

    yield begin
    for one in begun:
        one.process.kill()
        one.process.communicate()


def test_a_stopped_training_goes_on(lines: Callable[..., Lines], bag_writer: MakeBag, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = ["slide_id,case_id,label"]
    for i in range(12):
        bag_writer(tmp_path / "bags", f"s{i}", rng.normal(size=(10, 8)).astype(np.float16), case_id=f"p{i}")
        rows.append(f"s{i},p{i},{'ab'[i % 2]}")
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
    out = tmp_path / "run"
    command = ["train", "--bags", tmp_path / "bags", "--labels", tmp_path / "labels.csv", "-o", out, "--folds", "2"]
    command += ["--model", "gated-abmil", "--small-cohorts", "off"]
    command += ["--hidden", "8", "--device", "cpu", "--epochs", ENDLESS, "--patience", "0"]
    reached = 0
    for number in (signal.SIGINT, signal.SIGTERM):
        training = lines(*command)
        first = int(training.until(r"fold_1 epoch (\d+)/")[1])
        assert first > reached, "it goes on after the last epoch whose state was kept"
        training.until(rf"fold_1 epoch {first + 2}/")
        # The state of an epoch is kept before the epoch is told of.
        reached = first + 2
        training.stop(number)
        assert (out / "fold_1/state.safetensors").is_file()
        assert not (out / "fold_1/model.safetensors").exists()
        assert not list(out.rglob("*.partial"))


def test_a_stopped_distillation_goes_on(lines: Callable[..., Lines], distill_cohort: Path, tmp_path: Path) -> None:
    out = tmp_path / "lr.safetensors"
    command = ["distill", "--bags", distill_cohort / "job/bags", "--teacher", "texture", "--student", "timm:test_vit"]
    command += ["--random-student", "--all", "--out", out, "--batch-size", "8", "--device", "cpu"]
    command += ["--epochs", ENDLESS, "--patience", ENDLESS]
    reached = 0
    for number in (signal.SIGINT, signal.SIGTERM):
        distilling = lines(*command)
        first = int(distilling.until(r"^epoch (\d+)/")[1])
        assert first > reached, "it goes on after the last epoch whose state was kept"
        distilling.until(rf"^epoch {first + 1}/")
        reached = first + 1
        distilling.stop(number)
        assert not out.exists()
        assert not list(tmp_path.rglob("*.partial"))


def test_a_stopped_fine_tuning_goes_on(lines: Callable[..., Lines], distill_cohort: Path, tmp_path: Path) -> None:
    bags = distill_cohort / "job/bags"
    rows = [f"{path.stem},{'ab'[i % 2]}" for i, path in enumerate(sorted(bags.glob("*.h5")))]
    (tmp_path / "labels.csv").write_text("slide_id,label\n" + "\n".join(rows) + "\n")
    out = tmp_path / "run"
    command = ["finetune", "--bags", bags, "--labels", tmp_path / "labels.csv", "-e", "timm:test_resnet", "-r", "5x"]
    command += ["--random-weights", "-o", out, "--folds", "2", "--fold", "1", "--steps", ENDLESS, "--device", "cpu"]
    reached = 0
    for number in (signal.SIGINT, signal.SIGTERM):
        tuning = lines(*command)
        first = int(tuning.until(r"^fold_1 step (\d+)/")[1])
        assert first > reached, "it goes on after the last pass whose state was kept"
        reached = int(tuning.until(rf"^fold_1 step (?!{first}/)(\d+)/")[1])
        tuning.stop(number)
        assert (out / "fold_1/state.safetensors").is_file()
        assert not (out / "fold_1/model.safetensors").exists()
        assert not list(out.rglob("*.partial"))


HANG = """
from lrmil.experiment import slide_files
real, seen = slide_files.write_slide_files, []
def hang(*arguments, **options):
    if seen:
        print('two slides are classified', file=sys.stderr, flush=True)
        time.sleep(600)
    seen.append(real(*arguments, **options))
    return seen[-1]
slide_files.write_slide_files = hang
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: str(number.name))
@pytest.mark.parametrize("source", ["slides", "bags"])
def test_a_stopped_prediction_keeps_what_it_found_and_goes_on(
    lines: Callable[..., Lines], distill_cohort: Path, tmp_path: Path, source: str, number: signal.Signals
) -> None:
    bags = distill_cohort / "job/bags"
    features = read_bag(sorted(bags.glob("*.h5"))[0]).levels[0].features["texture"]
    settings = ModelSettings("mean", hidden=8, in_dim=features.values.shape[1])
    card = ModelCard(
        settings, ("a", "b"), encoder="texture", weights_sha256=features.weights_sha256, level="5x", mpp=2.0, tile_px=64
    )
    save_model(tmp_path / "model.safetensors", build_model(settings), card)
    out = tmp_path / "out"
    named = ["--slides", distill_cohort / "slides/slides.csv"] if source == "slides" else ["--bags", bags]
    command = ["predict", *named, "--model", tmp_path / "model.safetensors", "-o", out, "--device", "cpu"]

    def rows() -> list[str]:
        with open(out / "predictions.csv", newline="") as file:
            return [row["slide_id"] for row in csv.DictReader(file)]

    predicting = lines(*command, change=HANG)
    predicting.until("two slides are classified")
    predicting.stop(number)
    (first,) = rows()
    held = {path.name: path.stat().st_mtime_ns for path in (out / "job/bags").glob("*.h5")}
    assert bool(held) == (source == "slides")
    assert not list(out.rglob("*.partial"))
    lines(*command).end()
    assert len(rows()) == 6
    assert first in rows()
    for name, time_ns in held.items():
        assert (out / "job/bags" / name).stat().st_mtime_ns == time_ns, "a finished bag is not made again"
        assert check_bag(out / "job/bags" / name) == []
