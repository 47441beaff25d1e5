"""CLAM's features: ``pt_files/<slide>.pt`` and ``h5_files/<slide>.h5``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from wsi_pipe.interop.hdf5 import add, hdf5_at
from wsi_pipe.interop.tensors import save_tensor
from wsi_pipe.interop.trident import coords_attrs
from wsi_pipe.interop.values import Given, SlideFeatures
from wsi_pipe.tables import csv_text

__all__ = ["ClamExporter"]

PT, H5 = Path("pt_files"), Path("h5_files")


class ClamExporter:
    """CLAM loads a tensor of float32 (N, D), or ``features`` and ``coords`` of HDF5; a slide without tiles stops it."""

    name: ClassVar[str] = "clam"
    title: ClassVar[str] = "CLAM"
    version: ClassVar[int] = 1
    takes_empty: ClassVar[bool] = False
    shared: ClassVar[bool] = True

    def files(self, slide: SlideFeatures) -> Sequence[Path]:
        """The tensor, and the same with coordinates."""
        return (PT / f"{slide.slide_id}.pt", H5 / f"{slide.slide_id}.h5")

    def of_grid(self, place: Path) -> bool:
        """Both hold features."""
        return False

    def write(self, slide: SlideFeatures, out: Path, place: Path) -> None:
        """A plain tensor, or HDF5 whose attributes say what CLAM has no name for."""
        if place.parent == PT:
            save_tensor(out, slide.features)
            return
        with hdf5_at(out) as file:
            add(file, "features", slide.features, slide.origins)
            add(file, "coords", slide.grid.coords, coords_attrs(slide, str(H5)))

    def tables(self, slides: Sequence[Given], encoder: str) -> Iterator[tuple[Path, str]]:
        """``slides.csv`` with the columns that CLAM's data sets read; its ``label`` is the user's to add."""
        rows = [(slide.case_id, slide.slide_id) for slide in slides]
        yield Path("slides.csv"), csv_text(("case_id", "slide_id"), rows)
