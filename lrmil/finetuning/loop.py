"""The loop: an encoder and its MIL model by gradient steps on tiles, resumable to the bit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lrmil.checkpoint import optimizer_tensors, read_tensors, restore_optimizer, write_tensors
from lrmil.errors import DivergedError, ModelFileError, ResumeError
from lrmil.finetuning.batches import make_batch, offsets_of, plan_steps
from lrmil.finetuning.network import TileClassifier
from lrmil.finetuning.settings import FinetuneSettings
from lrmil.finetuning.tiles import TilePixels
from lrmil.model import MILModel
from lrmil.trainer.compute import rounding
from lrmil.trainer.steps import Step

__all__ = ["FINETUNE_STATE", "History", "fit_tiles", "slide_logits"]

FINETUNE_STATE = "lrmil.finetune-state"
NORM_TILES = 512
"""Tiles over which batch norms are estimated anew in the end, as in distillation."""
TILES_AT_ONCE = 256
"""In passes without gradient."""

Row = Mapping[str, float | None]


@dataclass
class History:
    """rows: figures of each pass over the slides. finished: whether the last step was taken."""

    rows: list[dict[str, float | None]] = field(default_factory=list)
    steps: int = 0
    finished: bool = False


def fit_tiles(
    model: TileClassifier,
    step_of: Step,
    pixels: TilePixels,
    labels: NDArray[np.int64],
    train: Sequence[int],
    settings: FinetuneSettings,
    *,
    device: torch.device,
    precision: torch.dtype = torch.float32,
    state: Path | None = None,
    run: str = "",
    progress: Callable[[Row], object] | None = None,
) -> History:
    """Train ``model`` in place; it ends in evaluation mode, as its last step leaves it.

    Nothing is chosen by validation: ten cases choose worse than a schedule that ends at zero, so all labelled slides
    are learned from. step_of: the loss of a batch. labels: int64 (slides,), of which those of ``train``, numbers of
    slides, are read. state: file that holds the run after every ``save_every`` passes over the slides; a run that
    finds one goes on as if it had never stopped. run: fingerprint of everything that decides the result. progress:
    called with the figures of each pass. Random numbers are torch's, and of the seed.

    Raises ResumeError when the state belongs to another run, DivergedError when the loss is not finite, and what
    reading a slide raises.
    """
    model.on(device)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate)
    rng = np.random.default_rng([settings.seed, 1])
    history = History()
    if state is not None and state.is_file():
        history = _resume(state, model, optimizer, run, device)
    plans = itertools.islice(plan_steps(pixels.lengths, train, settings, rng), history.steps, None)
    sums: dict[str, Tensor] = {}
    bags = 0
    for plan in plans:
        rate = _rate(settings, plan.step / settings.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        model.train()
        batch = make_batch(pixels, labels, plan, device)
        with rounding(device, precision):
            # A step asks nothing of a MIL model that this one has not.
            loss = step_of(cast(MILModel, model), batch)
        optimizer.zero_grad()
        loss.total.backward()  # type: ignore[no-untyped-call]
        if settings.clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        bags += len(plan.bags)
        for name, value in {"loss": loss.total.detach(), **loss.terms}.items():
            sums[name] = sums.get(name, 0.0) + value * len(plan.bags)
        if not plan.last:
            continue
        history.steps = plan.step + 1
        means = {f"train_{name}": float(value) / bags for name, value in sums.items()}
        if not math.isfinite(means["train_loss"]):
            raise DivergedError(
                f"the loss is {means['train_loss']} after {history.steps} steps", remedy="lower the learning rate"
            )
        history.rows.append(
            {"epoch": len(history.rows) + 1.0, "step": float(history.steps), "learning_rate": rate, **means}
        )
        sums, bags = {}, 0
        if state is not None and settings.save_every and len(history.rows) % settings.save_every == 0:
            _save(state, model, optimizer, history, run, device)
        if progress is not None:
            progress(history.rows[-1])
    if not history.finished:
        _renew_norms(model, pixels, train, rng, device)
        history.finished = True
        if state is not None and settings.save_every:
            _save(state, model, optimizer, history, run, device)
    model.eval()
    return history


def _rate(settings: FinetuneSettings, at: float) -> float:
    """Linear warm-up, then a cosine to zero, as in distillation."""
    if at < settings.warmup:
        return settings.learning_rate * (at + 1e-3) / settings.warmup
    part = (at - settings.warmup) / (1 - settings.warmup)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * part))


@torch.no_grad()
def slide_logits(
    model: TileClassifier, pixels: TilePixels, numbers: Sequence[int], *, device: torch.device
) -> NDArray[np.float32]:
    """Logits (slides, C) of slides by all their tiles, in float32 and evaluation mode."""
    model.eval()
    found = np.empty((len(numbers), model.settings.classes), np.float32)
    for place, number in enumerate(numbers):
        (own,) = pixels.fetch([(number, None)])
        starts = range(0, len(own), TILES_AT_ONCE)
        parts = [torch.from_numpy(own[start : start + TILES_AT_ONCE]).to(device) for start in starts]
        features = torch.cat([model.tiles(part) for part in parts])
        logits = model.head(features, offsets_of([len(features)]).to(device)).logits
        found[place] = logits[0].float().cpu().numpy()
    return found


@torch.no_grad()
def _renew_norms(
    model: TileClassifier, pixels: TilePixels, train: Sequence[int], rng: np.random.Generator, device: torch.device
) -> None:
    """Batch norms from tiles as they are: running averages lag where there are few steps."""
    norms = [m for m in model.network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    starts = np.cumsum([0, *pixels.lengths[list(train)].tolist()])
    chosen = rng.permutation(int(starts[-1]))[:NORM_TILES]
    bag = np.searchsorted(starts, chosen, "right") - 1
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    for start in range(0, len(chosen), 64):
        part = slice(start, start + 64)
        if len(chosen[part]) > 1:
            tiles = _at(pixels, [train[b] for b in bag[part].tolist()], chosen[part] - starts[bag[part]])
            model.tiles(torch.from_numpy(tiles).to(device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _at(pixels: TilePixels, numbers: Sequence[int], rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Single tiles of several slides, uint8 (B, S, S, 3); each slide is asked once."""
    out = np.empty((len(rows), pixels.side_px, pixels.side_px, 3), np.uint8)
    wanted = {number: np.flatnonzero(np.asarray(numbers) == number) for number in dict.fromkeys(numbers)}
    # Readers take rows in rising order.
    sorted_rows = {number: np.unique(rows[at]) for number, at in wanted.items()}
    for own, (number, at) in zip(pixels.fetch([*sorted_rows.items()]), wanted.items(), strict=True):
        out[at] = own[np.searchsorted(sorted_rows[number], rows[at])]
    return out


