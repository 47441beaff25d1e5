"""Finding slides in folders: by the names of files, OME-Zarr stores as folders, and one entry a series for DICOM.

Whatever lies in a folder, the search goes on: what cannot be looked at is counted among what was passed over.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from wsi_pipe.slides.kinds import (
    NOT_READ,
    PLAIN_IMAGES,
    SLIDE_EXTENSIONS,
    companion_folder,
    extension,
    may_be_dicom,
)
from wsi_pipe.slides.parts import WSI_STORAGE, dicom_identity, is_zarr_store
from wsi_pipe.slides.passed_over import PassedOver

__all__ = ["SLIDE_EXTENSIONS", "find_slide_files", "is_slide_folder", "looks_like_slide"]

NOT_UTF8 = "whose name is not UTF-8; rename it (convmv -f latin1 -t utf8)"
_DICOM = (".dcm", ".dicom")
_STORE_MARKS = frozenset({".zgroup", ".zattrs", "zarr.json"})


def looks_like_slide(path: Path) -> bool:
    """Whether a file's extension is that of a slide."""
    return path.suffix.lower() in SLIDE_EXTENSIONS and not path.name.startswith(".")


def is_slide_folder(path: Path) -> bool:
    """Whether a folder is a slide itself, an OME-Zarr store, rather than a place of slides."""
    return is_zarr_store(path)


def find_slide_files(folder: Path, passed_over: PassedOver | None = None) -> Iterator[Path]:
    """Slides in ``folder`` and its subfolders, sorted; a DICOM series counts once, by its largest file.

    Links to folders are followed unless they lead back to a folder that was already searched. passed_over: takes in
    what looks like a slide and is not given: formats that are not read, plain images, DICOM files that are no slides,
    names that are no UTF-8, folders that cannot be read. Files that are damaged are given: opening them says why.
    """
    passed = PassedOver() if passed_over is None else passed_over
    seen: set[tuple[int, int]] = set()

    def unreadable(error: OSError) -> None:
        passed.add("folders that cannot be read", f"{error.filename} ({error.strerror})")

    for root, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
        try:
            status = os.stat(root)
        except OSError as error:
            unreadable(error)
            folders.clear()
            continue
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        if not _STORE_MARKS.isdisjoint(names):
            folders.clear()
            yield Path(root)
            continue
        stores = [Path(root, name) for name in folders if name.lower().endswith(".zarr") and not name.startswith(".")]
        inner = {companion_folder(name) for name in names}
        folders[:] = sorted(name for name in folders if name not in inner and Path(root, name) not in stores)
        yield from _in_one_folder(root, sorted(names), sorted(stores), passed)


def _in_one_folder(root: str, names: Sequence[str], stores: Sequence[Path], passed: PassedOver) -> Iterator[Path]:
    maybe_dicom = []
    files = list(stores)
    for name in names:
        ending, path = extension(name), Path(root, name)
        if name.startswith("._"):
            # What macOS writes beside each file on a foreign disk.
            continue
        if ending in NOT_READ:
            passed.add(f"{NOT_READ[ending]} (*{ending}), a format that is not read; export as TIFF or DICOM", path)
        elif ending in PLAIN_IMAGES and not name.startswith("."):
            passed.add("plain images, which are read only when they are named", path)
        elif ending in SLIDE_EXTENSIONS and name.startswith("."):
            passed.add("hidden files", path)
        elif ending in SLIDE_EXTENSIONS and not _is_utf8(str(path)):
            passed.add(NOT_UTF8, path)
        elif may_be_dicom(name):
            maybe_dicom.append(path)
        elif ending in SLIDE_EXTENSIONS:
            files.append(path)
    yield from sorted(files)
    yield from _one_of_each_series(maybe_dicom, passed)


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _one_of_each_series(files: Sequence[Path], passed: PassedOver) -> list[Path]:
    """The largest file of each DICOM series; files called DICOM that cannot be read as it stand for themselves."""
    best: dict[str, tuple[int, Path]] = {}
    for path in files:
        identity = dicom_identity(path)
        if identity is None:
            if path.suffix.lower() in _DICOM:
                best[str(path)] = (0, path)
        elif identity.kind and identity.kind != WSI_STORAGE:
            passed.add("DICOM files that are no whole-slide images", path)
        elif not _is_utf8(str(path)):
            passed.add(NOT_UTF8, path)
        else:
            # Of two of one size the first by name.
            series = identity.series or str(path)
            if series not in best or identity.size > best[series][0]:
                best[series] = (identity.size, path)
    return sorted(path for _, path in best.values())
