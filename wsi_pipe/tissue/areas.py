"""The areas of a GeoJSON: what was drawn, of which class, and what of the file does not count.

QuPath writes annotations, detections, cells and tiles into the same kind of file. What people draw are annotations;
only those, and plain geometries of other programs, count here.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.errors import MaskError

__all__ = ["FARTHEST", "Area", "Rings", "class_matches", "read_areas"]

Rings = list[NDArray[np.float64]]
"""One polygon: its outer ring, then its holes; float64 (N, 2) each, the first vertex not repeated at the end."""

RGB = tuple[int, int, int]

_AREAS = ("Polygon", "MultiPolygon")
_NOT_AREAS = ("Point", "MultiPoint", "LineString", "MultiLineString")
_NOT_DRAWN = ("detection", "cell", "tile", "root")
_DEEPEST = 16
"""Collections within collections."""
FARTHEST = 1e12
"""No slide has pixels beyond; squares of it keep their precision."""
_REMEDY = "give a GeoJSON that QuPath exports (File > Export objects as GeoJSON), in level-0 pixels of this slide"


@dataclass(frozen=True)
class Area:
    """One object of a GeoJSON that covers ground.

    where: its number in the file, in words. names: its class, and the classes that this is derived into; empty where it
    has none. colour: of the class, RGB from 0 to 255, or None. polygons: in the file's own frame until it is placed.
    """

    where: str
    names: tuple[str, ...]
    colour: RGB | None
    polygons: tuple[Rings, ...]

    @property
    def class_name(self) -> str:
        """The whole class as QuPath shows it, "Tumour: Positive"; "" where there is none."""
        return ": ".join(self.names)

    @property
    def is_ignored(self) -> bool:
        """Whether it says what to leave out: of class "Ignore" or "Ignore*", or derived from it."""
        return any(name.strip().rstrip("*").strip().casefold() == "ignore" for name in self.names)

    @property
    def corners(self) -> NDArray[np.float64]:
        """Of its bounding box: float64 (2, 2), lowest (x, y), then highest."""
        outer = [polygon[0] for polygon in self.polygons]
        return np.array([np.min([r.min(0) for r in outer], axis=0), np.max([r.max(0) for r in outer], axis=0)])

    def moved(self, by: tuple[float, float]) -> Area:
        """The same area elsewhere."""
        if by == (0.0, 0.0):
            return self
        return dataclasses.replace(self, polygons=tuple([ring + by for ring in rings] for rings in self.polygons))


def class_matches(area: Area, wanted: str) -> bool:
    """Whether an area is of the class ``wanted``, in capitals or not: its whole class, or what it is derived from.

    "Tumour" matches "Tumour" and "Tumour: Positive", not "Non-tumour".
    """
    name, own = wanted.strip().casefold(), area.class_name.casefold()
    return bool(name) and (own == name or own.startswith(f"{name}:"))


def read_areas(data: object) -> tuple[list[Area], list[str]]:
    """The areas of parsed GeoJSON, and notes of what in it does not count.

    data: a FeatureCollection, a list of Features, a Feature, or a geometry. Areas are Polygon and MultiPolygon, also
    in a GeometryCollection. Left out with a note: points and lines, detections, cells and tiles of QuPath, and rings
    of fewer than three different points. Raises MaskError when the data is not GeoJSON or a coordinate is not a finite
    number.
    """
    found: list[Area] = []
    left_out: Counter[str] = Counter()
    for where, feature, geometry in _geometries(data):
        kind = _object_kind(feature)
        if kind in _NOT_DRAWN:
            left_out[f"{kind}|only annotations count"] += 1
            continue
        polygons = tuple(_polygons(geometry, where, left_out))
        if polygons:
            names, colour = _classification(feature.get("properties"))
            found.append(Area(where, names, colour, polygons))
    return found, [
        f"{number} {what.partition('|')[0]}{'s' if number > 1 else ''} ignored: {what.partition('|')[2]}"
        for what, number in left_out.items()
    ]


def _geometries(data: object) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """(where, feature, geometry) of every object that has a geometry; the feature is empty for a plain geometry."""
    if isinstance(data, Mapping) and data.get("type") == "FeatureCollection":
        data = data.get("features")
        if not isinstance(data, list):
            raise MaskError("the FeatureCollection has no list of features", remedy=_REMEDY)
    for number, item in enumerate(data if isinstance(data, list) else [data], start=1):
        where = f"object {number}"
        if not isinstance(item, Mapping) or not isinstance(item.get("type"), str):
            raise MaskError(f"{where} is not GeoJSON: it has no type", remedy=_REMEDY)
        if item["type"] != "Feature":
            yield where, {}, item
        elif isinstance(item.get("geometry"), Mapping):
            yield where, item, item["geometry"]
        elif item.get("geometry") is not None:
            raise MaskError(f"{where} has a geometry that is not an object", remedy=_REMEDY)


def _object_kind(feature: Mapping[str, Any]) -> str:
    """What QuPath calls the object: "annotation", "cell" and so on; early versions put it into the id."""
    properties = feature.get("properties")
    kind = properties.get("objectType", properties.get("object_type")) if isinstance(properties, Mapping) else None
    if not isinstance(kind, str):
        own = feature.get("id")
        kind = own[4:-6] if isinstance(own, str) and own.startswith("Path") and own.endswith("Object") else ""
    return kind.strip().lower()


def _classification(properties: object) -> tuple[tuple[str, ...], RGB | None]:
    """Names of a class and of what it is derived into, and its colour.

    QuPath writes ``{"name": "Tumour"}``, ``{"name": "Tumour: Positive"}`` or ``{"names": ["Tumour", "Positive"]}``,
    with ``color`` as [R, G, B] or, in early versions, ``colorRGB`` as one signed number.
    """
    value = properties.get("classification") if isinstance(properties, Mapping) else None
    if isinstance(value, str):
        return _parts([value]), None
    if not isinstance(value, Mapping):
        return (), None
    names = value.get("names")
    listed = names if isinstance(names, list) and names else [value.get("name")]
    return _parts(listed), _colour(value)


def _parts(names: list[Any]) -> tuple[str, ...]:
    return tuple(
        part.strip() for name in names if isinstance(name, str) for part in name.split(": ") if part.strip() != ""
    )


def _colour(value: Mapping[str, Any]) -> RGB | None:
    listed, packed = value.get("color", value.get("colour")), value.get("colorRGB")
    if isinstance(listed, list) and len(listed) >= 3 and all(type(v) is int and 0 <= v <= 255 for v in listed[:3]):
        return (listed[0], listed[1], listed[2])
    for number in (packed, listed):
        if type(number) is int:
            return (number >> 16 & 255, number >> 8 & 255, number & 255)
    return None


def _polygons(geometry: Mapping[str, Any], where: str, left_out: Counter[str], depth: int = 0) -> Iterator[Rings]:
    kind = geometry.get("type")
    if kind == "GeometryCollection":
        parts = geometry.get("geometries")
        if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
            raise MaskError(f"{where} is a GeometryCollection without geometries", remedy=_REMEDY)
        if depth > _DEEPEST:
            raise MaskError(f"{where} holds collections within collections without end", remedy=_REMEDY)
        for part in parts:
            yield from _polygons(part, where, left_out, depth + 1)
        return
    if kind in _NOT_AREAS:
        left_out[f"{kind}|only areas count"] += 1
        return
    if kind not in _AREAS:
        raise MaskError(f"{where} has the unknown geometry type {kind!r}", remedy=_REMEDY)
    coordinates = geometry.get("coordinates")
    polygons = [coordinates] if kind == "Polygon" else coordinates
    lists = (list, tuple)  # the latter from programs that make GeoJSON in memory
    if not isinstance(polygons, lists) or not all(isinstance(polygon, lists) for polygon in polygons):
        raise MaskError(f"{where} has no coordinates", remedy=_REMEDY)
    for polygon in polygons:
        rings: Rings = []
        for number, points in enumerate(_ring(ring, where) for ring in polygon):
            if points is not None:
                rings.append(points)
                continue
            left_out["stray ring|it has fewer than three different points"] += 1
            if number == 0:
                break  # holes in nothing
        if rings:
            yield rings


def _ring(ring: object, where: str) -> NDArray[np.float64] | None:
    """Vertices of a ring, or None where they are too few to enclose anything."""
    try:
        points = np.array(ring, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise MaskError(f"{where} has a coordinate that is not a pair of numbers", remedy=_REMEDY) from error
    if points.size == 0:
        return None
    if points.ndim != 2 or points.shape[1] < 2:
        raise MaskError(f"{where} has a coordinate that is not a pair of numbers", remedy=_REMEDY)
    points = points[:, :2]  # a third number is a height
    if not (np.abs(points) <= FARTHEST).all():
        raise MaskError(f"{where} has a coordinate that is not finite, or on no slide", remedy=_REMEDY)
    if len(points) > 1 and np.array_equal(points[0], points[-1]):
        points = points[:-1]
    if len(points) < 3 or (len(points) < 9 and len(np.unique(points, axis=0)) < 3):
        return None
    return points
