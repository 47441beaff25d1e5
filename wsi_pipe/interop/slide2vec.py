"""slide2vec's tile embeddings with the coordinates that hs2p keeps beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.encoders.elsewhere import name_elsewhere
from wsi_pipe.interop.tensors import save_tensor
from wsi_pipe.interop.values import Given, SlideFeatures

__all__ = ["Slide2vecExporter"]

EMBEDDINGS, TILES = Path("tile_embeddings"), Path("tiles")
TOLERANCE = 0.05
"""hs2p's own: how far a spacing that is read may be from the one asked for."""

SEGMENTATION = (
    "tissue_method", "requested_seg_downsample", "seg_downsample", "seg_level", "seg_spacing_um", "sthresh",
    "sthresh_up", "mthresh", "close", "sam2_checkpoint_path", "sam2_config_path", "mask_path", "ref_tile_size_px",
    "tissue_mask_tissue_value", "mask_level", "mask_spacing_um",
)  # fmt: skip
FILTERING = (
    "a_t", "a_h", "filter_white", "filter_black", "white_threshold", "black_threshold", "fraction_threshold",
    "filter_grayspace", "grayspace_saturation_threshold", "grayspace_fraction_threshold", "filter_blur",
    "blur_threshold", "qc_spacing_um",
)  # fmt: skip
"""Every key must be there for hs2p; what it knows nothing of here is null."""


class Slide2vecExporter:
    """slide2vec loads a tensor and a JSON file beside it; tiles are numbered down the columns, from the left one on."""

    name: ClassVar[str] = "slide2vec"
    title: ClassVar[str] = "slide2vec"
    version: ClassVar[int] = 1
    takes_empty: ClassVar[bool] = True
    shared: ClassVar[bool] = True

    def files(self, slide: SlideFeatures) -> Sequence[Path]:
        """Embeddings and coordinates with their JSON; of a slide without tiles the JSON alone."""
        told = [EMBEDDINGS / f"{slide.slide_id}.meta.json", TILES / f"{slide.slide_id}.coordinates.meta.json"]
        if not len(slide.features):
            return told
        return [EMBEDDINGS / f"{slide.slide_id}.pt", TILES / f"{slide.slide_id}.coordinates.npz", *told]

    def of_grid(self, place: Path) -> bool:
        """No file is the same for several encoders, which are kept apart by folders."""
        return False

    def write(self, slide: SlideFeatures, out: Path, place: Path) -> None:
        """One of the files, rows in slide2vec's order."""
        order = column_major(slide.grid.coords)
        if place.suffix == ".pt":
            save_tensor(out, slide.features[order])
        elif place.suffix == ".npz":
            coords = slide.grid.coords[order]
            with open(out, "wb") as handle:
                np.savez_compressed(
                    handle,
                    tile_index=np.arange(len(coords), dtype=np.int32),
                    x=coords[:, 0].astype(np.int64),
                    y=coords[:, 1].astype(np.int64),
                    tissue_fractions=slide.grid.tissue[order].astype(np.float32),
                )
        else:
            told = _embedding(slide) if place.parent == EMBEDDINGS else _tiling(slide)
            out.write_text(json.dumps(told, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def tables(self, slides: Sequence[Given], encoder: str) -> Iterator[tuple[Path, str]]:
        """None: files are found by their names."""
        return iter(())


def column_major(coords: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows sorted by x, then by y: int64 (N,)."""
    order: NDArray[np.int64] = np.lexsort((coords[:, 1], coords[:, 0]))
    return order


def _embedding(slide: SlideFeatures) -> Mapping[str, Any]:
    tiles = len(slide.features)
    grid = slide.grid
    return {
        "sample_id": slide.slide_id,
        "artifact_type": "tile_embeddings",
        "format": "pt",
        "feature_dim": int(slide.features.shape[1]) if tiles else None,
        "num_tiles": tiles,
        "annotation": None,
        "encoder_name": name_elsewhere(slide.known_as, "slide2vec"),
        "encoder_level": "tile",
        # Relative to the folder of the export, which may be moved.
        "coordinates_npz_path": str(TILES / f"{slide.slide_id}.coordinates.npz") if tiles else "",
        "coordinates_meta_path": str(TILES / f"{slide.slide_id}.coordinates.meta.json"),
        "tiles_tar_path": "",
        "image_path": slide.attrs.slide_path,
        "mask_path": None,
        "tile_size_lv0": round(grid.tile_size_l0[0]),
        "backend": "wsi-pipe",
        "read_tile_size_px": round(grid.tile_size_l0[0]),
        "requested_tile_size_px": grid.spec.size_px,
        "requested_spacing_um": grid.spec.mpp,
        "encoder_input_size_px": None,
        # Of the program that computed them: slide2vec does not take them for its own and goes on from there.
        "compatibility": {},
        "wsi_pipe": slide.origins,
    }


def _tiling(slide: SlideFeatures) -> Mapping[str, Any]:
    grid, attrs = slide.grid, slide.attrs
    spacing = attrs.mpp_l0[0]
    side = round(grid.tile_size_l0[0])
    return {
        "provenance": {
            "sample_id": slide.slide_id,
            "image_path": attrs.slide_path,
            "mask_path": None,
            "backend": "wsi-pipe",
            "requested_backend": "wsi-pipe",
            "spacing_at_level_0": spacing,
            "mask_backend": None,
            "requested_mask_backend": None,
        },
        # A bag does not hold the slide's levels: tiles are described as read from level 0.
        "slide": {
            "dimensions": [attrs.width_l0, attrs.height_l0],
            "base_spacing_um": spacing,
            "level_downsamples": [1.0],
        },
        "tiling": {
            "requested_tile_size_px": grid.spec.size_px,
            "requested_spacing_um": grid.spec.mpp,
            "read_level": 0,
            "read_tile_size_px": side,
            "read_spacing_um": spacing,
            "tile_size_lv0": side,
            "tolerance": TOLERANCE,
            "step_px_lv0": round(grid.stride_l0[0]),
            "overlap": grid.spec.overlap_px / grid.spec.size_px,
            "min_tissue_fraction": grid.min_tissue,
            "is_within_tolerance": abs(spacing - grid.spec.mpp) <= TOLERANCE * grid.spec.mpp,
            "n_tiles": len(grid),
        },
        "segmentation": dict.fromkeys(SEGMENTATION) | {"tissue_method": "wsi-pipe"},
        "filtering": dict.fromkeys(FILTERING),
        "artifact": {
            "coordinate_space": "level0_px",
            "tile_order": "x_then_y",
            "annotation": None,
            "selection_strategy": None,
            "output_mode": None,
        },
    }
