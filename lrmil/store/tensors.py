"""Bags that are one tensor of ``torch.save``, as CLAM's ``pt_files`` and slide2vec's ``tile_embeddings``.

They are read with ``weights_only=True``, which unpickles nothing but tensors. They hold no coordinates; slide2vec keeps
them, and what the features are, in files beside.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lrmil.errors import StoreError
from wsi_pipe.files import parse_json

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["read_tensor", "tensor_facts", "tensor_places", "tensor_shape"]

REMEDY = "save one (N, D) tensor with torch.save, as CLAM does, or give .h5 files"


def _load(path: Path, *, values: bool) -> Tensor:
    """The tensor in a file; without ``values`` its memory is mapped rather than read, where the format allows it."""
    import torch

    try:
        mapped = not values and zipfile.is_zipfile(path)
        with warnings.catch_warnings():
            # Of unusual pickles, which then are refused or read.
            warnings.simplefilter("ignore")
            data: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror or error}", remedy="give bags that can be read") from error
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise StoreError(
            f"{path} is not a tensor that can be read without unpickling: {line}", remedy=REMEDY
        ) from error
    if not isinstance(data, torch.Tensor):
        raise StoreError(f"{path} holds {type(data).__name__}, not a tensor", remedy=REMEDY)
    if not data.is_floating_point():
        raise StoreError(f"{path}: features are {data.dtype}, not floating point", remedy=REMEDY)
    return data


def tensor_shape(path: Path) -> tuple[int, ...]:
    """The shape of the tensor in a file. Raises StoreError where it holds none, or one of whole numbers."""
    return tuple(int(size) for size in _load(path, values=False).shape)


def read_tensor(path: Path) -> NDArray[np.floating[Any]]:
    """The values of a file: float16 or float32 as stored, others as float32."""
    import torch

    data = _load(path, values=True).detach()
    kept = data if data.dtype in (torch.float16, torch.float32) else data.float()
    values: NDArray[np.floating[Any]] = kept.numpy()
    return values


def tensor_facts(path: Path) -> dict[str, Any]:
    """What slide2vec's ``.meta.json`` beside a tensor says of it; nothing where there is none."""
    try:
        told: Any = parse_json((path.with_suffix(".meta.json")).read_bytes())
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) and told.get("artifact_type") == "tile_embeddings" else {}


def tensor_places(path: Path, rows: int) -> NDArray[np.float64] | None:
    """Level-0 corners of a tensor's rows, float64 (rows, 2), from slide2vec's coordinates; None where there are none.

    Raises StoreError when they are not as many as the features.
    """
    facts = tensor_facts(path)
    if not facts:
        return None
    told = facts.get("coordinates_npz_path")
    tried = [path.parent.parent / "tiles" / f"{path.stem}.coordinates.npz"]
    if told:
        tried = [Path(told), path.parent.parent / told, *tried]
    for place in tried:
        try:
            with np.load(place, allow_pickle=False) as data:
                coords = np.stack([data["x"], data["y"]], axis=1).astype(np.float64)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            continue
        if len(coords) != rows:
            raise StoreError(f"{place}: {len(coords)} coordinates for {rows} features", remedy="make the bag again")
        return coords
    return None
