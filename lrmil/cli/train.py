"""``lrmil train``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from lrmil.cli.options import (
    EXISTING,
    PATH,
    TARGET,
    UNIT,
    bag_options,
    label_options,
    level_of,
    pack_progress,
    positive_options,
    print_notes,
    seen_option,
)
from lrmil.cli.training import merged_settings, print_run, split_options, splits_of, teacher_of, teacher_options
from lrmil.config import CHOICES, MONITORS, POOLINGS, TrainSettings, load_settings, tuned_on
from lrmil.tables import parse_renames
from wsi_pipe.cli import messages
from wsi_pipe.cli.options import changes_option_of
from wsi_pipe.errors import ConfigError

__all__ = ["train"]


@click.command()
@bag_options
@label_options
@UNIT
@TARGET
@click.option("-o", "--out", required=True, type=PATH, metavar="RUN", help="Folder of the run; run again, it goes on.")
@split_options
@click.option("--config", type=EXISTING, metavar="TOML", help="Settings, such as RUN/fold_1/config.toml.")
@changes_option_of("model.landmarks=128")
@click.option(
    "--model",
    "model_name",
    type=click.Choice(CHOICES),
    help="Architecture.  [auto: the best inside the training cases]",
)
@click.option("--pooling", "model_pooling", type=click.Choice(["auto", *POOLINGS]), help="Of a linear model.  [auto]")
@click.option("--hidden", "model_hidden", type=click.IntRange(1), help="Width of the projection.  [512; few cases: 32]")
@click.option("--dropout", "model_dropout", type=float, help="In the projection.  [0.25]")
@click.option("--epochs", type=click.IntRange(1), help="At most.  [50; few cases: 60]")
@click.option("--learning-rate", type=float, help="AdamW's peak.  [2e-4; few cases: 2e-3]")
@click.option("--weight-decay", type=float, help="Of AdamW.  [1e-4; few cases: 1e-2]")
@click.option("--schedule", type=click.Choice(["cosine", "constant"]), help="Of the learning rate.  [cosine]")
@click.option("--clip-norm", type=float, help="Of the gradient, 0 for none.  [1]")
@click.option("--class-weights", type=click.Choice(["balanced", "none"]), help="Of the labels' loss.  [balanced]")
@click.option("--monitor", type=click.Choice(MONITORS), help="Validation figure that chooses the epoch.  [loss]")
@click.option("--patience", type=click.IntRange(0), help="Epochs without improvement, 0 for no early end.  [10]")
@click.option("--standardise/--no-standardise", default=None, help="Each feature, over the training tiles.  [on]")
@click.option(
    "--small-cohorts",
    type=click.Choice(["auto", "off"]),
    help="Few cases: small networks, averaged, stopped by inner folds.  [auto]",
)
@click.option("--token-budget", type=click.IntRange(1), help="Tiles a step.  [16384]")
@click.option("--max-bags", type=click.IntRange(1), help="Bags a step.  [8]")
@click.option("--seed", "seeds", type=click.IntRange(0), multiple=True, help="Of weights and order; repeatable.  [0]")
@click.option("--device", metavar="DEV", help="cpu, cuda:0 or auto.  [auto]")
@click.option("--precision", type=click.Choice(["auto", "float32", "bfloat16"]), help="Of training.  [auto]")
@click.option("--deterministic/--no-deterministic", default=None, help="Same numbers on every run of a GPU.  [off]")
@click.option("--tensorboard/--no-tensorboard", default=None, help="Write event files too.  [off]")
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    default="float16",
    show_default=True,
    help="Of packed features.",
)
@click.option("--store", type=PATH, metavar="DIR", help="Where features are packed.  [RUN/store]")
@teacher_options
@click.option("--guided-by", type=EXISTING, metavar="RUN", help="Train on parts of bags too, chosen by this LR run.")
@click.option(
    "--guided-share",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.2,
    show_default=True,
    metavar="SHARE",
    help="With --guided-by: tiles of such a part.",
)
@click.option(
    "--guided-draws", type=click.IntRange(1), default=3, show_default=True, help="With --guided-by: parts of each bag."
)
@click.option("--replicates", type=click.IntRange(10), default=2000, show_default=True, help="Of the bootstrap.")
@click.option("--allow-random", is_flag=True, help="Train on features of random weights too, for tests.")
@positive_options
@seen_option
def train(**values: Any) -> int:
    """Train a MIL model on labelled bags: every fold, or those named, over one resident store.

    The model is chosen inside each fold's training cases, unless --model names it: a linear one, attention, or the mean
    of both; RUN says which.

    Each fold's folder in RUN gets model.safetensors, predictions.csv, metrics.csv, figures.json and pictures. Test
    cases are looked at once, after training and calibration.

    \b
    lrmil train --bags job/bags --labels labels.csv -r 5x --encoder uni -o run
    lrmil train --bags job/bags --labels labels.csv -r 20x -o teacher --splits splits.csv --model gated-abmil
    lrmil train --bags job/bags --labels labels.csv -r 5x -o student --splits splits.csv --teacher teacher
    lrmil train --bags job/bags --labels clini.csv -r 5x -o os --target os:survival --by case
    """
    from lrmil.cli.guided import guiding_level, open_guide
    from lrmil.experiment import load_cohort, train_folds
    from lrmil.experiment.cohort import open_features

    out: Path = values["out"]
    settings = settings_from(values)
    if settings.targets and values["label_column"]:
        raise ConfigError("--label-column is for classes", remedy="name it so: --target NAME:KIND:column=COLUMN")
    if settings.unit == "case" and values["teacher"]:
        raise ConfigError("a student is taught by slide, and --by case joins slides", remedy="leave one of them out")
    store = open_features(
        values["bags"],
        level=level_of(values["resolution"]),
        encoder=values["encoder"],
        store_dir=values["store"] or out / "store",
        dtype=values["dtype"],
        allow_random=values["allow_random"],
        parent_level=guiding_level(values["guided_by"]),
        progress=pack_progress(),
    )
    cohort = load_cohort(
        store,
        values["labels"],
        by=values["labels_by"],
        label_column=values["label_column"],
        slide_table=values["slide_table"],
        site_column=values["site_column"],
        targets=settings.targets,
        renames=parse_renames(values["renames"]),
        case_from=values["case_from"],
        unit=settings.unit,
    )
    splits = splits_of(values, cohort, out)
    print_notes(cohort.notes(splits))
    folds = [splits.fold_name(fold) for fold in values["folds"]] or list(splits.folds)
    _check_tuned(values, cohort, splits, folds)
    teacher, hr_store = teacher_of(values, folds, out, store.meta.level)
    guide = open_guide(values, out)
    results = train_folds(
        cohort,
        splits,
        folds,
        settings,
        out,
        seeds=values["seeds"] if len(values["seeds"]) > 1 else (),
        teacher=teacher,
        hr_store=hr_store,
        guide=guide,
        progress=_progress(settings),
        allow_seen=values["allow_seen"],
        say=lambda text: click.echo(text, err=True),
    )
    print_run(out, {p.part for result in results.values() for p in result.predictions}, values)
    click.echo(f"models, predictions and pictures: {out}")
    return 0


def settings_from(values: Mapping[str, Any]) -> TrainSettings:
    """Settings from options over the settings file over the defaults. Raises ConfigError when one is refused."""
    base = load_settings(values["config"]) if values["config"] else TrainSettings()
    if values["targets"]:
        # Before the single changes, which may name a figure of the target.
        base = dataclasses.replace(base, targets=tuple(values["targets"]))
    return merged_settings(base, values, "model.landmarks=128")


def _check_tuned(values: Mapping[str, Any], cohort: Any, splits: Any, folds: list[str]) -> None:
    """Refuse settings that were chosen on cases that a fold tests."""
    from lrmil.leaks import check_tuned, judged_of

    marks = tuned_on(values["config"]) if values["config"] else None
    for fold in folds if marks else ():
        judged = judged_of(cohort.store.records, cohort.table.case_ids, cohort.fold(splits, fold).test)
        say = lambda text: click.echo(text, err=True)  # noqa: E731
        check_tuned(marks or (), values["config"], judged, allow=values["allow_seen"], say=say)


def _progress(settings: TrainSettings) -> Any:
    def show(fold: str, row: Mapping[str, float | None]) -> None:
        shown = {"loss": row.get("train_loss"), "val loss": row.get("val_loss"), "val AUC": row.get("val_auc")}
        text = ", ".join(f"{name} {value:.4f}" for name, value in shown.items() if value is not None)
        messages.say(f"{fold} epoch {int(row['epoch'] or 0)}/{settings.epochs}: {text}")

    return show
