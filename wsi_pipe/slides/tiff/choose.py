"""Which picture of a TIFF is the slide: the largest of the main series, or an error that says why none is.

This stands before every reader, so that what one refuses for its meaning no other takes for something else. It looks at
directories alone; ``levels`` then compares what candidates for levels show.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from wsi_pipe.errors import NotAPictureError, UnsupportedSlideError
from wsi_pipe.geometry import FloatPair, IntPair
from wsi_pipe.slides.storage.source import Source
from wsi_pipe.slides.tiff.ifd import Directory
from wsi_pipe.slides.tiff.layout import DESCRIPTION, parse_xml
from wsi_pipe.slides.tiff.levels import is_whole_fraction
from wsi_pipe.slides.tiff.ome import OME_NAMESPACE, OmeImage, ome_images
from wsi_pipe.slides.tiff.pages import Page, pages_of, stated_mpp, sub_pages
from wsi_pipe.slides.tiff.samples import SAMPLES, check_samples, colour_samples

__all__ = ["Chosen", "Frame", "LevelPages", "choose", "middle", "pick_plane", "pick_scan"]

MAX_DESCRIPTION_BYTES = 1 << 26
EXPORT = "export the picture that is meant as 8-bit RGB"

SAME_LENS = 1.5
"""Pictures whose um/px differ by less (as a ratio) were scanned through one lens: each is a scan. A view of the whole
glass is coarser by 10 and more."""

SCAN_AREA = 0.25
"""Share of the largest picture's pixels from which another that states no resolution counts as a scan."""

_FALSE = {"", "0", "no", "none", "off", "false", "n/a"}
_GLOWS = re.compile(r"fluoresc", re.IGNORECASE)
_FREE_TEXT = ("filename", "file", "title", "user", "comment", "name", "description", "path", "imageid", "note")


@dataclass(frozen=True)
class Frame:
    """One colour or grey picture: one directory, or three grey ones of red, green and blue."""

    directories: tuple[Directory, ...]
    size_px: IntPair
    tiled: bool

    @property
    def first(self) -> Directory:
        """The first directory."""
        return self.directories[0]


@dataclass(frozen=True)
class LevelPages:
    """A candidate for a level. marked: the file says that it is one."""

    frame: Frame
    marked: bool


@dataclass(frozen=True)
class Chosen:
    """The picture that is the slide. candidates: images that may be its levels. mpp: (x, y) um/px as stated, or None.
    scans, planes: how many pictures and focal planes there are to choose from. ome: whether OME-XML describes it.
    may_be_colours: three planes that say nothing of themselves, so that their pixels must tell."""

    main: Frame
    candidates: tuple[LevelPages, ...]
    associated: Mapping[str, Directory] = field(default_factory=dict)
    mpp: FloatPair | None = None
    mpp_source: str = "none"
    objective: float | None = None
    notes: tuple[str, ...] = ()
    scans: int = 1
    planes: int = 1
    ome: bool = False
    may_be_colours: bool = False


def choose(
    source: Source,
    directories: Sequence[Directory],
    scene: int | None = None,
    z: int | None = None,
    *,
    all_levels: bool = False,
) -> Chosen:
    """The slide of a TIFF whose vendor has no structure of its own (generic, OME, Aperio and its like).

    scene, z: which scan and focal plane, from 0. all_levels: whatever is smaller and bears no name is marked as a level
    thereby. Raises NotAPictureError where the samples, channels, times or scans are no one picture, or the scan or plane
    is not there; UnsupportedSlideError where there is no image at all.
    """
    name = source.name
    first = directories[0]
    text = first.text(DESCRIPTION) if first.count(DESCRIPTION) <= MAX_DESCRIPTION_BYTES else ""
    images: list[OmeImage] = []
    if OME_NAMESPACE in text[:4096]:
        try:
            images = ome_images(name, parse_xml(name, text))
        except NotAPictureError:
            raise
        except UnsupportedSlideError:
            # A damaged description says nothing; the directories still do.
            images = []
    if images:
        return _choose_ome(source, directories, images, scene, z)
    return _choose_pages(source, pages_of(directories), text, scene, z, all_levels=all_levels)


