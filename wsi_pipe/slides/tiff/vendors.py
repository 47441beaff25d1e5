"""Recognising TIFF slides: which images are the levels, and what the vendor says of resolution and origin.

Structure and names follow what the vendors' files and OpenSlide's documentation of formats describe.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from xml.etree.ElementTree import Element

from wsi_pipe.errors import UnsupportedSlideError
from wsi_pipe.geometry import FloatPair, IntPair
from wsi_pipe.slides.native import ProbedImage, only_picture
from wsi_pipe.slides.storage.source import Source
from wsi_pipe.slides.tiff.choose import choose
from wsi_pipe.slides.tiff.gaps import fill_gaps
from wsi_pipe.slides.tiff.ifd import Directory
from wsi_pipe.slides.tiff.image import HEIGHT, TILE_HEIGHT, TILE_WIDTH, WIDTH, TiffImage
from wsi_pipe.slides.tiff.layout import DESCRIPTION, TiffLayout, icc_profile, parse_xml, positive
from wsi_pipe.slides.tiff.levels import Candidate, with_levels
from wsi_pipe.slides.tiff.likeness import bright_planes
from wsi_pipe.slides.tiff.meaning import kind_of
from wsi_pipe.slides.tiff.ndpi import read_ndpi
from wsi_pipe.slides.tiff.picture import Chosen, Frame
from wsi_pipe.slides.tiff.planes import ColourPlanes
from wsi_pipe.slides.tiff.samples import check_samples, colour_samples
from wsi_pipe.slides.tiff.scn import read_scn

__all__ = ["read_layout"]


def read_layout(
    source: Source, directories: Sequence[Directory], scene: int | None = None, z: int | None = None
) -> TiffLayout:
    """Recognise the vendor and gather the levels of the scan and focal plane that are asked for.

    Raises UnsupportedSlideError with the reason where that fails, NotAPictureError where the reason is what it means.
    """
    text, kind = directories[0].text(DESCRIPTION), kind_of(list(directories))
    if kind == "hamamatsu":
        return read_ndpi(source, directories, scene, z)
    if kind == "aperio":
        return _aperio(source, directories, text, scene, z)
    if kind == "philips":
        only_picture(source.name, scene, z)
        return _philips(source, directories, text)
    if kind == "leica":
        return read_scn(source, directories, text, scene, z)
    if kind in ("trestle", "ventana"):
        raise UnsupportedSlideError(f"{source.name}: {kind.title()} slides have overlapping tiles")
    return _plain(source, choose(source, directories, scene, z))


def _aperio(
    source: Source, directories: Sequence[Directory], text: str, scene: int | None, z: int | None
) -> TiffLayout:
    tiled = [d for d in directories if TILE_WIDTH in d]
    if not tiled:
        raise UnsupportedSlideError(f"{source.name}: the Aperio slide has no tiled image")
    chosen = choose(source, tiled, scene, z, all_levels=True)
    main = TiffImage(source, chosen.main.first)
    # Aperio marks associated images and names them: what is tiled and bears no name is a level.
    candidates = [(level.candidate, partial(_sized, source, level.frame.first)) for level in chosen.candidates]
    stored, notes = with_levels(source.name, main, candidates)
    images, left_out = fill_gaps(stored)
    note = "".join(f"; a level of {w} x {h} px with empty tiles is left out" for w, h in left_out)
    pairs = (part.split("=", 1) for part in text.split("|")[1:] if "=" in part)
    properties = {key.strip(): value.strip() for key, value in pairs}
    associated = dict(chosen.associated)
    for i, directory in enumerate(directories):
        if TILE_WIDTH not in directory:
            # The second line of a description begins with the image's name; the second image is the thumbnail.
            lines = directory.text(DESCRIPTION).splitlines()
            words = lines[1].split() if len(lines) > 1 else []
            associated["thumbnail" if i == 1 else words[0] if words else f"image {i}"] = directory
    return TiffLayout(
        vendor="aperio",
        description=f"Aperio SVS with {main.codec} tiles{note}",
        images=images,
        mpp=chosen.mpp,
        mpp_source=chosen.mpp_source,
        objective_power=positive(properties.get("AppMag")),
        icc=icc_profile(chosen.main.first),
        properties={f"aperio.{key}": value for key, value in properties.items()},
        associated=associated,
        notes=(*chosen.notes, *notes),
    )


def _plain(source: Source, chosen: Chosen) -> TiffLayout:
    """OME-TIFF, and tiled TIFFs of no vendor: the largest picture, and what is like it."""
    name = source.name
    if not chosen.main.tiled:
        what = "the OME image" if chosen.ome else "the largest image of the TIFF file"
        raise UnsupportedSlideError(f"{name}: {what} is not tiled")

    def load(frame: Frame, size_px: IntPair | None = None) -> ProbedImage:
        images = [TiffImage(source, directory, size_px=size_px) for directory in frame.directories]
        image: ProbedImage = images[0] if len(images) == 1 else ColourPlanes(name, images)
        image.probe()
        return image

    main = load(chosen.main)
    candidates = [
        (level.candidate, partial(load, level.frame))
        for level in chosen.candidates
        if len(level.frame.directories) == len(chosen.main.directories)
        and colour_samples(level.frame.first) == colour_samples(chosen.main.first)
    ]
    images, notes = with_levels(name, main, candidates)
    if chosen.may_be_colours:
        notes.append(bright_planes(name, images[-1]))
    codec = getattr(main, "codec", "stored")
    separate = len(chosen.main.directories) > 1 or getattr(main, "planar", False)
    return TiffLayout(
        vendor="ome" if chosen.ome else "generic-tiff",
        description=f"{'OME-TIFF' if chosen.ome else 'tiled TIFF'} with {codec} tiles"
        + (" in separate planes" if separate else ""),
        images=images,
        mpp=chosen.mpp,
        mpp_source=chosen.mpp_source,
        objective_power=chosen.objective,
        icc=icc_profile(chosen.main.first),
        associated=chosen.associated,
        notes=(*chosen.notes, *notes),
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
    known = [s for s in spacings if s is not None]
    check_samples(source.name, levels[0])
    candidates = []
    for directory, (x, y) in zip(levels[1:], known[1:], strict=True):
        # The tags of a lower level count the padding up to whole tiles: its true size follows from the spacing.
        size = (directory.number(WIDTH), directory.number(HEIGHT))
        tile = (directory.number(TILE_WIDTH), directory.number(TILE_HEIGHT))
        stated = (x / known[0][0], y / known[0][1])
        candidate = Candidate(f"image {directory.index}", size, tile, marked=True, certain=True, stated=stated)
        candidates.append((candidate, partial(_sized, source, directory)))
    images, notes = with_levels(source.name, TiffImage(source, levels[0]), candidates)
    mpp = _philips_spacing(_philips_text(scan, "DICOM_PIXEL_SPACING")) or known[0]
    return TiffLayout(
        vendor="philips",
        description=f"Philips TIFF with {images[0].codec} tiles",
        images=images,
        mpp=mpp,
        mpp_source="philips.DICOM_PIXEL_SPACING",
        icc=icc_profile(levels[0]),
        associated={kind: d for d, kind in zip(directories, kinds, strict=True) if kind is not None},
        notes=tuple(notes),
    )


def _sized(source: Source, directory: Directory, size_px: IntPair) -> TiffImage:
    return TiffImage(source, directory, size_px=size_px)


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
