"""Which bag files a path stands for: a job, a folder of bags, or other tools' folders, nested as they lay them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from lrmil.errors import StoreError
from wsi_pipe.encoders.elsewhere import slug_asked_for
from wsi_pipe.encoders.registry import find_entry
from wsi_pipe.errors import UnknownEncoderError
from wsi_pipe.job.paths import JobPaths

__all__ = ["TENSOR_SUFFIXES", "find_bags"]

HDF5_SUFFIXES = (".h5", ".hdf5")
TENSOR_SUFFIXES = (".pt", ".pth")
REMEDY = "give a job, or a folder with .h5 or .pt files of features, such as JOB/bags"
H5_FILES, PT_FILES = "h5_files", "pt_files"
TRIDENT_PREFIX = "features_"
PASSED_OVER = re.compile(r"^(\.|patches$|visualization$|quarantine$|slide_features_|slide_embeddings$|tiles$)")
"""Folders of TRIDENT, slide2vec and of jobs that hold coordinates, pictures or features of whole slides."""
CODE_HASH = re.compile(r"-[0-9a-f]{8}$")
"""What STAMP adds to an extractor's name to make that of a folder."""


def find_bags(where: Iterable[str | Path] | str | Path, encoder: str | None = None) -> list[Path]:
    """Bag files, sorted by name: files as they are given; of a job its bags; of a folder what it and its folders hold.

    Of CLAM's two forms of one slide the one with coordinates counts. encoder: folders that other tools name by another
    encoder (``features_conch_v1``) are left out. Raises StoreError for a path that does not exist, a folder without
    bags, or one with folders of several encoders where ``encoder`` says nothing.
    """
    given = [where] if isinstance(where, (str, Path)) else list(where)
    found: list[Path] = []
    for item in map(Path, given):
        if item.is_dir():
            inside = list(_inside(item, encoder, set()))
            if not inside:
                raise StoreError(f"{item} holds no bags{f' of {encoder}' if encoder else ''}", remedy=REMEDY)
            found.extend(inside)
        elif item.is_file():
            found.append(item)
        else:
            raise StoreError(f"{item} does not exist", remedy="give bag files or the folder that holds them")
    return sorted(set(found), key=lambda p: (p.name, str(p)))


def _inside(folder: Path, encoder: str | None, seen: set[Path]) -> Iterator[Path]:
    real = folder.resolve()
    if real in seen:
        # A link that leads back.
        return
    seen.add(real)
    job = JobPaths(folder)
    if job.marker.is_file() or (job.config.is_file() and job.bags.is_dir()):
        if job.bags.is_dir():
            yield from _inside(job.bags, encoder, seen)
        return
    names = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    yield from _one_a_slide(path for path in names if path.is_file())
    folders = [path for path in names if path.is_dir() and not PASSED_OVER.match(path.name)]
    forms = [path for path in folders if path.name in (H5_FILES, PT_FILES)]
    yield from _one_a_slide(path for form in forms for path in _inside(form, encoder, seen))
    for path in _of_encoder(folder, [path for path in folders if path not in forms], encoder):
        yield from _inside(path, encoder, seen)


def _one_a_slide(paths: Iterable[Path]) -> Iterator[Path]:
    """HDF5 files, and tensors of the slides that have none: an HDF5 file holds coordinates too."""
    files = list(paths)
    hdf5 = [path for path in files if path.suffix in HDF5_SUFFIXES]
    stems = {path.stem for path in hdf5}
    yield from hdf5
    yield from (path for path in files if path.suffix in TENSOR_SUFFIXES and path.stem not in stems)


def _of_encoder(folder: Path, folders: list[Path], encoder: str | None) -> list[Path]:
    named = {path: slug for path in folders if (slug := _encoder_of(path))}
    if encoder is not None:
        wanted = slug_asked_for(encoder)
        return [path for path in folders if named.get(path, wanted) == wanted]
    if len(set(named.values())) > 1:
        raise StoreError(
            f"{folder} holds features of {len(set(named.values()))} encoders: {', '.join(p.name for p in named)}",
            remedy=f"choose one with --encoder: {', '.join(sorted(set(named.values())))}",
        )
    return folders


def _encoder_of(folder: Path) -> str | None:
    """The encoder that a folder's name tells: any behind TRIDENT's prefix, else one that is known, of files in it.

    A folder that holds folders, of jobs say, may be called by an encoder and hold features of others.
    """
    if folder.name.startswith(TRIDENT_PREFIX):
        return slug_asked_for(folder.name.removeprefix(TRIDENT_PREFIX))
    try:
        entry = find_entry(CODE_HASH.sub("", folder.name))
    except UnknownEncoderError:
        return None
    suffixes = (*HDF5_SUFFIXES, *TENSOR_SUFFIXES)
    return slug_asked_for(entry.name) if any(p.suffix in suffixes for p in folder.iterdir()) else None
