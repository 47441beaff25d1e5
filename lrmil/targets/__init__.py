"""What a model is trained to say of a bag: a class, a survival time, a number, a grade, labels, or several of them."""

from __future__ import annotations

from lrmil.targets.base import Fold, Target
from lrmil.targets.classification import Classification
from lrmil.targets.kinds import TARGETS, Asked, parse_targets, target_from_json
from lrmil.targets.labels import TargetTable, load_targets
from lrmil.targets.several import Several

__all__ = [
    "TARGETS",
    "Asked",
    "Classification",
    "Fold",
    "Several",
    "Target",
    "TargetTable",
    "load_targets",
    "parse_targets",
    "target_from_json",
]
