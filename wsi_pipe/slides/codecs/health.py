"""Whether what reads slides works here: each codec decodes a tile that it made, each library says its version."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

__all__ = ["codec_health"]

SIZE_PX = 64


def codec_health() -> Iterator[tuple[str, str, Exception | None]]:
    """(what, version or how, error) of each codec and reading library; an error where it does not work."""
    for name, check in _CHECKS.items():
        try:
            yield name, check(), None
        except Exception as error:
            # Whatever it is, this codec does not work here.
            yield name, "", error


def _picture() -> NDArray[np.uint8]:
    y, x = np.mgrid[:SIZE_PX, :SIZE_PX]
    return np.stack([200 - y, 120 + x, 180 - x // 2], axis=-1).astype(np.uint8)


def _near(found: object, most: float) -> None:
    pixels = np.asarray(found)
    difference = np.abs(pixels.astype(float) - _picture()).mean() if pixels.shape == _picture().shape else np.inf
    if difference > most:
        raise ValueError(f"decodes to something else: a tile of {pixels.shape}, {difference:.1f} grey levels off")


def _jpeg() -> str:
    import simplejpeg

    from wsi_pipe.slides.codecs.decode import JpegDecoder
    from wsi_pipe.slides.codecs.fastjpeg import jpeg_decoder_name

    data = simplejpeg.encode_jpeg(_picture(), quality=95, colorspace="RGB", colorsubsampling="444")
    _near(JpegDecoder((SIZE_PX, SIZE_PX), 3, ycbcr=True).decode(data), 3.0)
    return jpeg_decoder_name()


def _jpeg2000() -> str:
    import imagecodecs

    from wsi_pipe.slides.codecs import openjpeg
    from wsi_pipe.slides.codecs.jpeg2000 import Jpeg2000Decoder

    data = imagecodecs.jpeg2k_encode(_picture(), codecformat="j2k", level=0, mct=False)
    _near(Jpeg2000Decoder((SIZE_PX, SIZE_PX), 3, ycbcr=False).decode(bytes(data)), 3.0)
    return "reduced scales by OpenJPEG" if openjpeg.available() else "in full only: no OpenJPEG library was found"


def _lzw() -> str:
    import imagecodecs

    _near_plain("LZW", bytes(imagecodecs.lzw_encode(_picture().tobytes())))
    return f"imagecodecs {imagecodecs.__version__}"


def _deflate() -> str:
    _near_plain("deflate", zlib.compress(_picture().tobytes()))
    return f"zlib {zlib.ZLIB_RUNTIME_VERSION}"


def _near_plain(compression: str, data: bytes) -> None:
    from wsi_pipe.slides.codecs.decode import PlainDecoder

    _near(PlainDecoder((SIZE_PX, SIZE_PX), 3, compression, difference=False).decode(data), 0.0)


def _openslide() -> str:
    import openslide

    return f"library {openslide.__library_version__}"


def _pyvips() -> str:
    import pyvips

    return f"library {'.'.join(str(pyvips.version(part)) for part in range(3))}"


def _zarr() -> str:
    import zarr

    return f"zarr {zarr.__version__}"


def _dicom() -> str:
    import pydicom

    return f"pydicom {pydicom.__version__}"


_CHECKS: dict[str, Callable[[], str]] = {
    "JPEG": _jpeg,
    "JPEG 2000": _jpeg2000,
    "LZW": _lzw,
    "deflate": _deflate,
    "OpenSlide": _openslide,
    "libvips": _pyvips,
    "OME-Zarr": _zarr,
    "DICOM": _dicom,
}
