"""Bags' features in one flat, memory-mapped array: read from HDF5 once, trained over many times."""

from __future__ import annotations

from lrmil.store.flat import BagRecord, FeatureStore, StoreMeta
from lrmil.store.formats import BagInfo, find_bags, inspect_bag
from lrmil.store.resident import Gathered, ResidentStore

__all__ = [
    "BagInfo",
    "BagRecord",
    "FeatureStore",
    "Gathered",
    "ResidentStore",
    "StoreMeta",
    "find_bags",
    "inspect_bag",
]
