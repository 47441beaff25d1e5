"""Features of a slide whose run ended before all its tiles were encoded: kept beside the job for the next run.

One file a slide, ``partial/ID.npz``: arrays without pickles, each with the checksum that ZIP gives it, and a JSON text
that says whose they are. Rows count only where their fingerprint (slide, grid, weights, settings) is the one wanted;
whether batches are still cut at the same places is for ``wsi_pipe.extract`` to say. Rows of encoders and grids that a
call does not ask for stay: the call that does goes on with them.
"""

from __future__ import annotations

import contextlib
import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.encoders.random_id import RANDOM
from wsi_pipe.extract import PartRows, SlidePart
from wsi_pipe.files import atomic_path, parse_json
from wsi_pipe.job.features import Wanted
from wsi_pipe.job.fingerprints import grid_fingerprint
from wsi_pipe.job.paths import JobPaths
from wsi_pipe.job.prepared import Prepared

__all__ = ["drop_part", "half_done", "load_part", "prune_part", "store_part", "stored_places"]

VERSION = 1
DAMAGE = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error, RecursionError)
"""What a file raises that was cut short, changed, or is none of ours."""


def store_part(part: SlidePart, prepared: Prepared, wanted: Sequence[Wanted], paths: JobPaths) -> None:
    """Write what there is of a slide in place of what there was of ``wanted``. Raises OutputError when it cannot be
    written."""
    path = paths.partial(part.slide_id)
    if _is_foreign(path):
        return
    fresh: list[Row] = []
    for item in wanted:
        rows = part.rows.get(item.label, {}).get(item.name)
        if rows is None:
            continue
        arrays = {"index": rows.index, "values": rows.values}
        arrays |= {f"layer.{block}": values for block, values in rows.layers.items()}
        about = {
            "label": item.label,
            "slug": item.info.slug,
            "source": item.source,
            "weights": RANDOM if item.info.random else "",
            "fingerprint": item.fingerprint,
            "layout": rows.layout,
            "layers": list(rows.layers),
            "encode_s": rows.encode_s,
        }
        fresh.append((about, arrays))
    if fresh:
        _write(path, part.slide_id, [*fresh, *_of_others(prepared, wanted, paths)])


Row = tuple[Mapping[str, Any], Mapping[str, NDArray[Any]]]
"""Whose some features are, and their arrays by ending: "index", "values", "layer.3"."""


def _write(path: Path, slide_id: str, rows: Sequence[Row]) -> None:
    text = json.dumps({"version": VERSION, "slide_id": slide_id, "rows": [about for about, _ in rows]})
    arrays = {f"{number}.{name}": values for number, (_, own) in enumerate(rows) for name, values in own.items()}
    with atomic_path(path, _whole) as temporary, open(temporary, "wb") as handle:
        # Its types take any name for the array "allow_pickle", which no array here is called.
        save: Any = np.savez
        save(handle, about=np.frombuffer(text.encode(), np.uint8), **arrays)


def _read(path: Path, slide_id: str, takes: Callable[[Mapping[str, Any]], bool]) -> Iterator[Row]:
    """The rows of a file that are taken. Raises what a damaged or foreign file makes of itself, see ``DAMAGE``."""
    with zipfile.ZipFile(path) as members:
        sizes = [info.file_size for info in members.infolist()]
        if sum(sizes) > path.stat().st_size or members.testzip() is not None:
            return
        with np.load(path, allow_pickle=False) as arrays:
            about = parse_json(arrays["about"].tobytes())
            if about["version"] != VERSION or about["slide_id"] != slide_id:
                return
            for number, row in enumerate(about["rows"]):
                if takes(row):
                    names = ("index", "values", *(f"layer.{int(block)}" for block in row["layers"]))
                    yield row, {name: arrays[f"{number}.{name}"] for name in names}


def _rows_of(path: Path, slide_id: str, takes: Callable[[Mapping[str, Any]], bool]) -> list[Row]:
    """``_read``, or none of a file that is not whole, or not there."""
    try:
        return list(_read(path, slide_id, takes)) if path.is_file() else []
    except (*DAMAGE, MemoryError):
        return []


def _of_others(prepared: Prepared, wanted: Iterable[Wanted], paths: JobPaths) -> list[Row]:
    """What is kept of a slide beside ``wanted``, as far as it is of the very grids that the slide has."""
    slide = prepared.attrs.slide_fingerprint
    sources = {grid.label: grid_fingerprint(slide, grid) for grid in prepared.grids}
    places = {(item.label, item.info.slug) for item in wanted}

    def stays(row: Mapping[str, Any]) -> bool:
        # Those of earlier versions do not say what they are of.
        label, slug, source = row["label"], row.get("slug"), row.get("source")
        return slug is not None and (label, slug) not in places and sources.get(label) == source

    return _rows_of(paths.partial(prepared.entry.slide_id), prepared.entry.slide_id, stays)


