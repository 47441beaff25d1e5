"""Many bags into one store on disk: looked at, compared, copied, checked, and put in place at once."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lrmil.errors import BagMismatchError, StoreError
from lrmil.store.dtypes import STORE_DTYPES, StoreDtype, encode
from lrmil.store.finding import find_bags
from lrmil.store.flat import STORE_VERSION, BagRecord, FeatureStore, StoreMeta, duplicates, head_hash, places_hash
from lrmil.store.formats import BagInfo, read_features, read_places
from lrmil.store.guarded import inspect_bags
from wsi_pipe.encoders.elsewhere import slug_asked_for
from wsi_pipe.files import TEMPORARY_SUFFIX, is_temporary, output_error
from wsi_pipe.locking import hold_file
from wsi_pipe.ownership import names_in

__all__ = ["pack_bags"]


def pack_bags(
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
    out = Path(out_dir)
    if dtype not in STORE_DTYPES:
        raise StoreError(f"dtype {dtype!r} is not known", remedy=f"use {', '.join(STORE_DTYPES)}")
    infos = inspect_bags(find_bags(bag_paths, encoder), level, encoder, weights_sha256=weights_sha256)
    if not infos:
        raise StoreError("no bags are given", remedy="give bag files or the folder that holds them")
    meta, dim = _common(infos, parent_level)
    records = [_record(info, parent_level) for info in infos]
    repeated = duplicates([r.slide_id for r in records])
    if repeated:
        paths = [r.path for r in records if r.slide_id == repeated[0]]
        raise StoreError(f"slide id {repeated[0]!r} is in {' and '.join(paths)}", remedy="rename one of them")
    # One packs, another who wants the same waits and finds it there.
    with hold_file(out.with_name(f".{out.name}.lock"), {}, lambda who: StoreError(f"{out}: held by {who}"), wait=True):
        _remove_leavings(out)
        if reuse and (out / "store.json").is_file():
            there = _reusable(out, records, meta, dtype)
            if there is not None:
                return there
        _check_place(out)
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
            _remove_store(temporary)
        return FeatureStore.open(out)


FILES = frozenset({"store.json", "features.bin", "offsets.npy", "coords.npy", "parents.npy"})


def _remove_store(folder: Path) -> None:
    """Remove a store's files and its folder, where that holds nothing else."""
    with suppress(OSError):
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def _remove_leavings(out: Path) -> None:
    """Remove what packing into ``out`` left when it was killed; whoever holds its lock knows that none goes on."""
    for path in out.parent.glob(f".{glob.escape(out.name)}.*{TEMPORARY_SUFFIX}"):
        if is_temporary(path.name) and path.is_dir():
            _remove_store(path)


def _check_place(out: Path) -> None:
    """Raise StoreError where ``out`` holds files that are no store's, which would go with it."""
    names = set(names_in(out))
    if names and ("store.json" not in names or not names <= FILES or not _is_store(out / "store.json")):
        raise StoreError(f"{out} is a folder with other files in it", remedy="give an empty or a new folder")


def _is_store(path: Path) -> bool:
    """Whether a file says that it is a store's, of whatever version and however damaged."""
    try:
        return b'"store_version"' in path.read_bytes()
    except OSError:
        return False


def _record(info: BagInfo, parent_level: str | None) -> BagRecord:
    mark = info.fingerprint
    if parent_level is not None:
        # The coarser grid may change under features that stay: rows of parents are part of what is packed.
        _, parents = read_places(info, parent_level)
        assert parents is not None
        mark = hashlib.sha256(mark.encode() + parents.tobytes()).hexdigest()
    return BagRecord(
        info.slide_id,
        info.case_id,
        info.path,
        info.format,
        mark,
        info.tile_size_l0,
        info.coords_unit,
        info.empty_reason if info.empty_reason or info.rows else "no tiles",
        info.slide_fingerprint,
        info.encoder_saw,
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
            else ("encoder", _plain(info.encoder), _plain(first.encoder)),
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


def _plain(encoder: str) -> str:
    """An encoder's slug: bags may name one encoder by several aliases."""
    return slug_asked_for(encoder) if encoder else ""


def _reusable(out: Path, records: Sequence[BagRecord], meta: StoreMeta, dtype: StoreDtype) -> FeatureStore | None:
    try:
        there = FeatureStore.open(out)
    except StoreError:
        return None
    if there.records != tuple(records) or there.meta != meta or there.dtype != dtype:
        return None
    try:
        # Read in full: what is trained on is what was packed, and its pages are in memory for the training.
        there.verify()
    except StoreError:
        return None
    return there


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
    head: dict[str, Any] = {
        "store_version": STORE_VERSION,
        "dtype": dtype,
        "dim": dim,
        "meta": asdict(meta),
        "content_hash": digest.hexdigest(),
        "places_hash": places_hash(coords, parents),
        "bags": [asdict(record) for record in records],
    }
    # Through JSON, which makes lists of tuples.
    head["head_hash"] = head_hash(json.loads(json.dumps(head)))
    (folder / "store.json").write_text(json.dumps(head, indent=1), encoding="utf-8")
    FeatureStore.open(folder)


def _swap(temporary: Path, out: Path) -> None:
    """Put a finished folder in the place of ``out``; only a store is ever replaced."""
    _check_place(out)
    if out.exists():
        old = out.with_name(f".{out.name}.{uuid.uuid4().hex[:12]}{TEMPORARY_SUFFIX}")
        os.replace(out, old)
        os.replace(temporary, out)
        _remove_store(old)
    else:
        os.replace(temporary, out)
