"""Which files a slide consists of: most are one, a DICOM series and a few scanners' formats are many."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["dicom_series", "folder_series", "is_dicom", "slide_files", "without_warnings"]

_WARNINGS = threading.Lock()
"""Python keeps one set of warning filters for all threads."""


@contextmanager
def without_warnings() -> Iterator[None]:
    """Keep Python's warnings from the user: pydicom warns of damage that it then raises an error for, or makes do with.

    Threads take turns, and one that warns meanwhile of something else is not heard; so hold it for one call only.
    """
    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def is_dicom(path: Path) -> bool:
    """Whether a file has the DICOM preamble and magic. Raises OSError when it cannot be read."""
    with open(path, "rb") as handle:
        return handle.read(132)[128:] == b"DICM"


def slide_files(path: Path) -> list[Path]:
    """The files that make up the slide opened by ``path``, in an order that does not depend on their place.

    Hamamatsu VMS (.vms, .vmu) keeps pixels in files beside the index file; a DICOM slide is all instances of its series
    in one folder. Of MIRAX (.mrxs) the index files stand for the slide: they hold its id and the place of every tile,
    and its pixels lie in up to hundreds of files.
    """
    suffix = path.suffix.lower()
    if suffix == ".mrxs" and path.with_suffix("").is_dir():
        beside = sorted(part for part in path.with_suffix("").iterdir() if part.is_file())
        return [path, *(part for part in beside if not part.name.lower().startswith("data"))]
    if suffix in (".vms", ".vmu"):
        return [path, *_vms_parts(path)]
    if is_dicom(path):
        return dicom_series(path)
    return [path]


def _vms_parts(path: Path) -> list[Path]:
    names = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition("=")
        if key.strip().startswith(("ImageFile", "OptimisationFile", "MapFile")) and value.strip():
            names.append(path.parent / value.strip())
    return sorted(part for part in names if part.is_file())


def dicom_series(path: Path) -> list[Path]:
    """All files beside ``path`` of the same DICOM series, by instance; ``path`` alone where its header is damaged."""
    own = _header(path)
    if own is None:
        return [path]
    return next((files for files in folder_series(path.parent) if path in files), [path])


def folder_series(folder: Path) -> list[list[Path]]:
    """The DICOM series in a folder, whatever its files are called: the files of each, by instance; none of subfolders.

    Raises OSError when the folder cannot be listed.
    """
    found: dict[str, list[tuple[str, Path]]] = {}
    for part in folder.iterdir():
        header = _header(part)
        if header is not None:
            found.setdefault(header[0], []).append((header[1], part))
    return [[part for _, part in sorted(parts)] for _, parts in sorted(found.items())]


def _header(path: Path) -> tuple[str, str] | None:
    """The UIDs of a file's series and instance; None for what is no DICOM file, or a damaged one."""
    import pydicom

    tags = ["SeriesInstanceUID", "SOPInstanceUID"]
    try:
        if not path.is_file() or not is_dicom(path):
            return None
        with without_warnings():
            found = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags)
            series, instance = str(found.get("SeriesInstanceUID", "")), str(found.get("SOPInstanceUID", ""))
        return (series, instance) if series else None
    except (OSError, EOFError, ValueError, KeyError, AttributeError, pydicom.errors.InvalidDicomError):
        return None
