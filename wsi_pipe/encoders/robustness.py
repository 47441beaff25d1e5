"""How much an encoder's features move when nothing but the making of the picture changes: stain, focus, JPEG, scale."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.encoders.base import Encoder, TileArray, batch_of

__all__ = ["CHANGES", "Robustness", "measure_robustness"]

LIGHT = 240.0


def _stain(haematoxylin: float, eosin: float) -> Callable[[TileArray], TileArray]:
    """Amounts of the two stains times these factors, by colour deconvolution (Ruifrok and Johnston 2001)."""

    def change(tiles: TileArray) -> TileArray:
        from skimage.color import hed_from_rgb, rgb_from_hed

        density = -np.log((tiles.astype(np.float64) + 1) / LIGHT)
        stains = density @ hed_from_rgb
        moved = (stains * np.array([haematoxylin, eosin, 1.0])) @ rgb_from_hed
        return np.asarray(np.clip(np.round(LIGHT * np.exp(-moved) - 1), 0, 255), np.uint8)

    return change


def _each(one: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]) -> Callable[[TileArray], TileArray]:
    return lambda tiles: np.stack([one(tile) for tile in tiles])


def _blur(sigma: float) -> Callable[[TileArray], TileArray]:
    def one(tile: NDArray[np.uint8]) -> NDArray[np.uint8]:
        import cv2

        return np.asarray(cv2.GaussianBlur(tile, (0, 0), sigma), np.uint8)

    return _each(one)


def _jpeg(quality: int) -> Callable[[TileArray], TileArray]:
    def one(tile: NDArray[np.uint8]) -> NDArray[np.uint8]:
        from PIL import Image

        held = io.BytesIO()
        Image.fromarray(tile).save(held, "JPEG", quality=quality)
        return np.asarray(Image.open(held).convert("RGB"), np.uint8)

    return _each(one)


def _scale(factor: float) -> Callable[[TileArray], TileArray]:
    """The middle of each tile, as if scanned at ``factor`` times the um/px."""

    def one(tile: NDArray[np.uint8]) -> NDArray[np.uint8]:
        import cv2

        side = tile.shape[0]
        inner = round(side / factor)
        start = (side - inner) // 2
        part = tile[start : start + inner, start : start + inner]
        return np.asarray(cv2.resize(part, (side, side), interpolation=cv2.INTER_CUBIC), np.uint8)

    return _each(one)


CHANGES: dict[str, Callable[[TileArray], TileArray]] = {
    "haematoxylin x 0.7": _stain(0.7, 1.0),
    "haematoxylin x 1.3": _stain(1.3, 1.0),
    "eosin x 0.7": _stain(1.0, 0.7),
    "eosin x 1.3": _stain(1.0, 1.3),
    "blur, sigma 1 px": _blur(1.0),
    "blur, sigma 2 px": _blur(2.0),
    "JPEG, quality 70": _jpeg(70),
    "JPEG, quality 30": _jpeg(30),
    "scale x 1.1": _scale(1.1),
    "scale x 1.25": _scale(1.25),
}
"""Changes of tiles uint8 (B, S, S, 3) by what they are called."""


@dataclass(frozen=True)
class Robustness:
    """How near features stay under one change.

    cosine, low: mean and 5th percentile over tiles of the cosine of a tile's features before and after, both less the
    mean over all unchanged tiles, without which a common direction of all features would hide what moves. kept: the
    part of tiles whose changed features are nearer to their own than to any other tile's.
    """

    change: str
    cosine: float
    low: float
    kept: float


def measure_robustness(
    encoder: Encoder, tiles: TileArray, *, changes: Sequence[str] = tuple(CHANGES), batch_size: int | None = None
) -> list[Robustness]:
    """Features of ``tiles`` uint8 (N, S, S, 3), at least two of which differ, under each change."""
    plain = _features(encoder, tiles, batch_size)
    centre = plain.mean(axis=0)
    own = _directions(plain - centre)
    found = []
    for name in changes:
        moved = _directions(_features(encoder, CHANGES[name](tiles), batch_size) - centre)
        near = moved @ own.T
        same = near.diagonal()
        kept = float((near.argmax(axis=1) == np.arange(len(tiles))).mean())
        found.append(Robustness(name, float(same.mean()), float(np.percentile(same, 5)), kept))
    return found


def _features(encoder: Encoder, tiles: TileArray, batch_size: int | None) -> NDArray[np.float64]:
    size = batch_of(encoder, tiles.shape[1], batch_size)
    parts = [encoder.encode(tiles[at : at + size]) for at in range(0, len(tiles), size)]
    return np.concatenate(parts).astype(np.float64)


def _directions(values: NDArray[np.float64]) -> NDArray[np.float64]:
    length = np.linalg.norm(values, axis=1, keepdims=True)
    return np.asarray(values / np.where(length > 0, length, 1))
