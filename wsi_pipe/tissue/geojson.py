"""Tissue masks as GeoJSON that QuPath opens, and back.

A file is a FeatureCollection in level-0 pixels with one Polygon annotation of class "Tissue" for each piece of tissue.
Its member ``wsi_pipe`` (which QuPath ignores, and drops on export) holds what the outlines cannot say: the mask's
size and scale, why it is empty, and the settings that made it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.errors import MaskError
from wsi_pipe.geometry import FloatPair, IntPair, TissueMask
from wsi_pipe.tissue.outline import fill_polygons, trace_mask

__all__ = ["TISSUE_RGB", "StoredMask", "geojson_notices", "mask_from_geojson", "mask_to_geojson", "stored_mask"]

TISSUE_RGB = (0, 128, 64)
"""Colour of the outlines: a green that neither haematoxylin nor eosin has."""

_MEMBER = "wsi_pipe"
_DECIMALS = 4
_AREAS = ("Polygon", "MultiPolygon")
_NOT_AREAS = ("Point", "MultiPoint", "LineString", "MultiLineString")
_REMEDY = "give a GeoJSON that QuPath exports (File > Export objects as GeoJSON), in level-0 pixels of this slide"

Rings = list[NDArray[np.float64]]


@dataclass(frozen=True)
class StoredMask:
    """What a file written by ``mask_to_geojson`` says beside the outlines.

    size_px: (width, height) of the mask. scale_l0: level-0 pixels per mask pixel, (x, y). settings: as given.
    """

    size_px: IntPair
    scale_l0: FloatPair
    empty_reason: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def mask_to_geojson(mask: TissueMask, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A FeatureCollection (JSON-able) of the mask's pieces in level-0 pixels, along pixel edges.

    ``mask_from_geojson`` gives exactly the same mask. settings: plain values to keep with it, such as
    ``wsi_pipe.config.to_mapping(settings)``.
    """
    scale = np.asarray(mask.scale_l0)
    features = []
    for number, rings in enumerate(trace_mask(mask.mask), start=1):
        closed = [np.round(np.concatenate([ring, ring[:1]]) * scale, _DECIMALS) for ring in rings]
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
        "mask_size_px": [mask.mask.shape[1], mask.mask.shape[0]],
        "scale_l0": [float(mask.scale_l0[0]), float(mask.scale_l0[1])],
        "empty_reason": mask.empty_reason,
        "settings": dict(settings or {}),
    }
    return {"type": "FeatureCollection", "features": features, _MEMBER: member}


def _numbers(ring: NDArray[np.float64]) -> list[list[float]]:
    """Vertices as lists; whole numbers as integers, which halves the text."""
    if np.array_equal(ring, np.rint(ring)):
        whole: list[list[float]] = ring.astype(np.int64).tolist()
        return whole
    plain: list[list[float]] = ring.tolist()
    return plain


def stored_mask(data: object) -> StoredMask | None:
    """What ``mask_to_geojson`` stored beside the outlines, or None for a GeoJSON of another tool.

    Raises MaskError where the member is there and broken.
    """
    member = data.get(_MEMBER) if isinstance(data, Mapping) else None
    if member is None:
        return None
    try:
        size = (int(member["mask_size_px"][0]), int(member["mask_size_px"][1]))
        scale = (float(member["scale_l0"][0]), float(member["scale_l0"][1]))
        reason, settings = member.get("empty_reason"), dict(member.get("settings") or {})
    except (TypeError, KeyError, IndexError, ValueError, AttributeError) as error:
        raise MaskError(
            f"the member {_MEMBER!r} of the GeoJSON is broken: {error!r}",
            remedy="delete that member, or make the mask again with wsi-pipe segment",
        ) from error
    if min(size) < 1 or not all(math.isfinite(s) and s > 0 for s in scale):
        raise MaskError(f"the GeoJSON states a mask of {size} px at scale {scale}, which cannot be")
    return StoredMask(size, scale, None if reason is None else str(reason), settings)


def mask_from_geojson(data: object, size_l0: IntPair, scale_l0: FloatPair | None = None) -> TissueMask:
    """The mask of the pixels whose centre lies in an area of a GeoJSON, edited or as ``mask_to_geojson`` made it.

    data: parsed JSON: a FeatureCollection, a list of Features, a Feature, or a geometry. Areas (Polygon, MultiPolygon,
    also in a GeometryCollection) count whatever their class, except that those of a class named "Ignore" or "Ignore*"
    are cut out of the others; points and lines do not count (``geojson_notices`` says so). size_l0: (width, height)
    of the slide. scale_l0: level-0 pixels per mask pixel; None for that stored in the file. The mask's size is the
    stored one where the scale is the stored one, else what covers the slide.

    Raises MaskError when the data is not GeoJSON, a coordinate is not a finite number or lies outside the slide, or
    no scale is given and none stored.
    """
    stored = stored_mask(data)
    if scale_l0 is None:
        if stored is None:
            raise MaskError("the GeoJSON states no scale", remedy="give the mask's resolution")
        scale_l0 = stored.scale_l0
    if stored is not None and np.allclose(stored.scale_l0, scale_l0, rtol=1e-9, atol=0):
        size_px = stored.size_px
    else:
        covering = [max(1, math.ceil(n / s - 1e-6)) for n, s in zip(size_l0, scale_l0, strict=True)]
        size_px = (covering[0], covering[1])
    areas: list[Rings] = []
    ignored: list[Rings] = []
    scale = np.asarray(scale_l0)
    for where, name, geometry in _geometries(data):
        for rings in _polygons(geometry, where):
            # The last column and row of a mask may reach a part of a mask pixel beyond the slide.
            _check_inside(rings, size_l0, scale_l0, where)
            (ignored if _is_ignore(name) else areas).append([ring / scale for ring in rings])
    mask = fill_polygons(areas, size_px)
    if ignored:
        mask &= ~fill_polygons(ignored, size_px)
    reason = None
    if not mask.any():
        reason = (stored.empty_reason if stored else None) or "the given mask has no area"
    return TissueMask(mask, (float(scale_l0[0]), float(scale_l0[1])), reason)


