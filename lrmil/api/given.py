"""What is given to train and to judge a model: settings by name, labels in whatever holds them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from lrmil.config import LossSettings, ModelSettings, TrainSettings
from wsi_pipe.config import from_mapping, to_mapping
from wsi_pipe.errors import ConfigError
from wsi_pipe.files import write_text_atomically
from wsi_pipe.tables import csv_text

__all__ = ["Labels", "PathLike", "label_file", "train_settings", "with_values"]

S = TypeVar("S")
GROUPS = {"model": ModelSettings, "loss": LossSettings}
PathLike = str | os.PathLike[str]
Labels = PathLike | Mapping[str, object] | Any
"""A CSV, a mapping from slide ids to classes, or a pandas DataFrame with the columns of such a CSV."""


def train_settings(
    base: TrainSettings | None, model: str | None, values: Mapping[str, Any], has_teacher: bool
) -> TrainSettings:
    """Settings with single ones over them. Raises ConfigError for an unknown one, or one that is refused."""
    return with_values(base or TrainSettings(), model, values, has_teacher, "train")


def with_values(base: S, model: str | None, values: Mapping[str, Any], has_teacher: bool, where: str) -> S:
    """``base``, with ``model`` and ``loss`` in it, under single settings of any of the three, by name.

    model: the architecture's name. where: for messages. Raises ConfigError for an unknown one, or one that is refused.
    """
    plain = to_mapping(base)
    own = set(plain) - {"model", "loss"}
    groups = {group: {f.name for f in dataclasses.fields(cls)} for group, cls in GROUPS.items()}
    if model is not None:
        plain["model"] = plain["model"] | {"name": model}
    for name, value in values.items():
        owner = next((group for group, names in groups.items() if name in names), None)
        if owner is None and name not in own:
            known = sorted(own.union(*groups.values()))
            raise ConfigError(f"there is no setting {name!r}", remedy=f"known ones are {', '.join(known)}")
        if owner is None:
            plain[name] = value
        else:
            plain[owner] = plain[owner] | {name: value}
    if not has_teacher:
        if any(name in values for name in ("bag", "soft", "hard")):
            raise ConfigError("weights of a teacher are given, but no teacher", remedy="add teacher=...")
        # Without a teacher its terms are nothing, whatever the settings say.
        plain["loss"] = plain["loss"] | {"bag": 0.0, "soft": 0.0, "hard": 0.0}
    return from_mapping(type(base), plain, where)


def label_file(labels: Labels, out: Path) -> Path:
    """A CSV of labels: the one given, or one in ``out`` with what is given. Raises ConfigError."""
    if isinstance(labels, (str, os.PathLike)):
        return Path(labels)
    path = out / "lrmil-labels.csv"
    if isinstance(labels, Mapping):
        columns, rows = ["slide_id", "label"], [[str(name), str(value)] for name, value in labels.items()]
    elif hasattr(labels, "columns") and hasattr(labels, "itertuples"):
        columns = [str(name) for name in labels.columns]
        rows = [list(map(_cell, row)) for row in labels.itertuples(index=False)]
    else:
        raise ConfigError(
            f"a {type(labels).__name__} holds no labels",
            remedy="give a CSV, a mapping from slide ids to classes, or a DataFrame with slide_id and label",
        )
    write_text_atomically(path, csv_text(columns, rows))
    return path


def _cell(value: Any) -> str:
    """A cell as text; nothing for None and for what is not equal to itself, as pandas marks gaps."""
    return "" if value is None or str(value) in ("nan", "<NA>", "NaT") else str(value)
