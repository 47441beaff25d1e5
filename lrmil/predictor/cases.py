"""What a model says of cases: of all slides of a case as one bag, or the mean of what it says of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lrmil.predictor.predict import Predictor, SlidePrediction
from lrmil.store.formats import read_features
from wsi_pipe.files import write_text_atomically
from wsi_pipe.tables import csv_text

__all__ = ["CASE_TABLE_NAME", "CasePrediction", "case_predictions", "case_table", "write_case_predictions"]

CASE_TABLE_NAME = "predictions-cases.csv"


@dataclass(frozen=True)
class CasePrediction:
    """What a model says of a case. slides: that it rests on. outputs: float64 (O,), before calibration. joined: whether
    the slides were one bag, as in training, or their predictions were averaged."""

    case_id: str
    slides: tuple[str, ...]
    outputs: NDArray[np.float64]
    joined: bool


def case_predictions(predictor: Predictor, found: Sequence[SlidePrediction]) -> Iterator[CasePrediction]:
    """One prediction a case, in the order of its first slide; slides that failed or are empty are left out.

    A model that was trained ``--by case`` sees all tiles of a case together, whose features are read again from the
    bags; of another the slides' predictions are averaged (``Target.together``). A slide without a case is its own.
    """
    members: dict[str, list[SlidePrediction]] = {}
    for slide in found:
        if slide.status == "done":
            members.setdefault(slide.case_id or slide.slide_id, []).append(slide)
    joined = predictor.card.training.get("unit") == "case"
    for case, slides in members.items():
        outputs = np.array([slide.logits for slide in slides], np.float64)
        if joined and len(slides) > 1:
            own = _together(predictor, slides)
        else:
            own = outputs[0] if len(slides) == 1 else predictor.card.target.together(outputs)
        yield CasePrediction(case, tuple(slide.slide_id for slide in slides), own, joined)


@torch.inference_mode()
def _together(predictor: Predictor, slides: Sequence[SlidePrediction]) -> NDArray[np.float64]:
    parts = [torch.from_numpy(read_features(slide.bag)) for slide in slides if slide.bag is not None]
    features = torch.cat(parts).to(predictor.device)
    offsets = torch.tensor([0, len(features)], dtype=torch.int64, device=predictor.device)
    return np.asarray(predictor.model(features, offsets).logits[0].double().cpu().numpy())


def case_table(cases: Sequence[CasePrediction], predictor: Predictor) -> str:
    """The predictions of cases as CSV text, one row a case."""
    target = predictor.card.target
    outputs = np.array([case.outputs for case in cases], np.float64).reshape(len(cases), len(target.outputs))
    said = target.said(outputs)
    rows = [
        [case.case_id, len(case.slides), "joined" if case.joined else "averaged", *_row(said, k)]
        for k, case in enumerate(cases)
    ]
    return csv_text(["case_id", "slides", "how", *said], rows)


def _row(said: dict[str, list[object]], k: int) -> list[object]:
    return [f"{v[k]:.6g}" if isinstance(v[k], float) else v[k] for v in said.values()]


def write_case_predictions(out: Path, found: Sequence[SlidePrediction], predictor: Predictor) -> int:
    """Write ``predictions-cases.csv`` where a case has several slides; how many cases it holds, 0 where none is
    written. Raises OutputError when it cannot be written."""
    cases = list(case_predictions(predictor, found))
    if all(len(case.slides) == 1 for case in cases):
        return 0
    write_text_atomically(out / CASE_TABLE_NAME, case_table(cases, predictor))
    return len(cases)
