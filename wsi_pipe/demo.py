"""A small labelled cohort of synthetic slides, taken through the public commands one after the other.

Every step but the first is a command that a user could type, and is shown as such: the demo has no road of its own.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from wsi_pipe.errors import OutputError, WorkerError
from wsi_pipe.synthetic import make_cohort

__all__ = ["DemoStep", "demo_steps", "make_demo_cohort", "run_step"]

SLIDE_PX = 3072
SLIDE_MPP = 0.5
FOLDS = 4


@dataclass(frozen=True)
class DemoStep:
    """One step of the demo. why: a sentence for a newcomer. program and arguments: the command, as typed."""

    why: str
    program: str
    arguments: tuple[str, ...]

    @property
    def shown(self) -> str:
        """The command line as a user would type it."""
        return shlex.join([self.program, *self.arguments])


def make_demo_cohort(folder: Path, slides: int, seed: int, progress: Callable[[int, int], object]) -> Path:
    """Write the cohort's slides into ``folder/slides``; returns the CSV of labels.

    Raises OutputError when the folder cannot be written.
    """
    make_cohort(
        folder / "slides",
        slides,
        seed=seed,
        signal="coarse",
        size_px=(SLIDE_PX, SLIDE_PX),
        mpp=SLIDE_MPP,
        progress=progress,
    )
    return folder / "slides" / "labels.csv"


def demo_steps(folder: Path) -> list[DemoStep]:
    """The commands of the demo on a cohort in ``folder``."""
    manifest, labels = str(folder / "slides" / "slides.csv"), str(folder / "slides" / "labels.csv")
    job, bags, splits = str(folder / "job"), str(folder / "job" / "bags"), str(folder / "splits.csv")
    teacher, student = str(folder / "runs" / "20x"), str(folder / "runs" / "5x")
    lr_encoder = str(folder / "lr-fold1.safetensors")
    fold = ("--splits", splits, "--fold", "1")
    resolutions = ("-r", "20x", "-r", "5x")
    return [
        DemoStep("What are these slides?", "wsi-pipe", ("info", manifest)),
        DemoStep(
            "Find tissue, lay grids at 20x and 5x, compute features, write one bag a slide.",
            "wsi-pipe",
            ("run", manifest, "-o", job, *resolutions, "--encoder", "texture"),
        ),
        DemoStep("Is every bag whole?", "wsi-pipe", ("verify", job)),
        DemoStep(
            "Split the cases into folds, patients never divided.",
            "lrmil",
            ("split", "--labels", labels, "--folds", str(FOLDS), "--out", splits),
        ),
        DemoStep(
            "Train the teacher: a classifier of the 20x tiles.",
            "lrmil",
            (
                *("train", "--bags", bags, "--labels", labels, "-r", "20x", "--encoder", "texture"),
                *("--model", "gated-abmil", *fold, "-o", teacher),
            ),
        ),
        DemoStep(
            "Distil an encoder that gives, from 5x tiles alone, what the 20x encoder says of them.",
            "lrmil",
            (
                *("distill", "--bags", bags, "--teacher", "texture", "--student", "timm:test_resnet"),
                *("--random-student", "--student-px", "96", *resolutions, *fold),
                *("--epochs", "12", "--lr", "2e-3", "--batch-size", "32", "-o", lr_encoder),
            ),
        ),
        DemoStep(
            "Add its features to the bags; what is there already stays.",
            "wsi-pipe",
            ("run", manifest, "-o", job, *resolutions, "-e", "20x=texture", "-e", f"5x={lr_encoder}"),
        ),
        DemoStep(
            "Train the student: it reads 5x alone, and learns from the labels and the teacher.",
            "lrmil",
            (
                *("train", "--bags", bags, "--labels", labels, "-r", "5x", "--encoder", "lr-fold1"),
                *(*fold, "--teacher", teacher, "-o", student),
            ),
        ),
        DemoStep(
            "Predict from the slides themselves: nothing at 20x is read.",
            "lrmil",
            (
                *("predict", manifest, "--model", str(folder / "runs" / "5x" / "fold_1" / "model.safetensors")),
                *("-e", lr_encoder, "-o", str(folder / "predictions")),
            ),
        ),
    ]


MODULES = {"wsi-pipe": "wsi_pipe", "lrmil": "lrmil"}


def run_step(step: DemoStep) -> None:
    """Run one step in a process of its own, its output straight to the terminal.

    Raises WorkerError when it fails.
    """
    command: Sequence[str] = [sys.executable, "-m", MODULES[step.program], *step.arguments]
    try:
        code = subprocess.run(command, check=False).returncode
    except OSError as error:
        raise OutputError(f"cannot start {step.shown}: {error}") from error
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise WorkerError(
            f"the demo's step {step.shown!r} failed with exit code {code}", remedy="see its message above"
        )
