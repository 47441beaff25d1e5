"""What a model says of cases: of all slides of a case as one bag, or the mean of what it says of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lrmil.predictor.predict import Answer, Predictor, SlidePrediction
from lrmil.store.formats import read_features
from wsi_pipe.files import write_text_atomically
from wsi_pipe.tables import csv_text

__all__ = ["CASE_TABLE_NAME", "CasePrediction", "case_predictions", "case_table", "write_case_predictions"]

CASE_TABLE_NAME = "predictions-cases.csv"


@dataclass(frozen=True)
class CasePrediction:
    """What a model says of a case. slides: that it rests on. said: columns of the table, by name. joined: whether the
    slides were one bag, as in training, or their predictions were averaged."""

    case_id: str
    slides: tuple[str, ...]
    said: Mapping[str, object]
    joined: bool


def case_predictions(predictor: Predictor, found: Sequence[SlidePrediction]) -> Iterator[CasePrediction]:
    """One prediction a case, in the order of its first slide; slides that failed or are empty are left out.

    A model that was trained ``--by case`` sees all tiles of a case together, whose features are read again from the
    bags; of another the slides' predictions are averaged (``Target.together``: probabilities, where there are some). A
    slide without a case is its own.
    """
    members: dict[str, list[SlidePrediction]] = {}
    for slide in found:
        if slide.status == "done":
            members.setdefault(slide.case_id or slide.slide_id, []).append(slide)
    joined = predictor.card.training.get("unit") == "case"
    for case, slides in members.items():
        one = len(slides) == 1
        answer = _together(predictor, slides) if joined and not one else None
        if predictor.card.target_state:
            target = predictor.card.target
            outputs = np.array([slide.logits for slide in slides], np.float64)
            own = answer.logits if answer else outputs[0] if one else target.together(outputs)
            said: dict[str, object] = {name: values[0] for name, values in target.said(own[None]).items()}
        else:
            classes = predictor.card.classes
            each = np.array([[slide.probabilities[name] for name in classes] for slide in slides])
            p = answer.probabilities if answer else each.mean(axis=0)
            said = {"predicted": classes[int(p.argmax())]}
            said |= {f"probability_{name}": float(value) for name, value in zip(classes, p, strict=True)}
        yield CasePrediction(case, tuple(slide.slide_id for slide in slides), said, joined)


def _together(predictor: Predictor, slides: Sequence[SlidePrediction]) -> Answer:
    return predictor.answer(np.concatenate([read_features(slide.bag) for slide in slides if slide.bag is not None]))


def case_table(cases: Sequence[CasePrediction]) -> str:
    """The predictions of cases as CSV text, one row a case."""
    columns = list(dict.fromkeys(name for case in cases for name in case.said))
    rows = [
        [case.case_id, len(case.slides), "joined" if case.joined else "averaged", *map(_cell, case.said.values())]
        for case in cases
    ]
    return csv_text(["case_id", "slides", "how", *columns], rows)


def _cell(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def write_case_predictions(out: Path, found: Sequence[SlidePrediction], predictor: Predictor) -> int:
    """Write ``predictions-cases.csv`` where a case has several slides; how many cases it holds, 0 where none is
    written. Raises OutputError when it cannot be written."""
    cases = list(case_predictions(predictor, found))
    if all(len(case.slides) == 1 for case in cases):
        return 0
    write_text_atomically(out / CASE_TABLE_NAME, case_table(cases))
    return len(cases)
