"""Many small attention networks trained at once, as one stack of matrices.

A small cohort takes a network of a few thousand weights, and a step of it is over before the processor has warmed to
it. Networks that differ by their random numbers, and by the cases that they leave out, do the same work on the same
bags, so they are trained together: one product serves all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lrmil.config import ModelSettings
from lrmil.data import plan_batches
from lrmil.model.attention import ABMIL
from lrmil.model.fused import byte_dropout
from lrmil.store import ResidentStore
from lrmil.targets import Target
from lrmil.targets.base import truth_without
from lrmil.trainer.optimise import AdamW

__all__ = ["Recipe", "Trained", "train_replicas"]

STACK_NUMBERS = 1 << 23
"""Projected numbers of all networks together in one step, which bounds its memory."""
KEPT_NUMBERS = 1 << 24
"""Numbers of standardised features that are kept, 64 MiB."""


@dataclass(frozen=True)
class Recipe:
    """How the networks are trained. look_every: epochs between looks at the bags that are left out."""

    epochs: int
    learning_rate: float
    weight_decay: float
    clip_norm: float
    look_every: int = 2
    steps_an_epoch: int = 6
    least_bags: int = 8


@dataclass(frozen=True)
class Trained:
    """epochs: at which was looked, from 1. held_out: outputs (looks, R, N, C), NaN where a network trained on the bag.

    losses: training loss of each epoch, mean over the networks. stacks: their weights at each look, on the CPU.
    """

    epochs: tuple[int, ...]
    held_out: NDArray[np.float64]
    losses: tuple[float, ...]
    stacks: tuple[dict[str, Tensor], ...]


def train_replicas(
    store: ResidentStore,
    train: NDArray[np.int64],
    truth: NDArray[Any],
    target: Target,
    left_out: NDArray[np.bool_],
    settings: ModelSettings,
    recipe: Recipe,
    moments: tuple[Tensor, Tensor],
    seed: int,
    enough: Callable[[NDArray[np.float64]], bool],
) -> Trained:
    """Train R networks of ``settings`` (ABMIL, gated or not) on the bags ``train``.

    truth: of these bags; target: gives the loss. left_out: (R, N), which bags each network does not see. moments:
    shift and scale (D,) of the features. Random numbers are torch's; seed: of the order of the bags. enough: asked
    after each look, with the outputs of the bags left out, whether to end before the last epoch.
    """
    device, count = store.device, len(left_out)
    stack = _initial(settings, count, device)
    names = list(stack)
    decayed = [stack[n] for n in names if not n.endswith("bias")]
    plain = [stack[n] for n in names if n.endswith("bias")]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    bags_of = _Bags(store, train, moments)
    optimizer = AdamW(groups, recipe.learning_rate)
    # A network does not know the truth of the bags that it leaves out.
    seen = torch.from_numpy(~left_out).to(device)
    known = torch.from_numpy(truth if truth.ndim == 1 else truth.astype(np.float32)).to(device)
    own = truth_without(known.expand(count, *known.shape), seen)
    whole: Tensor | None = None
    per_step = max(recipe.least_bags, math.ceil(len(train) / recipe.steps_an_epoch))
    rows = max(1, STACK_NUMBERS // (count * settings.hidden))
    place = np.full(len(store), -1, np.int64)
    place[train] = np.arange(len(train))
    looks: list[int] = []
    found: list[NDArray[np.float64]] = []
    losses: list[float] = []
    stacks: list[dict[str, Tensor]] = []
    for epoch in range(1, recipe.epochs + 1):
        order_seed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
        plan = plan_batches(store.lengths, train, token_budget=rows, shuffle_seed=order_seed, max_bags=per_step)
        total = 0.0
        for chosen in plan:
            bags = torch.from_numpy(place[chosen]).to(device)
            logits = _forward(stack, *bags_of(chosen), settings, training=True)
            if target.relative:
                # Bags are compared with all others, those of other steps as they were seen last.
                if whole is None:
                    whole = torch.cat(list(_look(stack, store, train, bags_of, settings, rows)), 1)
                asked, wanted = whole.index_copy(1, bags, logits), own
                whole = asked.detach()
            else:
                asked, wanted = logits, own[:, bags]
            found_losses, counts = target.losses(asked, wanted)
            by_network = found_losses.sum(1) / counts.sum(1).clamp_min(1)
            optimizer.zero_grad()
            by_network.sum().backward()  # type: ignore[no-untyped-call]
            _clip(stack, recipe.clip_norm)
            optimizer.step()
            total += float(by_network.detach().mean()) * len(chosen) / len(train)
        losses.append(total)
        if epoch % recipe.look_every and epoch != recipe.epochs:
            continue
        looks.append(epoch)
        logits = torch.cat(list(_look(stack, store, train, bags_of, settings, rows)), 1).double().cpu()
        outputs = target.centred(logits.numpy(), ~left_out)
        found.append(np.where(left_out[:, :, None], outputs, np.nan))
        stacks.append({name: value.detach().cpu().clone() for name, value in stack.items()})
        if enough(found[-1]):
            break
    return Trained(tuple(looks), np.stack(found), tuple(losses), tuple(stacks))


def unstack(stack: dict[str, Tensor], which: int, settings: ModelSettings, mean: Tensor, std: Tensor | None) -> ABMIL:
    """One network as a model of its own."""
    module = ABMIL(settings)
    if std is not None:
        module.standardise(mean, std)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in stack:
                parameter.copy_(stack[name][which].T.reshape(parameter.shape))
        module.attention_score.bias.zero_()
    return module.eval()


def _initial(settings: ModelSettings, count: int, device: torch.device) -> dict[str, Tensor]:
    """Weights as ``torch.nn.Linear`` draws them, (R, in, out), and biases (R, 1, out), by the names of ``ABMIL``."""
    inner = settings.attention_dim * (1 if settings.name == "abmil" else 2)
    shapes = {
        "projection": (settings.in_dim, settings.hidden),
        "attention": (settings.hidden, inner),
        "attention_score": (settings.attention_dim, 1),
        "classifier": (settings.hidden, settings.classes),
    }
    stack = {}
    for name, (width, out) in shapes.items():
        for part, shape in (("weight", (count, width, out)), ("bias", (count, 1, out))):
            # The softmax does not see a constant added to all scores.
            if (name, part) != ("attention_score", "bias"):
                stack[f"{name}.{part}"] = torch.empty(shape).uniform_(-1, 1).div_(math.sqrt(width))
    return {name: value.to(device).requires_grad_() for name, value in stack.items()}


class _Bags:
    """Standardised features of some bags: kept where they are few, since each is asked for in every epoch.

    moments: shift and scale (D,). Called with bags of ``train`` it gives features (T, D), segment (T,) and their count.
    """

    def __init__(self, store: ResidentStore, train: NDArray[np.int64], moments: tuple[Tensor, Tensor]) -> None:
        self._store, self._moments = store, moments
        self._kept: Tensor | None = None
        lengths = store.lengths[train]
        if int(lengths.sum()) * store.dim <= KEPT_NUMBERS:
            self._kept = self._scaled(store.gather(train).features)
        self._starts = np.zeros(len(store), np.int64)
        self._starts[train] = np.cumsum(lengths) - lengths

    def _scaled(self, features: Tensor) -> Tensor:
        return (features.float() - self._moments[0]) * self._moments[1]

    def __call__(self, chosen: NDArray[np.int64]) -> tuple[Tensor, Tensor, int]:
        if self._kept is None:
            rows = self._store.gather(chosen)
            return self._scaled(rows.features), rows.segment, len(chosen)
        lengths = self._store.lengths[chosen]
        segment = np.repeat(np.arange(len(chosen)), lengths)
        # Each row's place: where its bag begins, and how far it is into the bag.
        first = self._starts[chosen] - (np.cumsum(lengths) - lengths)
        place = np.arange(len(segment)) + first[segment]
        device = self._kept.device
        return self._kept[torch.from_numpy(place).to(device)], torch.from_numpy(segment).to(device), len(chosen)


def _forward(
    stack: dict[str, Tensor], features: Tensor, segment: Tensor, bags: int, settings: ModelSettings, *, training: bool
) -> Tensor:
    """Logits (R, B, C) of standardised features (T, D) of B bags; segment (T,)."""

    def drop(values: Tensor, p: float) -> Tensor:
        if not training or p == 0:
            return values
        return byte_dropout(values, p) if values.device.type == "cpu" else F.dropout(values, p)

    weight, bias = stack["projection.weight"], stack["projection.bias"]
    count, width, hidden = weight.shape
    features = drop(features, settings.input_dropout)
    flat = torch.addmm(bias.flatten(), features, weight.transpose(0, 1).reshape(width, count * hidden))
    tiles = drop(torch.relu(flat), settings.dropout).view(len(features), count, hidden).transpose(0, 1)
    inner = torch.baddbmm(stack["attention.bias"], tiles, stack["attention.weight"])
    if settings.name == "abmil":
        mixed = torch.tanh(inner)
    else:
        value, gate = inner.chunk(2, dim=2)
        mixed = torch.tanh(value) * torch.sigmoid(gate)
    # A score is at most the sum of the absolute weights, which are small: its exponential cannot overflow.
    scores = torch.bmm(mixed, stack["attention_score.weight"])[:, :, 0].clamp(-60, 60).exp()
    total = scores.new_zeros(count, bags).index_add(1, segment, scores)
    summed = scores.new_zeros(count, bags, hidden).index_add(1, segment, scores[:, :, None] * tiles)
    return torch.baddbmm(stack["classifier.bias"], summed / total[:, :, None], stack["classifier.weight"])


@torch.no_grad()
def _look(
    stack: dict[str, Tensor],
    store: ResidentStore,
    train: NDArray[np.int64],
    bags_of: _Bags,
    settings: ModelSettings,
    rows: int,
) -> Iterator[Tensor]:
    for chosen in plan_batches(store.lengths, train, token_budget=rows, shuffle_seed=None):
        yield _forward(stack, *bags_of(chosen), settings, training=False)


def _clip(stack: dict[str, Tensor], largest: float) -> None:
    """Scale the gradient of each network to a norm of at most ``largest``; 0 leaves it."""
    if not largest:
        return
    gradients = [p.grad for p in stack.values() if p.grad is not None]
    norm = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
    factor = (largest / (norm + 1e-6)).clamp_max(1.0)[:, None, None]
    for gradient in gradients:
        gradient.mul_(factor)
