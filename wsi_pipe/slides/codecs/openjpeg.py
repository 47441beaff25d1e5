"""OpenJPEG through ctypes: decode a codestream at a reduced resolution, with the GIL released.

Pillow can decode fewer wavelet levels but holds the GIL meanwhile; imagecodecs releases it but decodes all levels. The
library itself does both. Pillow's wheels bring it along, systems have it as libopenjp2; where neither is found,
``available`` is false and callers decode in full. The functions and the head of each structure used here have been the
same in all releases 2.x (openjpeg.h).
"""

from __future__ import annotations

import ctypes
import ctypes.util
import itertools
import threading
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["available", "decode_components"]

_CODESTREAM = 0
_PARAMETERS_BYTES = 1 << 15
"""More than opj_dparameters_t takes in any release (8 KiB of it are two unused path names)."""

_END = ctypes.c_size_t(-1).value

_Pointer = ctypes.c_void_p
_Read = ctypes.CFUNCTYPE(ctypes.c_size_t, _Pointer, ctypes.c_size_t, _Pointer)
_Skip = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, _Pointer)
_Seek = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64, _Pointer)


class _Component(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("dx", "dy", "w", "h", "x0", "y0", "prec", "bpp", "sgnd")),
        ("resno_decoded", ctypes.c_uint32),
        ("factor", ctypes.c_uint32),
        ("data", ctypes.POINTER(ctypes.c_int32)),
        ("alpha", ctypes.c_uint16),
    )


class _Image(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("x0", "y0", "x1", "y1", "numcomps")),
        ("color_space", ctypes.c_int),
        ("comps", ctypes.POINTER(_Component)),
    )


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "opj_version": (ctypes.c_char_p, []),
    "opj_create_decompress": (_Pointer, [ctypes.c_int]),
    "opj_destroy_codec": (None, [_Pointer]),
    "opj_set_default_decoder_parameters": (None, [_Pointer]),
    "opj_setup_decoder": (ctypes.c_int, [_Pointer, _Pointer]),
    "opj_set_decoded_resolution_factor": (ctypes.c_int, [_Pointer, ctypes.c_uint32]),
    "opj_read_header": (ctypes.c_int, [_Pointer, _Pointer, ctypes.POINTER(ctypes.POINTER(_Image))]),
    "opj_decode": (ctypes.c_int, [_Pointer, _Pointer, _Pointer]),
    "opj_image_destroy": (None, [_Pointer]),
    "opj_stream_create": (_Pointer, [ctypes.c_size_t, ctypes.c_int]),
    "opj_stream_destroy": (None, [_Pointer]),
    "opj_stream_set_user_data": (None, [_Pointer, _Pointer, _Pointer]),
    "opj_stream_set_user_data_length": (None, [_Pointer, ctypes.c_uint64]),
    "opj_stream_set_read_function": (None, [_Pointer, _Read]),
    "opj_stream_set_skip_function": (None, [_Pointer, _Skip]),
    "opj_stream_set_seek_function": (None, [_Pointer, _Seek]),
}


class _Reader:
    """A codestream in memory and a position in it."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.address = ctypes.cast(ctypes.c_char_p(data), _Pointer).value or 0
        self.at = 0


_readers: dict[int, _Reader] = {}
_keys = itertools.count(1)


def _read(buffer: int, length: int, key: int) -> int:
    reader = _readers[key]
    count = min(length, len(reader.data) - reader.at)
    if count <= 0:
        return _END
    ctypes.memmove(buffer, reader.address + reader.at, count)
    reader.at += count
    return count


def _skip(length: int, key: int) -> int:
    reader = _readers[key]
    if length < 0 or reader.at + length > len(reader.data):
        return -1
    reader.at += length
    return length


def _seek(position: int, key: int) -> int:
    reader = _readers[key]
    if not 0 <= position <= len(reader.data):
        return 0
    reader.at = position
    return 1


# The library keeps only the addresses: these must live as long as the module.
_read_callback, _skip_callback, _seek_callback = _Read(_read), _Skip(_skip), _Seek(_seek)

_loading = threading.Lock()


@cache
def _load() -> Any:
    for place in _places():
        try:
            library = ctypes.CDLL(place)
            for name, (result, arguments) in _SIGNATURES.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError):
            continue
        if (library.opj_version() or b"").startswith(b"2."):
            return library
    return None


def _places() -> list[str]:
    import PIL

    package = Path(PIL.__file__).parent
    bundled = [*package.parent.glob("[Pp]illow.libs/libopenjp2*"), *package.glob(".dylibs/libopenjp2*")]
    system = ctypes.util.find_library("openjp2")
    return [str(path) for path in sorted(bundled)] + ([system] if system else [])


def _library() -> Any:
    with _loading:
        return _load()


def available() -> bool:
    """Whether an OpenJPEG 2 library was found."""
    return _library() is not None


def decode_components(codestream: bytes, discard_levels: int) -> list[NDArray[np.uint8]] | None:
    """The components of an 8-bit JPEG 2000 codestream, uint8 (h, w) each, without its finest wavelet levels.

    None where the library refuses the stream. Raises RuntimeError where no library is available. The caller has checked
    the stream's declared size.
    """
    library = _library()
    if library is None:
        raise RuntimeError("no OpenJPEG library was found")
    key = next(_keys)
    _readers[key] = _Reader(codestream)
    parameters = ctypes.create_string_buffer(_PARAMETERS_BYTES)
    image = ctypes.POINTER(_Image)()
    stream = library.opj_stream_create(max(len(codestream), 1), 1)
    codec = library.opj_create_decompress(_CODESTREAM)
    try:
        if not stream or not codec:
            raise MemoryError("OpenJPEG could not be set up")
        library.opj_stream_set_read_function(stream, _read_callback)
        library.opj_stream_set_skip_function(stream, _skip_callback)
        library.opj_stream_set_seek_function(stream, _seek_callback)
        library.opj_stream_set_user_data(stream, key, None)
        library.opj_stream_set_user_data_length(stream, len(codestream))
        library.opj_set_default_decoder_parameters(parameters)
        done = (
            library.opj_setup_decoder(codec, parameters)
            and library.opj_read_header(stream, codec, ctypes.byref(image))
            and library.opj_set_decoded_resolution_factor(codec, discard_levels)
            and library.opj_decode(codec, stream, image)
        )
        if not done:
            return None
        found = []
        for i in range(image.contents.numcomps):
            component = image.contents.comps[i]
            if not component.data or component.w == 0 or component.h == 0:
                return None
            found.append(np.ctypeslib.as_array(component.data, (component.h, component.w)).astype(np.uint8))
        return found
    finally:
        if image:
            library.opj_image_destroy(image)
        if codec:
            library.opj_destroy_codec(codec)
        if stream:
            library.opj_stream_destroy(stream)
        del _readers[key]
