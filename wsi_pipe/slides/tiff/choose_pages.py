"""Which picture of a TIFF without OME-XML is the slide: the largest page that is no channel, plane, scan or macro."""

from __future__ import annotations

import re
from collections.abc import Sequence

from wsi_pipe.errors import NotAPictureError, UnsupportedSlideError
from wsi_pipe.files import parse_json
from wsi_pipe.slides.storage.source import Source
from wsi_pipe.slides.tiff.ifd import Directory
from wsi_pipe.slides.tiff.layout import DESCRIPTION
from wsi_pipe.slides.tiff.levels import is_whole_fraction
from wsi_pipe.slides.tiff.pages import Page, stated_mpp, sub_pages
from wsi_pipe.slides.tiff.picture import (
    EXPORT,
    SCAN_AREA,
    Chosen,
    described,
    frame_of,
    level_pages,
    only_plane,
    pick_plane,
    pick_scan,
)
from wsi_pipe.slides.tiff.samples import check_samples, colour_samples

__all__ = ["choose_pages"]

_FALSE = {"", "0", "no", "none", "off", "false", "n/a"}
_GLOWS = re.compile(r"fluoresc", re.IGNORECASE)
_FREE_TEXT = ("filename", "file", "title", "user", "comment", "name", "description", "path", "imageid", "note")


def choose_pages(
    source: Source, pages: Sequence[Page], text: str, scene: int | None, z: int | None, *, all_levels: bool
) -> Chosen:
    """See ``choose``."""
    name = source.name
    unnamed = [page for page in pages if page.name is None] or pages
    full = [page for page in unnamed if not page.reduced] or unnamed
    if not full:
        raise UnsupportedSlideError(f"{name}: the TIFF file holds no image")
    largest = max(full, key=lambda page: page.area)
    if all_levels:
        full = [page for page in full if page.area == largest.area]
    check_samples(name, largest.directory)
    _refuse_fluorescence(name, text)
    same = [page for page in full if page.size_px == largest.size_px]
    slices = _imagej_slices(name, text, len(same)) or _aperio_slices(same)
    # A whole fraction may be a level that is not marked; what it shows decides that later.
    scans = [largest] if slices else [p for p in full if p in same or _is_scan(largest, p)]
    chosen, notes, planes = largest, [], 1
    if slices:
        number, note = pick_plane(name, slices, z)
        chosen, planes = same[number], slices
        notes.append(note)
    else:
        if len(same) > 1:
            _refuse_channels(name, same)
        offered = (
            scans
            if scene is None
            else [*scans, *(p for p in full if p not in scans and p.area >= SCAN_AREA * largest.area)]
        )
        words = [described(page.size_px, stated_mpp(page.directory)[0], "") for page in offered]
        alike = len({page.size_px for page in offered}) == 1
        what = f"images of {largest.size_px[0]} x {largest.size_px[1]} px" if alike else "pictures"
        chosen = offered[pick_scan(name, words, scene, what=what)]
        only_plane(name, z)
    check_samples(name, chosen.directory)
    main = frame_of(chosen)
    levels = [level_pages(main, frame_of(page), marked=True) for page in sub_pages(source, chosen.directory)]
    # Pages of another kind of colour are no levels; nor are other scans.
    rest = [page for page in pages if page.name is None and page not in same and page not in scans]
    levels += [
        level_pages(main, frame_of(page), marked=page.reduced or all_levels, certain=all_levels, scan=scene is None)
        for page in rest
        if (all_levels or page.reduced or is_whole_fraction(chosen.size_px, page.size_px)) and page.area < chosen.area
    ]
    taken = {level.frame.first.index for level in levels}
    mpp, mpp_source = stated_mpp(chosen.directory)
    return Chosen(
        main=main,
        candidates=tuple(levels),
        associated=_associated(pages, taken | {page.directory.index for page in (*same, *scans)}),
        mpp=mpp,
        mpp_source=mpp_source,
        notes=tuple(notes),
        scans=len(scans),
        planes=planes,
    )


def _is_scan(largest: Page, page: Page) -> bool:
    """Whether a page that is not marked as anything is a scan of its own beside the largest."""
    if is_whole_fraction(largest.size_px, page.size_px):
        return False
    if colour_samples(page.directory) != colour_samples(largest.directory):
        return False
    return page.area >= SCAN_AREA * largest.area


