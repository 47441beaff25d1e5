"""What ``lrmil train`` and ``lrmil finetune`` share: whose folds, what teacher, which settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lrmil.cli.options import EXISTING, level_of, pack_progress, print_figures, stack
from lrmil.config import LossSettings
from wsi_pipe.cli.options import RESOLUTION
from wsi_pipe.errors import ConfigError
from wsi_pipe.override import changed, parse_changes, refuse_twice

if TYPE_CHECKING:
    from lrmil.experiment import Cohort
    from lrmil.splits import SplitTable

__all__ = ["merged_settings", "print_run", "split_options", "splits_of", "teacher_of", "teacher_options"]

F = TypeVar("F", bound=Callable[..., Any])
S = TypeVar("S")


def split_options(function: F) -> F:
    """Whose cases train, validate and test: --splits and --fold, or folds that are made."""
    return stack(
        function,
        click.option(
            "--splits", type=EXISTING, metavar="CSV", help="Folds: fold_1, ... with train, val, test.  [made anew]"
        ),
        click.option("--fold", "folds", multiple=True, metavar="K", help="Train this fold only; repeatable.  [all]"),
        click.option(
            "--folds", "count", type=click.IntRange(1), default=5, show_default=True, help="How many to make."
        ),
        click.option("--val-fraction", type=float, default=0.2, show_default=True, help="Of made folds."),
        click.option("--split-seed", type=int, default=0, show_default=True, help="Of made folds."),
        click.option(
            "--site-column", metavar="NAME", help="Column of the labels that holds the site.  [site, hospital, ...]"
        ),
    )


def teacher_options(function: F) -> F:
    """A teacher, and what each part of its word weighs."""
    return stack(
        function,
        click.option(
            "--teacher", type=EXISTING, metavar="MODEL|RUN", help="Distil from this model, or from a run's folds."
        ),
        click.option("--teacher-bags", type=EXISTING, metavar="DIR", help="Bags with the teacher's level.  [--bags]"),
        click.option("--teacher-level", type=RESOLUTION, metavar="RES", help="Level of the teacher.  [as it says]"),
        click.option("--l-ce", "loss_ce", type=float, help="Weight of the labels.  [1]"),
        click.option("--l-bag", "loss_bag", type=float, help="Weight of the teacher's probabilities.  [1]"),
        click.option("--l-soft", "loss_soft", type=float, help="Weight of the teacher's attention.  [0.5]"),
        click.option("--l-hard", "loss_hard", type=float, help="Weight of its extreme tiles.  [0.1]"),
        click.option("--temperature", "loss_temperature", type=float, help="Of distilled probabilities.  [2]"),
        click.option("--instances", "loss_instances", type=click.IntRange(1), help="Extreme tiles on each side.  [8]"),
    )


def merged_settings(base: S, values: Mapping[str, Any], example: str) -> S:
    """``base``, with ``model`` and ``loss`` in it, under --set and options: those named as a setting, and those that
    begin with "model_" or "loss_". example: of --set.

    Raises ConfigError when one is refused, one is given twice, or a teacher's weight is given without --teacher.
    """
    plain: Any = changed(base, values.get("changes", ()), example=example)
    own = {f.name for f in dataclasses.fields(plain)} - {"model", "loss"}
    changes: dict[str, Any] = {name: values[name] for name in own if values.get(name) not in (None, ())}
    if values.get("seeds"):
        changes["seed"] = values["seeds"][0]
    for part in ("model", "loss"):
        inner = {
            name.removeprefix(f"{part}_"): value
            for name, value in values.items()
            if name.startswith(f"{part}_") and value is not None
        }
        changes[part] = dataclasses.replace(getattr(plain, part), **inner)
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
    found: S = dataclasses.replace(plain, **changes)
    return found


def splits_of(values: Mapping[str, Any], cohort: Cohort, out: Path) -> SplitTable:
    """The splits given, or folds made of the cohort's cases. Raises ConfigError where ``out`` holds others."""
    from lrmil.experiment.folds import SPLITS_NAME
    from lrmil.splits import make_splits, read_splits

    if values["splits"]:
        return read_splits(values["splits"])
    splits = make_splits(cohort.table.case_labels(), values["count"], values["split_seed"], values["val_fraction"])
    there = out / SPLITS_NAME
    if there.is_file() and read_splits(there) != splits:
        raise ConfigError(f"{there} holds other folds", remedy=f"give --splits {there}, or another --out")
    return splits


def teacher_of(values: Mapping[str, Any], folds: list[str], out: Path, level: str) -> tuple[Any, Any]:
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


def print_run(out: Path, parts: set[str], values: Mapping[str, Any]) -> None:
    """Figures of a run's test slides, of its validation slides where it has none, of neither where it has neither."""
    from lrmil.experiment import evaluate_run

    part = next((part for part in ("test", "val") if part in parts), None)
    if part is None:
        return
    print_figures(
        evaluate_run(
            out,
            part=part,
            positive=values["positive"],
            at_sensitivity=values["at_sensitivity"],
            replicates=values["replicates"],
        )
    )
