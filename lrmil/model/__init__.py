"""Attention MIL heads over packed bags, all behind one ``MILOutput``.

``build_model`` makes any of them from its settings. Their ``forward(features (T, D), offsets (B + 1,))`` takes several
bags at once; a bag's logits do not depend on which others are packed with it.
"""

from __future__ import annotations

from lrmil.config import MODELS, ModelSettings
from lrmil.model.attention import ABMIL, ClamSB, MaxPooling, MeanPooling
from lrmil.model.base import MILModel, MILOutput
from lrmil.model.clam_mb import ClamMB
from lrmil.model.dsmil import DSMIL
from lrmil.model.dtfd import DTFD
from lrmil.model.ensemble import Ensemble, linear_settings, member_settings
from lrmil.model.linear import LinearModel, pooled_width
from lrmil.model.transmil import TransMIL
from wsi_pipe.errors import ConfigError

__all__ = ["MILModel", "MILOutput", "build_model", "widest_weight"]

_CLASSES: dict[str, type[MILModel]] = {
    "linear": LinearModel,
    "mean": MeanPooling,
    "max": MaxPooling,
    "abmil": ABMIL,
    "gated-abmil": ABMIL,
    "clam-sb": ClamSB,
    "clam-mb": ClamMB,
    "dsmil": DSMIL,
    "dtfd": DTFD,
    "transmil": TransMIL,
}


def build_model(settings: ModelSettings) -> MILModel:
    """A new model with random weights from torch's global generator, in float32 on the CPU.

    Raises ConfigError for settings that leave something to be chosen in training ("auto").
    """
    _check_chosen(settings)
    if settings.members == 1 and settings.linear_share == 0:
        return _CLASSES[settings.name](settings)
    members = [build_model(member_settings(settings)) for _ in range(settings.members)]
    return Ensemble(settings, members, LinearModel(linear_settings(settings)) if settings.linear_share > 0 else None)


def widest_weight(settings: ModelSettings) -> tuple[str, tuple[int, int]]:
    """Name and shape of the weight that sees the features, by which a file is checked before a model is built.

    Raises ConfigError as ``build_model`` does.
    """
    _check_chosen(settings)
    if settings.members > 1 or settings.linear_share > 0:
        return "members.0.projection.weight", (settings.hidden, settings.in_dim)
    if not settings.projection:
        return "attention.weight", (settings.attention_dim * (1 if settings.name == "abmil" else 2), settings.in_dim)
    if settings.name == "linear":
        return "classifier.weight", (settings.classes, pooled_width(settings.pooling, settings.in_dim))
    return "projection.weight", (settings.hidden, settings.in_dim)


def _check_chosen(settings: ModelSettings) -> None:
    if settings.name == "auto":
        raise ConfigError("the model is still to be chosen", remedy=f"train it, or name one of {', '.join(MODELS)}")
    if (settings.name == "linear" or settings.linear_share > 0) and settings.pooling == "auto":
        raise ConfigError("the pooling of a linear model is still to be chosen", remedy="train it, or name the pooling")
