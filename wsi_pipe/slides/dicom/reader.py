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

from wsi_pipe.errors import NotAPictureError, SlideError, SlideOpenError, SlideReadError, UnsupportedSlideError
from wsi_pipe.geometry import FloatPair
from wsi_pipe.slides.base import ReadStats, RGBArray, SlideInfo
from wsi_pipe.slides.codecs.decode import CodecError
from wsi_pipe.slides.dicom.image import DicomImage
from wsi_pipe.slides.dicom.instance import Instance, codec_name
from wsi_pipe.slides.dicom.scale import Candidate, arrange, spacing, stated_mpp
from wsi_pipe.slides.native import NativeSlide, build_pyramid, only_picture, read_whole, user_mpp
from wsi_pipe.slides.parts import DEFLATED, WSI_STORAGE, dicom_series, without_warnings
from wsi_pipe.slides.storage.remote import list_folder
from wsi_pipe.slides.storage.source import SourceFile, is_url, open_source, slide_fingerprint

__all__ = ["WSI_STORAGE", "DicomSlide", "open_dicom"]

MAX_HEADER_BYTES = 1 << 28
MAX_VALUE_BYTES = 1 << 24
MAX_FILES = 1000
"""In a folder behind a URL, where each costs requests to tell its series."""

_ASSOCIATED = {"LABEL": "label", "OVERVIEW": "macro", "THUMBNAIL": "thumbnail"}


class DicomSlide(NativeSlide):
    """A slide in a DICOM series; see ``open_dicom``."""

    def __init__(
        self, path: str, instances: Sequence[Instance], mpp: FloatPair | None, z: int | None, stats: ReadStats
    ) -> None:
        levels, self._associated, notes = _sort_instances(path, instances)
        levels.sort(key=lambda pieces: -pieces[0].size_px[0] * pieces[0].size_px[1])
        finest, kept = levels[0][0], []
        for pieces in levels:
            image = DicomImage(pieces, z)
            build_pyramid(path, [image], None)
            kept.append((pieces[0], image))
        planes = kept[0][1].focal_planes
        notes += _of_planes(path, [image for _, image in kept], z)
        images, pyramid, left_out = arrange(
            path,
            [
                Candidate(image, spacing(instance), Path(instance.source.name).name)
                for instance, image in kept
                if image.focal_planes == planes
            ],
            stated_mpp(finest)[0] if mpp is None else mpp,
        )
        notes += left_out
        mpp_source = "user" if mpp is not None else stated_mpp(finest)[1]
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
            mpp_source=mpp_source,
            objective_power=None if power is None or float(power) <= 0 else float(power),
            icc=bytes(icc) if icc else None,
            properties={
                f"dicom.{name}": str(finest.tags.get(name))
                for name in ("Manufacturer", "ManufacturerModelName", "SeriesInstanceUID")
                if finest.tags.get(name)
            },
            scene=None,
            z=z,
            notes=tuple(notes),
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


def _of_planes(path: str, images: Sequence[DicomImage], z: int | None) -> list[str]:
    """What is to be said of focal planes. Raises NotAPictureError for a plane that is not there."""
    first = images[0]
    if first.focal_planes == 1:
        only_picture(path, None, z, what="the file has one focal plane")
        notes = []
    elif z is not None and z >= first.focal_planes:
        raise NotAPictureError(
            f"{path}: --z {z} was asked for, but the slide has {first.focal_planes} focal planes",
            remedy=f"give 0, nearest to the glass, to {first.focal_planes - 1}",
        )
    else:
        chosen = "the middle one is read" if z is None else "as asked for"
        notes = [f"focal plane {first.z} of 0 to {first.focal_planes - 1}, {chosen} (--z N takes another)"]
    for image in images[1:]:
        if image.focal_planes != first.focal_planes:
            width, height = image.size_px
            notes.append(
                f"the level of {width} x {height} px is left out: it has {image.focal_planes} focal planes, level 0 "
                f"has {first.focal_planes}"
            )
    return notes


def _sort_instances(
    path: str, instances: Sequence[Instance]
) -> tuple[list[list[Instance]], dict[str, Instance], list[str]]:
    """The instances of each level, in the order of their frames, the associated images by name, and notes."""
    levels: dict[str, list[Instance]] = {}
    associated: dict[str, Instance] = {}
    others: list[Instance] = []
    for instance in instances:
        if instance.kind in _ASSOCIATED:
            associated.setdefault(_ASSOCIATED[instance.kind], instance)
        elif instance.kind == "VOLUME":
            piece = instance.tags.get("ConcatenationUID") or instance.tags.get("SOPInstanceUID")
            levels.setdefault(str(piece), []).append(instance)
        else:
            others.append(instance)
    if not levels:
        cause = "has no VOLUME image"
        if others:
            kind = others[0].kind
            cause += f": the ImageType of {Path(others[0].source.name).name} " + (
                f"is {kind}" if kind else "is missing"
            )
        raise NotAPictureError(
            f"{path}: the DICOM series {cause}", remedy="ImageType must say which images are the slide (VOLUME)"
        )
    notes = [
        f"{Path(other.source.name).name} is left out: its ImageType is {other.kind or 'missing'}, not VOLUME"
        for other in others
    ]
    for pieces in levels.values():
        pieces.sort(key=lambda i: i.number("InConcatenationNumber", 1))
        expected = pieces[0].number("InConcatenationTotalNumber", len(pieces))
        numbers = [i.number("InConcatenationNumber", 1) for i in pieces]
        if numbers != list(range(1, max(expected, 1) + 1)):
            raise UnsupportedSlideError(
                f"{path}: {len(pieces)} of {expected} pieces of a concatenation are in the folder",
                remedy="put all files of the series in one folder",
            )
    return list(levels.values()), associated, notes


def _open_instance(path: str | Path, stats: ReadStats) -> Instance:
    import pydicom

    source = open_source(path, stats)
    try:
        if DEFLATED in source.read(0, min(source.size, 1024)):
            raise UnsupportedSlideError(f"{source.name}: a deflated DICOM data set is not read")
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
            raise (NotAPictureError if kind else UnsupportedSlideError)(
                f"{source.name}: the DICOM file is no whole-slide image (SOP class {kind or 'missing'})",
                remedy="give a file of the class VL Whole Slide Microscopy",
            )
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

    mpp: micrometres per level-0 pixel, one value or (x, y), instead of what the file states. z: the focal plane, 0
    nearest to the glass; the middle one by default. Raises SlideOpenError when a file is not there or damaged,
    UnsupportedSlideError when its structure is not understood, its subclass NotAPictureError when it is understood and
    is no brightfield slide in 8-bit colour, or has no such plane.
    """
    given = user_mpp(mpp)
    only_picture(str(path), scene, None, what="a DICOM series holds one scan")
    with _lenient_pydicom():
        return _open_series(path, given, z)


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


def _open_series(path: str | Path, mpp: FloatPair | None, z: int | None) -> DicomSlide:
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
        return DicomSlide(str(path), instances, mpp, z, stats)
    except SlideReadError as error:
        _close(instances)
        raise SlideOpenError(error.message, remedy=error.remedy) from error
    except CodecError as error:
        _close(instances)
        raise SlideOpenError(
            f"{path}: a tile does not decode: {error}", remedy="the file is truncated or damaged: copy it again"
        ) from error
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
