"""Tiles and features in the files of other tools; their layouts are told in docs/interop.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.errors import BagError
from wsi_pipe.files import parse_json

__all__ = ["TOOLS", "ForeignTiles", "find_foreign", "read_foreign"]

TILE_PX = 256
"""Where a file does not say how many pixels a tile had."""


@dataclass(frozen=True)
class ForeignTiles:
    """Tiles of one slide as another tool's files have them.

    corners: float64 (N, 2), top-left; in um where ``um``, else level-0 pixels. side: of a tile, in the same unit, NaN
    where the file does not say it. tile_px: pixels that were encoded. mpp: um per pixel asked for, None where not told.
    features: (N, D) or None. encoder: as the file names it, "" where it does not. size_l0: of the slide as the tool saw
    it, or None.
    """

    path: Path
    slide_id: str
    corners: NDArray[np.float64]
    side: float
    tile_px: int
    mpp: float | None
    features: NDArray[np.floating[Any]] | None
    encoder: str = ""
    um: bool = False
    size_l0: tuple[int, int] | None = None


def _features(path: Path, values: NDArray[Any]) -> NDArray[np.floating[Any]]:
    # Some versions of TRIDENT keep a batch axis.
    found = values[0] if values.ndim == 3 and len(values) == 1 else values
    if found.ndim != 2 or not np.issubdtype(found.dtype, np.floating):
        raise BagError(f"{path}: features must be floating point (N, D), not {values.dtype} {values.shape}")
    if not np.isfinite(found).all():
        raise BagError(f"{path}: some features are NaN or infinite", remedy="compute them again with the tool")
    return np.asarray(found, np.float32 if found.dtype.itemsize > 2 else np.float16)


def _hdf5(path: Path, key: str) -> tuple[NDArray[Any] | None, NDArray[Any], dict[str, Any], dict[str, Any]]:
    """Features, coordinates, and the attributes of the coordinates and the root."""
    import h5py

    from wsi_pipe.bag import skim_file
    from wsi_pipe.job.guard import read_guarded

    # Damaged files may hang who opens them: another process looks first.
    read_guarded(skim_file, path)
    with h5py.File(path) as file:
        if "coords" not in file:
            raise BagError(f"{path}: holds no coords, so nobody knows where its tiles lie")
        values = file[key][()] if key in file else None
        own = dict(file[key].attrs) if key in file else {}
        return values, file["coords"][()], {**own, **dict(file["coords"].attrs)}, dict(file.attrs)


def _of_coords(path: Path, encoder: str) -> ForeignTiles:
    """CLAM's and TRIDENT's file: ``features``, ``coords`` and what stands beside them."""
    values, coords, attrs, _ = _hdf5(path, "features")
    if values is None:
        raise BagError(f"{path}: holds no features")
    target = attrs.get("target_magnification")
    size = (attrs.get("level0_width"), attrs.get("level0_height"))
    stated = attrs.get("encoder") or encoder
    return ForeignTiles(
        path,
        path.stem,
        np.asarray(coords, np.float64).reshape(-1, 2),
        float(attrs.get("patch_size_level0", np.nan)),
        int(attrs.get("patch_size", TILE_PX)),
        10.0 / float(target) if target else None,
        _features(path, values),
        str(stated.decode() if isinstance(stated, bytes) else stated),
        size_l0=None if size[0] is None or size[1] is None else (int(size[0]), int(size[1])),
    )


def _trident(path: Path) -> ForeignTiles:
    return _of_coords(path, path.parent.name.removeprefix("features_"))


def _clam(path: Path) -> ForeignTiles:
    return _of_coords(path, "")


def _stamp(path: Path) -> ForeignTiles:
    values, coords, _, root = _hdf5(path, "feats")
    if values is None:
        raise BagError(f"{path}: holds no feats")
    side = float(root.get("tile_size_um", root.get("tile_size", np.nan)))
    pixels = int(root.get("tile_size_px", TILE_PX))
    mpp = float(root["wsi_pipe_mpp"]) if "wsi_pipe_mpp" in root else side / pixels
    return ForeignTiles(
        path,
        path.stem,
        np.asarray(coords, np.float64).reshape(-1, 2),
        side,
        pixels,
        mpp if np.isfinite(mpp) else None,
        _features(path, values),
        str(root.get("wsi_pipe_encoder", root.get("extractor", ""))),
        um=str(root.get("unit", "um")) == "um",
    )


def _coordinates(path: Path, slide_id: str) -> tuple[NDArray[np.float64], Mapping[str, Any]]:
    """hs2p's coordinates and what its JSON says of the tiling."""
    try:
        with np.load(path, allow_pickle=False) as held:
            corners = np.stack([held["x"], held["y"]], axis=1).astype(np.float64)
        told = parse_json(path.with_name(f"{slide_id}.coordinates.meta.json").read_text(encoding="utf-8"))
    except (OSError, KeyError, ValueError) as error:
        raise BagError(f"{path}: no coordinates of hs2p: {error}", remedy="give slide2vec's whole output") from error
    return corners, told


