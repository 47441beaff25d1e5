"""Stage 1 itself: one loop over LR tiles, with the losses of ``lrmil.losses``, resumable to the bit."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lrmil.checkpoint import optimizer_tensors, read_tensors, restore_optimizer, write_tensors
from lrmil.distill.feed import Feed, ReadyBatch, TargetBatch
from lrmil.distill.pixels import PixelSource
from lrmil.distill.ranks import ALONE, Ranks
from lrmil.distill.settings import DistillSettings
from lrmil.distill.student import Student, StudentOutput
from lrmil.distill.targets import DistillSlide, Lesson, TargetStats
from lrmil.distill.validation import judged, judges_for
from lrmil.errors import DivergedError, ModelFileError, ResumeError
from lrmil.losses import final_distillation_loss, patch_distillation_loss
from wsi_pipe.encoders.pixels import Normaliser
from wsi_pipe.encoders.recipe import Preprocessing
from wsi_pipe.files import parse_json

__all__ = ["DistillHistory", "Runner", "distill", "losses_of", "make_optimizer", "train_step", "variances_of"]

STATE_KIND = "lrmil.distill-state"

NORM_TILES = 512
"""Tiles of an epoch, the last ones, over which batch norms are estimated anew."""


@dataclass
class DistillHistory:
    """Figures by epoch. epochs: one mapping each, of "loss", "val_loss" and agreement by layer. best: from 1."""

    epochs: list[dict[str, float]] = field(default_factory=list)
    best: int = 0
    finished: bool = False


class Runner:
    """Runs a student on tiles, uint8 (B, S, S, 3) on the device, with the numbers of ``precision``."""

    def __init__(
        self, student: Student, preprocessing: Preprocessing, device: torch.device, precision: torch.dtype
    ) -> None:
        self.student, self.device = student, device
        self.trained: nn.Module = student
        """What calls the student in training: of several processes, what shares the gradients."""
        self._half = precision == torch.bfloat16
        self._normalise = Normaliser(preprocessing, device)

    def __call__(self, pixels: Tensor) -> StudentOutput:
        """Features and token maps, see ``Student``."""
        images = self._normalise(pixels)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._half):
            called = self.trained if self.student.training and torch.is_grad_enabled() else self.student
            output: StudentOutput = called(images)
        return output


class _LossSum:
    """The mean loss over tiles, in float64, summed where the losses are: reading each would wait for its step."""

    def __init__(self, device: torch.device) -> None:
        # Apple's GPUs have no float64.
        self._total = torch.zeros((), dtype=torch.float64, device="cpu" if device.type == "mps" else device)
        self._count = 0.0

    def add(self, loss: Tensor, tiles: float) -> None:
        """loss: the mean over ``tiles``."""
        self._total += loss.detach().to(self._total.device).double() * tiles
        self._count += tiles

    def mean(self, ranks: Ranks = ALONE) -> float:
        """Over the tiles of all processes; 0 where nothing was added."""
        total, count = ranks.summed(np.array([float(self._total), self._count])).tolist()
        return float(total / max(count, 1))


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
    name: str = "",
    more: Sequence[tuple[Lesson, Lesson]] = (),
    ranks: Ranks = ALONE,
    progress: Callable[[Mapping[str, float], int], object] | None = None,
) -> DistillHistory:
    """Train ``student`` in place; it ends with its best weights by validation loss (by training loss without ``val``).

    state: file that holds the run after every epoch; a run that finds one goes on as if it had never stopped. run:
    fingerprint of everything that decides the result. name: of the teacher in figures, where there are several. more:
    lessons of other teachers on the same training and validation slides, as the student has heads for. ranks: this
    process among several that call this with the same arguments but for the device; each takes its share of every
    batch, so that all end with the weights that one alone would, but for rounding (batch norms, on a CPU, see the
    share alone), and the first one writes ``state``. progress: called with the figures and the number of each epoch.
    Raises ResumeError when the state belongs to another run, DivergedError when the loss is not finite.
    """
    student.to(device)
    student.requires_grad_(True)
    optimizer = make_optimizer(student, settings)
    history, best_value = DistillHistory(), math.inf
    best = {name: value.detach().cpu().clone() for name, value in student.state_dict().items()}
    if state is not None and state.is_file():
        history, best_value, best = _resume(state, student, optimizer, run)
    run_student = Runner(student, preprocessing, device, precision)
    others = [lesson for lesson, _ in more], [lesson for _, lesson in more]
    feed = Feed(PixelSource(train, settings, ranks=ranks), stats, device, name=name, more=others[0])
    # Validation slides are dealt out whole.
    held = slice(ranks.rank, None, ranks.count)
    own_val = val[held]
    dealt = [dataclasses.replace(lesson, slides=lesson.slides[held]) for lesson in others[1]]
    val_feed = Feed(PixelSource(own_val, settings), stats, device, name=name, more=dealt) if own_val else None
    if ranks.count > 1:
        run_student.trained = _shared(student, device)
    steps = max(math.ceil(len(feed) / settings.batch_size), 1)
    while not history.finished:
        epoch = len(history.epochs)
        # Everything random in an epoch comes from its number, so a resumed run meets the same.
        torch.manual_seed(settings.seed * 100_003 + epoch + 50_000_017 * ranks.rank)
        figures = {"loss": _epoch(run_student, feed, optimizer, settings, epoch, steps, ranks)}
        if val:
            figures |= _validate(run_student, val_feed, feed, settings, ranks)
        watched = figures.get("val_loss", figures["loss"])
        if not math.isfinite(watched):
            raise DivergedError(f"epoch {epoch + 1}: the loss is {watched}", remedy="lower lr")
        history.epochs.append(figures)
        if watched < best_value:
            best_value, history.best = watched, epoch + 1
            best = {name: value.detach().cpu().clone() for name, value in student.state_dict().items()}
        done = epoch + 1
        history.finished = done >= settings.epochs or done - history.best >= settings.patience
        if state is not None and ranks.first:
            _save(state, student, optimizer, best, history, best_value, run)
        if progress:
            progress(figures, done)
    student.load_state_dict(best)
    return history


def _shared(student: Student, device: torch.device) -> nn.Module:
    """The student as several processes train it: what it is called by adds up their gradients.

    Batch norms see the tiles of all processes on GPUs; on CPUs torch has no such thing, and each sees its own.
    """
    from torch.nn.parallel import DistributedDataParallel

    cuda = device.type == "cuda"
    if cuda:
        # timm does not mark it as exported, though its training script uses it from here.
        layers: Any = importlib.import_module("timm.layers")
        layers.convert_sync_batchnorm(student.network)
        student.to(device)
    # Which weights a loss does not reach, as with one loss of the two, stays the same from step to step.
    return DistributedDataParallel(student, device_ids=[device] if cuda else None, static_graph=True)


def make_optimizer(student: Student, settings: DistillSettings) -> torch.optim.AdamW:
    """AdamW as training begins with it: weights decay, biases and norms do not."""
    decayed = [p for p in student.parameters() if p.ndim > 1]
    plain = [p for p in student.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr)


def _rate(settings: DistillSettings, at: float) -> float:
    """Learning rate at a share of the run: linear warm-up, then a cosine to zero, or the same rate to the end."""
    if at < settings.warmup:
        return settings.lr * at / settings.warmup
    if settings.schedule == "constant":
        return settings.lr
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (at - settings.warmup) / (1 - settings.warmup)))


def losses_of(
    output: StudentOutput,
    targets: TargetBatch,
    variance: Tensor,
    settings: DistillSettings,
    shares: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """The weighted sum of ``L_patch`` and ``L_final``; layers may differ in width.

    shares: what the first and the second are multiplied with, see ``PixelBatch``.

    variance: (L + 1,) float, of the layers and, last, of the final features, by which both losses are divided: where
    only one is, a ViT's copy begins with one loss hundreds of times the other.
    """
    loss = output.final.new_zeros((), dtype=torch.float32)
    if settings.patch:
        per_layer = [
            patch_distillation_loss(p[None], t[None], targets.mask, variance[i : i + 1])
            for i, (p, t) in enumerate(zip(output.patches, targets.layers, strict=True))
        ]
        loss = loss + settings.patch * shares[0] * torch.stack(per_layer).mean()
    if settings.final:
        final = final_distillation_loss(output.final, targets.final, targets.weights)
        loss = loss + settings.final * shares[1] * final / variance[-1].to(final.dtype)
    return loss


def variances_of(feed: Feed, settings: DistillSettings) -> list[Tensor]:
    """See ``losses_of``, for each teacher."""
    found = []
    for lesson in feed.lessons:
        values = np.append(lesson.stats.variance, np.float32(lesson.stats.final_variance))
        values = values if settings.layer_variance else np.ones_like(values)
        found.append(torch.from_numpy(values).to(feed.device))
    return found


def _loss(output: StudentOutput, batch: ReadyBatch, variances: Sequence[Tensor], settings: DistillSettings) -> Tensor:
    """The mean of the losses over teachers."""
    shares = batch.source.shares
    losses = [
        losses_of(output.of(n), batch.of(n).targets, variance, settings, shares) for n, variance in enumerate(variances)
    ]
    return losses[0] if len(losses) == 1 else torch.stack(losses).mean()


def train_step(
    run: Runner,
    batch: ReadyBatch,
    variances: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    settings: DistillSettings,
) -> Tensor:
    """One step on a batch that is ready; its loss."""
    loss = _loss(run(batch.pixels), batch, variances, settings)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    if settings.clip:
        torch.nn.utils.clip_grad_norm_(run.student.parameters(), settings.clip)
    optimizer.step()
    return loss


def _epoch(
    run: Runner,
    feed: Feed,
    optimizer: torch.optim.Optimizer,
    settings: DistillSettings,
    epoch: int,
    steps: int,
    ranks: Ranks,
) -> float:
    student = run.student
    student.train()
    variances = variances_of(feed, settings)
    losses = _LossSum(feed.device)
    recent: deque[Tensor] = deque(maxlen=max(NORM_TILES // settings.batch_size, 1))
    with closing(feed.shuffled([settings.seed, epoch])) as batches:
        for step, batch in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = _rate(settings, min((epoch + (step + 1) / steps) / settings.epochs, 1.0))
            loss = train_step(run, batch, variances, optimizer, settings)
            # With shares, the mean over processes is the mean over the tiles of all.
            tiles = len(batch.source.tile) if ranks.count == 1 else batch.source.tiles / ranks.count
            losses.add(loss, tiles)
            recent.append(batch.pixels)
    _settle_norms(run, recent, ranks)
    return losses.mean(ranks)


@torch.no_grad()
def _settle_norms(run: Runner, recent: Iterable[Tensor], ranks: Ranks = ALONE) -> None:
    """Means and variances of batch norms, anew over the last batches as the weights now are.

    Their running averages lag by tens of steps, which on few slides is many epochs: the network that is validated and
    exported would not be the one that is trained. Wu and Johnson 2021 ("Rethinking 'batch' in BatchNorm") call it
    precise BN.
    """
    norms = [
        m for m in run.student.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches
    for pixels in recent:
        run(pixels)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        for values in (norm.running_mean, norm.running_var):
            if ranks.count > 1 and values is not None:
                mean = ranks.summed(values.double().cpu().numpy()) / ranks.count
                values.copy_(torch.from_numpy(mean))


@torch.inference_mode()
def _validate(
    run: Runner, feed: Feed | None, trained: Feed, settings: DistillSettings, ranks: Ranks = ALONE
) -> dict[str, float]:
    """feed: this process's slides, None where it has none. trained: has the same lessons, and the device."""
    run.student.eval()
    variances = variances_of(trained, settings)
    losses, judges = _LossSum(trained.device), judges_for(trained if feed is None else feed)
    if feed is not None:
        with closing(feed.in_order()) as batches:
            for batch in batches:
                output = run(batch.pixels)
                losses.add(_loss(output, batch, variances, settings), len(batch.source.tile))
                for n, judge in enumerate(judges):
                    judge.add(output.of(n), batch.of(n))
    return {"val_loss": losses.mean(ranks)} | judged(judges, ranks)


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
    tensors |= optimizer_tensors(optimizer)
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
    restore_optimizer(optimizer, tensors)
    history = DistillHistory(parse_json(header["epochs"]), int(header["best"]), bool(header["finished"]))
    return history, float(header["best_value"]), parts["best"]
