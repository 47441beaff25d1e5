"""An open slide: what it is, its tissue, its grids."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.api.grids import Grids, as_mpp
from wsi_pipe.api.show import card, number, shown_path
from wsi_pipe.api.source import Source
from wsi_pipe.api.tissue import Tissue
from wsi_pipe.config import CacheSettings, SegmentSettings, TileSettings, from_mapping
from wsi_pipe.errors import ConfigError, ManifestError, MissingMppError, SlideOpenError
from wsi_pipe.geometry import FloatPair, IntPair, Level, level_label
from wsi_pipe.job.alone import find_mask, lay_grids
from wsi_pipe.manifest import SlideEntry, collect_slides, is_url
from wsi_pipe.overview import read_thumbnail
from wsi_pipe.slides import open_slide
from wsi_pipe.slides.base import SlideInfo
from wsi_pipe.slides.metadata import missing_mpp_error
from wsi_pipe.tables import TABLE_SUFFIXES

__all__ = ["Slide", "entry_of", "open", "segment_settings", "tile_settings"]


def open(
    path: str | Path,
    *,
    mpp: float | FloatPair | None = None,
    slide_id: str | None = None,
    case_id: str | None = None,
    reader: str = "auto",
    scene: int | None = None,
    z: int | None = None,
    annotations: str | Path | None = None,
    frame: str | None = None,
    cache_dir: str | Path | None = None,
) -> Slide:
    """Open a slide: a file, an OME-Zarr store, a folder with one DICOM series, or a URL.

    mpp: micrometres per level-0 pixel, one number or (x, y), before what the file states. slide_id: what the slide is
    called in bags, by default as ``wsi-pipe run`` calls it; case_id: the patient, by default the slide's id. reader,
    scene, z: as of ``wsi-pipe run``. annotations: GeoJSON whose classes become labels of tiles; frame: from where its
    coordinates count, and those of masks. cache_dir: where slides behind URLs are copied if they must be.

    Raises SlideOpenError where there is no slide or it cannot be read, UnsupportedSlideError, ResolutionError for an
    mpp that no microscope has, ConfigError.
    """
    entry = entry_of(
        path, mpp=mpp, slide_id=slide_id, case_id=case_id, scene=scene, z=z, annotations=annotations, frame=frame
    )
    source = Source(entry, reader, CacheSettings(folder=str(Path(cache_dir).absolute()) if cache_dir else None))
    _ = source.slide
    return Slide(source)


def entry_of(
    path: str | Path,
    *,
    mpp: float | FloatPair | None = None,
    slide_id: str | None = None,
    case_id: str | None = None,
    scene: int | None = None,
    z: int | None = None,
    annotations: str | Path | None = None,
    frame: str | None = None,
) -> SlideEntry:
    """The slide as a job lists it. Raises SlideOpenError where the path holds no slide, or several."""
    if not str(path):
        raise SlideOpenError("no slide is given", remedy="give its path or URL")
    found = _named(path)
    if found is None:
        # Says what is wrong with the path.
        open_slide(path).close()
        raise SlideOpenError(f"{path}: is no slide", remedy="give many, or a list of them, to wp.Job(...).run(...)")
    pair = (float(mpp), float(mpp)) if isinstance(mpp, (int, float)) else mpp
    drawn = str(Path(annotations).absolute()) if annotations is not None else None
    stated: dict[str, Any] = {"mpp": pair, "scene": scene, "z": z, "annotations": drawn, "frame": frame}
    own = slide_id or found.slide_id
    entry = dataclasses.replace(found, slide_id=own, case_id=case_id or own)
    return entry.stating(**{name: value for name, value in stated.items() if value is not None})


def _named(path: str | Path) -> SlideEntry | None:
    """The slide under the name that a job gives it; None for what is none, or stands for others, as a list does."""
    if not is_url(str(path)) and Path(path).suffix.lower() in TABLE_SUFFIXES:
        return None
    try:
        found = collect_slides([str(path)])
    except ManifestError:
        return None
    inside = not is_url(str(path)) and Path(path).is_dir() and Path(found[0].path) != Path(path).absolute()
    return None if len(found) != 1 or inside else found[0]


def segment_settings(given: SegmentSettings | None, values: Mapping[str, Any]) -> SegmentSettings:
    """Settings of segmentation from a value, or from single ones by name. Raises ConfigError for an unknown one."""
    if given is not None and values:
        raise ConfigError("settings and single ones of them are given", remedy="give one or the other")
    return given if given is not None else from_mapping(SegmentSettings, values, "tissue")


def tile_settings(
    resolutions: Sequence[str | float], given: TileSettings | None, values: Mapping[str, Any]
) -> TileSettings:
    """Settings of tiling: resolutions over ``given``, or over single ones by name. Raises ConfigError."""
    if given is not None and values:
        raise ConfigError("settings and single ones of them are given", remedy="give one or the other")
    if "resolutions" in values:
        raise ConfigError("resolutions is given by name", remedy='write them as they are: grids("20x", "5x")')
    base = given if given is not None else from_mapping(TileSettings, values, "grids")
    return dataclasses.replace(base, resolutions=tuple(map(as_mpp, resolutions))) if resolutions else base


class Slide:
    """An open slide; close it, or use it as a context manager. Pickles as what it takes to open it again."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._tissue: dict[SegmentSettings, Tissue] = {}

    @property
    def path(self) -> str:
        """Path or URL, without secrets."""
        return self.source.entry.shown_path

    @property
    def slide_id(self) -> str:
        """What it is called in bags."""
        return self.source.entry.slide_id

    @property
    def case_id(self) -> str:
        """The patient."""
        return self.source.entry.case_id

    @property
    def info(self) -> SlideInfo:
        """Facts about the file: vendor, reader and why this one, properties, notes, fingerprint."""
        return self.source.slide.info

    @property
    def mpp(self) -> FloatPair | None:
        """Micrometres per level-0 pixel, (x, y); None where neither the file nor ``open`` states it."""
        return self.source.slide.pyramid.mpp

    @property
    def size(self) -> IntPair:
        """(width, height) of level 0 in pixels."""
        return self.source.slide.pyramid.size_l0

    @property
    def levels(self) -> tuple[Level, ...]:
        """The images of the pyramid, finest first: size in pixels and level-0 pixels per pixel of each."""
        return self.source.slide.pyramid.levels

    @property
    def properties(self) -> Mapping[str, str]:
        """What the file says of itself, as it says it."""
        return self.info.properties

    @property
    def blocks_decoded(self) -> int:
        """Native blocks that were decoded through this object so far: what reading cost."""
        return self.source.slide.stats.blocks_decoded

    def thumbnail(self, max_px: int = 1024) -> NDArray[np.uint8]:
        """The whole slide, uint8 (H, W, 3), its longer side ``max_px`` at most."""
        return read_thumbnail(self.source.slide, max_px)

    def read_region(self, x: int, y: int, width: int, height: int, *, level: int = 0) -> NDArray[np.uint8]:
        """Pixels of a region, uint8 (height, width, 3); all four numbers in pixels of ``level``, white off the slide.

        Raises ValueError for a level that does not exist or a size below 1, SlideReadError.
        """
        return self.source.slide.read_region(level, x, y, width, height)

    def associated_images(self) -> Mapping[str, NDArray[np.uint8]]:
        """Label, macro and so on, uint8 (h, w, 3), as far as the file has them. A label may name a patient."""
        return self.source.slide.associated_images()

    def tissue(
        self,
        *,
        mask: str | Path | None = None,
        tissue_class: str | Sequence[str] = (),
        settings: SegmentSettings | None = None,
        **values: Any,
    ) -> Tissue:
        """Find the tissue, or take it from a GeoJSON.

        mask: GeoJSON in level-0 pixels, as QuPath exports it, in place of finding tissue; tissue_class: only the areas
        of this class of it, or of the slide's annotations. settings: a ``SegmentSettings``; or single ones of them by
        name, as ``stain_min=0.02``.

        Raises MissingMppError for a slide without a resolution, MaskError for a mask that cannot be used, ConfigError
        for an unknown setting or a value out of its range, SlideReadError.
        """
        chosen = segment_settings(settings, values)
        entry = self.source.entry
        classes = (tissue_class,) if isinstance(tissue_class, str) else tuple(tissue_class)
        if mask is not None:
            entry = entry.stating(mask=str(Path(mask).absolute()))
        if classes:
            entry = entry.stating(tissue_class=classes)
        slide = self.source.slide
        if slide.pyramid.mpp is None:
            raise _without_mpp(entry)
        own = mask is not None or bool(classes)
        if own or chosen not in self._tissue:
            found = Tissue(self.source, find_mask(entry, slide, chosen, self.source.reader))
            if own:
                return found
            self._tissue[chosen] = found
        return self._tissue[chosen]

    def grids(
        self,
        *resolutions: str | float,
        tissue: Tissue | None = None,
        settings: TileSettings | None = None,
        **values: Any,
    ) -> Grids:
        """Lay aligned grids: the coarsest lays the cells, each finer one subdivides them by a whole number.

        resolutions: such as "20x" (by the convention 10 / mpp), "0.5um" or 0.5 (um/px); by default 20x and 5x. tissue:
        by default that of ``tissue()``. settings: a ``TileSettings``; or single ones of them by name: ``tile_px=256``,
        ``overlap_px``, ``min_tissue``, ``min_sharpness``, ``allow_upsampling`` and so on.

        Raises ResolutionError for one finer than the slide, or grids that do not align; ConfigError; what ``tissue``
        raises.
        """
        chosen = tile_settings(resolutions, settings, values)
        where = tissue if tissue is not None else self.tissue()
        slide = self.source.slide
        if where.slide_fingerprint != slide.info.fingerprint:
            raise ConfigError(f"the tissue given is not of {self.slide_id}", remedy="give that of this slide")
        return Grids(self.source, lay_grids(self.source.entry, slide, where.found, chosen))

    def close(self) -> None:
        """Close the file. What was made of it stays; what reads it says that it is closed."""
        self.source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return Slide, (self.source,)

    def __repr__(self) -> str:
        if self.source.closed:
            return f"<Slide {self.slide_id}: closed>"
        width, height = self.size
        return f"<Slide {self.slide_id}: {width:,} x {height:,} px, {_shown_mpp(self.mpp)}>"

    def _repr_html_(self) -> str:
        if self.source.closed:
            return card(self.slide_id, [("closed", shown_path(self.path))])
        width, height = self.size
        mpp, info = self.mpp, self.info
        facts: list[tuple[str, object]] = [
            ("file", self.path),
            ("level 0", f"{width:,} x {height:,} px"),
            ("resolution", f"{_shown_mpp(mpp)} ({info.mpp_source})"),
            ("levels", len(self.levels)),
            ("reader", f"{info.reader}, {info.vendor}"),
            *(("note", note) for note in info.notes),
        ]
        if mpp is not None:
            facts.insert(2, ("size", f"{number(width * mpp[0] / 1000)} x {number(height * mpp[1] / 1000)} mm"))
        return card(self.slide_id, facts, self.thumbnail(420))


def _shown_mpp(mpp: FloatPair | None) -> str:
    if mpp is None:
        return "no resolution stated"
    shown = f"{mpp[0]:.4g}" if mpp[0] == mpp[1] else f"{mpp[0]:.4g} x {mpp[1]:.4g}"
    return f"{shown} um/px (about {float(level_label(mpp[0])[:-1]):.3g}x)"


def _without_mpp(entry: SlideEntry) -> MissingMppError:
    error = missing_mpp_error(entry.shown_path)
    return MissingMppError(
        error.message, remedy="open it with its um per level-0 pixel, as wp.open(path, mpp=0.25); nothing is guessed"
    )
