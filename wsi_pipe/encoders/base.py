"""What every encoder gives: facts about itself, and features of uint8 tiles."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.errors import ConfigError, EncoderOutputError, ResolutionError
from wsi_pipe.geometry import TileGrid, level_label
from wsi_pipe.seen import Seen

__all__ = [
    "MPP_TOLERANCE",
    "Encoder",
    "EncoderInfo",
    "LayerFeatures",
    "LayeredEncoder",
    "NonFiniteFeaturesError",
    "PendingFeatures",
    "PendingLayers",
    "batch_of",
    "block_indices",
    "check_finite",
    "check_grid",
    "encoder_slug",
]

TileArray = NDArray[np.uint8]
FeatureArray = NDArray[np.float32]

DEFAULT_BATCH = 64
"""Tiles to a batch for an encoder that has no opinion."""

MPP_TOLERANCE = 0.025
"""An encoder that requires a resolution accepts grids within this relative distance of it: less than scanners'
calibration, and the distance within which a grid is laid at the slide's own scale."""


def encoder_slug(name: str) -> str:
    """An encoder's name as a part of an HDF5 path or a file name: no slashes, colons, at signs or spaces."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip("-")


@dataclass(frozen=True)
class EncoderInfo:
    """Facts about an encoder.

    name: as given on the command line. slug: the name in paths. dim: D. input_px: side that tiles are resized to on
    the device, None where any size will do. mpp: recommended micrometres per pixel, None where any will do.
    mpp_required: a grid at another mpp is an error (distilled LR encoders). tile_px: with it, the side of the tiles
    that the encoder was made for, which a grid must have too. weights_sha256: of the weights' file, or a constant that
    names the version of a weightless encoder. precision: "float32", "bfloat16", "float16".
    transform: how pixels become inputs, as JSON-able values. licence: SPDX id or the model card's name for it.
    random: its weights were drawn and not learnt; name and slug say so too. seen: whose slides it was trained on, as
    far as its file says so.
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
    tile_px: int | None = None
    random: bool = False
    seen: Seen = field(default_factory=Seen, compare=False, repr=False)


@dataclass(frozen=True)
class LayerFeatures:
    """What one pass gives: the final features, and tokens of chosen blocks.

    features: float32 (B, D). cls: block -> float32 (B, C), the CLS token after that block. patches: block -> float32
    (B, h, w, C), the patch tokens after that block in image order, without CLS and registers. Keys are the block
    numbers as they were asked for (negative ones count from the end).
    """

    features: FeatureArray
    cls: Mapping[int, FeatureArray]
    patches: Mapping[int, FeatureArray]


class NonFiniteFeaturesError(EncoderOutputError):
    """Some rows of a batch are NaN or infinite; the others are good and carried along.

    rows: their places in the batch. features: the whole batch, float32 (B, D), or LayerFeatures.
    """

    def __init__(
        self,
        message: str,
        *,
        remedy: str | None = None,
        rows: Sequence[int] = (),
        features: FeatureArray | LayerFeatures | None = None,
    ) -> None:
        super().__init__(message, remedy=remedy)
        self.rows = tuple(rows)
        self.features = features


@runtime_checkable
class PendingFeatures(Protocol):
    """Features under way on a device.

    It may have ``ready`` (bool): False while ``result`` would wait. Without it, results are taken for ready.
    """

    def result(self) -> FeatureArray:
        """Wait; float32 (B, D)."""


@runtime_checkable
class PendingLayers(Protocol):
    """Features and layers under way on a device."""

    def result(self) -> LayerFeatures:
        """Wait for all of them."""


@runtime_checkable
class Encoder(Protocol):
    """Turns tiles into features. Results do not depend on which tiles share a batch.

    An encoder may also say how it likes to be fed, which ``wsi_pipe.extract`` honours: ``shares_batches`` (bool,
    default False: tiles of several slides may share a batch), ``in_flight`` (int, default 1: batches to submit
    before waiting for the first), ``suggest_batch(tile_px) -> int`` (default 64), ``new_tiles(shape)``, an array
    uint8 of that shape in memory from which tiles get to the device soonest (default: any memory), and ``release()``,
    called when no more tiles come, to give such memory back.
    """

    @property
    def info(self) -> EncoderInfo:
        """Facts about the encoder."""

    def encode(self, tiles: TileArray) -> FeatureArray:
        """Features float32 (B, D) of tiles uint8 (B, H, W, 3), RGB.

        Raises EncoderOutputError when a feature is NaN or infinite, DeviceError when one tile does not fit the device.
        """

    def submit(self, tiles: TileArray) -> PendingFeatures:
        """Start encoding and return at once where the device allows; the same features as ``encode``."""


