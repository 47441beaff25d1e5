"""Stage 1 of LRMIL: an encoder of low-resolution tiles, distilled from high-resolution ones."""

from __future__ import annotations

from lrmil.distill.request import COPY, DistillRequest
from lrmil.distill.run import DistillResult, run_distillation
from lrmil.distill.settings import DistillSettings

__all__ = ["COPY", "DistillRequest", "DistillResult", "DistillSettings", "run_distillation"]
