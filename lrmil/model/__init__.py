"""Attention MIL heads over packed bags, all behind one ``MILOutput``.

``build_model`` makes any of them from its settings. Their ``forward(features (T, D), offsets (B + 1,))`` takes several
bags at once; a bag's logits do not depend on which others are packed with it.
"""

from __future__ import annotations

from lrmil.config import ModelSettings
from lrmil.model.attention import ABMIL, ClamSB, MaxPooling, MeanPooling
from lrmil.model.base import MILModel, MILOutput
from lrmil.model.dsmil import DSMIL
from lrmil.model.transmil import TransMIL

__all__ = ["MILModel", "MILOutput", "build_model"]

_CLASSES: dict[str, type[MILModel]] = {
    "mean": MeanPooling,
    "max": MaxPooling,
    "abmil": ABMIL,
    "gated-abmil": ABMIL,
    "clam-sb": ClamSB,
    "dsmil": DSMIL,
    "transmil": TransMIL,
}


def build_model(settings: ModelSettings) -> MILModel:
    """A new model with random weights from torch's global generator, in float32 on the CPU."""
    return _CLASSES[settings.name](settings)
