"""Writing bags and feature files: to a temporary name, checked, then renamed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from wsi_pipe.bag.check import check_bag, check_feature_file
from wsi_pipe.bag.values import (
    PER_TILE,
    SCHEMA,
    SCHEMA_VERSION,
    Bag,
    BagLevel,
    Features,
    SlideVector,
    TileValues,
    content_digest,
)
from wsi_pipe.errors import BagError
from wsi_pipe.files import atomic_path, output_error
from wsi_pipe.geometry import MICROMETRES_PER_MAGNIFICATION

__all__ = ["write_attention", "write_bag", "write_feature_file", "write_slide_vector"]

CHUNK_BYTES = 1 << 20


def write_bag(path: Path, bag: Bag) -> None:
    """Write ``bag`` to ``path``; the file appears only once it is complete and passes ``check_bag``.

    Raises OutputError when it cannot be written, BagError when what was written does not hold together.
    """
    with atomic_path(path, check=_refuser(path, check_bag)) as temporary, _file_at(temporary) as file:
        attrs = file.attrs
        attrs["schema"] = SCHEMA
        attrs["schema_version"] = SCHEMA_VERSION
        for name in (f.name for f in fields(bag.attrs)):
            value = getattr(bag.attrs, name)
            # What later versions brought is left out where there is nothing to say.
            if value is not None and not (name in ("annotation", "left_out") and value == ""):
                attrs[name] = value
        levels = file.create_group("levels")
        for level in bag.levels:
            _write_level(levels.create_group(level.grid.label), bag, level)
        for name, vector in bag.slide.items():
            _write_vector(file, name, vector)
        primary = f"/levels/{bag.attrs.primary_level}"
        file["coords"] = h5py.SoftLink(f"{primary}/coords")
        if bag.attrs.primary_encoder:
            file["features"] = h5py.SoftLink(f"{primary}/features/{bag.attrs.primary_encoder}")


@contextmanager
def _file_at(path: Path, mode: str = "w") -> Iterator[Any]:
    """An HDF5 file, new ("w") or as it is at ``path`` ("r+"), that is written to ``path`` in one piece on leaving.

    Put together in memory: HDF5 that meets a full disk while it closes a file crashes the process.
    """
    with h5py.File(path, mode, driver="core", backing_store=False, libver="v110") as file:
        yield file
        file.flush()
        image = file.id.get_file_image()
    path.write_bytes(image)


def _write_level(group: Any, bag: Bag, level: BagLevel) -> None:
    grid = level.grid
    # h5py makes a new object each time it is asked for attributes.
    cells = _dataset(group, "cells", np.asarray(grid.cells, np.int32)).attrs
    cells["origin_l0"] = np.asarray(grid.origin_l0, np.float64)
    cells["stride_l0"] = np.asarray(grid.stride_l0, np.float64)
    cells["tile_size_l0"] = np.asarray(grid.tile_size_l0, np.float64)
    cells["tile_size_px"] = grid.spec.size_px
    cells["overlap_px"] = grid.spec.overlap_px
    cells["mpp"] = grid.spec.mpp
    cells["mpp_effective"] = np.asarray(grid.mpp_effective, np.float64)
    cells["upsampled"] = grid.upsampled
    cells["min_tissue"] = grid.min_tissue
    coords = _dataset(group, "coords", grid.coords).attrs
    mpp_l0 = sum(bag.attrs.mpp_l0) / 2
    # What TRIDENT and CLAM readers look for beside the coordinates.
    coords["patch_size"] = grid.spec.size_px
    coords["patch_size_level0"] = round(grid.tile_size_l0[0])
    coords["level0_magnification"] = MICROMETRES_PER_MAGNIFICATION / mpp_l0
    coords["target_magnification"] = MICROMETRES_PER_MAGNIFICATION / grid.spec.mpp
    coords["overlap"] = grid.spec.overlap_px
    coords["name"] = bag.attrs.slide_id
    coords["level0_width"] = bag.attrs.width_l0
    coords["level0_height"] = bag.attrs.height_l0
    _dataset(group, "tissue", np.asarray(grid.tissue, np.float32))
    if grid.parent is not None:
        _dataset(group, "parent", np.asarray(grid.parent, np.int32))
    for slug, features in level.features.items():
        _write_features(group, slug, features)
    for model, attention in level.attention.items():
        _dataset(group.require_group("attention"), model, np.asarray(attention, np.float32))
    for kind in PER_TILE:
        _write_values(group, kind, getattr(level, kind))


def _write_vector(file: Any, name: str, vector: SlideVector) -> None:
    values = np.asarray(vector.values, np.float32)
    attrs = file.require_group("slide").create_dataset(name, data=values).attrs
    for item in fields(vector):
        if item.name != "values":
            attrs[item.name] = getattr(vector, item.name)
    attrs["sha256"] = content_digest([values])


def _write_values(group: Any, kind: str, values: Mapping[str, TileValues]) -> None:
    for slug, item in values.items():
        own = _dataset(group.require_group(kind), slug, np.asarray(item.values, np.float32)).attrs
        for name, value in item.attrs.items():
            own[name] = value


def _write_features(group: Any, slug: str, features: Features) -> None:
    attrs = _dataset(group.require_group("features"), slug, features.values).attrs
    for name in ("encoder", "weights_sha256", "licence", "precision", "transform", "fingerprint"):
        attrs[name] = getattr(features, name)
    if features.weights:
        attrs["weights"] = features.weights
    if features.encoder_saw:
        attrs["encoder_saw"] = features.encoder_saw
    attrs["sha256"] = content_digest([features.values])
    for block, values in features.layers.items():
        layer = _dataset(group.require_group("layers").require_group(slug), block, values)
        layer.attrs["sha256"] = content_digest([values])


def _dataset(group: Any, name: str, values: NDArray[Any]) -> Any:
    """A dataset in chunks of about 1 MiB, whole rows; what is empty is stored without chunks."""
    if not values.size:
        return group.create_dataset(name, data=values)
    row_bytes = max(values.nbytes // len(values), 1)
    rows = min(len(values), max(CHUNK_BYTES // row_bytes, 1))
    return group.create_dataset(name, data=values, chunks=(rows, *values.shape[1:]))


def _refuser(path: Path, problems_of: Callable[[Path], list[str]]) -> Callable[[Path], None]:
    """A check of the temporary file whose error names the file that it would have become."""

    def refuse(temporary: Path) -> None:
        problems = problems_of(temporary)
        if problems:
            raise BagError(f"{path} is not written: {'; '.join(problems[:3])}")

    return refuse


def write_feature_file(
    path: Path,
    slide_id: str,
    label: str,
    slug: str,
    features: Features,
    quality: Mapping[str, TileValues] | None = None,
) -> None:
    """Write one encoder's features of one grid, as the extract stage keeps them until the bag is assembled.

    quality: what was measured of the tiles, as in ``BagLevel``.
    Raises OutputError when it cannot be written.
    """
    with atomic_path(path, check=_refuser(path, check_feature_file)) as temporary, _file_at(temporary) as file:
        file.attrs["schema"] = f"{SCHEMA}-features"
        file.attrs["schema_version"] = SCHEMA_VERSION
        file.attrs["slide_id"] = slide_id
        file.attrs["level"] = label
        file.attrs["slug"] = slug
        _write_features(file, slug, features)
        _write_values(file, "quality", quality or {})


@contextmanager
def _changed(path: Path) -> Iterator[Any]:
    """A bag opened for change: copied, changed and renamed into place, so that an interrupted write leaves the old one.

    Raises BagError where what was made of it is no bag, OutputError when it cannot be written.
    """
    import shutil

    with atomic_path(path, check=_refuser(path, check_bag)) as temporary:
        try:
            shutil.copyfile(path, temporary)
        except OSError as error:
            raise output_error(path, error) from error
        with _file_at(temporary, "r+") as file:
            yield file


def write_attention(path: Path, label: str, model: str, values: NDArray[np.float32]) -> None:
    """Put a model's attention, float32 (N,) that sums to 1, into a bag, replacing what it gave before.

    Raises BagError when the level is not in the bag or the length differs, OutputError when it cannot be written.
    """
    weights = np.asarray(values, np.float32)
    with _changed(path) as file:
        level = file.get(f"levels/{label}")
        if level is None:
            known = ", ".join(file["levels"]) if "levels" in file else "none"
            raise BagError(f"{path}: has no level {label}", remedy=f"its levels are {known}")
        if weights.shape != (len(level["cells"]),):
            raise BagError(f"{path}: attention {weights.shape} does not fit {len(level['cells'])} tiles at {label}")
        group = level.require_group("attention")
        if model in group:
            del group[model]
        _dataset(group, model, weights)


def write_slide_vector(path: Path, name: str, vector: SlideVector) -> None:
    """Put a vector of the whole slide into a bag as ``/slide/<name>``, replacing what stood there.

    Raises BagError when it is not finite, OutputError when it cannot be written.
    """
    with _changed(path) as file:
        group = file.require_group("slide")
        if name in group:
            del group[name]
        _write_vector(file, name, vector)
