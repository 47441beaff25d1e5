"""Recognising TIFF slides: which images are the levels, and what the vendor says of resolution and origin.

Structure and names follow what the vendors' files and OpenSlide's documentation of formats describe.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree.ElementTree import Element

from wsi_pipe.errors import UnsupportedSlideError
from wsi_pipe.geometry import FloatPair
from wsi_pipe.slides.storage.source import Source
from wsi_pipe.slides.tiff.gaps import fill_gaps
from wsi_pipe.slides.tiff.ifd import SUB_IFDS, Directory, read_directory
from wsi_pipe.slides.tiff.image import TILE_WIDTH, TiffImage
from wsi_pipe.slides.tiff.layout import (
    DESCRIPTION,
    SOFTWARE,
    SUBFILE,
    XMP,
    TiffLayout,
    icc_profile,
    parse_xml,
    positive,
    resolution_mpp,
)
from wsi_pipe.slides.tiff.ndpi import read_ndpi
from wsi_pipe.slides.tiff.scn import SCN_NAMESPACE, read_scn

__all__ = ["read_layout"]

MAX_SUB_IFDS = 64
OME_NAMESPACE = "http://www.openmicroscopy.org/Schemas/OME/"
_UM = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6, "Å": 1e-4, "pm": 1e-6}


def read_layout(source: Source, directories: Sequence[Directory]) -> TiffLayout:
    """Recognise the vendor and gather the levels. Raises UnsupportedSlideError with the reason where that fails."""
    first = directories[0]
    text, software = first.text(DESCRIPTION), first.text(SOFTWARE)
    if first.is_ndpi:
        return read_ndpi(source, directories)
    if text.startswith("Aperio"):
        return _aperio(source, directories, text)
    if software.startswith("Philips") and "DPUfsImport" in text[:4096]:
        return _philips(source, directories, text)
    if OME_NAMESPACE in text[:4096]:
        return _ome(source, first, text)
    if SCN_NAMESPACE in text[:4096]:
        return read_scn(source, directories, text)
    _refuse_overlaps(source, directories, software)
    return _generic(source, directories)


def _refuse_overlaps(source: Source, directories: Sequence[Directory], software: str) -> None:
    """Scanners whose tiles overlap, or lie at offsets that no TIFF tag states."""
    if software.startswith("MedScan"):
        raise UnsupportedSlideError(f"{source.name}: Trestle slides have overlapping tiles")
    if any(b"iScan" in d.raw(XMP)[: 1 << 20] for d in directories if d.count(XMP)):
        raise UnsupportedSlideError(f"{source.name}: Ventana slides have overlapping tiles")


def _aperio(source: Source, directories: Sequence[Directory], text: str) -> TiffLayout:
    tiled = [d for d in directories if TILE_WIDTH in d]
    if not tiled:
        raise UnsupportedSlideError(f"{source.name}: the Aperio slide has no tiled image")
    stored = [TiffImage(source, d) for d in tiled]
    images, left_out = fill_gaps(stored)
    note = "".join(f"; a level of {w} x {h} px with empty tiles is left out" for w, h in left_out)
    pairs = (part.split("=", 1) for part in text.split("|")[1:] if "=" in part)
    properties = {key.strip(): value.strip() for key, value in pairs}
    mpp = positive(properties.get("MPP"))
    associated = {}
    for i, directory in enumerate(directories):
        if TILE_WIDTH not in directory:
            # The second line of a description begins with the image's name; the second image is the thumbnail.
            lines = directory.text(DESCRIPTION).splitlines()
            words = lines[1].split() if len(lines) > 1 else []
            associated["thumbnail" if i == 1 else words[0] if words else f"image {i}"] = directory
    return TiffLayout(
        vendor="aperio",
        description=f"Aperio SVS with {stored[0].codec} tiles{note}",
        images=images,
        mpp=None if mpp is None else (mpp, mpp),
        mpp_source="none" if mpp is None else "aperio.MPP",
        objective_power=positive(properties.get("AppMag")),
        icc=icc_profile(directories[0]),
        properties={f"aperio.{key}": value for key, value in properties.items()},
        associated=associated,
    )


def _generic(source: Source, directories: Sequence[Directory]) -> TiffLayout:
    first = directories[0]
    if TILE_WIDTH not in first:
        raise UnsupportedSlideError(f"{source.name}: the first image of the TIFF file is not tiled")
    reduced = [d for d in directories[1:] if TILE_WIDTH in d and d.number(SUBFILE, 0) & 1]
    images = [TiffImage(source, first), *(TiffImage(source, d) for d in reduced)]
    images[1:] = sorted(images[1:], key=lambda image: -image.size_px[0])
    mpp, mpp_source = resolution_mpp(first)
    return TiffLayout(
        vendor="generic-tiff",
        description=f"tiled TIFF with {images[0].codec} tiles",
        images=images,
        mpp=mpp,
        mpp_source=mpp_source,
        icc=icc_profile(first),
    )


def _philips(source: Source, directories: Sequence[Directory], text: str) -> TiffLayout:
    scan = next((s for s in parse_xml(source.name, text).iter("DataObject") if _is_whole_slide(s)), None)
    if scan is None:
        raise UnsupportedSlideError(f"{source.name}: the Philips description names no whole-slide image")
    representations = _philips_attribute(scan, "PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE")
    spacings = [
        _philips_spacing(_philips_text(item, "DICOM_PIXEL_SPACING"))
        for item in ([] if representations is None else representations.findall("Array/DataObject"))
    ]
    names = {"Label": "label", "Macro": "macro"}
    kinds = [next((n for k, n in names.items() if d.text(DESCRIPTION).startswith(k)), None) for d in directories]
    levels = [d for d, kind in zip(directories, kinds, strict=True) if kind is None and TILE_WIDTH in d]
    if not levels or len(spacings) != len(levels) or None in spacings:
        raise UnsupportedSlideError(
            f"{source.name}: the Philips description states {len(spacings)} pixel spacings for {len(levels)} levels"
        )
    images = [TiffImage(source, levels[0])]
    width, height = images[0].size_px
    known = [s for s in spacings if s is not None]
    for directory, (x, y) in zip(levels[1:], known[1:], strict=True):
        # The tags of a lower level count the padding up to whole tiles: its true size follows from the spacing.
        downsample = max(round((x / known[0][0] + y / known[0][1]) / 2), 1)
        images.append(TiffImage(source, directory, size_px=(width // downsample, height // downsample)))
    mpp = _philips_spacing(_philips_text(scan, "DICOM_PIXEL_SPACING")) or known[0]
    return TiffLayout(
        vendor="philips",
        description=f"Philips TIFF with {images[0].codec} tiles",
        images=images,
        mpp=mpp,
        mpp_source="philips.DICOM_PIXEL_SPACING",
        icc=icc_profile(levels[0]),
        associated={kind: d for d, kind in zip(directories, kinds, strict=True) if kind is not None},
    )


def _philips_attribute(item: Element, name: str) -> Element | None:
    return next((a for a in item.findall("Attribute") if a.get("Name") == name), None)


def _philips_text(item: Element, name: str) -> str:
    found = _philips_attribute(item, name)
    return "" if found is None else (found.text or "").strip()


def _is_whole_slide(item: Element) -> bool:
    return item.get("ObjectType") == "DPScannedImage" and _philips_text(item, "PIM_DP_IMAGE_TYPE") == "WSI"


def _philips_spacing(text: str) -> FloatPair | None:
    """(x, y) um/px from a pair of quoted millimetres, row spacing first."""
    parts = [positive(part) for part in text.replace('"', " ").split()]
    if len(parts) != 2 or parts[0] is None or parts[1] is None:
        return None
    return (parts[1] * 1000, parts[0] * 1000)


def _ome(source: Source, first: Directory, text: str) -> TiffLayout:
    root = parse_xml(source.name, text)
    image = next((e for e in root if _local(e) == "Image"), None)
    pixels = None if image is None else next((e for e in image if _local(e) == "Pixels"), None)
    if image is None or pixels is None:
        raise UnsupportedSlideError(f"{source.name}: the OME description has no image")
    _check_ome(source, pixels)
    main = TiffImage(source, first)
    stated = (pixels.get("SizeX"), pixels.get("SizeY"))
    if stated != (str(main.size_px[0]), str(main.size_px[1])) or main.samples != 3:
        raise UnsupportedSlideError(
            f"{source.name}: the OME description states {stated[0]} x {stated[1]} px, the first image of the file has "
            f"{main.size_px[0]} x {main.size_px[1]} with {main.samples} samples"
        )
    offsets = first.numbers(SUB_IFDS)
    if len(offsets) > MAX_SUB_IFDS:
        raise UnsupportedSlideError(f"{source.name}: the image has {len(offsets)} sub-images")
    subs = [read_directory(source, first, offset, f"0.{i}") for i, offset in enumerate(offsets)]
    images = [main, *(TiffImage(source, d) for d in subs if TILE_WIDTH in d)]
    x, y = _ome_length(pixels, "PhysicalSizeX"), _ome_length(pixels, "PhysicalSizeY")
    objective = next((e for e in root.iter() if _local(e) == "Objective"), None)
    return TiffLayout(
        vendor="ome",
        description=f"OME-TIFF with {main.codec} tiles" + (" in separate planes" if main.planar else ""),
        images=images,
        mpp=None if x is None or y is None else (x, y),
        mpp_source="none" if x is None or y is None else "ome.PhysicalSize",
        objective_power=None if objective is None else positive(objective.get("NominalMagnification")),
        icc=icc_profile(first),
    )


def _check_ome(source: Source, pixels: Element) -> None:
    axes = {name: pixels.get(name, "1") for name in ("SizeC", "SizeZ", "SizeT")}
    if axes != {"SizeC": "3", "SizeZ": "1", "SizeT": "1"}:
        stated = ", ".join(f"{name} {value}" for name, value in axes.items())
        raise UnsupportedSlideError(f"{source.name}: the OME image is not one RGB picture ({stated})")
    if pixels.get("Type", pixels.get("PixelType", "uint8")) != "uint8":
        raise UnsupportedSlideError(f"{source.name}: only 8-bit OME images are read, not {pixels.get('Type')}")
    blocks = [e for e in pixels if _local(e) == "TiffData"]
    if any(b.get("IFD", "0") != "0" for b in blocks[:1]):
        raise UnsupportedSlideError(f"{source.name}: the OME image does not begin with the file's first image")
    files = {u.get("FileName") for b in blocks for u in b if _local(u) == "UUID"}
    if len(files) > 1:
        raise UnsupportedSlideError(f"{source.name}: the OME image is spread over {len(files)} files")


def _local(element: Element) -> str:
    return re.sub(r"^\{.*\}", "", element.tag)


def _ome_length(pixels: Element, name: str) -> float | None:
    value, unit = positive(pixels.get(name)), _UM.get(pixels.get(f"{name}Unit", "µm"))
    return None if value is None or unit is None else value * unit
