"""What is asked for when an LR encoder is distilled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lrmil.distill.settings import DistillSettings
from lrmil.splits import SplitTable

__all__ = ["COPY", "DistillRequest"]

COPY = "copy"
"""The student is a copy of the teacher, as in the paper."""


@dataclass(frozen=True)
class DistillRequest:
    """What to distil.

    bags: folder of bags with both levels. slides: slide id -> file, where a bag's own path no longer holds. cases:
    slide id -> case, where the bags do not know it. teacher, student: encoder names; "copy" for the student.
    more_teachers: others that the student learns from at the same time, each through projections of its own, with the
    same weight as ``teacher``. splits, fold: the student sees the fold's training cases alone; without splits it sees
    every slide, or those of ``only_cases``, and no labels are needed. mil_teacher: model file whose attention weighs
    the children, or None for equal weights. out: the LR encoder to write. compute: run the teachers now rather than
    read their features and layers from the bags; into targets_dir, which folds may share, by default one beside
    ``out``. random_teacher, random_student: weights drawn anew instead of loaded. student_px: side that tiles are
    resized to for the student, None for its own (a timm ViT: the tiles' own). devices: train on these together, a
    process each, instead of on the one of ``settings``.
    """

    bags: Path
    teacher: str
    student: str
    lr: str
    hr: str
    out: Path
    splits: SplitTable | None = None
    fold: str = ""
    only_cases: tuple[str, ...] = ()
    settings: DistillSettings = field(default_factory=DistillSettings)
    slides: Mapping[str, str] = field(default_factory=dict)
    cases: Mapping[str, str] = field(default_factory=dict)
    mil_teacher: Path | None = None
    compute: bool = False
    targets_dir: Path | None = None
    random_teacher: bool = False
    random_student: bool = False
    student_px: int | None = None
    more_teachers: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()

    @property
    def teachers(self) -> tuple[str, ...]:
        """All teachers, the first of them the one that a student copies."""
        return (self.teacher, *self.more_teachers)
