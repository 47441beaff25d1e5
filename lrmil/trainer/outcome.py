"""The card of a model that was trained: what its file says of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

import lrmil
from lrmil.checkpoint import ModelCard
from lrmil.config import ModelSettings
from lrmil.model import MILModel
from lrmil.store import StoreMeta
from lrmil.targets import Classification, Target
from lrmil.trainer.predictions import Prediction, truth_of
from wsi_pipe.config import to_mapping
from wsi_pipe.encoders.random_id import RANDOM, is_random

__all__ = ["model_card", "weights_hash"]


def model_card(
    settings: Any, model: ModelSettings, target: Target, meta: StoreMeta, predictions: Sequence[Prediction]
) -> ModelCard:
    """What a model's file says of it, with the figures of the validation and test bags.

    settings: a dataclass, of the training. model: as it was built. target: calibrated. meta: of the features.
    """
    metrics: dict[str, float] = {}
    for part in ("val", "test"):
        rows = [p for p in predictions if p.part == part]
        if rows:
            found = target.figures(truth_of(rows, target), np.array([p.logits for p in rows], np.float64))
            metrics |= {f"{part}_{name}": value for name, value in found.items()}
    plain = isinstance(target, Classification) and not target.name
    return ModelCard(
        model,
        target.outputs,
        encoder=meta.encoder,
        weights_sha256=meta.weights_sha256,
        weights=RANDOM if is_random(meta.encoder, meta.weights_sha256) else "",
        level=meta.level,
        mpp=meta.mpp,
        tile_px=meta.tile_px,
        temperature=target.temperature if isinstance(target, Classification) else 1.0,
        bias=target.bias if isinstance(target, Classification) else (),
        calibration=target.calibration,
        training=to_mapping(settings),
        metrics=metrics,
        lrmil_version=lrmil.__version__,
        created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        target_state={} if plain else target.to_json(),
    )


def weights_hash(model: MILModel) -> str:
    """SHA-256, in hex, of names and values of a model's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
