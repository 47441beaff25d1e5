"""The headings of ``lrmil``'s options, those that the long help alone shows, and their units."""

from __future__ import annotations

from wsi_pipe.cli.headings import ARGUMENTS, MESSAGES, UNITS
from wsi_pipe.cli.layout import Layout

__all__ = ["LRMIL"]

LRMIL = Layout(
    "lrmil",
    {
        "Bags and labels": (
            "--bags", "--slides", "--slide-mpp", "--override-mpp", "--reader", "--scene", "--z", "--resolution",
            "--encoder", "--labels", "--labels-by", "--label-column", "--map", "--slide-table", "--case-from",
            "--target",
            "--by", "--store", "pack --dtype", "train --dtype", "--parents",
        ),
        "Folds": (
            "--splits", "--fold", "--folds", "--all", "--cases", "--val-fraction", "--test-fraction", "--split-seed",
            "--allow-seen",
        ),
        "Run": ("--out", "--run", "--job", "--config", "--set", "--name", "--tensorboard"),
        "Model": ("--model", "--hidden", "--dropout", "--student", "--student-px", "--random-student"),
        "Training": (
            "--epochs", "--learning-rate", "--weight-decay", "--batch-size", "--patience", "--monitor", "--schedule",
            "--clip-norm", "--class-weights", "--standardise", "--token-budget", "--max-bags", "--stain", "--flips",
            "--jitters", "--seed", "--deterministic",
        ),
        "Teacher": (
            "--teacher", "--teacher-bags", "--teacher-level", "--mil-teacher", "--targets", "--targets-dir", "--layers",
            "--layer-variance", "--patch", "--final", "--l-ce", "--l-bag", "--l-soft", "--l-hard", "--temperature",
            "--instances", "--random-teacher",
        ),
        "Figures": (
            "--part", "--positive", "--at-sensitivity", "--replicates", "evaluate --seed", "compare --seed",
        ),
        "Pictures and tables": ("--heatmaps", "--pyramids", "--smooth", "--geojson", "--attention", "--top"),
        "Machine": (
            "--device", "--devices", "--precision", "--threads", "--cache-mib", "--targets-mib", "--allow-random",
        ),
        **MESSAGES,
    },
    rare=frozenset({
        "--slide-mpp", "--override-mpp", "--reader", "--scene", "--z", "--label-column", "--labels-by", "--map",
        "--case-from", "--by", "--store",
        "train --dtype", "--parents", "--val-fraction", "--split-seed", "train --folds", "--allow-seen", "--name",
        "--tensorboard", "--hidden", "--dropout", "--student-px", "--random-student", "--weight-decay",
        "distill --batch-size", "--patience", "--monitor", "--schedule", "--clip-norm", "--class-weights",
        "--standardise", "--token-budget", "--max-bags", "--stain", "--flips", "--jitters", "--deterministic",
        "--teacher-bags", "--teacher-level", "--mil-teacher", "--targets", "--targets-dir", "--layers",
        "--layer-variance", "--patch", "--final", "--l-ce", "--l-bag", "--l-soft", "--l-hard", "--temperature",
        "--instances", "--random-teacher", "--positive", "--at-sensitivity", "--replicates", "--attention", "--top",
        "--smooth", "--pyramids",
        "--precision", "--threads", "--cache-mib", "--targets-mib", "--allow-random", "distill --seed",
        "distill --slides", "distill --labels", "--cases",
    }),
    units=UNITS | {
        "distill --batch-size": "TILES",
        "--folds": "N",
        "--val-fraction": "SHARE",
        "--test-fraction": "SHARE",
        "--split-seed": "SEED",
        "--hidden": "WIDTH",
        "--dropout": "SHARE",
        "--epochs": "N",
        "--learning-rate": "RATE",
        "--weight-decay": "DECAY",
        "--clip-norm": "NORM",
        "--patience": "EPOCHS",
        "--token-budget": "TILES",
        "--max-bags": "BAGS",
        "--l-ce": "WEIGHT",
        "--l-bag": "WEIGHT",
        "--l-soft": "WEIGHT",
        "--l-hard": "WEIGHT",
        "--patch": "WEIGHT",
        "--final": "WEIGHT",
        "--temperature": "T",
        "--instances": "TILES",
        "--replicates": "N",
        "--stain": "STRENGTH",
        "--jitters": "GRIDS",
        "--student-px": "PX",
        "--cache-mib": "MIB",
        "--targets-mib": "MIB",
        "--top": "TILES",
        "--scene": "SCAN",
        "--z": "PLANE",
    },
    spellings=frozenset({"--lr"}),
    arguments=ARGUMENTS,
)  # fmt: skip
