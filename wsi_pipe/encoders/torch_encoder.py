"""A network on a device: uint8 tiles cross to it, all else happens there, results come back when they are ready."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from wsi_pipe.encoders.architectures import PooledNetwork
from wsi_pipe.encoders.base import EncoderInfo, FeatureArray, LayerFeatures, TileArray, block_indices, check_finite
from wsi_pipe.encoders.cuda_lane import Arriving, CudaLane, Tokens
from wsi_pipe.encoders.devices import PRECISIONS, device_errors, is_out_of_memory, resolve_precision
from wsi_pipe.encoders.pixels import Normaliser, normalise
from wsi_pipe.encoders.recipe import Recipe
from wsi_pipe.errors import ConfigError, DeviceError

__all__ = ["ReplicatedEncoder", "TorchEncoder", "normalise", "to_mixed_precision"]

CPU_BATCH = 16
"""Tiles of a batch on a CPU. Fixed, not found by trial, so that two runs give the same bytes."""

TRIAL_BATCHES = (16, 32, 64, 128, 256, 512)
TRIAL_GAIN = 0.97
"""The smallest batch that gives this part of the best throughput is taken: larger ones only cost memory."""


def to_mixed_precision(network: nn.Module, dtype: torch.dtype) -> None:
    """Turn the weights of matrix products and convolutions to ``dtype`` in place; the rest stays float32.

    Under autocast this computes what autocast on float32 weights does (norms, softmax and the residual stream in
    float32) without turning every weight anew for every batch.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(dtype)


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """What is wanted beside the features: tokens of these blocks, CLS and, if so, patches."""

    layers: tuple[int, ...] = ()
    patches: bool = False


_NO_LAYERS = _Wanted()


class _Result:
    """What submit gives: the parts of one batch, which may have been cut to fit the device."""

    def __init__(self, name: str, parts: list[Arriving]) -> None:
        self._name = name
        self._parts = parts

    @property
    def ready(self) -> bool:
        """True where ``result`` need not wait for the device."""
        return all(part.ready for part in self._parts)

    def _whole(self) -> LayerFeatures:
        parts = [part.wait() for part in self._parts]
        if len(parts) == 1:
            return parts[0]
        return LayerFeatures(
            np.concatenate([part.features for part in parts]),
            {block: np.concatenate([part.cls[block] for part in parts]) for block in parts[0].cls},
            {block: np.concatenate([part.patches[block] for part in parts]) for block in parts[0].patches},
        )


class _PendingFeatures(_Result):
    def result(self) -> FeatureArray:
        """See PendingFeatures.result."""
        return check_finite(self._whole().features, self._name)


class _PendingLayers(_Result):
    def result(self) -> LayerFeatures:
        """See PendingLayers.result."""
        whole = self._whole()
        check_finite(whole.features, self._name, whole)
        return whole


