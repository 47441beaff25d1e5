"""How an encoder is built and fed, as plain values: what the registry's table and an LR encoder's file both hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from wsi_pipe.errors import ConfigError

__all__ = ["INTERPOLATIONS", "POOLINGS", "Preprocessing", "Recipe"]

POOLINGS = ("model", "cls", "mean", "cls+mean")
INTERPOLATIONS = ("bilinear", "bicubic")

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Preprocessing:
    """How uint8 pixels become a network's input.

    The tile is resized, antialiased, to ``resize_px`` (where that is given and the tile has another side), its centre
    of ``input_px`` is cut out, and each channel becomes ``(value / 255 - mean) / std``. input_px None: tiles of any
    side go in as they are.
    """

    input_px: int | None
    mean: Triple
    std: Triple
    interpolation: str = "bilinear"
    resize_px: int | None = None

    def __post_init__(self) -> None:
        if self.input_px is not None and self.input_px < 1:
            raise ConfigError(f"input_px {self.input_px} must be at least 1")
        if self.resize_px is not None and (self.input_px is None or self.resize_px < self.input_px):
            raise ConfigError(f"resize_px {self.resize_px} must be at least input_px ({self.input_px})")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or not all(math.isfinite(value) for value in values):
                raise ConfigError(f"{name} {values} must be three numbers")
        if min(self.std) <= 0:
            raise ConfigError(f"std {self.std} must be above zero")
        if self.interpolation not in INTERPOLATIONS:
            raise ConfigError(f"interpolation {self.interpolation!r} must be one of {', '.join(INTERPOLATIONS)}")

    @property
    def scaled_px(self) -> int | None:
        """The side that tiles are resized to before the centre is cut out."""
        return self.resize_px if self.resize_px is not None else self.input_px


@dataclass(frozen=True)
class Recipe:
    """An encoder without its weights.

    architecture: a timm model name, or one of ``wsi_pipe.encoders.architectures``. args: its arguments, JSON-able;
    layer classes by name. dim: D of the pooled features. pooling: "model" (the network's own), "cls", "mean" (of
    patch tokens), or "cls+mean" (both, one behind the other, which doubles D).
    """

    architecture: str
    dim: int
    preprocessing: Preprocessing
    pooling: str = "model"
    args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ConfigError(f"dim {self.dim} must be at least 1")
        if self.pooling not in POOLINGS:
            raise ConfigError(f"pooling {self.pooling!r} must be one of {', '.join(POOLINGS)}")

    def transform(self) -> dict[str, Any]:
        """The preprocessing and pooling as JSON-able values, as bags record them."""
        pre = self.preprocessing
        return {
            "resize_px": pre.scaled_px,
            "input_px": pre.input_px,
            "interpolation": pre.interpolation,
            "mean": list(pre.mean),
            "std": list(pre.std),
            "pooling": self.pooling,
        }
