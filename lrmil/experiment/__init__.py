"""Whole experiments: bags and labels to trained folds, their figures and pictures, and the comparison of runs."""

from __future__ import annotations

from lrmil.experiment.cohort import Cohort, load_cohort
from lrmil.experiment.compare import Comparison, compare_runs
from lrmil.experiment.figures import FoldFigures, RunFigures, evaluate_model, evaluate_run, read_predictions
from lrmil.experiment.folds import TeacherSource, train_folds
from lrmil.experiment.slide_files import write_slide_files
from lrmil.experiment.teacher import open_teacher

__all__ = [
    "Cohort",
    "Comparison",
    "FoldFigures",
    "RunFigures",
    "TeacherSource",
    "compare_runs",
    "evaluate_model",
    "evaluate_run",
    "load_cohort",
    "open_teacher",
    "read_predictions",
    "train_folds",
    "write_slide_files",
]
