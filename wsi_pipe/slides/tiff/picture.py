"""One picture of a TIFF among several: its directories, what may be its levels, and which scan and plane is meant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from wsi_pipe.errors import NotAPictureError
from wsi_pipe.geometry import FloatPair, IntPair
from wsi_pipe.slides.tiff.ifd import Directory
from wsi_pipe.slides.tiff.levels import Candidate
from wsi_pipe.slides.tiff.pages import TILE_HEIGHT, TILE_WIDTH, Page, stated_factor

__all__ = [
    "EXPORT", "SAME_LENS", "SCAN_AREA", "Chosen", "Frame", "LevelPages", "described", "frame_of", "level_pages",
    "only_plane", "pick_plane", "pick_scan",
]  # fmt: skip

EXPORT = "export the picture that is meant as 8-bit RGB"

SAME_LENS = 1.5
"""Pictures whose um/px differ by less (as a ratio) were scanned through one lens: each is a scan. A view of the whole
glass is coarser by 10 and more."""

SCAN_AREA = 0.25
"""Share of the largest picture's pixels from which another that states no resolution counts as a scan."""


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


def frame_of(page: Page) -> Frame:
    """A page as a picture by itself."""
    return Frame((page.directory,), page.size_px, page.tiled)


@dataclass(frozen=True)
class LevelPages:
    """An image that may be a level of the picture, and what is known of it before its pixels are looked at."""

    frame: Frame
    candidate: Candidate


def level_pages(main: Frame, frame: Frame, *, marked: bool, certain: bool = False, scan: bool = False) -> LevelPages:
    """``frame`` as a candidate; see Candidate for what the marks mean. scan: whether it may be one, if large enough."""
    directory = frame.first
    areas = [f.size_px[0] * f.size_px[1] for f in (main, frame)]
    candidate = Candidate(
        name=f"image {directory.index}",
        stored_px=frame.size_px,
        tile_px=(directory.number(TILE_WIDTH, 1), directory.number(TILE_HEIGHT, 1)),
        marked=marked,
        certain=certain,
        stated=stated_factor(main.first, directory),
        scan=scan and not marked and areas[1] >= SCAN_AREA * areas[0],
    )
    return LevelPages(frame, candidate)


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


def middle(planes: int) -> int:
    """The middle of so many focal planes; of an even number the upper of the two."""
    return planes // 2


def pick_plane(name: str, planes: int, z: int | None, default: int | None = None) -> tuple[int, str]:
    """Which of several focal planes, and the note that says so; ``default`` stands for the middle one.

    Raises NotAPictureError where it is not there.
    """
    if z is not None and z >= planes:
        raise NotAPictureError(f"{name}: has {planes} focal planes, --z {z} is not among them", remedy="count from 0")
    number = z if z is not None else middle(planes) if default is None else default
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


def described(size_px: IntPair, mpp: FloatPair | None, name: str) -> str:
    words = f"{size_px[0]} x {size_px[1]} px" + (f" at {mpp[0]:.4g} um/px" if mpp else "")
    return words + (f" ({name})" if name else "")
