"""All formats of OpenSlide: transparency laid on white, errors named, one handle shared by all threads.

Two things about OpenSlide decide the shape of this module. A handle that met one error refuses everything after it, so
a failed read is tried once more on a fresh handle, and the shared one is replaced. And a region of a level is asked for
in level-0 pixels: at a downsample of 2.0005 most level pixels lie between two of those, and OpenSlide then shifts and
blurs by interpolation. Such a level is left out of ``planes`` where that would exceed an eighth of a pixel.
"""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import openslide as api
from numpy.typing import NDArray

from wsi_pipe.errors import NotAPictureError, SlideOpenError, SlideReadError, UnsupportedSlideError
from wsi_pipe.geometry import FloatPair, IntPair, Pyramid
from wsi_pipe.slides.base import WHITE, BaseSlide, Plane, ReadStats, RGBArray, SlideInfo
from wsi_pipe.slides.metadata import plausible_mpp
from wsi_pipe.slides.native import only_picture, user_mpp
from wsi_pipe.slides.parts import slide_files
from wsi_pipe.slides.storage.source import FileSource, slide_fingerprint
from wsi_pipe.slides.tiff.levels import Placed, place
from wsi_pipe.slides.tiff.likeness import is_alike
from wsi_pipe.slides.tiff.meaning import Meaning, meaning_of_file
from wsi_pipe.slides.tiff.picture import Chosen

__all__ = ["OpenSlideSlide", "flatten", "open_openslide"]

ASKED = "asked for"
"""The reason of a reader that was named."""

BLOCK_PX = 1024
"""Aimed-at side of a block: large enough that few native tiles are decoded for two blocks, small enough to be 3 MiB."""

MAX_OFFSET_PX = 0.125
"""Largest sub-pixel shift, in level pixels, at which a level still serves as a plane."""


def open_openslide(
    path: str | Path,
    *,
    mpp: float | FloatPair | None = None,
    scene: int | None = None,
    z: int | None = None,
    reason: str = ASKED,
) -> OpenSlideSlide:
    """Open a slide with OpenSlide.

    mpp: micrometres per level-0 pixel instead of what the file states. reason: recorded as ``info.reader_reason``.
    Raises UnsupportedSlideError when OpenSlide does not know the format, or would take another picture of the file than
    the one that is meant (``scene``, ``z``), NotAPictureError as the fast reader does, of which it passes the check,
    SlideOpenError when it knows the format and fails.
    """
    meaning = meaning_of_file(path, scene, z)
    if meaning is None:
        only_picture(str(path), scene, z, what="OpenSlide gives one picture of a file")
    elif not meaning.default:
        raise UnsupportedSlideError(f"{path}: OpenSlide cannot choose among the scans and focal planes of a file")
    elif meaning.chosen is not None and len(meaning.chosen.main.directories) > 1:
        raise UnsupportedSlideError(f"{path}: OpenSlide does not put planes of red, green and blue together")
    return OpenSlideSlide(path, mpp=mpp, reason=reason, meaning=meaning)


