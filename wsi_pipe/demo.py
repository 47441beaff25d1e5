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
    slides, job = str(folder / "slides"), str(folder / "job")
    labels, splits = str(folder / "slides" / "labels.csv"), str(folder / "splits.csv")
    run, model = str(folder / "runs" / "5x"), str(folder / "runs" / "5x" / "fold_1" / "model.safetensors")
    bags = str(folder / "job" / "bags")
    return [
        DemoStep("What are these slides?", "wsi-pipe", ("info", f"{slides}/slides.csv")),
        DemoStep(
            "Find tissue, lay grids at 20x and 5x, compute features, write one bag a slide.",
            "wsi-pipe",
            ("run", f"{slides}/slides.csv", "-o", job, "-r", "20x", "-r", "5x", "--encoder", "texture"),
        ),
        DemoStep("Is every bag whole?", "wsi-pipe", ("verify", job)),
        DemoStep(
            "Split the cases into folds, patients never divided.",
            "lrmil",
            ("split", "--labels", labels, "--folds", str(FOLDS), "--out", splits),
        ),
        DemoStep(
            "Train a classifier that reads only the 5x tiles.",
            "lrmil",
            (
                *("train", "--bags", bags, "--labels", labels, "-r", "5x", "--encoder", "texture"),
                *("--splits", splits, "--fold", "1", "--out", run),
            ),
        ),
        DemoStep(
            "Predict: probabilities, heatmaps, attention. Nothing at 20x is read.",
            "lrmil",
            ("predict", "--model", model, "--bags", bags, "--out", str(folder / "predictions")),
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
