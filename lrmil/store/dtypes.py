"""How features are stored: float16, float32, or bfloat16 in the bits of uint16, which numpy has no type for."""

from __future__ import annotations

from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from lrmil.errors import StoreError

__all__ = ["STORE_DTYPES", "StoreDtype", "decode_bfloat16", "encode", "encode_bfloat16", "storage_dtype"]

StoreDtype = Literal["float16", "bfloat16", "float32"]
STORE_DTYPES: tuple[StoreDtype, ...] = ("float16", "bfloat16", "float32")
FLOAT16_OVERFLOW = 65520.0
"""From here on rounding to float16 gives infinity: its greatest value is 65504, the next would be 65536."""


def storage_dtype(dtype: StoreDtype) -> np.dtype[Any]:
    """The numpy type that a stored type lies in: bfloat16 in uint16."""
    return np.dtype("<u2" if dtype == "bfloat16" else "<f2" if dtype == "float16" else "<f4")


def encode(values: NDArray[Any], dtype: StoreDtype, name: str = "features") -> NDArray[Any]:
    """Features in their stored type, rounded to nearest even. Raises StoreError when a value overflows it."""
    if dtype == "bfloat16":
        return encode_bfloat16(values, name)
    if dtype == "float16" and values.dtype != np.float16 and values.size:
        peak = max(float(values.max()), -float(values.min()))
        if peak >= FLOAT16_OVERFLOW:
            raise StoreError(f"{name}: a feature of {peak:g} is beyond float16", remedy="use --dtype bfloat16")
    return values.astype(storage_dtype(dtype), copy=False)


def encode_bfloat16(values: NDArray[Any], name: str = "features") -> NDArray[np.uint16]:
    """The upper 16 bits of float32, rounded to nearest even."""
    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    encoded = rounded.astype("<u2")
    if encoded.size and int((encoded & 0x7FFF).max()) >= 0x7F80:
        raise StoreError(f"{name}: a feature is beyond bfloat16, or not finite", remedy="use --dtype float32")
    return cast(NDArray[np.uint16], encoded)


def decode_bfloat16(values: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16 held in uint16 as the equal float32."""
    return (values.astype("<u4") << 16).view("<f4")
