"""Leica SCN: a picture of tissue at an offset on a larger canvas, the collection, which other tools call the slide.

The canvas and the offset are in nanometres. Level 0 is the canvas here too, so that coordinates are those of OpenSlide,
and as there the picture begins at the whole pixel below its offset. The canvas is cut into blocks where the picture's
own tiles lie, so that each is decoded once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from wsi_pipe.errors import NotAPictureError, UnsupportedSlideError
from wsi_pipe.geometry import IntPair
from wsi_pipe.slides.base import WHITE, RGBArray, paste
from wsi_pipe.slides.storage.source import Source
from wsi_pipe.slides.tiff.ifd import Directory
from wsi_pipe.slides.tiff.image import TiffImage
from wsi_pipe.slides.tiff.layout import TiffLayout, icc_profile, parse_xml, positive, resolution_mpp
from wsi_pipe.slides.tiff.picture import only_plane, pick_plane, pick_scan
from wsi_pipe.slides.tiff.samples import check_samples

__all__ = ["SCN_NAMESPACE", "OffsetImage", "ScnScan", "choose_scan", "read_scn"]

SCN_NAMESPACE = "http://www.leica-microsystems.com/scn/2010/10/01"


class OffsetImage:
    """A TIFF image at ``offset_px`` of a white canvas of ``size_px``; its tiles are blocks of the canvas."""

    def __init__(self, image: TiffImage, offset_px: IntPair, size_px: IntPair) -> None:
        self.image = image
        self.offset_px = offset_px
        self.size_px = size_px
        self.block_px = image.block_px
        self.origin_px = (-(-offset_px[0] % image.block_px[0]), -(-offset_px[1] % image.block_px[1]))
        # A codec's reduction would begin at the picture's corner, which need not lie on the reduced canvas's grid.
        self.reduces: tuple[int, ...] = (1,)

    def _tile(self, cell: IntPair) -> IntPair:
        """The picture's tile (column, row) that is a block of the canvas; one beyond its own where there is none."""
        first = [(o - c) // b for o, c, b in zip(self.offset_px, self.origin_px, self.block_px, strict=True)]
        return (cell[0] - first[0], cell[1] - first[1])

    def fetch(self, cells: Sequence[IntPair]) -> list[Any]:
        """See NativeImage.fetch."""
        tiles = [self._tile(cell) for cell in cells]
        columns, rows = (-(-s // b) for s, b in zip(self.image.size_px, self.block_px, strict=True))
        there = [0 <= column < columns and 0 <= row < rows for column, row in tiles]
        data = iter(self.image.fetch([tile for tile, yes in zip(tiles, there, strict=True) if yes]))
        return [next(data) if yes else None for yes in there]

    def probe(self) -> None:
        """See ProbedImage.probe."""
        self.image.probe()

    def decode(self, cell: IntPair, data: Any, reduce: int) -> RGBArray:
        """See NativeImage.decode."""
        tile = self._tile(cell)
        width, height = (s - t * b for s, t, b in zip(self.image.size_px, tile, self.block_px, strict=True))
        pixels = self.image.decode(tile, data, 1)
        if width >= self.block_px[0] and height >= self.block_px[1]:
            return pixels
        # The rest of an edge tile, which holds anything, is canvas.
        out = np.full((self.block_px[1], self.block_px[0], 3), WHITE, np.uint8)
        paste(out, pixels[:height, :width], 0, 0)
        return out


@dataclass(frozen=True)
class _Picture:
    """An image of the collection; sizes and offset in nm, dimensions as (ifd, width, height, depth), largest first."""

    name: str
    size_nm: IntPair
    offset_nm: IntPair
    dimensions: tuple[tuple[int, int, int, int], ...]
    illumination: str
    objective: float | None

    @property
    def depths(self) -> tuple[int, ...]:
        """The focal planes that are there, in order."""
        return tuple(sorted({depth for *_, depth in self.dimensions}))

    def at_depth(self, depth: int) -> _Picture:
        """The same with the dimensions of one focal plane."""
        return replace(self, dimensions=tuple(d for d in self.dimensions if d[3] == depth))


@dataclass(frozen=True)
class ScnScan:
    """What is to be read of an SCN file. main: the picture, in its focal plane. macro: directory, or None.
    scans, planes: how many there are to choose from. notes: see SlideInfo. scanned_nm: corners (x0, y0, x1, y1) of the
    box around all brightfield scans, to which OpenSlide and QuPath crop, whichever is read."""

    main: _Picture
    macro: int | None
    canvas_nm: IntPair
    scans: int
    planes: int
    notes: tuple[str, ...]
    scanned_nm: tuple[int, int, int, int]


def choose_scan(source: Source, text: str, scene: int | None, z: int | None) -> ScnScan:
    """The scan and focal plane that are meant. Raises NotAPictureError where several are there and none is named, where
    it is not there, or where the file says that its light is no brightfield."""
    name = source.name
    collection = parse_xml(name, text).find(f"{{{SCN_NAMESPACE}}}collection")
    if collection is None:
        raise UnsupportedSlideError(f"{name}: the Leica description has no collection")
    canvas = (_whole(source, collection, "sizeX"), _whole(source, collection, "sizeY"))
    pictures = [_picture(source, e) for e in collection.findall(f"{{{SCN_NAMESPACE}}}image")]
    macros = [p for p in pictures if p.offset_nm == (0, 0) and p.size_nm == canvas and len(pictures) > 1]
    others = [p for p in pictures if p not in macros]
    if not others:
        raise UnsupportedSlideError(f"{name}: the Leica description has no main image")
    mains = [p for p in others if p.illumination == "brightfield"]
    if not mains:
        lights = ", ".join(dict.fromkeys(p.illumination or "no stated light" for p in others))
        raise NotAPictureError(
            f"{name}: 0 brightfield main images, its pictures are taken by {lights}", remedy="give a brightfield slide"
        )
    described = [
        f"{p.dimensions[0][1]} x {p.dimensions[0][2]} px at {p.size_nm[0] / p.dimensions[0][1] / 1000:.4g} um/px"
        + (f" ({p.name})" if p.name else "")
        for p in mains
    ]
    main = mains[pick_scan(name, described, scene, what="brightfield main images")]
    notes = [
        f"a picture of {p.dimensions[0][1]} x {p.dimensions[0][2]} px is left out: it is taken by "
        f"{p.illumination or 'no stated light'}"
        for p in others
        if p not in mains
    ]
    planes = main.depths
    if len(planes) > 1:
        number, note = pick_plane(name, len(planes), z)
        notes.append(note)
    else:
        only_plane(name, z)
        number = 0
    macro = macros[0].dimensions[0][0] if macros else None
    scanned = (
        min(p.offset_nm[0] for p in mains),
        min(p.offset_nm[1] for p in mains),
        max(p.offset_nm[0] + p.size_nm[0] for p in mains),
        max(p.offset_nm[1] + p.size_nm[1] for p in mains),
    )
    plane = main.at_depth(planes[number])
    return ScnScan(plane, macro, canvas, len(mains), len(planes), tuple(notes), scanned)


def read_scn(
    source: Source, directories: Sequence[Directory], text: str, scene: int | None = None, z: int | None = None
) -> TiffLayout:
    """The layout of an SCN file. Raises as ``choose_scan``, UnsupportedSlideError where it is not understood."""
    scan = choose_scan(source, text, scene, z)
    main, canvas = scan.main, scan.canvas_nm
    check_samples(source.name, _directory(source, directories, main.dimensions[0][0]))
    images: list[OffsetImage] = []
    for ifd, width, height, _ in main.dimensions:
        image = TiffImage(source, _directory(source, directories, ifd))
        if image.size_px != (width, height):
            raise UnsupportedSlideError(f"{source.name}: image {ifd} is not the {width} x {height} px described")
        nm_per_px = main.size_nm[0] / width
        origin = (math.floor(main.offset_nm[0] / nm_per_px), math.floor(main.offset_nm[1] / nm_per_px))
        size = (math.ceil(canvas[0] / nm_per_px), math.ceil(canvas[1] / nm_per_px))
        if any(o < 0 or o + n > s + 1 for o, n, s in zip(origin, image.size_px, size, strict=True)):
            raise UnsupportedSlideError(f"{source.name}: the main image does not lie within the collection")
        images.append(OffsetImage(image, origin, size))
    first = _directory(source, directories, main.dimensions[0][0])
    mpp, mpp_source = resolution_mpp(first)
    if mpp is None:
        mpp = (main.size_nm[0] / main.dimensions[0][1] / 1000, main.size_nm[1] / main.dimensions[0][2] / 1000)
        mpp_source = "leica.view"
    return TiffLayout(
        vendor="leica",
        description=f"Leica SCN with {images[0].image.codec} tiles",
        images=images,
        mpp=mpp,
        mpp_source=mpp_source,
        objective_power=main.objective,
        icc=icc_profile(first),
        associated={} if scan.macro is None else {"macro": _directory(source, directories, scan.macro)},
        bounds_l0=_bounds(scan, images[0]),
        notes=scan.notes,
    )


def _bounds(scan: ScnScan, image: OffsetImage) -> tuple[int, int, int, int]:
    """(x, y, width, height) of the scanned part in level-0 pixels: all scans of the file, as QuPath crops to them."""
    if scan.scans == 1:
        return (*image.offset_px, *image.image.size_px)
    nm_per_px = scan.main.size_nm[0] / image.image.size_px[0]
    x0, y0 = (math.floor(edge / nm_per_px) for edge in scan.scanned_nm[:2])
    x1, y1 = (math.ceil(edge / nm_per_px) for edge in scan.scanned_nm[2:])
    return (x0, y0, min(x1, image.size_px[0]) - x0, min(y1, image.size_px[1]) - y0)


def _picture(source: Source, element: Element) -> _Picture:
    view = element.find(f"{{{SCN_NAMESPACE}}}view")
    pixels = element.find(f"{{{SCN_NAMESPACE}}}pixels")
    if view is None or pixels is None:
        raise UnsupportedSlideError(f"{source.name}: the Leica description has an image without size")
    dimensions = [
        (_whole(source, d, "ifd"), _whole(source, d, "sizeX"), _whole(source, d, "sizeY"), _whole(source, d, "z", "0"))
        for d in pixels.findall(f"{{{SCN_NAMESPACE}}}dimension")
    ]
    if not dimensions or any(width < 1 or height < 1 for _, width, height, _ in dimensions):
        raise UnsupportedSlideError(f"{source.name}: the Leica description has an image without dimensions")
    return _Picture(
        element.get("name", ""),
        (_whole(source, view, "sizeX"), _whole(source, view, "sizeY")),
        (_whole(source, view, "offsetX"), _whole(source, view, "offsetY")),
        tuple(sorted(dimensions, key=lambda d: -d[1])),
        _first_text(element, "illuminationSource"),
        positive(_first_text(element, "objective")),
    )


def _first_text(element: Element, name: str) -> str:
    return next(((e.text or "").strip() for e in element.iter(f"{{{SCN_NAMESPACE}}}{name}")), "")


def _whole(source: Source, element: Element, name: str, default: str = "") -> int:
    text = element.get(name, default).strip()
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise UnsupportedSlideError(
            f"{source.name}: the Leica description states no {name}, or none that is understood"
        )
    return int(text)


def _directory(source: Source, directories: Sequence[Directory], index: int) -> Directory:
    if index >= len(directories):
        raise UnsupportedSlideError(f"{source.name}: the Leica description names image {index} of {len(directories)}")
    return directories[index]