# --- without OME-XML -------------------------------------------------------------------------------------------------


def _choose_pages(
    source: Source, pages: Sequence[Page], text: str, scene: int | None, z: int | None, *, all_levels: bool
) -> Chosen:
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
        if len(scans) > 1 and all(page.size_px == largest.size_px for page in scans):
            _refuse_channels(name, same)
        described = [_described(page.size_px, stated_mpp(page.directory)[0], "") for page in scans]
        alike = len({page.size_px for page in scans}) == 1
        what = f"images of {largest.size_px[0]} x {largest.size_px[1]} px" if alike else "pictures"
        chosen = scans[pick_scan(name, described, scene, what=what)]
        only_plane(name, z)
    check_samples(name, chosen.directory)
    levels = [LevelPages(_frame(page), True) for page in sub_pages(source, chosen.directory)]
    # Pages of another kind of colour are no levels; nor are other scans.
    rest = [page for page in pages if page.name is None and page not in same and page not in scans]
    levels += [
        LevelPages(_frame(page), page.reduced or all_levels)
        for page in rest
        if (all_levels or page.reduced or is_whole_fraction(chosen.size_px, page.size_px)) and page.area < chosen.area
    ]
    taken = {level.frame.first.index for level in levels}
    mpp, mpp_source = stated_mpp(chosen.directory)
    return Chosen(
        main=_frame(chosen),
        candidates=tuple(levels),
        associated=_associated(pages, taken | {page.directory.index for page in (*same, *scans)}),
        mpp=mpp,
        mpp_source=mpp_source,
        notes=tuple(notes),
        scans=len(scans),
        planes=planes,
    )


def _frame(page: Page) -> Frame:
    return Frame((page.directory,), page.size_px, page.tiled)


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
        stated = json.loads(text)
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


# --- choosing among scans and planes ---------------------------------------------------------------------------------


def middle(planes: int) -> int:
    """The middle of so many focal planes; of an even number the upper of the two."""
    return planes // 2


def pick_plane(name: str, planes: int, z: int | None) -> tuple[int, str]:
    """Which of several focal planes, and the note that says so. Raises NotAPictureError where it is not there."""
    if z is not None and z >= planes:
        raise NotAPictureError(f"{name}: has {planes} focal planes, --z {z} is not among them", remedy="count from 0")
    number = middle(planes) if z is None else z
    how = "the middle one, as none was asked for (--z)" if z is None else "as asked for"
    return number, f"focal plane {number} of {planes} (0 to {planes - 1}), {how}"


def only_plane(name: str, z: int | None) -> None:
    """Raise NotAPictureError where a focal plane is asked for that a single picture does not have."""
    if z not in (None, 0):
        raise NotAPictureError(f"{name}: has one focal plane, --z {z} was asked for", remedy="leave out --z")


def pick_scan(name: str, described: Sequence[str], scene: int | None, *, what: str = "pictures") -> int:
    """Which of several scans. Raises NotAPictureError where none of several is asked for, or one that is not there."""
    listed = "; ".join(f"{i}: {words}" for i, words in enumerate(described))
    if scene is not None and scene >= len(described):
        raise NotAPictureError(
            f"{name}: --scene {scene} is not there, the file holds {len(described)} ({listed})", remedy="count from 0"
        )
    if scene is None and len(described) > 1:
        raise NotAPictureError(
            f"{name}: holds {len(described)} {what}, and which is meant is not stated ({listed})",
            remedy=f"choose one with --scene 0 to {len(described) - 1}, or in the column scene of a slide list",
        )
    return scene or 0


def _described(size_px: IntPair, mpp: FloatPair | None, name: str) -> str:
    words = f"{size_px[0]} x {size_px[1]} px" + (f" at {mpp[0]:.4g} um/px" if mpp else "")
    return words + (f" ({name})" if name else "")


