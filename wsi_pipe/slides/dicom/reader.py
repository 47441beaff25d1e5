"""DICOM whole-slide images: the levels of a series, each an instance (or several, concatenated) of tiled frames.

pydicom reads the tags; where the frames lie is read here, from the offset tables or along the fragments.
References: DICOM PS3.3 C.8.12.4 (VL Whole Slide Microscopy), C.7.6.17 (multi-frame dimension, tiling), PS3.5 A.4.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from wsi_pipe.errors import SlideError, SlideOpenError, SlideReadError, UnsupportedSlideError
from wsi_pipe.geometry import FloatPair
from wsi_pipe.slides.base import ReadStats, RGBArray, SlideInfo
from wsi_pipe.slides.dicom.image import DicomImage, Instance, codec_name
from wsi_pipe.slides.native import NativeSlide, build_pyramid, only_picture, read_whole, user_mpp
from wsi_pipe.slides.parts import dicom_series, without_warnings
from wsi_pipe.slides.storage.remote import list_folder
from wsi_pipe.slides.storage.source import SourceFile, is_url, open_source, slide_fingerprint

__all__ = ["DicomSlide", "open_dicom"]

WSI_STORAGE = "1.2.840.10008.5.1.4.1.1.77.1.6"
MAX_HEADER_BYTES = 1 << 28
MAX_VALUE_BYTES = 1 << 24
MAX_FILES = 1000
"""In a folder behind a URL, where each costs requests to tell its series."""

_ASSOCIATED = {"LABEL": "label", "OVERVIEW": "macro", "THUMBNAIL": "thumbnail"}


class DicomSlide(NativeSlide):
    """A slide in a DICOM series; see ``open_dicom``."""

    def __init__(self, path: str, instances: Sequence[Instance], mpp: FloatPair | None, stats: ReadStats) -> None:
        levels, self._associated = _sort_instances(path, instances)
        images = sorted((DicomImage(level) for level in levels), key=lambda image: -image.size_px[0] * image.size_px[1])
        finest = next(level[0] for level in levels if level[0].size_px == images[0].size_px)
        stated = _spacing(finest)
        pyramid = build_pyramid(path, images, stated if mpp is None else mpp)
        for image in images:
            image.probe()
        files = [i.source for i in sorted(instances, key=lambda i: str(i.tags.get("SOPInstanceUID", "")))]
        optical = (finest.tags.get("OpticalPathSequence") or [None])[0]
        power = None if optical is None else optical.get("ObjectiveLensPower")
        icc = None if optical is None else optical.get("ICCProfile")
        info = SlideInfo(
            path=path,
            vendor="dicom",
            reader="tiff",
            reader_reason=f"DICOM series with {codec_name(finest.syntax)} frames, read by its own structure",
            fingerprint=slide_fingerprint(files, [image.size_px for image in images]),
            mpp_source="user" if mpp is not None else "none" if stated is None else "dicom.PixelSpacing",
            objective_power=None if power is None or float(power) <= 0 else float(power),
            icc=bytes(icc) if icc else None,
            properties={
                f"dicom.{name}": str(finest.tags.get(name))
                for name in ("Manufacturer", "ManufacturerModelName", "SeriesInstanceUID")
                if finest.tags.get(name)
            },
        )
        super().__init__(info, pyramid, images, stats)
        self._sources = [instance.source for instance in instances]

    def associated_images(self) -> Mapping[str, RGBArray]:
        """See Slide.associated_images."""
        found: dict[str, RGBArray] = {}
        for name, instance in self._associated.items():
            try:
                found[name] = read_whole(DicomImage([instance]))
            except UnsupportedSlideError:
                # "As far as the file has them": a label in an odd compression is no reason to fail.
                continue
            except SlideReadError:
                raise
            except Exception as error:  # tags are converted when they are looked at, and pydicom raises what it will
                raise SlideReadError(f"{self.info.path}: the {name} image cannot be decoded: {error}") from error
        return found

    def close(self) -> None:
        """See Slide.close."""
        for source in self._sources:
            source.close()
        super().close()


def _spacing(instance: Instance) -> FloatPair | None:
    """(x, y) um/px from PixelSpacing, which states the distance of rows first, in mm."""
    shared = instance.tags.get("SharedFunctionalGroupsSequence") or []
    measures = (shared[0].get("PixelMeasuresSequence") if len(shared) else None) or []
    values = measures[0].get("PixelSpacing") if len(measures) else None
    try:
        y, x = (float(value) * 1000 for value in values)  # type: ignore[union-attr]
    except (TypeError, ValueError):
        return None
    return (x, y) if np.isfinite(x) and np.isfinite(y) and x > 0 and y > 0 else None


def _sort_instances(path: str, instances: Sequence[Instance]) -> tuple[list[list[Instance]], dict[str, Instance]]:
    """The instances of each level, in the order of their frames, and the associated images by name."""
    levels: dict[str, list[Instance]] = {}
    associated: dict[str, Instance] = {}
    for instance in instances:
        if instance.kind in _ASSOCIATED:
            associated.setdefault(_ASSOCIATED[instance.kind], instance)
        elif instance.kind == "VOLUME":
            piece = instance.tags.get("ConcatenationUID") or instance.tags.get("SOPInstanceUID")
            levels.setdefault(str(piece), []).append(instance)
    if not levels:
        raise UnsupportedSlideError(f"{path}: the DICOM series has no VOLUME image")
    for pieces in levels.values():
        pieces.sort(key=lambda i: i.number("InConcatenationNumber", 1))
        expected = pieces[0].number("InConcatenationTotalNumber", len(pieces))
        numbers = [i.number("InConcatenationNumber", 1) for i in pieces]
        if numbers != list(range(1, max(expected, 1) + 1)):
            raise UnsupportedSlideError(
                f"{path}: {len(pieces)} of {expected} pieces of a concatenation are in the folder",
                remedy="put all files of the series in one folder",
            )
    return list(levels.values()), associated


def _open_instance(path: str | Path, stats: ReadStats) -> Instance:
    import pydicom

    source = open_source(path, stats)
    try:
        handle = SourceFile(source, limit=MAX_HEADER_BYTES)
        try:
            with without_warnings():
                tags = pydicom.dcmread(handle, stop_before_pixels=True, defer_size=MAX_VALUE_BYTES)
            syntax = str(tags.file_meta.get("TransferSyntaxUID", ""))
            kind = str(tags.get("SOPClassUID", ""))
        except (SlideError, MemoryError):
            raise
        except pydicom.errors.InvalidDicomError as error:
            raise UnsupportedSlideError(f"{source.name} is not a DICOM file") from error
        except Exception as error:  # pydicom raises whatever a damaged element leads to
            raise SlideOpenError(
                f"{source.name}: the DICOM header is damaged: {type(error).__name__}: {error}",
                remedy="the file is truncated or damaged: copy it again",
            ) from error
        if kind != WSI_STORAGE:
            raise UnsupportedSlideError(f"{source.name}: the DICOM file is no whole-slide image (SOP class {kind})")
        return Instance(source, tags, handle.tell(), syntax)
    except BaseException:
        source.close()
        raise


class _Lenience:
    """How many threads want pydicom lenient, and how it was before."""

    lock = threading.Lock()
    users = 0
    before: Any = None


@contextmanager
def _lenient_pydicom() -> Iterator[None]:
    """Values that break a rule of form (a UID that ends in a dot) are common, harmless, and no news to the user.

    pydicom has one setting for the whole process, so it changes with the first user and back with the last.
    """
    import pydicom

    settings = pydicom.config.settings
    with _Lenience.lock:
        if _Lenience.users == 0:
            _Lenience.before = settings.reading_validation_mode
            settings.reading_validation_mode = pydicom.config.IGNORE
        _Lenience.users += 1
    try:
        yield
    finally:
        with _Lenience.lock:
            _Lenience.users -= 1
            if _Lenience.users == 0:
                settings.reading_validation_mode = _Lenience.before


def open_dicom(
    path: str | Path, *, mpp: float | FloatPair | None = None, scene: int | None = None, z: int | None = None
) -> DicomSlide:
    """Open a DICOM whole-slide image by any file, or URL, of its series; the other levels are found beside it.

    mpp: micrometres per level-0 pixel, one value or (x, y), instead of what the file states. Raises SlideOpenError when
    a file is not there or damaged, UnsupportedSlideError when it is no DICOM slide or its structure is not understood.
    """
    given = user_mpp(mpp)
    only_picture(str(path), scene, z)
    with _lenient_pydicom():
        return _open_series(path, given)


def _beside(path: str | Path) -> list[str | Path]:
    """The files that may belong to the series of ``path``, without it. Raises UnsupportedSlideError for a URL whose
    folder cannot be listed."""
    if not is_url(path):
        own = Path(path).resolve()
        return [part for part in dicom_series(Path(path)) if part.resolve() != own]
    found = [url for url in list_folder(str(path)) if url.lower().endswith(".dcm") and url != path]
    if len(found) > MAX_FILES:
        raise UnsupportedSlideError(f"{path}: {len(found)} DICOM files are in its folder, at most {MAX_FILES} are read")
    return list(found)


def _open_series(path: str | Path, mpp: FloatPair | None) -> DicomSlide:
    stats = ReadStats()
    instances: list[Instance] = []
    try:
        instances.append(_open_instance(path, stats))
        series = str(instances[0].tags.get("SeriesInstanceUID", ""))
        for part in _beside(path):
            try:
                other = _open_instance(part, stats)
            except UnsupportedSlideError:
                continue
            known = {str(i.tags.get("SOPInstanceUID", "")) for i in instances}
            same = str(other.tags.get("SeriesInstanceUID", "")) == series
            if same and str(other.tags.get("SOPInstanceUID", "")) not in known:
                instances.append(other)
            else:
                other.source.close()
        return DicomSlide(str(path), instances, mpp, stats)
    except SlideReadError as error:
        _close(instances)
        raise SlideOpenError(error.message, remedy=error.remedy) from error
    except SlideError:
        _close(instances)
        raise
    except Exception as error:  # tags are converted when they are looked at, and pydicom raises what it will
        _close(instances)
        raise SlideOpenError(
            f"{path}: the DICOM header is damaged: {type(error).__name__}: {error}",
            remedy="the file is truncated or damaged: copy it again",
        ) from error


def _close(instances: Sequence[Instance]) -> None:
    for instance in instances:
        instance.source.close()
