"""What an export wrote, so that a second call knows what is right, what is stale, and what somebody else put there.

One JSON line in ``.wsi-pipe-export.jsonl`` before a file is written, which claims its place while that is free, and one
after it, with size and SHA-256. A file that is there and not claimed, or that is not what was written, is the user's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsi_pipe.errors import NotOursError
from wsi_pipe.files import file_sha256
from wsi_pipe.job.record import append_line

__all__ = ["RECORD_NAME", "ExportRecord"]

RECORD_NAME = ".wsi-pipe-export.jsonl"


@dataclass
class _Entry:
    """key: of the export that the file belongs to. source: what it was made from. state: (size, mtime in ns) and
    SHA-256 once it is written."""

    key: str
    source: str
    size: int = -1
    mtime_ns: int = -1
    sha256: str = ""


class ExportRecord:
    """The record of the folder ``root``, read once; whoever uses it holds the folder's lock."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._path = root / RECORD_NAME
        self._entries: dict[str, _Entry] = {}
        try:
            lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            lines = []
        for line in lines:
            self._take(line)

    def _take(self, line: str) -> None:
        try:
            values: Any = json.loads(line)
            state = values.get("state") or (-1, -1, "")
            self._entries[str(values["file"])] = _Entry(
                str(values["key"]), str(values["source"]), int(state[0]), int(state[1]), str(state[2])
            )
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            # A line that a crash cut short.
            return

    def others(self, name: str, key: str) -> list[str]:
        """Exports of the same format that have files here, but for the one called ``key``."""
        found = {entry.key for file, entry in self._entries.items() if (self._root / file).exists()}
        return sorted(other for other in found if other != key and other.partition("/")[0] == name)

    def files_of(self, key: str) -> set[str]:
        """Files of one export that are there, relative to the folder."""
        return {name for name, e in self._entries.items() if e.key == key and (self._root / name).exists()}

    def is_right(self, place: Path, key: str, source: str) -> bool:
        """Whether a file is there, as it was written from this very source.

        Raises NotOursError where something else stands in its place that this program did not write.
        """
        path, entry = self._root / place, self._entries.get(str(place))
        if not path.exists() and not path.is_symlink():
            return False
        if entry is None:
            raise NotOursError(
                f"{path}: was not made by this program and would be written over",
                remedy="move it elsewhere, or give another --out",
            )
        if not entry.sha256:
            # Claimed, and the call ended before it was done with it.
            return False
        if not self._is_as_written(path, entry):
            raise NotOursError(
                f"{path}: is not what was exported: somebody changed it, or the disk damaged it",
                remedy="move it elsewhere or delete it, then export again",
            )
        return entry.key == key and entry.source == source

    @staticmethod
    def _is_as_written(path: Path, entry: _Entry) -> bool:
        if path.is_dir():
            return (path / "zarr.json").is_file() and file_sha256(path / "zarr.json") == entry.sha256
        state = path.stat()
        if (state.st_size, state.st_mtime_ns) == (entry.size, entry.mtime_ns):
            return True
        return state.st_size == entry.size and file_sha256(path) == entry.sha256

    def claim(self, place: Path, key: str, source: str) -> None:
        """Note that a file is about to be written, before it is. Raises OutputError."""
        self._note(place, _Entry(key, source))

    def done(self, place: Path, key: str, source: str) -> None:
        """Note that a file is written. Raises OutputError."""
        path = self._root / place
        state = path.stat()
        told = path / "zarr.json" if path.is_dir() else path
        self._note(place, _Entry(key, source, state.st_size, state.st_mtime_ns, file_sha256(told)))

    def _note(self, place: Path, entry: _Entry) -> None:
        state = [entry.size, entry.mtime_ns, entry.sha256] if entry.sha256 else None
        line = {"file": str(place), "key": entry.key, "source": entry.source, "state": state}
        append_line(self._path, json.dumps(line, ensure_ascii=False))
        self._entries[str(place)] = entry