def _tiling(path: Path, slide_id: str) -> ForeignTiles:
    corners, told = _coordinates(path, slide_id)
    tiling, slide = told.get("tiling", {}), told.get("slide", {})
    size = slide.get("dimensions")
    return ForeignTiles(
        path,
        slide_id,
        corners,
        float(tiling.get("tile_size_lv0", np.nan)),
        int(tiling.get("requested_tile_size_px", TILE_PX)),
        float(tiling["requested_spacing_um"]) if tiling.get("requested_spacing_um") else None,
        None,
        size_l0=(int(size[0]), int(size[1])) if size else None,
    )


def _hs2p(path: Path) -> ForeignTiles:
    return _tiling(path, path.name.removesuffix(".coordinates.npz"))


def _slide2vec(path: Path) -> ForeignTiles:
    import dataclasses

    import torch

    tiles = _tiling(path.parent.parent / "tiles" / f"{path.stem}.coordinates.npz", path.stem)
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
        told = json.loads(path.with_name(f"{path.stem}.meta.json").read_text(encoding="utf-8"))
        found = _features(path, values.numpy())
    except BagError:
        raise
    except Exception as error:
        # What torch raises for a file that is no tensor is of many kinds.
        raise BagError(f"{path}: is no tensor of slide2vec: {str(error).splitlines()[0]}") from error
    return dataclasses.replace(tiles, path=path, features=found, encoder=str(told.get("encoder_name") or ""))


Reader = Callable[[Path], ForeignTiles]
TOOLS: dict[str, tuple[tuple[str, ...], Reader]] = {
    "trident": (("*/features_*/*.h5", "features_*/*.h5", "*.h5"), _trident),
    "clam": (("h5_files/*.h5", "*.h5"), _clam),
    "stamp": (("feats/*.h5", "*.h5", "*/*.h5"), _stamp),
    "slide2vec": (("tile_embeddings/*.pt", "*.pt"), _slide2vec),
    "hs2p": (("tiles/*.coordinates.npz", "*.coordinates.npz"), _hs2p),
}
"""Where each tool keeps the files of slides, the first place that has any, and who reads one."""


def find_foreign(folder: Path, tool: str, encoder: str | None = None) -> list[Path]:
    """The tool's files in a folder, one a slide. encoder: of TRIDENT's folders, the one with its features.

    Raises BagError where there are none, or a slide has several.
    """
    from wsi_pipe.encoders.elsewhere import same_encoder

    patterns, _ = TOOLS[tool]
    for pattern in patterns:
        found = sorted(folder.glob(pattern))
        if tool == "trident" and encoder and "features_*" in pattern:
            found = [p for p in found if same_encoder(p.parent.name.removeprefix("features_"), encoder)]
        if not found:
            continue
        names = [path.stem for path in found]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            several = sorted({str(p.parent) for p in found if p.stem in twice})
            raise BagError(
                f"{folder}: {min(twice)} stands in {', '.join(several)}", remedy="give one of them, or --encoder NAME"
            )
        return found
    raise BagError(f"{folder}: holds no files of {tool} ({patterns[0]})", remedy="give the tool's output folder")


def read_foreign(path: Path, tool: str) -> ForeignTiles:
    """One slide's tiles. Raises BagError where the file is not what the tool writes, OSError."""
    tiles = TOOLS[tool][1](path)
    if tiles.features is not None and len(tiles.features) != len(tiles.corners):
        raise BagError(f"{path}: {len(tiles.corners)} coordinates for {len(tiles.features)} features")
    return tiles