def geojson_notices(data: object) -> list[str]:
    """What ``mask_from_geojson`` leaves out of account, one line each: points, lines, objects without geometry."""
    counts: dict[str, int] = {}
    for _, _, geometry in _geometries(data):
        for kind in _leaves(geometry):
            if kind not in _AREAS:
                counts[kind] = counts.get(kind, 0) + 1
    return [f"{n} {kind} of the mask ignored: only areas count" for kind, n in counts.items()]


def _leaves(geometry: Mapping[str, Any]) -> Iterator[str]:
    if geometry.get("type") == "GeometryCollection":
        for part in geometry.get("geometries") or []:
            if isinstance(part, Mapping):
                yield from _leaves(part)
    else:
        yield str(geometry.get("type"))


def _is_ignore(name: str | None) -> bool:
    return name is not None and name.strip().rstrip("*").strip().casefold() == "ignore"


def _geometries(data: object) -> Iterator[tuple[str, str | None, Mapping[str, Any]]]:
    """(where, class name, geometry) of every object that has a geometry."""
    if isinstance(data, Mapping) and data.get("type") == "FeatureCollection":
        data = data.get("features")
        if not isinstance(data, list):
            raise MaskError("the FeatureCollection has no list of features", remedy=_REMEDY)
    for number, item in enumerate(data if isinstance(data, list) else [data], start=1):
        where = f"object {number}"
        if not isinstance(item, Mapping) or not isinstance(item.get("type"), str):
            raise MaskError(f"{where} of the mask is not GeoJSON: it has no type", remedy=_REMEDY)
        if item["type"] != "Feature":
            yield where, None, item
        elif isinstance(item.get("geometry"), Mapping):
            yield where, _class_name(item.get("properties")), item["geometry"]
        elif item.get("geometry") is not None:
            raise MaskError(f"{where} of the mask has a geometry that is not an object", remedy=_REMEDY)


def _class_name(properties: object) -> str | None:
    if not isinstance(properties, Mapping):
        return None
    classification = properties.get("classification")
    name = classification.get("name") if isinstance(classification, Mapping) else classification
    return name if isinstance(name, str) else None


def _polygons(geometry: Mapping[str, Any], where: str) -> Iterator[Rings]:
    kind = geometry.get("type")
    if kind == "GeometryCollection":
        parts = geometry.get("geometries")
        if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
            raise MaskError(f"{where} of the mask is a GeometryCollection without geometries", remedy=_REMEDY)
        for part in parts:
            yield from _polygons(part, where)
        return
    if kind in _NOT_AREAS:
        return
    if kind not in _AREAS:
        raise MaskError(f"{where} of the mask has the unknown geometry type {kind!r}", remedy=_REMEDY)
    coordinates = geometry.get("coordinates")
    polygons = [coordinates] if kind == "Polygon" else coordinates
    if not isinstance(polygons, list) or not all(isinstance(polygon, list) for polygon in polygons):
        raise MaskError(f"{where} of the mask has no coordinates", remedy=_REMEDY)
    for polygon in polygons:
        rings = [_ring(ring, where) for ring in polygon]
        if rings:
            yield rings


def _ring(ring: object, where: str) -> NDArray[np.float64]:
    try:
        points = np.array(ring, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        message = f"{where} of the mask has a coordinate that is not a pair of numbers"
        raise MaskError(message, remedy=_REMEDY) from error
    if points.ndim != 2 or points.shape[1] < 2 or len(points) < 3 or not np.isfinite(points).all():
        raise MaskError(
            f"{where} of the mask has a ring of fewer than three points or a coordinate that is not finite",
            remedy=_REMEDY,
        )
    points = points[:, :2]  # a third number is a height
    return points[:-1] if len(points) > 3 and np.array_equal(points[0], points[-1]) else points


def _check_inside(rings: Rings, size_l0: IntPair, scale_l0: FloatPair, where: str) -> None:
    slack = np.maximum(np.asarray(scale_l0), 1.0)
    for ring in rings:
        low, high = ring.min(axis=0), ring.max(axis=0)
        if (low < -slack).any() or (high > np.asarray(size_l0) + slack).any():
            raise MaskError(
                f"{where} of the mask reaches from ({low[0]:g}, {low[1]:g}) to ({high[0]:g}, {high[1]:g}), outside the "
                f"slide of {size_l0[0]} x {size_l0[1]} px",
                remedy="the mask must be of this slide, in level-0 pixels and not in um or pixels of another level",
            )
