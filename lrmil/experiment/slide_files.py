"""What is written for a single slide: attention in its bag, tiles for QuPath, a heatmap."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lrmil.pictures.heatmap import attention_picture, write_png
from lrmil.predictor import Predictor, SlidePrediction, attention_geojson, write_attention
from lrmil.store import BagInfo
from wsi_pipe.errors import WsiPipeError
from wsi_pipe.files import write_text_atomically

__all__ = ["attention_of", "write_slide_files"]


def write_slide_files(
    prediction: SlidePrediction,
    predictor: Predictor,
    out: Path,
    *,
    attention: bool = False,
    geojson: bool = False,
    heatmaps: bool = False,
) -> SlidePrediction:
    """Write what is wanted of a slide's attention, and return the prediction without the arrays.

    attention: into the bag. geojson: ``out/geojson/<slide_id>.geojson``. heatmaps: ``out/heatmaps/<slide_id>.png``. A
    slide without attention gets none of them; where it was asked for into bag or GeoJSON, and where a file cannot be
    made, the prediction comes back with status "failed" and the reason, its probabilities kept.
    """
    light = dataclasses.replace(prediction, attention=None, coords=None)
    if prediction.status != "done":
        return light
    try:
        if attention:
            write_attention(prediction, predictor.name)
        if geojson:
            text = json.dumps(attention_geojson(prediction, predictor.name), separators=(",", ":"))
            write_text_atomically(out / "geojson" / f"{prediction.slide_id}.geojson", text)
        if heatmaps and (picture := attention_of(prediction)) is not None:
            write_png(out / "heatmaps" / f"{prediction.slide_id}.png", picture)
    except WsiPipeError as error:
        return dataclasses.replace(light, status="failed", reason=error.message, remedy=error.remedy)
    return light


def attention_of(
    prediction: SlidePrediction,
    overview: NDArray[np.uint8] | None = None,
    extent: tuple[float, float] | None = None,
) -> NDArray[np.uint8] | None:
    """The heatmap of a slide's attention, uint8 (H, W, 3); None where there is none, or no tile has a place.

    overview, extent: picture of the slide and the slide's size in level-0 px, by default as the bag's job keeps them.
    """
    info, coords, attention = prediction.bag, prediction.coords, prediction.attention
    if info is None or coords is None or attention is None or not np.isfinite(coords).all():
        return None
    if info.tile_size_l0 is not None and info.coords_unit == "px_l0":
        if overview is None or extent is None:
            overview, extent = _overview(info)
        return attention_picture(coords, info.tile_size_l0, attention, overview=overview, extent=extent)
    return attention_picture(coords, _spacing(coords), attention)


def _overview(info: BagInfo) -> tuple[NDArray[np.uint8] | None, tuple[float, float] | None]:
    """The overview that the job keeps beside its bags, and the slide's size in level-0 px."""
    import cv2

    from wsi_pipe.bag import read_attrs
    from wsi_pipe.job import JobPaths
    from wsi_pipe.job.guard import read_guarded

    path = Path(info.path)
    picture = JobPaths(path.parent.parent).overview_picture(info.slide_id)
    if info.format != "wsi-pipe" or not picture.is_file():
        return None, None
    pixels = cv2.imread(str(picture), cv2.IMREAD_COLOR_RGB)
    if pixels is None:
        return None, None
    attrs = read_guarded(read_attrs, path)
    return np.asarray(pixels, np.uint8), (float(attrs.width_l0), float(attrs.height_l0))


def _spacing(coords: NDArray[np.float64]) -> tuple[float, float]:
    """Side of a tile where the bag does not state it: the least step between coordinates of an axis."""
    steps = [np.diff(np.unique(coords[:, axis])) for axis in (0, 1)]
    sides = [float(step[step > 0].min()) if (step > 0).any() else 0.0 for step in steps]
    side = max(sides) or 1.0
    return (sides[0] or side, sides[1] or side)
