"""DICOM whole-slide images: the levels of a series, each an instance (or several, concatenated) of tiled frames.

pydicom reads the tags; where the frames lie is read here, from the offset tables or along the fragments.
References: DICOM PS3.3 C.8.12.4 (VL Whole Slide Microscopy), C.7.6.17 (multi-frame dimension, tiling), PS3.5 A.4.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wsi_pipe.errors import SlideError, SlideOpenError, SlideReadError, UnsupportedSlideError
from wsi_pipe.geometry import FloatPair, IntPair
from wsi_pipe.slides.base import WHITE, ReadStats, RGBArray, SlideInfo, paste
from wsi_pipe.slides.codecs import JPEG_REDUCES, CodecError, Decoder, JpegDecoder, PlainDecoder
from wsi_pipe.slides.dicom_frames import Frame, frame_table, join_fragments
from wsi_pipe.slides.jpeg2000 import Jpeg2000Decoder
from wsi_pipe.slides.native import NativeSlide, build_pyramid, user_mpp
from wsi_pipe.slides.parts import dicom_series
from wsi_pipe.slides.source import Source, SourceFile, is_url, open_source, slide_fingerprint

__all__ = ["DicomSlide", "open_dicom"]

WSI_STORAGE = "1.2.840.10008.5.1.4.1.1.77.1.6"
JPEG_SYNTAXES = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51")
JPEG2000_SYNTAXES = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
PLAIN_SYNTAXES = ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2")
COLOURS = ("RGB", "YBR_FULL_422", "YBR_FULL", "YBR_ICT", "YBR_RCT")

MAX_HEADER_BYTES = 1 << 28
MAX_VALUE_BYTES = 1 << 24
MAX_FRAMES = 1 << 24
MAX_WHOLE_PX = 1 << 26

_ASSOCIATED = {"LABEL": "label", "OVERVIEW": "macro", "THUMBNAIL": "thumbnail"}


@dataclass(frozen=True)
class _Instance:
    """One file of the series: its tags, its bytes, and where its pixel data begins."""

    source: Source
    tags: Any
    pixels_at: int
    syntax: str

    @property
    def kind(self) -> str:
        """The third value of ImageType: VOLUME, LABEL, OVERVIEW or THUMBNAIL."""
        values = list(self.tags.get("ImageType", []) or [])
        return str(values[2]) if len(values) > 2 else ""

    @property
    def size_px(self) -> IntPair:
        """(width, height) of the whole level."""
        return (self.number("TotalPixelMatrixColumns"), self.number("TotalPixelMatrixRows"))

    def number(self, name: str, default: int | None = None) -> int:
        value = self.tags.get(name, default)
        try:
            return int(value)
        except (TypeError, ValueError) as error:
            raise UnsupportedSlideError(f"{self.source.name}: DICOM {name} is missing or no number") from error


class DicomImage:
    """One level: the frames of one instance, or of the instances of one concatenation.

    Raises UnsupportedSlideError when anything about it is not understood.
    """

    def __init__(self, instances: Sequence[_Instance]) -> None:
        first = instances[0]
        self._name = first.source.name
        self.size_px = first.size_px
        self.block_px = (first.number("Columns"), first.number("Rows"))
        if min(*self.size_px, *self.block_px) < 1 or max(self.block_px) > 1 << 14:
            raise UnsupportedSlideError(
                f"{self._name}: {self.size_px[0]} x {self.size_px[1]} px in frames of {self.block_px[0]} x "
                f"{self.block_px[1]} px is out of bounds"
            )
        self._grid = (-(-self.size_px[0] // self.block_px[0]), -(-self.size_px[1] // self.block_px[1]))
        if self._grid[0] * self._grid[1] > MAX_FRAMES:
            raise UnsupportedSlideError(f"{self._name}: {self._grid[0]} x {self._grid[1]} frames are out of bounds")
        for instance in instances:
            _check_pixels(instance)
        alike = {(i.syntax, i.size_px, i.number("Columns"), i.number("Rows"), _colour(i)) for i in instances}
        if len(alike) > 1:
            raise UnsupportedSlideError(f"{self._name}: the pieces of a concatenation differ in size or coding")
        self._decoder = _decoder(first, self.block_px)
        self.reduces: tuple[int, ...] = (1,) if first.syntax in PLAIN_SYNTAXES else JPEG_REDUCES
        self._frames = self._place(instances)

    def _place(self, instances: Sequence[_Instance]) -> dict[IntPair, tuple[Source, Frame]]:
        frames: dict[IntPair, tuple[Source, Frame]] = {}
        at = 0
        for instance in instances:
            count = instance.number("NumberOfFrames", 1)
            if not 0 < count <= MAX_FRAMES:
                raise UnsupportedSlideError(f"{instance.source.name}: {count} frames are out of bounds")
            plain = self.block_px[0] * self.block_px[1] * 3 if instance.syntax in PLAIN_SYNTAXES else 0
            table = frame_table(instance.source, instance.tags, instance.pixels_at, count, plain)
            for cell, frame in zip(self._cells(instance, at, count), table, strict=True):
                if cell in frames or cell[1] >= self._grid[1]:
                    raise UnsupportedSlideError(
                        f"{instance.source.name}: more than one frame for a place: focal planes or optical paths are "
                        "not read"
                    )
                frames[cell] = (instance.source, frame)
            at += count
        full = not any(instance.tags.get("PerFrameFunctionalGroupsSequence") for instance in instances)
        if full and at != self._grid[0] * self._grid[1]:
            raise UnsupportedSlideError(
                f"{self._name}: {at} frames for {self._grid[0]} x {self._grid[1]} tiles: focal planes or optical paths "
                "are not read"
            )
        return frames

    def _cells(self, instance: _Instance, start: int, count: int) -> list[IntPair]:
        """The cell of each frame of an instance whose first frame is number ``start`` of the level."""
        columns = self._grid[0]
        groups = instance.tags.get("PerFrameFunctionalGroupsSequence") or []
        kind = str(instance.tags.get("DimensionOrganizationType", "") or ("TILED_SPARSE" if groups else "TILED_FULL"))
        if kind == "TILED_FULL":
            if instance.number("TotalPixelMatrixFocalPlanes", 1) != 1:
                raise UnsupportedSlideError(f"{instance.source.name}: several focal planes are not read")
            return [(i % columns, i // columns) for i in range(start, start + count)]
        if len(groups) != count:
            raise UnsupportedSlideError(f"{instance.source.name}: {len(groups)} frame positions for {count} frames")
        return [self._sparse_cell(instance, group) for group in groups]

    def _sparse_cell(self, instance: _Instance, group: Any) -> IntPair:
        try:
            position = group.PlanePositionSlideSequence[0]
            x = int(position.ColumnPositionInTotalImagePixelMatrix) - 1
            y = int(position.RowPositionInTotalImagePixelMatrix) - 1
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise UnsupportedSlideError(f"{instance.source.name}: a frame's position is missing or damaged") from error
        cell = (x // self.block_px[0], y // self.block_px[1])
        if x % self.block_px[0] or y % self.block_px[1] or not (0 <= x < self.size_px[0] and 0 <= y < self.size_px[1]):
            raise UnsupportedSlideError(f"{instance.source.name}: a frame at ({x}, {y}) px lies off the grid of tiles")
        return cell

    def fetch(self, cells: Sequence[IntPair]) -> list[Any]:
        """Raw data of each block: (bytes, whether they are fragments with item headers). Raises SlideReadError."""
        found = [self._frames.get(cell) for cell in cells]
        data: dict[int, bytes] = {}
        for source in {id(item[0]): item[0] for item in found if item is not None}.values():
            mine = [i for i, item in enumerate(found) if item is not None and item[0] is source]
            spans = [item[1] for item in (found[i] for i in mine) if item is not None]
            limit = 2 * self.block_px[0] * self.block_px[1] * 3 + (1 << 16)
            if any(span.length > limit for span in spans):
                raise SlideReadError(f"{source.name}: a frame declares more bytes than it can take")
            data.update(zip(mine, source.read_many([(s.offset, s.length) for s in spans]), strict=True))
        return [None if item is None else (data[i], item[1].fragments) for i, item in enumerate(found)]

    def decode(self, cell: IntPair, data: Any, reduce: int) -> RGBArray:
        """See NativeImage.decode."""
        raw, fragments = data
        return self._decoder.decode(join_fragments(raw) if fragments else raw, reduce)

    def probe(self) -> None:
        """Decode one frame. Raises UnsupportedSlideError when it does not decode."""
        cell = next(iter(self._frames), None)
        if cell is None:
            return
        try:
            self.decode(cell, self.fetch([cell])[0], 1)
        except CodecError as error:
            raise UnsupportedSlideError(f"{self._name}: frame at column {cell[0]}, row {cell[1]}: {error}") from error

    def read_whole(self) -> RGBArray:
        """The whole image, uint8 (h, w, 3), for small ones. Raises CodecError, SlideReadError."""
        width, height = self.size_px
        if width * height > MAX_WHOLE_PX:
            raise CodecError(f"{width} x {height} px are too many for an associated image")
        out = np.full((height, width, 3), WHITE, np.uint8)
        cells = [(c, r) for r in range(self._grid[1]) for c in range(self._grid[0])]
        for cell, data in zip(cells, self.fetch(cells), strict=True):
            if data is not None:
                paste(out, self.decode(cell, data, 1), cell[0] * self.block_px[0], cell[1] * self.block_px[1])
        return out


def _colour(instance: _Instance) -> str:
    return str(instance.tags.get("PhotometricInterpretation", ""))


def _check_pixels(instance: _Instance) -> None:
    name = instance.source.name
    bits = (instance.number("BitsAllocated"), instance.number("BitsStored", 8))
    if instance.number("SamplesPerPixel", 1) != 3 or bits != (8, 8) or instance.number("PixelRepresentation", 0):
        raise UnsupportedSlideError(f"{name}: only 8-bit RGB images are read, not {_colour(instance) or 'unknown'}")
    if _colour(instance) not in COLOURS:
        raise UnsupportedSlideError(f"{name}: photometric interpretation {_colour(instance)!r} is not read")
    if instance.syntax not in (*JPEG_SYNTAXES, *JPEG2000_SYNTAXES, *PLAIN_SYNTAXES):
        raise UnsupportedSlideError(f"{name}: DICOM transfer syntax {instance.syntax} is not read")
    plain = instance.syntax in PLAIN_SYNTAXES
    if plain and (_colour(instance) != "RGB" or instance.number("PlanarConfiguration", 0) != 0):
        raise UnsupportedSlideError(f"{name}: uncompressed frames are read as interleaved RGB only")


def _decoder(instance: _Instance, size_px: IntPair) -> Decoder:
    colour = _colour(instance)
    if instance.syntax in JPEG_SYNTAXES:
        return JpegDecoder(size_px, 3, ycbcr=colour != "RGB")
    if instance.syntax in JPEG2000_SYNTAXES:
        # ICT and RCT are the codestream's own transforms, which decoding undoes.
        return Jpeg2000Decoder(size_px, 3, ycbcr=colour in ("YBR_FULL", "YBR_FULL_422"))
    return PlainDecoder(size_px, 3, "none", difference=False)


class DicomSlide(NativeSlide):
    """A slide in a DICOM series; see ``open_dicom``."""

    def __init__(self, path: str, instances: Sequence[_Instance], mpp: FloatPair | None, stats: ReadStats) -> None:
        levels, self._associated = _sort_instances(path, instances)
        images = sorted((DicomImage(level) for level in levels), key=lambda image: -image.size_px[0] * image.size_px[1])
        for image in images:
            image.probe()
        finest = next(level[0] for level in levels if level[0].size_px == images[0].size_px)
        stated = _spacing(finest)
        pyramid = build_pyramid(path, images, stated if mpp is None else mpp)
        by_size = sorted((i for level in levels for i in level), key=lambda i: (-i.size_px[0], i.source.size))
        optical = (finest.tags.get("OpticalPathSequence") or [None])[0]
        power = None if optical is None else optical.get("ObjectiveLensPower")
        icc = None if optical is None else optical.get("ICCProfile")
        info = SlideInfo(
            path=path,
            vendor="dicom",
            reader="tiff",
            reader_reason=f"DICOM series with {_codec(finest.syntax)} frames, read by its own structure",
            fingerprint=slide_fingerprint([i.source for i in by_size], [image.size_px for image in images]),
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
                found[name] = DicomImage([instance]).read_whole()
            except UnsupportedSlideError:
                # "As far as the file has them": a label in an odd compression is no reason to fail.
                continue
            except CodecError as error:
                raise SlideReadError(f"{self.info.path}: the {name} image cannot be decoded: {error}") from error
        return found

    def close(self) -> None:
        """See Slide.close."""
        for source in self._sources:
            source.close()


def _codec(syntax: str) -> str:
    return "JPEG" if syntax in JPEG_SYNTAXES else "JPEG 2000" if syntax in JPEG2000_SYNTAXES else "uncompressed"


def _spacing(instance: _Instance) -> FloatPair | None:
    """(x, y) um/px from PixelSpacing, which states the distance of rows first, in mm."""
    shared = instance.tags.get("SharedFunctionalGroupsSequence") or []
    measures = (shared[0].get("PixelMeasuresSequence") if len(shared) else None) or []
    values = measures[0].get("PixelSpacing") if len(measures) else None
    try:
        y, x = (float(value) * 1000 for value in values)  # type: ignore[union-attr]
    except (TypeError, ValueError):
        return None
    return (x, y) if np.isfinite(x) and np.isfinite(y) and x > 0 and y > 0 else None


def _sort_instances(path: str, instances: Sequence[_Instance]) -> tuple[list[list[_Instance]], dict[str, _Instance]]:
    """The instances of each level, in the order of their frames, and the associated images by name."""
    levels: dict[str, list[_Instance]] = {}
    associated: dict[str, _Instance] = {}
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


def _open_instance(path: str | Path, stats: ReadStats) -> _Instance:
    import pydicom

    source = open_source(path, stats)
    try:
        handle = SourceFile(source, limit=MAX_HEADER_BYTES)
        try:
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
        return _Instance(source, tags, handle.tell(), syntax)
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


def open_dicom(path: str | Path, *, mpp: float | FloatPair | None = None) -> DicomSlide:
    """Open a DICOM whole-slide image by any file of its series; the other levels are found beside it.

    mpp: micrometres per level-0 pixel, one value or (x, y), instead of what the file states. Raises SlideOpenError when
    a file is not there or damaged, UnsupportedSlideError when it is no DICOM slide or its structure is not understood.
    """
    given = user_mpp(mpp)
    if is_url(path):
        raise UnsupportedSlideError(f"{path}: a DICOM series is many files, which a URL does not list")
    with _lenient_pydicom():
        return _open_series(path, given)


def _open_series(path: str | Path, mpp: FloatPair | None) -> DicomSlide:
    stats = ReadStats()
    instances: list[_Instance] = []
    try:
        instances.append(_open_instance(path, stats))
        series = str(instances[0].tags.get("SeriesInstanceUID", ""))
        for part in dicom_series(Path(path)):
            if part.resolve() == Path(path).resolve():
                continue
            try:
                other = _open_instance(part, stats)
            except UnsupportedSlideError:
                continue
            if str(other.tags.get("SeriesInstanceUID", "")) == series:
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
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, OSError, NotImplementedError) as error:
        # pydicom converts values when they are looked at, and a damaged one raises whatever it leads to.
        _close(instances)
        raise SlideOpenError(
            f"{path}: the DICOM header is damaged: {type(error).__name__}: {error}",
            remedy="the file is truncated or damaged: copy it again",
        ) from error


def _close(instances: Sequence[_Instance]) -> None:
    for instance in instances:
        instance.source.close()
