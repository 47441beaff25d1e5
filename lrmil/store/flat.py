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
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lrmil.errors import BagMismatchError, StoreError
from lrmil.store.formats import BagInfo, find_bags, inspect_bag, read_features, read_places
from wsi_pipe.files import TEMPORARY_SUFFIX, output_error

if TYPE_CHECKING:
    import torch

    from lrmil.store.resident import ResidentStore

__all__ = ["STORE_DTYPES", "BagRecord", "FeatureStore", "StoreDtype", "StoreMeta"]

StoreDtype = Literal["float16", "bfloat16", "float32"]
STORE_DTYPES: tuple[StoreDtype, ...] = ("float16", "bfloat16", "float32")
STORE_VERSION = 1
FLOAT16_OVERFLOW = 65520.0
"""From here on rounding to float16 gives infinity: its greatest value is 65504, the next would be 65536."""


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
        path: Path | None = None,
    ) -> None:
        if flat.ndim != 2 or len(offsets) != len(records) + 1 or offsets[-1] != len(flat):
            raise StoreError(f"features {flat.shape}, {len(offsets)} offsets and {len(records)} bags do not fit")
        duplicates = _duplicates([r.slide_id for r in records])
        if duplicates:
            raise StoreError(f"two bags share the slide id {duplicates[0]!r}", remedy="rename one of them")
        self.flat = flat
        self.offsets = offsets
        self.records = tuple(records)
        self.dtype: StoreDtype = dtype
        self.meta = meta or StoreMeta()
        self.coords = coords if coords is not None else np.full((len(flat), 2), np.nan)
        self.parents = parents
        self.path = path
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

    def verify(self) -> None:
        """Read all features and compare with the stored content hash. Raises StoreError where they differ."""
        actual = _hash(self.dtype, self.offsets, self.slide_ids, self.dim, [self.flat])
        if actual != self.content_hash:
            raise StoreError(f"{self.path}: features do not match the content hash", remedy="pack it again")

    def to_device(
        self, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, *, place: str = "auto"
    ) -> ResidentStore:
        """The store as a tensor: on the device where it fits, else in pinned memory, else mapped.

        dtype: of the features handed out, by default the stored one. place: "auto", "device", "pinned" or "mapped".
        """
        from lrmil.store.resident import ResidentStore

        return ResidentStore.place_store(self, device, dtype, place=place)

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
    def pack(
        cls,
        bag_paths: Iterable[str | Path] | str | Path,
        level: str | None,
        encoder: str | None,
        out_dir: str | Path,
        dtype: StoreDtype = "float16",
        *,
        parent_level: str | None = None,
        weights_sha256: str = "",
        reuse: bool = True,
        progress: Callable[[int, int], object] | None = None,
    ) -> FeatureStore:
        """Copy the features of ``level`` and ``encoder`` of many bags into one store in ``out_dir``, and open it.

        weights_sha256: take features with these weights, whatever their name, where bags have them. dtype: how features
        are stored. parent_level: keep each row's parent at that coarser level too. reuse: return
        the store that is there if it was made of the same bags in the same way. progress: called with (done, all).

        Raises StoreError for an unreadable bag, NaN, or a value that ``dtype`` cannot hold; BagMismatchError, naming
        the bag, when encoders, weights, resolutions or dimensions differ; OutputError when the disk is full.
        """
        if dtype not in STORE_DTYPES:
            raise StoreError(f"dtype {dtype!r} is not known", remedy=f"use {', '.join(STORE_DTYPES)}")
        out = Path(out_dir)
        infos = [inspect_bag(path, level, encoder, weights_sha256=weights_sha256) for path in find_bags(bag_paths)]
        if not infos:
            raise StoreError("no bags are given", remedy="give bag files or the folder that holds them")
        meta, dim = _common(infos, parent_level)
        records = [_record(info) for info in infos]
        if reuse and (out / "store.json").is_file():
            there = _reusable(cls, out, records, meta, dtype)
            if there is not None:
                return there
        duplicates = _duplicates([r.slide_id for r in records])
        if duplicates:
            paths = [r.path for r in records if r.slide_id == duplicates[0]]
            raise StoreError(f"slide id {duplicates[0]!r} is in {' and '.join(paths)}", remedy="rename one of them")
        temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex[:12]}{TEMPORARY_SUFFIX}")
        try:
            temporary.mkdir(parents=True)
            _write(temporary, infos, records, meta, dim, dtype, progress)
            _swap(temporary, out)
        except OSError as error:
            if error.errno is None:
                raise
            raise output_error(out, error) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return cls.open(out)

    @classmethod
    def open(cls, path: str | Path) -> FeatureStore:
        """Map a packed store; nothing is read yet. Raises StoreError when it is missing, truncated or no store."""
        folder = Path(path)
        try:
            head = json.loads((folder / "store.json").read_text(encoding="utf-8"))
            if head["store_version"] != STORE_VERSION:
                raise StoreError(f"{folder} is a store of version {head['store_version']}", remedy="pack it again")
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
                path=folder,
            )
        except (OSError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"{folder} is no feature store: {error}", remedy="make it with lrmil pack") from error


