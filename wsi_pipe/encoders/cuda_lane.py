"""The way to a CUDA device and back: pinned buffers, a side stream for copies, results that arrive later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wsi_pipe.encoders.base import LayerFeatures, TileArray
from wsi_pipe.encoders.devices import device_errors

__all__ = ["Arriving", "CudaLane", "Tokens"]

Tokens = tuple[int, Tensor, Tensor | None]
"""A block as it was asked for, its CLS (B, C), and its patch tokens (B, h, w, C) where they are wanted."""


class Arriving:
    """Results on their way from the device: the buffers they arrive in and the event that says they have."""

    def __init__(self, device: torch.device, features: Tensor, tokens: Sequence[Tokens], rows: int, event: Any) -> None:
        self._device = device
        self._features = features
        self._tokens = tokens
        self._rows = rows
        self._event = event

    @property
    def ready(self) -> bool:
        """True where ``wait`` returns at once, or raises."""
        try:
            return self._event is None or bool(self._event.query())
        except RuntimeError:
            return True

    def wait(self) -> LayerFeatures:
        """Wait until they are there. Raises DeviceError when the device failed on the way."""
        if self._event is not None:
            with device_errors(self._device, all_of_them=True):
                self._event.synchronize()
        rows = self._rows
        return LayerFeatures(
            self._features[:rows].numpy(),
            {block: cls[:rows].numpy() for block, cls, _ in self._tokens},
            {block: maps[:rows].numpy() for block, _, maps in self._tokens if maps is not None},
        )


class CudaLane:
    """One CUDA device's side stream, pinned buffers, and the order of copying and computing between them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.staging: list[tuple[Tensor, torch.cuda.Event]] = []
        self._leaving: list[tuple[Tensor, torch.cuda.Event]] = []

    def run(self, tiles: TileArray, rows: int, compute: Callable[[Tensor], tuple[Tensor, list[Tokens]]]) -> Arriving:
        """Copy tiles to the device on the side stream, compute on the current one, start the way back."""
        with torch.cuda.device(self.device):
            main = torch.cuda.current_stream(self.device)
            pinned, copied = self._pinned(tiles)
            with torch.cuda.stream(self._copies):
                on_device = pinned.to(self.device, non_blocking=True)
                copied.record(self._copies)
            main.wait_event(copied)
            # Without this the allocator could hand the memory to the next copy while the network still reads it.
            on_device.record_stream(main)
            features, tokens = compute(on_device)
            back = self._back(features)
            tokens_back = [
                (block, self._back(cls), None if maps is None else self._back(maps)) for block, cls, maps in tokens
            ]
            # By default a thread that waits for an event spins, and takes a core from reading and decoding.
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record(main)
        return Arriving(self.device, back, tokens_back, rows, done)

    @staticmethod
    def new_tiles(shape: tuple[int, int, int, int]) -> TileArray:
        """Pinned memory for tiles; other memory where there is no more of it, from which they are copied.

        What is let go of stays with torch's pool, which takes it in powers of two, for the next ones.
        """
        try:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True).numpy()
        except RuntimeError:  # also of a device that failed: submitting says so, for all slides
            return np.empty(shape, np.uint8)

    def _pinned(self, tiles: TileArray) -> tuple[Tensor, torch.cuda.Event]:
        """The tiles in pinned memory, where they lie or as a copy, and the event to record after they have crossed."""
        self._leaving = [(left, copied) for left, copied in self._leaving if not copied.query()]  # type: ignore[no-untyped-call]
        if tiles.flags.c_contiguous and tiles.flags.writeable:
            there = torch.from_numpy(tiles)
            if there.is_pinned():
                # Kept until it has crossed: torch does not know that a part of an array is its pool's memory.
                self._leaving.append((there, torch.cuda.Event()))  # type: ignore[no-untyped-call]
                return self._leaving[-1]
        buffer, copied = self._buffer(tiles.size)
        pinned = buffer[: tiles.size].view(tiles.shape)
        np.copyto(pinned.numpy(), tiles)
        return pinned, copied

    def _buffer(self, size: int) -> tuple[Tensor, torch.cuda.Event]:
        """A pinned buffer of at least ``size`` bytes whose last copy has ended, and the event of its next one."""
        for place, (buffer, copied) in enumerate(self.staging):
            if copied.query():  # type: ignore[no-untyped-call]
                if buffer.numel() >= size:
                    return self.staging[place]
                del self.staging[place]
                break
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.staging.append((torch.empty(size, dtype=torch.uint8, pin_memory=True), event))
        return self.staging[-1]

    def release(self) -> None:
        """Give pinned memory back to the system, but for what is still on its way."""
        self.staging = [(buffer, copied) for buffer, copied in self.staging if not copied.query()]  # type: ignore[no-untyped-call]
        self._leaving = [(left, copied) for left, copied in self._leaving if not copied.query()]  # type: ignore[no-untyped-call]
        # What is freed stays with torch's own pool of pinned memory, by size, until that is emptied.
        empty = getattr(torch._C, "_host_emptyCache", None)
        if empty is not None and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            empty()

    @staticmethod
    def _back(values: Tensor) -> Tensor:
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        return host.copy_(values, non_blocking=True)
