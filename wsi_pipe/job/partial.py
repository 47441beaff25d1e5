"""Features of a slide whose run ended before all its tiles were encoded: kept beside the job for the next run.

One file a slide, ``partial/ID.npz``: arrays without pickles, each with the checksum that ZIP gives it, and a JSON text
that says whose they are. Rows count only where their fingerprint (slide, grid, weights, settings) is the one wanted;
whether batches are still cut at the same places is for ``wsi_pipe.extract`` to say.
"""

from __future__ import annotations

import contextlib
import json
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.extract import PartRows, SlidePart
from wsi_pipe.files import atomic_path, parse_json
from wsi_pipe.job.features import Wanted
from wsi_pipe.job.paths import JobPaths
from wsi_pipe.job.prepare import Prepared

__all__ = ["drop_part", "half_done", "load_part", "store_part"]

VERSION = 1
DAMAGE = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error, RecursionError)
"""What a file raises that was cut short, changed, or is none of ours."""


def store_part(part: SlidePart, wanted: Sequence[Wanted], paths: JobPaths) -> None:
    """Write what there is of a slide in place of what there was. Raises OutputError when it cannot be written."""
    arrays: dict[str, NDArray[Any]] = {}
    about: list[dict[str, Any]] = []
    for item in wanted:
        rows = part.rows.get(item.label, {}).get(item.name)
        if rows is None:
            continue
        key = f"{len(about)}"
        arrays[f"{key}.index"], arrays[f"{key}.values"] = rows.index, rows.values
        arrays |= {f"{key}.layer.{block}": values for block, values in rows.layers.items()}
        about.append(
            {
                "label": item.label,
                "fingerprint": item.fingerprint,
                "layout": rows.layout,
                "layers": list(rows.layers),
                "encode_s": rows.encode_s,
            }
        )
    if not about or _is_foreign(paths.partial(part.slide_id)):
        return
    text = json.dumps({"version": VERSION, "slide_id": part.slide_id, "rows": about})
    with atomic_path(paths.partial(part.slide_id), _whole) as temporary, open(temporary, "wb") as handle:
        # Its types take any name for the array "allow_pickle", which no array here is called.
        save: Any = np.savez
        save(handle, about=np.frombuffer(text.encode(), np.uint8), **arrays)


def load_part(
    prepared: Prepared, wanted: Sequence[Wanted], paths: JobPaths, dtype: str
) -> dict[str, dict[str, PartRows]]:
    """What earlier runs left of ``wanted``, by label and encoder's name; damaged and foreign files count for none."""
    path = paths.partial(prepared.entry.slide_id)
    if not path.is_file():
        return {}
    lengths = {grid.label: len(grid) for grid in prepared.grids}
    found: dict[str, dict[str, PartRows]] = {}
    with contextlib.suppress(*DAMAGE, MemoryError), zipfile.ZipFile(path) as members:
        sizes = [info.file_size for info in members.infolist()]
        if sum(sizes) > path.stat().st_size or members.testzip() is not None:
            return {}
        with np.load(path, allow_pickle=False) as arrays:
            about = parse_json(arrays["about"].tobytes())
            if about["version"] != VERSION or about["slide_id"] != prepared.entry.slide_id:
                return {}
            by_fingerprint = {item.fingerprint: item for item in wanted}
            for number, row in enumerate(about["rows"]):
                item = by_fingerprint.get(row["fingerprint"])
                if item is not None and item.label == row["label"]:
                    rows = _rows(arrays, number, row)
                    if _fits(rows, item, lengths[item.label], dtype):
                        found.setdefault(item.label, {})[item.name] = rows
    return found


def _rows(arrays: Any, number: int, row: dict[str, Any]) -> PartRows:
    return PartRows(
        str(row["layout"]),
        arrays[f"{number}.index"],
        arrays[f"{number}.values"],
        {int(block): arrays[f"{number}.layer.{block}"] for block in row["layers"]},
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


def drop_part(slide_id: str, paths: JobPaths) -> None:
    """Remove what is kept of a slide, and the folder where it was the last."""
    path = paths.partial(slide_id)
    if _is_foreign(path):
        return
    # Where it cannot be removed it is out of date, which its reader sees.
    with contextlib.suppress(OSError):
        path.unlink()
        path.parent.rmdir()


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
