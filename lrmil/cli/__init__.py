"""The command line: each command parses, calls one library function, and prints.

Commands load when they are called, so that ``lrmil --help`` starts without torch. Exit codes: 0 all done, 1 some slides
failed, 2 bad usage or nothing could be done, 130 interrupted (Ctrl-C), 143 ended by SIGTERM.
"""

from __future__ import annotations

import click

from lrmil import __version__
from lrmil.cli.headings import LRMIL
from wsi_pipe.cli import LazyGroup, run_main

__all__ = ["group", "main"]

COMMANDS: dict[str, tuple[str, str]] = {
    "split": ("lrmil.cli.prepare:split", "Divide cases into stratified folds; write them as CSV."),
    "pack": ("lrmil.cli.prepare:pack", "Copy features of many bags into one store that trains fast."),
    "distill": ("lrmil.cli.distill:distill", "Distil a low-resolution encoder from a high-resolution one (stage 1)."),
    "train": ("lrmil.cli.train:train", "Train a MIL model, a teacher or a student, on one fold or all."),
    "finetune": (
        "lrmil.cli.finetune:finetune",
        "Train an encoder further, together with its classifier (stage 2, not frozen).",
    ),
    "tune": ("lrmil.cli.tune:tune", "Choose settings by search inside a fold's training cases."),
    "evaluate": ("lrmil.cli.evaluate:evaluate", "Figures with intervals, of a run or of a model on other bags."),
    "experiment": (
        "lrmil.cli.experiment:experiment",
        "The whole experiment by a preset: every fold of HR, LR and LRMIL, one table.",
    ),
    "compare": ("lrmil.cli.evaluate:compare", "Compare two runs on the same slides: bootstrap and DeLong."),
    "resolve": ("lrmil.cli.resolve:resolve", "Say which resolution is needed, and what each costs."),
    "cascade": ("lrmil.cli.cascade:cascade", "Low resolution first, high where it is unsure, at a bounded risk."),
    "export": ("lrmil.cli.export:export", "Write a classifier and its encoder as one ONNX file."),
    "probe": ("lrmil.cli.probe:probe", "Say what features tell: linear, neighbours, few-shot."),
    "predict": ("lrmil.cli.predict:predict", "Classify bags, or slides in one go, with a trained model."),
}


@click.group(
    cls=LazyGroup,
    table=COMMANDS,
    layout=LRMIL,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Bags are made by wsi-pipe run. Exit codes: 0 all done, 1 some failed, 2 bad usage, 130 or 143 interrupted.",
)
@click.version_option(__version__, prog_name="lrmil")
def group() -> None:
    """Multiple instance learning that classifies slides from low-resolution tiles."""


def main() -> None:
    """Entry point of the console script."""
    run_main(group, "lrmil")
