"""Annotated regions by class, and the share of each tile that every class covers."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.geometry import TileGrid
from wsi_pipe.tissue.areas import RGB, Rings
from wsi_pipe.tissue.coverage import grid_coverage, lines_across
from wsi_pipe.tissue.frame import Placed

__all__ = ["Region", "class_slug", "region_coverage", "regions_of"]

PALETTE: tuple[RGB, ...] = ((213, 40, 40), (35, 100, 220), (240, 150, 0), (130, 50, 180), (0, 150, 160), (150, 100, 40))
"""For classes that state no colour, by turns."""

LONGEST_SLUG = 100


@dataclass(frozen=True)
class Region:
    """All areas of one class on a slide.

    name: as QuPath shows it. slug: its name in paths. colour: RGB. polygons: in level-0 pixels of the whole image.
    cut: areas that belong to no class: those to ignore, and what lies beyond the edge of the slide.
    """

    name: str
    slug: str
    colour: RGB
    polygons: tuple[Rings, ...]
    cut: tuple[Rings, ...] = ()


def regions_of(placed: Placed) -> tuple[list[Region], list[str]]:
    """Regions by class, in the order in which classes appear in the file, and notes.

    Areas of a class "Ignore" or "Ignore*" are cut out of all classes; areas without a class are left out with a note.
    """
    cut = (*(rings for area in placed.areas if area.is_ignored for rings in area.polygons), *placed.beyond)
    by_name: dict[str, list[Rings]] = {}
    colours: dict[str, RGB] = {}
    nameless = 0
    for area in placed.areas:
        name = unicodedata.normalize("NFC", area.class_name)
        if area.is_ignored:
            continue
        if not name:
            nameless += 1
            continue
        by_name.setdefault(name, []).extend(area.polygons)
        if area.colour is not None:
            colours.setdefault(name, area.colour)
    regions: list[Region] = []
    for name, polygons in by_name.items():
        slug = class_slug(name, {region.slug for region in regions})
        colour = colours.get(name, PALETTE[len(regions) % len(PALETTE)])
        regions.append(Region(name, slug, colour, tuple(polygons), cut))
    notes = [f"{nameless} annotation{'s' if nameless > 1 else ''} without a class left out"] if nameless else []
    return regions, notes


def class_slug(name: str, taken: Collection[str] = ()) -> str:
    """A class's name as one part of a path: slashes and control characters become "_"; unlike any in ``taken``, in
    capitals or not."""
    slug = re.sub(r"[/\\\x00-\x1f\x7f]+", "_", name).strip()
    slug = re.sub(r"^\.+", "_", slug)[:LONGEST_SLUG] or "_"
    others, number, found = {other.casefold() for other in taken}, 2, slug
    while found.casefold() in others:
        found, number = f"{slug}-{number}", number + 1
    return found


def region_coverage(
    grids: Sequence[TileGrid], regions: Sequence[Region]
) -> dict[str, dict[str, NDArray[np.float32]]]:  # fmt: skip
    """For each grid's label and each region's slug, the fraction of each tile that the region covers, float32 (N,).

    Classes that lie within or across each other are counted each by itself. Where one grid divides the next, the
    fraction of a tile is the mean over all the tiles in it, kept or not.
    """
    return {
        grid.label: {
            region.slug: grid_coverage(grid, region.polygons, region.cut, lines=lines) for region in regions
        }
        for grid, lines in zip(grids, lines_across(grids), strict=True)
    }  # fmt: skip
