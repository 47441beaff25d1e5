"""The strongest control: the student's own network trained on LR tiles and slide labels, without any teacher."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lrmil.config import ModelSettings
from lrmil.distill.augment import stain_jitter, turn_tile
from lrmil.model import build_model
from pipelines.efficiency_settings import EndToEndSettings
from wsi_pipe.encoders import load_encoder
from wsi_pipe.encoders.pixels import Normaliser
from wsi_pipe.encoders.torch_encoder import TorchEncoder
from wsi_pipe.errors import ConfigError

__all__ = ["EndToEnd", "train_end_to_end"]

CPU = torch.device("cpu")
NORM_TILES = 512
"""Tiles over which batch norms are estimated anew before each look at validation, as in distillation."""


class EndToEnd(nn.Module):
    """A tile network with an attention MIL head; pixels in, logits of slides out."""

    def __init__(self, student: str, side_px: int, head: ModelSettings) -> None:
        super().__init__()
        try:
            encoder = load_encoder(student, device="cpu", precision="float32", random_weights=True, input_px=side_px)
        except ConfigError:
            # A ConvNet takes any side as it is.
            encoder = load_encoder(student, device="cpu", precision="float32", random_weights=True)
        source = cast(TorchEncoder, encoder)
        self.network = source.network
        self.network.requires_grad_(True)
        self._normalise = Normaliser(_as_they_are(source.recipe.preprocessing, side_px), CPU)
        with torch.inference_mode():
            width = int(self.network.eval()(torch.zeros(1, 3, side_px, side_px)).shape[-1])
        self.head = build_model(head if head.in_dim == width else _with_width(head, width))

    def forward(self, pixels: Tensor, offsets: Tensor) -> Tensor:
        """Logits (B, C) of slides whose tiles, uint8 (T, S, S, 3), lie at ``offsets`` (B + 1,)."""
        features = self.network(self._normalise(pixels))
        logits: Tensor = self.head(features, offsets).logits
        return logits


def _as_they_are(preprocessing, side_px):  # type: ignore[no-untyped-def]
    import dataclasses

    return dataclasses.replace(preprocessing, input_px=side_px, resize_px=None)


def _with_width(head: ModelSettings, width: int) -> ModelSettings:
    import dataclasses

    return dataclasses.replace(head, in_dim=width)


def train_end_to_end(
    tiles: Sequence[NDArray[np.uint8]],
    labels: NDArray[np.int64],
    train: Sequence[int],
    val: Sequence[int],
    test: Sequence[int],
    *,
    classes: int,
    student: str,
    head: ModelSettings,
    settings: EndToEndSettings,
    seed: int,
) -> tuple[NDArray[np.float64], float]:
    """Probabilities (test, C) of the model of the lowest validation loss, and that loss.

    tiles: of each slide, uint8 (N, S, S, 3). labels: (slides,), of which only those of ``train`` and ``val`` are read.
    Augmentation is that of distillation: turns, mirrors and stain. Classes weigh alike.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = EndToEnd(student, tiles[0].shape[1], _sized(head, classes, settings.dropout))
        decayed = [p for p in model.parameters() if p.ndim > 1]
        plain = [p for p in model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=settings.lr)
        rng = np.random.default_rng([seed, 1])
        count = np.bincount(labels[list(train)], minlength=classes).astype(np.float64)
        weights = torch.from_numpy((count.sum() / np.maximum(count, 1) / classes).astype(np.float32))
        order: list[int] = []
        best, best_loss = copy.deepcopy(model.state_dict()), math.inf
        for step in range(settings.steps):
            if not order:
                order = rng.permutation(np.asarray(train)).tolist()
            chosen, order = order[: settings.bags], order[settings.bags :]
            for group in optimizer.param_groups:
                group["lr"] = _rate(settings, step / settings.steps)
            model.train()
            pixels, offsets = _augmented([tiles[i] for i in chosen], settings.stain, rng)
            loss = F.cross_entropy(model(pixels, offsets), torch.from_numpy(labels[chosen]), weights)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if (step + 1) % settings.evaluate_every == 0 or step + 1 == settings.steps:
                _renew_norms(model, [tiles[i] for i in train], rng)
                logits = _logits(model, [tiles[i] for i in val])
                own = float(F.cross_entropy(logits, torch.from_numpy(labels[list(val)]), weights))
                if own < best_loss:
                    best, best_loss = copy.deepcopy(model.state_dict()), own
        model.load_state_dict(best)
        return _logits(model, [tiles[i] for i in test]).softmax(1).double().numpy(), best_loss


def _sized(head: ModelSettings, classes: int, dropout: float) -> ModelSettings:
    import dataclasses

    return dataclasses.replace(head, classes=classes, dropout=dropout)


def _rate(settings: EndToEndSettings, at: float) -> float:
    """Linear warm-up, then a cosine to zero, as in distillation."""
    if at < settings.warmup:
        return settings.lr * (at + 1e-3) / settings.warmup
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (at - settings.warmup) / (1 - settings.warmup)))


def _augmented(
    bags: Sequence[NDArray[np.uint8]], stain: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    turned = [stain_jitter(turn_tile(t, int(rng.integers(8))), stain, rng) for bag in bags for t in bag]
    return torch.from_numpy(np.stack(turned)), _offsets(bags)


def _offsets(bags: Sequence[NDArray[np.uint8]]) -> Tensor:
    return torch.from_numpy(np.cumsum([0, *map(len, bags)]).astype(np.int64))


@torch.no_grad()
def _logits(model: EndToEnd, bags: Sequence[NDArray[np.uint8]]) -> Tensor:
    model.eval()
    parts = []
    for start in range(0, len(bags), 16):
        part = bags[start : start + 16]
        parts.append(model(torch.from_numpy(np.concatenate(part)), _offsets(part)))
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
            model.network(model._normalise(torch.from_numpy(pixels[start : start + 64])))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
