"""HDF5 files for others, put together in memory and written in one piece: a full disk must not crash HDF5."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

__all__ = ["add", "hdf5_at"]

CHUNK_BYTES = 1 << 20


@contextmanager
def hdf5_at(path: Path) -> Iterator[Any]:
    """A new HDF5 file that is written to ``path`` on leaving, of a form that HDF5 1.10 and later read."""
    with h5py.File(path, "w", driver="core", backing_store=False, libver="v110") as file:
        yield file
        file.flush()
        image = file.id.get_file_image()
    path.write_bytes(image)


def add(group: Any, name: str, values: NDArray[Any], attrs: Mapping[str, Any] | None = None) -> Any:
    """A dataset in chunks of about 1 MiB, whole rows, with its attributes."""
    if values.size:
        rows = max(min(len(values), CHUNK_BYTES // max(values.nbytes // len(values), 1)), 1)
        data = group.create_dataset(name, data=values, chunks=(rows, *values.shape[1:]))
    else:
        data = group.create_dataset(name, data=values)
    for key, value in (attrs or {}).items():
        data.attrs[key] = np.asarray(value) if isinstance(value, tuple) else value
    return data
