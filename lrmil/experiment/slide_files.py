"""What is written for a single slide: attention in its bag, tiles for QuPath, a heatmap."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lrmil.pictures.heatmap import LONGEST_PX, Caption, attention_overlay, attention_picture
from lrmil.predictor import Predictor, SlidePrediction, attention_geojson, write_attention
from wsi_pipe.bag import BagAttrs
from wsi_pipe.errors import WsiPipeError
from wsi_pipe.files import write_text_atomically
from wsi_pipe.pictures import write_image

__all__ = ["Ground", "attention_of", "caption_of", "write_slide_files"]

LEAST_LEVEL_PX = 512
"""Pyramids end with a level of at most this side."""


def write_slide_files(
    prediction: SlidePrediction,
    predictor: Predictor,
    out: Path,
    *,
    attention: bool = False,
    geojson: bool = False,
    heatmaps: bool = False,
    pyramids: bool = False,
    smooth: bool = False,
) -> SlidePrediction:
    """Write what is wanted of a slide's attention, and return the prediction without the arrays.

    attention: into the bag. geojson: ``out/geojson/<slide_id>.geojson``. heatmaps: ``out/heatmaps/<slide_id>.png``.
    pyramids: ``out/heatmaps/<slide_id>.ome.tif``, the same without what is written below it, a tiled pyramid that
    states its um per pixel. smooth: of both, interpolated between tiles. A slide without attention gets none of them;
    where it was asked for into bag or GeoJSON, and where a file cannot be made, the prediction comes back with status
    "failed" and the reason, its probabilities kept.
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
        ground = _ground(prediction) if heatmaps or pyramids else None
        if heatmaps and (picture := attention_of(prediction, ground, smooth=smooth)) is not None:
            write_image(out / "heatmaps" / f"{prediction.slide_id}.png", picture)
        if pyramids and ground is not None:
            _write_pyramid(out / "heatmaps" / f"{prediction.slide_id}.ome.tif", prediction, ground, smooth)
    except WsiPipeError as error:
        return dataclasses.replace(light, status="failed", reason=error.message, remedy=error.remedy)
    return light


@dataclass(frozen=True)
class Ground:
    """What a heatmap lies on. overview: uint8 (H, W, 3) of the whole slide. extent: its (width, height) in level-0 px.
    mpp: (x, y) um per level-0 px, None where it is not known."""

    overview: NDArray[np.uint8]
    extent: tuple[float, float]
    mpp: tuple[float, float] | None = None


def attention_of(
    prediction: SlidePrediction, ground: Ground | None = None, *, smooth: bool = False
) -> NDArray[np.uint8] | None:
    """The heatmap of a slide's attention, uint8 (H, W, 3); None where there is none, or no tile has a place.

    ground: picture of the slide, by default as the bag's slide or job has it. smooth: interpolated between tiles.
    """
    info, coords, attention = prediction.bag, prediction.coords, prediction.attention
    if info is None or coords is None or attention is None or not np.isfinite(coords).all():
        return None
    title = caption_of(prediction)
    if info.tile_size_l0 is None or info.coords_unit != "px_l0":
        return attention_picture(coords, _spacing(coords), attention, caption=Caption(title), smooth=smooth)
    ground = ground or _ground(prediction)
    if ground is None:
        return attention_picture(coords, info.tile_size_l0, attention, caption=Caption(title), smooth=smooth)
    return attention_picture(
        coords,
        info.tile_size_l0,
        attention,
        caption=Caption(title, ground.mpp[0] if ground.mpp else None),
        overview=ground.overview,
        extent=ground.extent,
        smooth=smooth,
    )


def caption_of(prediction: SlidePrediction) -> str:
    """A slide's name, what it is taken for, and how probable that is."""
    if prediction.predicted is None:
        return prediction.slide_id
    probability = prediction.probabilities.get(prediction.predicted)
    if probability is None:
        # Another target than a class: what it says first is its decision.
        return f"{prediction.slide_id}: {next(iter(prediction.said), '')} {prediction.predicted}"
    return f"{prediction.slide_id}: {prediction.predicted}, probability {probability:.2f}"