def storage_dtype(dtype: StoreDtype) -> np.dtype[Any]:
    """The numpy type that a stored type lies in: bfloat16 in uint16."""
    return np.dtype("<u2" if dtype == "bfloat16" else "<f2" if dtype == "float16" else "<f4")


def encode(values: NDArray[Any], dtype: StoreDtype, name: str = "features") -> NDArray[Any]:
    """Features in their stored type, rounded to nearest even. Raises StoreError when a value overflows it."""
    if dtype == "bfloat16":
        return encode_bfloat16(values, name)
    if dtype == "float16" and values.dtype != np.float16 and values.size:
        peak = max(float(values.max()), -float(values.min()))
        if peak >= FLOAT16_OVERFLOW:
            raise StoreError(f"{name}: a feature of {peak:g} is beyond float16", remedy="use --dtype bfloat16")
    return values.astype(storage_dtype(dtype), copy=False)


def encode_bfloat16(values: NDArray[Any], name: str = "features") -> NDArray[np.uint16]:
    """The upper 16 bits of float32, rounded to nearest even."""
    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    encoded = rounded.astype("<u2")
    if encoded.size and int((encoded & 0x7FFF).max()) >= 0x7F80:
        raise StoreError(f"{name}: a feature is beyond bfloat16, or not finite", remedy="use --dtype float32")
    return cast(NDArray[np.uint16], encoded)


