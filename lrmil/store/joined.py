"""All slides of a case as one bag."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lrmil.errors import StoreError
from lrmil.store.flat import BagRecord, FeatureStore

__all__ = ["join_cases"]


def join_cases(store: FeatureStore, case_ids: Sequence[str]) -> tuple[FeatureStore, list[NDArray[np.int64]]]:
    """A store with one bag a case, called as the case; and the slides of each, places in ``store`` in their order.

    case_ids: of the bags of ``store``. Where the slides of each case are neighbours, features stay where they are, else
    they are copied into memory. Coordinates are each slide's own, so a joined bag has no place of its own. Raises
    StoreError for a store with parents, whose rows would point into the wrong slide.
    """
    if store.parents is not None:
        raise StoreError("features with parents cannot be joined by case", remedy="train a student by slide")
    members: dict[str, list[int]] = {}
    for place, case in enumerate(case_ids):
        members.setdefault(case, []).append(place)
    slides = [np.array(places, np.int64) for places in members.values()]
    order = np.concatenate(slides) if slides else np.zeros(0, np.int64)
    lengths = np.array([int(store.lengths[own].sum()) for own in slides], np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    flat, coords = store.flat, store.coords
    if not np.array_equal(order, np.arange(len(store))):
        rows = [slice(int(store.offsets[i]), int(store.offsets[i + 1])) for i in order.tolist()]
        flat = np.concatenate([np.asarray(store.flat[r]) for r in rows])
        coords = np.concatenate([np.asarray(store.coords[r]) for r in rows])
    records = [_joined(case, [store.records[i] for i in places]) for case, places in members.items()]
    # The content is that of the store; what is new is only which slides belong together.
    digest = hashlib.sha256(store.content_hash.encode())
    digest.update(json.dumps([[case, places] for case, places in members.items()]).encode())
    joined = FeatureStore(
        flat, offsets, records, dtype=store.dtype, meta=store.meta, coords=coords, content_hash=digest.hexdigest()
    )
    return joined, slides


def _joined(case: str, records: Sequence[BagRecord]) -> BagRecord:
    reasons = [record.empty_reason for record in records if record.empty_reason]
    saw = [record.encoder_saw for record in records if record.encoder_saw]
    return replace(
        records[0],
        slide_id=case,
        case_id=case,
        path=records[0].path if len(records) == 1 else "",
        fingerprint=" ".join(record.fingerprint for record in records),
        # Every slide stays known, so that a model that has seen one of them is found out.
        slide_fingerprint=" ".join(r.slide_fingerprint for r in records if r.slide_fingerprint),
        encoder_saw=next((part for part in ("train", "val", "unlabelled") if part in saw), ""),
        empty_reason=reasons[0] if len(reasons) == len(records) else None,
    )
