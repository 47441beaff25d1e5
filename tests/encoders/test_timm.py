"""Encoders on a device: pixels as PIL resizes them, precision, batches that do not fit, weights that are not there."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from wsi_pipe.encoders import hub, load_encoder, loading
from wsi_pipe.encoders.architectures import PooledNetwork, build, timm_recipe
from wsi_pipe.encoders.base import Encoder, EncoderInfo, LayeredEncoder, NonFiniteFeaturesError
from wsi_pipe.encoders.cuda_lane import Arriving, CudaLane
from wsi_pipe.encoders.devices import cpu_has_bfloat16, resolve_devices, resolve_precision, shared_precision
from wsi_pipe.encoders.pixels import Normaliser, normalise, resize_matrix
from wsi_pipe.encoders.recipe import Preprocessing, Recipe
from wsi_pipe.encoders.torch_encoder import ReplicatedEncoder, TorchEncoder
from wsi_pipe.errors import ConfigError, DeviceError, UnknownEncoderError, WeightsError

CPU = torch.device("cpu")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("WSI_PIPE_WEIGHTS", raising=False)


@pytest.fixture
def tiles() -> NDArray[np.uint8]:
    smooth = np.random.default_rng(3).normal(size=(16, 9, 9, 3))
    coarse = [((tile - tile.min()) / np.ptp(tile) * 255).astype(np.uint8) for tile in smooth]
    return np.stack([np.asarray(Image.fromarray(tile).resize((96, 96))) for tile in coarse])


def network(**overrides: Any) -> tuple[PooledNetwork, Any, EncoderInfo]:
    recipe, _ = timm_recipe("test_vit")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        made = build(recipe, name="test", **overrides)
    return made, recipe, EncoderInfo("test", "test", recipe.dim, "0" * 64, "MIT")


def cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


# Pixels


@pytest.mark.parametrize("filter_name", ["bilinear", "bicubic"])
@pytest.mark.parametrize("side", [224, 256, 300, 180])
def test_resizing_agrees_with_pil(filter_name: str, side: int) -> None:
    pil = Image.Resampling[filter_name.upper()]
    source = np.random.default_rng(1).integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    pre = Preprocessing(224, *IMAGENET, interpolation=filter_name)
    ours = normalise(torch.from_numpy(source), pre)
    reference = np.stack([np.asarray(Image.fromarray(tile).resize((224, 224), pil)) for tile in source])
    mean, std = np.array(IMAGENET[0]), np.array(IMAGENET[1])
    theirs = ((reference / 255 - mean) / std).transpose(0, 3, 1, 2)
    # One grey level is what two roundings of the same filter may differ by.
    assert np.abs(ours.numpy() - theirs).max() <= 1.01 / 255 / std.min()
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert ours.dtype == torch.float32


@pytest.mark.parametrize("filter_name", ["bilinear", "bicubic"])
@pytest.mark.parametrize("side", [180, 256, 300, 512])
def test_resizing_by_matrix_products_is_the_same_filter(filter_name: str, side: int) -> None:
    """The GPU's way, on the CPU: against torch's own resizing of uint8, and against PIL."""
    source = np.random.default_rng(1).integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    images = torch.from_numpy(source).permute(0, 3, 1, 2)
    made = Normaliser(Preprocessing(224, *IMAGENET, interpolation=filter_name), CPU).resize_by_products(images, 224)
    ours = made.permute(0, 2, 3, 1).numpy()
    theirs = nn.functional.interpolate(images, (224, 224), mode=filter_name, antialias=True).permute(0, 2, 3, 1).numpy()
    pil = [np.asarray(Image.fromarray(t).resize((224, 224), Image.Resampling[filter_name.upper()])) for t in source]
    for reference in (theirs, np.stack(pil)):
        off = np.abs(ours - reference.astype(np.float32))
        # Noise is the worst case: a value at one half, rounded otherwise between the two passes, may shift two levels.
        assert off.max() <= 2
        assert (off > 1).mean() < 1e-3
        assert off.mean() < 0.25


def test_a_resize_matrix_keeps_flat_areas_flat() -> None:
    for filter_name in ("bilinear", "bicubic"):
        matrix = resize_matrix(256, 224, filter_name)
        assert matrix.shape == (224, 256)
        torch.testing.assert_close(matrix.sum(1), torch.ones(224))


def test_the_centre_is_cut_out_after_resizing() -> None:
    source = np.random.default_rng(1).integers(0, 256, (1, 256, 256, 3), dtype=np.uint8)
    pre = Preprocessing(224, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), resize_px=256)
    ours = normalise(torch.from_numpy(source), pre)[0].permute(1, 2, 0) * 255
    np.testing.assert_allclose(ours.numpy(), source[0, 16:240, 16:240], atol=1e-3)


def test_tiles_are_not_changed_and_may_be_read_only(tiles: NDArray[np.uint8]) -> None:
    encoder = TorchEncoder(*network(), device=CPU, precision="float32")
    kept = tiles.copy()
    tiles.flags.writeable = False
    first = encoder.encode(tiles)
    np.testing.assert_array_equal(tiles, kept)
    tiles.flags.writeable = True
    np.testing.assert_array_equal(first, encoder.encode(tiles))


# Results


def test_features_are_those_of_the_network_on_pil_images(tiles: NDArray[np.uint8]) -> None:
    made, recipe, info = network()
    side = recipe.preprocessing.input_px
    mean, std = (np.array(v, np.float32) for v in (recipe.preprocessing.mean, recipe.preprocessing.std))
    resized = np.stack([np.asarray(Image.fromarray(t).resize((side, side), Image.Resampling.BICUBIC)) for t in tiles])
    with torch.no_grad():
        theirs = made.trunk(torch.from_numpy(((resized / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)))
    ours = TorchEncoder(made, recipe, info, device=CPU, precision="float32").encode(tiles)
    assert cosine(ours, theirs.numpy()) > 0.9999


def test_batch_size_and_neighbours_do_not_matter(tiles: NDArray[np.uint8]) -> None:
    encoder = TorchEncoder(*network(), device=CPU, precision="float32")
    whole = encoder.encode(tiles)
    one = np.concatenate([encoder.encode(tile[None]) for tile in tiles])
    turned = encoder.encode(tiles[::-1])[::-1]
    assert cosine(whole, one) >= 0.9999
    assert cosine(whole, turned) >= 0.9999
    assert encoder.encode(tiles[:0]).shape == (0, encoder.info.dim)


def test_half_precision_is_close_and_keeps_norms_in_float32(tiles: NDArray[np.uint8]) -> None:
    full = TorchEncoder(*network(), device=CPU, precision="float32").encode(tiles)
    half = TorchEncoder(*network(), device=CPU, precision="bfloat16")
    assert half.info.precision == "bfloat16"
    assert cosine(half.encode(tiles), full) >= 0.999
    own = {type(m).__name__: [p.dtype for p in m.parameters(recurse=False)] for m in half.network.modules()}
    assert set(own["Linear"]) == {torch.bfloat16}
    assert {dtype for name, dtypes in own.items() if "Norm" in name for dtype in dtypes} == {torch.float32}


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Compute capabilities of GPUs that torch is made to believe in; to be filled."""
    made: list[tuple[int, int]] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: made[torch.device(device).index])
    return made


