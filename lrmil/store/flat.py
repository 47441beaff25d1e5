"""One flat array of all bags' features with offsets: written once, then memory-mapped.

Layout of a store's folder::

    store.json      what it holds: dtype, dim, encoder, weights, level, one record a bag, content hash
    features.bin    (T, D) in C order: float16, float32, or bfloat16 as uint16
    offsets.npy     int64 (bags + 1,): bag i is rows offsets[i] to offsets[i + 1]
    coords.npy      float64 (T, 2)
    parents.npy     int32 (T,), where packed with a parent level: row of the same bag at that level
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lrmil.errors import StoreError
from lrmil.store.dtypes import StoreDtype, decode_bfloat16, encode, storage_dtype
from wsi_pipe.files import parse_json

__all__ = ["STORE_VERSION", "BagRecord", "FeatureStore", "StoreMeta", "duplicates", "head_hash", "places_hash"]

STORE_VERSION = 1


@dataclass(frozen=True)
class StoreMeta:
    """What all bags of a store have in common.

    Empty or None where bags of other tools state nothing. parent_level: the level that ``parents`` point into.
    """

    encoder: str = ""
    weights_sha256: str = ""
    level: str = ""
    mpp: float | None = None
    tile_px: int | None = None
    parent_level: str | None = None


@dataclass(frozen=True)
class BagRecord:
    """What belongs to one bag alone; see BagInfo for the fields."""

    slide_id: str
    case_id: str | None = None
    path: str = ""
    format: str = "memory"
    fingerprint: str = ""
    tile_size_l0: tuple[float, float] | None = None
    coords_unit: str = "px_l0"
    empty_reason: str | None = None
    slide_fingerprint: str = ""
    encoder_saw: str = ""


class FeatureStore:
    """Features of many bags as rows of one array.

    flat: (T, D) in the stored type (bfloat16 as uint16). offsets: int64 (bags + 1,). coords: float64 (T, 2), level-0
    px (um in bags of STAMP), NaN where unknown. parents: int32 (T,) or None.
    """

    def __init__(
        self,
        flat: NDArray[Any],
        offsets: NDArray[np.int64],
        records: Sequence[BagRecord],
        *,
        dtype: StoreDtype,
        meta: StoreMeta | None = None,
        coords: NDArray[np.float64] | None = None,
        parents: NDArray[np.int32] | None = None,
        content_hash: str | None = None,
        places_hash: str = "",
        path: Path | None = None,
    ) -> None:
        if flat.ndim != 2 or len(offsets) != len(records) + 1 or offsets[-1] != len(flat):
            raise StoreError(f"features {flat.shape}, {len(offsets)} offsets and {len(records)} bags do not fit")
        repeated = duplicates([r.slide_id for r in records])
        if repeated:
            raise StoreError(f"two bags share the slide id {repeated[0]!r}", remedy="rename one of them")
        self.flat = flat
        self.offsets = offsets
        self.records = tuple(records)
        self.dtype: StoreDtype = dtype
        self.meta = meta or StoreMeta()
        self.coords = coords if coords is not None else np.full((len(flat), 2), np.nan)
        self.parents = parents
        self.path = path
        self.places_hash = places_hash
        self._content_hash = content_hash

    def __len__(self) -> int:
        return len(self.records)

    def __repr__(self) -> str:
        return f"FeatureStore({len(self)} bags, {len(self.flat)} x {self.dim} {self.dtype}, {self.meta.encoder!r})"

    @property
    def dim(self) -> int:
        """D, the features' dimension."""
        return int(self.flat.shape[1])

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Rows of each bag, int64 (bags,)."""
        return np.diff(self.offsets)

    @cached_property
    def slide_ids(self) -> tuple[str, ...]:
        """Slide id of each bag."""
        return tuple(record.slide_id for record in self.records)

    @cached_property
    def case_ids(self) -> tuple[str, ...]:
        """Case id of each bag; the slide's own id where the bag states none."""
        return tuple(record.case_id or record.slide_id for record in self.records)

    @cached_property
    def content_hash(self) -> str:
        """SHA-256, in hex, of dtype, shapes, slide ids, offsets and features."""
        return self._content_hash or _hash(self.dtype, self.offsets, self.slide_ids, self.dim, [self.flat])

    def bag(self, index: int) -> NDArray[Any]:
        """Features of one bag, (N, D): float16 or float32 as stored, bfloat16 as the equal float32."""
        rows = self.flat[self.offsets[index] : self.offsets[index + 1]]
        return decode_bfloat16(rows) if self.dtype == "bfloat16" else np.asarray(rows)

    def bag_coords(self, index: int) -> NDArray[np.float64]:
        """Coordinates of one bag's rows, float64 (N, 2)."""
        return np.asarray(self.coords[self.offsets[index] : self.offsets[index + 1]])

    @property
    def placeless(self) -> int:
        """How many bags have rows and no coordinates, as those of tensors alone: no heat map can be drawn of them."""
        starts = self.offsets[:-1][self.lengths > 0]
        return int(np.isnan(self.coords[starts, 0]).sum())

    def verify(self) -> None:
        """Read all of the store and compare with the stored hashes, the cheap ones first.

        Raises StoreError where they differ. Stores of versions that kept none of the places have them taken as is.
        """
        if self.places_hash and places_hash(self.coords, self.parents) != self.places_hash:
            raise StoreError(f"{self.path}: coordinates or parents are not what was packed", remedy="pack it again")
        actual = _hash(self.dtype, self.offsets, self.slide_ids, self.dim, [self.flat])
        if actual != self.content_hash:
            raise StoreError(f"{self.path}: features do not match the content hash", remedy="pack it again")

    @classmethod
    def from_arrays(
        cls,
        arrays: Sequence[ArrayLike],
        ids: Sequence[str] | None = None,
        *,
        case_ids: Sequence[str] | None = None,
        coords: Sequence[ArrayLike] | None = None,
        parents: Sequence[ArrayLike] | None = None,
        dtype: StoreDtype = "float32",
        meta: StoreMeta | None = None,
    ) -> FeatureStore:
        """A store in memory from one (N_i, D) array a bag; ids are "0", "1", ... unless given.

        Raises StoreError when bags differ in D or hold NaN or infinity.
        """
        if not arrays:
            raise StoreError("a store needs at least one bag")
        values = [np.asarray(a) for a in arrays]
        bad = next((i for i, v in enumerate(values) if not np.isfinite(v).all()), None)
        if bad is not None:
            raise StoreError(f"bag {bad if ids is None else ids[bad]} holds NaN or infinity")
        dims = {v.shape[1:] for v in values}
        if len(dims) != 1 or any(v.ndim != 2 for v in values):
            raise StoreError(f"bags must be (N, D) with one D, not {sorted(map(str, {v.shape for v in values}))[:3]}")
        names = [str(i) for i in range(len(values))] if ids is None else list(ids)
        cases = [None] * len(values) if case_ids is None else list(case_ids)
        records = [BagRecord(name, case) for name, case in zip(names, cases, strict=True)]
        offsets = np.concatenate([[0], np.cumsum([len(v) for v in values])]).astype(np.int64)
        flat = np.concatenate([encode(v, dtype, name) for v, name in zip(values, names, strict=True)])
        return cls(
            flat,
            offsets,
            records,
            dtype=dtype,
            meta=meta,
            coords=None if coords is None else np.concatenate([np.asarray(c, np.float64) for c in coords]),
            parents=None if parents is None else np.concatenate([np.asarray(p, np.int32) for p in parents]),
        )

    @classmethod
    def open(cls, path: str | Path) -> FeatureStore:
        """Map a packed store; nothing is read yet. Raises StoreError when it is missing, truncated or no store."""
        folder = Path(path)
        try:
            head = parse_json((folder / "store.json").read_text(encoding="utf-8"))
            if head["store_version"] != STORE_VERSION:
                raise StoreError(f"{folder} is a store of version {head['store_version']}", remedy="pack it again")
            if head.get("head_hash", head_hash(head)) != head_hash(head):
                raise StoreError(f"{folder}: store.json is not what was written", remedy="pack it again")
            dtype = cast(StoreDtype, head["dtype"])
            offsets = np.load(folder / "offsets.npy", allow_pickle=False)
            shape = (int(offsets[-1]), int(head["dim"]))
            kind = storage_dtype(dtype)
            size = (folder / "features.bin").stat().st_size
            if size != shape[0] * shape[1] * kind.itemsize:
                raise StoreError(f"{folder}: features.bin is {size} bytes, not {shape}", remedy="pack it again")
            # Copy-on-write: torch takes only writable arrays without a warning, and the file stays as it is.
            flat = np.memmap(folder / "features.bin", kind, "c", shape=shape) if size else np.zeros(shape, kind)
            parents = folder / "parents.npy"
            records = [BagRecord(**{**r, "tile_size_l0": _pair(r["tile_size_l0"])}) for r in head["bags"]]
            return cls(
                flat,
                offsets,
                records,
                dtype=dtype,
                meta=StoreMeta(**head["meta"]),
                coords=np.load(folder / "coords.npy", mmap_mode="r", allow_pickle=False),
                parents=np.load(parents, mmap_mode="r", allow_pickle=False) if parents.exists() else None,
                content_hash=head["content_hash"],
                places_hash=str(head.get("places_hash", "")),
                path=folder,
            )
        except (OSError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"{folder} is no feature store: {error}", remedy="make it with lrmil pack") from error


