"""AnnData: one ``.h5ad`` a slide, tiles as observations, with ``spatial`` as scanpy and squidpy look for it.

Written by AnnData's published on-disk format (encoding 0.1.0), so that the package is needed to read it only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import h5py
import numpy as np
from numpy.typing import NDArray

from wsi_pipe.interop.hdf5 import add, hdf5_at
from wsi_pipe.interop.values import Given, SlideFeatures

__all__ = ["AnnDataExporter"]

TEXT = h5py.string_dtype("utf-8")


class AnnDataExporter:
    """``X`` are the features, ``obsm['spatial']`` the centres of tiles in level-0 pixels, as squidpy has spots."""

    name: ClassVar[str] = "anndata"
    title: ClassVar[str] = "AnnData"
    version: ClassVar[int] = 1
    takes_empty: ClassVar[bool] = True
    shared: ClassVar[bool] = True

    def files(self, slide: SlideFeatures) -> Sequence[Path]:
        """One file."""
        return (Path(f"{slide.slide_id}.h5ad"),)

    def of_grid(self, place: Path) -> bool:
        """Every file holds features."""
        return False

    def write(self, slide: SlideFeatures, out: Path, place: Path) -> None:
        """The whole object."""
        with hdf5_at(out) as file:
            _mark(file, "anndata", "0.1.0")
            _array(file, "X", slide.features)
            _frame(file, "obs", *_tiles(slide))
            dim = slide.features.shape[1]
            _frame(file, "var", [f"{slide.slug}_{i}" for i in range(dim)], {})
            obsm = _dict(file, "obsm")
            _array(obsm, "spatial", slide.grid.corners_l0 + np.asarray(slide.grid.tile_size_l0) / 2)
            for name in ("varm", "obsp", "varp", "layers"):
                _dict(file, name)
            _unstructured(_dict(file, "uns"), slide)

    def tables(self, slides: Sequence[Given], encoder: str) -> Iterator[tuple[Path, str]]:
        """None: each file says whose it is."""
        return iter(())


def _tiles(slide: SlideFeatures) -> tuple[list[str], Mapping[str, Any]]:
    """Names and columns of the observations; names are unique over slides, so that files can be concatenated."""
    grid = slide.grid
    names = [f"{slide.slide_id}/{grid.label}/{column}_{row}" for column, row in grid.cells.tolist()]
    columns: dict[str, Any] = {
        "slide_id": [slide.slide_id] * len(grid),
        "case_id": [slide.case_id] * len(grid),
        "column": np.asarray(grid.cells[:, 0], np.int32),
        "row": np.asarray(grid.cells[:, 1], np.int32),
        "x_l0": grid.coords[:, 0],
        "y_l0": grid.coords[:, 1],
        "tissue": np.asarray(grid.tissue, np.float32),
    }
    columns |= {name: np.asarray(values, np.float32) for name, values in slide.quality.items()}
    # HDF5 takes a slash in a name for a group.
    columns |= {f"annotation_{name.replace('/', '_')}": values for name, values in slide.annotation.items()}
    return names, columns


def _unstructured(uns: Any, slide: SlideFeatures) -> None:
    about = _dict(uns, "wsi_pipe")
    for name, value in slide.origins.items():
        _scalar(about, name, value)
    for name, pair in (("mpp_l0", slide.attrs.mpp_l0), ("tile_size_l0", slide.grid.tile_size_l0)):
        _array(about, name, np.asarray(pair, np.float64))
    _array(about, "size_l0", np.asarray([slide.attrs.width_l0, slide.attrs.height_l0]))
    library = _dict(_dict(uns, "spatial"), slide.slide_id)
    _dict(library, "images")
    factors = _dict(library, "scalefactors")
    _scalar(factors, "spot_diameter_fullres", float(slide.grid.tile_size_l0[0]))
    _scalar(_dict(library, "metadata"), "source", json.dumps({"slide_path": slide.attrs.slide_path}))


def _mark(item: Any, kind: str, version: str) -> None:
    item.attrs["encoding-type"] = kind
    item.attrs["encoding-version"] = version


def _array(group: Any, name: str, values: NDArray[Any]) -> None:
    _mark(add(group, name, values), "array", "0.2.0")


def _strings(group: Any, name: str, values: Sequence[str]) -> None:
    _mark(group.create_dataset(name, data=np.asarray(values, object), dtype=TEXT), "string-array", "0.2.0")


def _scalar(group: Any, name: str, value: str | int | float) -> None:
    if isinstance(value, str):
        _mark(group.create_dataset(name, data=value, dtype=TEXT), "string", "0.2.0")
    else:
        _mark(group.create_dataset(name, data=value), "numeric-scalar", "0.2.0")


def _dict(group: Any, name: str) -> Any:
    made = group.create_group(name)
    _mark(made, "dict", "0.1.0")
    return made


def _frame(group: Any, name: str, index: Sequence[str], columns: Mapping[str, Any]) -> None:
    frame = group.create_group(name)
    _mark(frame, "dataframe", "0.2.0")
    frame.attrs["_index"] = "_index"
    frame.attrs["column-order"] = np.asarray(list(columns), object) if columns else np.zeros(0, "S1")
    _strings(frame, "_index", index)
    for key, values in columns.items():
        if isinstance(values, list):
            _categories(frame, key, values)
        else:
            _array(frame, key, values)


def _categories(frame: Any, name: str, values: Sequence[str]) -> None:
    known = sorted(set(values))
    group = frame.create_group(name)
    _mark(group, "categorical", "0.2.0")
    group.attrs["ordered"] = False
    _strings(group, "categories", known)
    place = {value: code for code, value in enumerate(known)}
    _array(group, "codes", np.asarray([place[value] for value in values], np.int8))
