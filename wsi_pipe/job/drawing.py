"""The pictures of one slide: put together while it is prepared, drawn once its results are safe.

No result depends on a picture. They wait for the bag (or for the last file of a stage that ends before it), so that the
device never waits for them, and come before the slide is noted as done: a run that is broken off in between leaves a
slide that is looked at again, and whose pictures are then drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.geometry import FloatPair, IntPair, TileGrid, TissueMask
from wsi_pipe.job.paths import JobPaths
from wsi_pipe.overview import read_overview
from wsi_pipe.pictures import Outlines, thumbnail_with_contours, thumbnail_with_grids, write_image
from wsi_pipe.slides.base import Slide
from wsi_pipe.tissue import Region, trace_mask

__all__ = ["SlidePictures", "draw_slide", "grid_picture_of", "tissue_picture_of"]

PICTURE_PX = 1024
"""Longest side of the bare overview, and of the picture of grids."""

LARGEST_PX = 1600
"""Longest side of any picture: of slides that wait to be drawn no more is kept."""


@dataclass(frozen=True)
class SlidePictures:
    """What is to be drawn of a slide. rgb: uint8 (H, W, 3), the whole of it; size_l0, mpp: of level 0.

    tissue: whether the bare overview and the tissue's outlines are. grids: those of the picture of grids, None for no
    such picture. regions: annotated classes on it.
    """

    slide_id: str
    rgb: NDArray[np.uint8]
    size_l0: IntPair
    mpp: FloatPair
    mask: TissueMask
    tissue: bool = False
    grids: tuple[TileGrid, ...] | None = None
    regions: tuple[Region, ...] = ()
    outlines: Outlines | None = None


def tissue_picture_of(
    slide_id: str, slide: Slide, rgb: NDArray[np.uint8], mask: TissueMask, outlines: Outlines | None = None
) -> SlidePictures:
    """The bare overview and the tissue on it."""
    mpp = slide.pyramid.isotropic_mpp
    assert mpp is not None, "the segment stage refuses slides without a resolution"
    rgb = _shrunk(rgb, LARGEST_PX)
    return SlidePictures(slide_id, rgb, slide.pyramid.size_l0, mpp, mask, tissue=True, outlines=outlines)


def grid_picture_of(
    slide_id: str,
    slide: Slide,
    mask: TissueMask,
    grids: Sequence[TileGrid],
    regions: Sequence[Region],
    before: SlidePictures | None,
    paths: JobPaths,
) -> SlidePictures:
    """The grids on the overview of ``before``, which is to be drawn too, else on the one that an earlier run left.

    Raises SlideReadError where the slide has to be looked at for want of both.
    """
    import cv2

    if before is None:
        stored = cv2.imread(str(paths.overview_picture(slide_id)), cv2.IMREAD_COLOR)
        rgb = (
            read_overview(slide).rgb
            if stored is None
            else np.asarray(cv2.cvtColor(stored, cv2.COLOR_BGR2RGB), np.uint8)
        )
        before = replace(tissue_picture_of(slide_id, slide, rgb, mask), tissue=False)
    return replace(before, mask=mask, grids=tuple(grids), regions=tuple(regions))


def draw_slide(pictures: SlidePictures, paths: JobPaths) -> None:
    """Draw and write what is to be drawn. Raises OutputError when it cannot be written."""
    small = _shrunk(pictures.rgb, PICTURE_PX)
    outlines = trace_mask(pictures.mask.mask) if pictures.outlines is None else pictures.outlines
    if pictures.tissue:
        write_image(paths.overview_picture(pictures.slide_id), small)
        picture = thumbnail_with_contours(
            pictures.rgb,
            pictures.mask,
            um_per_px=_um_per_px(pictures, pictures.rgb),
            title=pictures.slide_id,
            outlines=outlines,
        )
        write_image(paths.tissue_picture(pictures.slide_id), picture)
    if pictures.grids is not None:
        scale_l0 = (pictures.size_l0[0] / small.shape[1], pictures.size_l0[1] / small.shape[0])
        picture = thumbnail_with_grids(
            small,
            scale_l0,
            pictures.grids,
            mask=pictures.mask,
            um_per_px=_um_per_px(pictures, small),
            title=pictures.slide_id,
            regions=pictures.regions,
            outlines=outlines,
        )
        write_image(paths.grid_picture(pictures.slide_id), picture)


def _um_per_px(pictures: SlidePictures, rgb: NDArray[np.uint8]) -> FloatPair:
    x, y = (size * mpp for size, mpp in zip(pictures.size_l0, pictures.mpp, strict=True))
    return (x / rgb.shape[1], y / rgb.shape[0])


def _shrunk(rgb: NDArray[np.uint8], most_px: int) -> NDArray[np.uint8]:
    import cv2

    longest = max(rgb.shape[:2])
    if longest <= most_px:
        return rgb
    factor = most_px / longest
    size = (max(round(rgb.shape[1] * factor), 1), max(round(rgb.shape[0] * factor), 1))
    return np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), np.uint8)
