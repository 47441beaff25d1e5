"""Other ways to classify slides with few high-resolution tiles, as arms beside those of LRMIL.

Each is the training of an ordinary model on features that are chosen, or put together, from those of HR and LR tiles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lrmil.checkpoint import load_model
from lrmil.config import ModelSettings
from lrmil.errors import BagMismatchError, SettingsError
from lrmil.store import FeatureStore

__all__ = [
    "BASELINES",
    "Baseline",
    "guided_rows",
    "kept",
    "model_of",
    "random_rows",
    "tile_attention",
    "with_parents",
    "zoomed_rows",
]

Rows = NDArray[np.int64]
EAGLE_TILES = 25


@dataclass(frozen=True)
class Baseline:
    """name: of the arm. model: changes to the model's settings. features: "all" HR tiles, as many "random" ones as the
    slide has LR tiles, those "guided" or "zoomed" into by the fold's LR classifier, or "both" levels."""

    name: str
    features: str = "all"
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)


BASELINES: Mapping[str, Baseline] = {
    "random-hr": Baseline("HR, random tiles, as many as LR", "random"),
    "eagle": Baseline(f"HR, {EAGLE_TILES} tiles by LR attention (EAGLE)", "guided", {"name": "mean"}),
    "zoom": Baseline("HR and LR where LR attends (ZoomMIL-like)", "zoomed"),
    "hr+lr": Baseline("HR and LR together", "both"),
    "clam-mb": Baseline("HR, CLAM-MB", "all", {"name": "clam-mb"}),
    "dtfd": Baseline("HR, DTFD-MIL", "all", {"name": "dtfd"}),
    "dsmil": Baseline("HR, DSMIL, both streams", "all", {"name": "dsmil", "stream_average": True}),
}
"""By the names that presets use. EAGLE: Neidlinger et al., A deep learning framework for efficient pathology image
analysis, 2025: the tiles that a coarse model attends to most, their mean classified. ZoomMIL: Thandiackal et al.,
Differentiable zooming for multiple instance learning on whole-slide images, ECCV 2022: here the choice is that of a
trained LR classifier and is not learned with what follows."""


def model_of(settings: ModelSettings, baseline: Baseline) -> ModelSettings:
    """The model of a baseline: that of the experiment but for what the baseline changes."""
    if not baseline.model:
        return settings
    # What is of the experiment's own architecture alone is left at its default.
    plain = ModelSettings()
    own = ("auxiliary_weight", "projection", "stream_average", "members", "linear_share", "pooling")
    return dataclasses.replace(settings, **{name: getattr(plain, name) for name in own} | dict(baseline.model))


def random_rows(lengths: Sequence[int], budget: Sequence[int], seed: int) -> list[Rows]:
    """As many random rows of each bag as its budget says, in ascending order; all where it has no more."""
    rng = np.random.default_rng(seed)
    return [
        np.sort(rng.permutation(length)[:count]).astype(np.int64) for length, count in zip(lengths, budget, strict=True)
    ]


def guided_rows(attention: NDArray[np.floating], parents: NDArray[np.integer], tiles: int) -> Rows:
    """The HR tiles of a slide that lie in its most attended LR tiles, ``tiles`` of them at most.

    attention: (N_lr,). parents: (N_hr,), the LR tile of each HR tile or -1. LR tiles are taken whole in the order of
    their attention, ties in their own order; of the last one the first children are. Ascending. Where no HR tile lies
    in an LR tile, the first ones are taken, so that no slide is left without.
    """
    rank = np.empty(len(attention), np.int64)
    rank[np.argsort(-attention, kind="stable")] = np.arange(len(attention))
    inside = np.flatnonzero(parents >= 0)
    if not len(inside):
        return np.arange(min(len(parents), tiles), dtype=np.int64)
    order = inside[np.argsort(rank[parents[inside]], kind="stable")]
    return np.sort(order[:tiles]).astype(np.int64)


def zoomed_rows(attention: NDArray[np.floating], parents: NDArray[np.integer], lr_tiles: int) -> Rows:
    """All HR tiles of a slide that lie in its ``lr_tiles`` most attended LR tiles with HR tiles. Ascending.

    All HR tiles where none lies in an LR tile."""
    with_children = np.unique(parents[parents >= 0])
    if not len(with_children):
        return np.arange(len(parents), dtype=np.int64)
    chosen = with_children[np.argsort(-attention[with_children], kind="stable")][:lr_tiles]
    return np.flatnonzero(np.isin(parents, chosen)).astype(np.int64)


def kept(store: FeatureStore, rows: Sequence[Rows]) -> FeatureStore:
    """A store in memory of some rows of each bag of another. rows: within each bag."""
    places = np.concatenate([start + own for start, own in zip(store.offsets[:-1], rows, strict=True)])
    offsets = np.concatenate([[0], np.cumsum([len(own) for own in rows])]).astype(np.int64)
    return FeatureStore(
        np.asarray(store.flat[places]),
        offsets,
        store.records,
        dtype=store.dtype,
        meta=store.meta,
        coords=store.coords[places],
        parents=None if store.parents is None else np.asarray(store.parents[places]),
    )


def with_parents(hr: FeatureStore, lr: FeatureStore) -> FeatureStore:
    """HR features with those of the LR tile that each lies in behind them, (T, 2 D); zeros where it lies in none.

    The pyramid of Li et al., Dual-stream multiple instance learning network, CVPR 2021. Raises BagMismatchError where
    the stores have other slides, types, or no parents.
    """
    if hr.slide_ids != lr.slide_ids or hr.dtype != lr.dtype or hr.parents is None:
        raise BagMismatchError(
            "HR and LR features are of other slides or types, or HR tiles do not know their LR tiles",
            remedy="pack both of the same bags, HR with the LR level as parent level",
        )
    parents = np.asarray(hr.parents, np.int64)
    start = np.repeat(lr.offsets[:-1], hr.lengths)
    inside = parents >= 0
    above = np.zeros((len(hr.flat), lr.dim), hr.flat.dtype)
    above[inside] = lr.flat[(start + parents)[inside]]
    # No encoder gives these by itself, so none is named.
    meta = dataclasses.replace(hr.meta, encoder=f"{hr.meta.encoder} with {lr.meta.level}", weights_sha256="")
    return FeatureStore(
        np.concatenate([np.asarray(hr.flat), above], axis=1),
        hr.offsets,
        hr.records,
        dtype=hr.dtype,
        meta=meta,
        coords=hr.coords,
        parents=hr.parents,
    )


@torch.inference_mode()
def tile_attention(path: Path, store: FeatureStore) -> list[NDArray[np.float32]]:
    """What a model attends to in each bag of a store, (N,) each, summing to 1; empty for an empty bag.

    Raises SettingsError for a model without attention.
    """
    model, card = load_model(path)
    found = []
    for i in range(len(store)):
        rows = np.asarray(store.bag(i), np.float32)
        if not len(rows):
            found.append(np.zeros(0, np.float32))
            continue
        output = model(torch.from_numpy(rows), torch.tensor([0, len(rows)]))
        if output.attention_logits is None:
            raise SettingsError(
                f"{path}: {card.model.name} has no attention, so it cannot guide to HR tiles",
                remedy="name an attention model: --set mil.model.name=gated-abmil",
            )
        found.append(output.attention_logits.float().softmax(0).numpy())
    return found