def load_part(
    prepared: Prepared, wanted: Sequence[Wanted], paths: JobPaths, dtype: str
) -> dict[str, dict[str, PartRows]]:
    """What earlier runs left of ``wanted``, by label and encoder's name; damaged and foreign files count for none."""
    slide_id = prepared.entry.slide_id
    lengths = {grid.label: len(grid) for grid in prepared.grids}
    items = {(item.fingerprint, item.label): item for item in wanted}
    found: dict[str, dict[str, PartRows]] = {}
    with contextlib.suppress(*DAMAGE):
        for row, arrays in _rows_of(
            paths.partial(slide_id), slide_id, lambda row: (row["fingerprint"], row["label"]) in items
        ):
            item = items[row["fingerprint"], row["label"]]
            rows = _part_rows(arrays, row)
            if _fits(rows, item, lengths[item.label], dtype):
                found.setdefault(item.label, {})[item.name] = rows
    return found


def _part_rows(arrays: Mapping[str, NDArray[Any]], row: Mapping[str, Any]) -> PartRows:
    return PartRows(
        str(row["layout"]),
        arrays["index"],
        arrays["values"],
        {int(block): arrays[f"layer.{block}"] for block in row["layers"]},
        float(row["encode_s"]),
    )


def _fits(rows: PartRows, item: Wanted, count: int, dtype: str) -> bool:
    """Whether rows are of a grid of ``count`` tiles, and whole: sizes, order, numbers that are finite."""
    index = rows.index
    if index.dtype != np.int64 or index.ndim != 1 or not len(index):
        return False
    if index[0] < 0 or index[-1] >= count or (np.diff(index) <= 0).any():
        return False
    arrays = (rows.values, *rows.layers.values())
    sound = all(
        values.ndim == 2 and len(values) == len(index) and values.dtype == dtype and np.isfinite(values).all()
        for values in arrays
    )
    return sound and rows.values.shape[1] == item.info.dim


def drop_part(prepared: Prepared, wanted: Iterable[Wanted], paths: JobPaths) -> None:
    """Remove what is kept of ``wanted``, which the slide has by now, and what fits its grids no more."""
    path = paths.partial(prepared.entry.slide_id)
    if path.is_file() and not _is_foreign(path):
        _leave(path, prepared.entry.slide_id, _of_others(prepared, wanted, paths))


def _leave(path: Path, slide_id: str, rows: Sequence[Row]) -> None:
    """Leave just these rows of a file; where none are left remove it, and the folder where it was the last."""
    # Where it cannot be removed it is out of date, which its reader sees.
    with contextlib.suppress(OSError):
        if rows:
            _write(path, slide_id, rows)
            return
        path.unlink()
        path.parent.rmdir()


Takes = Callable[[str, str, str], bool]
"""Whether features are meant, by label, slug and "random" or ""."""


def stored_places(slide_id: str, paths: JobPaths, takes: Takes) -> dict[str, int]:
    """What is kept of a slide of those that are meant: "20x/uni" -> bytes."""
    found = _rows_of(paths.partial(slide_id), slide_id, lambda row: _is_meant(row, takes))
    return {f"{row['label']}/{row['slug']}": sum(a.nbytes for a in arrays.values()) for row, arrays in found}


def prune_part(slide_id: str, paths: JobPaths, takes: Takes) -> None:
    """Remove those that are meant, and leave the others."""
    path = paths.partial(slide_id)
    if stored_places(slide_id, paths, takes):
        _leave(path, slide_id, _rows_of(path, slide_id, lambda row: not _is_meant(row, takes)))


def _is_meant(row: Mapping[str, Any], takes: Takes) -> bool:
    return "slug" in row and takes(str(row["label"]), str(row["slug"]), str(row.get("weights", "")))


def _is_foreign(path: Path) -> bool:
    """Whether another program made the file: it is no ZIP, or one that says nothing of a slide. A damaged one may be
    ours."""
    head = b""
    try:
        with open(path, "rb") as handle:
            head = handle.read(2)
        with zipfile.ZipFile(path) as members:
            return "about.npy" not in members.namelist()
    except FileNotFoundError:
        return False
    except DAMAGE:
        return path.is_file() and head not in (b"", b"PK")


def half_done(paths: JobPaths) -> list[str]:
    """The slides of which some features are kept, by id."""
    folder = paths.partial("x").parent
    return sorted(path.stem for path in folder.glob("*.npz") if not path.name.startswith("."))


def _whole(path: Path) -> None:
    with zipfile.ZipFile(path) as members:
        if (bad := members.testzip()) is not None:
            raise ValueError(f"{path}: {bad} is damaged")