def _save(
    path: Path,
    model: TileClassifier,
    optimizer: torch.optim.Optimizer,
    history: History,
    run: str,
    device: torch.device,
) -> None:
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()} | optimizer_tensors(optimizer)
    tensors["random.cpu"] = torch.random.get_rng_state()
    if device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(device)
    header: dict[str, Any] = {
        "run": run,
        "device": device.type,
        "steps": history.steps,
        "rows": history.rows,
        "finished": history.finished,
    }
    write_tensors(path, tensors, FINETUNE_STATE, header)


def _resume(
    path: Path, model: TileClassifier, optimizer: torch.optim.Optimizer, run: str, device: torch.device
) -> History:
    try:
        tensors, header = read_tensors(path, FINETUNE_STATE)
    except ModelFileError as error:
        raise ResumeError(f"{path} cannot be resumed: {error.message}", remedy="delete it to start anew") from error
    if header.get("run") != run:
        raise ResumeError(
            f"{path} belongs to a run with other settings, splits, labels, slides, encoder or teacher",
            remedy="give another --out, or delete it",
        )
    if header.get("device") != device.type:
        raise ResumeError(
            f"{path} was made on {header.get('device')}, this run is on {device.type}",
            remedy="choose the same device, or begin anew in another folder",
        )
    model.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("model.")})
    restore_optimizer(optimizer, tensors)
    torch.random.set_rng_state(tensors["random.cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random.cuda"], device)
    return History(list(header["rows"]), int(header["steps"]), bool(header["finished"]))
