"""Which files a slide consists of: most are one, a DICOM series and a few scanners' formats are many."""

from __future__ import annotations

import functools
import os
import stat
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from wsi_pipe.slides.base import ReadStats
from wsi_pipe.slides.kinds import may_be_dicom
from wsi_pipe.slides.storage.source import FileSource, SourceFile

__all__ = [
    "WSI_STORAGE",
    "DicomIdentity",
    "dicom_identity",
    "dicom_series",
    "folder_series",
    "goes_by_its_folder",
    "is_dicom",
    "is_zarr_store",
    "slide_files",
    "without_warnings",
]

WSI_STORAGE = "1.2.840.10008.5.1.4.1.1.77.1.6"
DEFLATED = b"1.2.840.10008.1.2.1.99"
"""The transfer syntax of a compressed data set, which no slide has: pydicom would unpack all of it, of any size."""

HEAD_BYTES = 1024
MAX_IDENTITY_BYTES = 1 << 24
"""What may be read of a file to tell its series, which stands before all that is long."""

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


def goes_by_its_folder(path: str) -> bool:
    """Whether a file's own name says nothing of its slide: DICOM files are called by numbers, in a folder a slide."""
    name = os.path.basename(path)
    if name.lower().endswith((".dcm", ".dicom")):
        return True
    if not may_be_dicom(name):
        return False
    try:
        return os.path.isfile(path) and is_dicom(Path(path))
    except (OSError, ValueError):
        return False


def is_zarr_store(path: Path) -> bool:
    """Whether a folder is a Zarr store: by its name, or by the metadata in it."""
    if path.name.lower().endswith(".zarr"):
        return path.is_dir()
    return any((path / name).is_file() for name in ("zarr.json", ".zgroup", ".zattrs"))


def dicom_series(path: Path) -> list[Path]:
    """All files beside ``path`` of the same DICOM series, by instance; ``path`` alone where its header is damaged."""
    own = dicom_identity(path)
    if own is None or not own.series:
        return [path]
    beside = [part for part in path.parent.iterdir() if part == path or may_be_dicom(part.name)]
    return next((files for files in _by_series(beside) if path in files), [path])


def folder_series(folder: Path) -> list[list[Path]]:
    """The DICOM slides in a folder, whatever its files are called: the files of each, by instance; none of subfolders.

    Objects that are no pictures of slides, such as annotations, are not among them. Raises OSError when the folder
    cannot be listed.
    """
    return _by_series(part for part in folder.iterdir() if may_be_dicom(part.name))


def _by_series(parts: Iterable[Path]) -> list[list[Path]]:
    found: dict[str, list[tuple[str, Path]]] = {}
    for part in parts:
        identity = dicom_identity(part)
        if identity is not None and identity.series and identity.kind in ("", WSI_STORAGE):
            found.setdefault(identity.series, []).append((identity.instance, part))
    return [[part for _, part in sorted(parts)] for _, parts in sorted(found.items())]


@dataclass(frozen=True, slots=True)
class DicomIdentity:
    """What a DICOM file is: the UIDs of series, instance and class ("" where missing); its size in bytes."""

    series: str
    instance: str
    kind: str
    size: int


def dicom_identity(path: Path) -> DicomIdentity | None:
    """What a file is; None for what is no DICOM file, is damaged or not readable. It never raises."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or not status.st_size:
            # A named pipe would wait for somebody to write.
            return None
        return _identity(str(path), status.st_size, status.st_mtime_ns, status.st_ino)
    except (OSError, ValueError):
        return None


@functools.lru_cache(maxsize=1 << 16)
def _identity(path: str, size: int, mtime_ns: int, inode: int) -> DicomIdentity | None:
    """See ``dicom_identity``. It is kept while the file stays as it is: each slide of a folder asks of all files."""
    try:
        with open(path, "rb") as handle:
            head = handle.read(HEAD_BYTES)
        if head[128:132] != b"DICM" or DEFLATED in head:
            return None
        with closing(FileSource(path, ReadStats())) as source:
            return _read_identity(source, size)
    except Exception:  # pydicom raises whatever a damaged element leads to
        return None


def _read_identity(source: FileSource, size: int) -> DicomIdentity:
    import pydicom
    from pydicom.filereader import read_partial

    tags = ["SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID"]
    last = pydicom.tag.Tag("SeriesInstanceUID")
    with without_warnings():
        found = read_partial(
            SourceFile(source, limit=MAX_IDENTITY_BYTES),  # type: ignore[arg-type]
            stop_when=lambda tag, vr, length: tag > last,
            defer_size=HEAD_BYTES,
            specific_tags=[pydicom.tag.Tag(tag) for tag in tags],
        )
        kind, instance, series = (str(found.get(tag, "") or "") for tag in tags)
    return DicomIdentity(series, instance, kind, size)
