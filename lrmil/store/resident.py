"""A store as one torch tensor, as near to the device as it fits, and batches of bags cut from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrmil.errors import StoreError
from lrmil.store.flat import FeatureStore

__all__ = ["Gathered", "Placement", "ResidentStore"]

Placement = Literal["device", "pinned", "mapped"]

COPY_ROWS = 1 << 16
DEVICE_SHARE = 0.6
"""Part of the free memory that features may take; the rest is for activations."""


class Gathered(NamedTuple):
    """Rows of some bags, one after the other, on the device.

    features: (T, D). offsets: int64 (B + 1,). segment: int64 (T,), which of the B bags each row is of. parent: int64
    (T,) or None, each row's parent within its own bag.
    """

    features: Tensor
    offsets: Tensor
    segment: Tensor
    parent: Tensor | None


@dataclass(frozen=True)
class ResidentStore:
    """A store's features as one tensor.

    flat: (T, D), on ``device`` (placement "device"), in page-locked memory ("pinned") or over the mapped file
    ("mapped"). dtype: of the features handed out.
    """

    store: FeatureStore
    flat: Tensor
    device: torch.device
    dtype: torch.dtype
    placement: Placement
    parents: Tensor | None = None

    def __len__(self) -> int:
        return len(self.store)

    @property
    def dim(self) -> int:
        """D, the features' dimension."""
        return self.store.dim

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Rows of each bag, int64 (bags,)."""
        return self.store.lengths

    @classmethod
    def of(
        cls,
        store: FeatureStore,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        *,
        place: str = "auto",
    ) -> ResidentStore:
        """The store as a tensor: on the device where it fits, else in pinned memory, else mapped.

        dtype: of the features handed out, by default the stored one. place: "auto", "device", "pinned" or "mapped".
        """
        target = torch.device(device)
        stored = as_tensor(store)
        kind = stored.dtype if dtype is None else dtype
        size = stored.numel() * torch.empty((), dtype=kind).element_size()
        placement = _placement(target, size, place)
        if placement == "device":
            # On a CPU the mapped file is copied too: training visits rows many times, in random order.
            flat = _copied(stored, torch.empty(stored.shape, dtype=kind, device=target))
        elif placement == "pinned":
            flat = _copied(stored, torch.empty(stored.shape, dtype=kind, pin_memory=True))
        else:
            flat = stored
        parents = None
        if store.parents is not None:
            parents = torch.from_numpy(np.array(store.parents, np.int64))
            parents = parents.to(target) if placement == "device" else parents
        return cls(store, flat, target, kind, placement, parents)

    def gather(self, indices: Sequence[int] | NDArray[np.int64]) -> Gathered:
        """The rows of the bags ``indices``, in that order. Neighbouring bags and one bag alone are not copied."""
        chosen = np.asarray(indices, np.int64)
        lengths = torch.from_numpy(self.store.lengths[chosen])
        runs = _runs(self.store.offsets, chosen)
        features = self._cut(self.flat, runs).to(self.dtype)
        parent = None if self.parents is None else self._cut(self.parents, runs)
        offsets = torch.zeros(len(chosen) + 1, dtype=torch.int64)
        torch.cumsum(lengths, 0, out=offsets[1:])
        total = int(offsets[-1])
        lengths, offsets = lengths.to(self.device), offsets.to(self.device)
        segment = torch.repeat_interleave(torch.arange(len(chosen), device=self.device), lengths, output_size=total)
        return Gathered(features, offsets, segment, parent)

    def moments(self, indices: Sequence[int] | NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each feature over all tiles of the bags, float32 (D,), in float64 inside.

        The deviation is 0 where it is below half a step of float16 at the mean: such a feature only shows rounding.
        """
        total = torch.zeros(self.dim, dtype=torch.float64, device=self.device)
        squares, count = torch.zeros_like(total), 0
        # About the first bag's mean, so that nothing cancels.
        centre: Tensor | None = None
        for index in np.asarray(indices, np.int64):
            rows = self.gather(np.array([index])).features.double()
            if not len(rows):
                continue
            centre = rows.mean(0) if centre is None else centre
            rows = rows - centre
            total += rows.sum(0)
            squares += rows.square().sum(0)
            count += len(rows)
        if centre is None:
            return total.float(), squares.float()
        mean = total / count
        std = (squares / count - mean.square()).clamp_min(0).sqrt()
        mean = mean + centre
        return mean.float(), std.where(std > mean.abs() * 2.0**-11, 0.0).float()

    def _cut(self, flat: Tensor, runs: list[tuple[int, int]]) -> Tensor:
        parts = [flat[start:stop] for start, stop in runs]
        if flat.device == self.device:
            return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else flat[:0]
        out = torch.empty((sum(map(len, parts)), *flat.shape[1:]), dtype=flat.dtype, device=self.device)
        row = 0
        for part in parts:
            # From pinned memory the copy runs while the host goes on; from mapped memory it cannot.
            out[row : row + len(part)].copy_(part, non_blocking=self.placement == "pinned")
            row += len(part)
        return out


def as_tensor(store: FeatureStore) -> Tensor:
    """The store's rows as a tensor over the same memory, in the stored type."""
    if store.dtype == "bfloat16":
        return torch.from_numpy(np.asarray(store.flat).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.asarray(store.flat))


def _copied(source: Tensor, out: Tensor) -> Tensor:
    """``out``, filled from ``source`` piece by piece: a copy that converts needs room for its piece twice."""
    for start in range(0, len(source), COPY_ROWS):
        out[start : start + COPY_ROWS].copy_(source[start : start + COPY_ROWS])
    return out


def _runs(offsets: NDArray[np.int64], indices: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Row ranges of the bags, neighbours joined."""
    runs: list[tuple[int, int]] = []
    for start, stop in zip(offsets[indices].tolist(), offsets[indices + 1].tolist(), strict=True):
        if start == stop:
            continue
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], stop)
        else:
            runs.append((start, stop))
    return runs


def _placement(device: torch.device, size: int, place: str) -> Placement:
    if place not in ("auto", "device", "pinned", "mapped"):
        raise StoreError(f"placement {place!r} is not known", remedy="use auto, device, pinned or mapped")
    import psutil

    free_host = int(psutil.virtual_memory().available)
    if place == "auto":
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host
        if size <= DEVICE_SHARE * free:
            return "device"
        return "pinned" if device.type == "cuda" and size <= DEVICE_SHARE * free_host else "mapped"
    if place == "pinned" and device.type != "cuda":
        raise StoreError("pinned memory is for a CUDA device", remedy="use device or mapped on a CPU")
    return "device" if place == "device" else "pinned" if place == "pinned" else "mapped"
