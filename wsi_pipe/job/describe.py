"""What a slide or a bag is, as JSON-able values."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from wsi_pipe.bag import read_header
from wsi_pipe.config import TileSettings
from wsi_pipe.errors import BagError, ResolutionError, in_words
from wsi_pipe.geometry import Pyramid, TissueMask
from wsi_pipe.job.guard import read_guarded
from wsi_pipe.job.opening import open_entry
from wsi_pipe.manifest import SlideEntry
from wsi_pipe.slides.personal import personal_items
from wsi_pipe.tiling import plan_grids

__all__ = ["describe_bag", "describe_slide", "tiles_over_all"]


def describe_bag(path: Path) -> dict[str, Any]:
    """Facts about one bag: of which slide, grids, and features with the weights that made them.

    A file that is no bag, or damaged, gives ``error`` in their place.
    """
    base: dict[str, Any] = {"bag": str(path)}
    try:
        header = read_guarded(read_header, path)
    except BagError as error:
        return base | {"error": error.message, "remedy": error.remedy}
    attrs = header.attrs
    levels = {
        grid.label: {
            "tiles": len(grid),
            "tile_px": grid.spec.size_px,
            "mpp": list(grid.mpp_effective),
            "features": {
                slug: {
                    "encoder": item.encoder,
                    "dim": item.dim,
                    "precision": item.precision,
                    "weights": item.weights or item.weights_sha256,
                }
                for slug, item in header.features[grid.label].items()
            },
        }
        for grid in header.grids
    }
    names = ("slide_id", "case_id", "slide_path", "status", "empty_reason", "mpp_source", "wsi_pipe_version")
    facts = {name: getattr(attrs, name) for name in names}
    return base | facts | {"mpp": list(attrs.mpp_l0), "levels": levels}


def describe_slide(
    entry: SlideEntry, settings: TileSettings, reader: str, *, properties: bool = False
) -> dict[str, Any]:
    """Facts about one slide; a slide that cannot be opened gives ``error`` and ``remedy`` in place of them.

    tiles: by level label, how many tiles cover the whole slide, tissue or not; None where the slide is too coarse.
    """
    base: dict[str, Any] = {"slide_id": entry.slide_id, "path": entry.shown_path}
    try:
        slide = open_entry(entry, reader)
    except Exception as error:
        # A damaged file may fail in ways that nobody foresaw: it must not hide the other slides.
        reason, remedy = in_words(error)
        return base | {"error": f"{reason}; {remedy}" if remedy else reason, "remedy": remedy}
    try:
        facts, pyramid = slide.info, slide.pyramid
        base |= {
            "vendor": facts.vendor,
            "reader": facts.reader,
            "reader_reason": facts.reader_reason,
            "notes": list(facts.notes),
            "width": pyramid.size_l0[0],
            "height": pyramid.size_l0[1],
            "levels": [
                {"width": level.size_px[0], "height": level.size_px[1], "downsample": list(level.downsample)}
                for level in pyramid.levels
            ],
            "mpp": list(pyramid.mpp) if pyramid.mpp else None,
            "mpp_source": facts.mpp_source,
            "objective_power": facts.objective_power,
            "icc_bytes": len(facts.icc) if facts.icc else 0,
            "bounds": list(facts.bounds_l0) if facts.bounds_l0 else None,
            "fingerprint": facts.fingerprint,
            "tiles": tiles_over_all(pyramid, settings),
            "personal": [dataclasses.asdict(item) for item in personal_items(slide)],
        }
        return base | ({"properties": dict(facts.properties)} if properties else {})
    finally:
        slide.close()


def tiles_over_all(pyramid: Pyramid, settings: TileSettings) -> dict[str, int | None]:
    """Tiles that cover the whole slide at each resolution by itself, by label; None where the slide is too coarse or
    states no resolution."""
    everything = TissueMask(np.ones((1, 1), bool), (float(pyramid.size_l0[0]), float(pyramid.size_l0[1])))
    counts: dict[str, int | None] = {}
    for spec in settings.specs:
        if pyramid.mpp is None:
            counts[spec.label] = None
            continue
        alone = dataclasses.replace(settings, resolutions=(spec.mpp,), min_tissue=0.0)
        try:
            counts[spec.label] = len(plan_grids(pyramid, everything, alone)[0])
        except ResolutionError:
            counts[spec.label] = None
    return counts
