"""What OME-Zarr metadata say: axes, levels, scales, units, channels, series (NGFF 0.4 and 0.5, and older ones).

Reference: https://ngff.openmicroscopy.org/0.5, sections multiscales, coordinateTransformations, omero,
bioformats2raw.layout.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wsi_pipe.errors import NotAPictureError, UnsupportedSlideError
from wsi_pipe.slides.tiff.ome import NO_NAME, TRANSMITTED

__all__ = ["Dataset", "Multiscale", "check_channels", "multiscale_of", "ome_of", "series_of"]

VERSIONS = ("0.1", "0.2", "0.3", "0.4", "0.5")
MAX_LEVELS = 64
MAX_SERIES = 1000

_UM_PER_UNIT = {
    "kilometer": 1e9, "meter": 1e6, "decimeter": 1e5, "centimeter": 1e4, "millimeter": 1e3, "micrometer": 1.0,
    "nanometer": 1e-3, "picometer": 1e-6, "angstrom": 1e-4, "inch": 25400.0, "foot": 304800.0,
}  # fmt: skip
_SHORT = {"m": "meter", "cm": "centimeter", "mm": "millimeter", "um": "micrometer", "µm": "micrometer",
          "μm": "micrometer", "micron": "micrometer", "nm": "nanometer"}  # fmt: skip

FLUORESCENCE = re.compile(
    r"dapi|hoechst|fitc|tritc|texas|rhodamine|alexa|\bgfp|\brfp|\byfp|\bcfp|mcherry|\bcy ?[2357]\b|spectrum|opal|fluor|"
    r"\baf ?\d{3}\b|\bex ?\d{3}|\b\d{3} ?nm\b",
    re.IGNORECASE,
)
"""Names of channels that are stained with something that glows."""

_COLOURS = (re.compile(r"\b(?:r|red)\b"), re.compile(r"\b(?:g|green)\b"), re.compile(r"\b(?:b|blue)\b"))


@dataclass(frozen=True)
class Dataset:
    """An array of a multiscale image. scale, translation: one number an axis, in the axes' units."""

    path: str
    scale: tuple[float, ...]
    translation: tuple[float, ...]


@dataclass(frozen=True)
class Multiscale:
    """One image at several scales. axes: names in small letters, in the order of the arrays' dimensions. um: what a
    unit of each axis is in micrometres, None where no unit of length is stated. stated: whether levels state their
    scale. notes: for the user."""

    axes: tuple[str, ...]
    um: tuple[float | None, ...]
    datasets: tuple[Dataset, ...]
    stated: bool
    notes: tuple[str, ...]

    def axis(self, name: str) -> int | None:
        """The dimension of an axis, None where it has no such axis."""
        return self.axes.index(name) if name in self.axes else None


def ome_of(attributes: Mapping[str, Any]) -> Mapping[str, Any]:
    """The OME metadata among a group's attributes: under "ome" from version 0.5 on."""
    inner = attributes.get("ome")
    return inner if isinstance(inner, Mapping) else attributes


def series_of(name: str, ome: Mapping[str, Any], listed: Mapping[str, Any] | None) -> list[str] | None:
    """The paths of the images in a collection (bioformats2raw.layout), None where the store is one image.

    listed: the metadata of its OME group, which names the series, if there is one.
    """
    if "multiscales" in ome:
        return None
    if "plate" in ome or "well" in ome:
        raise NotAPictureError(f"{name}: a plate of many fields, not a slide", remedy="give one image of the store")
    if "bioformats2raw.layout" not in ome:
        raise UnsupportedSlideError(
            f"{name}: a Zarr group without OME metadata (multiscales)", remedy="give the folder of an OME-Zarr image"
        )
    series = (listed or {}).get("series")
    if not isinstance(series, list):
        # Without a list, series are numbered; whoever asks finds out how many there are.
        return []
    if len(series) > MAX_SERIES:
        raise UnsupportedSlideError(f"{name}: {len(series)} series are out of bounds")
    return [_path(name, path) for path in series]


def _path(name: str, path: object) -> str:
    text = str(path)
    parts = text.split("/")
    if not text or text.startswith("/") or "\\" in text or any(part in ("", ".", "..") for part in parts):
        raise UnsupportedSlideError(f"{name}: the path {text!r} in the OME metadata leads out of the store")
    return text


def multiscale_of(name: str, ome: Mapping[str, Any]) -> Multiscale:
    """The image of a group. Raises UnsupportedSlideError where its metadata are missing, damaged or too new."""
    try:
        return _multiscale(name, ome)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, UnsupportedSlideError):
            raise
        raise UnsupportedSlideError(
            f"{name}: the OME metadata are damaged: {type(error).__name__}: {error}", remedy="write the store again"
        ) from error


