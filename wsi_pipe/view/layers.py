"""What a bag says of each tile, as layers: numbers, or colours, with what a legend needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.bag.read import grid_of, level_labels, open_bag
from wsi_pipe.bag.values import PER_TILE
from wsi_pipe.errors import BagError
from wsi_pipe.geometry import TileGrid

__all__ = ["Layer", "layer_values", "layers_of", "read_grid"]

COMPONENT_TILES = 4096
"""Tiles that principal components are computed from, spread over the slide."""


@dataclass(frozen=True)
class Layer:
    """One value a tile of one grid.

    key: names it in requests, "kind/name". title: for people. top: the value that gets the last colour where that is
    fixed, None for the largest of the slide. colours: whether the values are colours rather than numbers.
    """

    label: str
    key: str
    title: str
    top: float | None = None
    colours: bool = False

    def to_json(self) -> dict[str, Any]:
        """For the page."""
        return {"label": self.label, "key": self.key, "title": self.title, "top": self.top, "colours": self.colours}


def read_grid(path: Path, label: str) -> TileGrid:
    """One grid of a bag. Raises BagError where the bag lacks it."""
    with open_bag(path) as file:
        return grid_of(_level(path, file, label))


def layers_of(path: Path) -> list[Layer]:
    """Every layer that a bag can show, by level, coarsest first. Raises BagError, FileAccessError."""
    with open_bag(path) as file:
        return [layer for label in level_labels(file) for layer in _of_level(label, file["levels"][label])]


def _of_level(label: str, group: Any) -> Iterator[Layer]:
    for model in group.get("attention", {}):
        yield Layer(label, f"attention/{model}", f"attention of {model}, share of its maximum")
    yield Layer(label, "tissue/fraction", "tissue fraction", 1.0)
    for kind, (_, high) in PER_TILE.items():
        for slug, data in group.get(kind, {}).items():
            name = str(data.attrs.get("class", slug))
            top = high if np.isfinite(high) else None
            yield Layer(label, f"{kind}/{slug}", f"{name}, covered fraction" if kind == "annotation" else name, top)
    for slug in group.get("features", {}):
        yield Layer(label, f"components/{slug}", f"{slug}: first three principal components", None, True)


def layer_values(path: Path, label: str, key: str) -> dict[str, Any]:
    """The values of a layer: {"values": [N], "top": the end of the scale, which begins at 0}, or {"colours": [N x 3]}.

    Raises BagError where the bag has no such layer.
    """
    kind, _, name = key.partition("/")
    with open_bag(path) as file:
        group = _level(path, file, label)
        if kind == "tissue":
            return {"values": _listed(group["tissue"][()]), "top": 1.0}
        source = "features" if kind == "components" else kind
        known = source in ("features", "attention", *PER_TILE)
        if not (known and name and source in group and name in group[source]):
            raise BagError(f"{path}: has no {key} at {label}")
        values = group[source][name][()]
    if kind == "components":
        return {"colours": components(values).ravel().tolist()}
    high = PER_TILE.get(kind, (0.0, np.inf))[1]
    top = float(high) if np.isfinite(high) else float(np.max(values, initial=0.0))
    return {"values": _listed(values), "top": top}


def components(features: NDArray[Any]) -> NDArray[np.uint8]:
    """The first three principal components of features (N, D) as colours, uint8 (N, 3).

    Each is stretched from its 2nd to its 98th percentile over the slide; its sign is that which makes its largest
    loading positive, so that a slide looks the same twice. They are the slide's own: colours of two slides do not
    compare.
    """
    values = np.asarray(features, np.float32)
    colours = np.full((len(values), 3), 128, np.uint8)
    if len(values) < 2:
        return colours
    some = values[np.unique(np.linspace(0, len(values) - 1, min(COMPONENT_TILES, len(values))).astype(int))]
    mean = some.mean(axis=0)
    _, _, axes = np.linalg.svd(some - mean, full_matrices=False)
    for i, axis in enumerate(axes[:3]):
        sign = np.sign(axis[np.argmax(np.abs(axis))]) or 1.0
        along = (values - mean) @ (axis * sign)
        low, high = np.percentile(along, [2, 98])
        if high > low:
            colours[:, i] = np.clip((along - low) / (high - low) * 255, 0, 255).astype(np.uint8)
    return colours


def _level(path: Path, file: Any, label: str) -> Any:
    labels = level_labels(file)
    if label not in labels:
        raise BagError(f"{path}: has no level {label}", remedy=f"its levels are {', '.join(labels) or 'none'}")
    return file["levels"][label]


def _listed(values: NDArray[Any]) -> list[float | None]:
    # JSON has no NaN: a value that is none is shown as none.
    return [float(f"{v:.5g}") if np.isfinite(v) else None for v in values.tolist()]