# --- OME -------------------------------------------------------------------------------------------------------------

_ASSOCIATED = re.compile(
    r"(?:^|[\s_.:\-\[(#])(label|macro|thumbnail|overview)(?:$|[\s_.:\-\])#\d]|image)", re.IGNORECASE
)


def _ome_name(image: OmeImage) -> str | None:
    """ "label", "macro" or "thumbnail" where the image is named so; a file's name in front does not count."""
    # Bio-Formats puts the file's name in front: "slide.scn [macro]", "slide.svs #2".
    match = re.search(r"\[([^\]]*)\]\s*$", image.name)
    short = match[1] if match else image.name if len(image.name) <= 40 else ""
    found = _ASSOCIATED.search(short)
    return {"overview": "macro"}.get(found[1].lower(), found[1].lower()) if found else None


def _choose_ome(
    source: Source, directories: Sequence[Directory], images: Sequence[OmeImage], scene: int | None, z: int | None
) -> Chosen:
    name = source.name
    unnamed = [image for image in images if _ome_name(image) is None] or list(images)
    largest = max(unnamed, key=lambda image: image.size_px[0] * image.size_px[1])
    scans = [image for image in unnamed if image is largest or _is_ome_scan(largest, image)]
    described = [_described(image.size_px, image.mpp, image.name) for image in scans]
    image = scans[pick_scan(name, described, scene)]
    number, note = _ome_plane(name, image, z)
    main, guess = _ome_frame(source, directories, image, number)
    check_samples(name, main.first)
    if image.is_fluorescent:
        raise NotAPictureError(
            f"{name}: a fluorescence picture, as its OME description says ({image.described()}), not a brightfield one",
            remedy="give a brightfield slide",
        )
    levels = [LevelPages(frame, True) for frame in _sub_frames(source, main)]
    associated: dict[str, Directory] = {}
    for other in images:
        if other in scans:
            continue
        directory = _page_of(directories, other, (0, 0, 0))
        if directory is None:
            continue
        kind = _ome_name(other)
        page = next(iter(pages_of([directory])), None)
        if kind is None and page is not None and is_whole_fraction(image.size_px, other.size_px):
            # Some writers list levels as images of their own.
            levels.append(LevelPages(_frame(page), False))
        else:
            kind = kind or f"image {directory.index}"
            associated[kind if kind not in associated else f"{kind} {directory.index}"] = directory
    mpp, mpp_source = image.mpp, "ome.PhysicalSize"
    if mpp is None:
        mpp, mpp_source = stated_mpp(main.first)
    described_planes = {ifd for other in images for ifd in other.planes.values() if ifd is not None}
    # Levels that follow in the main chain, which the description does not list.
    levels += [
        LevelPages(_frame(page), page.reduced)
        for page in pages_of([d for i, d in enumerate(directories) if i not in described_planes])
        if len(main.directories) == 1
        and page.name is None
        and page.area < image.size_px[0] * image.size_px[1]
        and (page.reduced or is_whole_fraction(image.size_px, page.size_px))
    ]
    return Chosen(
        main=main,
        candidates=tuple(levels),
        associated=associated,
        mpp=mpp,
        mpp_source=mpp_source if mpp is not None else "none",
        objective=image.objective,
        notes=(note,) if note else (),
        scans=len(scans),
        planes=image.sizes[0],
        ome=True,
        may_be_colours=guess,
    )


def _is_ome_scan(largest: OmeImage, image: OmeImage) -> bool:
    if largest.mpp and image.mpp:
        return 1 / SAME_LENS < math.sqrt(image.mpp[0] * image.mpp[1] / (largest.mpp[0] * largest.mpp[1])) < SAME_LENS
    if is_whole_fraction(largest.size_px, image.size_px):
        return False
    areas = [i.size_px[0] * i.size_px[1] for i in (largest, image)]
    return areas[1] >= SCAN_AREA * areas[0]


