"""Which device and which number format: names in, torch objects out, and errors that say what there is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch

from wsi_pipe.errors import ConfigError, DeviceError

__all__ = [
    "PRECISIONS",
    "cpu_has_bfloat16",
    "device_errors",
    "is_out_of_memory",
    "resolve_devices",
    "resolve_precision",
    "shared_precision",
]

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _available() -> list[str]:
    names = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if torch.backends.mps.is_available():
        names.append("mps")
    return [*names, "cpu"]


def resolve_devices(devices: str | Sequence[str]) -> list[torch.device]:
    """The devices that a name, or a comma-separated list, or a sequence of names, stands for.

    "auto" is every CUDA device that this process sees, else MPS, else the CPU. Raises DeviceError for a device that
    is not there, with a list of those that are, and ConfigError for a name that torch does not know.
    """
    names = devices.split(",") if isinstance(devices, str) else list(devices)
    names = [name.strip() for name in names if name.strip()]
    found: list[torch.device] = []
    for name in names or ["auto"]:
        here = _available()
        if name == "auto":
            cuda = [item for item in here if item.startswith("cuda")]
            found.extend(torch.device(item) for item in (cuda or here[:1]))
            continue
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise ConfigError(f"device {name!r} is not understood", remedy="write cpu, cuda, cuda:0 or auto") from error
        if name == "cuda":
            device = torch.device("cuda", 0)
        if str(device) not in here:
            raise DeviceError(f"device {name} is not there", remedy=f"use one of: {', '.join(here)}, auto")
        found.append(device)
    if len(set(found)) < len(found):
        raise ConfigError(f"a device is given twice: {', '.join(map(str, found))}")
    return found


@cache
def cpu_has_bfloat16() -> bool:
    """True where the CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX); without it bfloat16 is slower."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None:
        flags = capabilities()
        return bool(flags.get("avx512_bf16") or flags.get("amx_bf16"))
    # torch before 2.10 has no public question for it.
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as handle:
            words = set(next((line for line in handle if line.startswith("flags")), "").split())
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16"})


def resolve_precision(precision: str, device: torch.device) -> str:
    """The precision that "auto" stands for on a device: half where its hardware has it, bfloat16 before float16.

    Raises ConfigError for another word, or for float16 on a CPU, which has no hardware for it.
    """
    if precision != "auto" and precision not in PRECISIONS:
        raise ConfigError(f"precision {precision!r} must be auto, {', '.join(PRECISIONS)}")
    if precision != "auto":
        if precision == "float16" and device.type == "cpu":
            raise ConfigError("precision float16 does not run on a CPU", remedy="use bfloat16, float32 or auto")
        return precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    if device.type == "cpu":
        return "bfloat16" if cpu_has_bfloat16() else "float32"
    return "float16"


def shared_precision(asked: str, preferred: str, devices: Sequence[torch.device]) -> str:
    """The one precision of an encoder's replicas on ``devices``, so that a feature does not depend on its replica.

    asked: what the user wants, "auto" or a precision, which each device must have. preferred: what the encoder's table
    names, a wish that counts on GPUs alone and only where all devices have hardware for it. Raises as
    ``resolve_precision`` does.
    """
    if asked != "auto":
        for device in devices:
            resolve_precision(asked, device)
        return asked
    own = [resolve_precision("auto", device) for device in devices]
    if preferred != "auto" and all(device.type == "cuda" for device in devices):
        # Every GPU multiplies float16 and float32; bfloat16 only those for which "auto" takes it.
        return preferred if preferred != "bfloat16" or set(own) == {"bfloat16"} else "float16"
    if len(set(own)) == 1:
        return own[0]
    # Of unlike GPUs all have float16; with a CPU among them nothing but float32 is sure.
    return "float32" if any(device.type == "cpu" for device in devices) else "float16"


_FULL = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """True where an error says that the device, or the CPU's allocator, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # cuBLAS and cuDNN take memory of their own, and say so in their own words.
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _FULL)


_OF_DEVICE = ("CUDA", "cuDNN", "CUDNN", "CUBLAS", "cuBLAS", "NCCL", "HIP", "MPS")


@contextmanager
def device_errors(device: torch.device, *, all_of_them: bool = False) -> Iterator[None]:
    """Raise what a device or its libraries fail with inside as DeviceError.

    Running out of memory passes as it is, for who may take a smaller batch, and so do errors that are not the
    device's; with ``all_of_them``, for what only waits for the device, neither does.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, DeviceError) or not (all_of_them or _is_of_device(error)):
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DeviceError(
            f"{device} failed: {first}", remedy="check the device and its driver, then run again"
        ) from error


def _is_of_device(error: RuntimeError) -> bool:
    # torch.compile names the device in its complaints too.
    compiling = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
    return not (compiling or is_out_of_memory(error)) and any(word in str(error) for word in _OF_DEVICE)
