"""The state of a training run on disk, from which it goes on as if it had never stopped.

One safetensors file holds weights, best weights, AdamW's moments and the random states; its JSON header holds the
epoch, the history and a fingerprint of settings, split, labels and features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrmil.checkpoint import optimizer_tensors, read_tensors, write_tensors
from lrmil.config import TrainSettings, deciding
from lrmil.errors import ModelFileError, ResumeError
from lrmil.model import MILModel
from lrmil.splits import FoldIndices
from lrmil.trainer.optimise import AdamW
from wsi_pipe.config import fingerprint

__all__ = ["STATE_KIND", "Progress", "check_state", "load_state", "run_fingerprint", "save_state"]

STATE_KIND = "lrmil.training-state"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass
class Progress:
    """Where a run stands. history: one mapping of figures an epoch. best_epoch: from 1, 0 before the first."""

    epoch: int = 0
    history: list[dict[str, float | None]] = field(default_factory=list)
    best_epoch: int = 0
    best_value: float | None = None
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    finished: bool = False


def run_fingerprint(
    settings: TrainSettings, split: FoldIndices, labels: Tensor, classes: tuple[str, ...], hashes: Mapping[str, str]
) -> str:
    """SHA-256 of everything that decides a run's numbers. hashes: of the features and the teacher."""
    plain = replace(settings, device="", tensorboard=False, save_every=0)
    parts = [np.asarray(part).tolist() for part in (split.train, split.val, split.test)]
    return fingerprint(deciding(plain), parts, labels.tolist(), list(classes), dict(hashes))


def save_state(
    path: Path, model: MILModel, optimizer: AdamW, progress: Progress, run: str, device: torch.device
) -> None:
    """Write the state so that ``path`` holds all of it or the one before."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"best.{name}": value for name, value in progress.best_weights.items()}
    tensors |= optimizer_tensors(optimizer)
    tensors["random.cpu"] = torch.random.get_rng_state()
    if device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(device)
    header = {
        "run": run,
        "epoch": progress.epoch,
        "history": progress.history,
        "best_epoch": progress.best_epoch,
        "best_value": progress.best_value,
        "finished": progress.finished,
        "device": device.type,
    }
    write_tensors(path, tensors, STATE_KIND, header)


def load_state(path: Path, model: MILModel, optimizer: AdamW, run: str, device: torch.device) -> Progress:
    """Put a state back into model, optimizer and random generators, and say where the run stands.

    Raises ResumeError when the state is of another run (settings, split, labels, features, teacher) or kind of device,
    or cannot be read.
    """
    tensors, header = check_state(path, run, device)
    parts = _by_prefix(tensors)
    model.load_state_dict(parts["model"])
    for i, parameter in enumerate(_parameters(optimizer)):
        found = {m: tensors[f"optimizer.{i}.{m}"] for m in _MOMENTS if f"optimizer.{i}.{m}" in tensors}
        if found:
            # The fused kernel wants its step count beside the moments.
            moved: dict[str, Any] = {m: v.to(parameter.device) for m, v in found.items()}
            optimizer.state[parameter] = moved
    torch.random.set_rng_state(tensors["random.cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random.cuda"], device)
    return Progress(
        int(header["epoch"]),
        list(header["history"]),
        int(header["best_epoch"]),
        header["best_value"],
        {name: value.to(device) for name, value in parts.get("best", {}).items()},
        bool(header["finished"]),
    )


def check_state(path: Path, run: str, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of the state at ``path``, where it is of this run. Raises ResumeError as ``load_state``."""
    try:
        tensors, header = read_tensors(path, STATE_KIND)
    except ModelFileError as error:
        raise ResumeError(error.message, remedy="delete it to begin anew") from error
    if header.get("run") != run:
        raise ResumeError(
            f"{path} was made with other settings, splits, labels or features",
            remedy="give another output folder, or delete this one to begin anew",
        )
    if header.get("device") != device.type:
        raise ResumeError(
            f"{path} was made on {header.get('device')}, this run is on {device.type}",
            remedy="choose the same device, or begin anew in another folder",
        )
    return tensors, header


def _parameters(optimizer: AdamW) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _by_prefix(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        prefix, _, rest = name.partition(".")
        parts.setdefault(prefix, {})[rest] = value
    return parts