def _ome_plane(name: str, image: OmeImage, z: int | None) -> tuple[int, str]:
    size_z, _, size_t = image.sizes
    if size_t > 1:
        raise NotAPictureError(
            f"{name}: {image.described()} (channels, focal planes or times), not one RGB picture", remedy=EXPORT
        )
    if size_z == 1:
        only_plane(name, z)
        return 0, ""
    return pick_plane(name, size_z, z)


def _ome_frame(source: Source, directories: Sequence[Directory], image: OmeImage, z: int) -> tuple[Frame, bool]:
    """The directories of one focal plane, and whether only their pixels can tell that they are colours."""
    name, channels = source.name, len(image.channels)
    if image.type != "uint8":
        raise NotAPictureError(
            f"{name}: the OME image has {image.type} samples; only uint8 is read, since how others map to a picture is "
            "not stated",
            remedy="export it as 8-bit RGB with the contrast that is meant",
        )
    found = [_page_of(directories, image, (z, c, 0)) for c in range(channels)]
    if any(directory is None for directory in found):
        raise NotAPictureError(
            f"{name}: planes of the OME image lie in other files, or are not there", remedy="convert it to one file"
        )
    pages = pages_of([directory for directory in found if directory is not None])
    if len(pages) != channels:
        raise UnsupportedSlideError(f"{name}: an OME plane is no image")
    for page in pages:
        check_samples(name, page.directory)
        if page.size_px != image.size_px:
            raise UnsupportedSlideError(
                f"{name}: the OME description states {image.size_px[0]} x {image.size_px[1]} px, image "
                f"{page.directory.index} of the file has {page.size_px[0]} x {page.size_px[1]}"
            )
    stored = [page.directory.number(SAMPLES, 1) for page in pages]
    if channels == 1:
        if image.is_coloured and stored == [1]:
            pages = _split_samples(name, directories, image, pages[0])
            return Frame(tuple(p.directory for p in pages), image.size_px, pages[0].tiled), False
        return Frame((pages[0].directory,), image.size_px, pages[0].tiled), False
    colours = image.states_colours or image.may_be_colours
    if not colours or image.is_fluorescent or stored != [1, 1, 1]:
        raise NotAPictureError(
            f"{name}: {image.described()} (channels, focal planes or times), not one RGB picture", remedy=EXPORT
        )
    frame = Frame(tuple(page.directory for page in pages), image.size_px, all(page.tiled for page in pages))
    return frame, not image.states_colours


def _split_samples(name: str, directories: Sequence[Directory], image: OmeImage, first: Page) -> list[Page]:
    """Three grey directories in place of the one with three samples that the description states."""
    at = int(first.directory.index)
    pages = pages_of(directories[at : at + 3])
    if (
        image.sizes != (1, 1, 1)
        or len(pages) != 3
        or any(p.size_px != first.size_px or p.directory.number(SAMPLES, 1) != 1 for p in pages)
    ):
        raise NotAPictureError(
            f"{name}: the OME description states colours, image {first.directory.index} of the file is grey",
            remedy=EXPORT,
        )
    return pages


def _page_of(directories: Sequence[Directory], image: OmeImage, position: tuple[int, int, int]) -> Directory | None:
    ifd = image.planes.get(position)
    return directories[ifd] if ifd is not None and ifd < len(directories) else None


def _sub_frames(source: Source, main: Frame) -> list[Frame]:
    """The sub-images of a picture: those of its directory, or of its three directories put together."""
    per_plane = [sub_pages(source, directory) for directory in main.directories]
    if len(per_plane) == 1:
        return [_frame(page) for page in per_plane[0]]
    return [
        Frame(tuple(p.directory for p in pages), pages[0].size_px, all(p.tiled for p in pages))
        for pages in zip(*per_plane, strict=False)
        if len({page.size_px for page in pages}) == 1
    ]
