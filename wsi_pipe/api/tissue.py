"""Where the tissue of a slide is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.api.show import card, number
from wsi_pipe.api.source import Source
from wsi_pipe.config import SegmentSettings, to_mapping
from wsi_pipe.errors import NotOursError
from wsi_pipe.files import write_text_atomically
from wsi_pipe.geometry import FloatPair, TissueMask
from wsi_pipe.job.alone import FoundTissue
from wsi_pipe.overview import read_thumbnail
from wsi_pipe.pictures import thumbnail_with_contours
from wsi_pipe.tissue import mask_to_geojson, qupath_origin

__all__ = ["Tissue"]


class Tissue:
    """A slide's tissue mask, as found or as given. ``numpy.asarray`` gives the mask, bool (H, W)."""

    def __init__(self, source: Source, found: FoundTissue) -> None:
        self._source = source
        self.found = found

    @property
    def mask(self) -> NDArray[np.bool_]:
        """bool (H, W): pixel (column c, row r) covers level-0 x in [c, c + 1) * scale_l0[0], likewise y."""
        return self.found.mask.mask

    @property
    def scale_l0(self) -> FloatPair:
        """Level-0 pixels per mask pixel, (x, y)."""
        return self.found.mask.scale_l0

    @property
    def settings(self) -> SegmentSettings:
        """By which it was found."""
        return self.found.settings

    @property
    def slide_fingerprint(self) -> str:
        """Of the slide that it is of."""
        return self._source.slide.info.fingerprint

    @property
    def area_mm2(self) -> float:
        """Tissue area in mm2."""
        mpp = self._source.slide.pyramid.isotropic_mpp
        assert mpp is not None, "a slide without a resolution has no mask"
        return self.found.mask.area_um2(mpp) / 1e6

    @property
    def is_empty(self) -> bool:
        """True where no tissue is."""
        return self.found.mask.is_empty

    @property
    def empty_reason(self) -> str:
        """Why there is none, "" where there is some."""
        return (self.found.mask.empty_reason or "no tissue") if self.is_empty else ""

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be known of it, such as what of a given mask did not count."""
        return self.found.notes

    def to_geojson(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the outlines as GeoJSON that QuPath opens, in QuPath's frame; an edited one is a ``mask=`` again.

        Raises NotOursError where a file is there, unless ``overwrite``; OutputError when it cannot be written.
        """
        path = Path(path)
        if path.exists() and not overwrite:
            raise NotOursError(f"{path}: is there already", remedy="give another name, or overwrite=True")
        origin = qupath_origin(self._source.slide.info.bounds_l0)
        data = mask_to_geojson(self.found.mask, to_mapping(self.settings), origin_l0=origin)
        write_text_atomically(path, json.dumps(data))
        return path

    def picture(self, max_px: int = 1600) -> NDArray[np.uint8]:
        """The slide with the outlines of the tissue, uint8 (H, W, 3)."""
        slide, entry = self._source.slide, self._source.entry
        rgb = read_thumbnail(slide, max_px)
        size, mpp = slide.pyramid.size_l0, slide.pyramid.isotropic_mpp
        um = None if mpp is None else (size[0] / rgb.shape[1] * mpp[0], size[1] / rgb.shape[0] * mpp[1])
        return thumbnail_with_contours(rgb, self.found.mask, um_per_px=um, title=entry.slide_id, max_px=max_px)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.mask, dtype, copy=copy)

    def __repr__(self) -> str:
        what = f"none: {self.empty_reason}" if self.is_empty else f"{number(self.area_mm2)} mm2"
        return f"<Tissue of {self._source.entry.slide_id}: {what}>"

    def _repr_html_(self) -> str:
        mask: TissueMask = self.found.mask
        facts = [
            ("area", f"{number(self.area_mm2)} mm2, {mask.mask.mean():.0%} of the slide"),
            ("mask", f"{mask.mask.shape[1]:,} x {mask.mask.shape[0]:,} px"),
            *(("note", note) for note in ((self.empty_reason,) if self.is_empty else self.notes)),
        ]
        return card(f"Tissue of {self._source.entry.slide_id}", facts, self.picture(900))
