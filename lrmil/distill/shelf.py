"""Where targets are kept: in memory as long as they fit, beyond that in scratch files that are mapped."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.errors import OutputError

__all__ = ["Shelf"]

CHUNK_BYTES = 1 << 30
"""Size of a scratch file. Each holds many arrays: a file of its own for each would be thousands of open files."""
ALIGN_BYTES = 64


class Shelf:
    """Keeps arrays, the first ``limit_bytes`` of them in memory.

    folder: where scratch files go once that is full; it is made then. They have no name there and vanish with the last
    array that lies in one, however the program ends. Close the shelf when all is put. Not for several threads at once.
    """

    def __init__(self, folder: Path, limit_bytes: int, *, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.folder, self.limit_bytes, self.chunk_bytes = folder, limit_bytes, chunk_bytes
        self.memory_bytes = self.file_bytes = 0
        self._file: Any = None
        self._mapped: mmap.mmap | None = None
        self._end = 0

    def put(self, values: NDArray[Any]) -> NDArray[Any]:
        """The same array, or one with equal values and dtype, read-only, whose pages come from a file when needed.

        Raises OutputError when a scratch file cannot be written. Over a network, some file systems take what is
        written and find only later that they have no room: then the put that begins the next file raises, or ``close``.
        """
        if self.memory_bytes + values.nbytes <= self.limit_bytes or not values.nbytes:
            self.memory_bytes += values.nbytes
            return values
        with self._told():
            found = self._written(np.ascontiguousarray(values))
        self.file_bytes += values.nbytes
        return found

    def _written(self, values: NDArray[Any]) -> NDArray[Any]:
        start = -(-self._end // ALIGN_BYTES) * ALIGN_BYTES
        if self._mapped is None or start + values.nbytes > len(self._mapped):
            self._begin(max(self.chunk_bytes, values.nbytes))
            start = 0
        assert self._mapped is not None
        # Written, not copied into the mapping: a full disk is then an error here, not the end of the process.
        self._file.seek(start)
        rest = values.data.cast("B")
        while len(rest):
            rest = rest[self._file.write(rest) :]
        self._end = start + values.nbytes
        found = np.frombuffer(self._mapped, values.dtype, values.size, start)
        return found.reshape(values.shape)

    def _begin(self, size: int) -> None:
        """Another scratch file of ``size`` bytes, of which only what is written takes room."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._end_file()
        self._file = tempfile.TemporaryFile(buffering=0, dir=self.folder, prefix="targets-")  # noqa: SIM115
        self._file.truncate(size)
        # The mapping has a handle of its own, which lasts as long as the arrays in it.
        self._mapped = mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_READ)
        self._end = 0

    def close(self) -> None:
        """Nothing more is put here; what was put stays. Raises OutputError when the disk did not take all of it."""
        with self._told():
            self._end_file()

    def _end_file(self) -> None:
        file, self._file, self._mapped = self._file, None, None
        if file is not None:
            with file:
                # NFS says only now that its disk is full; a page that did not get there would be read as zeros.
                os.fsync(file.fileno())

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"{self.folder}: targets cannot be put into a scratch file: {error.strerror or error}",
                remedy="make room there, or raise targets_mib if there is memory",
            ) from error
