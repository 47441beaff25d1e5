"""Multiple instance learning that classifies a slide from low-resolution tiles, distilled from high-resolution ones.

What is public is in ``__all__``, explained in docs/python.md; everything else may move. The names are imported when
they are first asked for, so that the import itself costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lrmil.api.finetuning import finetune
    from lrmil.api.model import Model, load
    from lrmil.api.training import evaluate, train
    from lrmil.config import TrainSettings
    from lrmil.distill.call import distill
    from lrmil.predictor import SlidePrediction
    from lrmil.splits import make_splits, read_splits

__version__ = "0.1.0"

__all__ = [
    "Model",
    "SlidePrediction",
    "TrainSettings",
    "__version__",
    "distill",
    "evaluate",
    "finetune",
    "load",
    "make_splits",
    "read_splits",
    "train",
]

_PLACES = {
    "Model": "lrmil.api.model",
    "SlidePrediction": "lrmil.predictor",
    "TrainSettings": "lrmil.config",
    "evaluate": "lrmil.api.training",
    "finetune": "lrmil.api.finetuning",
    "load": "lrmil.api.model",
    "make_splits": "lrmil.splits",
    "read_splits": "lrmil.splits",
    "train": "lrmil.api.training",
}


def __getattr__(name: str) -> Any:
    if name == "distill":
        # The package itself, which can be called.
        return importlib.import_module("lrmil.distill")
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
