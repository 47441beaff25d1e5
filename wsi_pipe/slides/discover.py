"""Finding slides in folders: by extension, and one entry a series for DICOM."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["SLIDE_EXTENSIONS", "find_slide_files", "looks_like_slide"]

SLIDE_EXTENSIONS = frozenset(
    {".svs", ".tif", ".tiff", ".btf", ".tf8", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".dcm"}
)
"""What a folder is searched for. Plain images (PNG, JPEG) are taken only when they are named: folders of slides often
hold pictures of labels."""


def looks_like_slide(path: Path) -> bool:
    """Whether a file's extension is that of a slide."""
    return path.suffix.lower() in SLIDE_EXTENSIONS and not path.name.startswith(".")


def find_slide_files(folder: Path) -> Iterator[Path]:
    """Slides in ``folder`` and its subfolders, sorted; a DICOM series counts once, by its largest file.

    Links to folders are followed unless they lead back to a folder that was already searched.
    """
    seen: set[tuple[int, int]] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        files = [Path(root, name) for name in sorted(names) if looks_like_slide(Path(name))]
        yield from (path for path in files if path.suffix.lower() != ".dcm")
        yield from _one_of_each_series([path for path in files if path.suffix.lower() == ".dcm"])


def _one_of_each_series(files: list[Path]) -> list[Path]:
    """The largest file of each DICOM series; files that cannot be read stand for themselves and fail later."""
    if len(files) < 2:
        return files
    import pydicom

    from wsi_pipe.slides.parts import without_warnings

    best: dict[str, Path] = {}
    for path in files:
        try:
            with without_warnings():
                header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["SeriesInstanceUID"])
                series = str(header.get("SeriesInstanceUID", path))
        except (OSError, EOFError, ValueError, pydicom.errors.InvalidDicomError):
            series = str(path)
        if series not in best or path.stat().st_size > best[series].stat().st_size:
            best[series] = path
    return sorted(best.values())
