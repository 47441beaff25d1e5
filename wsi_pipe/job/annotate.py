"""A slide's annotations beside its grids: what share of each tile every class covers.

They are a stage of their own that hangs on the grids and on the file alone: features hang on cells and pixels, so that
other annotations leave them as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsi_pipe.bag import TileValues
from wsi_pipe.config import fingerprint
from wsi_pipe.files import parse_json
from wsi_pipe.geometry import TileGrid
from wsi_pipe.job.given import naming_the_file, read_geojson
from wsi_pipe.manifest import SlideEntry
from wsi_pipe.slides.base import Slide
from wsi_pipe.tissue import Region, place_areas, region_coverage, regions_of

__all__ = ["Annotations", "annotate", "read_annotations", "stored_annotation"]

ANNOTATION_VERSION = 1
"""Raised when a change to how tiles are compared with annotations changes its results."""


@dataclass(frozen=True)
class Annotations:
    """A file of annotations. sha256: of its bytes. fingerprint: of the file on the grids that it is compared with."""

    path: Path
    data: Any
    sha256: str
    fingerprint: str


def read_annotations(entry: SlideEntry, slide: Slide, tile_fingerprint: str) -> Annotations | None:
    """The annotations of a slide, or None where it has none. Raises MaskError when their file cannot be read."""
    if entry.annotations is None:
        return None
    path = Path(entry.annotations)
    data, sha256 = read_geojson(path)
    bounds = slide.info.bounds_l0
    own = fingerprint("annotation", ANNOTATION_VERSION, tile_fingerprint, sha256, entry.frame, bounds)
    return Annotations(path, data, sha256, own)


def stored_annotation(text: str) -> Mapping[str, Any]:
    """What a bag or tile file says of its annotations (``BagAttrs.annotation``); empty where it says nothing."""
    try:
        value = parse_json(text) if text else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def annotate(
    annotations: Annotations, frame: str | None, slide: Slide, grids: Sequence[TileGrid]
) -> tuple[dict[str, dict[str, TileValues]], list[Region], str]:
    """Covered fractions by level label and class, the regions, and the text that a bag keeps of them.

    Raises MaskError for a file that is not GeoJSON, or lies mostly off the slide.
    """
    size = slide.pyramid.size_l0
    with naming_the_file(annotations.path):
        placed = place_areas(annotations.data, size, slide.info.bounds_l0, frame=frame)
        regions, more = regions_of(placed)
        covered = region_coverage(grids, regions)
    notes = [f"annotations: {note}" for note in (*placed.notes, *more)]
    if not regions:
        notes.append(f"annotations: {annotations.path.name} holds no area of a class")
    values = {
        label: {
            region.slug: TileValues(own[region.slug], {"class": region.name, "color": region.colour})
            for region in regions
        }
        for label, own in covered.items()
    }
    about = {
        "fingerprint": annotations.fingerprint,
        "sha256": annotations.sha256,
        "frame": placed.frame,
        "origin_l0": list(placed.origin_l0),
        "classes": [{"path": r.slug, "name": r.name, "color": list(r.colour)} for r in regions],
        "notes": notes,
    }
    return values, regions, json.dumps(about, ensure_ascii=False)
