"""One file of a DICOM series, and what its tags say the picture is.

References: DICOM PS3.3 C.8.12.4 (VL Whole Slide Microscopy), C.8.12.5 (optical paths), PS3.16 CID 8123.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from wsi_pipe.errors import NotAPictureError, UnsupportedSlideError
from wsi_pipe.geometry import IntPair
from wsi_pipe.slides.storage.source import Source

__all__ = [
    "COLOURS",
    "JPEG2000_SYNTAXES",
    "JPEG_SYNTAXES",
    "MAX_FRAMES",
    "PLAIN_SYNTAXES",
    "Instance",
    "check_meaning",
    "check_pixels",
    "codec_name",
    "organization",
]

JPEG_SYNTAXES = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51")
JPEG2000_SYNTAXES = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
PLAIN_SYNTAXES = ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2")
COLOURS = ("RGB", "YBR_FULL_422", "YBR_FULL", "YBR_ICT", "YBR_RCT")

MAX_FRAMES = 1 << 24

BRIGHTFIELD = {"111741": "transmission", "111744": "brightfield"}
OTHER_LIGHT = {
    "111742": "reflection",
    "111743": "epifluorescence",
    "111745": "dark field",
    "111747": "phase contrast",
    "111748": "differential interference contrast",
}
"""Illumination by its code in the scheme DCM."""


@dataclass(frozen=True)
class Instance:
    """One file of a series: its bytes, its tags, where its pixel data begins, and its transfer syntax."""

    source: Source
    tags: Any
    pixels_at: int
    syntax: str

    @property
    def kind(self) -> str:
        """The third value of ImageType: VOLUME, LABEL, OVERVIEW or THUMBNAIL; nothing where it is missing."""
        values = self.tags.get("ImageType", []) or []
        values = [values] if isinstance(values, str) else list(values)
        return str(values[2]) if len(values) > 2 else ""

    @property
    def colour(self) -> str:
        """PhotometricInterpretation."""
        return str(self.tags.get("PhotometricInterpretation", ""))

    @property
    def size_px(self) -> IntPair:
        """(width, height) of the whole level."""
        return (self.number("TotalPixelMatrixColumns"), self.number("TotalPixelMatrixRows"))

    @property
    def frames(self) -> int:
        """NumberOfFrames. Raises UnsupportedSlideError where it is out of bounds."""
        count = self.number("NumberOfFrames", 1)
        if not 0 < count <= MAX_FRAMES:
            raise UnsupportedSlideError(f"{self.source.name}: {count} frames are out of bounds")
        return count

    @property
    def optical_paths(self) -> int:
        """How many optical paths the image states or describes."""
        return max(self.number("NumberOfOpticalPaths", 1), len(self.tags.get("OpticalPathSequence") or []))

    def number(self, name: str, default: int | None = None) -> int:
        """A tag as a whole number. Raises UnsupportedSlideError where it is missing, without a default, or none."""
        value = self.tags.get(name, default)
        try:
            return int(default if value is None and default is not None else value)
        except (TypeError, ValueError) as error:
            raise UnsupportedSlideError(f"{self.source.name}: DICOM {name} is missing or no number") from error


def organization(instance: Instance) -> str:
    """TILED_FULL or TILED_SPARSE; what an instance says goes before what it looks like."""
    stated = str(instance.tags.get("DimensionOrganizationType", "") or "")
    groups = instance.tags.get("PerFrameFunctionalGroupsSequence")
    return stated or ("TILED_SPARSE" if groups else "TILED_FULL")


def codec_name(syntax: str) -> str:
    """The compression of a transfer syntax that is read."""
    return "JPEG" if syntax in JPEG_SYNTAXES else "JPEG 2000" if syntax in JPEG2000_SYNTAXES else "uncompressed"


def check_meaning(instance: Instance) -> None:
    """Raise NotAPictureError where the picture is not 8-bit colour in brightfield; no other reader makes it so."""
    name = instance.source.name
    _check_light(instance)
    samples, colour = instance.number("SamplesPerPixel", 1), instance.colour or "unknown"
    if samples == 1 and colour.startswith("MONOCHROME"):
        raise NotAPictureError(
            f"{name}: only 8-bit RGB images are read, not {colour}: a monochrome image is one channel of several, or a "
            "stain without its colour",
            remedy="export the slide in colour",
        )
    bits = (instance.number("BitsAllocated"), instance.number("BitsStored", 8))
    if samples != 3 or bits != (8, 8) or instance.number("PixelRepresentation", 0):
        kind = "signed" if instance.number("PixelRepresentation", 0) else "unsigned"
        raise NotAPictureError(
            f"{name}: only 8-bit RGB images are read, not {colour} of {samples} samples with {bits[1]} {kind} bits in "
            f"{bits[0]}",
            remedy="export the slide as 8-bit RGB",
        )
    if colour not in COLOURS:
        raise NotAPictureError(f"{name}: photometric interpretation {colour!r} is not read")


def _check_light(instance: Instance) -> None:
    codes = [
        str(code.get("CodeValue", ""))
        for path in instance.tags.get("OpticalPathSequence") or []
        for code in path.get("IlluminationTypeCodeSequence") or []
    ]
    other = [OTHER_LIGHT[code] for code in codes if code in OTHER_LIGHT]
    if other and not any(code in BRIGHTFIELD for code in codes):
        raise NotAPictureError(
            f"{instance.source.name}: the file declares its illumination as {other[0]}, so it is no brightfield slide",
            remedy="give a brightfield slide",
        )


def check_pixels(instance: Instance) -> None:
    """Raise UnsupportedSlideError where the frames are coded in a way that is not read here."""
    name = instance.source.name
    if instance.syntax not in (*JPEG_SYNTAXES, *JPEG2000_SYNTAXES, *PLAIN_SYNTAXES):
        raise UnsupportedSlideError(f"{name}: DICOM transfer syntax {instance.syntax} is not read")
    plain = instance.syntax in PLAIN_SYNTAXES
    if plain and (instance.colour != "RGB" or instance.number("PlanarConfiguration", 0) != 0):
        raise UnsupportedSlideError(f"{name}: uncompressed frames are read as interleaved RGB only")
