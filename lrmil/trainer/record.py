"""What a model's file keeps of its data, beside weights and settings: counts, validation slides, training tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrmil.checkpoint import ModelCard
from lrmil.ood import Reference, reference_of
from lrmil.splits import FoldIndices
from lrmil.store import ResidentStore

__all__ = ["with_record"]


def with_record(
    card: ModelCard,
    store: ResidentStore,
    split: FoldIndices,
    labels: NDArray[np.int64],
    cases: Sequence[str],
    logits: NDArray[np.float64],
    *,
    keep_tiles: bool = True,
) -> tuple[ModelCard, Reference | None]:
    """The card with ``data`` and ``validation``, and the training tiles.

    labels: int64, of every bag of the store: classes, or the strata of another target, of which no confidence is kept.
    cases: of every bag. logits: (V, C), of the validation bags in the order
    of ``split.val``. keep_tiles: off for models that no one will deploy, of which nothing is kept of the tiles. The
    features are taken as they are stored.
    """
    exact = ResidentStore.of(store.store, store.device, place="mapped")
    data: dict[str, Any] = {}
    for part in ("train", "val", "test"):
        chosen: NDArray[np.int64] = getattr(split, part)
        data[part] = {
            "slides": len(chosen),
            "cases": len({cases[i] for i in chosen.tolist()}),
            "tiles": int(exact.lengths[chosen].sum()),
        }
        if not card.target_state:
            counts = np.bincount(labels[chosen], minlength=len(card.classes)).tolist()
            data[part]["classes"] = dict(zip(card.classes, counts, strict=True))
    reference = reference_of(exact, split.train) if keep_tiles else None
    validation: dict[str, tuple[float, ...]] = {}
    if len(split.val):
        if not card.target_state:
            probabilities = card.probabilities(logits)
            order = np.argsort(-probabilities.max(axis=1), kind="stable")
            right = probabilities.argmax(axis=1) == labels[split.val]
            validation["confidence"] = tuple(probabilities.max(axis=1)[order].tolist())
            validation["correct"] = tuple(right[order].astype(float).tolist())
        if reference is not None:
            found = [reference.distance(exact.gather(np.array([i])).features) for i in split.val]
            validation["distance"] = tuple(sorted(found))
    return replace(card, data=data, validation=validation), reference
