"""Choosing the reader of a slide: what to look at first, whom to ask in which order, and what to say when all decline.

A reader is a row of ``_TABLE``. It raises UnsupportedSlideError where it cannot prove that it understands the file, and
the next one is asked; any other error is about the file and ends the search.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wsi_pipe.errors import (
    ConfigError,
    NotAPictureError,
    ResolutionError,
    SlideError,
    SlideOpenError,
    UnsupportedSlideError,
)
from wsi_pipe.geometry import MPP_BOUNDS, FloatPair, in_mpp_bounds
from wsi_pipe.slides.base import BaseSlide, Slide
from wsi_pipe.slides.native import user_mpp
from wsi_pipe.slides.parts import folder_series, is_dicom, is_zarr_store
from wsi_pipe.slides.storage.source import is_url

__all__ = ["READERS", "open_slide"]

READERS = ("auto", "tiff", "openslide", "image", "zarr", "czi")


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the user states of the slide: resolution, and which scan and focal plane are meant."""

    mpp: FloatPair | None
    scene: int | None
    z: int | None


@dataclass(frozen=True, slots=True)
class _Reader:
    """One way to open a slide.

    name: what ``reader=`` calls it; the two fast readers share one. function: module and function, imported when asked
    for. takes: whether the file is worth asking about. urls: reads byte ranges of a URL. fallback: why it reads a slide
    that others have declined, of a reader that cannot say anything of the file itself.
    """

    name: str
    module: str
    function: str
    takes: Callable[[str | Path], bool] = lambda path: True
    urls: bool = False
    fallback: str | None = None

    def open(self, path: str | Path, asked: _Asked, *, declined: bool) -> BaseSlide:
        options: dict[str, Any] = {"reason": self.fallback} if declined and self.fallback else {}
        options |= {name: n for name, n in (("scene", asked.scene), ("z", asked.z)) if n is not None}
        slide = getattr(importlib.import_module(self.module), self.function)(path, mpp=asked.mpp, **options)
        assert isinstance(slide, BaseSlide)
        return slide


def _looks_zarr(path: str | Path) -> bool:
    if is_url(path):
        # A series of a collection as well: .../slide.ome.zarr/0
        return any(part.lower().endswith(".zarr") for part in str(path).rstrip("/").split("/")[-2:])
    return is_zarr_store(Path(path))


def _looks_dicom(path: str | Path) -> bool:
    if is_url(path):
        return str(path).lower().endswith(".dcm")
    return _is_file(path) and is_dicom(Path(path))


def _is_file(path: str | Path) -> bool:
    return not _looks_zarr(path)


def _looks_czi(path: str | Path) -> bool:
    if is_url(path):
        return str(path).lower().endswith(".czi")
    if not _is_file(path):
        return False
    with open(path, "rb") as handle:
        return handle.read(16).rstrip(b"\0") == b"ZISRAWFILE"


def _looks_tiff(path: str | Path) -> bool:
    return _is_file(path) and not _looks_dicom(path) and not _looks_czi(path)


_TABLE = (
    _Reader("zarr", "wsi_pipe.slides.zarr.reader", "open_zarr", takes=_looks_zarr, urls=True),
    _Reader("tiff", "wsi_pipe.slides.dicom.reader", "open_dicom", takes=_looks_dicom, urls=True),
    _Reader("czi", "wsi_pipe.slides.czi.reader", "open_czi", takes=_looks_czi, urls=True),
    _Reader("tiff", "wsi_pipe.slides.tiff.reader", "open_tiff", takes=_looks_tiff, urls=True),
    _Reader(
        "openslide",
        "wsi_pipe.slides.openslide",
        "open_openslide",
        takes=_is_file,
        fallback="a format that OpenSlide knows",
    ),
    _Reader("image", "wsi_pipe.slides.plain.reader", "open_image", takes=_is_file),
)


