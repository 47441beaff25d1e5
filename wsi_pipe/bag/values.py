"""What a bag holds, as frozen values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.geometry import FloatPair, TileGrid
from wsi_pipe.masking import mask_secrets

__all__ = [
    "PER_TILE",
    "SCHEMA",
    "SCHEMA_VERSION",
    "Bag",
    "BagAttrs",
    "BagLevel",
    "Features",
    "SlideVector",
    "TileValues",
    "content_digest",
    "fits_next",
]

SCHEMA = "wsi-pipe-bag"
SCHEMA_VERSION = 1

PER_TILE = {"annotation": (0.0, 1.0), "quality": (0.0, np.inf)}
"""Groups of a level with one number a tile in each of their data sets, and the range that it keeps to. Each is a field
of ``BagLevel`` of the same name. Bags of earlier versions lack them."""

FeatureArray = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class BagAttrs:
    """The root attributes of a bag.

    mpp_l0: (x, y) um per level-0 pixel. icc: SHA-256 of the embedded colour profile, "" where there is none.
    status: "done" or "empty"; empty_reason: why, or "". fingerprint_segment, fingerprint_tile: of the stages that made
    the grids. primary_level, primary_encoder: what ``/coords`` and ``/features`` link to; primary_encoder is "" in a
    file that has no features yet. scene, z: which scan of the file and which focal plane were asked for; not written
    where none was. bounds_l0: (x, y, width, height) of the scanned part, from whose corner QuPath counts; the whole
    image where the file states none, None in files of earlier versions. annotation: JSON text on the annotations that
    tiles were compared with, "" where there were none. left_out: JSON text on the tiles that were left out as blurred,
    "" where sharpness was not asked for. made_with: JSON text of what the grids were made with, beside what the
    fingerprints cover: settings and versions of the stages; "" in files of version 0.1.0.
    """

    slide_id: str
    case_id: str
    slide_path: str
    slide_fingerprint: str
    width_l0: int
    height_l0: int
    mpp_l0: FloatPair
    mpp_source: str
    vendor: str
    reader: str
    icc: str
    wsi_pipe_version: str
    created_utc: str
    status: str
    empty_reason: str
    fingerprint_segment: str
    fingerprint_tile: str
    primary_level: str
    primary_encoder: str = ""
    scene: int | None = None
    z: int | None = None
    bounds_l0: tuple[int, int, int, int] | None = None
    annotation: str = ""
    left_out: str = ""
    made_with: str = ""

    def __post_init__(self) -> None:
        # Bags are handed on: secrets of URLs stay out whoever makes one.
        for name in ("slide_path", "empty_reason"):
            object.__setattr__(self, name, mask_secrets(getattr(self, name)))


@dataclass(frozen=True)
class Features:
    """The features of one encoder on one grid.

    values: float16 or float32 (N, D). encoder: the encoder's name as given. transform: JSON text. layers: CLS of
    chosen blocks, block number as text -> the same shape. weights: "random" where they were drawn and not learnt, else
    "". encoder_saw: in which part of ``wsi_pipe.seen.SEEN_PARTS`` the encoder saw this slide or its case, or "".
    """

    encoder: str
    values: FeatureArray
    weights_sha256: str
    licence: str
    precision: str
    transform: str
    fingerprint: str
    layers: Mapping[str, FeatureArray] = field(default_factory=dict)
    weights: str = ""
    encoder_saw: str = ""


@dataclass(frozen=True)
class TileValues:
    """One number a tile, and what there is to say of it.

    values: float32 (N,). attrs: attributes of the data set, text, numbers or lists of whole numbers.
    """

    values: NDArray[np.float32]
    attrs: Mapping[str, str | float | tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class BagLevel:
    """One grid with what belongs to its tiles.

    features: by encoder slug. attention: by model name, float32 (N,), sums to 1. annotation: by the slug of a class,
    the fraction of each tile that its regions cover; attributes ``class`` (its name) and ``color`` (R, G, B). quality:
    "sharpness", "fold", "bubble"; attributes ``method`` and ``version`` (see ``wsi_pipe.quality``).
    """

    grid: TileGrid
    features: Mapping[str, Features] = field(default_factory=dict)
    attention: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    annotation: Mapping[str, TileValues] = field(default_factory=dict)
    quality: Mapping[str, TileValues] = field(default_factory=dict)


@dataclass(frozen=True)
class SlideVector:
    """One vector for the whole slide.

    values: float32 (D,). slide_encoder: what made it. level, encoder, features: label, slug and fingerprint of the tile
    features that it was made of. weights_sha256: of the slide encoder, "" where it has none. made: JSON text on the
    rest of what it was made with. encoder_saw: as in ``Features``.
    """

    values: NDArray[np.float32]
    slide_encoder: str
    level: str
    encoder: str
    features: str
    weights_sha256: str = ""
    licence: str = ""
    made: str = "{}"
    encoder_saw: str = ""


@dataclass(frozen=True)
class Bag:
    """One slide's bag; levels coarsest first. slide: vectors of the whole slide by name; earlier versions have none."""

    attrs: BagAttrs
    levels: tuple[BagLevel, ...]
    slide: Mapping[str, SlideVector] = field(default_factory=dict)


def content_digest(blocks: Iterable[NDArray[Any]]) -> str:
    """SHA-256, in hex, over the values of an array that comes in blocks of rows: C order, little-endian."""
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(np.ascontiguousarray(block, block.dtype.newbyteorder("<")).view(np.uint8).data)
    return digest.hexdigest()


def fits_next(grid: TileGrid, coarser: TileGrid) -> NDArray[np.bool_]:
    """For each tile, whether it lies in the cell of its parent in ``coarser``; bool (N,).

    Without overlap the whole tile must, with overlap its centre. A parent index out of range counts as False.
    """
    if grid.parent is None:
        return np.zeros(len(grid), bool)
    fits = (grid.parent >= 0) & (grid.parent < len(coarser))
    if not len(coarser):
        return fits
    size = np.asarray(grid.tile_size_l0)
    if grid.spec.overlap_px or coarser.spec.overlap_px:
        first = last = grid.corners_l0 + size / 2
    else:
        first, last = grid.corners_l0, grid.corners_l0 + size
    corner = coarser.corners_l0[np.clip(grid.parent, 0, len(coarser) - 1)]
    slack = 1e-6 * np.asarray(coarser.tile_size_l0)
    inside = (first >= corner - slack) & (last <= corner + np.asarray(coarser.tile_size_l0) + slack)
    result: NDArray[np.bool_] = fits & inside.all(axis=1)
    return result