class OpenSlideSlide(BaseSlide):
    """A slide read by OpenSlide; see ``open_openslide``."""

    def __init__(
        self,
        path: str | Path,
        *,
        mpp: float | FloatPair | None = None,
        reason: str = ASKED,
        meaning: Meaning | None = None,
    ) -> None:
        super().__init__()
        given = user_mpp(mpp)
        self._path = str(path)
        self._handles = _Handles(self._path)
        try:
            with self._handles.use() as handle:
                self._describe(handle, given, reason, meaning)
            if meaning is not None and meaning.chosen is not None:
                # Asked for by name it may do with fewer levels; else a reader that finds them goes before it.
                self._check_levels(meaning.chosen, complete=reason != ASKED)
                # What was looked at on opening is nobody's reading, as with the tiles that other readers probe.
                self.stats = ReadStats()
        except api.OpenSlideError as error:
            self.close()
            raise SlideOpenError(f"{path}: OpenSlide: {error}", remedy="the file is damaged: copy it again") from error
        except BaseException:
            self.close()
            raise

    def _describe(self, handle: Any, given: FloatPair | None, reason: str, meaning: Meaning | None) -> None:
        properties = _properties(handle)
        _refuse_fluorescence(self._path, properties)
        sizes: list[IntPair] = [(int(w), int(h)) for w, h in handle.level_dimensions]
        stated, source = _mpp(properties)
        chosen = None if meaning is None else meaning.chosen
        # OpenSlide knows the vendor's field of Aperio, and of others no more than the tags.
        if chosen is not None and (stated is None or chosen.mpp_source in ("description.MPP", "ome.PhysicalSize")):
            stated, source = chosen.mpp, chosen.mpp_source
        self._downsamples = tuple(float(d) for d in handle.level_downsamples)
        self.pyramid = Pyramid.from_sizes(sizes, stated if given is None else given)
        self.planes = tuple(
            Plane(index, 1, level.downsample, level.size_px, _block_px(properties, index))
            for index, level in enumerate(self.pyramid.levels)
            if index == 0 or self._offset_px(index) <= MAX_OFFSET_PX
        )
        self.info = SlideInfo(
            path=self._path,
            vendor=properties.get("openslide.vendor", "unknown"),
            reader="openslide",
            reader_reason=reason,
            fingerprint=_fingerprint(self._path, sizes),
            mpp_source="user" if given is not None else source,
            objective_power=_number(properties, "openslide.objective-power"),
            icc=_icc(handle),
            bounds_l0=_bounds(properties, sizes[0]),
            properties=properties,
            notes=(*(() if meaning is None else meaning.notes), *_focus_notes(properties)),
        )

    def _check_levels(self, chosen: Chosen, *, complete: bool) -> None:
        """Raise UnsupportedSlideError where OpenSlide takes another picture of the file for the slide or a level.

        complete: also where it does not show all that may be a level.
        """
        sizes = [level.size_px for level in self.pyramid.levels]
        if sizes[0] != chosen.main.size_px:
            raise UnsupportedSlideError(
                f"{self._path}: OpenSlide takes an image of {sizes[0][0]} x {sizes[0][1]} px for the slide, not the "
                f"largest, of {chosen.main.size_px[0]} x {chosen.main.size_px[1]} px"
            )
        known = {level.frame.size_px: level for level in chosen.candidates}
        if complete and not known.keys() <= set(sizes):
            raise UnsupportedSlideError(f"{self._path}: OpenSlide does not show all images that may be levels")
        images = [_LevelImage(self, level) for level in range(len(sizes))]
        aperio = self.info.vendor == "aperio"
        for finer, coarser in itertools.pairwise(images):
            width, height = coarser.size_px
            factor = (finer.size_px[0] / width, finer.size_px[1] / height)
            level = known.get(coarser.size_px)
            placed = level and place(sizes[0], level.candidate)
            # OpenSlide knows of no padding.
            fits = isinstance(placed, Placed) and placed.size_px == coarser.size_px
            if not fits or not (aperio or is_alike(finer, coarser, factor)):
                raise UnsupportedSlideError(
                    f"{self._path}: OpenSlide takes an image of {width} x {height} px for a level, which is none"
                )

    def _offset_px(self, level: int) -> float:
        """By how many level pixels a read of ``level`` may be off its place, at most."""
        downsample = self._downsamples[level]
        if downsample == round(downsample):
            return 0.0
        # The nearest level-0 pixel is up to half a pixel away, unless the level is so small that it drifts less.
        longest = max(self.pyramid.levels[level].size_px)
        return min(0.5, abs(downsample - round(downsample)) * longest) / downsample

    def decode(self, plane: Plane, cell: IntPair, data: Any) -> RGBArray:
        """See Slide.decode; OpenSlide reads and decodes in one step."""
        x, y = cell[0] * plane.block_px[0], cell[1] * plane.block_px[1]
        width = min(plane.block_px[0], plane.size_px[0] - x)
        height = min(plane.block_px[1], plane.size_px[1] - y)
        if x < 0 or y < 0 or width < 1 or height < 1:
            raise ValueError(f"block {cell} is not on the plane of {plane.blocks} blocks")
        return self._read(plane.level, x, y, width, height)

    def read_region(self, level: int, x: int, y: int, width: int, height: int) -> RGBArray:
        """See Slide.read_region; in one call, since OpenSlide interpolates nothing within a region."""
        self.check_region(level, width, height)
        out = np.full((height, width, 3), WHITE, np.uint8)
        size = self.pyramid.levels[level].size_px
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + width, size[0]), min(y + height, size[1])
        if x0 < x1 and y0 < y1:
            out[y0 - y : y1 - y, x0 - x : x1 - x] = self._read(level, x0, y0, x1 - x0, y1 - y0)
        return out

    def _read(self, level: int, x: int, y: int, width: int, height: int) -> RGBArray:
        downsample = self._downsamples[level]
        corner = (round(x * downsample), round(y * downsample))
        try:
            with self._handles.use() as handle:
                image = handle.read_region(corner, level, (width, height))
        except api.OpenSlideError:
            image = self._read_again(corner, level, width, height)
        except MemoryError as error:
            raise SlideReadError(f"{self._path}: out of memory for a region of {width} x {height} px") from error
        self.stats.add(decoded=1, requests=1)
        return flatten(np.asarray(image))

    def _read_again(self, corner: IntPair, level: int, width: int, height: int) -> Any:
        """Read on a handle of its own: the shared one may have failed for another thread's sake."""
        try:
            with _opened(self._path) as fresh:
                return fresh.read_region(corner, level, (width, height))
        except api.OpenSlideError as error:
            raise SlideReadError(
                f"{self._path}: OpenSlide cannot read {width} x {height} px of level {level} at {corner} (level-0 px): "
                f"{error}",
                remedy="the file is damaged: copy it again, or leave the slide out",
            ) from error

    def associated_images(self) -> Mapping[str, RGBArray]:
        """See Slide.associated_images; an image that cannot be decoded is left out."""
        images: dict[str, RGBArray] = {}
        with self._handles.use() as handle:
            names = list(handle.associated_images)
        for name in names:
            with suppress(api.OpenSlideError), _opened(self._path) as fresh:
                images[name] = flatten(np.asarray(fresh.associated_images[name].convert("RGBA")))
        return images

    def close(self) -> None:
        """See Slide.close."""
        self._handles.close()
        super().close()


