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
            "--by", "--store", "pack --dtype", "train --dtype", "finetune --dtype", "--parents",
        ),
        "Folds": (
            "--splits", "--fold", "--folds", "--all", "--cases", "--val-fraction", "--test-fraction", "--split-seed",
            "--allow-seen",
        ),
        "Run": ("--out", "--run", "--lr", "--hr", "--job", "--config", "--set", "--name", "--tensorboard"),
        "Model": (
            "--model", "--hidden", "--dropout", "--student", "--student-px", "--random-student", "--random-weights",
            "export --precision", "--quantise", "--calibration-tiles", "--most-change",
        ),
        "Training": (
            "--epochs", "--steps", "--learning-rate", "--weight-decay", "--batch-size", "--patience", "--monitor",
            "--schedule", "--clip-norm", "--class-weights", "--standardise", "--token-budget", "--max-bags",
            "--max-tiles", "--stain", "--flips", "--jitters", "--seed", "--deterministic",
        ),
        "Teacher": (
            "--teacher", "--teacher-bags", "--teacher-level", "--unlabelled", "--mil-teacher", "--targets",
            "--targets-dir", "--layers", "--layer-variance", "--patch", "--final", "--l-ce", "--l-bag",
            "--l-soft", "--l-hard", "--temperature", "--instances", "--random-teacher",
        ),
        "Parts of bags": ("--guided-by", "--guided-share", "--guided-draws"),
        "Promise": ("--risk", "--loss", "--confidence", "--score", "--hr-budget", "--margin"),
        "Figures": (
            "--part", "--positive", "--at-sensitivity", "--abstain", "--replicates", "evaluate --seed",
            "compare --seed",
        ),
        "Pictures and tables": ("--heatmaps", "--pyramids", "--smooth", "--geojson", "--attention", "--top"),
        "Machine": (
            "--device", "--devices", "--precision", "--threads", "--cache-mib", "--targets-mib", "--allow-random",
        ),
        **MESSAGES,
    },
    rare=frozenset({
        "--slide-mpp", "--override-mpp", "--reader", "--scene", "--z", "--label-column", "--labels-by", "--map",
        "--case-from", "--by", "--store", "train --dtype", "finetune --dtype", "--parents", "--val-fraction",
        "--split-seed", "train --folds", "finetune --folds", "--allow-seen", "--name",
        "--tensorboard", "--hidden", "--dropout", "--student-px", "--random-student", "--weight-decay",
        "distill --batch-size", "--patience", "--monitor", "--schedule", "--clip-norm", "--class-weights",
        "--standardise", "--token-budget", "--max-bags", "--stain", "--flips", "--jitters", "--deterministic",
        "--teacher-bags", "--teacher-level", "--mil-teacher", "--targets", "--targets-dir", "--layers",
        "--layer-variance", "--patch", "--final", "--l-ce", "--l-bag", "--l-soft", "--l-hard", "--temperature",
        "--instances", "--random-teacher", "--positive", "--at-sensitivity", "--replicates", "--attention", "--top",
        "--smooth", "--pyramids", "--guided-by", "--guided-share", "--guided-draws",
        "--precision", "--threads", "--cache-mib", "--targets-mib", "--allow-random", "distill --seed",
        "distill --slides", "distill --labels", "--cases", "finetune --slides", "--random-weights", "--max-tiles",
        "export --slides", "export --labels", "--calibration-tiles", "--most-change",
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
        "--steps": "N",
        "--max-tiles": "TILES",
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
        "--guided-draws": "PARTS",
        "--calibration-tiles": "TILES",
        "--most-change": "LOGITS",
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
