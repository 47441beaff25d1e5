"""TRIDENT's folder of features and coordinates: ``20x_256px_0px_overlap/features_uni_v1/<slide>.h5``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from wsi_pipe.encoders.elsewhere import name_elsewhere
from wsi_pipe.geometry import MICROMETRES_PER_MAGNIFICATION
from wsi_pipe.interop.hdf5 import add, hdf5_at
from wsi_pipe.interop.values import Given, SlideFeatures, whole

__all__ = ["TridentExporter", "coords_attrs"]

PATCHES = "patches"


def coords_attrs(slide: SlideFeatures, savetodir: str) -> dict[str, Any]:
    """What TRIDENT keeps beside coordinates.

    TRIDENT takes a tile's side on level 0 for ``patch_size * level0_magnification / target_magnification``. The
    magnification of level 0 is the one that makes this true of the tiles that were really cut: nominal, as TRIDENT's.
    """
    grid = slide.grid
    target = MICROMETRES_PER_MAGNIFICATION / grid.spec.mpp
    return {
        "patch_size": grid.spec.size_px,
        "patch_size_level0": round(grid.tile_size_l0[0]),
        "level0_magnification": whole(target * grid.tile_size_l0[0] / grid.spec.size_px),
        "target_magnification": whole(target),
        "overlap": grid.spec.overlap_px,
        "name": slide.slide_id,
        "savetodir": savetodir,
        "level0_width": slide.attrs.width_l0,
        "level0_height": slide.attrs.height_l0,
    }


class TridentExporter:
    """TRIDENT reads ``features`` and ``coords`` of a feature file, and ``coords`` of ``patches/<slide>_patches.h5``."""

    name: ClassVar[str] = "trident"
    title: ClassVar[str] = "TRIDENT"
    version: ClassVar[int] = 1
    takes_empty: ClassVar[bool] = True
    shared: ClassVar[bool] = False

    def files(self, slide: SlideFeatures) -> Sequence[Path]:
        """The features, and the coordinates alone, from which TRIDENT computes features of other encoders."""
        folder, features = self._folders(slide)
        return (features / f"{slide.slide_id}.h5", folder / PATCHES / f"{slide.slide_id}_patches.h5")

    def of_grid(self, place: Path) -> bool:
        """The coordinates alone are."""
        return place.parent.name == PATCHES

    def write(self, slide: SlideFeatures, out: Path, place: Path) -> None:
        """Features as float32, coordinates as int64 of level 0."""
        folder, features = self._folders(slide)
        with hdf5_at(out) as file:
            if place.parent == features:
                own = {"name": slide.slide_id, "savetodir": str(features), **slide.origins}
                add(file, "features", slide.features, own)
            add(file, "coords", slide.grid.coords, coords_attrs(slide, str(folder)))

    def tables(self, slides: Sequence[Given], encoder: str) -> Iterator[tuple[Path, str]]:
        """None: TRIDENT finds slides by their files."""
        return iter(())

    @staticmethod
    def _folders(slide: SlideFeatures) -> tuple[Path, Path]:
        spec = slide.grid.spec
        magnification = whole(MICROMETRES_PER_MAGNIFICATION / spec.mpp)
        folder = Path(f"{magnification:g}x_{spec.size_px}px_{spec.overlap_px}px_overlap")
        return folder, folder / f"features_{name_elsewhere(slide.known_as, 'trident')}"
