"""What slide files say of their resolution, and the error where they say nothing.

The order is: what the user gives, then what the file states in a way made for it (a vendor's own field, OME-XML, or
TIFF resolution tags in a physical unit with a value that a microscope can have). Nothing else counts: the dots per inch
of a PNG or JPEG are printing hints that cameras and editors fill with 72, and a magnification is a label, no measure.
"""

from __future__ import annotations

from pathlib import Path

from wsi_pipe.errors import MissingMppError, UnsupportedSlideError
from wsi_pipe.geometry import FloatPair, IntPair, in_mpp_bounds
from wsi_pipe.slides.tiff.layout import parse_xml

__all__ = ["missing_mpp_error", "ome_mpp", "plausible_mpp", "resolution_tags_mpp"]

_UM_PER_UNIT = {
    "m": 1e6, "dm": 1e5, "cm": 1e4, "mm": 1e3, "µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "pm": 1e-6,
    "Å": 1e-4, "in": 25400.0,
}  # fmt: skip


def missing_mpp_error(path: str | Path) -> MissingMppError:
    """The error for a slide without a resolution; it names the option and the column that mend it."""
    return MissingMppError(
        f"{path}: the file states no resolution",
        remedy="give it with --slide-mpp X (um per level-0 pixel), or in the column mpp of a slide list (--slides)",
    )


def plausible_mpp(x: float, y: float) -> FloatPair | None:
    """(x, y) where a microscope can have both, else None."""
    return (x, y) if in_mpp_bounds(x, y) else None


def resolution_tags_mpp(x: float, y: float, unit: int) -> FloatPair | None:
    """(x, y) um/px from a TIFF's XResolution, YResolution and ResolutionUnit (2 inch, 3 cm), where plausible."""
    length = {2: 25400.0, 3: 10000.0}.get(unit)
    if length is None or x <= 0 or y <= 0:
        return None
    return plausible_mpp(length / x, length / y)


def ome_mpp(xml: str, size_px: IntPair) -> FloatPair | None:
    """(x, y) um/px from PhysicalSizeX and PhysicalSizeY of OME-XML, in their units (um by default).

    A file may hold a label and a macro image as well: those of the first image of ``size_px`` (width, height) count.
    None where they are absent, damaged, in no unit of length, or not what a microscope can have.
    """
    try:
        root = parse_xml("OME-XML", xml)
    except UnsupportedSlideError:
        return None
    stated = {"SizeX": str(size_px[0]), "SizeY": str(size_px[1])}
    elements = (element for element in root.iter() if element.tag.rpartition("}")[2] == "Pixels")
    pixels = next((e for e in elements if stated.items() <= e.attrib.items()), None)
    if pixels is None:
        return None
    sizes = []
    for axis in ("X", "Y"):
        try:
            value = float(pixels.attrib[f"PhysicalSize{axis}"])
        except (KeyError, ValueError):
            return None
        unit = _UM_PER_UNIT.get(pixels.attrib.get(f"PhysicalSize{axis}Unit", "µm"))
        if unit is None:
            return None
        sizes.append(value * unit)
    return plausible_mpp(sizes[0], sizes[1])
