"""The errors that lrmil raises on purpose, each with a message that names file, cause and remedy.

::

    WsiPipeError
    └── LrmilError
        ├── SettingsError (ValueError)       a bad option or settings value
        ├── LabelError (ValueError)          a bad label table: column, row, a slide with two labels
        ├── SplitError (ValueError)          a bad split table, or cases that cannot be divided as asked
        │   └── LeakageError                 one case stands in two parts of a fold
        ├── FiguresError (ValueError)        labels, probabilities and cases that do not belong together
        ├── StoreError (ValueError)          a feature store that is broken or cannot be made
        │   ├── BagMismatchError             bags of different encoders, weights, resolutions or dimensions
        │   └── RandomFeaturesError          features of random weights, which are for tests alone
        ├── ModelFileError (ValueError)      a model file that is missing, truncated or of another kind
        │   └── ModelMismatchError           a bag or store that the model was not trained for
        ├── ExportError (ValueError)         a model that cannot be exported, or whose copy would answer otherwise
        └── TrainingError (RuntimeError)
            ├── DivergedError (ArithmeticError)  the loss or the logits became NaN or infinite
            └── ResumeError (ValueError)     a run directory made with other settings, splits or data

A command catches ``WsiPipeError`` in one place and turns it into one line and an exit code.
"""

from __future__ import annotations

from wsi_pipe.errors import WsiPipeError

__all__ = [
    "BagMismatchError",
    "DivergedError",
    "ExportError",
    "FiguresError",
    "LabelError",
    "LeakageError",
    "LrmilError",
    "ModelFileError",
    "ModelMismatchError",
    "RandomFeaturesError",
    "ResumeError",
    "SettingsError",
    "SplitError",
    "StoreError",
    "TrainingError",
]


class LrmilError(WsiPipeError):
    """Root of all errors that lrmil raises on purpose."""


class SettingsError(LrmilError, ValueError):
    """A bad option or settings value."""


class LabelError(LrmilError, ValueError):
    """A bad label table: a missing column, a bad row, a slide with two labels."""


class SplitError(LrmilError, ValueError):
    """A bad split table, or cases that cannot be divided as asked."""


class LeakageError(SplitError):
    """One case stands in two parts (train, val, test) of one fold."""


class FiguresError(LrmilError, ValueError):
    """Labels, probabilities and cases that do not belong together."""


class StoreError(LrmilError, ValueError):
    """A feature store that is broken or cannot be made from these bags."""


class BagMismatchError(StoreError):
    """Bags of different encoders, weights, resolutions or feature dimensions are mixed."""


class RandomFeaturesError(StoreError):
    """Features that were made with random weights, which are for tests alone."""


class ModelFileError(LrmilError, ValueError):
    """A model file that is missing, truncated or of another kind."""


class ModelMismatchError(ModelFileError):
    """A bag or a store that the model was not trained for."""


class ExportError(LrmilError, ValueError):
    """A model that cannot be exported, or whose exported copy would answer otherwise."""


class TrainingError(LrmilError, RuntimeError):
    """Training cannot go on."""


class DivergedError(TrainingError, ArithmeticError):
    """The loss or the logits became NaN or infinite."""


class ResumeError(TrainingError, ValueError):
    """A run directory was made with other settings, splits or data, so it cannot be continued."""
