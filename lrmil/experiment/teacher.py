"""The teacher's models and its features of the finer level, for a student that is to learn from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lrmil.experiment.cohort import open_features
from lrmil.experiment.folds import TeacherSource
from lrmil.store import FeatureStore
from lrmil.store.dtypes import StoreDtype
from wsi_pipe.errors import ConfigError

__all__ = ["open_teacher"]


def open_teacher(
    teacher: Path,
    folds: Sequence[str],
    bags: Path | Sequence[Path],
    *,
    parent_level: str,
    store_dir: Path,
    level: str | None = None,
    other_bags: Path | Sequence[Path] | None = None,
    dtype: StoreDtype = "float16",
    allow_random: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> tuple[TeacherSource, FeatureStore]:
    """The teacher of each fold, a model file or the folder of a run, and its features with the rows of their LR tiles.

    bags: those of the student, or ``other_bags``, which hold the teacher's level. parent_level: the student's. level:
    of the teacher, where its file does not say it. Raises ConfigError where these do not go together, and as
    ``open_features`` does.
    """
    source = TeacherSource(teacher)
    card = source.any_card(folds)
    if level and card.level and level != card.level:
        raise ConfigError(f"the teacher is of {card.level}, not {level}", remedy="leave out --teacher-level")
    if isinstance(bags, Path) and (bags / "store.json").is_file() and not other_bags:
        raise ConfigError("--bags is a store of one level", remedy="give bags with the teacher's level: --teacher-bags")
    store = open_features(
        other_bags or bags,
        level=card.level or level,
        encoder=card.encoder or None,
        store_dir=store_dir,
        dtype=dtype,
        parent_level=parent_level,
        weights_sha256=card.weights_sha256,
        allow_random=allow_random,
        progress=progress,
    )
    return source, store