A100, T4 = (8, 0), (7, 5)


@pytest.mark.parametrize(
    ("capabilities", "others", "preferred", "expected"),
    [
        ([A100], 0, "auto", "bfloat16"),
        ([A100], 0, "float16", "float16"),
        ([T4], 0, "bfloat16", "float16"),
        ([T4], 0, "float32", "float32"),
        ([A100, T4], 0, "auto", "float16"),
        ([A100, T4], 0, "bfloat16", "float16"),
        ([A100], 1, "float16", "float32"),
        ([T4], 1, "auto", "float32"),
        ([], 1, "bfloat16", "float32"),
    ],
)
def test_replicas_share_one_precision_that_all_devices_have(
    gpus: list[Any], monkeypatch: Any, capabilities: list[Any], others: int, preferred: str, expected: str
) -> None:
    monkeypatch.setattr("wsi_pipe.encoders.devices.cpu_has_bfloat16", lambda: False)
    gpus += capabilities
    devices = [torch.device("cuda", i) for i in range(len(gpus))] + [CPU] * others
    assert shared_precision("auto", preferred, devices) == expected


def test_a_precision_that_is_asked_for_must_be_had_by_all_devices(gpus: list[Any]) -> None:
    gpus.append(T4)
    devices = [torch.device("cuda", 0), CPU]
    assert shared_precision("bfloat16", "float16", devices) == "bfloat16"
    with pytest.raises(ConfigError, match="float16 does not run on a CPU"):
        shared_precision("float16", "auto", devices)


