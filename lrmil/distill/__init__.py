"""Stage 1 of LRMIL: an encoder of low-resolution tiles, distilled from high-resolution ones.

The package can be called: ``lrmil.distill(...)`` is ``lrmil.distill.call.distill(...)``.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from lrmil.distill.call import distill
from lrmil.distill.request import COPY, DistillRequest
from lrmil.distill.run import DistillResult, run_distillation
from lrmil.distill.settings import DistillSettings

__all__ = ["COPY", "DistillRequest", "DistillResult", "DistillSettings", "run_distillation"]


class _Callable(ModuleType):
    """One name for the package and for the function that users call: importing one must not hide the other."""

    def __call__(self, *args: Any, **options: Any) -> DistillResult:
        return distill(*args, **options)


sys.modules[__name__].__class__ = _Callable