def _multiscale(name: str, ome: Mapping[str, Any]) -> Multiscale:
    images = ome["multiscales"]
    image = images[0]
    version = str(image.get("version") or ome.get("version") or "0.4")
    if version not in VERSIONS:
        raise UnsupportedSlideError(f"{name}: OME-Zarr version {version} is not read, only up to {VERSIONS[-1]}")
    axes, um = _axes(name, image.get("axes"))
    datasets = image["datasets"]
    if not 0 < len(datasets) <= MAX_LEVELS:
        raise UnsupportedSlideError(f"{name}: {len(datasets)} levels are out of bounds")
    whole = _transform(name, image.get("coordinateTransformations"), len(axes))
    levels = []
    for dataset in datasets:
        own = _transform(name, dataset.get("coordinateTransformations"), len(axes))
        scale = tuple(a * b for a, b in zip(own[0], whole[0], strict=True))
        # The image's own transformation comes after that of the level.
        moved = tuple(t * s + m for t, s, m in zip(own[1], whole[0], whole[1], strict=True))
        levels.append(Dataset(_path(name, dataset["path"]), scale, moved))
    stated = all(d.get("coordinateTransformations") for d in datasets)
    notes = [] if len(images) == 1 else [f"the first of {len(images)} multiscale images of the group is read"]
    return Multiscale(axes, um if stated else (None,) * len(axes), tuple(levels), stated, tuple(notes))


def _axes(name: str, axes: Any) -> tuple[tuple[str, ...], tuple[float | None, ...]]:
    if axes is None:
        # Up to 0.2 there were always five.
        axes = ["t", "c", "z", "y", "x"]
    if not isinstance(axes, Sequence) or not 2 <= len(axes) <= 5:
        raise UnsupportedSlideError(f"{name}: the axes of the OME metadata are not understood")
    names, um = [], []
    for axis in axes:
        named = axis if isinstance(axis, str) else str(axis["name"])
        unit = "" if isinstance(axis, str) else str(axis.get("unit") or "").lower()
        names.append(named.lower())
        um.append(_UM_PER_UNIT.get(_SHORT.get(unit, unit).replace("metre", "meter")))
    if len(set(names)) != len(names) or not {"x", "y"} <= set(names) <= {"x", "y", "z", "c", "t"}:
        raise UnsupportedSlideError(f"{name}: the axes {', '.join(names)} are not those of a picture")
    return tuple(names), tuple(um)


def _transform(name: str, steps: Any, axes: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(scale, translation) of a list of coordinate transformations, which are applied in their order."""
    scale, moved = [1.0] * axes, [0.0] * axes
    for step in steps or []:
        kind = step["type"]
        if kind == "identity":
            continue
        if kind not in ("scale", "translation") or kind not in step:
            raise UnsupportedSlideError(f"{name}: a coordinate transformation of the type {kind!r} is not read")
        values = [float(value) for value in step[kind]]
        if len(values) != axes or not all(map(math.isfinite, values)):
            raise UnsupportedSlideError(f"{name}: a {kind} of {len(values)} numbers for {axes} axes")
        if kind == "scale":
            if min(values) <= 0:
                raise UnsupportedSlideError(f"{name}: a scale that is not above zero")
            scale = [a * b for a, b in zip(scale, values, strict=True)]
            moved = [a * b for a, b in zip(moved, values, strict=True)]
        else:
            moved = [a + b for a, b in zip(moved, values, strict=True)]
    return tuple(scale), tuple(moved)


def check_channels(name: str, count: int, dtype: str, ome: Mapping[str, Any], *, rgb: bool = False) -> bool:
    """Whether an image is said to be red, green and blue; where nothing is said of its channels, it is not.

    rgb: its OME-XML says so, whatever its channels are called. Raises NotAPictureError where it is said to be something
    else, or is not of 8 bits.
    """
    if dtype != "uint8":
        raise NotAPictureError(
            f"{name}: pixels of type {dtype} are not read, only 8-bit colour", remedy="export the slide as 8-bit RGB"
        )
    if count != 3:
        what = "1 channel, of several or a stain without its colour," if count == 1 else f"{count} channels"
        raise NotAPictureError(
            f"{name}: {what} where a slide has red, green and blue", remedy="export the slide as 8-bit RGB"
        )
    omero = ome.get("omero")
    channels = omero.get("channels") if isinstance(omero, Mapping) else None
    if not isinstance(channels, list):
        return False
    labels = [str(c.get("label") or "") for c in channels if isinstance(c, Mapping)]
    glowing = [label for label in labels if FLUORESCENCE.search(label)]
    if glowing:
        raise NotAPictureError(f"{name}: fluorescence channels ({', '.join(labels)}), no brightfield picture")
    colours = [str(c.get("color") or "").lstrip("#").upper()[:6] for c in channels if isinstance(c, Mapping)]
    if len(set(colours)) > 1 and colours != ["FF0000", "00FF00", "0000FF"]:
        raise NotAPictureError(
            f"{name}: channels in the colours {', '.join(colours)}, not red, green and blue", remedy="export it as RGB"
        )
    words = [label.strip().lower() for label in labels]
    if len(words) == 3 and all(colour.search(word) for word, colour in zip(words, _COLOURS, strict=True)):
        return True
    # Some writers give the picture's name to all three.
    if (
        not rgb
        and len(set(words)) > 1
        and not all(NO_NAME.fullmatch(word) or TRANSMITTED.search(word) for word in words)
    ):
        raise NotAPictureError(
            f"{name}: channels named {', '.join(labels)}, not red, green and blue in this order",
            remedy="export it as RGB",
        )
    return False
