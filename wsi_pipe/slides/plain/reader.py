"""Plain images as slides of one level: PNG, JPEG and WebP through libvips, JPEG 2000 through OpenJPEG; other TIFFs.

libvips decodes in regions. A format that can only be decoded from top to bottom is unpacked once, when the first region
is asked for: in memory up to 100 MiB, into a temporary file beyond that.

Nothing is guessed. Dots per inch are no resolution (see ``metadata``). Sixteen bits become eight by their highest eight
where the format defines white as the highest value (PNG), and are refused elsewhere. An orientation that a camera has
noted is not applied: coordinates count from the corner of the pixels as stored, as in other tools.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wsi_pipe.errors import NotAPictureError, SlideError, SlideOpenError, SlideReadError, UnsupportedSlideError
from wsi_pipe.geometry import FloatPair, IntPair
from wsi_pipe.slides.base import ReadStats, RGBArray, SlideInfo
from wsi_pipe.slides.codecs.decode import CodecError
from wsi_pipe.slides.native import NativeImage, only_picture, user_mpp
from wsi_pipe.slides.plain.image import BLOCK_PX, ImageSlide, WholeImage, check_whole, colours
from wsi_pipe.slides.plain.tiff import open_image_tiff
from wsi_pipe.slides.storage.source import FileSource, slide_fingerprint

__all__ = ["open_image"]

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_LOADERS = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg"}
_JPEG2000_MAGIC = (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")


def open_image(
    path: str | Path, *, mpp: float | FloatPair | None = None, scene: int | None = None, z: int | None = None
) -> ImageSlide:
    """Open a plain image, or a TIFF that is no slide.

    mpp: micrometres per level-0 pixel instead of what the file states. Raises SlideOpenError when the file is not there
    or damaged, UnsupportedSlideError when it is no image, or one whose colours or size are not handled.
    """
    given = user_mpp(mpp)
    source = FileSource(path, ReadStats())
    try:
        head = source.read(0, min(16, source.size))
        if head.startswith(TIFF_MAGIC):
            return open_image_tiff(source, given, scene, z)
        only_picture(source.name, scene, z)
        kind, image = _plain(source, head)
        info = SlideInfo(
            path=source.name,
            vendor=kind,
            reader="image",
            reader_reason=f"a plain {kind.upper()} image",
            fingerprint=slide_fingerprint([source], [image.size_px]),
            mpp_source="none" if given is None else "user",
            icc=getattr(image, "icc", None),
        )
        return ImageSlide(info, [image], given, source.close)
    except SlideReadError as error:
        source.close()
        raise SlideOpenError(error.message, remedy=error.remedy) from error
    except (SlideError, ValueError, ArithmeticError, LookupError):
        source.close()
        raise


def _plain(source: FileSource, head: bytes) -> tuple[str, NativeImage]:
    if head.startswith(_JPEG2000_MAGIC):
        return "jpeg2000", _jpeg2000(source)
    kind = next((name for magic, name in _LOADERS.items() if head.startswith(magic)), None)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        kind = "webp"
    if kind is None:
        raise UnsupportedSlideError(
            f"{source.name}: is no PNG, JPEG, WebP, JPEG 2000 or TIFF image", remedy="give a slide or one of these"
        )
    return kind, VipsImage(source.name, kind)


class VipsImage:
    """A PNG, JPEG or WebP file in blocks; see NativeImage. Raises as ``open_image`` says."""

    reduces: tuple[int, ...] = (1,)
    block_px: IntPair = BLOCK_PX
    origin_px: IntPair = (0, 0)

    def __init__(self, path: str, kind: str) -> None:
        import pyvips

        try:
            # The loader is named: left to choose, libvips would also open PDF, SVG and whatever else it was built with.
            image = getattr(pyvips.Image, f"{kind}load")(path, access="random", fail_on="truncated")
        except pyvips.Error as error:
            raise SlideOpenError(
                f"{path}: the {kind.upper()} image cannot be opened: {vips_cause(error)}",
                remedy="the file is damaged: copy it again",
            ) from error
        self.icc: bytes | None = None
        if image.get_typeof("icc-profile-data"):
            self.icc = bytes(image.get("icc-profile-data"))
        self.size_px: IntPair = (image.width, image.height)
        if image.format not in ("uchar", "ushort") or image.interpretation not in _VIPS_COLOURS:
            raise NotAPictureError(
                f"{path}: {image.bands} bands of {image.format} in {image.interpretation} are not grey or RGB",
                remedy="convert it to 8-bit RGB",
            )
        pages = image.get("n-pages") if image.get_typeof("n-pages") else 1
        if pages > 1:
            raise NotAPictureError(
                f"{path}: an animation of {pages} pictures, not one", remedy="export the one that is meant"
            )
        check_whole(path, self.size_px, image.bands)
        # Both exact: 16-bit PNG has white at 65,535, and 65,535 / 257 is 255.
        self._image = image if image.format == "uchar" else (image / 257).rint().cast("uchar")

    def fetch(self, cells: Sequence[IntPair]) -> list[Any]:
        """See NativeImage.fetch; libvips reads while it decodes."""
        return list(cells)

    def decode(self, cell: IntPair, data: Any, reduce: int) -> RGBArray:
        """See NativeImage.decode."""
        import pyvips

        x, y = cell[0] * self.block_px[0], cell[1] * self.block_px[1]
        width, height = min(self.block_px[0], self.size_px[0] - x), min(self.block_px[1], self.size_px[1] - y)
        try:
            pixels = np.asarray(self._image.crop(x, y, width, height).numpy())
        except pyvips.Error as error:
            raise CodecError(vips_cause(error)) from error
        return colours(pixels.reshape(height, width, -1))


_VIPS_COLOURS = ("b-w", "srgb", "rgb", "grey16", "rgb16", "multiband")


def vips_cause(error: Exception) -> str:
    """The first thing that libvips says of an error, which is the cause; what follows is where it was noticed."""
    lines = [line.strip() for line in str(getattr(error, "detail", "") or error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _jpeg2000(source: FileSource) -> WholeImage:
    from wsi_pipe.slides.codecs.jpeg2000 import codestream_of, read_jpeg2000_head

    data = source.read(0, source.size)
    try:
        size_px = read_jpeg2000_head(codestream_of(data)).size_px
    except CodecError as error:
        if "not supported" in str(error):
            # Sound, but of twelve bits, five components and so on.
            kind = NotAPictureError if "samples" in str(error) or "components" in str(error) else UnsupportedSlideError
            raise kind(f"{source.name}: {error}", remedy="convert it to 8-bit RGB") from error
        raise SlideOpenError(
            f"{source.name}: the JPEG 2000 image cannot be opened: {error}", remedy="the file is damaged: copy it again"
        ) from error
    check_whole(source.name, size_px, 3)

    def load() -> RGBArray:
        import imagecodecs

        try:
            pixels = np.asarray(imagecodecs.jpeg2k_decode(data))
        except (ValueError, RuntimeError, imagecodecs.Jpeg2kError) as error:
            raise CodecError(f"the JPEG 2000 stream is damaged: {error}") from error
        if pixels.dtype != np.uint8:
            raise CodecError(f"{pixels.dtype} samples: only 8 bits are handled")
        return pixels.reshape(*pixels.shape[:2], -1)

    return WholeImage(size_px, load)
