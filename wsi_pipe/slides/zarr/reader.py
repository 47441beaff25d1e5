"""OME-Zarr slides: NGFF 0.4 and 0.5 (Zarr 2 and 3), local or behind a URL, sharded or not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsi_pipe.errors import SlideError, SlideOpenError, SlideReadError, UnsupportedSlideError
from wsi_pipe.geometry import FloatPair, Level, Pyramid
from wsi_pipe.slides.base import ReadStats, RGBArray, SlideInfo
from wsi_pipe.slides.codecs.decode import CodecError
from wsi_pipe.slides.levels import level_downsample
from wsi_pipe.slides.native import NativeSlide, build_pyramid, only_picture, read_whole, user_mpp
from wsi_pipe.slides.tiff.likeness import bright_planes, is_alike
from wsi_pipe.slides.zarr.image import ZarrImage
from wsi_pipe.slides.zarr.multiscales import (
    MAX_SERIES,
    Dataset,
    Multiscale,
    check_channels,
    multiscale_of,
    ome_of,
    series_of,
)
from wsi_pipe.slides.zarr.series import Series, associated_kind, choose, fluorescent, names_of
from wsi_pipe.slides.zarr.store import GuardedStore, array_of, attributes_of, open_store, reading

__all__ = ["ZarrSlide", "open_zarr"]

MAX_SHIFT_PX = 1.0
"""By so many of its own pixels a level may be shifted: half a pixel is where the middle of a box of pixels lies."""

SMALLEST_PX = 32
"""Side of a level below which a comparison of contents tells nothing."""

FINGERPRINT_BYTES = 1 << 20
FINGERPRINT_CHUNKS = 64


class ZarrSlide(NativeSlide):
    """A slide in an OME-Zarr store; see ``open_zarr``."""

    def __init__(
        self, store: GuardedStore, chosen: Series, others: Mapping[str, str], mpp: FloatPair | None, z: int | None
    ) -> None:
        name, image = store.name, chosen.image
        notes = [*chosen.notes, *image.notes]
        first = _image(store, chosen.path, image, image.datasets[0], z)
        build_pyramid(name, [first], None)
        said = check_channels(name, first.channels, first.dtype, chosen.ome, rgb=chosen.rgb)
        if not said and not chosen.rgb:
            notes.append(bright_planes(name, first))
        if z is None and first.planes > 1:
            notes.append(
                f"focal plane {first.z} of 0 to {first.planes - 1}, the middle one is read (--z N takes another)"
            )
        elif z is not None and first.planes > 1:
            notes.append(f"focal plane {first.z} of 0 to {first.planes - 1}, as asked for")
        kept = _levels(store, chosen, first, notes)
        stated = _mpp(image)
        images = [level.image for level in kept]
        pyramid = Pyramid(
            tuple(Level(level.image.size_px, level.downsample) for level in kept), stated if mpp is None else mpp
        )
        images[0].probe()
        info = SlideInfo(
            path=name,
            vendor="ome-zarr",
            reader="zarr",
            reader_reason=f"OME-Zarr, chunks of {images[0].block_px[0]} x {images[0].block_px[1]} px read by zarr",
            fingerprint=_fingerprint(store, kept),
            mpp_source="user"
            if mpp is not None
            else "none"
            if stated is None
            else "ome-zarr.coordinateTransformations",
            properties={"ome-zarr.series": chosen.path} if chosen.path else {},
            z=z,
            notes=tuple(notes),
        )
        super().__init__(info, pyramid, images, store.stats)
        self._store, self._others = store, others

    def associated_images(self) -> Mapping[str, RGBArray]:
        """See Slide.associated_images."""
        found: dict[str, RGBArray] = {}
        for kind, path in self._others.items():
            try:
                ome = ome_of(attributes_of(self._store, path))
                image = multiscale_of(self._store.name, ome)
                level = _image(self._store, path, image, image.datasets[0], None)
                check_channels(self._store.name, level.channels, level.dtype, ome)
                build_pyramid(self._store.name, [level], None)
                found[kind] = read_whole(level)
            except (UnsupportedSlideError, CodecError):
                # "As far as the file has them": a label in 16 bits is no reason to fail.
                continue
        return found

    def close(self) -> None:
        """See Slide.close."""
        self._store.shut.set()
        super().close()


@dataclass(frozen=True)
class _Kept:
    """A level that is read. key: of its array in the store."""

    key: str
    array: Any
    image: ZarrImage
    downsample: FloatPair


def _image(store: GuardedStore, path: str, image: Multiscale, dataset: Dataset, z: int | None) -> ZarrImage:
    key = f"{path}/{dataset.path}" if path else dataset.path
    return ZarrImage(store, array_of(store, key), image, key, z)


def _levels(store: GuardedStore, chosen: Series, first: ZarrImage, notes: list[str]) -> list[_Kept]:
    """The levels that are at the scale which the metadata state, finest first; the others go to ``notes``."""
    image, finest = chosen.image, chosen.image.datasets[0]
    x, y = image.axes.index("x"), image.axes.index("y")
    key = f"{chosen.path}/{finest.path}" if chosen.path else finest.path
    kept = [_Kept(key, array_of(store, key), first, (1.0, 1.0))]
    for dataset in image.datasets[1:]:
        key = f"{chosen.path}/{dataset.path}" if chosen.path else dataset.path
        array = array_of(store, key)
        level = ZarrImage(store, array, image, key, None)
        cause = None
        ratio = (dataset.scale[x] / finest.scale[x], dataset.scale[y] / finest.scale[y])
        shift = max(abs(dataset.translation[i] - finest.translation[i]) / dataset.scale[i] for i in (x, y))
        downsample = level_downsample(first.size_px, level.size_px, ratio if image.stated else None, (1, 1))
        before = kept[-1].image.size_px
        if (level.planes, level.channels, level.dtype) != (first.planes, first.channels, first.dtype):
            cause = "it has other focal planes, channels or a type of its own"
        elif downsample is None:
            cause = f"the scale of {ratio[0]:.4g} x {ratio[1]:.4g} that it states does not go with its size"
        elif shift > MAX_SHIFT_PX:
            cause = f"it is shifted by {shift:.3g} of its pixels"
        elif level.size_px[0] >= before[0] or level.size_px[1] > before[1]:
            cause = "it is not smaller than the next finer one"
        if cause is not None or downsample is None:
            notes.append(f"the level of {level.size_px[0]} x {level.size_px[1]} px ({key}) is left out: {cause}")
            continue
        build_pyramid(store.name, [level], None)
        level = ZarrImage(store, array, image, key, first.z)
        step = (downsample[0] / kept[-1].downsample[0], downsample[1] / kept[-1].downsample[1])
        if store.local and min(level.size_px) >= SMALLEST_PX and not is_alike(kept[-1].image, level, step):
            # Behind a URL that would take dozens of requests on each opening.
            notes.append(
                f"the level of {level.size_px[0]} x {level.size_px[1]} px ({key}) is left out: it shows another "
                "picture than the next finer one"
            )
            continue
        kept.append(_Kept(key, array, level, downsample))
    return kept


def _mpp(image: Multiscale) -> FloatPair | None:
    """(x, y) um/px, where the axes have a unit of length and a scale."""
    x, y = image.axes.index("x"), image.axes.index("y")
    um = (image.um[x], image.um[y])
    scale = image.datasets[0].scale
    return None if um[0] is None or um[1] is None else (scale[x] * um[0], scale[y] * um[1])


def _fingerprint(store: GuardedStore, kept: Sequence[_Kept]) -> str:
    """SHA-256 over the arrays' metadata, the first and the last chunks of level 0, and the coarsest level.

    The coarsest level is made of all pixels, so that it changes with them; names, places and times do not count.
    """
    digest = hashlib.sha256()
    for level in kept:
        document = level.array.metadata.to_dict()
        document.pop("attributes", None)
        digest.update(json.dumps(document, sort_keys=True, default=str).encode())
        digest.update(f"{level.image.z};{level.downsample};".encode())
    for level, most in ((kept[0], 2), (kept[-1], FINGERPRINT_CHUNKS)):
        columns, rows = (-(-n // b) for n, b in zip(level.image.size_px, level.image.block_px, strict=True))
        step = max(-(-columns * rows // most), 1)
        places = sorted({*range(0, columns * rows, step), columns * rows - 1}) if most > 2 else [0, columns * rows - 1]
        for place in places:
            (pixels,) = level.image.fetch([(place % columns, place // columns)])
            digest.update(b"none" if pixels is None else pixels[:, : FINGERPRINT_BYTES // 3].tobytes())
    return digest.hexdigest()


def open_zarr(
    path: str | Path, *, mpp: float | FloatPair | None = None, scene: int | None = None, z: int | None = None
) -> ZarrSlide:
    """Open an OME-Zarr store: a local folder, or a URL that fsspec understands.

    mpp: micrometres per level-0 pixel, one value or (x, y), instead of what the store states. scene: which series of a
    collection (bioformats2raw.layout), from 0. z: the focal plane, from 0; the middle one by default. Raises
    SlideOpenError when metadata or the first chunk are damaged, UnsupportedSlideError when the structure is not
    understood, its subclass NotAPictureError when it is no brightfield slide in 8-bit colour, or has no such scene or
    plane.
    """
    given = user_mpp(mpp)
    store = open_store(path, ReadStats())
    try:
        chosen, others = _choose(store, scene)
        return ZarrSlide(store, chosen, others, given, z)
    except SlideReadError as error:
        store.shut.set()
        raise SlideOpenError(error.message, remedy=error.remedy) from error
    except SlideError:
        store.shut.set()
        raise
    except Exception as error:  # metadata are converted when they are looked at
        store.shut.set()
        raise SlideOpenError(
            f"{path}: the metadata are damaged: {type(error).__name__}: {error}", remedy="write the store again"
        ) from error


def _choose(store: GuardedStore, scene: int | None) -> tuple[Series, Mapping[str, str]]:
    """The series to read, and the paths of label and macro images by kind."""
    ome = ome_of(attributes_of(store, ""))
    try:
        listed: Mapping[str, Any] | None = ome_of(attributes_of(store, "OME"))
    except SlideError:
        listed = None
    paths = series_of(store.name, ome, listed)
    xml = names_of(store)
    if paths is None:
        only_picture(store.name, scene, None, what="the store holds one image")
        fluorescent(store.name, xml, 0)
        return Series("", ome, multiscale_of(store.name, ome), (), rgb=bool(xml) and xml[0].rgb), {}
    found: list[Series] = []
    for path in paths or [str(i) for i in range(MAX_SERIES)]:
        try:
            inner = ome_of(attributes_of(store, path))
        except UnsupportedSlideError:
            if paths:
                raise
            break
        found.append(Series(path, inner, multiscale_of(f"{store.name}/{path}", inner), ()))
    if not found:
        raise UnsupportedSlideError(f"{store.name}: the collection holds no image")
    with reading(store.name, "the metadata of the series"):
        sizes = [tuple(array_of(store, f"{s.path}/{s.image.datasets[0].path}").shape) for s in found]
    pixels = [
        (shape[s.image.axes.index("x")], shape[s.image.axes.index("y")]) for s, shape in zip(found, sizes, strict=True)
    ]
    number, note = choose(store.name, found, pixels, xml, scene)
    fluorescent(store.name, xml, number)
    others = {
        kind: series.path
        for i, series in enumerate(found)
        if i != number and (kind := associated_kind(xml[i].name if i < len(xml) else "")) is not None
    }
    chosen = found[number]
    rgb = number < len(xml) and xml[number].rgb
    return Series(chosen.path, chosen.ome, chosen.image, (note,) if note else (), rgb), others
