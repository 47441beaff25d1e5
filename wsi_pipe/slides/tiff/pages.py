"""What the directories of a TIFF say of themselves: size, marks, names and scale, whatever wrote the file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from wsi_pipe.errors import SlideError
from wsi_pipe.files import parse_json
from wsi_pipe.geometry import FloatPair, IntPair
from wsi_pipe.slides.storage.source import Source
from wsi_pipe.slides.tiff.ifd import SUB_IFDS, Directory, read_directory
from wsi_pipe.slides.tiff.layout import (
    DESCRIPTION,
    PAGE_NAME,
    RESOLUTION_UNIT,
    SUBFILE,
    X_RESOLUTION,
    Y_RESOLUTION,
    positive,
    resolution_mpp,
)

__all__ = ["Page", "image_name", "pages_of", "stated_mpp", "sub_pages"]

WIDTH, HEIGHT, TILE_WIDTH, TILE_HEIGHT = 256, 257, 322, 323
MAX_SUB_IFDS = 64
MAX_DESCRIPTION_BYTES = 1 << 20

_NAMES = {"label": "label", "macro": "macro", "thumbnail": "thumbnail", "overview": "macro", "thumb": "thumbnail"}
_WORD = re.compile(r"(label|macro|thumbnail|thumb|overview)", re.IGNORECASE)
_WHOLE_NAME = re.compile(
    r"\W*(label|macro|thumbnail|thumb|overview)(?:[\s_-]*(?:image|picture|page))?\W*", re.IGNORECASE
)
_TYPE_ELEMENT = re.compile(r"<ImageType>\s*(label|macro|thumbnail|overview)\w*\s*</ImageType>", re.IGNORECASE)
_MPP = re.compile(r"(?:^|[|;,\s])\s*MPP\s*[=:]\s*([0-9.,eE+-]+?)\s*(?:[|;\s]|,\s|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Page:
    """One image of the file. size_px: (width, height). reduced: marked as a smaller version of another. name: "label",
    "macro", "thumbnail" or "mask" where it is marked or named as one, else None."""

    directory: Directory
    size_px: IntPair
    reduced: bool
    name: str | None
    tiled: bool

    @property
    def area(self) -> int:
        """Pixels."""
        return self.size_px[0] * self.size_px[1]


def pages_of(directories: Sequence[Directory]) -> list[Page]:
    """Those directories that hold an image, in the file's order."""
    pages = (_page(directory) for directory in directories)
    return [page for page in pages if page is not None]


def sub_pages(source: Source, directory: Directory) -> list[Page]:
    """The sub-images of a directory, which hold its levels."""
    offsets = directory.numbers(SUB_IFDS)[:MAX_SUB_IFDS]
    pages = (
        _page(read_directory(source, directory, offset, f"{directory.index}.{i}"))
        for i, offset in enumerate(offsets)
        if offset
    )
    return [page for page in pages if page is not None]


def _page(directory: Directory) -> Page | None:
    try:
        size = (directory.number(WIDTH, 0), directory.number(HEIGHT, 0))
        subfile = directory.number(SUBFILE, 0)
    except SlideError:
        return None
    if min(size) < 1:
        return None
    name = image_name(directory)
    if name is None and subfile & 12:
        # Aperio's mark for the picture of the whole glass, and TIFF's for a mask of transparency.
        name = "macro" if subfile & 8 else "mask"
    return Page(directory, size, bool(subfile & 1), name, TILE_WIDTH in directory)


def image_name(directory: Directory) -> str | None:
    """ "label", "macro" or "thumbnail" where the page's name or description says that it is one, else None.

    A description counts where it consists of such a word, where the second line begins with one (Aperio), or where a
    field made for it holds one; the slide's own may mention any word anywhere.
    """
    if directory.count(PAGE_NAME) and (match := _WORD.search(directory.text(PAGE_NAME)[:200])):
        return _NAMES[match[1].lower()]
    if not 0 < directory.count(DESCRIPTION) <= MAX_DESCRIPTION_BYTES:
        return None
    text = directory.text(DESCRIPTION)
    if (match := _WHOLE_NAME.fullmatch(text[:200].strip())) or (match := _TYPE_ELEMENT.search(text[:4096])):
        return _NAMES[match[1].lower()]
    lines = text.splitlines()
    if len(lines) > 1 and text.startswith("Aperio") and (match := _WORD.match(lines[1].strip())):
        return _NAMES[match[1].lower()]
    if text.startswith("{"):
        try:
            fields = parse_json(text)
        except ValueError:
            return None
        words = [str(fields.get(key, "")) for key in ("name", "Name", "type", "ImageType")]
        found = next((m for word in words if (m := _WHOLE_NAME.fullmatch(word))), None)
        return _NAMES[found[1].lower()] if found else None
    return None


def stated_mpp(directory: Directory) -> tuple[FloatPair | None, str]:
    """(x, y) um/px that a description (``MPP = 0.5``) or the resolution tags state, and where; tags where plausible."""
    if 0 < directory.count(DESCRIPTION) <= MAX_DESCRIPTION_BYTES:
        text = directory.text(DESCRIPTION)
        found = _MPP.search(text)
        mpp = positive(found[1]) if found else None
        if mpp is not None:
            return (mpp, mpp), "aperio.MPP" if text.startswith("Aperio") else "description.MPP"
    return resolution_mpp(directory)


def stated_factor(main: Directory, level: Directory) -> FloatPair | None:
    """Level-0 pixels per pixel of ``level``, (x, y), by the resolution tags of both; None where they say nothing.

    Most writers copy the tags of level 0 to all levels, so equal ones say nothing.
    """
    if main.number(RESOLUTION_UNIT, 2) != level.number(RESOLUTION_UNIT, 2):
        return None
    factors = []
    for tag in (X_RESOLUTION, Y_RESOLUTION):
        fine, coarse = main.rational(tag), level.rational(tag)
        if fine is None or coarse is None or fine / coarse < 1.02:
            return None
        factors.append(fine / coarse)
    return (factors[0], factors[1])
