"""What a CZI file holds: scenes, channels, focal planes, light, resolution. Refusals here are final."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from wsi_pipe.errors import NotAPictureError, UnsupportedSlideError
from wsi_pipe.geometry import FloatPair
from wsi_pipe.slides.czi.segments import SubBlock
from wsi_pipe.slides.czi.tiles import BGR24, COMPRESSIONS, PIXEL_TYPES
from wsi_pipe.slides.tiff.layout import parse_xml
from wsi_pipe.slides.tiff.ome import TRANSMITTED

__all__ = ["Facts", "facts_of", "one_plane", "one_scene"]

SINGLE = {"C": "channels", "T": "time points", "H": "phases", "I": "illuminations", "V": "views", "R": "rotations"}
"""Dimensions of which a slide has one, and what several are."""

NOT_BRIGHTFIELD = re.compile("fluor|confocal|laser|phase|dark ?field|dic|interference|polari", re.IGNORECASE)


@dataclass(frozen=True)
class Facts:
    """What the metadata state: (x, y) um/px, the objective's magnification, why it is no brightfield, "" if it is."""

    mpp: FloatPair | None = None
    power: float | None = None
    other_light: str = ""
    camera: str = ""


def facts_of(name: str, xml: str) -> Facts:
    """What the metadata state; nothing where they are missing or damaged."""
    try:
        root = parse_xml(name, xml)
    except UnsupportedSlideError:
        return Facts()
    sizes = [_number(root.find(f"./Metadata/Scaling/Items/Distance[@Id='{axis}']/Value"), 1e6) for axis in "XY"]
    mpp = None if sizes[0] is None or sizes[1] is None else (sizes[0], sizes[1])
    power = _number(root.find("./Metadata/Information/Instrument/Objectives/Objective/NominalMagnification"), 1.0)
    return Facts(mpp, power, _light(root))


def _number(element: Element | None, factor: float) -> float | None:
    try:
        value = float(element.text or "") * factor if element is not None else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def _light(root: Element) -> str:
    for channel in root.findall("./Metadata/Information/Image/Dimensions/Channels/Channel"):
        for tag in ("IlluminationType", "ContrastMethod", "AcquisitionMode"):
            text = (channel.findtext(tag) or "").strip()
            if NOT_BRIGHTFIELD.search(text):
                return f"{tag} is {text}"
        texts = (channel.findtext(tag) or "" for tag in ("IlluminationType", "ContrastMethod", "Fluor"))
        if TRANSMITTED.search(" ".join((channel.get("Name") or "", *texts))):
            continue
        if (channel.findtext("Fluor") or "").strip() or channel.find("EmissionWavelength") is not None:
            return "its channel is fluorescent"
    return ""


def one_scene(name: str, subblocks: Sequence[SubBlock], scene: int | None) -> tuple[list[SubBlock], list[str]]:
    """The tiles of one scene, and what is to be said.

    Raises NotAPictureError where there are several and none is asked for, or not that one.
    """
    scenes = sorted({tile.dimensions["S"] for tile in subblocks if "S" in tile.dimensions})
    if len(scenes) < 2:
        if scene not in (None, 0) and scene not in scenes:
            raise NotAPictureError(f"{name}: --scene {scene} was asked for, but the file holds one scene")
        return list(subblocks), []
    if scene is None:
        listed = ", ".join(f"{number} ({_extent(subblocks, number)})" for number in scenes[:20])
        raise NotAPictureError(
            f"{name}: the file holds {len(scenes)} scenes: {listed}",
            remedy="say which with --scene N, or in the column scene of a slide list",
        )
    if scene not in scenes:
        raise NotAPictureError(
            f"{name}: --scene {scene} was asked for, but the file holds the scenes {', '.join(map(str, scenes))}"
        )
    # Coarse tiles that cover several scenes have no S.
    return [tile for tile in subblocks if tile.dimensions.get("S") == scene], [
        f"scene {scene} of {len(scenes)} is read"
    ]


def _extent(subblocks: Sequence[SubBlock], scene: int) -> str:
    tiles = [tile for tile in subblocks if tile.dimensions.get("S") == scene]
    sides = [max(tile.at[i] + tile.size_px[i] for tile in tiles) - min(tile.at[i] for tile in tiles) for i in (0, 1)]
    return f"{sides[0]} x {sides[1]} px"


def one_plane(name: str, subblocks: Sequence[SubBlock], z: int | None) -> tuple[list[SubBlock], list[str]]:
    """The tiles of one focal plane in 8-bit colour, and what is to be said.

    Raises NotAPictureError where they are something else than one brightfield picture, or there is no such plane,
    UnsupportedSlideError where their compression is not read.
    """
    for axis, what in SINGLE.items():
        count = len({tile.dimensions.get(axis, 0) for tile in subblocks})
        if count > 1:
            raise NotAPictureError(
                f"{name}: {count} {what}, where a slide has one", remedy="export the brightfield picture by itself"
            )
    types = {tile.pixel_type for tile in subblocks}
    if types != {BGR24}:
        listed = ", ".join(sorted(PIXEL_TYPES.get(code, f"type {code}") for code in types))
        raise NotAPictureError(
            f"{name}: pixels of {listed}, only 8-bit colour is read", remedy="export it in 8-bit colour"
        )
    unknown = sorted({tile.compression for tile in subblocks} - COMPRESSIONS.keys())
    if unknown:
        raise UnsupportedSlideError(f"{name}: CZI compression {unknown[0]} is not read")
    planes = sorted({tile.dimensions.get("Z", 0) for tile in subblocks})
    if len(planes) == 1:
        if z not in (None, 0):
            raise NotAPictureError(f"{name}: --z {z} was asked for, but the file has one focal plane")
        return list(subblocks), []
    if z is not None and z >= len(planes):
        raise NotAPictureError(
            f"{name}: --z {z} was asked for, but the slide has {len(planes)} focal planes",
            remedy=f"give 0 to {len(planes) - 1}",
        )
    number = (len(planes) - 1) // 2 if z is None else z
    how = "the middle one is read (--z N takes another)" if z is None else "as asked for"
    chosen = [tile for tile in subblocks if tile.dimensions.get("Z", 0) == planes[number]]
    return chosen, [f"focal plane {number} of 0 to {len(planes) - 1}, {how}"]