@runtime_checkable
class LayeredEncoder(Encoder, Protocol):
    """An encoder made of blocks whose tokens can be had beside the final features, in the same pass."""

    @property
    def depth(self) -> int:
        """The number of blocks; 0 where the network has none (then asking for layers is an error)."""

    def encode_layers(self, tiles: TileArray, layers: Sequence[int]) -> LayerFeatures:
        """Final features, and tokens of blocks ``layers``, of tiles uint8 (B, H, W, 3).

        layers: 0 is the first block, -1 the last. Raises ConfigError for a block that does not exist.
        """

    def submit_layers(self, tiles: TileArray, layers: Sequence[int], *, patches: bool = True) -> PendingLayers:
        """Start ``encode_layers`` and return at once where the device allows; without ``patches``, CLS alone."""


def batch_of(encoder: Encoder, tile_px: int, batch_size: int | None = None) -> int:
    """Tiles to a batch for an encoder: ``batch_size`` where that is given, else the encoder's own choice."""
    if batch_size is not None:
        return batch_size
    suggest = getattr(encoder, "suggest_batch", None)
    return int(suggest(tile_px)) if suggest is not None else DEFAULT_BATCH


def block_indices(layers: Sequence[int], depth: int, name: str) -> list[int]:
    """Block numbers from 0 for ``layers``, where negative ones count from the end.

    Raises ConfigError when the encoder ``name`` has no such block, or no blocks at all (depth 0).
    """
    if layers and depth == 0:
        raise ConfigError(f"encoder {name} has no blocks to take layers from", remedy="leave out the layers")
    bad = [layer for layer in layers if not -depth <= layer < depth]
    if bad:
        raise ConfigError(
            f"encoder {name} has no block {bad[0]}",
            remedy=f"it has {depth}: choose from 0 to {depth - 1}, or -1 to {-depth}",
        )
    return [layer % depth for layer in layers]


def check_finite(features: FeatureArray, name: str, whole: LayerFeatures | None = None) -> FeatureArray:
    """``features`` (B, D) themselves when all are finite, and the CLS tokens of ``whole`` with them.

    Raises NonFiniteFeaturesError with the bad rows otherwise.
    """
    # One pass over the sums is enough to find out: a NaN or an infinity survives addition, and finite float32
    # values cannot overflow a float64 sum.
    sums = features.sum(axis=1, dtype=np.float64)
    for cls in () if whole is None else whole.cls.values():
        sums = sums + cls.sum(axis=1, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(sums))
    if bad.size:
        raise NonFiniteFeaturesError(
            f"encoder {name} gave NaN or infinity for {bad.size} of {len(features)} tiles",
            remedy="use --precision float32 (float16 overflows in some networks), and check the weights",
            rows=[int(row) for row in bad],
            features=features if whole is None else whole,
        )
    return features


def check_grid(info: EncoderInfo, grid: TileGrid) -> None:
    """Raise ResolutionError when the encoder requires a resolution, or a size of tiles, that the grid does not have.

    The grid passes when either the mpp that was asked for or the one at which its tiles are really cut (both axes)
    lies within MPP_TOLERANCE, relative, of the encoder's. Encoders that only recommend a resolution always pass.
    """
    if not info.mpp_required or info.mpp is None:
        return
    wanted = info.mpp
    label = level_label(wanted)
    if any(
        all(abs(value - wanted) <= MPP_TOLERANCE * wanted for value in pair)
        for pair in ((grid.spec.mpp, grid.spec.mpp), grid.mpp_effective)
    ):
        # Tiles are resized to the network's input in any case, but others show it another field of view.
        if info.tile_px not in (None, grid.spec.size_px):
            raise ResolutionError(
                f"encoder {info.name} was made for tiles of {info.tile_px} px ({info.tile_px * wanted:g} um), but the "
                f"grid {grid.label} has tiles of {grid.spec.size_px} px",
                remedy=f"cut tiles of that size: --tile-px {info.tile_px}",
            )
        return
    raise ResolutionError(
        f"encoder {info.name} was made for {wanted:g} um/px ({label}), but the grid {grid.label} "
        f"has {grid.mpp_effective[0]:g} um/px",
        remedy=f"use it on that level alone: -r {label}, or --encoder {label}={info.name}",
    )
