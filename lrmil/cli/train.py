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
    bag_options,
    label_options,
    level_of,
    pack_progress,
    positive_options,
    print_figures,
    print_notes,
    seen_option,
)
from lrmil.config import CHOICES, MONITORS, POOLINGS, LossSettings, TrainSettings, load_settings
from lrmil.tables import parse_renames
from wsi_pipe.cli import messages
from wsi_pipe.cli.options import RESOLUTION, changes_option_of
from wsi_pipe.errors import ConfigError
from wsi_pipe.override import changed, parse_changes, refuse_twice

__all__ = ["train"]


@click.command()
@bag_options
@label_options
@TARGET
@click.option("-o", "--out", required=True, type=PATH, metavar="RUN", help="Folder of the run; run again, it goes on.")
@click.option("--splits", type=EXISTING, metavar="CSV", help="Folds: fold_1, ... with train, val, test.  [made anew]")
@click.option("--fold", "folds", multiple=True, metavar="K", help="Train this fold only; repeatable.  [all]")
@click.option("--folds", "count", type=click.IntRange(1), default=5, show_default=True, help="How many to make.")
@click.option("--val-fraction", type=float, default=0.2, show_default=True, help="Of made folds.")
@click.option("--split-seed", type=int, default=0, show_default=True, help="Of made folds.")
@click.option("--site-column", metavar="NAME", help="Column of the labels that holds the site.  [site, hospital, ...]")
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
@click.option("--teacher", type=EXISTING, metavar="MODEL|RUN", help="Distil from this model, or from a run's folds.")
@click.option("--teacher-bags", type=EXISTING, metavar="DIR", help="Bags with the teacher's level.  [--bags]")
@click.option("--teacher-level", type=RESOLUTION, metavar="RES", help="Level of the teacher.  [as it says]")
@click.option("--l-ce", "loss_ce", type=float, help="Weight of the labels.  [1]")
@click.option("--l-bag", "loss_bag", type=float, help="Weight of the teacher's probabilities.  [1]")
@click.option("--l-soft", "loss_soft", type=float, help="Weight of the teacher's attention.  [0.5]")
@click.option("--l-hard", "loss_hard", type=float, help="Weight of its extreme tiles.  [0.1]")
@click.option("--temperature", "loss_temperature", type=float, help="Of distilled probabilities.  [2]")
@click.option("--instances", "loss_instances", type=click.IntRange(1), help="Extreme tiles on each side.  [8]")
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
    from lrmil.experiment import evaluate_run, load_cohort, train_folds
    from lrmil.experiment.cohort import open_features
    from lrmil.experiment.folds import SPLITS_NAME
    from lrmil.splits import make_splits, read_splits

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
    if values["splits"]:
        splits = read_splits(values["splits"])
    else:
        splits = make_splits(cohort.table.case_labels(), values["count"], values["split_seed"], values["val_fraction"])
        there = out / SPLITS_NAME
        if there.is_file() and read_splits(there) != splits:
            raise ConfigError(f"{there} holds other folds", remedy=f"give --splits {there}, or another --out")
    print_notes(cohort.notes(splits))
    folds = [splits.fold_name(fold) for fold in values["folds"]] or list(splits.folds)
    teacher, hr_store = _teacher(values, folds, out, store.meta.level)
    results = train_folds(
        cohort,
        splits,
        folds,
        settings,
        out,
        seeds=values["seeds"] if len(values["seeds"]) > 1 else (),
        teacher=teacher,
        hr_store=hr_store,
        progress=_progress(settings),
        allow_seen=values["allow_seen"],
        say=lambda text: click.echo(text, err=True),
    )
    parts = {p.part for result in results.values() for p in result.predictions}
    for part in ("test", "val"):
        if part in parts:
            print_figures(
                evaluate_run(
                    out,
                    part=part,
                    positive=values["positive"],
                    at_sensitivity=values["at_sensitivity"],
                    replicates=values["replicates"],
                )
            )
            break
    click.echo(f"models, predictions and pictures: {out}")
    return 0


def settings_from(values: Mapping[str, Any]) -> TrainSettings:
    """Settings from options over the settings file over the defaults. Raises ConfigError when one is refused."""
    base = load_settings(values["config"]) if values["config"] else TrainSettings()
    if values["targets"]:
        # Before the single changes, which may name a figure of the target.
        base = dataclasses.replace(base, targets=tuple(values["targets"]))
    base = changed(base, values.get("changes", ()), example="model.landmarks=128")
    own = {f.name for f in dataclasses.fields(TrainSettings)} - {"model", "loss"}
    changes: dict[str, Any] = {name: values[name] for name in own if values.get(name) not in (None, ())}
    if values["seeds"]:
        changes["seed"] = values["seeds"][0]
    for part in ("model", "loss"):
        inner = {
            name.removeprefix(f"{part}_"): value
            for name, value in values.items()
            if name.startswith(f"{part}_") and value is not None
        }
        changes[part] = dataclasses.replace(getattr(base, part), **inner)
    twice = [name for name in changes if name not in ("model", "loss")]
    twice += [name.replace("_", ".", 1) for name in values if name[:6] == "model_" and values[name] is not None]
    twice += [name.replace("_", ".", 1) for name in values if name[:5] == "loss_" and values[name] is not None]
    refuse_twice(values.get("changes", ()), twice)
    if not values["teacher"]:
        if any(keys[0] == "loss" and keys[1:] != ("ce",) for keys, _ in parse_changes(values.get("changes", ()))):
            raise ConfigError(
                "--set says something of a teacher's loss, but there is no teacher", remedy="add --teacher"
            )
        if any(values[f"loss_{name}"] is not None for name in ("bag", "soft", "hard")):
            raise ConfigError("weights of a teacher are given, but no teacher", remedy="add --teacher MODEL")
        # Without a teacher its terms are nothing, whatever a settings file says.
        changes["loss"] = LossSettings(ce=changes["loss"].ce, bag=0.0, soft=0.0, hard=0.0)
    return dataclasses.replace(base, **changes)


def _teacher(values: Mapping[str, Any], folds: list[str], out: Path, level: str) -> tuple[Any, Any]:
    """The teacher's models and its HR features, packed with the rows of their LR tiles."""
    from lrmil.experiment import open_teacher

    if not values["teacher"]:
        return None, None
    return open_teacher(
        values["teacher"],
        folds,
        values["bags"],
        parent_level=level,
        store_dir=out / "store-teacher",
        level=level_of(values["teacher_level"]),
        other_bags=values["teacher_bags"],
        dtype=values["dtype"],
        allow_random=values["allow_random"],
        progress=pack_progress(),
    )


def _progress(settings: TrainSettings) -> Any:
    def show(fold: str, row: Mapping[str, float | None]) -> None:
        shown = {"loss": row.get("train_loss"), "val loss": row.get("val_loss"), "val AUC": row.get("val_auc")}
        text = ", ".join(f"{name} {value:.4f}" for name, value in shown.items() if value is not None)
        messages.say(f"{fold} epoch {int(row['epoch'] or 0)}/{settings.epochs}: {text}")

    return show
