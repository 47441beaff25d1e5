"""The first look into a bag, where HDF5 can do no harm: on some damaged files it loops for ever, or crashes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lrmil.errors import StoreError
from lrmil.store.finding import TENSOR_SUFFIXES
from lrmil.store.formats import BagInfo, inspect_here, inspect_tensor
from wsi_pipe.bag import skim_file
from wsi_pipe.errors import BagError, FileAccessError

__all__ = ["check_readable", "inspect_bag", "inspect_bags"]

REMEDY = "make the bag again or leave it out; wsi-pipe verify --repair puts bags of a job aside that are broken"


def inspect_bag(
    path: str | Path, level: str | None = None, encoder: str | None = None, *, weights_sha256: str = ""
) -> BagInfo:
    """Facts about the features of ``level`` and ``encoder`` in a bag, without reading the features.

    level: a label such as "5x"; None takes the only or primary one. encoder: its name; None takes the only or primary
    one. weights_sha256: features with these weights are taken, whatever their name, where the bag has them.

    The file is opened in a process of its own, one for all bags, which also goes through all that ``read_features`` and
    ``read_places`` will need of its structure.

    Raises StoreError when the file is no bag, or cannot be read at all; BagMismatchError when it lacks the features, or
    states another resolution or encoder than asked for.
    """
    return inspect_bags([path], level, encoder, weights_sha256=weights_sha256)[0]


def inspect_bags(
    paths: Sequence[str | Path], level: str | None = None, encoder: str | None = None, *, weights_sha256: str = ""
) -> list[BagInfo]:
    """``inspect_bag`` of many bags, in order; it raises what the first one that is not right does."""
    from wsi_pipe.job.guard import read_many_guarded

    look = partial(inspect_here, level=level, encoder=encoder, weights_sha256=weights_sha256)
    files = [Path(path) for path in paths]
    try:
        # Tensors are read by torch, which the guarding process does without, and which does not hang.
        hdf5 = iter(read_many_guarded(look, [path for path in files if path.suffix not in TENSOR_SUFFIXES]))
        infos = [
            inspect_tensor(path, level, encoder) if path.suffix in TENSOR_SUFFIXES else next(hdf5) for path in files
        ]
    except BagError as error:
        raise StoreError(error.message, remedy=REMEDY) from error
    return [dataclasses.replace(info, path=str(path)) for info, path in zip(infos, paths, strict=True)]


_readable: dict[Path, tuple[int, int]] = {}
"""Size and time of change of files that ``check_readable`` found to be so."""


def check_readable(path: Path) -> None:
    """Raise StoreError where HDF5 loops or crashes on a file; what else is wrong with it shows when it is read.

    About 10 ms, once for each file in a process.
    """
    from wsi_pipe.job.guard import read_guarded

    if path.suffix in TENSOR_SUFFIXES:
        return
    try:
        status = path.stat()
        stamp = status.st_size, status.st_mtime_ns
        if _readable.get(path) == stamp:
            return
        read_guarded(skim_file, path)
    except FileAccessError:
        raise
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}", remedy="give bags that can be read") from error
    except BagError as error:
        raise StoreError(error.message, remedy=REMEDY) from error
    _readable[path] = stamp
