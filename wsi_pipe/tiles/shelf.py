"""Decoded blocks that tiles still to come need: in memory as far as the budget goes, the rest in a temporary file."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections.abc import Iterable, Mapping
from typing import BinaryIO

import numpy as np

from wsi_pipe.errors import OutputError
from wsi_pipe.tiles.paste import Held, hold

__all__ = ["BlockShelf"]


class _Spilled:
    """Where a block lies in the file."""

    __slots__ = ("offset", "shape")

    def __init__(self, offset: int, shape: tuple[int, ...]) -> None:
        self.offset, self.shape = offset, shape

    nbytes = 0
    """What it takes in memory."""


class BlockShelf:
    """Blocks by number, each kept until it was taken down as often as it is needed; used by several threads at once.

    uses: how often each block is needed. limit_bytes: what the blocks in memory may take before some are spilled.
    """

    def __init__(self, uses: Iterable[int], limit_bytes: int) -> None:
        self._uses = list(uses)
        self.limit_bytes = limit_bytes
        self._blocks: dict[int, Held | _Spilled] = {}
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        self._end = 0
        self.nbytes = 0
        self.spilled_bytes = 0

    def put(self, blocks: Mapping[int, Held]) -> None:
        """Keep blocks, by number."""
        nbytes = sum(block.nbytes for block in blocks.values())
        with self._lock:
            self._blocks.update(blocks)
            self.nbytes += nbytes

    def get(self, numbers: Iterable[int]) -> list[Held]:
        """Blocks that were put and are still needed."""
        return [block if isinstance(block, Held) else self._read(block) for block in map(self._blocks.get, numbers)]

    def _read(self, spilled: _Spilled | None) -> Held:
        if spilled is None:
            raise KeyError("a block is not on the shelf, or not any more")
        assert self._file is not None
        size = int(np.prod(spilled.shape))
        data = os.pread(self._file.fileno(), size, spilled.offset)
        if len(data) != size:
            raise OutputError("the temporary file with decoded blocks was cut short")
        return hold(np.frombuffer(data, np.uint8).reshape(spilled.shape), (0, 0))

    def release(self, numbers: Iterable[int]) -> None:
        """Count one use of each block (a number may come twice); what is not needed any more goes."""
        with self._lock:
            for number in numbers:
                self._uses[number] -= 1
                if self._uses[number] == 0:
                    self.nbytes -= self._blocks.pop(number).nbytes

    def spill(self, numbers: Iterable[int]) -> None:
        """Move those of the blocks that are still needed to the file, as long as memory is over its limit.

        Raises OutputError when the disk is full.
        """
        for number in numbers:
            with self._lock:
                if self.nbytes <= self.limit_bytes:
                    return
                held = self._blocks.get(number)
                if not isinstance(held, Held) or held.pixels is None:
                    continue
                block = held.pixels
                try:
                    if self._file is None:
                        # Unlinked at once: nothing is left behind, however the process ends.
                        self._file = tempfile.TemporaryFile(prefix="wsi-pipe-blocks-", buffering=0)  # noqa: SIM115
                    written = os.pwrite(self._file.fileno(), block.data, self._end)
                    if written != block.nbytes:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError as error:
                    raise OutputError(
                        f"decoded blocks do not fit into {tempfile.gettempdir()}: {error.strerror or error}",
                        remedy="give more memory, or set TMPDIR to a folder with more space",
                    ) from error
                self._blocks[number] = _Spilled(self._end, block.shape)
                self._end += block.nbytes
                self.spilled_bytes += block.nbytes
                self.nbytes -= block.nbytes

    def close(self) -> None:
        """Let go of everything."""
        with self._lock:
            self._blocks.clear()
            self.nbytes = 0
            if self._file is not None:
                self._file.close()
                self._file = None