class TorchEncoder:
    """An encoder that runs a network on one device.

    ``prepare``, where it is set, gets the uint8 tiles on the device first, and gives tiles of that shape.

    network: see ``architectures.PooledNetwork``; it is moved to the device and changed in place. info: its
    ``precision`` and ``transform`` are set here. precision: "auto", "float32", "bfloat16" or "float16"; half
    precisions run the matrix products in it and keep norms and the residual stream in float32. compile: run the
    network through torch.compile; batches are then filled up to one size, since each new size compiles anew.

    Raises ConfigError for a precision that the device has not, DeviceError when it fails or the weights do not fit.
    """

    def __init__(
        self,
        network: PooledNetwork,
        recipe: Recipe,
        info: EncoderInfo,
        *,
        device: torch.device,
        precision: str = "auto",
        compile: bool = False,
    ) -> None:
        self.device = device
        self.recipe = recipe
        self.precision = resolve_precision(precision, device)
        self.info = dataclasses.replace(info, precision=self.precision, transform=recipe.transform())
        self._dtype = PRECISIONS[self.precision]
        network.eval().requires_grad_(False)
        if self._dtype != torch.float32:
            to_mixed_precision(network, self._dtype)
        try:
            with device_errors(device):
                self.network: PooledNetwork = network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
                self._cuda = CudaLane(device) if device.type == "cuda" else None
                self._normalise = Normaliser(recipe.preprocessing, device)
        except RuntimeError as error:
            if isinstance(error, DeviceError) or not is_out_of_memory(error):
                raise
            raise DeviceError(
                f"encoder {info.name} does not fit into the memory of {device}", remedy="use a smaller encoder or cpu"
            ) from error
        self._compile = compile
        self._forward: Callable[[Tensor], Tensor] = torch.compile(self.network) if compile else self.network
        self.prepare: Callable[[Tensor], Tensor] | None = None
        self._limit: int | None = None
        self._suggested: dict[int, int] = {}
        self._largest = 0
        self._lock = threading.Lock()

    @property
    def depth(self) -> int:
        """See LayeredEncoder.depth."""
        return self.network.depth

    @property
    def shares_batches(self) -> bool:
        """True on a GPU, where tiles of several small slides fill it.

        On a CPU it wins nothing, and a batch that depends on the slide alone gives the same bytes in every run.
        """
        return self._cuda is not None

    @property
    def in_flight(self) -> int:
        """Batches worth submitting before waiting for the first: one is computed while the next is copied."""
        return 3 if self._cuda is not None else 1

    @property
    def new_tiles(self) -> Callable[[tuple[int, int, int, int]], TileArray] | None:
        """Gives memory that tiles cross from to a GPU without being copied first; see Encoder. None on a CPU."""
        return None if self._cuda is None else self._cuda.new_tiles

    @property
    def batch_limit(self) -> int | None:
        """The largest batch after running out of memory, None while that has not happened."""
        return self._limit

    def release(self) -> None:
        """See Encoder: page-locked memory goes back to the system."""
        if self._cuda is not None:
            with self._lock, device_errors(self.device, all_of_them=True):
                self._cuda.release()

    def encode(self, tiles: TileArray) -> FeatureArray:
        """See Encoder.encode."""
        return self.submit(tiles).result()

    def submit(self, tiles: TileArray) -> _PendingFeatures:
        """See Encoder.submit."""
        return _PendingFeatures(self.info.name, self._launch(tiles, _NO_LAYERS))

    def encode_layers(self, tiles: TileArray, layers: Sequence[int]) -> LayerFeatures:
        """See LayeredEncoder.encode_layers."""
        return self.submit_layers(tiles, layers).result()

    def submit_layers(self, tiles: TileArray, layers: Sequence[int], *, patches: bool = True) -> _PendingLayers:
        """See LayeredEncoder.submit_layers."""
        block_indices(layers, self.depth, self.info.name)
        return _PendingLayers(self.info.name, self._launch(tiles, _Wanted(tuple(layers), patches)))

    def suggest_batch(self, tile_px: int) -> int:
        """The batch size for tiles of ``tile_px``: a constant on a CPU, found by trial on a GPU, once per tile size."""
        if self._cuda is None:
            return CPU_BATCH
        with self._lock:
            if tile_px not in self._suggested:
                self._suggested[tile_px] = self._trial(tile_px)
            return self._suggested[tile_px]

    def _trial(self, tile_px: int) -> int:
        """The smallest of TRIAL_BATCHES whose throughput is within TRIAL_GAIN of the best that fits.

        Uncompiled: compiling anew for every size would take minutes, and the ranking is the same.
        """
        compiled, self._compile = self._compile, False
        forward, self._forward = self._forward, self.network
        try:
            return self._fastest(tile_px)
        finally:
            self._compile, self._forward = compiled, forward
            if self._cuda is not None:
                # The largest that was tried may be many times the one that was taken.
                self._cuda.release()

    def _fastest(self, tile_px: int) -> int:
        speeds: dict[int, float] = {}
        for batch in TRIAL_BATCHES:
            tiles = np.zeros((batch, tile_px, tile_px, 3), np.uint8)
            spent = 0.0
            for repeat in range(3):
                started = time.perf_counter()
                arriving = self._unless_full(tiles, _NO_LAYERS)
                if arriving is None:
                    break
                arriving.wait()
                if repeat:  # the first run pays for kernels and memory
                    spent += time.perf_counter() - started
            if arriving is None:
                self._free()
                break
            speeds[batch] = 2 * batch / spent
            if speeds[batch] < 0.9 * max(speeds.values()):
                break
        if not speeds:
            return 1
        best = max(speeds.values())
        return next(batch for batch, speed in speeds.items() if speed >= TRIAL_GAIN * best)

    def _launch(self, tiles: TileArray, wanted: _Wanted) -> list[Arriving]:
        """Start a batch, in halves (and their halves) where it does not fit; no tile is lost."""
        if tiles.ndim != 4 or tiles.shape[-1] != 3 or tiles.dtype != np.uint8:
            raise ConfigError(f"tiles must be uint8 (B, H, W, 3), not {tiles.dtype} {tiles.shape}")
        if len(tiles) == 0:
            return [self._empty(wanted)]
        with self._lock:
            parts: list[Arriving] = []
            start = 0
            while start < len(tiles):
                size = min(len(tiles) - start, self._limit or len(tiles))
                part = self._unless_full(tiles[start : start + size], wanted)
                if part is not None:
                    parts.append(part)
                    start += size
                elif size > 1:
                    self._limit = size // 2
                    self._free()
                else:
                    raise DeviceError(
                        f"{self.device} is out of memory with encoder {self.info.name} on a single tile",
                        remedy="free the device of other programs, use a smaller encoder, or --devices cpu",
                    )
            return parts

    def _unless_full(self, tiles: TileArray, wanted: _Wanted) -> Arriving | None:
        """Start a batch; None where the device has no memory for it.

        By the time that this returns, the error is gone and with it what its traceback held in memory.
        """
        try:
            with device_errors(self.device):
                return self._launch_one(tiles, wanted)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                return None
            if self._compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise _compile_error(self.info.name, error) from error
            raise

    def _free(self) -> None:
        if self._cuda is not None:
            with device_errors(self.device):
                torch.cuda.empty_cache()

    def _empty(self, wanted: _Wanted) -> Arriving:
        none = torch.empty((0, self.info.dim))
        maps = none[:, None, None] if wanted.patches else None
        return Arriving(self.device, none, [(block, none, maps) for block in wanted.layers], 0, None)

    def _launch_one(self, tiles: TileArray, wanted: _Wanted) -> Arriving:
        rows = len(tiles)
        if self._compile and not wanted.layers:  # layers come from the network as it is, which takes any size
            tiles = self._filled(tiles)
        if self._cuda is not None:
            with torch.inference_mode():
                return self._cuda.run(tiles, rows, lambda batch: self._compute(batch, wanted))
        # torch takes no negative strides, and warns about arrays that cannot be written to.
        source = np.require(tiles, requirements=("C", "W"))
        with torch.inference_mode():
            features, found = self._compute(torch.from_numpy(source).to(self.device), wanted)
            tokens = [(block, cls.cpu(), None if maps is None else maps.cpu()) for block, cls, maps in found]
            return Arriving(self.device, features.cpu(), tokens, rows, None)

    def _filled(self, tiles: TileArray) -> TileArray:
        """The batch filled up with copies of its last tile to the size that the compiled network knows."""
        self._largest = max(self._largest, len(tiles))
        full = min(self._largest, self._limit or self._largest)
        if len(tiles) >= full:
            return tiles
        return np.concatenate([tiles, np.repeat(tiles[-1:], full - len(tiles), axis=0)])

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, D), not waited for, of normalised images (B, 3, S, S) that lie on the device."""
        with torch.inference_mode(), self._numbers():
            return self._forward(images)

    @contextmanager
    def _numbers(self) -> Iterator[None]:
        """Compute in the encoder's precision inside."""
        if self._dtype != torch.float32:
            with torch.autocast(self.device.type, dtype=self._dtype):
                yield
            return
        # By torch's default a GPU's convolutions round float32 to TF32's 10 bits, less than float32 promises.
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        try:
            yield
        finally:
            torch.backends.cudnn.allow_tf32 = before

    def _compute(self, tiles: Tensor, wanted: _Wanted) -> tuple[Tensor, list[Tokens]]:
        """Features float32 (B, D), and the wanted tokens, of uint8 tiles on the device."""
        images = self._normalise(tiles if self.prepare is None else self.prepare(tiles))
        with self._numbers():
            if not wanted.layers:
                return self._forward(images).float(), []
            blocks = block_indices(wanted.layers, self.depth, self.info.name)
            features, tokens = self.network.forward_layers(images, blocks)
        return features.float(), [
            (asked, cls.float(), maps.float() if wanted.patches else None)
            for asked, (cls, maps) in zip(wanted.layers, tokens, strict=True)
        ]


