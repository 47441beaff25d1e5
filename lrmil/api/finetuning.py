"""An encoder and its classifier, trained together on labelled slides."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lrmil.api.given import Labels, PathLike, label_file, with_values
from lrmil.api.model import Model
from lrmil.api.training import fold_figures, splits_for
from lrmil.experiment import load_cohort, open_teacher
from lrmil.finetuning import (
    FinetuneRequest,
    FinetuneSettings,
    cohort_notes,
    finetune_folds,
    load_start,
    open_tiles,
    places_of,
    seen_by,
)
from lrmil.splits import SplitTable
from lrmil.store.dtypes import StoreDtype
from wsi_pipe.api.grids import as_label

__all__ = ["finetune"]

_log = logging.getLogger("lrmil")


def finetune(
    bags: PathLike | Sequence[PathLike],
    labels: Labels,
    out: PathLike,
    *,
    encoder: PathLike,
    random_weights: bool = False,
    resolution: str | float | None = None,
    slides: PathLike | Mapping[str, str] | None = None,
    splits: PathLike | SplitTable | None = None,
    fold: str | int = 1,
    folds: int = 5,
    val_fraction: float = 0.2,
    split_seed: int = 0,
    by: str = "auto",
    label_column: str | None = None,
    slide_table: PathLike | None = None,
    site_column: str | None = None,
    teacher: PathLike | Model | None = None,
    teacher_bags: PathLike | None = None,
    teacher_resolution: str | float | None = None,
    unlabelled: bool = True,
    settings: FinetuneSettings | None = None,
    model: str | None = None,
    dtype: StoreDtype = "float16",
    positive: str | None = None,
    replicates: int = 2000,
    allow_seen: bool = False,
    allow_random: bool = False,
    progress: Callable[[Mapping[str, float | None]], object] | None = None,
    say: Callable[[str], object] | None = None,
    **values: Any,
) -> Model:
    """Train an encoder of tiles further, together with a classifier, on one fold of labelled slides.

    bags: a folder such as ``JOB/bags``, or bags, which say where tiles lie; pixels are read from the slides. encoder:
    the file of a distilled one, or the name of a network. random_weights: draw a named one's weights anew. resolution:
    of the tiles, by default the encoder's own. slides: a slide list, or a mapping from slide ids to files, where they
    do not lie where the bags say. teacher: a model of high-resolution features, or the folder of a run on the same
    splits, whose word is learned as well; on slides without a label, too, unless ``unlabelled`` is False. settings: a
    ``lrmil.finetuning.FinetuneSettings``; single ones of them, of the model and of the loss by name: ``steps=300``,
    ``hidden=64``, ``soft=1.0``. The others: as of ``lrmil.train``. progress: called with the figures of each pass over
    the slides.

    The model's card names the encoder's file, which lies beside it. Raises LabelError, SplitError, ConfigError for
    settings that do not fit together, ResolutionError where the encoder was made for other tiles, LeakageError where
    encoder or teacher saw cases that the model is judged by, RandomFeaturesError, and what reading a slide raises.
    """
    out, tell = Path(out), say or _log.warning
    chosen = with_values(settings or FinetuneSettings(), model, values, teacher is not None, "finetune")
    start = os.fspath(encoder)
    where: Any = Path(bags) if isinstance(bags, (str, os.PathLike)) else [Path(item) for item in bags]
    if isinstance(slides, Mapping):
        places = dict(slides)
    else:
        places, notes = places_of(where, None if slides is None else Path(slides))
        for note in notes:
            tell(note)
    info = load_start(start, 224, random_weights=random_weights).info
    tiles = open_tiles(where, None if resolution is None else as_label(resolution), places, info)
    cohort = load_cohort(
        tiles.store,
        label_file(labels, out),
        by=by,
        label_column=label_column,
        slide_table=None if slide_table is None else Path(slide_table),
        site_column=site_column,
    )
    cohort = seen_by(info, cohort)
    table = splits_for(cohort, splits, out, folds, split_seed, val_fraction)
    for note in cohort_notes(cohort, table, learned=unlabelled and teacher is not None):
        tell(note)
    name = table.fold_name(fold)
    source, hr_store = None, None
    if teacher is not None:
        source, hr_store = open_teacher(
            teacher.path if isinstance(teacher, Model) else Path(teacher),
            [name],
            where,
            parent_level=tiles.store.meta.level,
            store_dir=out / "store-teacher",
            level=None if teacher_resolution is None else as_label(teacher_resolution),
            other_bags=None if teacher_bags is None else Path(teacher_bags),
            dtype=dtype,
            allow_random=allow_random,
        )
    found = finetune_folds(
        FinetuneRequest(
            cohort,
            tiles,
            table,
            [name],
            chosen,
            out,
            start,
            random_weights=random_weights,
            teacher=source,
            hr_store=hr_store,
            unlabelled=unlabelled,
            allow_seen=allow_seen,
        ),
        progress=None if progress is None else lambda folder, row: progress(row),
        say=tell,
    )
    figures = fold_figures(out / name, positive, replicates)
    return Model(found[name].model, device=chosen.device, figures=figures)
