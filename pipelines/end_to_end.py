"""The student's network trained end to end on LR tiles: on slide labels alone, the strongest control, or taught.

Taught, the losses are those of stage 2 and the network is not frozen: the teacher's probabilities and attention reach
the encoder, on slides whose labels are hidden too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lrmil.config import LossSettings, ModelSettings
from lrmil.data import BagBatch
from lrmil.distill.augment import stain_mixes, stained, turned
from lrmil.model import MILModel, MILOutput, build_model
from lrmil.trainer.steps import plain_step, student_step
from lrmil.trainer.targets import TeacherTargets
from pipelines.efficiency_settings import EndToEndSettings
from wsi_pipe.encoders import load_encoder
from wsi_pipe.encoders.pixels import Normaliser
from wsi_pipe.encoders.torch_encoder import TorchEncoder
from wsi_pipe.errors import ConfigError

__all__ = ["EndToEnd", "train_end_to_end"]

CPU = torch.device("cpu")
NORM_TILES = 512
"""Tiles over which batch norms are estimated anew in the end, as in distillation."""


class EndToEnd(nn.Module):
    """A tile network with an attention MIL head; a MIL model whose features are pixels.

    student: an encoder's name, whose weights are drawn anew, or the file of a distilled one, which are gone on from.
    """

    def __init__(self, student: str | Path, side_px: int, head: ModelSettings) -> None:
        super().__init__()
        source = _encoder(student, side_px)
        self.network = source.network
        self.network.requires_grad_(True)
        preprocessing = dataclasses.replace(source.recipe.preprocessing, input_px=side_px, resize_px=None)
        self._normalise = Normaliser(preprocessing, CPU)
        with torch.inference_mode():
            width = int(self.network.eval()(torch.zeros(1, 3, side_px, side_px)).shape[-1])
        self.head = build_model(dataclasses.replace(head, in_dim=width))
        # What a step of stage 2 asks of a MIL model.
        self.settings = self.head.settings
        self.instance_head = self.head.instance_head

    def tiles(self, pixels: Tensor) -> Tensor:
        """Features (T, D) of tiles, uint8 (T, S, S, 3)."""
        features: Tensor = self.network(self._normalise(pixels))
        return features

    def forward(self, pixels: Tensor, offsets: Tensor) -> MILOutput:
        """Of slides whose tiles, uint8 (T, S, S, 3), lie at ``offsets`` (B + 1,)."""
        output: MILOutput = self.head(self.tiles(pixels), offsets)
        return output


def _encoder(student: str | Path, side_px: int) -> TorchEncoder:
    if isinstance(student, Path):
        return cast(TorchEncoder, load_encoder(str(student), device="cpu", precision="float32"))
    try:
        encoder = load_encoder(student, device="cpu", precision="float32", random_weights=True, input_px=side_px)
    except ConfigError:
        # A ConvNet takes any side as it is.
        encoder = load_encoder(student, device="cpu", precision="float32", random_weights=True)
    return cast(TorchEncoder, encoder)


def train_end_to_end(
    tiles: Sequence[NDArray[np.uint8]],
    labels: NDArray[np.int64],
    train: Sequence[int],
    test: Sequence[int],
    *,
    classes: int,
    student: str | Path,
    head: ModelSettings,
    settings: EndToEndSettings,
    seed: int,
    targets: TeacherTargets | None = None,
    loss: LossSettings | None = None,
) -> NDArray[np.float64]:
    """Probabilities (test, C) of the model after its last step.

    Nothing is chosen by validation: ten cases choose worse than a schedule that ends at zero, so all labelled cases
    are learned from. tiles: of each slide, uint8 (N, S, S, 3). labels: (slides,), of which only those of ``train`` are
    read. Augmentation is that of distillation: turns, mirrors and stain. Classes weigh alike. targets, loss: the
    teacher's word on the slides of ``train``, and what it weighs; None for labels alone.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        head = dataclasses.replace(head, classes=classes, dropout=settings.dropout)
        model = EndToEnd(student, tiles[0].shape[1], head)
        decayed = [p for p in model.parameters() if p.ndim > 1]
        plain = [p for p in model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=settings.lr)
        rng = np.random.default_rng([seed, 1])
        count = np.bincount(labels[list(train)], minlength=classes).astype(np.float64)
        weights = torch.from_numpy((count.sum() / np.maximum(count, 1) / classes).astype(np.float32))
        step_of = plain_step(weights) if targets is None or loss is None else student_step(weights, loss, targets)
        order: list[int] = []
        for step in range(settings.steps):
            if not order:
                order = rng.permutation(np.asarray(train)).tolist()
            chosen, order = order[: settings.bags], order[settings.bags :]
            for group in optimizer.param_groups:
                group["lr"] = _rate(settings, step / settings.steps)
            model.train()
            batch = _batch(tiles, labels, chosen, settings.stain, rng)
            # A step asks nothing of a MIL model that this one has not.
            total = step_of(cast(MILModel, model), batch).total
            optimizer.zero_grad()
            total.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        _renew_norms(model, [tiles[i] for i in train], rng)
        return _logits(model, [tiles[i] for i in test]).softmax(1).double().numpy()


def _rate(settings: EndToEndSettings, at: float) -> float:
    """Linear warm-up, then a cosine to zero, as in distillation."""
    if at < settings.warmup:
        return settings.lr * (at + 1e-3) / settings.warmup
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (at - settings.warmup) / (1 - settings.warmup)))


def _batch(
    tiles: Sequence[NDArray[np.uint8]],
    labels: NDArray[np.int64],
    chosen: Sequence[int],
    stain: float,
    rng: np.random.Generator,
) -> BagBatch:
    """Some slides with their tiles augmented, each in its place."""
    bags = [tiles[i] for i in chosen]
    symmetries = rng.integers(0, 8, sum(map(len, bags)))
    pixels = turned(torch.from_numpy(np.concatenate(bags)), torch.from_numpy(symmetries))
    if stain > 0:
        mixes = stain_mixes(rng.random((len(pixels), 2, 3)), stain)
        pixels = stained(pixels, torch.from_numpy(mixes))
    offsets = _offsets(bags)
    segment = torch.repeat_interleave(torch.arange(len(bags)), offsets.diff())
    index = torch.tensor(list(chosen))
    known = torch.from_numpy(labels[index.numpy()])
    return BagBatch(pixels, offsets, segment, known, index)


def _offsets(bags: Sequence[NDArray[np.uint8]]) -> Tensor:
    return torch.from_numpy(np.cumsum([0, *map(len, bags)]).astype(np.int64))


@torch.no_grad()
def _logits(model: EndToEnd, bags: Sequence[NDArray[np.uint8]]) -> Tensor:
    model.eval()
    parts = []
    for start in range(0, len(bags), 16):
        part = bags[start : start + 16]
        parts.append(model(torch.from_numpy(np.concatenate(part)), _offsets(part)).logits)
    return torch.cat(parts)


@torch.no_grad()
def _renew_norms(model: EndToEnd, bags: Sequence[NDArray[np.uint8]], rng: np.random.Generator) -> None:
    """Batch norms from tiles as they are: running averages lag where there are few steps."""
    norms = [m for m in model.network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    pixels = np.concatenate(list(bags))
    pixels = pixels[rng.permutation(len(pixels))[:NORM_TILES]]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    for start in range(0, len(pixels), 64):
        if len(pixels) - start > 1:
            model.tiles(torch.from_numpy(pixels[start : start + 64]))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
