"""What a TIFF means, for readers that do not look: the check that they pass on the same file as the fast reader."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wsi_pipe.errors import NotAPictureError, SlideError, SlideOpenError, UnsupportedSlideError
from wsi_pipe.slides.base import ReadStats
from wsi_pipe.slides.storage.source import FileSource, Source
from wsi_pipe.slides.tiff.choose import choose
from wsi_pipe.slides.tiff.ifd import Directory, read_directories
from wsi_pipe.slides.tiff.image import TILE_WIDTH
from wsi_pipe.slides.tiff.layout import DESCRIPTION, SOFTWARE, XMP
from wsi_pipe.slides.tiff.ndpi import ndpi_focus
from wsi_pipe.slides.tiff.pages import pages_of
from wsi_pipe.slides.tiff.picture import Chosen
from wsi_pipe.slides.tiff.samples import check_samples
from wsi_pipe.slides.tiff.scn import SCN_NAMESPACE, choose_scan

__all__ = ["Kind", "Meaning", "kind_of", "meaning_of_file", "meaning_of_tiff"]

Kind = Literal["aperio", "hamamatsu", "leica", "philips", "trestle", "ventana", "plain"]

MAX_XMP_BYTES = 1 << 20


@dataclass(frozen=True)
class Meaning:
    """What is to be read of a TIFF.

    chosen: the picture and what may be its levels, of files whose vendor has no structure of its own. default: whether
    it is what a reader shows that knows of no scans and focal planes. notes: see SlideInfo.
    """

    kind: Kind
    chosen: Chosen | None
    default: bool
    notes: tuple[str, ...] = ()


def kind_of(directories: list[Directory]) -> Kind:
    """Whose structure the file has. Trestle's and Ventana's tiles overlap, or lie where no TIFF tag says."""
    first = directories[0]
    text, software = first.text(DESCRIPTION)[:4096], first.text(SOFTWARE)
    if first.is_ndpi:
        return "hamamatsu"
    if text.startswith("Aperio"):
        return "aperio"
    if software.startswith("Philips") and "DPUfsImport" in text:
        return "philips"
    if SCN_NAMESPACE in text:
        return "leica"
    if software.startswith("MedScan"):
        return "trestle"
    if any(b"iScan" in d.raw(XMP)[:MAX_XMP_BYTES] for d in directories if d.count(XMP)):
        return "ventana"
    return "plain"


def meaning_of_tiff(source: Source, directories: list[Directory], scene: int | None, z: int | None) -> Meaning:
    """What the file means. Raises NotAPictureError where it is no one 8-bit colour picture, or none was chosen of
    several, UnsupportedSlideError where that cannot be told."""
    kind = kind_of(directories)
    if kind == "hamamatsu":
        focus, note = ndpi_focus(source.name, directories, scene, z)
        _check_largest(source.name, directories)
        return Meaning(kind, None, focus == 0, (note,) if note else ())
    if kind == "leica":
        try:
            scan = choose_scan(source, directories[0].text(DESCRIPTION), scene, z)
        except NotAPictureError:
            raise
        except UnsupportedSlideError:
            # Another reader may know this form of the description; it, too, takes brightfield only.
            return Meaning(kind, None, scene is None and z is None)
        _check_largest(source.name, directories)
        return Meaning(kind, None, scan.scans == 1 and scan.planes == 1, scan.notes)
    if kind in ("philips", "trestle", "ventana"):
        _check_largest(source.name, directories)
        return Meaning(kind, None, scene in (None, 0) and z in (None, 0))
    tiled = [d for d in directories if TILE_WIDTH in d]
    aperio = kind == "aperio" and bool(tiled)
    chosen = choose(source, tiled if aperio else directories, scene, z, all_levels=aperio)
    return Meaning(kind, chosen, chosen.scans == 1 and chosen.planes == 1, chosen.notes)


def meaning_of_file(path: str | Path, scene: int | None, z: int | None) -> Meaning | None:
    """``meaning_of_tiff`` of a local file; None where it is no TIFF, or damaged so that its reader has to say how."""
    source = FileSource(path, ReadStats())
    try:
        try:
            directories = read_directories(source)
        except SlideError:
            return None
        return meaning_of_tiff(source, directories, scene, z)
    except SlideOpenError:
        return None
    finally:
        source.close()


def _check_largest(name: str, directories: list[Directory]) -> None:
    pages = pages_of(directories)
    if pages:
        check_samples(name, max(pages, key=lambda page: page.area).directory)