def _write_pyramid(path: Path, prediction: SlidePrediction, ground: Ground, smooth: bool) -> None:
    """Raises OutputError when it cannot be written. A slide whose tiles have no place in level-0 px gets none."""
    import cv2

    from wsi_pipe.slides.writing.write import write_pyramid

    info, coords, attention = prediction.bag, prediction.coords, prediction.attention
    if info is None or info.tile_size_l0 is None or coords is None or attention is None:
        return
    overlay, per_px = attention_overlay(
        coords, info.tile_size_l0, attention, overview=ground.overview, extent=ground.extent, smooth=smooth
    )
    levels = [overlay]
    while max(levels[-1].shape[:2]) > LEAST_LEVEL_PX:
        height, width = levels[-1].shape[:2]
        half = (max(1, round(width / 2)), max(1, round(height / 2)))
        levels.append(np.asarray(cv2.resize(levels[-1], half, interpolation=cv2.INTER_AREA), np.uint8))
    mpp = None if ground.mpp is None else (ground.mpp[0] * per_px[0], ground.mpp[1] * per_px[1])
    write_pyramid(path, levels, mpp=mpp, style="ome", quality=90)


def _ground(prediction: SlidePrediction) -> Ground | None:
    """The slide's picture: read from its file where that is at hand, else as the job keeps it beside its bags."""
    import cv2

    from wsi_pipe.bag import read_attrs
    from wsi_pipe.job import JobPaths
    from wsi_pipe.job.guard import read_guarded

    info = prediction.bag
    if info is None or info.format != "wsi-pipe" or info.coords_unit != "px_l0":
        return None
    path = Path(info.path)
    attrs = read_guarded(read_attrs, path)
    extent = (float(attrs.width_l0), float(attrs.height_l0))
    pixels = _from_file(attrs)
    if pixels is None:
        picture = JobPaths(path.parent.parent).overview_picture(info.slide_id)
        kept = cv2.imread(str(picture), cv2.IMREAD_COLOR_RGB) if picture.is_file() else None
        pixels = None if kept is None else np.asarray(kept, np.uint8)
    return None if pixels is None else Ground(pixels, extent, attrs.mpp_l0)


def _from_file(attrs: BagAttrs) -> NDArray[np.uint8] | None:
    """A slide's picture of at most LONGEST_PX from its own file; None where that is not at hand, or is another one."""
    from wsi_pipe.config import CacheSettings
    from wsi_pipe.job.opening import open_entry
    from wsi_pipe.manifest import SlideEntry
    from wsi_pipe.overview import read_thumbnail

    if not attrs.slide_path or not Path(attrs.slide_path).is_file():
        return None
    entry = SlideEntry(attrs.slide_id, attrs.slide_path, attrs.case_id, mpp=attrs.mpp_l0, scene=attrs.scene, z=attrs.z)
    try:
        slide = open_entry(entry, attrs.reader, CacheSettings(), copy=False)
        try:
            same = slide.pyramid.size_l0 == (attrs.width_l0, attrs.height_l0)
            return read_thumbnail(slide, LONGEST_PX) if same else None
        finally:
            slide.close()
    except WsiPipeError:
        # A picture is worth no failure: the job's own is smaller, and as true.
        return None


def _spacing(coords: NDArray[np.float64]) -> tuple[float, float]:
    """Side of a tile where the bag does not state it: the least step between coordinates of an axis."""
    steps = [np.diff(np.unique(coords[:, axis])) for axis in (0, 1)]
    sides = [float(step[step > 0].min()) if (step > 0).any() else 0.0 for step in steps]
    side = max(sides) or 1.0
    return (sides[0] or side, sides[1] or side)