def _compile_error(name: str, error: Exception) -> ConfigError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ConfigError(
        f"torch.compile does not work here with encoder {name}: {first}",
        remedy="run without compiling, or install a C++ compiler",
    )


class ReplicatedEncoder:
    """One encoder on several devices, a replica each; batches go round."""

    def __init__(self, replicas: Sequence[TorchEncoder]) -> None:
        self.replicas = tuple(replicas)
        self._turn = 0
        self._lock = threading.Lock()

    @property
    def info(self) -> EncoderInfo:
        """See Encoder.info."""
        return self.replicas[0].info

    @property
    def depth(self) -> int:
        """See LayeredEncoder.depth."""
        return self.replicas[0].depth

    @property
    def shares_batches(self) -> bool:
        """See TorchEncoder.shares_batches."""
        return all(replica.shares_batches for replica in self.replicas)

    @property
    def in_flight(self) -> int:
        """See TorchEncoder.in_flight."""
        return sum(replica.in_flight for replica in self.replicas)

    @property
    def new_tiles(self) -> Callable[[tuple[int, int, int, int]], TileArray] | None:
        """See TorchEncoder.new_tiles; pinned memory is pinned for all GPUs."""
        return self.replicas[0].new_tiles

    def suggest_batch(self, tile_px: int) -> int:
        """The smallest of the replicas' batch sizes, so that it fits them all."""
        return min(replica.suggest_batch(tile_px) for replica in self.replicas)

    def release(self) -> None:
        """See TorchEncoder.release."""
        for replica in self.replicas:
            replica.release()

    def _next(self) -> TorchEncoder:
        with self._lock:
            replica = self.replicas[self._turn % len(self.replicas)]
            self._turn += 1
            return replica

    def encode(self, tiles: TileArray) -> FeatureArray:
        """See Encoder.encode."""
        return self.submit(tiles).result()

    def submit(self, tiles: TileArray) -> _PendingFeatures:
        """See Encoder.submit."""
        return self._next().submit(tiles)

    def encode_layers(self, tiles: TileArray, layers: Sequence[int]) -> LayerFeatures:
        """See LayeredEncoder.encode_layers."""
        return self.submit_layers(tiles, layers).result()

    def submit_layers(self, tiles: TileArray, layers: Sequence[int], *, patches: bool = True) -> _PendingLayers:
        """See LayeredEncoder.submit_layers."""
        return self._next().submit_layers(tiles, layers, patches=patches)
