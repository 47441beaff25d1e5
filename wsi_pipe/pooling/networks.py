"""Slide encoders that are attention over tiles and little else, with the key names of the published checkpoints.

Widths and the number of heads follow from the checkpoint's own shapes; whatever does not fit the architecture is an
error that names the keys.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from wsi_pipe.encoders.weights import State, load_into, read_state, without_prefix
from wsi_pipe.errors import WeightsError

__all__ = ["NETWORKS", "SlideNetwork", "load_network"]


class GatedAttention(nn.Module):
    """Scores (N, K) of tiles (N, D): tanh times sigmoid, then linear.

    Source: Ilse, Tomczak and Welling, Attention-based deep multiple instance learning, ICML 2018.
    """

    def __init__(self, dim: int, hidden: int, heads: int = 1) -> None:
        super().__init__()
        self.attention_a = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh())
        self.attention_b = nn.Sequential(nn.Linear(dim, hidden), nn.Sigmoid())
        self.attention_c = nn.Linear(hidden, heads)

    def forward(self, tiles: Tensor) -> Tensor:
        """Scores before the softmax."""
        scores: Tensor = self.attention_c(self.attention_a(tiles) * self.attention_b(tiles))
        return scores


class SlideNetwork(nn.Module, ABC):
    """Features of a slide's tiles (N, D) in; its vector (W,), and the attention that made it (N,), out."""

    @abstractmethod
    def forward(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Attention sums to 1; of several heads it is their mean."""


class ChiefNetwork(SlideNetwork):
    """The mean of the tiles' own features, weighted by gated attention on a hidden layer.

    Source: Wang et al., A pathology foundation model for cancer diagnosis and prognosis prediction, Nature 2024; the
    text branch for the organ has no part in this vector.
    """

    def __init__(self, dim: int, hidden: int, attention: int) -> None:
        super().__init__()
        self.attention_net = nn.Sequential(
            nn.Linear(dim, hidden), nn.ReLU(), nn.Identity(), GatedAttention(hidden, attention)
        )

    def forward(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.softmax(self.attention_net(tiles)[:, 0], dim=0)
        return weights @ tiles, weights


class FeatherNetwork(SlideNetwork):
    """A hidden layer, gated attention, and the weighted mean of the hidden layer; heads one behind the other.

    Source: Shao et al., Do multiple instance learning models transfer?, ICML 2025 (FEATHER).
    """

    def __init__(self, dim: int, hidden: int, attention: int, heads: int) -> None:
        super().__init__()
        self.patch_embed = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU())
        self.global_attn = GatedAttention(hidden, attention, heads)

    def forward(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        embedded = self.patch_embed(tiles)
        weights = torch.softmax(self.global_attn(embedded), dim=0)
        return (weights.T @ embedded).flatten(), weights.mean(dim=1)


class MultiHeadNetwork(SlideNetwork):
    """A perceptron before attention, a gated attention for each head, and a projection of all heads together.

    Sources: Jaume et al., TANGLE, CVPR 2024; Jaume et al., MADELEINE, ECCV 2024. Channels of the perceptron's output
    are laid out by feature, then by head.
    """

    def __init__(self, dim: int, hidden: int, attention: int, heads: int, out: int) -> None:
        super().__init__()
        self.heads = heads
        widths = (dim, hidden, hidden, hidden * heads)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            # A place for the dropout of training, which has no weights.
            layers += [nn.Linear(before, after), nn.LayerNorm(after), nn.GELU(), nn.Identity()]
        self.pre_attn = nn.Sequential(*layers)
        self.attn = nn.ModuleList(GatedAttention(hidden, attention) for _ in range(heads))
        self.projector = nn.Linear(hidden * heads, out)

    def forward(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        embedded = self.pre_attn(tiles).unflatten(-1, (-1, self.heads))
        scores = torch.cat([head(embedded[..., place]) for place, head in enumerate(self.attn)], dim=1)
        weights = torch.softmax(scores, dim=0)
        pooled = (embedded * weights[:, None, :]).sum(dim=0)
        vector: Tensor = self.projector(pooled.flatten())
        return vector, weights.mean(dim=1)


def _shape(state: State, key: str) -> tuple[int, int]:
    rows, columns = state[key].shape
    return int(rows), int(columns)


def _chief(state: State) -> tuple[SlideNetwork, State]:
    kept = {key: value for key, value in state.items() if key.startswith("attention_net.")}
    hidden, dim = _shape(kept, "attention_net.0.weight")
    attention, _ = _shape(kept, "attention_net.3.attention_a.0.weight")
    return ChiefNetwork(dim, hidden, attention), kept


def _feather(state: State) -> tuple[SlideNetwork, State]:
    state = without_prefix(state, "model.") or state
    kept = {key: value for key, value in state.items() if not key.startswith("classifier.")}
    hidden, dim = _shape(kept, "patch_embed.0.weight")
    attention, _ = _shape(kept, "global_attn.attention_a.0.weight")
    heads, _ = _shape(kept, "global_attn.attention_c.weight")
    return FeatherNetwork(dim, hidden, attention, heads), kept


def _madeleine(state: State) -> tuple[SlideNetwork, State]:
    state = without_prefix(state, "module.") or state
    kept = without_prefix(state, "wsi_embedders.")
    kept |= {f"projector.{kind}": state[f"projector.{kind}"] for kind in ("weight", "bias")}
    return _multi_head(kept)


def _tangle(state: State) -> tuple[SlideNetwork, State]:
    state = without_prefix(state, "module.") or state
    kept = {
        key.replace("proj_multihead.", "projector."): value
        for key, value in without_prefix(state, "wsi_embedder.").items()
    }
    return _multi_head(kept)


def _multi_head(kept: State) -> tuple[SlideNetwork, State]:
    hidden, dim = _shape(kept, "pre_attn.0.weight")
    attention, _ = _shape(kept, "attn.0.attention_a.0.weight")
    heads = len({key.split(".")[1] for key in kept if key.startswith("attn.")})
    out, _ = _shape(kept, "projector.weight")
    return MultiHeadNetwork(dim, hidden, attention, heads, out), kept


NETWORKS: Mapping[str, Callable[[State], tuple[SlideNetwork, State]]] = {
    "chief": _chief, "feather": _feather, "madeleine": _madeleine, "tangle": _tangle,
}  # fmt: skip
"""From a checkpoint's tensors to a network and those of the tensors that are its own."""


def load_network(kind: str, path: Path, name: str) -> SlideNetwork:
    """The network of a checkpoint, in evaluation mode, float32. Raises WeightsError where the file does not fit."""
    state = read_state(path)
    try:
        network, kept = NETWORKS[kind](state)
    except (KeyError, ValueError) as error:
        raise WeightsError(
            f"{path} does not fit slide encoder {name}: {error} is not there as it should be",
            remedy="check that the file belongs to this slide encoder and is complete",
        ) from error
    load_into(network, {key: value.float() for key, value in kept.items()}, name, str(path))
    return network.eval().requires_grad_(False)
