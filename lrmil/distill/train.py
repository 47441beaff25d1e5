"""Stage 1 itself: one loop over LR tiles, with the losses of ``lrmil.losses``, resumable to the bit."""

from __future__ import annotations

import copy
import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lrmil.checkpoint import read_tensors, write_tensors
from lrmil.distill.children import turn
from lrmil.distill.evaluate import RunningAgreement, child_targets, final_target
from lrmil.distill.pixels import PixelBatch, PixelSource
from lrmil.distill.settings import DistillSettings
from lrmil.distill.student import Student, StudentOutput
from lrmil.distill.targets import DistillSlide, TargetStats
from lrmil.errors import DivergedError, ModelFileError, ResumeError
from lrmil.losses import final_distillation_loss, patch_distillation_loss
from wsi_pipe.encoders.recipe import Preprocessing
from wsi_pipe.encoders.torch_encoder import normalise

__all__ = ["DistillHistory", "distill"]

STATE_KIND = "lrmil.distill-state"

NORM_TILES = 512
"""Tiles of an epoch, the last ones, over which batch norms are estimated anew."""


@dataclass
class DistillHistory:
    """Figures by epoch. epochs: one mapping each, of "loss", "val_loss" and agreement by layer. best: from 1."""

    epochs: list[dict[str, float]] = field(default_factory=list)
    best: int = 0
    finished: bool = False


class _Targets:
    """Targets of one set of slides, gathered batch by batch on the device."""

    def __init__(self, slides: Sequence[DistillSlide], stats: TargetStats, device: torch.device) -> None:
        self.slides, self.stats, self.device = slides, stats, device
        self.k = slides[0].children.k

    def of(self, batch: PixelBatch) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """Layers T_l (B, k*k, C_l), final (B, k*k, D), mask and weights (B, k*k), turned as the tiles are."""
        rows, weights = [], []
        for slide, tile, symmetry in zip(batch.slide, batch.tile, batch.symmetry, strict=True):
            one = self.slides[slide]
            rows.append(turn(one.children.children[tile], self.k, int(symmetry)))
            weights.append(turn(one.weights[tile], self.k, int(symmetry)))
        children = np.stack(rows)
        means, stds = self.stats.layer_mean, self.stats.layer_std
        layers = [
            self._gather(batch, children, [slide.layers[i] for slide in self.slides], means[i], stds[i])
            for i in range(len(means))
        ]
        everything = [slide.final for slide in self.slides]
        final = self._gather(batch, children, everything, self.stats.final_mean, self.stats.final_std)
        mask = torch.from_numpy(children >= 0).to(self.device)
        return layers, final, mask, torch.from_numpy(np.stack(weights)).float().to(self.device)

    def _gather(
        self,
        batch: PixelBatch,
        children: NDArray[Any],
        values: Sequence[NDArray[np.floating[Any]]],
        mean: NDArray[np.float32],
        std: NDArray[np.float32],
    ) -> Tensor:
        out = np.zeros((*children.shape, len(mean)), np.float32)
        for i, slide in enumerate(batch.slide):
            present = children[i] >= 0
            data = values[slide][children[i][present].astype(np.int64)]
            out[i, present] = (np.asarray(data, np.float32) - mean) / std
        return torch.from_numpy(out).to(self.device)


