"""The fast reader of tiled TIFF slides: native tiles by their own structure, decoded by the codec at the scale wanted.

Only what is proven to be understood is opened; for the rest ``open_tiff`` raises UnsupportedSlideError with the reason,
and another reader may try.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from wsi_pipe.errors import SlideError, SlideOpenError, SlideReadError, UnsupportedSlideError
from wsi_pipe.geometry import FloatPair
from wsi_pipe.slides.base import ReadStats, RGBArray, SlideInfo
from wsi_pipe.slides.codecs.decode import CodecError
from wsi_pipe.slides.native import NativeSlide, build_pyramid, read_whole, user_mpp
from wsi_pipe.slides.storage.source import Source, open_source, slide_fingerprint
from wsi_pipe.slides.tiff.ifd import read_directories
from wsi_pipe.slides.tiff.image import TiffImage
from wsi_pipe.slides.tiff.layout import TiffLayout
from wsi_pipe.slides.tiff.vendors import read_layout

__all__ = ["TiffSlide", "open_tiff"]


class TiffSlide(NativeSlide):
    """A slide in a TIFF file; see ``open_tiff``."""

    def __init__(self, source: Source, layout: TiffLayout, mpp: FloatPair | None) -> None:
        pyramid = build_pyramid(source.name, layout.images, layout.mpp if mpp is None else mpp)
        for image in layout.images:
            image.probe()
        info = SlideInfo(
            path=source.name,
            vendor=layout.vendor,
            reader="tiff",
            reader_reason=f"{layout.description}, read by its own structure",
            fingerprint=slide_fingerprint([source], [image.size_px for image in layout.images]),
            mpp_source="user" if mpp is not None else layout.mpp_source,
            objective_power=layout.objective_power,
            icc=layout.icc,
            bounds_l0=layout.bounds_l0,
            properties=layout.properties,
            notes=layout.notes,
        )
        super().__init__(info, pyramid, layout.images, source.stats)
        self._source = source
        self._layout = layout

    def associated_images(self) -> Mapping[str, RGBArray]:
        """See Slide.associated_images."""
        found: dict[str, RGBArray] = {}
        for name, directory in self._layout.associated.items():
            try:
                found[name] = read_whole(TiffImage(self._source, directory))
            except UnsupportedSlideError:
                # "As far as the file has them": a label in an odd compression is no reason to fail.
                continue
            except CodecError as error:
                raise SlideReadError(f"{self.info.path}: the {name} image cannot be decoded: {error}") from error
        return found

    def close(self) -> None:
        """See Slide.close."""
        self._source.close()
        super().close()


def open_tiff(
    path: str | Path, *, mpp: float | FloatPair | None = None, scene: int | None = None, z: int | None = None
) -> TiffSlide:
    """Open a tiled TIFF slide: a local file, or a URL that fsspec understands and whose server gives byte ranges.

    mpp: micrometres per level-0 pixel, one value or (x, y), instead of what the file states. scene, z: which scan and
    which focal plane, from 0. Raises SlideOpenError when the file is not there or damaged, UnsupportedSlideError when
    it is no TIFF or its structure is not understood, NotAPictureError when it is and holds no one 8-bit picture.
    """
    given = user_mpp(mpp)
    source = open_source(path, ReadStats())
    try:
        return TiffSlide(source, read_layout(source, read_directories(source), scene, z), given)
    except SlideReadError as error:
        source.close()
        raise SlideOpenError(error.message, remedy=error.remedy) from error
    except (SlideError, ValueError, ArithmeticError, LookupError):
        source.close()
        raise
