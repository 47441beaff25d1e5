"""Going once through all that HDF5 must understand of a file before its arrays can be read."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import h5py

__all__ = ["skim_file"]


def skim_file(path: Path) -> None:
    """Open every group, array and attribute of an HDF5 file, of whatever schema, and count each array's chunks.

    Says nothing of what is wrong with it: what raises here raises again where it is read in earnest, and is told there.
    It is for a process that may hang or crash in it, as HDF5 does on some damaged files; reading one that was gone
    through comes to no structure that was not looked at. The arrays themselves, which are nearly all of a bag, are
    not read.
    """
    # Whatever h5py makes of damage.
    with contextlib.suppress(Exception), h5py.File(path, "r") as file:
        _skim(file, set())


def _skim(item: Any, seen: set[int]) -> None:
    address = int(h5py.h5o.get_info(item.id).addr)
    if address in seen:
        # Links of a damaged file may lead round in circles.
        return
    seen.add(address)
    with contextlib.suppress(Exception):
        dict(item.attrs.items())
    if isinstance(item, h5py.Dataset):
        if item.chunks is not None:
            item.id.get_num_chunks()
        return
    if isinstance(item, h5py.Group):
        for name in item:
            with contextlib.suppress(Exception):
                if isinstance(item.get(name, getlink=True), h5py.HardLink):
                    _skim(item[name], seen)
