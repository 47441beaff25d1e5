"""Tissue and tiles of a slide under settings that are only tried."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from wsi_pipe.config import JobSettings, SegmentSettings, TileSettings
from wsi_pipe.errors import ConfigError
from wsi_pipe.geometry import TissueMask
from wsi_pipe.overview import Overview
from wsi_pipe.slides.base import Slide
from wsi_pipe.tiling import plan_grids
from wsi_pipe.tissue import find_tissue, trace_mask

__all__ = ["SLIDERS", "outline_of", "tried_settings", "tried_tissue"]

SLIDERS: dict[str, tuple[float, float, float]] = {
    "stain_min": (0.002, 0.08, 0.001),
    "stain_seed": (0.002, 0.12, 0.001),
    "smooth_um": (0.0, 40.0, 1.0),
    "close_um": (0.0, 120.0, 4.0),
    "min_area_um2": (0.0, 200_000.0, 1_000.0),
    "max_hole_um2": (0.0, 400_000.0, 5_000.0),
    "min_tissue": (0.0, 1.0, 0.01),
}
"""What can be tried: lowest, highest, step. All but ``min_tissue``, of the grids, are of the mask."""


def tried_settings(base: JobSettings, values: Mapping[str, float]) -> tuple[SegmentSettings, TileSettings]:
    """The job's settings with others for ``values``. Raises ConfigError for an unknown name or a value out of range."""
    unknown = sorted(set(values) - set(SLIDERS))
    if unknown:
        raise ConfigError(f"{unknown[0]!r} cannot be tried", remedy=f"known are {', '.join(SLIDERS)}")
    mask: dict[str, Any] = {name: value for name, value in values.items() if name != "min_tissue"}
    if "stain_min" in mask and "stain_seed" not in mask:
        mask["stain_seed"] = max(base.segment.stain_seed, mask["stain_min"])
    segment = dataclasses.replace(base.segment, **mask)
    tile = dataclasses.replace(base.tile, min_tissue=values.get("min_tissue", base.tile.min_tissue))
    return segment, tile


def tried_tissue(
    slide: Slide, overview: Overview, segment: SegmentSettings, tile: TileSettings
) -> tuple[TissueMask, dict[str, int]]:
    """The mask and the tiles by level label that ``wsi-pipe tile`` would get with these settings, for a slide without
    a mask of its own. Raises ResolutionError where a grid cannot be laid."""
    mask = find_tissue(overview.rgb, overview.um_per_px, overview.scale_l0, segment)
    grids = plan_grids(slide.pyramid, mask, tile)
    return mask, {grid.label: len(grid) for grid in grids}


def outline_of(mask: TissueMask) -> list[list[list[float]]]:
    """Rings of the mask in level-0 pixels, each a flat list x, y, x, y, ...: polygons, each an outer ring and holes."""
    scale = mask.scale_l0
    return [[(ring * scale).round(1).ravel().tolist() for ring in polygon] for polygon in trace_mask(mask.mask)]


def slider_rows(settings: JobSettings) -> list[dict[str, Any]]:
    """What the page draws: name, range, step, the job's value, and what it does."""
    helps = {f.name: str(f.metadata.get("help", "")) for f in dataclasses.fields(SegmentSettings)}
    helps["min_tissue"] = "a tile is kept if a judging cell in it has at least this fraction of tissue"
    rows = []
    for name, (low, high, step) in SLIDERS.items():
        value = settings.tile.min_tissue if name == "min_tissue" else getattr(settings.segment, name)
        rows.append({"name": name, "low": low, "high": high, "step": step, "value": value, "help": helps[name]})
    return rows
