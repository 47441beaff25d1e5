"""Device, precision and the passes without gradient."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrmil.data import batches
from lrmil.errors import SettingsError
from lrmil.model import MILModel
from lrmil.store import FeatureStore, ResidentStore

__all__ = ["bag_logits", "choose_device", "choose_precision", "deterministic", "place", "rounding", "threads_for"]

WORTH_THREADS = 2e8
"""Operations in one step below which threads cost more than they save: they spin for longer than they compute."""


def choose_device(name: str) -> torch.device:
    """The device called ``name``; "auto" is the GPU where there is one. Raises SettingsError when it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"the device {name!r} cannot be used: {error}", remedy="use auto or cpu") from error
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """float32 or bfloat16; "auto" is bfloat16 where the device has arithmetic for it."""
    if name == "auto":
        fast = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else _cpu_has_bfloat16()
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def _cpu_has_bfloat16() -> bool:
    # torch keeps these two private; without them the answer is no, which costs time and no correctness.
    probes = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return any(bool(probe()) for probe in probes if probe is not None)


def rounding(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """A context in which matrix products are computed in ``precision``."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16)


def place(store: FeatureStore | ResidentStore, device: torch.device, precision: torch.dtype) -> ResidentStore:
    """The store on the device in the type that is computed with; one that is placed already is left as it is."""
    if isinstance(store, ResidentStore):
        if store.device.type != device.type:
            raise SettingsError(f"the features are on {store.device}, the model on {device}", remedy="give one device")
        return store
    return ResidentStore.of(store, device, precision)


@torch.no_grad()
def bag_logits(
    model: MILModel,
    store: ResidentStore,
    indices: Sequence[int] | NDArray[np.int64],
    *,
    token_budget: int,
    precision: torch.dtype = torch.float32,
) -> Tensor:
    """Logits of bags in evaluation mode: (len(indices), C) float32 on the CPU, in the order of ``indices``."""
    training = model.training
    model.eval()
    unlabelled = np.zeros(len(store), np.int64)
    parts = [torch.empty(0, model.settings.classes)]
    with rounding(store.device, precision):
        plan = batches(store, unlabelled, indices, token_budget=token_budget, shuffle_seed=None)
        parts.extend(model(batch.features, batch.offsets).logits.float() for batch in plan)
    model.train(training)
    return torch.cat([part.cpu() for part in parts])


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Refuse operations that may differ between runs, if wanted; the setting before is restored."""
    if not wanted:
        # Setting what is set already would import torch's compiler, which takes seconds.
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    # cuBLAS sums in a fixed order only with a workspace of its own; it reads this when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def threads_for(operations: float) -> Iterator[None]:
    """One thread for steps of few floating-point operations, in torch and in numpy; as it was before for others."""
    if operations >= WORTH_THREADS:
        yield
        return
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)
