"""What is wrong with a bag or a feature file, in words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.bag.read import _attrs, finite, grid_of, level_labels, open_bag
from wsi_pipe.bag.values import PER_TILE, SCHEMA, BagAttrs, content_digest, fits_next
from wsi_pipe.errors import BagError, ConfigError
from wsi_pipe.geometry import TileGrid

__all__ = ["check_bag", "check_feature_file"]

ROWS_AT_ONCE = 8192
ATTENTION_TOLERANCE = 1e-3


def check_bag(path: Path) -> list[str]:
    """Problems of a bag (or tile file), one sentence each; none when it is valid.

    Checked: it opens, schema and attributes, shapes and types, finite features that are what was written (by their
    digest, where they have one), coordinates that follow from the cells, parents whose cell holds the tile, attention
    that sums to 1, soft links.
    """
    try:
        with open_bag(path) as file:
            attrs = _attrs(path, file)
            labels = level_labels(file)
            problems = [*_root_problems(file, attrs, labels), *_vector_problems(file)]
            coarser: TileGrid | None = None
            for label in labels:
                found, coarser = _level_problems(file["levels"][label], label, attrs, coarser)
                problems += found
            return problems
    except BagError as error:
        return [error.message.removeprefix(f"{path}: ")]
    except (ValueError, TypeError, ConfigError) as error:
        return [f"does not hold together ({error})"]


def _root_problems(file: Any, attrs: BagAttrs, labels: list[str]) -> Iterator[str]:
    if attrs.status not in ("done", "empty"):
        yield f"status {attrs.status!r} is neither done nor empty"
    if not labels:
        yield "has no levels"
    if attrs.primary_level not in labels:
        yield f"primary level {attrs.primary_level!r} is not among its levels"
        return
    links = {"coords": f"/levels/{attrs.primary_level}/coords"}
    if attrs.primary_encoder:
        links["features"] = f"/levels/{attrs.primary_level}/features/{attrs.primary_encoder}"
    for name, target in links.items():
        link = file.get(name, getlink=True)
        if getattr(link, "path", None) != target or target not in file:
            yield f"/{name} does not lead to {target}"
    counts = [len(file["levels"][label]["cells"]) for label in labels]
    if attrs.status == "empty" and any(counts):
        yield f"status is empty but there are {sum(counts)} tiles"
    if attrs.status == "empty" and not attrs.empty_reason:
        yield "status is empty without a reason"
    if attrs.status == "done" and not any(counts):
        yield "status is done but there are no tiles"


def _level_problems(
    group: Any, label: str, attrs: BagAttrs, coarser: TileGrid | None
) -> tuple[list[str], TileGrid | None]:
    problems: list[str] = []
    # Each item is opened once: opening is what takes the time in a small bag.
    group = dict(group.items())
    wanted = {"cells": "int32", "coords": "int64", "tissue": "float32"} | (
        {"parent": "int32"} if coarser is not None else {}
    )
    for name, dtype in wanted.items():
        if name not in group:
            return [f"{label}: lacks {name}"], None
        if group[name].dtype != dtype:
            problems.append(f"{label}: {name} is {group[name].dtype}, not {dtype}")
    grid = grid_of(group)
    n = len(grid)
    if grid.label != label:
        problems.append(f"{label}: its resolution {grid.spec.mpp} um/px belongs to {grid.label}")
    coords = group["coords"][()]
    if coords.shape != (n, 2) or not np.array_equal(coords, grid.coords):
        problems.append(f"{label}: coords do not follow from cells, origin and stride")
    if n and not (finite(grid.tissue) and grid.tissue.min() >= 0 and grid.tissue.max() <= 1 + 1e-6):
        problems.append(f"{label}: tissue fractions leave the range 0 to 1")
    if n and (np.unique(grid.cells, axis=0).shape[0] != n):
        problems.append(f"{label}: a cell stands twice")
    if coarser is not None:
        outside = int(np.count_nonzero(~fits_next(grid, coarser)))
        if outside:
            problems.append(f"{label}: {outside} tiles lie outside their parent in {coarser.label}")
    if n:
        corner, size = grid.corners_l0, np.asarray(grid.tile_size_l0)
        off = (corner + size <= 0).any(axis=1) | (corner >= [attrs.width_l0, attrs.height_l0]).any(axis=1)
        if off.any():
            problems.append(f"{label}: {int(off.sum())} tiles lie off the slide")
    problems += _feature_problems(group, label, n)
    if "attention" in group:
        for model in group["attention"]:
            values = group["attention"][model][()]
            if values.shape != (n,):
                problems.append(f"{label}: attention of {model} has shape {values.shape}, not ({n},)")
            elif n and not abs(float(values.sum(dtype=np.float64)) - 1) < ATTENTION_TOLERANCE:
                problems.append(f"{label}: attention of {model} sums to {values.sum():.4g}, not 1")
    for kind, (least, most) in PER_TILE.items():
        for slug, data in group[kind].items() if kind in group else ():
            values = data[()]
            if values.shape != (n,) or values.dtype != np.float32:
                problems.append(f"{label}: {kind} {slug} is {values.dtype} {values.shape}, not float32 ({n},)")
            elif n and not (finite(values) and values.min() >= least and values.max() <= most):
                problems.append(f"{label}: {kind} {slug} leaves the range {least:g} to {most:g}")
    return problems, grid


def _vector_problems(file: Any) -> Iterator[str]:
    for name, data in file["slide"].items() if "slide" in file else ():
        values = data[()]
        if values.ndim != 1 or values.dtype != np.float32:
            yield f"slide {name} is {values.dtype} {values.shape}, not float32 (D,)"
        elif not finite(values):
            yield f"slide {name} holds NaN or infinity"
        elif "sha256" in data.attrs and content_digest([values]) != str(data.attrs["sha256"]):
            yield f"slide {name} is not what was written: its digest differs"


def _feature_problems(group: Any, where: str, n: int | None) -> Iterator[str]:
    for kind in ("features", "layers"):
        if kind not in group:
            continue
        for slug, entry in group[kind].items():
            for data in [entry] if kind == "features" else list(entry.values()):
                name = data.name.rpartition(f"/{kind}/")[2]
                if data.ndim != 2 or (n is not None and len(data) != n):
                    yield f"{where}: features of {name} have shape {data.shape}, not ({n}, D)"
                elif data.dtype not in (np.float16, np.float32):
                    yield f"{where}: features of {name} are {data.dtype}, not float16 or float32"
                else:
                    yield from _value_problems(data, f"{where}: features of {name}")
            if kind == "features":
                held = set(entry.attrs)
                for attr in ("encoder", "weights_sha256", "licence", "precision", "transform", "fingerprint"):
                    if attr not in held:
                        yield f"{where}: features of {slug} lack the attribute {attr}"


def _value_problems(data: Any, what: str) -> Iterator[str]:
    """Problems of stored values, read once, a block of rows at a time."""
    bad = 0

    def blocks() -> Iterator[NDArray[Any]]:
        nonlocal bad
        for start in range(0, len(data), ROWS_AT_ONCE):
            block = data[start : start + ROWS_AT_ONCE]
            bad += int(np.count_nonzero(~np.isfinite(block).all(axis=1)))
            yield block

    digest, stored = content_digest(blocks()), data.attrs.get("sha256")
    changed = stored is not None and digest != str(stored)
    if bad:
        yield f"{what} hold NaN or infinity in {bad} rows"
    if changed:
        yield f"{what} are not what was written: their digest differs"


def check_feature_file(path: Path) -> list[str]:
    """Problems of a feature file, one sentence each; none when it is valid."""
    try:
        with open_bag(path, f"{SCHEMA}-features") as file:
            slug, label = str(file.attrs["slug"]), str(file.attrs["level"])
            if "features" not in file or slug not in file["features"]:
                return [f"lacks features/{slug}"]
            rows = len(file["features"][slug])
            return list(_feature_problems(file, label, rows))
    except BagError as error:
        return [error.message.removeprefix(f"{path}: ")]
