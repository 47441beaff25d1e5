"""Low resolution for all slides, high resolution for those that it is unsure of, with a promise of what that loses."""

from __future__ import annotations

from lrmil.cascade.control import Control, TooFewCasesError, choose_threshold, least_cases, p_value
from lrmil.cascade.losses import LOSSES, SlideLosses, loss_of
from lrmil.cascade.scores import SCORES, disagreement, entropy, margin, uncertainty

__all__ = [
    "LOSSES",
    "SCORES",
    "Control",
    "SlideLosses",
    "TooFewCasesError",
    "choose_threshold",
    "disagreement",
    "entropy",
    "least_cases",
    "loss_of",
    "margin",
    "p_value",
    "uncertainty",
]
