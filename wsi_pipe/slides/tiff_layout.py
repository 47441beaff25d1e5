"""Which images of a TIFF file are the levels of the slide, and what its vendor says of resolution and origin."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from wsi_pipe.errors import UnsupportedSlideError
from wsi_pipe.geometry import FloatPair
from wsi_pipe.slides.native import NativeImage
from wsi_pipe.slides.source import Source
from wsi_pipe.slides.tiff_ifd import Directory
from wsi_pipe.slides.tiff_image import TILE_WIDTH, TiffImage

__all__ = ["TiffLayout", "read_layout"]

SUBFILE, DESCRIPTION, X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT, SOFTWARE = 254, 270, 282, 283, 296, 305
XMP, ICC = 700, 34675

PLAUSIBLE_MPP = (0.02, 20.0)
"""Level 0 of a slide lies well inside; a default of 72 dots an inch (353 um/px) does not."""


@dataclass(frozen=True)
class TiffLayout:
    """What a TIFF slide consists of.

    images: the levels, finest first. associated: label, macro and so on by name. mpp: (x, y) or None; mpp_source says
    where from. description: vendor and codec in words.
    """

    vendor: str
    description: str
    images: Sequence[NativeImage]
    mpp: FloatPair | None = None
    mpp_source: str = "none"
    objective_power: float | None = None
    icc: bytes | None = None
    properties: Mapping[str, str] = field(default_factory=dict)
    associated: Mapping[str, Directory] = field(default_factory=dict)


def read_layout(source: Source, directories: Sequence[Directory]) -> TiffLayout:
    """Recognise the vendor and gather levels. Raises UnsupportedSlideError with the reason where that fails."""
    first = directories[0]
    text = first.text(DESCRIPTION)
    if text.startswith("Aperio"):
        return _aperio(source, directories, text)
    return _generic(source, directories)


def _aperio(source: Source, directories: Sequence[Directory], text: str) -> TiffLayout:
    images = [TiffImage(source, d) for d in directories if TILE_WIDTH in d]
    if not images:
        raise UnsupportedSlideError(f"{source.name}: the Aperio slide has no tiled image")
    properties = _aperio_properties(text)
    mpp = _positive(properties.get("MPP"))
    return TiffLayout(
        vendor="aperio",
        description=f"Aperio SVS with {images[0].codec} tiles",
        images=images,
        mpp=None if mpp is None else (mpp, mpp),
        mpp_source="none" if mpp is None else "aperio.MPP",
        objective_power=_positive(properties.get("AppMag")),
        icc=_icc(directories[0]),
        properties={f"aperio.{key}": value for key, value in properties.items()},
    )


def _aperio_properties(text: str) -> dict[str, str]:
    pairs = (part.split("=", 1) for part in text.split("|")[1:] if "=" in part)
    return {key.strip(): value.strip() for key, value in pairs}


def _generic(source: Source, directories: Sequence[Directory]) -> TiffLayout:
    first = directories[0]
    if TILE_WIDTH not in first:
        raise UnsupportedSlideError(f"{source.name}: the first image of the TIFF file is not tiled")
    images = [
        TiffImage(source, d)
        for i, d in enumerate(directories)
        if TILE_WIDTH in d and (i == 0 or d.number(SUBFILE, 0) & 1)
    ]
    images[1:] = sorted(images[1:], key=lambda image: -image.size_px[0])
    mpp, unit = resolution_mpp(first)
    return TiffLayout(
        vendor="generic-tiff",
        description=f"tiled TIFF with {images[0].codec} tiles",
        images=images,
        mpp=mpp,
        mpp_source="none" if mpp is None else f"tiff.XResolution ({unit})",
        icc=_icc(first),
    )


def resolution_mpp(directory: Directory) -> tuple[FloatPair | None, str]:
    """(x, y) um/px from the resolution tags where their unit is physical and the value plausible, and the unit."""
    unit, name = {2: (25400.0, "inch"), 3: (10000.0, "cm")}.get(directory.number(RESOLUTION_UNIT, 2), (0.0, "none"))
    x, y = directory.rational(X_RESOLUTION), directory.rational(Y_RESOLUTION)
    if not unit or x is None or y is None:
        return None, name
    mpp = (unit / x, unit / y)
    return (mpp if all(PLAUSIBLE_MPP[0] <= value <= PLAUSIBLE_MPP[1] for value in mpp) else None), name


def _positive(text: str | None) -> float | None:
    match = re.match(r"\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*$", text or "")
    value = float(match.group(1)) if match else 0.0
    return value if 0 < value < float("inf") else None


def _icc(directory: Directory) -> bytes | None:
    return directory.raw(ICC) or None
