"""The small libraries in C that are built with this package where a compiler is at hand.

They are no modules of Python's: ctypes loads them, and lets go of Python's lock while it is in them.
"""

from __future__ import annotations

import ctypes
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

__all__ = ["LIBRARIES", "load_compiled", "was_built"]

LIBRARIES = {
    "jpeg": ("slides/codecs", "decoding JPEG tiles"),
    "paste": ("tiles", "laying tiles out of decoded blocks"),
    "resample": ("tiles", "resampling tiles"),
}
"""Each library's folder, and what goes slower without it."""


def load_compiled(beside: str, name: str, abi: int) -> ctypes.CDLL | None:
    """The library ``_<name>`` that lies beside the module file ``beside``; None where there is none of that version.

    abi: what its function ``wsi_<name>_abi`` must say, so that something left from another version is as good as
    nothing.
    """
    for suffix in EXTENSION_SUFFIXES:
        path = Path(beside).with_name(f"_{name}{suffix}")
        if not path.is_file():
            continue
        try:
            library = ctypes.CDLL(str(path))
            if getattr(library, f"wsi_{name}_abi")() == abi:
                return library
        except (OSError, AttributeError):
            continue
    return None


def was_built(name: str) -> bool:
    """Whether a library lies where it is looked for, and can be loaded; its version is not asked."""
    folder = Path(__file__).parent / LIBRARIES[name][0]
    for suffix in EXTENSION_SUFFIXES:
        path = folder / f"_{name}{suffix}"
        if path.is_file():
            try:
                ctypes.CDLL(str(path))
            except OSError:
                continue
            return True
    return False
