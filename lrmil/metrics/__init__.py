"""Figures of a classifier with their uncertainty, and the comparison of two.

``figures`` computes them, ``intervals`` gives intervals by case (of AUCs by ``auc``, of shares by ``proportions``),
``delong`` is the classical test of two AUCs, ``curves`` the ROC with its band, ``calibration`` makes scores
probabilities.
"""

from __future__ import annotations

from lrmil.metrics.calibration import Calibration, calibrate, reliability, softmax
from lrmil.metrics.curves import Roc, roc_curve
from lrmil.metrics.delong import DeLong, delong
from lrmil.metrics.figures import LOWER_IS_BETTER, NAMES, confusion, figures, undefined_reasons
from lrmil.metrics.intervals import Difference, Estimate, compare, evaluate, evaluate_folds, summarise_folds
from lrmil.metrics.operating import OperatingPoint, at_threshold, threshold_at_sensitivity

__all__ = [
    "LOWER_IS_BETTER",
    "NAMES",
    "Calibration",
    "DeLong",
    "Difference",
    "Estimate",
    "OperatingPoint",
    "Roc",
    "at_threshold",
    "calibrate",
    "compare",
    "confusion",
    "delong",
    "evaluate",
    "evaluate_folds",
    "figures",
    "reliability",
    "roc_curve",
    "softmax",
    "summarise_folds",
    "threshold_at_sensitivity",
    "undefined_reasons",
]
