"""The resolution of a DICOM series, and at which scale each level is: what the tags state first, sizes second.

Some scanners pad each level to whole tiles, so that the sizes of levels are no measure of their scale, where
PixelSpacing is (libdicom#79). References: DICOM PS3.3 C.7.6.16.2.1 (Pixel Measures), C.8.12.4 (Imaged Volume).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wsi_pipe.errors import NotAPictureError
from wsi_pipe.geometry import FloatPair, IntPair, Level, Pyramid
from wsi_pipe.slides.dicom.image import DicomImage
from wsi_pipe.slides.dicom.instance import Instance
from wsi_pipe.slides.dicom.likeness import shows_the_same
from wsi_pipe.slides.levels import level_downsample, level_share
from wsi_pipe.slides.tiff.likeness import is_alike

__all__ = ["Candidate", "arrange", "spacing", "stated_mpp"]

SMALLEST_PX = 32
"""Side of a level below which a comparison of contents tells nothing."""


@dataclass(frozen=True)
class Candidate:
    """An image that may be a level. spacing: (x, y) um/px that it states, None where it states none."""

    image: DicomImage
    spacing: FloatPair | None
    name: str


def spacing(instance: Instance) -> FloatPair | None:
    """(x, y) um/px from PixelSpacing, which states the distance of rows first, in mm: for all frames, or for each the
    same."""
    shared = instance.tags.get("SharedFunctionalGroupsSequence") or []
    found = _measured(shared[0]) if len(shared) else None
    if found is not None:
        return found
    stated = {_measured(group) for group in instance.tags.get("PerFrameFunctionalGroupsSequence") or []}
    return stated.pop() if len(stated) == 1 else None


def _measured(group: Any) -> FloatPair | None:
    measures = group.get("PixelMeasuresSequence") or []
    values = measures[0].get("PixelSpacing") if len(measures) else None
    try:
        y, x = (float(value) * 1000 for value in values)  # type: ignore[union-attr]
    except (TypeError, ValueError):
        return None
    return _positive(x, y)


def _positive(x: float, y: float) -> FloatPair | None:
    return (x, y) if math.isfinite(x) and math.isfinite(y) and x > 0 and y > 0 else None


def stated_mpp(instance: Instance) -> tuple[FloatPair | None, str]:
    """(x, y) um/px of a level and where it comes from: PixelSpacing, else the size of the imaged volume in mm."""
    found = spacing(instance)
    if found is not None:
        return found, "dicom.PixelSpacing"
    try:
        sides = (float(instance.tags.ImagedVolumeWidth), float(instance.tags.ImagedVolumeHeight))
        width, height = instance.size_px
        found = _positive(sides[0] * 1000 / width, sides[1] * 1000 / height)
    except (AttributeError, TypeError, ValueError, ZeroDivisionError):
        found = None
    return found, "none" if found is None else "dicom.ImagedVolumeWidth"


def arrange(
    path: str, candidates: Sequence[Candidate], mpp: FloatPair | None
) -> tuple[list[DicomImage], Pyramid, list[str]]:
    """The images that are levels, finest first, their pyramid, and what is to be said of the others.

    A level that is padded beyond its share of level 0 is cut to it. Raises NotAPictureError where two images have one
    size and one scale: it is not known which is meant.
    """
    ordered = _ordered(path, candidates)
    finest = ordered[0]
    images, levels = [finest.image], [Level(finest.image.size_px, (1.0, 1.0))]
    notes: list[str] = []
    for candidate in ordered[1:]:
        image = candidate.image
        width, height = image.size_px
        downsample = _downsample(finest, candidate)
        padded = downsample is not None and _crop(image, finest.image.size_px, downsample)
        cause = None
        if downsample is None:
            stated = "x".join(f"{value:.4g}" for value in candidate.spacing or ())
            cause = f"the spacing of {stated} um/px that it states does not go with its size"
        elif image.size_px[0] >= levels[-1].size_px[0] or image.size_px[1] > levels[-1].size_px[1]:
            cause = "it is not smaller than the next finer one"
        else:
            ratio = (downsample[0] / levels[-1].downsample[0], downsample[1] / levels[-1].downsample[1])
            other = (levels[-1].size_px[0] / width, levels[-1].size_px[1] / height)
            if padded and not shows_the_same(images[-1], image, ratio, other):
                cause = f"its picture is not at the scale of {downsample[0]:g} that its spacing states"
            elif image.local and min(image.size_px) >= SMALLEST_PX and not is_alike(images[-1], image, ratio):
                # Behind a URL that would take dozens of requests on each opening.
                cause = "it shows another picture than the next finer one"
        if cause is not None or downsample is None:
            notes.append(f"the level of {width} x {height} px ({candidate.name}) is left out: {cause}")
            continue
        images.append(image)
        levels.append(Level(image.size_px, downsample))
    return images, Pyramid(tuple(levels), mpp), notes


def _ordered(path: str, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Finest first: by spacing where all state it, since padded sizes may be equal, else by size."""

    def key(candidate: Candidate) -> tuple[float, int]:
        area = -candidate.image.size_px[0] * candidate.image.size_px[1]
        return (math.prod(candidate.spacing) if stated and candidate.spacing else 0.0, area)

    stated = all(candidate.spacing is not None for candidate in candidates)
    ordered = sorted(candidates, key=key)
    if ordered and stated and ordered[0].image.size_px != max((c.image.size_px for c in ordered), key=math.prod):
        # The spacings do not tell which is level 0: then the largest image is.
        stated = False
        ordered = sorted(candidates, key=key)
    seen: set[tuple[IntPair, FloatPair | None]] = set()
    for candidate in ordered:
        own = (candidate.image.size_px, candidate.spacing if stated else None)
        if own in seen:
            raise NotAPictureError(
                f"{path}: two images of the series have the same size of {own[0][0]} x {own[0][1]} px: one level "
                "twice, or focal planes or optical paths in files of their own, and nothing says which is the slide",
                remedy="keep the files of one picture in the folder",
            )
        seen.add(own)
    return ordered


def _downsample(finest: Candidate, candidate: Candidate) -> FloatPair | None:
    """Level-0 pixels per pixel of a level; None where its spacing and its size contradict each other."""
    stated = None
    if finest.spacing is not None and candidate.spacing is not None:
        stated = (candidate.spacing[0] / finest.spacing[0], candidate.spacing[1] / finest.spacing[1])
    return level_downsample(finest.image.size_px, candidate.image.size_px, stated, candidate.image.block_px)


def _crop(image: DicomImage, full: IntPair, downsample: FloatPair) -> bool:
    """Cut a level to its share of level 0; whether more was cut than rounding leaves over."""
    width, height = level_share(full, downsample)
    stored = image.size_px
    image.size_px = (min(stored[0], max(width, 1)), min(stored[1], max(height, 1)))
    return stored[0] > width + 1 or stored[1] > height + 1
