"""From what both resolutions say of unseen slides to a cascade."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

import lrmil
from lrmil.cascade.card import CascadeCard, save_cascade
from lrmil.cascade.choice import ScoreChoice, choose_score, put_aside
from lrmil.cascade.control import Control, check_enough, choose_threshold
from lrmil.cascade.evidence import Evidence
from lrmil.cascade.losses import SlideLosses, loss_of
from lrmil.cascade.scores import SCORES, uncertainty
from lrmil.errors import FiguresError, SettingsError
from lrmil.experiment.figures import positive_class
from lrmil.metrics.cases import case_numbers
from wsi_pipe.seen import Seen

__all__ = ["Fit", "fit_cascade", "write_cascade"]


@dataclass(frozen=True)
class Fit:
    """A threshold for a score. choice: of the score. losses: of the slides that set the threshold, at that score.

    calibration: case ids of the slides that set it or chose the score. positive: name of the class that is not to be
    missed, "" for other losses.
    """

    control: Control
    choice: ScoreChoice
    losses: SlideLosses
    calibration: tuple[str, ...]
    loss: str
    positive: str


def fit_cascade(
    evidence: Evidence,
    risk: float,
    *,
    loss: str = "disagree",
    confidence: float | None = None,
    score: str = "auto",
    positive: str | None = None,
    seed: int = 0,
) -> Fit:
    """The threshold of the score by which a cascade loses at most ``risk`` against always reading high resolution.

    score: one of ``SCORES``, or "auto", which puts some cases aside and chooses on them. confidence: None promises in
    expectation. positive: the class of the loss "miss", by default the second of two. seed: of which cases are put
    aside.

    Raises TooFewCasesError saying how many cases are missing; FiguresError where even reading all slides within the
    budget loses more; SettingsError for a score that one model alone has not, or a loss that is not known.
    """
    chosen = _positive(evidence, loss, positive)
    kept, read, counts = loss_of(
        loss, evidence.labels, evidence.low.mean(axis=0), evidence.reference, read=evidence.read, positive=chosen
    )
    scores = dict(uncertainty(evidence.low))
    if score != "auto" and score not in scores:
        known = ", ".join(("auto", *SCORES))
        remedy = "train each fold of the LR run with several --seed" if score in SCORES else f"choose one of {known}"
        raise SettingsError(f"there is no score {score!r} of these models", remedy=remedy)
    rows = np.flatnonzero(counts)
    cases = case_numbers([evidence.case_ids[i] for i in rows.tolist()], len(rows))
    what = f"cases of {evidence.classes[chosen]}" if loss == "miss" else "cases"
    check_enough(int(cases.max()) + 1 if len(cases) else 0, risk, confidence, what)
    aside = np.zeros(len(rows), bool)
    if score == "auto":
        aside = put_aside(cases, risk, confidence, seed)
        own = rows[aside]
        choice = choose_score({name: values[own] for name, values in scores.items()}, kept[own] - read[own])
    else:
        choice = ScoreChoice(score, f"{score}: as asked for", {})
    used = rows[~aside]
    losses = SlideLosses(
        kept[used],
        read[used],
        scores[choice.score][used],
        case_numbers([evidence.case_ids[i] for i in used.tolist()], len(used)),
    )
    control = choose_threshold(losses, risk, confidence)
    if not control.holds:
        raise FiguresError(
            f"with {100 * evidence.budget:g} % of the high-resolution tiles read, {100 * control.found:.3g} % of the "
            "cases lose even if every slide is read: too much for the promise",
            remedy="raise --hr-budget (1 reads all tiles), or allow a larger --risk",
        )
    name = evidence.classes[chosen] if loss == "miss" else ""
    return Fit(control, choice, losses, tuple(sorted({evidence.case_ids[i] for i in rows.tolist()})), loss, name)


def _positive(evidence: Evidence, loss: str, positive: str | None) -> int:
    if loss == "miss" and positive is None and len(evidence.classes) > 2:
        raise SettingsError(
            f"which of {', '.join(evidence.classes)} is not to be missed?", remedy="name it: --positive CLASS"
        )
    if positive is not None and loss != "miss":
        raise SettingsError("--positive is for the loss miss", remedy="leave it out, or add --loss miss")
    if positive is not None and len(evidence.classes) > 2:
        if positive not in evidence.classes:
            raise FiguresError(f"{positive!r} is no class", remedy=f"the classes are {', '.join(evidence.classes)}")
        return evidence.classes.index(positive)
    return positive_class(evidence.classes, positive)


def write_cascade(
    path: Path,
    fit: Fit,
    evidence: Evidence,
    low: Sequence[Path],
    high: Sequence[Path],
    *,
    say: Callable[[str], object] | None = None,
) -> CascadeCard:
    """Write a fitted cascade with the models of both runs, files in folders named by fold. Raises OutputError."""
    control = fit.control
    card = CascadeCard(
        evidence.classes,
        fit.choice.score,
        control.threshold,
        evidence.budget,
        fit.loss,
        fit.positive,
        control.risk,
        control.confidence,
        control.found,
        control.read,
        control.cases,
        len(fit.losses.cases),
        evidence.basis,
        fit.choice.said,
        tuple(file.parent.name for file in low),
        tuple(file.parent.name for file in high),
    )
    card = replace(
        card,
        seen=Seen.of({"val": [(case, "") for case in fit.calibration]}),
        lrmil_version=lrmil.__version__,
        created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    save_cascade(path, card, low, high)
    if say is not None:
        say(card.promise)
    return card