def open_slide(
    path: str | Path,
    *,
    reader: str = "auto",
    mpp: float | FloatPair | None = None,
    scene: int | None = None,
    z: int | None = None,
    cache_dir: Path | None = None,
    cache_bytes: int | None = None,
    copy: bool = True,
) -> Slide:
    """Open a slide: a file, an OME-Zarr store, a folder that holds one DICOM series, or a URL that fsspec understands.

    reader: "auto" asks the fast reader, OpenSlide and the image reader in turn; a name asks that one only. mpp: what
    the user states as micrometres per level-0 pixel, one value or (x, y); it goes before the file's own. scene, z:
    which of several scans in the file, and which focal plane of a stack, from 0; by default the only scan, and the
    middle plane, which ``info.notes`` says. cache_dir:
    where a URL is copied to when its format cannot be read by byte ranges; by default the user's cache folder.
    cache_bytes: what all such copies together may take; the least recently used go first. copy: off to make no copy;
    one that is there already is read all the same.
    ``info.reader`` and ``info.reader_reason`` say who reads it and why.

    Raises SlideOpenError when the file is not there, not readable, empty or damaged, NeedsCopyError when it could only
    be read from a copy that may not be made, UnsupportedSlideError when no reader understands it, its subclass
    NotAPictureError when it is understood and is no one colour picture of 8 bits (or not the scene or plane asked for),
    ResolutionError when the resolution that the file states is none of a microscope, ConfigError for an unknown reader,
    a scene or z below 0 or an mpp out of bounds.
    """
    if reader not in READERS:
        raise ConfigError(f"unknown reader {reader!r}", remedy=f"known ones are {', '.join(READERS)}")
    try:
        asked = _Asked(user_mpp(mpp), _from_zero("scene", scene), _from_zero("z", z))
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error
    readers = [entry for entry in _TABLE if reader in ("auto", entry.name)]
    if is_url(path) and (reader == "zarr" or (reader == "auto" and _looks_zarr(path))):
        # A store of many files: read by ranges or not at all.
        return _first(str(path), readers[:1], asked)
    if is_url(path):
        return _open_url(str(path), readers, asked, cache_dir, cache_bytes, copy)
    found = _existing(Path(path))
    if reader == "openslide" and _looks_dicom(found):
        _check_dicom(found, asked)
    slide = _first(found, [entry for entry in readers if entry.takes(found)], asked)
    slide.info = replace(slide.info, path=str(path))
    return slide


def _open_url(
    url: str,
    readers: Sequence[_Reader],
    asked: _Asked,
    cache_dir: Path | None,
    cache_bytes: int | None,
    copy: bool,
) -> Slide:
    from wsi_pipe.slides.storage.staging import LIMIT_BYTES, stage

    declined = ""
    by_range = [entry for entry in readers if entry.urls and entry.takes(url)]
    if by_range:
        try:
            return _first(url, by_range, asked)
        except NotAPictureError:
            raise
        except UnsupportedSlideError as error:
            declined = f"not read by byte ranges ({_reason(error, url)}), so "
    staged = stage(url, cache_dir, limit_bytes=LIMIT_BYTES if cache_bytes is None else cache_bytes, fetch=copy)
    try:
        slide = _first(staged.path, [entry for entry in readers if entry.takes(staged.path)], asked, shown=url)
    except BaseException:
        staged.mark.release()
        raise
    slide.copy = staged.mark
    note = f"{declined}copied to {staged.path}" if staged.fetched else f"{declined}found at {staged.path}"
    slide.info = replace(slide.info, path=url, reader_reason=f"{slide.info.reader_reason}; {note}")
    return slide


def _first(path: str | Path, readers: Sequence[_Reader], asked: _Asked, *, shown: str = "") -> BaseSlide:
    """The slide by the first reader that takes it; ``shown`` stands for the path in messages."""
    name = shown or str(path)
    reasons: list[str] = []
    remedy: str | None = None
    known = False
    for entry in readers:
        try:
            slide = entry.open(path, asked, declined=bool(reasons))
        except NotAPictureError as error:
            # What the file holds is known: a reader that knows less would take it for something else.
            raise NotAPictureError(f"{name}: {_reason(error, path)}", remedy=error.remedy) from error
        except UnsupportedSlideError as error:
            reasons.append(f"{entry.name}: {_reason(error, path)}")
            remedy = remedy if known else error.remedy
            known = known or not _other_format(error, path)
            continue
        except SlideOpenError as error:
            if not known:
                raise
            # One that understood the file said why it is not read: that another fails on it is no sign of damage.
            reasons.append(f"{entry.name}: {_reason(error, path)}")
            continue
        if reasons:
            slide.info = replace(
                slide.info, reader_reason=f"{slide.info.reader_reason}; declined by {'; '.join(reasons)}"
            )
        return _checked(slide, asked, name)
    said = "; ".join(reasons)
    # Of a reader that was asked for by name, its own words are enough.
    text = said.partition(": ")[2] if len(reasons) == 1 else f"no reader understands it ({said or 'none was asked'})"
    raise UnsupportedSlideError(
        f"{name}: {text}{_hint(path)}",
        remedy=remedy or "give a whole-slide image: SVS, TIFF, NDPI, MRXS, SCN, DICOM and so on, or a plain image",
    )


def _check_dicom(path: Path, asked: _Asked) -> None:
    """Raise NotAPictureError where a DICOM series is no picture for the reader that knows it, whoever is to read it."""
    from wsi_pipe.slides.dicom.reader import open_dicom

    try:
        open_dicom(path, mpp=asked.mpp).close()
    except NotAPictureError:
        raise
    except SlideError:
        # Damage and codecs are for the reader that was asked for to report.
        return