def _associated(pages: Sequence[Page], taken: set[str]) -> dict[str, Directory]:
    found: dict[str, Directory] = {}
    for page in pages:
        if page.directory.index not in taken:
            name = page.name or f"image {page.directory.index}"
            found[name if name not in found else f"{name} {page.directory.index}"] = page.directory
    return found


def _refuse_channels(name: str, same: Sequence[Page]) -> None:
    """Several grey pages of one size are channels or planes of something, which nothing says; colours may be scans."""
    if colour_samples(same[0].directory) == 3:
        return
    width, height = same[0].size_px
    raise NotAPictureError(
        f"{name}: {len(same)} grey images of {width} x {height} px (channels, focal planes or times), not one RGB "
        "picture",
        remedy=EXPORT,
    )


_IMAGEJ = re.compile(r"^(images|channels|slices|frames|hyperstack|mode)=(\S+)", re.MULTILINE)


def _imagej_slices(name: str, text: str, pages: int) -> int:
    """How many focal planes ImageJ states; 0 where the file is none of its stacks. Refuses channels and times."""
    if not text.startswith("ImageJ="):
        if text.startswith("{"):
            _refuse_truncated(name, text)
        return 0
    stated = dict(_IMAGEJ.findall(text[:4096]))
    counts = {
        key: int(stated[key]) for key in ("images", "channels", "slices", "frames") if stated.get(key, "").isdigit()
    }
    images = counts.get("images", 1)
    for key, what in (("channels", "channels"), ("frames", "time points")):
        if counts.get(key, 1) > 1:
            raise NotAPictureError(
                f"{name}: an ImageJ stack of {counts[key]} {what}, not one RGB picture", remedy=EXPORT
            )
    if images > 1 and (counts.get("slices", 1) != images or pages != images):
        raise NotAPictureError(
            f"{name}: an ImageJ stack of {images} images, of which {pages} are listed and {counts.get('slices', 0)} "
            "are said to be focal planes",
            remedy=EXPORT,
        )
    return images if images > 1 else 0


def _refuse_truncated(name: str, text: str) -> None:
    """tifffile may list one page only of an array of many, and says so in JSON."""
    try:
        stated = parse_json(text)
    except ValueError:
        return
    shape = stated.get("shape") if isinstance(stated, dict) else None
    if stated and isinstance(shape, list) and stated.get("truncated"):
        raise NotAPictureError(f"{name}: an array of shape {tuple(shape)}, of which one page is listed", remedy=EXPORT)


_OFFSET_Z = re.compile(r"\|\s*(?:OffsetZ|Offset Z|ZOffset|Z Offset)\s*=\s*(-?[0-9.]+)", re.IGNORECASE)


def _aperio_slices(same: Sequence[Page]) -> int:
    """How many focal planes Aperio states, one offset a page; 0 where it is no stack."""
    if len(same) < 2:
        return 0
    offsets = [_OFFSET_Z.search(page.directory.text(DESCRIPTION)) for page in same]
    return len(same) if all(offsets) and len({match[1] for match in offsets if match}) == len(same) else 0


def _refuse_fluorescence(name: str, text: str) -> None:
    """Refuse a slide whose description, in fields of Aperio's form or QPTIFF's XML, says fluorescence."""
    for part in re.split(r"[|\r\n]", text[: 1 << 16]):
        key, sign, value = part.partition("=")
        key, value = key.strip(), value.strip()
        if not sign or key.lower().replace(" ", "") in _FREE_TEXT or len(key) > 64:
            continue
        if (_GLOWS.search(key) and value.lower() not in _FALSE) or _GLOWS.search(value):
            raise NotAPictureError(
                f"{name}: a fluorescence scan, as it says ({key} = {value[:80]}), not a brightfield picture",
                remedy="give a brightfield slide",
            )
    if "<PerkinElmer-QPI" in text[:4096] and re.search(
        r"<(?:ScanType|Mode|ScanMode)>[^<]*fluoresc", text, re.IGNORECASE
    ):
        raise NotAPictureError(
            f"{name}: a fluorescence scan, as it says, not a brightfield picture", remedy="give a brightfield slide"
        )
