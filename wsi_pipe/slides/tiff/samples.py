"""What the samples of a TIFF image mean: 8-bit grey or colours, which every reader may take, or anything else.

The check stands before all readers: OpenSlide hands any TIFF to libtiff, which makes a picture of 16 bits, signed
numbers and five samples too, and none of them is the one that was stored.
"""

from __future__ import annotations

from wsi_pipe.errors import NotAPictureError, UnsupportedSlideError
from wsi_pipe.slides.tiff.ifd import Directory

__all__ = ["check_samples", "colour_samples"]

BITS, COMPRESSION, PHOTOMETRIC, SAMPLES, EXTRA_SAMPLES, SAMPLE_FORMAT, DEPTH = 258, 259, 262, 277, 338, 339, 32997
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, YCBCR = 0, 1, 2, 3, 6
JPEG_KINDS = (6, 7, 33003, 33005, 34712)

_COLOUR_SAMPLES = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, PALETTE: 1, RGB: 3, YCBCR: 3}
_COLOUR_NAMES = {
    4: "a transparency mask", 5: "separated inks (CMYK)", 8: "CIE L*a*b*", 9: "ICC L*a*b*", 10: "ITU L*a*b*",
    32803: "a raw sensor image", 32844: "logarithmic luminance", 32845: "logarithmic luminance", 34892: "linear raw",
}  # fmt: skip
_KINDS = {1: "uint", 2: "int", 3: "float", 5: "complex-int", 6: "complex"}

FOREIGN_TAGS = {
    34412: "a Zeiss LSM confocal scan",
    33628: "a MetaMorph stack",
    33629: "a MetaMorph stack",
    34361: "a MediaCybernetics sequence",
    65330: "an Olympus SIS picture of several channels or planes",
}
"""Private tags of programs that store channels, planes and times in ways that no other tag states."""

_EXPORT = "export the picture that is meant as 8-bit RGB"


def colour_samples(directory: Directory) -> int:
    """1 for grey and palette, 3 for colours, 0 for anything else."""
    return _COLOUR_SAMPLES.get(directory.number(PHOTOMETRIC, BLACK_IS_ZERO), 0)


def check_samples(name: str, directory: Directory) -> None:
    """Raise NotAPictureError unless an image holds 8-bit unsigned RGB, RGBA, grey (with alpha) or palette samples."""
    where = f"{name}: image {directory.index}"
    for tag, kind in FOREIGN_TAGS.items():
        if tag in directory:
            raise NotAPictureError(f"{name}: {kind}, not one RGB picture", remedy=_EXPORT)
    try:
        samples, photometric = directory.number(SAMPLES, 1), directory.number(PHOTOMETRIC, BLACK_IS_ZERO)
        depth, compression = directory.number(DEPTH, 1), directory.number(COMPRESSION, 1)
    except UnsupportedSlideError:
        # A damaged tag says nothing of what the samples mean; readers see to it.
        return
    bits = directory.numbers(BITS) or ((8,) if compression in JPEG_KINDS else (1,))
    formats = directory.numbers(SAMPLE_FORMAT) or (1,)
    if any(b != 8 for b in bits) or any(f != 1 for f in formats):
        stated = "/".join(dict.fromkeys(str(b) for b in bits))
        kinds = "/".join(dict.fromkeys(f"{_KINDS[f]}{bits[0]}" if f in _KINDS else f"format {f}" for f in formats))
        raise NotAPictureError(
            f"{where}: {stated}-bit {kinds} samples; only 8-bit unsigned ones are read, since how others map to a "
            "picture is not stated",
            remedy="export it as 8-bit RGB with the contrast that is meant",
        )
    if depth > 1:
        raise NotAPictureError(f"{where}: a volume of {depth} slices, not one picture", remedy=_EXPORT)
    wanted = _COLOUR_SAMPLES.get(photometric, 0)
    if not wanted:
        kind = _COLOUR_NAMES.get(photometric, f"photometric {photometric}")
        raise NotAPictureError(f"{where}: {kind} is not grey or RGB", remedy="export it as 8-bit RGB")
    # One sample more is alpha, or of no stated meaning beside RGB; beside grey it is another stain.
    extra = directory.numbers(EXTRA_SAMPLES)
    stated_extra = extra if len(extra) == samples - wanted else (0,) * max(samples - wanted, 0)
    known = stated_extra in ((), (1,), (2,)) or (stated_extra == (0,) and wanted == 3)
    if samples < wanted or not known:
        raise NotAPictureError(
            f"{where}: {samples} samples a pixel are not grey or RGB", remedy="export it as 8-bit RGB"
        )
