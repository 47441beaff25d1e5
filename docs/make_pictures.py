"""Draw the pictures of docs/tissue.md and docs/synthetic.md: ``python docs/make_pictures.py``."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from wsi_pipe.config import TileSettings
from wsi_pipe.geometry import Pyramid
from wsi_pipe.pictures import thumbnail_with_contours, thumbnail_with_grids, write_image
from wsi_pipe.synthetic import SIGNALS, SlideSpec, SyntheticSlide
from wsi_pipe.tiling import plan_grids
from wsi_pipe.tissue import find_tissue

OUT = Path(__file__).parent / "images"


def slide_pictures() -> None:
    spec = SlideSpec(45, (9216, 7168), 0.5, 1, pen=True, debris=True, pale=True)
    slide = SyntheticSlide(spec)
    rgb, um_per_px, scale_l0 = slide.overview(8.0)
    mask = find_tissue(rgb, um_per_px, scale_l0)
    sharp, _, _ = slide.overview(4.0)
    um = (um_per_px[0] / 2, um_per_px[1] / 2)
    picture = thumbnail_with_contours(sharp, mask, um_per_px=um, title="synthetic slide 45")
    write_image(OUT / "tissue.jpg", picture, quality=85)
    pyramid = Pyramid.from_sizes([spec.size_px], (0.5, 0.5))
    grids = plan_grids(pyramid, mask, TileSettings())
    picture = thumbnail_with_grids(
        sharp, (scale_l0[0] / 2, scale_l0[1] / 2), grids, mask=mask, um_per_px=um, title="synthetic slide 45"
    )
    write_image(OUT / "grids.jpg", picture, quality=85)


def signal_picture() -> None:
    side, gap = 320, 12
    rows = []
    for signal in SIGNALS:
        specs = [SlideSpec(21, (1024, 1024), 0.5, label, signal) for label in (0, 1)]
        without, with_ = (SyntheticSlide(spec) for spec in specs)
        lesion = cv2.distanceTransform(with_.truth((1024, 1024)).lesion.astype(np.uint8), cv2.DIST_L2, 3)
        y, x = np.unravel_index(int(lesion.argmax()), lesion.shape)
        x0, y0 = (int(np.clip(v - side // 2, 0, 1024 - side)) // 4 * 4 for v in (x, y))
        tiles = [s.region(x0, y0, side, side) for s in (without, with_)]
        for tile in list(tiles):
            small = cv2.resize(tile, (side // 4, side // 4), interpolation=cv2.INTER_AREA)
            tiles.append(np.asarray(cv2.resize(small, (side, side), interpolation=cv2.INTER_NEAREST), np.uint8))
        rows.append(np.concatenate([np.pad(t, ((0, gap), (0, gap), (0, 0)), constant_values=255) for t in tiles], 1))
    write_image(OUT / "signals.png", np.concatenate(rows)[:-gap, :-gap])


if __name__ == "__main__":
    slide_pictures()
    signal_picture()