def distill(
    student: Student,
    preprocessing: Preprocessing,
    train: Sequence[DistillSlide],
    val: Sequence[DistillSlide],
    stats: TargetStats,
    settings: DistillSettings,
    *,
    device: torch.device,
    precision: torch.dtype,
    state: Path | None = None,
    run: str = "",
    progress: Callable[[Mapping[str, float], int], object] | None = None,
) -> DistillHistory:
    """Train ``student`` in place; it ends with its best weights by validation loss (by training loss without ``val``).

    state: file that holds the run after every epoch; a run that finds one goes on as if it had never stopped. run:
    fingerprint of everything that decides the result. progress: called with the figures and the number of each epoch.
    Raises ResumeError when the state belongs to another run, DivergedError when the loss is not finite.
    """
    student.to(device)
    student.requires_grad_(True)
    optimizer = _optimizer(student, settings)
    history, best_value = DistillHistory(), math.inf
    best = {name: value.detach().cpu().clone() for name, value in student.state_dict().items()}
    if state is not None and state.is_file():
        history, best_value, best = _resume(state, student, optimizer, run)
    source = PixelSource(train, settings)
    targets = _Targets(train, stats, device)
    val_source = PixelSource(val, settings) if val else None
    val_targets = _Targets(val, stats, device) if val else None
    steps = max(math.ceil(len(source) / settings.batch_size), 1)
    while not history.finished:
        epoch = len(history.epochs)
        # Everything random in an epoch comes from its number, so a resumed run meets the same.
        torch.manual_seed(settings.seed * 100_003 + epoch)
        figures = {
            "loss": _epoch(student, preprocessing, source, targets, optimizer, settings, epoch, steps, precision)
        }
        if val_source is not None and val_targets is not None:
            figures |= _validate(student, preprocessing, val_source, val_targets, settings, precision)
        watched = figures.get("val_loss", figures["loss"])
        if not math.isfinite(watched):
            raise DivergedError(f"epoch {epoch + 1}: the loss is {watched}", remedy="lower lr")
        history.epochs.append(figures)
        if watched < best_value:
            best_value, history.best = watched, epoch + 1
            best = {name: value.detach().cpu().clone() for name, value in student.state_dict().items()}
        done = epoch + 1
        history.finished = done >= settings.epochs or done - history.best >= settings.patience
        if state is not None:
            _save(state, student, optimizer, best, history, best_value, run)
        if progress:
            progress(figures, done)
    student.load_state_dict(best)
    return history


def _optimizer(student: Student, settings: DistillSettings) -> torch.optim.AdamW:
    decayed = [p for p in student.parameters() if p.ndim > 1]
    plain = [p for p in student.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr)


def _rate(settings: DistillSettings, at: float) -> float:
    """Learning rate at a share of the run: linear warm-up, then a cosine to zero."""
    if at < settings.warmup:
        return settings.lr * at / settings.warmup
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (at - settings.warmup) / (1 - settings.warmup)))


def losses_of(
    output: StudentOutput,
    targets: tuple[list[Tensor], Tensor, Tensor, Tensor],
    variance: Tensor,
    settings: DistillSettings,
) -> Tensor:
    """The weighted sum of ``L_patch`` and ``L_final``; layers may differ in width."""
    layers, final, mask, weights = targets
    loss = output.final.new_zeros((), dtype=torch.float32)
    if settings.patch:
        per_layer = [
            patch_distillation_loss(p[None], t[None], mask, variance[i : i + 1])
            for i, (p, t) in enumerate(zip(output.patches, layers, strict=True))
        ]
        loss = loss + settings.patch * torch.stack(per_layer).mean()
    if settings.final:
        loss = loss + settings.final * final_distillation_loss(output.final, final, weights)
    return loss


def _variance(targets: _Targets, settings: DistillSettings) -> Tensor:
    values = targets.stats.variance if settings.layer_variance else np.ones_like(targets.stats.variance)
    return torch.from_numpy(values).to(targets.device)


def _forward(
    student: Student, pixels: NDArray[np.uint8], pre: Preprocessing, device: torch.device, precision: torch.dtype
) -> StudentOutput:
    images = normalise(torch.from_numpy(np.ascontiguousarray(pixels)).to(device), pre)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
        output: StudentOutput = student(images)
    return output