def test_an_encoder_of_the_table_gets_the_precision_that_its_gpu_has(
    gpus: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus.append(T4)
    asked: list[str] = []
    monkeypatch.setattr(loading, "resolve_devices", lambda device: [torch.device("cuda", 0)])
    monkeypatch.setattr(loading, "_network", lambda *_, **__: (None, ""))
    monkeypatch.setattr(loading, "TorchEncoder", lambda *_, precision, **__: asked.append(precision))
    load_encoder("uni2-h", device="cuda:0")
    assert asked == ["float16"]


def test_precision_words() -> None:
    assert resolve_precision("auto", CPU) == ("bfloat16" if cpu_has_bfloat16() else "float32")
    assert resolve_precision("float32", CPU) == "float32"
    with pytest.raises(ConfigError, match="float16 does not run on a CPU"):
        resolve_precision("float16", CPU)
    with pytest.raises(ConfigError, match="int8"):
        resolve_precision("int8", CPU)


def test_the_protocols_hold() -> None:
    encoder = TorchEncoder(*network(), device=CPU)
    assert isinstance(encoder, Encoder)
    assert isinstance(encoder, LayeredEncoder)
    assert isinstance(ReplicatedEncoder([encoder]), LayeredEncoder)


def test_wrong_tiles_are_refused() -> None:
    encoder = TorchEncoder(*network(), device=CPU)
    for bad in (np.zeros((2, 8, 8), np.uint8), np.zeros((2, 8, 8, 3), np.float32), np.zeros((2, 3, 8, 8), np.uint8)):
        with pytest.raises(ConfigError, match="uint8"):
            encoder.encode(bad)


def test_compiled_batches_are_filled_up(tiles: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def compile_stub(module: nn.Module) -> Any:
        def forward(images: Tensor) -> Tensor:
            seen.append(len(images))
            return module(images)  # type: ignore[no-any-return]

        return forward

    monkeypatch.setattr(torch, "compile", compile_stub)
    plain = TorchEncoder(*network(), device=CPU, precision="float32").encode(tiles[:5])
    encoder = TorchEncoder(*network(), device=CPU, precision="float32", compile=True)
    encoder.encode(tiles)
    assert cosine(encoder.encode(tiles[:5]), plain) > 0.9999
    assert seen == [16, 16]
    # Layers come from the network as it is: nothing is filled up for it.
    whole: list[int] = []
    inner = encoder.network.forward_layers
    monkeypatch.setattr(encoder.network, "forward_layers", lambda x, b: (whole.append(len(x)), inner(x, b))[1])
    assert encoder.encode_layers(tiles[:5], [0]).features.shape[0] == 5
    assert whole == [5]


def test_a_compiler_that_fails_says_what_to_do(tiles: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch) -> None:
    class FailedError(RuntimeError):
        __module__ = "torch._inductor.exc"

    def refuse(images: Tensor) -> Tensor:
        raise FailedError("InvalidCxxCompiler: No working C++ compiler found\nand a long trace")

    monkeypatch.setattr(torch, "compile", lambda module: refuse)
    encoder = TorchEncoder(*network(), device=CPU, precision="float32", compile=True)
    with pytest.raises(ConfigError, match=r"No working C\+\+ compiler found; run without compiling"):
        encoder.encode(tiles)


# A device that is too small


class Small(nn.Module):
    """A trunk that has room for so many images."""

    def __init__(self, trunk: nn.Module, room: int) -> None:
        super().__init__()
        self.trunk, self.room = trunk, room
        self.tried: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.tried.append(len(images))
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.trunk(images)  # type: ignore[no-any-return]


def small_encoder(room: int) -> tuple[TorchEncoder, Small]:
    made, recipe, info = network()
    small = Small(made.trunk, room)
    return TorchEncoder(PooledNetwork(small, "model"), recipe, info, device=CPU, precision="float32"), small


class Failing(nn.Module):
    """A trunk whose device fails with these words."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self.words = words

    def forward(self, images: Tensor) -> Tensor:
        raise RuntimeError(self.words)


def failing(words: str) -> TorchEncoder:
    _, recipe, info = network()
    return TorchEncoder(PooledNetwork(Failing(words), "model"), recipe, info, device=CPU, precision="float32")


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`",
    ],
)
def test_a_device_that_fails_in_a_launch_is_a_device_error(words: str, tiles: NDArray[np.uint8]) -> None:
    with pytest.raises(DeviceError) as caught:
        failing(words).submit(tiles)
    assert str(caught.value) == f"cpu failed: {words.splitlines()[0]}; check the device and its driver, then run again"


def test_errors_that_are_not_the_device_s_stay_what_they_are(tiles: NDArray[np.uint8]) -> None:
    with pytest.raises(RuntimeError, match="must match") as caught:
        failing("The size of tensor a (3) must match the size of tensor b (4)").encode(tiles)
    assert not isinstance(caught.value, DeviceError)


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: out of memory",
    ],
)
def test_libraries_without_memory_are_out_of_memory(words: str, tiles: NDArray[np.uint8]) -> None:
    encoder = failing(words)
    with pytest.raises(DeviceError, match="out of memory with encoder test on a single tile"):
        encoder.encode(tiles)
    assert encoder.batch_limit == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("CUDA error: device-side assert triggered", "cpu failed: CUDA error: device-side assert triggered"),
        ("CUDA error: out of memory", "encoder test does not fit into the memory of cpu"),
    ],
)
def test_a_device_that_fails_while_weights_are_moved(words: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, recipe, info = network()

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError(words)

    monkeypatch.setattr(made, "to", refuse)
    with pytest.raises(DeviceError, match=said):
        TorchEncoder(made, recipe, info, device=CPU, precision="float32")


def test_a_batch_that_does_not_fit_is_halved_and_no_tile_lost(tiles: NDArray[np.uint8]) -> None:
    full = TorchEncoder(*network(), device=CPU, precision="float32").encode(tiles)
    encoder, small = small_encoder(5)
    np.testing.assert_allclose(encoder.encode(tiles), full, atol=1e-4)
    assert small.tried == [16, 8, 4, 4, 4, 4]
    assert encoder.batch_limit == 4
    small.tried.clear()
    encoder.encode(tiles)
    assert small.tried == [4, 4, 4, 4]


def test_one_tile_that_does_not_fit_is_an_error_with_a_remedy(tiles: NDArray[np.uint8]) -> None:
    encoder, _ = small_encoder(0)
    with pytest.raises(DeviceError, match=r"out of memory with encoder test on a single tile; .*--devices cpu"):
        encoder.encode(tiles)


def test_other_errors_of_the_network_pass_through(tiles: NDArray[np.uint8]) -> None:
    _, recipe, info = network()

    class Broken(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise RuntimeError("shapes cannot be multiplied")

    encoder = TorchEncoder(PooledNetwork(Broken(), "model"), recipe, info, device=CPU)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        encoder.encode(tiles)


def test_nan_names_its_rows_and_keeps_the_others(tiles: NDArray[np.uint8]) -> None:
    made, recipe, info = network()

    class Poisoned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = made.trunk

        def forward(self, images: Tensor) -> Tensor:
            out = self.trunk(images).clone()
            out[3, 7] = float("nan")
            out[11, 0] = float("inf")
            return out  # type: ignore[no-any-return]

    encoder = TorchEncoder(PooledNetwork(Poisoned(), "model"), recipe, info, device=CPU, precision="float32")
    with pytest.raises(NonFiniteFeaturesError, match="2 of 16 tiles") as caught:
        encoder.encode(tiles)
    assert caught.value.rows == (3, 11)
    assert isinstance(caught.value.features, np.ndarray)
    assert np.isfinite(np.delete(caught.value.features, [3, 11], 0)).all()


# Devices


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(DeviceError, match=r"device cuda:77 is not there; use one of: .*cpu"):
        resolve_devices("cuda:77")
    with pytest.raises(ConfigError, match="'gpu' is not understood"):
        resolve_devices("gpu")
    with pytest.raises(ConfigError, match="twice"):
        resolve_devices("cpu,cpu")
    assert resolve_devices("cpu") == [CPU]
    assert resolve_devices(("cpu",)) == [CPU]


def test_auto_is_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_devices("auto") == [torch.device("cuda:0"), torch.device("cuda:1")]
    assert resolve_devices("cuda") == [torch.device("cuda:0")]
    assert resolve_devices("cuda:1, cuda:0") == [torch.device("cuda:1"), torch.device("cuda:0")]


def test_replicas_take_turns_and_agree(tiles: NDArray[np.uint8]) -> None:
    replicas = [TorchEncoder(*network(), device=CPU, precision="float32") for _ in range(3)]
    both = ReplicatedEncoder(replicas)
    pending = [both.submit(tiles[k : k + 4]) for k in range(0, 16, 4)]
    got = np.concatenate([part.result() for part in pending])
    np.testing.assert_allclose(got, replicas[0].encode(tiles), atol=1e-5)
    assert both.in_flight == 3
    assert both.suggest_batch(96) == replicas[0].suggest_batch(96)


# The order of copies on a GPU, with the GPU's parts replaced by ones that record and obey


class Clock:
    """Stands for torch.cuda: copies "end" when the test says so."""

    def __init__(self) -> None:
        self.ended = False
        self.log: list[str] = []

    def event(self, blocking: bool = False) -> Any:
        clock = self

        class Event:
            recorded = False

            def record(self, stream: Any) -> None:
                self.recorded = True
                # A thread that waits must not spin; the side stream's event is never waited for.
                assert blocking == (stream != "side")
                clock.log.append(f"record {stream}")

            def query(self) -> bool:
                return not self.recorded or clock.ended

            def synchronize(self) -> None:
                clock.log.append("synchronize")

        return Event()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    main = SimpleNamespace(wait_event=lambda event: made.log.append("wait"), __str__=lambda self: "main")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "side")
    monkeypatch.setattr(torch.cuda, "Event", made.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: made.log.append("keep"))
    plain = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **rest: plain(*size, **rest))
    return made


def test_a_pinned_buffer_is_not_written_to_while_it_is_copied(clock: Clock, tiles: NDArray[np.uint8]) -> None:
    lane = CudaLane(CPU)
    seen: list[NDArray[np.uint8]] = []

    def compute(batch: Tensor) -> tuple[Tensor, list[Any]]:
        seen.append(batch.numpy())  # no copy: what a transfer still under way would read
        return batch.float().mean((1, 2)), []

    first = lane.run(tiles[:4], 4, compute)
    second = lane.run(tiles[4:8], 4, compute)
    np.testing.assert_array_equal(seen[0], tiles[:4])
    np.testing.assert_array_equal(seen[1], tiles[4:8])
    assert len(lane.staging) == 2
    clock.ended = True
    third = lane.run(tiles[8:11], 3, compute)
    assert len(lane.staging) == 2
    for pending, rows in ((first, tiles[:4]), (second, tiles[4:8]), (third, tiles[8:11])):
        before = len(clock.log)
        arrived = pending.wait()
        # Nothing is read before its own event has come.
        assert clock.log[before:] == ["synchronize"]
        np.testing.assert_allclose(arrived.features, rows.mean((1, 2)), rtol=1e-5)
    # Each batch: the side stream's copy is recorded, the main stream waits for it and keeps the memory, then computes.
    steps = [word.split()[0] for word in clock.log]
    assert steps == ["record", "wait", "keep", "record"] * 3 + ["synchronize"] * 3
    assert clock.log[0:12:4] == ["record side"] * 3
    assert all(word != "record side" for word in clock.log[3:12:4])


def test_results_are_ready_when_their_event_has_come(clock: Clock, tiles: NDArray[np.uint8]) -> None:
    encoder = TorchEncoder(*network(), device=CPU, precision="float32")
    assert encoder.submit(tiles).ready
    encoder._cuda = CudaLane(CPU)
    pending = encoder.submit(tiles)
    assert not pending.ready
    assert "synchronize" not in clock.log
    clock.ended = True
    assert pending.ready
    assert pending.result().shape == (len(tiles), encoder.info.dim)
    assert "synchronize" in clock.log


def test_float32_is_computed_in_float32(clock: Clock, tiles: NDArray[np.uint8]) -> None:
    allowed: list[bool] = []

    class Watched(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            allowed.append(torch.backends.cudnn.allow_tf32)
            return images.mean((2, 3))

    before = torch.backends.cudnn.allow_tf32
    _, recipe, info = network()
    TorchEncoder(PooledNetwork(Watched(), "model"), recipe, info, device=CPU, precision="float32").encode(tiles)
    assert allowed == [False]
    assert torch.backends.cudnn.allow_tf32 == before


def test_larger_batches_replace_smaller_buffers(clock: Clock, tiles: NDArray[np.uint8]) -> None:
    lane = CudaLane(CPU)
    clock.ended = True
    for size in (2, 4, 8, 16, 3):
        lane.run(tiles[:size], size, lambda batch: (batch.float().mean((1, 2)), []))
    assert len(lane.staging) == 1
    assert lane.staging[0][0].numel() == tiles.size


def test_a_gpu_that_fails_is_a_device_error(clock: Clock, tiles: NDArray[np.uint8]) -> None:
    class Broken:
        def synchronize(self) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be ...")

    arriving = Arriving(torch.device("cuda:1"), torch.zeros(1, 2), [], 1, Broken())
    with pytest.raises(DeviceError, match=r"cuda:1 failed: CUDA error: an illegal memory access .*; check"):
        arriving.wait()


def test_an_encoder_on_a_gpu_shares_batches_and_gives_the_same(clock: Clock, tiles: NDArray[np.uint8]) -> None:
    encoder = TorchEncoder(*network(), device=CPU, precision="float32")
    plain = encoder.encode(tiles)
    encoder._cuda = CudaLane(CPU)
    assert encoder.shares_batches
    assert encoder.in_flight > 1
    np.testing.assert_allclose(encoder.encode(tiles), plain, atol=1e-5)
    layered = encoder.encode_layers(tiles, [0, -1])
    np.testing.assert_allclose(layered.features, plain, atol=1e-5)


def test_the_trial_stops_where_memory_ends(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()  # every batch takes one tick, so larger ones are faster
    monkeypatch.setattr("wsi_pipe.encoders.torch_encoder.time.perf_counter", lambda: float(next(ticks)))
    encoder, small = small_encoder(40)
    encoder._cuda = CudaLane(CPU)
    clock.ended = True
    assert encoder.suggest_batch(32) == 32
    assert small.tried == [16, 16, 16, 32, 32, 32, 64]
    assert encoder.suggest_batch(32) == 32
    assert len(small.tried) == 7
    assert encoder._cuda.staging == []


def test_the_trial_takes_the_smallest_of_equals(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    now, batches = [0.0], []

    class Steady(nn.Module):
        """Full speed from 64 tiles on."""

        def forward(self, images: Tensor) -> Tensor:
            now[0] += max(len(images), 64) / 1000
            batches.append(len(images))
            return torch.zeros(len(images), 4)

    monkeypatch.setattr("wsi_pipe.encoders.torch_encoder.time.perf_counter", lambda: now[0])
    recipe = Recipe("steady", 4, Preprocessing(None, *IMAGENET))
    info = EncoderInfo("steady", "steady", 4, "", "")
    encoder = TorchEncoder(PooledNetwork(Steady(), "model"), recipe, info, device=CPU, precision="float32")
    encoder._cuda = CudaLane(CPU)
    assert encoder.suggest_batch(8) == 64
    assert sorted(set(batches)) == [16, 32, 64, 128, 256, 512]


# Weights


@pytest.mark.slow
def test_random_weights_are_the_same_in_every_process() -> None:
    code = (
        "import numpy as np, torch; torch.manual_seed(99);"
        "from wsi_pipe.encoders import load_encoder;"
        "e = load_encoder('timm:test_vit', device='cpu', precision='float32', random_weights=True);"
        "print(e.info.weights_sha256, *e.encode(np.full((1, 64, 64, 3), 90, np.uint8))[0])"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    said = subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True)
    identity, *values = said.stdout.split()
    here = load_encoder("timm:test_vit", device="cpu", precision="float32", random_weights=True)
    assert identity == here.info.weights_sha256
    ours = here.encode(np.full((1, 64, 64, 3), 90, np.uint8))[0]
    np.testing.assert_allclose(ours, np.array(values, np.float64), atol=1e-5)
    other = load_encoder("timm:test_vit2", device="cpu", random_weights=True)
    assert other.info.weights_sha256 != here.info.weights_sha256


def test_random_weights_leave_the_callers_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.rand(1)
    torch.manual_seed(3)
    load_encoder("timm:test_vit", device="cpu", random_weights=True)
    assert torch.equal(torch.rand(1), before)


@pytest.mark.parametrize(
    ("suffix", "nested"),
    [(".safetensors", None), (".pt", None), (".pt", "model"), (".bin", "state_dict"), (".pth", None)],
)
def test_own_checkpoints(suffix: str, nested: str | None, tmp_path: Path, tiles: NDArray[np.uint8]) -> None:
    made, recipe, info = network()
    path = tmp_path / f"own{suffix}"
    state = made.trunk.state_dict()
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({nested: state, "epoch": 3} if nested else state, path)
    loaded = load_encoder(f"timm:test_vit@{path}", device="cpu", precision="float32")
    direct = TorchEncoder(made, recipe, info, device=CPU, precision="float32")
    np.testing.assert_array_equal(loaded.encode(tiles), direct.encode(tiles))
    assert loaded.info.name == f"timm:test_vit@{path}"
    assert loaded.info.slug == "timm-test_vit-own"


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "pwned"),)

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(WeightsError, match="cannot be read safely"):
        load_encoder(f"timm:test_vit@{tmp_path / 'evil.pt'}", device="cpu")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("content", "name"), [(b"", "empty.pt"), (b"not a file", "odd.pt"), (b"\x08\0\0\0\0\0\0\0{}", "odd.safetensors")]
)
def test_damaged_files_are_named(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=name) as caught:
        load_encoder(f"timm:test_vit@{tmp_path / name}", device="cpu")
    assert "\n" not in str(caught.value)


def test_mistaken_names() -> None:
    with pytest.raises(UnknownEncoderError, match="timm has no model 'vit_tinny'"):
        load_encoder("timm:vit_tinny", device="cpu")
    with pytest.raises(ConfigError, match="no file after '@'"):
        load_encoder("timm:test_vit@", device="cpu")
    with pytest.raises(WeightsError, match="no such file"):
        load_encoder("timm:test_vit@/nowhere/x.safetensors", device="cpu")
    with pytest.raises(ConfigError, match="choose one"):
        load_encoder("timm:test_vit@x.safetensors", device="cpu", random_weights=True)


def test_no_network_says_what_to_do() -> None:
    with pytest.raises(WeightsError) as caught:
        load_encoder("phikon", device="cpu")
    text = str(caught.value)
    assert "\n" not in text
    for word in ("huggingface.co/owkin/phikon", "cannot be reached", "HF_HUB_OFFLINE", "WSI_PIPE_WEIGHTS"):
        assert word in text


def test_whether_the_hub_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not hub.reachable()  # HF_HUB_OFFLINE
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
        assert hub.reachable()
    assert not hub.reachable()
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy:3128"})
    assert hub.reachable()


def _refusing(error: Exception) -> Any:
    def download(*_: Any, **__: Any) -> str:
        raise error

    return download


def _response(status: int) -> Any:
    """What huggingface_hub's errors look at of an answer, whichever HTTP library it came through."""
    request = SimpleNamespace(method="HEAD", url="https://huggingface.co/x", headers={})
    return SimpleNamespace(status_code=status, headers={}, request=request, text="")


@pytest.mark.parametrize(("token", "remedy"), [(False, "hf auth login"), (True, "accept the licence")])
@pytest.mark.parametrize("kind", ["gated", "hidden", "401"])
def test_gated_weights(kind: str, token: bool, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors

    made = {
        "gated": errors.GatedRepoError("Access to model is restricted", response=_response(403)),
        "hidden": errors.RepositoryNotFoundError("Repository Not Found", response=_response(404)),
        "401": errors.HfHubHTTPError("401 Client Error", response=_response(401)),
    }
    monkeypatch.setattr("huggingface_hub.hf_hub_download", _refusing(made[kind]))
    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr(hub, "has_token", lambda: token)
    with pytest.raises(WeightsError, match=remedy) as caught:
        load_encoder("uni", device="cpu")
    assert "gated" in str(caught.value)
    assert "https://huggingface.co/MahmoodLab/UNI" in str(caught.value)


def test_a_file_that_the_hub_has_not_and_a_server_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors

    monkeypatch.setattr(hub, "reachable", lambda: True)
    absent = errors.RemoteEntryNotFoundError("Entry Not Found", response=_response(404))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", _refusing(absent))
    with pytest.raises(WeightsError, match=r"has no file model\.safetensors or pytorch_model\.bin"):
        load_encoder("phikon", device="cpu")
    down = errors.HfHubHTTPError("503 Server Error", response=_response(503))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", _refusing(down))
    with pytest.raises(WeightsError, match="cannot be downloaded"):
        load_encoder("phikon", device="cpu")


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_answers_with_an_error_can_be_reached(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors

    def download(*_: Any, **__: Any) -> str:
        # As hf_hub_download wraps whatever its first question ended with.
        cause = errors.HfHubHTTPError(f"{status} Server Error", response=_response(status))
        raise errors.LocalEntryNotFoundError("cannot find the requested files in the local cache") from cause

    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(
        WeightsError, match=f"cannot be downloaded from .*: {status} Server Error; try again later"
    ) as error:
        load_encoder("phikon", device="cpu")
    assert "HF_HUB_OFFLINE" not in str(error.value)


def test_timms_own_weights_from_the_cache_without_their_head(tmp_path: Path, tiles: NDArray[np.uint8]) -> None:
    made, recipe, info = network()
    _, facts = timm_recipe("test_vit")
    assert facts["hub_id"].startswith("timm/test_vit")
    folder = tmp_path / "hub" / f"models--{facts['hub_id'].replace('/', '--')}"
    (folder / "snapshots" / ("b" * 40)).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("b" * 40)
    state = {**made.trunk.state_dict(), "head.weight": torch.zeros(1000, 64), "head.bias": torch.zeros(1000)}
    save_file(state, folder / "snapshots" / ("b" * 40) / "model.safetensors")
    loaded = load_encoder("timm:test_vit", device="cpu", precision="float32")
    direct = TorchEncoder(made, recipe, info, device=CPU, precision="float32")
    np.testing.assert_array_equal(loaded.encode(tiles), direct.encode(tiles))


def test_weights_lie_in_the_folder_or_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WSI_PIPE_WEIGHTS", str(tmp_path))
    assert hub.find_local("uni", "MahmoodLab/UNI", ["pytorch_model.bin"]) is None
    cached = tmp_path / "hub" / "models--MahmoodLab--UNI" / "snapshots" / ("a" * 40) / "pytorch_model.bin"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"1")
    refs = tmp_path / "hub" / "models--MahmoodLab--UNI" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    assert hub.find_local("uni", "MahmoodLab/UNI", ["pytorch_model.bin"]) == cached
    (tmp_path / "uni").mkdir()
    (tmp_path / "uni" / "pytorch_model.bin").write_bytes(b"2")
    assert hub.find_local("uni", "MahmoodLab/UNI", ["pytorch_model.bin"]) == tmp_path / "uni" / "pytorch_model.bin"
    (tmp_path / "uni.safetensors").write_bytes(b"3")
    assert hub.find_local("uni", "MahmoodLab/UNI", ["pytorch_model.bin"]) == tmp_path / "uni.safetensors"


def test_an_alias_finds_the_weights_that_lie_under_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WSI_PIPE_WEIGHTS", str(tmp_path))
    (tmp_path / "uni.safetensors").write_bytes(b"damaged")
    for name in ("uni", "UNI", "UNI_v1"):
        with pytest.raises(WeightsError, match=r"uni\.safetensors"):
            load_encoder(name, device="cpu")
