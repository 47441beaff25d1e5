"""One rule for which images of a TIFF are the levels of its main picture, and at which scale.

A level is marked as one or is a whole fraction of the main picture in both directions; it is like it in colours and
content, and is not named or marked label, macro or thumbnail. Its scale is what the file states, its size second: a
statement within 1 % of a whole number means that number, and pixels beyond it are padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from wsi_pipe.errors import NotAPictureError, UnsupportedSlideError
from wsi_pipe.geometry import FloatPair, IntPair
from wsi_pipe.slides.codecs.decode import CodecError
from wsi_pipe.slides.native import MAX_ANISOTROPY, NativeImage
from wsi_pipe.slides.tiff.likeness import is_alike

__all__ = ["Candidate", "Placed", "is_whole_fraction", "place", "with_levels"]

WHOLE_TOLERANCE = 0.01
"""A stated scale this near (relative) to a whole number means it: spacings are rounded when written."""

AGREES = 0.02
"""How far (relative) a stated scale may be from that of the sizes where neither is whole."""

T = TypeVar("T", bound=NativeImage)


@dataclass(frozen=True)
class Candidate:
    """An image that may be a level. name: for messages. stored_px: its size as stored; tile_px: of its tiles, up to
    which it may be padded. marked: the file says that it is a level. certain: so surely that its content need not be
    looked at. stated: level-0 pixels per pixel as the file states it, (x, y), or None. scan: a scan of its own where it
    shows another picture, and none was chosen."""

    name: str
    stored_px: IntPair
    tile_px: IntPair
    marked: bool
    certain: bool = False
    stated: FloatPair | None = None
    scan: bool = False


@dataclass(frozen=True)
class Placed:
    """Where a candidate lies: its size without padding, and its scale (level-0 pixels per pixel, x and y)."""

    size_px: IntPair
    factor: FloatPair


def is_whole_fraction(full: IntPair, part: IntPair) -> bool:
    """Whether ``part`` is ``full`` over one whole number above 1 in both directions, rounded either way."""
    factor = round(full[0] / part[0])
    return factor > 1 and all(p in (f // factor, -(-f // factor)) for f, p in zip(full, part, strict=True))


def place(main_px: IntPair, candidate: Candidate) -> Placed | str:
    """Where the candidate lies on the main picture, or why it is no level, in words."""
    stored = candidate.stored_px
    by_size = (main_px[0] / stored[0], main_px[1] / stored[1])
    if candidate.stated is not None:
        x, y = candidate.stated
        whole = round((x + y) / 2)
        if whole > 1 and all(abs(value / whole - 1) <= WHOLE_TOLERANCE for value in (x, y)):
            sizes = [(full // whole, -(-full // whole)) for full in main_px]
            if all(s in known for s, known in zip(stored, sizes, strict=True)):
                return Placed(stored, (float(whole), float(whole)))
            inside = (max(sizes[0][0], 1), max(sizes[1][0], 1))
            if all(i <= s < i + t for s, i, t in zip(stored, inside, candidate.tile_px, strict=True)):
                return Placed(inside, (float(whole), float(whole)))
            if all(abs(i - s) <= 2 for s, i in zip(stored, inside, strict=True)):
                return Placed(stored, by_size)
        if any(abs(value / size - 1) > AGREES for value, size in zip((x, y), by_size, strict=True)):
            return f"it states 1/{x:.4g} of the slide, and its size is 1/{by_size[0]:.4g}"
    slack = MAX_ANISOTROPY + 1 / stored[0] + 1 / stored[1]
    if abs(by_size[0] - by_size[1]) > slack * max(by_size):
        return "it is of another shape than the slide"
    if not candidate.marked and not is_whole_fraction(main_px, stored):
        return "it is neither marked as a level nor a whole fraction of the slide"
    return Placed(stored, by_size)


def with_levels(
    name: str,
    main: T,
    candidates: Sequence[tuple[Candidate, Callable[[IntPair], T]]],
    *,
    look: Callable[[NativeImage, NativeImage, FloatPair], bool] = is_alike,
) -> tuple[list[T], list[str]]:
    """The main image with its levels, finest first, and what is said of candidates that are none.

    name: the file's, for messages. candidates: each with a function that gives its image at a size. Raises
    NotAPictureError where one is a scan of its own, UnsupportedSlideError where a level is not understood,
    SlideReadError or SlideOpenError where the file lacks it.
    """
    images, scales, notes = [main], [(1.0, 1.0)], []
    for candidate, load in sorted(candidates, key=lambda pair: -pair[0].stored_px[0] * pair[0].stored_px[1]):
        width, height = candidate.stored_px
        placed = place(main.size_px, candidate)
        finer = images[-1].size_px
        if isinstance(placed, Placed) and (placed.size_px[0] >= finer[0] or placed.size_px[1] > finer[1]):
            placed = "it is as large as another"
        if isinstance(placed, str):
            if candidate.marked:
                notes.append(f"{candidate.name} of {width} x {height} px is left out as a level: {placed}")
            continue
        try:
            image = load(placed.size_px)
            factor = (placed.factor[0] / scales[-1][0], placed.factor[1] / scales[-1][1])
            alike = candidate.certain or look(images[-1], image, factor)
        except UnsupportedSlideError:
            if candidate.marked:
                raise
            notes.append(f"{candidate.name} of {width} x {height} px is left out as a level: it is not understood")
            continue
        except CodecError:
            # A damaged tile is no evidence; the mark is.
            alike = candidate.marked
        if not alike and candidate.scan:
            raise NotAPictureError(
                f"{name}: holds 2 pictures, and which is meant is not stated (0: {main.size_px[0]} x "
                f"{main.size_px[1]} px; 1: {width} x {height} px)",
                remedy="choose one with --scene 0 or 1, or in the column scene of a slide list",
            )
        if not alike:
            notes.append(f"{candidate.name} of {width} x {height} px is left out as a level: it shows another picture")
            continue
        images.append(image)
        scales.append(placed.factor)
    return images, notes
