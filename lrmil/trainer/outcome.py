"""What a training leaves behind: logits of the bags that it did not learn from, and the card of its model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

import lrmil
from lrmil.checkpoint import ModelCard
from lrmil.config import ModelSettings
from lrmil.metrics import calibrate, figures
from lrmil.model import MILModel
from lrmil.store import StoreMeta
from wsi_pipe.config import to_mapping
from wsi_pipe.encoders.random_id import RANDOM, is_random
from wsi_pipe.tables import csv_text

__all__ = ["PREDICTIONS_NAME", "Prediction", "model_card", "predictions_csv", "weights_hash"]

PREDICTIONS_NAME = "predictions.csv"


@dataclass(frozen=True)
class Prediction:
    """Logits of one bag. part: "val" or "test". logits: (C,) before calibration."""

    slide_id: str
    case_id: str
    part: str
    label: int
    logits: tuple[float, ...]


def predictions_csv(
    predictions: Sequence[Prediction], card: ModelCard, calibrated: NDArray[np.float64] | None = None
) -> str:
    """The table of predictions: ids, part, label, logits, and calibrated probabilities.

    calibrated: (N, C), where they do not follow from the card, as those of an ensemble.
    """
    logit_names = [f"logit_{name}" for name in card.classes]
    probability_names = [f"probability_{name}" for name in card.classes]
    rows: list[list[object]] = []
    for i, p in enumerate(predictions):
        own = card.probabilities([p.logits])[0] if calibrated is None else calibrated[i]
        probabilities = own.tolist()
        rows.append([p.slide_id, p.case_id, p.part, card.classes[p.label], *p.logits, *probabilities])
    return csv_text(["slide_id", "case_id", "part", "label", *logit_names, *probability_names], rows)


def model_card(
    settings: Any,
    model: ModelSettings,
    names: tuple[str, ...],
    meta: StoreMeta,
    predictions: Sequence[Prediction],
    weights: Sequence[float],
) -> ModelCard:
    """What a model's file says of it, calibrated on the validation bags and with the figures of both parts.

    settings: a dataclass, of the training. model: as it was built. meta: of the features. weights: (C,), of the classes
    in the loss, which probabilities are corrected for.
    """
    by_part = {part: [p for p in predictions if p.part == part] for part in ("val", "test")}
    val = by_part["val"]
    calibration = calibrate(
        np.array([p.logits for p in val]).reshape(-1, len(names)),
        [p.label for p in val],
        [p.case_id for p in val],
        class_weights=weights,
    )
    metrics: dict[str, float] = {}
    for part, rows in by_part.items():
        if rows:
            probabilities = calibration.probabilities([p.logits for p in rows])
            found = figures([p.label for p in rows], probabilities)
            metrics |= {f"{part}_{name}": value for name, value in found.items()}
    return ModelCard(
        model,
        names,
        encoder=meta.encoder,
        weights_sha256=meta.weights_sha256,
        weights=RANDOM if is_random(meta.encoder, meta.weights_sha256) else "",
        level=meta.level,
        mpp=meta.mpp,
        tile_px=meta.tile_px,
        temperature=calibration.temperature,
        bias=calibration.bias,
        calibration=f"{calibration.method}: {calibration.note}" if calibration.note else calibration.method,
        training=to_mapping(settings),
        metrics=metrics,
        lrmil_version=lrmil.__version__,
        created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def weights_hash(model: MILModel) -> str:
    """SHA-256, in hex, of names and values of a model's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
