"""What is known of a bag's features before they are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["BagFormat", "BagInfo"]

BagFormat = Literal["wsi-pipe", "trident", "clam", "stamp", "pt", "memory"]


@dataclass(frozen=True)
class BagInfo:
    """Facts about the features of one bag at one level.

    rows, dim: shape of the features. slug: the features' name in the file. case_id: None where the file states none.
    encoder, weights_sha256, level, mpp (um/px), tile_px: empty or None where neither file nor user states them.
    tile_size_l0: (x, y) in level-0 px.
    coords_unit: frame of the coordinates. fingerprint: changes whenever the features do. bounds_l0: (x, y, width,
    height) of the scanned part, from whose corner QuPath counts; None where the bag does not state it.
    slide_fingerprint: of the slide file. encoder_saw: the part of ``wsi_pipe.seen.SEEN_PARTS`` in which the encoder saw
    the slide or its case.
    """

    path: str
    format: BagFormat
    slide_id: str
    case_id: str | None
    rows: int
    dim: int
    encoder: str
    slug: str
    weights_sha256: str
    level: str
    mpp: float | None
    tile_px: int | None
    tile_size_l0: tuple[float, float] | None
    coords_unit: Literal["px_l0", "um"]
    fingerprint: str
    has_parent: bool = False
    empty_reason: str | None = None
    bounds_l0: tuple[int, int, int, int] | None = None
    slide_fingerprint: str = ""
    encoder_saw: str = ""
