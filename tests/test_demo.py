"""The demo: its commands are ones that a user could type, and the whole of it runs."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from lrmil.cli import group as lrmil_group
from lrmil.predictor import Predictor
from wsi_pipe.bag import read_attrs, read_level
from wsi_pipe.cli import group, run_group
from wsi_pipe.demo import demo_steps, make_demo_cohort

GROUPS: dict[str, click.Group] = {"wsi-pipe": group, "lrmil": lrmil_group}


def test_every_step_is_a_command_with_options_that_exist(tmp_path: Path) -> None:
    make_demo_cohort(tmp_path, 1, 0, lambda done, of: None)
    made = ["splits.csv", "job/bags/x", "runs/20x/x", "runs/5x/fold_1/model.safetensors", "lr-fold1.safetensors"]
    for name in made:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    steps = demo_steps(tmp_path)
    for step in steps:
        program = GROUPS[step.program]
        with click.Context(program) as parent:
            command = program.get_command(parent, step.arguments[0])
            assert command is not None, step.shown
            command.make_context(step.arguments[0], list(step.arguments[1:]), parent=parent)
    assert {step.arguments[0] for step in steps} >= {"run", "verify", "split", "train", "distill", "predict"}


@pytest.mark.slow
def test_the_whole_demo_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "demo"
    assert run_group(group, "wsi-pipe", ["demo", "-o", str(folder), "--slides", "22"]) == 0
    assert "lr-fold1.png" in capfd.readouterr().out
    # What predicts at the end reads 5x alone, through the encoder that was distilled.
    predictor = Predictor.load(folder / "runs" / "5x" / "fold_1" / "model.safetensors")
    assert (Path(predictor.card.encoder).stem, predictor.card.level) == ("lr-fold1", "5x")
    bags = sorted((folder / "predictions" / "job" / "bags").glob("*.h5"))
    assert len(bags) == 22
    for bag in bags:
        assert read_attrs(bag).primary_level == "5x"
        assert read_level(bag, "5x", "lr-fold1").features.any()
    assert (folder / "predictions" / "predictions.csv").read_text().count("\n") == 23
