"""Tissue masks as GeoJSON that QuPath opens, and back.

A file is a FeatureCollection in QuPath's frame (see ``frame``) with one Polygon annotation of class "Tissue" for each
piece of tissue. Its member ``wsi_pipe`` (which QuPath ignores, and drops on export) holds what the outlines cannot say:
from where they count, the mask's size and scale, why it is empty, and the settings that made it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.errors import MaskError
from wsi_pipe.geometry import FloatPair, IntPair, TissueMask
from wsi_pipe.tissue.areas import Area, class_matches
from wsi_pipe.tissue.frame import MEMBER, Bounds, frame_statement, place_areas
from wsi_pipe.tissue.outline import fill_polygons, trace_mask

__all__ = ["TISSUE_RGB", "GivenMask", "StoredMask", "mask_from_geojson", "mask_to_geojson", "read_mask", "stored_mask"]

TISSUE_RGB = (0, 128, 64)
"""Colour of the outlines: a green that neither haematoxylin nor eosin has."""

_DECIMALS = 4
_MOST_PX = 1 << 31


@dataclass(frozen=True)
class StoredMask:
    """What a file written by ``mask_to_geojson`` says beside the outlines.

    size_px: (width, height) of the mask. scale_l0: level-0 pixels per mask pixel, (x, y). settings: as given.
    """

    size_px: IntPair
    scale_l0: FloatPair
    empty_reason: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GivenMask:
    """A mask that was given, and notes of how it was read and of what of it does not count."""

    mask: TissueMask
    notes: tuple[str, ...]


def mask_to_geojson(
    mask: TissueMask,
    settings: Mapping[str, Any] | None = None,
    *,
    origin_l0: FloatPair = (0, 0),
    outlines: Sequence[Sequence[NDArray[np.int64]]] | None = None,
) -> dict[str, Any]:
    """A FeatureCollection (JSON-able) of the mask's pieces, along pixel edges, in level-0 pixels from ``origin_l0``.

    origin_l0: what QuPath counts from on this slide, (x, y) in the whole image; see ``qupath_origin``.
    ``mask_from_geojson`` gives exactly the same mask. settings: plain values to keep with it, such as
    ``wsi_pipe.config.to_mapping(settings)``. outlines: the mask's (``trace_mask``), where they are known.
    """
    scale, origin = np.asarray(mask.scale_l0), np.asarray(origin_l0, float)
    features = []
    polygons = trace_mask(mask.mask) if outlines is None else outlines
    for number, rings in enumerate(polygons, start=1):
        closed = [np.round(np.concatenate([ring, ring[:1]]) * scale - origin, _DECIMALS) for ring in rings]
        features.append(
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [_numbers(ring) for ring in closed]},
                "properties": {
                    "objectType": "annotation",
                    "name": f"Tissue {number}",
                    "classification": {"name": "Tissue", "color": list(TISSUE_RGB)},
                    "isLocked": False,
                },
            }
        )
    member = {
        **frame_statement(origin_l0),
        "mask_size_px": [mask.mask.shape[1], mask.mask.shape[0]],
        "scale_l0": [float(mask.scale_l0[0]), float(mask.scale_l0[1])],
        "empty_reason": mask.empty_reason,
        "settings": dict(settings or {}),
    }
    return {"type": "FeatureCollection", "features": features, MEMBER: member}


def _numbers(ring: NDArray[np.float64]) -> list[list[float]]:
    """Vertices as lists; whole numbers as integers, which halves the text."""
    if np.array_equal(ring, np.rint(ring)):
        whole: list[list[float]] = ring.astype(np.int64).tolist()
        return whole
    plain: list[list[float]] = ring.tolist()
    return plain


def stored_mask(data: object) -> StoredMask | None:
    """What ``mask_to_geojson`` stored beside the outlines, or None for a GeoJSON that holds no mask of this program.

    Raises MaskError where the member is there and broken.
    """
    member = data.get(MEMBER) if isinstance(data, Mapping) else None
    if member is None or (isinstance(member, Mapping) and "mask_size_px" not in member and "scale_l0" not in member):
        return None
    try:
        size = (int(member["mask_size_px"][0]), int(member["mask_size_px"][1]))
        scale = (float(member["scale_l0"][0]), float(member["scale_l0"][1]))
        reason, settings = member.get("empty_reason"), dict(member.get("settings") or {})
    except (TypeError, KeyError, IndexError, ValueError, AttributeError, OverflowError) as error:
        raise MaskError(
            f"the member {MEMBER!r} of the GeoJSON is broken: {error!r}",
            remedy="delete that member, or make the mask again with wsi-pipe segment",
        ) from error
    if min(size) < 1 or not all(math.isfinite(s) and s > 0 for s in scale):
        raise MaskError(f"the GeoJSON states a mask of {size} px at scale {scale}, which cannot be")
    return StoredMask(size, scale, None if reason is None else str(reason), settings)


def mask_from_geojson(
    data: object,
    size_l0: IntPair,
    scale_l0: FloatPair | None = None,
    *,
    bounds_l0: Bounds | None = None,
    frame: str | None = None,
) -> TissueMask:
    """The mask alone of ``read_mask``."""
    return read_mask(data, size_l0, scale_l0, bounds_l0=bounds_l0, frame=frame).mask


def read_mask(
    data: object,
    size_l0: IntPair,
    scale_l0: FloatPair | None = None,
    *,
    bounds_l0: Bounds | None = None,
    frame: str | None = None,
    classes: Sequence[str] = (),
) -> GivenMask:
    """The mask of the pixels whose centre lies in an area of a GeoJSON, edited or as ``mask_to_geojson`` made it.

    data: parsed JSON; see ``read_areas`` for what counts in it, ``place_areas`` for from where it counts. Areas of a
    class named "Ignore" or "Ignore*", or derived from it, are cut out of the others. classes: only areas of these
    count, as ``class_matches`` compares them; without them, areas of any class. size_l0: (width, height) of the slide;
    what lies off it is cut off, with a note. scale_l0: level-0 pixels per mask pixel; None for that stored in the file.
    The mask's size is the stored one where that is of this scale and slide, else what covers the slide.

    Raises MaskError when the data is not GeoJSON or holds detections alone, a coordinate is not a finite number, most
    of the area lies off the slide, no scale is given and none stored, or the mask would have more than 2**31 pixels.
    """
    stored = stored_mask(data)
    if scale_l0 is None:
        if stored is None:
            raise MaskError("the GeoJSON states no scale", remedy="give the mask's resolution")
        scale_l0 = stored.scale_l0
    covering = [max(1, math.ceil(n / s - 1e-6)) for n, s in zip(size_l0, scale_l0, strict=True)]
    size_px = (covering[0], covering[1])
    if (
        stored is not None
        and np.allclose(stored.scale_l0, scale_l0, rtol=1e-9, atol=0)
        # Overviews are rounded to whole pixels; a size that is farther off is of another slide, or of nobody.
        and all(
            abs(own * s - n) <= s + 1 + n / 100 for own, s, n in zip(stored.size_px, scale_l0, size_l0, strict=True)
        )
    ):
        size_px = stored.size_px
    if size_px[0] * size_px[1] > _MOST_PX:
        raise MaskError(
            f"a mask of {size_px[0]:,} x {size_px[1]:,} px is too large", remedy="give it at a coarser resolution"
        )
    # The last column and row of a mask may reach a part of a mask pixel beyond the slide.
    slack = (max(scale_l0[0], 1.0), max(scale_l0[1], 1.0))
    placed = place_areas(data, size_l0, bounds_l0, frame=frame, slack_l0=slack)
    drawn = [area for area in placed.areas if not area.is_ignored]
    if not drawn and any("annotations count" in note for note in placed.notes):
        raise MaskError(
            f"the mask holds no annotation ({'; '.join(placed.notes)})",
            remedy="in QuPath, turn the objects that are meant into annotations, and export again",
        )
    wanted = [a for a in drawn if not classes or any(class_matches(a, name) for name in classes)]
    mask = _filled(wanted, scale_l0, size_px)
    ignored = [area for area in placed.areas if area.is_ignored]
    if ignored:
        mask &= ~_filled(ignored, scale_l0, size_px)
    reason = None
    if not mask.any():
        reason = (stored.empty_reason if stored else None) or _why_empty(drawn, wanted, classes)
    return GivenMask(TissueMask(mask, (float(scale_l0[0]), float(scale_l0[1])), reason), placed.notes)


def _filled(areas: Sequence[Area], scale_l0: FloatPair, size_px: IntPair) -> NDArray[np.bool_]:
    scale = np.asarray(scale_l0)
    return fill_polygons([[ring / scale for ring in rings] for area in areas for rings in area.polygons], size_px)


def _why_empty(drawn: Sequence[Area], wanted: Sequence[Area], classes: Sequence[str]) -> str:
    if not classes or wanted:
        return "the given mask has no area"
    there = ", ".join(dict.fromkeys(area.class_name or "no class" for area in drawn)) or "no area"
    return f"no area of class {' or '.join(classes)}: there is {there}"
