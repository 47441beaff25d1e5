"""Which series of a collection is the slide: what OME-XML and names say of labels, macro images and channels.

bioformats2raw keeps a file's OME-XML as OME/METADATA.ome.xml, with an Image for each series in their order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from wsi_pipe.errors import NotAPictureError, SlideError, UnsupportedSlideError
from wsi_pipe.geometry import IntPair
from wsi_pipe.slides.tiff.layout import parse_xml
from wsi_pipe.slides.tiff.ome import TRANSMITTED
from wsi_pipe.slides.zarr.multiscales import FLUORESCENCE, Multiscale
from wsi_pipe.slides.zarr.store import GuardedStore, reading

__all__ = ["Described", "Series", "associated_kind", "choose", "fluorescent", "names_of"]

XML = "OME/METADATA.ome.xml"
SMALL = 16
"""A series of so many times fewer pixels than the largest, without levels, is a label or macro image."""


@dataclass(frozen=True)
class Series:
    """An image of a store: the path of its group, its OME metadata, what they say, notes for the user, and whether the
    OME-XML says that it is in colour."""

    path: str
    ome: Mapping[str, Any]
    image: Multiscale
    notes: tuple[str, ...]
    rgb: bool = False


@dataclass(frozen=True)
class Described:
    """What OME-XML says of an image: its name, why it is no brightfield picture, "" where it may be one, and whether
    one channel has three samples, which is colour."""

    name: str
    other: str
    rgb: bool


def names_of(store: GuardedStore) -> list[Described]:
    """The images of the store's OME-XML, in their order; none where there is none or it is damaged."""
    try:
        with reading(store.name, XML):
            value = sync(store.get(XML, default_buffer_prototype()))
        if value is None:
            return []
        root = parse_xml("OME-XML", value.to_bytes().decode("utf-8", "replace"))
    except (SlideError, UnsupportedSlideError):
        return []
    images = [element for element in root.iter() if element.tag.rpartition("}")[2] == "Image"]
    return [Described(image.get("Name", ""), _other(image), _is_rgb(image)) for image in images]


def _is_rgb(image: Any) -> bool:
    channels = [element for element in image.iter() if element.tag.rpartition("}")[2] == "Channel"]
    return len(channels) == 1 and channels[0].get("SamplesPerPixel") == "3"


def _other(image: Any) -> str:
    for channel in image.iter():
        if channel.tag.rpartition("}")[2] != "Channel":
            continue
        if channel.get("SamplesPerPixel") == "3":
            return ""
        for name in ("IlluminationType", "ContrastMethod", "AcquisitionMode"):
            if re.search("fluor|confocal|phase|darkfield|dic", channel.get(name, ""), re.IGNORECASE):
                return f"{name} is {channel.get(name)}"
        said = " ".join(channel.get(key, "") for key in ("IlluminationType", "ContrastMethod", "Name", "Fluor"))
        if not TRANSMITTED.search(said) and (channel.get("EmissionWavelength") or channel.get("Fluor")):
            return "its channels are fluorescent"
        if FLUORESCENCE.search(channel.get("Name", "")):
            return f"it has a channel {channel.get('Name')!r}"
    return ""


def fluorescent(name: str, described: Sequence[Described], number: int) -> None:
    """Raise NotAPictureError where the OME-XML says that a series is no brightfield picture."""
    if number < len(described) and described[number].other:
        raise NotAPictureError(
            f"{name}: the OME-XML declares no brightfield picture: {described[number].other}",
            remedy="give a brightfield slide",
        )


def associated_kind(name: str) -> str | None:
    """What a series is beside the slide, by its name: label, macro, thumbnail; None for a scan."""
    text = name.lower()
    return next((kind for kind in ("label", "macro", "thumbnail", "overview") if re.search(rf"\b{kind}\b", text)), None)


def choose(
    name: str, series: Sequence[Series], sizes: Sequence[IntPair], described: Sequence[Described], scene: int | None
) -> tuple[int, str]:
    """The number of the series to read, and what is to be said of it.

    Without ``scene`` it is the only one that is neither named nor looks like a label or macro image. Raises
    NotAPictureError where there are several, or there is no such series.
    """
    if scene is not None:
        if scene >= len(series):
            raise NotAPictureError(
                f"{name}: --scene {scene} was asked for, but the store holds {len(series)} series",
                remedy=f"give 0 to {len(series) - 1}",
            )
        return scene, f"series {scene} of {len(series)}, as asked for" if len(series) > 1 else ""
    largest = max(width * height for width, height in sizes)
    scans = [
        i
        for i, (width, height) in enumerate(sizes)
        if associated_kind(described[i].name if i < len(described) else "") is None
        and (len(series[i].image.datasets) > 1 or width * height * SMALL > largest)
    ]
    if len(scans) == 1:
        others = [f"{i} ({w} x {h} px)" for i, (w, h) in enumerate(sizes) if i != scans[0]]
        note = f"series {scans[0]} is read; series {', '.join(others)} are taken for label or macro images"
        return scans[0], note if others else ""
    listed = ", ".join(f"{i} ({sizes[i][0]} x {sizes[i][1]} px)" for i in scans)
    raise NotAPictureError(
        f"{name}: the store holds {len(scans)} scans: series {listed}",
        remedy="say which with --scene N, or in the column scene of a slide list",
    )