def _hash(dtype: str, offsets: NDArray[np.int64], ids: Sequence[str], dim: int, chunks: Iterable[NDArray[Any]]) -> str:
    digest = hashlib.sha256(json.dumps([dtype, dim, list(ids)]).encode())
    digest.update(np.ascontiguousarray(offsets, "<i8").tobytes())
    for chunk in chunks:
        for start in range(0, len(chunk), 1 << 14):
            digest.update(np.ascontiguousarray(chunk[start : start + (1 << 14)]).data)
    return digest.hexdigest()


def places_hash(coords: NDArray[np.float64], parents: NDArray[np.int32] | None) -> str:
    """SHA-256, in hex, of the coordinates and the rows of parents."""
    digest = hashlib.sha256(np.ascontiguousarray(coords, "<f8").tobytes())
    if parents is not None:
        digest.update(np.ascontiguousarray(parents, "<i4").tobytes())
    return digest.hexdigest()


def head_hash(head: dict[str, Any]) -> str:
    """SHA-256, in hex, of what ``store.json`` holds beside its own hash."""
    own = {name: value for name, value in head.items() if name != "head_hash"}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def _pair(value: Any) -> tuple[float, float] | None:
    return None if value is None else (float(value[0]), float(value[1]))


def duplicates(names: Sequence[str]) -> list[str]:
    """Names that occurred before, in their order."""
    seen: set[str] = set()
    return [name for name in names if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
