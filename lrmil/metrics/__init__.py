"""Figures of a classifier with their uncertainty, and the comparison of two.

``figures`` computes them, ``bootstrap`` gives intervals by case, ``delong`` compares two AUCs in closed form,
``curves`` the ROC with its band,
``calibration`` fits a temperature.
"""

from __future__ import annotations

from lrmil.metrics.bootstrap import Difference, Estimate, compare, evaluate, evaluate_folds, summarise_folds
from lrmil.metrics.calibration import fit_temperature, reliability, softmax
from lrmil.metrics.curves import Roc, roc_curve
from lrmil.metrics.delong import DeLong, delong
from lrmil.metrics.figures import LOWER_IS_BETTER, NAMES, confusion, figures, undefined_reasons

__all__ = [
    "LOWER_IS_BETTER",
    "NAMES",
    "DeLong",
    "Difference",
    "Estimate",
    "Roc",
    "compare",
    "confusion",
    "delong",
    "evaluate",
    "evaluate_folds",
    "figures",
    "fit_temperature",
    "reliability",
    "roc_curve",
    "softmax",
    "summarise_folds",
    "undefined_reasons",
]