def decode_bfloat16(values: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16 held in uint16 as the equal float32."""
    return (values.astype("<u4") << 16).view("<f4")


def _hash(dtype: str, offsets: NDArray[np.int64], ids: Sequence[str], dim: int, chunks: Iterable[NDArray[Any]]) -> str:
    digest = hashlib.sha256(json.dumps([dtype, dim, list(ids)]).encode())
    digest.update(np.ascontiguousarray(offsets, "<i8").tobytes())
    for chunk in chunks:
        for start in range(0, len(chunk), 1 << 14):
            digest.update(np.ascontiguousarray(chunk[start : start + (1 << 14)]).data)
    return digest.hexdigest()


def _pair(value: Any) -> tuple[float, float] | None:
    return None if value is None else (float(value[0]), float(value[1]))


def _duplicates(names: Sequence[str]) -> list[str]:
    seen: set[str] = set()
    return [name for name in names if name in seen or seen.add(name)]  # type: ignore[func-returns-value]


def _record(info: BagInfo) -> BagRecord:
    return BagRecord(
        info.slide_id,
        info.case_id,
        info.path,
        info.format,
        info.fingerprint,
        info.tile_size_l0,
        info.coords_unit,
        info.empty_reason if info.empty_reason or info.rows else "no tiles",
    )


def _common(infos: Sequence[BagInfo], parent_level: str | None) -> tuple[StoreMeta, int]:
    """What all bags share; the dimension is that of the bags with rows. Raises BagMismatchError where they differ."""
    first = next((info for info in infos if info.rows), infos[0])
    for info in infos:
        # One set of weights may go by several names, such as paths on two machines.
        by_weights = info.weights_sha256 and first.weights_sha256
        facts = [
            ("weights", info.weights_sha256[:12], first.weights_sha256[:12])
            if by_weights
            else ("encoder", info.encoder, first.encoder),
            ("level", info.level, first.level),
            ("resolution in um/px", info.mpp, first.mpp),
            ("tile size in px", info.tile_px, first.tile_px),
        ]
        if info.rows:
            facts.append(("dimension", info.dim, first.dim))
        for what, mine, theirs in facts:
            if mine != theirs:
                raise BagMismatchError(
                    f"{info.path}: {what} {mine or 'unknown'!s}, but {first.path} has {theirs or 'unknown'!s}",
                    remedy="use bags of one encoder, one set of weights and one resolution",
                )
    meta = StoreMeta(first.encoder, first.weights_sha256, first.level, first.mpp, first.tile_px, parent_level)
    return meta, first.dim


def _reusable(
    cls: type[FeatureStore], out: Path, records: Sequence[BagRecord], meta: StoreMeta, dtype: StoreDtype
) -> FeatureStore | None:
    try:
        there = cls.open(out)
    except StoreError:
        return None
    same = there.records == tuple(records) and there.meta == meta and there.dtype == dtype
    return there if same else None


def _write(
    folder: Path,
    infos: Sequence[BagInfo],
    records: Sequence[BagRecord],
    meta: StoreMeta,
    dim: int,
    dtype: StoreDtype,
    progress: Callable[[int, int], object] | None,
) -> None:
    offsets = np.concatenate([[0], np.cumsum([info.rows for info in infos])]).astype(np.int64)
    coords = np.empty((int(offsets[-1]), 2))
    parents = None if meta.parent_level is None else np.empty(int(offsets[-1]), np.int32)
    digest = hashlib.sha256(json.dumps([dtype, dim, [r.slide_id for r in records]]).encode())
    digest.update(offsets.astype("<i8").tobytes())
    with open(folder / "features.bin", "wb") as file:
        for i, info in enumerate(infos):
            rows = slice(int(offsets[i]), int(offsets[i + 1]))
            if info.rows:
                block = np.ascontiguousarray(encode(read_features(info), dtype, info.path))
                digest.update(block.data)
                file.write(block.data)
            coords[rows], above = read_places(info, meta.parent_level)
            if parents is not None and above is not None:
                parents[rows] = above
            if progress is not None:
                progress(i + 1, len(infos))
        file.flush()
        os.fsync(file.fileno())
    np.save(folder / "offsets.npy", offsets)
    np.save(folder / "coords.npy", coords)
    if parents is not None:
        np.save(folder / "parents.npy", parents)
    head = {
        "store_version": STORE_VERSION,
        "dtype": dtype,
        "dim": dim,
        "meta": asdict(meta),
        "content_hash": digest.hexdigest(),
        "bags": [asdict(record) for record in records],
    }
    (folder / "store.json").write_text(json.dumps(head, indent=1), encoding="utf-8")
    FeatureStore.open(folder)


def _swap(temporary: Path, out: Path) -> None:
    """Put a finished folder in the place of ``out``; only a store is ever replaced."""
    if out.exists():
        if any(out.iterdir()) and not (out / "store.json").is_file():
            raise StoreError(f"{out} is a folder with other files in it", remedy="give an empty or a new folder")
        old = out.with_name(f".{out.name}.{uuid.uuid4().hex[:12]}{TEMPORARY_SUFFIX}")
        os.replace(out, old)
        os.replace(temporary, out)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(temporary, out)
