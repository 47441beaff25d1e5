"""Which picture of an OME-TIFF is the slide: the largest image that is no label or macro, one focal plane of it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from wsi_pipe.errors import NotAPictureError, UnsupportedSlideError
from wsi_pipe.slides.storage.source import Source
from wsi_pipe.slides.tiff.ifd import Directory
from wsi_pipe.slides.tiff.levels import is_whole_fraction
from wsi_pipe.slides.tiff.ome import OmeImage
from wsi_pipe.slides.tiff.pages import Page, pages_of, stated_mpp, sub_pages
from wsi_pipe.slides.tiff.picture import (
    EXPORT,
    SAME_LENS,
    SCAN_AREA,
    Chosen,
    Frame,
    described,
    frame_of,
    level_pages,
    only_plane,
    pick_plane,
    pick_scan,
)
from wsi_pipe.slides.tiff.samples import SAMPLES, check_samples

__all__ = ["choose_ome"]

_ASSOCIATED = re.compile(
    r"(?:^|[\s_.:\-\[(#])(label|macro|thumbnail|overview)(?:$|[\s_.:\-\])#\d]|image)", re.IGNORECASE
)

_FILE_NAME = re.compile(r"^.*\.(?:svs|tiff?|ndpi|scn|mrxs|czi|vsi|bif|qptiff|jpe?g|png|dcm)(?![a-z0-9])", re.IGNORECASE)


def _ome_name(image: OmeImage) -> str | None:
    """ "label", "macro" or "thumbnail" where the image is named so; a file's name in front does not count."""
    # Bio-Formats puts the file's name in front: "slide.scn [macro]", "slide.svs #2".
    match = re.search(r"\[([^\]]*)\]\s*$", image.name)
    short = match[1] if match else _FILE_NAME.sub("", image.name) if len(image.name) <= 40 else ""
    found = _ASSOCIATED.search(short)
    return {"overview": "macro"}.get(found[1].lower(), found[1].lower()) if found else None


def choose_ome(
    source: Source, directories: Sequence[Directory], images: Sequence[OmeImage], scene: int | None, z: int | None
) -> Chosen:
    """See ``choose``."""
    name = source.name
    unnamed = [image for image in images if _ome_name(image) is None] or list(images)
    largest = max(unnamed, key=lambda image: image.size_px[0] * image.size_px[1])
    scans = [image for image in unnamed if image is largest or _is_ome_scan(largest, image)]
    offered = list(scans)
    if scene is not None:
        # What may be a level or a scan of its own is offered last, so that numbers of certain scans stay.
        area = largest.size_px[0] * largest.size_px[1]
        offered += [i for i in unnamed if i not in scans and i.size_px[0] * i.size_px[1] >= SCAN_AREA * area]
    words = [described(image.size_px, image.mpp, image.name) for image in offered]
    image = offered[pick_scan(name, words, scene)]
    number, note = _ome_plane(name, image, z)
    main, guess = _ome_frame(source, directories, image, number)
    check_samples(name, main.first)
    if image.is_fluorescent:
        raise NotAPictureError(
            f"{name}: a fluorescence picture, as its OME description says ({image.described()}), not a brightfield one",
            remedy="give a brightfield slide",
        )
    levels = [level_pages(main, frame, marked=True) for frame in _sub_frames(source, main)]
    associated: dict[str, Directory] = {}
    for other in images:
        if other is image or other in scans:
            continue
        directory = _page_of(directories, other, (0, 0, 0))
        if directory is None:
            continue
        kind = _ome_name(other)
        page = next(iter(pages_of([directory])), None)
        if kind is None and page is not None and is_whole_fraction(image.size_px, other.size_px):
            # Some writers list levels as images of their own.
            levels.append(level_pages(main, frame_of(page), marked=False, scan=scene is None))
        else:
            kind = kind or f"image {directory.index}"
            associated[kind if kind not in associated else f"{kind} {directory.index}"] = directory
    mpp, mpp_source = image.mpp, "ome.PhysicalSize"
    if mpp is None:
        mpp, mpp_source = stated_mpp(main.first)
    described_planes = {ifd for other in images for ifd in other.planes.values() if ifd is not None}
    # Levels that follow in the main chain, which the description does not list.
    levels += [
        level_pages(main, frame_of(page), marked=page.reduced)
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
        return [frame_of(page) for page in per_plane[0]]
    return [
        Frame(tuple(p.directory for p in pages), pages[0].size_px, all(p.tiled for p in pages))
        for pages in zip(*per_plane, strict=False)
        if len({page.size_px for page in pages}) == 1
    ]
