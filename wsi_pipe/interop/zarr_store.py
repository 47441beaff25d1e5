"""Zarr version 3: one group a slide, for whoever reads arrays from a bucket or in parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.interop.values import Given, SlideFeatures

__all__ = ["ZarrExporter"]

CHUNK_BYTES = 4 << 20


class ZarrExporter:
    """Arrays ``features``, ``coords``, ``cells``, ``tissue``, ``quality/...`` and ``annotation/...``; the rest are
    attributes of the group."""

    name: ClassVar[str] = "zarr"
    title: ClassVar[str] = "Zarr"
    version: ClassVar[int] = 1
    takes_empty: ClassVar[bool] = True
    shared: ClassVar[bool] = True

    def files(self, slide: SlideFeatures) -> Sequence[Path]:
        """One folder."""
        return (Path(f"{slide.slide_id}.zarr"),)

    def of_grid(self, place: Path) -> bool:
        """Every folder holds features."""
        return False

    def write(self, slide: SlideFeatures, out: Path, place: Path) -> None:
        """The whole group, with consolidated metadata in its ``zarr.json``: one request opens it."""
        import zarr

        grid, attrs = slide.grid, slide.attrs
        group = zarr.create_group(
            store=zarr.storage.LocalStore(out),
            zarr_format=3,
            attributes={
                **slide.origins,
                "slide_path": attrs.slide_path,
                "status": attrs.status,
                "empty_reason": attrs.empty_reason,
                "mpp_l0": list(attrs.mpp_l0),
                "size_l0": [attrs.width_l0, attrs.height_l0],
                "origin_l0": list(grid.origin_l0),
                "stride_l0": list(grid.stride_l0),
                "tile_size_l0": list(grid.tile_size_l0),
                "tile_size_px": grid.spec.size_px,
                "overlap_px": grid.spec.overlap_px,
                "mpp_effective": list(grid.mpp_effective),
            },
        )
        _array(group, "features", slide.features)
        _array(group, "coords", grid.coords)
        _array(group, "cells", np.asarray(grid.cells, np.int32))
        _array(group, "tissue", np.asarray(grid.tissue, np.float32))
        for kind, values in (("quality", slide.quality), ("annotation", slide.annotation)):
            if values:
                inner = group.create_group(kind)
                for name, data in values.items():
                    _array(inner, name.replace("/", "_"), np.asarray(data, np.float32))
        _consolidate(group)

    def tables(self, slides: Sequence[Given], encoder: str) -> Iterator[tuple[Path, str]]:
        """None: each group says whose it is."""
        return iter(())


def _array(group: Any, name: str, values: NDArray[Any]) -> None:
    rows = max(CHUNK_BYTES // max(values.nbytes // max(len(values), 1), 1), 1)
    chunks = (max(min(rows, len(values)), 1), *(max(size, 1) for size in values.shape[1:]))
    array = group.create_array(name=name, shape=values.shape, dtype=values.dtype, chunks=chunks)
    if values.size:
        array[...] = values


def _consolidate(group: Any) -> None:
    import warnings

    import zarr

    with warnings.catch_warnings():
        # It warns that others may not read what the specification does not hold yet: those pass it over.
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(group.store)
