"""What a TIFF slide consists of, and the helpers that recognising it takes."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from wsi_pipe.errors import UnsupportedSlideError
from wsi_pipe.geometry import FloatPair, in_mpp_bounds
from wsi_pipe.slides.native import ProbedImage
from wsi_pipe.slides.tiff.ifd import Directory

__all__ = ["TiffLayout", "icc_profile", "parse_xml", "positive", "resolution_mpp"]

SUBFILE, DESCRIPTION, X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT, SOFTWARE = 254, 270, 282, 283, 296, 305
PAGE_NAME, XMP, ICC = 285, 700, 34675

MAX_XML_CHARACTERS = 1 << 26
MAX_ICC_BYTES = 1 << 24


@dataclass(frozen=True)
class TiffLayout:
    """What a TIFF slide consists of.

    images: the levels, finest first. associated: images such as label and macro, by name. mpp: (x, y) um per level-0
    pixel or None; mpp_source says where from. description: vendor and codec in words. notes: see SlideInfo.
    """

    vendor: str
    description: str
    images: Sequence[ProbedImage]
    mpp: FloatPair | None = None
    mpp_source: str = "none"
    objective_power: float | None = None
    icc: bytes | None = None
    properties: Mapping[str, str] = field(default_factory=dict)
    associated: Mapping[str, Directory] = field(default_factory=dict)
    bounds_l0: tuple[int, int, int, int] | None = None
    notes: tuple[str, ...] = ()


def resolution_mpp(directory: Directory) -> tuple[FloatPair | None, str]:
    """(x, y) um/px from the resolution tags where their unit is physical and the value plausible, and where from."""
    unit, name = {2: (25400.0, "inch"), 3: (10000.0, "cm")}.get(directory.number(RESOLUTION_UNIT, 2), (0.0, "none"))
    x, y = directory.rational(X_RESOLUTION), directory.rational(Y_RESOLUTION)
    mpp = (unit / x, unit / y) if unit and x and y else (0.0, 0.0)
    # Editors write 72 dots an inch (353 um/px) by themselves: that is no statement of a microscope.
    if not in_mpp_bounds(*mpp):
        return None, "none"
    return mpp, f"tiff.XResolution ({name})"


def positive(text: str | None) -> float | None:
    """A decimal number above zero from text, or None. Some scanners write the comma of their computer's locale."""
    match = re.match(r"\s*\+?([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*$", (text or "").replace(",", "."))
    value = float(match.group(1)) if match else 0.0
    return value if math.isfinite(value) and value > 0 else None


def icc_profile(directory: Directory) -> bytes | None:
    """The embedded colour profile, or None."""
    return directory.raw(ICC) or None if directory.count(ICC) <= MAX_ICC_BYTES else None


def parse_xml(name: str, text: str) -> ElementTree.Element:
    """The root of a vendor's XML. Raises UnsupportedSlideError where it is damaged or declares entities."""
    if len(text) > MAX_XML_CHARACTERS or "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise UnsupportedSlideError(f"{name}: the XML description is out of bounds")
    try:
        # Bytes, because a text with an encoding declaration is refused by some parsers.
        return ElementTree.fromstring(re.sub(r"^\s*<\?xml[^>]*\?>", "", text).encode())
    except (ElementTree.ParseError, UnicodeEncodeError, ValueError) as error:
        raise UnsupportedSlideError(f"{name}: the XML description is damaged: {error}") from error
