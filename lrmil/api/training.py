"""A model trained on labelled bags, and figures of one."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lrmil.api.given import Labels, PathLike, label_file, train_settings
from lrmil.api.model import Model
from lrmil.checkpoint import MODEL_NAME
from lrmil.config import TrainSettings
from lrmil.experiment import (
    Cohort,
    RunFigures,
    evaluate_model,
    evaluate_run,
    load_cohort,
    open_teacher,
    train_folds,
)
from lrmil.experiment.cohort import open_features
from lrmil.experiment.figures import PREDICTIONS_NAME, parts_of
from lrmil.experiment.folds import SPLITS_NAME
from lrmil.splits import SplitTable, make_splits, read_splits
from lrmil.store.dtypes import StoreDtype
from wsi_pipe.api.grids import as_label
from wsi_pipe.errors import ConfigError

__all__ = ["evaluate", "fold_figures", "splits_for", "train"]

Say = Callable[[str], object]

_log = logging.getLogger("lrmil")
"""What is left out is never left out in silence."""


def train(
    bags: PathLike | Sequence[PathLike],
    labels: Labels,
    out: PathLike,
    *,
    resolution: str | float | None = None,
    encoder: str | None = None,
    splits: PathLike | SplitTable | None = None,
    fold: str | int = 1,
    folds: int = 5,
    val_fraction: float = 0.2,
    split_seed: int = 0,
    by: str | None = None,
    labels_by: str = "auto",
    label_column: str | None = None,
    targets: Sequence[str] = (),
    renames: Mapping[str, str] | None = None,
    case_from: str | None = None,
    slide_table: PathLike | None = None,
    site_column: str | None = None,
    teacher: PathLike | Model | None = None,
    teacher_bags: PathLike | None = None,
    teacher_resolution: str | float | None = None,
    settings: TrainSettings | None = None,
    model: str | None = None,
    store: PathLike | None = None,
    dtype: StoreDtype = "float16",
    positive: str | None = None,
    replicates: int = 2000,
    allow_seen: bool = False,
    allow_random: bool = False,
    progress: Callable[[Mapping[str, float | None]], object] | None = None,
    say: Say | None = None,
    **values: Any,
) -> Model:
    """Train a model on one fold of labelled bags, calibrate it on validation cases, and look at the test cases once.

    bags: a folder such as ``JOB/bags``, or bags. labels: a CSV; a mapping from slide ids to classes; or a pandas
    DataFrame with the columns of such a CSV. out: folder of the run; called again with the same, training goes on, and
    with another ``fold`` it adds that one. splits: a CSV or table of folds; by default ``folds`` folds are made.
    targets: instead of classes, such as ``["os:survival"]``. by: "case" makes one bag of all slides of a case.
    renames: values of the labels that mean another. case_from: "tcga" for the patient of a barcode.
    teacher: a model, or the folder of a run on the same splits, to distil from. settings: a ``TrainSettings``; single
    ones of them, of the model and of the loss by name: ``model="abmil"``, ``epochs=20``, ``hidden=128``, ``soft=0.5``.
    The others: as of ``lrmil train``. progress: called with the figures of each epoch. say: told what is
    left out; by default the logger "lrmil", as warnings.

    Raises LabelError, SplitError, StoreError, ConfigError for settings that do not fit together, LeakageError where
    encoder or teacher saw cases that the model is judged by, RandomFeaturesError.
    """
    out, tell = Path(out), say or _log.warning
    asked: dict[str, Any] = {} if by is None else {"unit": by}
    if targets:
        asked["targets"] = [targets] if isinstance(targets, str) else list(targets)
    chosen = train_settings(settings, model, values | asked, teacher is not None)
    where: Any = Path(bags) if isinstance(bags, (str, os.PathLike)) else [Path(item) for item in bags]
    features = open_features(
        where,
        level=None if resolution is None else as_label(resolution),
        encoder=encoder,
        store_dir=Path(store) if store is not None else out / "store",
        dtype=dtype,
        allow_random=allow_random,
    )
    cohort = load_cohort(
        features,
        label_file(labels, out),
        by=labels_by,
        label_column=label_column,
        slide_table=None if slide_table is None else Path(slide_table),
        site_column=site_column,
        targets=chosen.targets,
        renames=renames,
        case_from=case_from,
        unit=chosen.unit,
    )
    table = splits_for(cohort, splits, out, folds, split_seed, val_fraction)
    for note in cohort.notes(table):
        tell(note)
    name = table.fold_name(fold)
    source, hr_store = None, None
    if teacher is not None:
        source, hr_store = open_teacher(
            teacher.path if isinstance(teacher, Model) else Path(teacher),
            [name],
            where,
            parent_level=features.meta.level,
            store_dir=out / "store-teacher",
            level=None if teacher_resolution is None else as_label(teacher_resolution),
            other_bags=None if teacher_bags is None else Path(teacher_bags),
            dtype=dtype,
            allow_random=allow_random,
        )
    train_folds(
        cohort,
        table,
        [name],
        chosen,
        out,
        teacher=source,
        hr_store=hr_store,
        progress=None if progress is None else lambda folder, row: progress(row),
        allow_seen=allow_seen,
        say=tell,
    )
    figures = fold_figures(out / name, positive, replicates)
    return Model(out / name / MODEL_NAME, device=chosen.device, figures=figures)


def evaluate(
    what: PathLike | Model,
    bags: PathLike | Sequence[PathLike] | None = None,
    labels: Labels = None,
    out: PathLike | None = None,
    *,
    part: str = "test",
    splits: PathLike | SplitTable | None = None,
    fold: str | int | None = None,
    resolution: str | float | None = None,
    encoder: str | None = None,
    label_column: str | None = None,
    slide_table: PathLike | None = None,
    renames: Mapping[str, str] | None = None,
    case_from: str | None = None,
    positive: str | None = None,
    at_sensitivity: Sequence[float] = (),
    abstain: str | None = None,
    replicates: int = 2000,
    seed: int = 0,
    allow_seen: bool = False,
    say: Say | None = None,
) -> RunFigures:
    """Figures with 95 % intervals by case: of a run's predictions, or of a model on other labelled bags.

    what: the folder of a run; or a model, its file or a run whose folds are asked together, with bags, labels, and
    ``out`` for predictions and figures. part: of a run's predictions, "test" or "val". abstain: figures of the slides
    that are answered too, by a rule such as "accuracy=0.95". splits, fold: of a model, only the test part of that fold.
    The others: as of ``lrmil evaluate``. Raises FiguresError where nothing is to be judged, LeakageError where the
    model or the encoder has seen cases that it would be judged by, ModelMismatchError.
    """
    if not isinstance(what, Model) and Path(what).is_dir() and bags is None and labels is None:
        return evaluate_run(
            Path(what),
            part=part,
            positive=positive,
            at_sensitivity=at_sensitivity,
            replicates=replicates,
            seed=seed,
            abstain=abstain,
        )
    if bags is None or labels is None or out is None:
        raise ConfigError("a model is judged on labelled bags", remedy="give bags, labels and out")
    if at_sensitivity:
        raise ConfigError("at_sensitivity needs validation slides of the model's own run", remedy="give the run")
    if (splits is None) != (fold is None):
        raise ConfigError("splits and fold go together", remedy="give both, or neither")
    judged = what if isinstance(what, Model) else Model(what)
    folder, tell = Path(out), say or _log.warning
    features = open_features(
        Path(bags) if isinstance(bags, (str, os.PathLike)) else [Path(item) for item in bags],
        level=as_label(resolution) if resolution is not None else judged.card.level or None,
        encoder=encoder or judged.card.encoder or None,
        store_dir=folder / "store",
        weights_sha256=judged.card.weights_sha256,
    )
    cohort = load_cohort(
        features,
        label_file(labels, folder),
        label_column=label_column,
        classes=judged.card.classes,
        slide_table=None if slide_table is None else Path(slide_table),
        targets=judged.card.training.get("targets", ()),
        like=judged.card.target if judged.card.target_state else None,
        renames=renames,
        case_from=case_from,
        unit=str(judged.card.training.get("unit", "slide")),
    )
    table = None if splits is None else splits if isinstance(splits, SplitTable) else read_splits(Path(splits))
    for note in cohort.notes(table):
        tell(note)
    name = "" if table is None or fold is None else table.fold_name(fold)
    return evaluate_model(
        judged.path,
        cohort,
        folder,
        abstain=abstain,
        indices=None if table is None else cohort.fold(table, name).test,
        splits=None if table is None else (table, name),
        positive=positive,
        allow_seen=allow_seen,
        say=tell,
        device=judged.device,
        replicates=replicates,
        seed=seed,
    )


def fold_figures(folder: Path, positive: str | None, replicates: int) -> RunFigures | None:
    """Of the test cases, else of the validation cases; None where the fold has neither."""
    for part in ("test", "val"):
        if part not in parts_of(folder / PREDICTIONS_NAME):
            continue
        return evaluate_run(folder, part=part, positive=positive, replicates=replicates)
    return None


def splits_for(
    cohort: Cohort, splits: PathLike | SplitTable | None, out: Path, folds: int, seed: int, val_fraction: float
) -> SplitTable:
    """The splits given, or folds made of the cohort's cases. Raises ConfigError where ``out`` holds others."""
    if splits is not None:
        return splits if isinstance(splits, SplitTable) else read_splits(Path(splits))
    table = make_splits(cohort.table.case_labels(), folds, seed, val_fraction)
    there = out / SPLITS_NAME
    if there.is_file() and read_splits(there) != table:
        raise ConfigError(f"{there} holds other folds", remedy=f"give splits={str(there)!r}, or another folder")
    return table
