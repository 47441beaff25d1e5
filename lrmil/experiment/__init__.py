"""Whole experiments: bags and labels to trained folds, their figures and pictures, and the comparison of runs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_PLACES = {
    "Cohort": "lrmil.experiment.cohort",
    "load_cohort": "lrmil.experiment.cohort",
    "Comparison": "lrmil.experiment.compare",
    "compare_runs": "lrmil.experiment.compare",
    "FoldFigures": "lrmil.experiment.figures",
    "RunFigures": "lrmil.experiment.figures",
    "evaluate_model": "lrmil.experiment.figures",
    "evaluate_run": "lrmil.experiment.figures",
    "read_predictions": "lrmil.experiment.figures",
    "TeacherSource": "lrmil.experiment.folds",
    "train_folds": "lrmil.experiment.folds",
    "write_slide_files": "lrmil.experiment.slide_files",
    "open_teacher": "lrmil.experiment.teacher",
}


def __getattr__(name: str) -> Any:
    # Most need torch, whose import takes seconds; what writes the files of a prediction does without.
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
