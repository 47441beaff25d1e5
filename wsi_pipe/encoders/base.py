"""What every encoder gives: facts about itself, and features of uint8 tiles."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

__all__ = ["Encoder", "EncoderInfo", "PendingFeatures", "encoder_slug"]

TileArray = NDArray[np.uint8]
FeatureArray = NDArray[np.float32]


def encoder_slug(name: str) -> str:
    """An encoder's name as a part of an HDF5 path or a file name: no slashes, colons, at signs or spaces."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip("-")


@dataclass(frozen=True)
class EncoderInfo:
    """Facts about an encoder.

    name: as given on the command line. slug: the name in paths. dim: D. input_px: side that tiles are resized to on
    the device, None where any size will do. mpp: recommended micrometres per pixel, None where any will do.
    mpp_required: a grid at another mpp is an error (distilled LR encoders). weights_sha256: of the weights' file,
    or a constant that names the version of a weightless encoder. precision: "float32", "bfloat16", "float16".
    transform: how pixels become inputs, as JSON-able values. licence: SPDX id or the model card's name for it.
    """

    name: str
    slug: str
    dim: int
    weights_sha256: str
    licence: str
    precision: str = "float32"
    input_px: int | None = None
    mpp: float | None = None
    mpp_required: bool = False
    transform: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class PendingFeatures(Protocol):
    """Features under way on a device."""

    def result(self) -> FeatureArray:
        """Wait; float32 (B, D)."""


@runtime_checkable
class Encoder(Protocol):
    """Turns tiles into features. Results do not depend on which tiles share a batch."""

    @property
    def info(self) -> EncoderInfo:
        """Facts about the encoder."""

    def encode(self, tiles: TileArray) -> FeatureArray:
        """Features float32 (B, D) of tiles uint8 (B, H, W, 3), RGB.

        Raises EncoderOutputError when a feature is NaN or infinite, DeviceError when one tile does not fit the device.
        """

    def submit(self, tiles: TileArray) -> PendingFeatures:
        """Start encoding and return at once where the device allows; the same features as ``encode``."""
