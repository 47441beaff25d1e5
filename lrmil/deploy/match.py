"""Whether an encoder is the one that a model was trained with."""

from __future__ import annotations

from pathlib import Path

from lrmil.checkpoint import ModelCard
from lrmil.errors import ModelMismatchError
from wsi_pipe.encoders.base import EncoderInfo

__all__ = ["describe", "refuse_other_encoder"]


def describe(card: ModelCard) -> str:
    """The features that a model was trained on, in words."""
    encoder = Path(card.encoder).name if card.encoder.endswith(".safetensors") else card.encoder
    weights = f" (weights {card.weights_sha256[:12]})" if card.weights_sha256 else ""
    tiles = f" of {card.tile_px} px" if card.tile_px is not None else ""
    return f"{encoder or 'an unnamed encoder'}{weights} at {card.level or 'an unstated level'}{tiles}"


def refuse_other_encoder(card: ModelCard, info: EncoderInfo, name: str) -> None:
    """Raise ModelMismatchError when an encoder's weights or dimension are others than in the model's training."""
    remedy = "give the encoder of training: --encoder NAME or FILE"
    if card.weights_sha256 and info.weights_sha256 != card.weights_sha256:
        raise ModelMismatchError(
            f"encoder {name} has weights {info.weights_sha256[:12]}, the model was trained on {describe(card)}",
            remedy=remedy,
        )
    if info.dim != card.model.in_dim:
        raise ModelMismatchError(
            f"encoder {name} gives {info.dim} features, the model takes {card.model.in_dim}", remedy=remedy
        )
