"""STAMP's features: ``feats/<slide>.h5`` with coordinates in um, and a slide table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from wsi_pipe.encoders.elsewhere import name_elsewhere
from wsi_pipe.interop.hdf5 import add, hdf5_at
from wsi_pipe.interop.values import Given, SlideFeatures
from wsi_pipe.tables import csv_text

__all__ = ["StampExporter"]

FEATS = Path("feats")


class StampExporter:
    """STAMP reads ``feats``, ``coords`` and the attributes of the root; it writes no file for a slide without tiles."""

    name: ClassVar[str] = "stamp"
    title: ClassVar[str] = "STAMP"
    version: ClassVar[int] = 1
    takes_empty: ClassVar[bool] = False
    shared: ClassVar[bool] = True

    def files(self, slide: SlideFeatures) -> Sequence[Path]:
        """One file."""
        return (FEATS / f"{slide.slide_id}.h5",)

    def of_grid(self, place: Path) -> bool:
        """It holds features."""
        return False

    def write(self, slide: SlideFeatures, out: Path, place: Path) -> None:
        """``stamp_version`` is left out: STAMP refuses files of a later version than its own.

        ``tile_size_um`` is what STAMP 2.1 and later look for, ``tile_size`` with ``unit`` what 2.0 does. Both are the
        side that was really cut, so that coordinates lie on whole multiples of it.
        """
        side_um = slide.tile_um[0]
        with hdf5_at(out) as file:
            add(file, "feats", slide.features)
            coords_um = slide.grid.corners_l0 * np.asarray(slide.attrs.mpp_l0)
            add(file, "coords", coords_um.astype(np.float32))
            attrs = file.attrs
            attrs["extractor"] = name_elsewhere(slide.known_as, "stamp", slide.features.shape[1])
            attrs["unit"] = "um"
            attrs["tile_size"] = side_um
            attrs["tile_size_um"] = side_um
            attrs["tile_size_px"] = slide.grid.spec.size_px
            attrs["feat_type"] = "tile"
            # Not "encoder", which STAMP takes for the mark of slide embeddings.
            for name, value in slide.origins.items():
                attrs[f"wsi_pipe_{name}" if not name.startswith("wsi_pipe") else name] = value

    def tables(self, slides: Sequence[Given], encoder: str) -> Iterator[tuple[Path, str]]:
        """``slide.csv``: STAMP's slide table, whose file names must end in ``.h5``."""
        rows = [(slide.case_id, f"{slide.slide_id}.h5") for slide in slides]
        yield Path("slide.csv"), csv_text(("PATIENT", "FILENAME"), rows)