def _epoch(
    student: Student,
    pre: Preprocessing,
    source: PixelSource,
    targets: _Targets,
    optimizer: torch.optim.Optimizer,
    settings: DistillSettings,
    epoch: int,
    steps: int,
    precision: torch.dtype,
) -> float:
    student.train()
    variance = _variance(targets, settings)
    total, count = 0.0, 0
    recent: deque[NDArray[np.uint8]] = deque(maxlen=max(NORM_TILES // settings.batch_size, 1))
    for step, batch in enumerate(source.shuffled([settings.seed, epoch])):
        for group in optimizer.param_groups:
            group["lr"] = _rate(settings, min((epoch + (step + 1) / steps) / settings.epochs, 1.0))
        output = _forward(student, batch.pixels, pre, targets.device, precision)
        loss = losses_of(output, targets.of(batch), variance, settings)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(student.parameters(), settings.clip)
        optimizer.step()
        total += float(loss.detach()) * len(batch.tile)
        count += len(batch.tile)
        recent.append(batch.pixels)
    _settle_norms(student, pre, recent, targets.device, precision)
    return total / max(count, 1)


@torch.no_grad()
def _settle_norms(
    student: Student,
    pre: Preprocessing,
    recent: Iterable[NDArray[np.uint8]],
    device: torch.device,
    precision: torch.dtype,
) -> None:
    """Means and variances of batch norms, anew over the last batches as the weights now are.

    Their running averages lag by tens of steps, which on few slides is many epochs: the network that is validated and
    exported would not be the one that is trained. Wu and Johnson 2021 ("Rethinking 'batch' in BatchNorm") call it
    precise BN.
    """
    norms = [m for m in student.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches
    for pixels in recent:
        _forward(student, pixels, pre, device, precision)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


@torch.inference_mode()
def _validate(
    student: Student,
    pre: Preprocessing,
    source: PixelSource,
    targets: _Targets,
    settings: DistillSettings,
    precision: torch.dtype,
) -> dict[str, float]:
    student.eval()
    stats, slides = targets.stats, targets.slides
    variance = _variance(targets, settings)
    layers = [RunningAgreement(m, s) for m, s in zip(stats.layer_centre, stats.layer_std, strict=True)]
    final = RunningAgreement(stats.final_centre, stats.final_std)
    total, count = 0.0, 0
    wanted = {i: final_target(slide) for i, slide in enumerate(slides)}
    children = {i: [child_targets(s, n) for n in range(len(layers))] for i, s in enumerate(slides)}
    for batch in source.in_order():
        output = _forward(student, batch.pixels, pre, targets.device, precision)
        total += float(losses_of(output, targets.of(batch), variance, settings)) * len(batch.tile)
        count += len(batch.tile)
        slide = int(batch.slide[0])
        for n, patches in enumerate(output.patches):
            values, present = children[slide][n]
            predicted = patches.float().cpu().numpy() * stats.layer_std[n] + stats.layer_mean[n]
            mask = present[batch.tile]
            layers[n].add(predicted[mask], values[batch.tile][mask])
        predicted = output.final.float().cpu().numpy() * stats.final_std + stats.final_mean
        final.add(predicted, wanted[slide][batch.tile])
    figures = {"val_loss": total / max(count, 1)}
    for name, running in [*((f"layer{n}", r) for n, r in enumerate(layers)), ("final", final)]:
        agreement = running.result()
        figures[f"{name}_explained_variance"] = agreement.explained_variance
        figures[f"{name}_cosine"] = agreement.cosine
    return figures


def _save(
    path: Path,
    student: Student,
    optimizer: torch.optim.Optimizer,
    best: Mapping[str, Tensor],
    history: DistillHistory,
    best_value: float,
    run: str,
) -> None:
    tensors = {f"model.{n}": v for n, v in student.state_dict().items()} | {f"best.{n}": v for n, v in best.items()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, parameter in enumerate(parameters):
        for moment, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{i}.{moment}"] = torch.as_tensor(value)
    header: dict[str, Any] = {
        "run": run, "best": history.best, "finished": history.finished, "epochs": json.dumps(history.epochs),
        "best_value": best_value,
    }  # fmt: skip
    write_tensors(path, tensors, STATE_KIND, header)


def _resume(
    path: Path, student: Student, optimizer: torch.optim.AdamW, run: str
) -> tuple[DistillHistory, float, dict[str, Tensor]]:
    try:
        tensors, header = read_tensors(path, STATE_KIND)
    except ModelFileError as error:
        raise ResumeError(f"{path} cannot be resumed: {error.message}", remedy="delete it to start anew") from error
    if header.get("run") != run:
        raise ResumeError(
            f"{path} belongs to a run with other settings, splits or slides", remedy="give another --out, or delete it"
        )
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        head, _, rest = name.partition(".")
        parts[head][rest] = tensor
    student.load_state_dict(parts["model"])
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, tensor in parts["optimizer"].items():
        number, _, moment = name.partition(".")
        parameter = parameters[int(number)]
        # AdamW keeps its step count on the CPU.
        place = tensor if moment == "step" else tensor.to(parameter.device)
        optimizer.state[parameter][moment] = copy.copy(place)
    history = DistillHistory(json.loads(header["epochs"]), int(header["best"]), bool(header["finished"]))
    return history, float(header["best_value"]), parts["best"]