def _checked(slide: BaseSlide, asked: _Asked, name: str) -> BaseSlide:
    """The slide, with the scan and plane that were asked for in its fingerprint.

    Raises ResolutionError where it states a resolution that no microscope has.
    """
    mpp = slide.pyramid.mpp
    if mpp is not None and not in_mpp_bounds(*mpp):
        slide.close()
        low, high = MPP_BOUNDS
        raise ResolutionError(
            f"{name}: the file states {mpp[0]:g} x {mpp[1]:g} um/px ({slide.info.mpp_source}), which is outside "
            f"{low:g} to {high:g}",
            remedy="give the right one with --slide-mpp X (um per level-0 pixel), or in the column mpp of a slide list",
        )
    if asked.scene is not None or asked.z is not None:
        # Scans of one size would else pass for each other; without the options fingerprints stay as they were.
        text = f"{slide.info.fingerprint} scene={asked.scene} z={asked.z}"
        fingerprint = hashlib.sha256(text.encode()).hexdigest()
        slide.info = replace(slide.info, scene=asked.scene, z=asked.z, fingerprint=fingerprint)
    return slide


def _from_zero(name: str, value: int | None) -> int | None:
    if value is not None and (isinstance(value, bool) or value != int(value) or value < 0):
        raise ValueError(f"{name} {value!r} is not a whole number from 0")
    return None if value is None else int(value)


def _other_format(error: UnsupportedSlideError, path: str | Path) -> bool:
    """Whether a reader said no more than that the file is not of its format."""
    return _reason(error, path).startswith(("is not a", "is no ", "OpenSlide does not know the format"))


def _reason(error: SlideError, path: str | Path) -> str:
    """An error's message without the path that it begins with."""
    return error.message.removeprefix(str(path)).lstrip(": ")


def _existing(path: Path) -> Path:
    """The file to open, checked so that every reader need not: there, a file, readable, not empty.

    A folder stands for the one slide in it where that is a DICOM series, and for itself where it is a Zarr store.
    """
    try:
        status = path.stat()
        if is_zarr_store(path):
            return path
        if path.is_dir():
            return _in_folder(path)
        if not path.is_file():
            raise SlideOpenError(f"{path} is no regular file", remedy="give the path of a whole-slide image")
        with open(path, "rb") as handle:
            handle.read(1)
    except SlideOpenError:
        raise
    except (OSError, ValueError) as error:
        number = error.errno if isinstance(error, OSError) else None
        raise SlideOpenError(f"{path}: {_CAUSES.get(number or 0, _text(error))}", remedy=_remedy(number)) from error
    if status.st_size == 0:
        raise SlideOpenError(f"{path} is empty (0 bytes)", remedy="copy it again from its source")
    return path


_CAUSES = {
    errno.ENOENT: "no such file",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ELOOP: "a symbolic link that leads back to itself",
    errno.ENAMETOOLONG: "the name is too long for the file system",
    errno.EIO: "the disk or network file system reports an input error",
    errno.ESTALE: "the network file system has lost the file",
}


def _remedy(number: int | None) -> str:
    if number in (errno.EACCES, errno.EPERM):
        return "ask for read permission on the file and its folders"
    if number in (errno.EIO, errno.ESTALE):
        return "check the disk or the mount, then run again"
    return "check the path"


def _text(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _in_folder(folder: Path) -> Path:
    try:
        series = folder_series(folder)
    except OSError as error:
        raise SlideOpenError(f"{folder}: {_text(error)}", remedy=_remedy(error.errno)) from error
    if len(series) == 1:
        return series[0][0]
    cause = f"{len(series)} DICOM series" if series else "no DICOM series"
    raise SlideOpenError(
        f"{folder} is a folder with {cause} in it, not a slide", remedy="give a slide file, or a folder of one series"
    )


def _hint(path: str | Path) -> str:
    """What a file that nobody understands may be, from its first bytes."""
    if is_url(path) or Path(path).is_dir():
        return ""
    with open(path, "rb") as handle:
        head = handle.read(512)
    for magic, kind in _MAGIC.items():
        if head.lstrip().lower().startswith(magic):
            return f"; it looks like {kind}"
    if not any(head):
        return "; it begins with zeros only, as a failed copy does"
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError:
        return ""
    return "; it looks like text" if text.isprintable() or "\n" in text else ""


_MAGIC = {
    b"<!doctype html": "a web page, perhaps an error page saved as a slide",
    b"<html": "a web page, perhaps an error page saved as a slide",
    b"<?xml": "XML",
    b"pk\x03\x04": "a ZIP archive: unpack it first",
    b"\x1f\x8b": "a gzip archive: unpack it first",
    b"%pdf": "a PDF",
    b"version https://git-lfs": "a Git LFS pointer: fetch the file itself",
}