class _LevelImage:
    """A level as an image of its own; see NativeImage."""

    origin_px: IntPair = (0, 0)
    block_px: IntPair = (256, 256)
    reduces: tuple[int, ...] = (1,)

    def __init__(self, slide: OpenSlideSlide, level: int) -> None:
        self._slide = slide
        self._level = level
        self.size_px = slide.pyramid.levels[level].size_px

    def fetch(self, cells: Sequence[IntPair]) -> list[Any]:
        """See NativeImage.fetch."""
        return list(cells)

    def decode(self, cell: IntPair, data: Any, reduce: int) -> RGBArray:
        """See NativeImage.decode."""
        (x, y), (width, height) = (cell[0] * self.block_px[0], cell[1] * self.block_px[1]), self.block_px
        return self._slide.read_region(self._level, x, y, width, height)


class _Handles:
    """One OpenSlide handle for all threads, replaced after an error, closed when nobody reads from it any more."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._handle: Any = _open(path)
        self._readers: dict[int, int] = {}
        self._closed = False

    @contextmanager
    def use(self) -> Iterator[Any]:
        """The handle, kept open meanwhile. Raises SlideReadError when the slide was closed."""
        with self._lock:
            if self._closed:
                raise SlideReadError(f"{self._path}: the slide is closed")
            if self._handle is None:
                self._handle = _open(self._path)
            handle = self._handle
            self._readers[id(handle)] = self._readers.get(id(handle), 0) + 1
        try:
            yield handle
        except api.OpenSlideError:
            with self._lock:
                if self._handle is handle:
                    self._handle = None
            raise
        finally:
            with self._lock:
                self._readers[id(handle)] -= 1
                unused = self._readers[id(handle)] == 0
                if unused:
                    del self._readers[id(handle)]
                retired = unused and handle is not self._handle
            if retired:
                handle.close()

    def close(self) -> None:
        """Close now, or when the last reader is done."""
        with self._lock:
            handle, self._handle, self._closed = self._handle, None, True
            busy = handle is not None and id(handle) in self._readers
        if handle is not None and not busy:
            handle.close()


def _open(path: str) -> Any:
    try:
        return api.OpenSlide(path)
    except api.OpenSlideUnsupportedFormatError as error:
        raise UnsupportedSlideError(
            f"{path}: OpenSlide does not know the format", remedy="check that the file is a whole-slide image"
        ) from error
    except api.OpenSlideError as error:
        # "Unsupported TIFF compression: 34712" and the like: another reader may know it.
        if "nsupported" in str(error) or "not supported" in str(error):
            raise UnsupportedSlideError(f"{path}: OpenSlide: {error}") from error
        many = path.lower().endswith((".mrxs", ".vms", ".vmu", ".dcm"))
        beside = ", with the files and the folder that belong to it" if many else ""
        raise SlideOpenError(
            f"{path}: OpenSlide: {error}", remedy=f"the file is truncated or damaged: copy it again{beside}"
        ) from error
    except (OSError, ValueError, UnicodeError) as error:
        raise SlideOpenError(f"{path}: OpenSlide: {error}", remedy="check the path and its permissions") from error


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    handle = _open(path)
    try:
        yield handle
    finally:
        handle.close()


def flatten(rgba: NDArray[np.uint8]) -> RGBArray:
    """RGB on white from straight (not premultiplied) RGBA, uint8 (h, w, 4) to (h, w, 3), rounded to the nearest."""
    alpha = rgba[..., 3:]
    if int(alpha.min()) == 255:
        return np.ascontiguousarray(rgba[..., :3])
    weight = alpha.astype(np.uint16)
    # 255 * 255 fits 16 bits, and so does the sum, which is a weighted mean times 255.
    mixed = rgba[..., :3].astype(np.uint32) * weight + (255 - weight).astype(np.uint32) * WHITE
    return ((mixed + 127) // 255).astype(np.uint8)


def _properties(handle: Any) -> dict[str, str]:
    found = {}
    for name in handle.properties:
        # A damaged name is listed and then not found.
        with suppress(KeyError, UnicodeError):
            found[str(name)] = str(handle.properties[name])
    return found


_LIGHT_FIELD = re.compile(r"(?:slide_?type|illumination\w*|scan_?mode|contrast\w*|light_?source)$", re.IGNORECASE)


def _refuse_fluorescence(path: str, properties: Mapping[str, str]) -> None:
    """Raise NotAPictureError where a field made for it says that the scan is one of fluorescence (MIRAX and others)."""
    for key, value in properties.items():
        if _LIGHT_FIELD.search(key) and "fluoresc" in value.lower():
            raise NotAPictureError(
                f"{path}: a fluorescence scan, as it says ({key} = {value[:80]}), not a brightfield picture",
                remedy="give a brightfield slide",
            )


def _focus_notes(properties: Mapping[str, str]) -> tuple[str, ...]:
    """A note where a MIRAX slide holds several focal planes, of which OpenSlide shows one."""
    names = {
        key: value for key, value in properties.items() if re.fullmatch(r"mirax\.HIERARCHICAL\.HIER_\d+_NAME", key)
    }
    for key, value in names.items():
        count = properties.get(key.replace("_NAME", "_COUNT"), "")
        if "focus" in value.lower() and count.isdigit() and int(count) > 1:
            return (f"the slide holds {count} focal planes, of which OpenSlide shows one",)
    return ()


def _mpp(properties: Mapping[str, str]) -> tuple[FloatPair | None, str]:
    x, y = _number(properties, "openslide.mpp-x"), _number(properties, "openslide.mpp-y")
    if x is None or y is None:
        return None, "none"
    if properties.get("openslide.vendor") == "generic-tiff" and plausible_mpp(x, y) is None:
        # OpenSlide takes a plain TIFF's resolution tags at their word, and editors write 72 dots an inch.
        return None, "none"
    return (x, y), "openslide.mpp-x"


def _number(properties: Mapping[str, str], key: str) -> float | None:
    try:
        value = float(properties[key])
    except (KeyError, ValueError):
        return None
    return value if np.isfinite(value) and value > 0 else None


def _bounds(properties: Mapping[str, str], size_l0: IntPair) -> tuple[int, int, int, int] | None:
    keys = ("x", "y", "width", "height")
    try:
        x, y, width, height = (int(properties[f"openslide.bounds-{key}"]) for key in keys)
    except (KeyError, ValueError):
        return None
    x, y, right, bottom = max(x, 0), max(y, 0), min(x + width, size_l0[0]), min(y + height, size_l0[1])
    return (x, y, right - x, bottom - y) if right > x and bottom > y else None


def _block_px(properties: Mapping[str, str], level: int) -> IntPair:
    """Whole native tiles where the level has any, near 1024 px a side."""
    sides = []
    for axis in ("width", "height"):
        tile = _number(properties, f"openslide.level[{level}].tile-{axis}")
        whole = int(tile) if tile and tile <= BLOCK_PX else 0
        sides.append(whole * max(1, BLOCK_PX // whole) if whole else BLOCK_PX)
    return (sides[0], sides[1])


def _icc(handle: Any) -> bytes | None:
    try:
        profile = handle.color_profile
    except api.OpenSlideError:
        raise
    except (OSError, ValueError):
        return None
    return None if profile is None else bytes(profile.tobytes())


def _fingerprint(path: str, sizes: list[IntPair]) -> str:
    sources = [FileSource(part, ReadStats()) for part in slide_files(Path(path))]
    try:
        return slide_fingerprint(sources, sizes)
    finally:
        for source in sources:
            source.close()
