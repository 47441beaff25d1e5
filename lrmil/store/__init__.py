"""Bags' features in one flat, memory-mapped array: read from HDF5 once, trained over many times."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lrmil.store.finding import find_bags
from lrmil.store.flat import BagRecord, FeatureStore, StoreMeta
from lrmil.store.formats import BagInfo
from lrmil.store.guarded import check_readable, inspect_bag
from lrmil.store.pack import pack_bags

if TYPE_CHECKING:
    from lrmil.store.resident import Gathered, ResidentStore

__all__ = [
    "BagInfo",
    "BagRecord",
    "FeatureStore",
    "Gathered",
    "ResidentStore",
    "StoreMeta",
    "check_readable",
    "find_bags",
    "inspect_bag",
    "pack_bags",
]


def __getattr__(name: str) -> Any:
    # These need torch, whose import takes seconds; the process that looks into bags does without.
    if name in ("Gathered", "ResidentStore"):
        from lrmil.store import resident

        return getattr(resident, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
