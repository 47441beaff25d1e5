"""Abstention: below which confidence a model says nothing, chosen on validation slides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from lrmil.errors import FiguresError

__all__ = ["KINDS", "Abstention", "AbstentionRule", "choose_threshold"]

KINDS = ("accuracy", "coverage", "threshold")


@dataclass(frozen=True)
class AbstentionRule:
    """What a threshold is to reach.

    kind: "accuracy" of the slides that are answered, "coverage", the share of slides that is answered, or "threshold",
    the confidence itself. value: above 0, at most 1.
    """

    kind: str
    value: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS or not 0 < self.value <= 1:
            raise FiguresError(
                f"{self.kind}={self.value:g} is no rule of abstention",
                remedy="say accuracy=SHARE, coverage=SHARE or threshold=CONFIDENCE, above 0 and at most 1",
            )

    @classmethod
    def parse(cls, text: str) -> AbstentionRule:
        """From ``accuracy=0.95``. Raises FiguresError for anything else."""
        kind, _, number = text.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = float("nan")
        return cls(kind.strip(), value)

    def __str__(self) -> str:
        return f"{self.kind}={self.value:g}"


@dataclass(frozen=True)
class Abstention:
    """A threshold and what it came to on the validation slides that it was chosen on.

    threshold: slides of a lower confidence, which is the greatest probability, are not answered. slides: of validation.
    coverage, accuracy: share of them that is answered, and of those that is right, NaN where none is.
    """

    rule: AbstentionRule
    threshold: float
    slides: int
    coverage: float
    accuracy: float

    def abstains(self, confidence: float) -> bool:
        """Whether a slide of that confidence is left unanswered."""
        return confidence < self.threshold

    def __str__(self) -> str:
        text = f"below a confidence of {self.threshold:.4g} no answer ({self.rule}"
        if not self.slides:
            return f"{text})"
        answered = round(self.coverage * self.slides)
        return f"{text}; of {self.slides} validation slides {answered} answered, accuracy {self.accuracy:.3f})"


def choose_threshold(confidence: ArrayLike, correct: Sequence[bool] | ArrayLike, rule: AbstentionRule) -> Abstention:
    """The lowest threshold that reaches the rule on validation slides, so that as many slides as can be are answered.

    confidence: (N,), each slide's greatest calibrated probability. correct: bool (N,). The threshold lies midway
    between the last slide that is answered and the next; it is 0 where all are. Raises FiguresError when no threshold
    reaches the accuracy, or there are no validation slides.
    """
    c, right = np.asarray(confidence, np.float64), np.asarray(correct, bool)
    if rule.kind == "threshold":
        return _abstention(rule, rule.value, c, right)
    if not len(c):
        raise FiguresError(
            "there are no validation slides, so no threshold of abstention can be chosen",
            remedy="say --abstain threshold=CONFIDENCE, or train with validation cases",
        )
    order = np.argsort(-c, kind="stable")
    ranked = c[order]
    # The end of each group of equal confidences: one is answered with all that are like it.
    ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    answered = ends + 1
    accuracy = np.cumsum(right[order])[ends] / answered
    # Less a hair: 0.95 of 20 is 19, not 20.
    fits = accuracy >= rule.value - 1e-9 if rule.kind == "accuracy" else answered >= rule.value * len(c) - 1e-9
    if not fits.any():
        raise FiguresError(
            f"no threshold has an accuracy of {rule.value:g} on the {len(c)} validation slides",
            remedy=f"the greatest is {accuracy.max():.3f}: ask for no more, or for a coverage",
        )
    # As many answers as keep the accuracy; as few as make the coverage.
    place = int(np.flatnonzero(fits)[-1 if rule.kind == "accuracy" else 0])
    last = int(ends[place])
    threshold = 0.0 if last + 1 == len(ranked) else float((ranked[last] + ranked[last + 1]) / 2)
    return _abstention(rule, threshold, c, right)


def _abstention(rule: AbstentionRule, threshold: float, confidence: ArrayLike, correct: ArrayLike) -> Abstention:
    c, right = np.asarray(confidence, np.float64), np.asarray(correct, bool)
    kept = c >= threshold
    coverage = float(kept.mean()) if len(c) else float("nan")
    accuracy = float(right[kept].mean()) if kept.any() else float("nan")
    return Abstention(rule, threshold, len(c), coverage, accuracy)
