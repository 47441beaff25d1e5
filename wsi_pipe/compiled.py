"""The small libraries in C that are built with this package where a compiler is at hand.

They are no modules of Python's: ctypes loads them, and lets go of Python's lock while it is in them. So one build
serves every version of Python. Where one is not there, or not made for the compiler or the processor (its version is 0
then), the same is done without it, more slowly.
"""

from __future__ import annotations

import ctypes
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

__all__ = ["LIBRARIES", "compiled_state", "load_compiled", "was_built"]

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
    for path in _built(beside, name):
        try:
            library = ctypes.CDLL(str(path))
            if getattr(library, f"wsi_{name}_abi")() == abi:
                return library
        except (OSError, AttributeError):
            continue
    return None


def was_built(name: str) -> bool:
    """Whether a library lies where it is looked for, and can be loaded; its version is not asked."""
    for path in _built(str(Path(__file__).parent / LIBRARIES[name][0] / "beside"), name):
        try:
            ctypes.CDLL(str(path))
        except OSError:
            continue
        return True
    return False


def compiled_state(beside: str, name: str, abi: int) -> str:
    """For people: whether the library that ``load_compiled`` looks for is in use, and if not, why."""
    if load_compiled(beside, name, abi) is not None:
        return "in use"
    built = _built(beside, name)
    if not built:
        return "not built: there was no C compiler on installation"
    try:
        version = getattr(ctypes.CDLL(str(built[0])), f"wsi_{name}_abi")()
    except (OSError, AttributeError) as error:
        return f"cannot be loaded: {error}"
    if version == 0:
        return "not for this processor, or not for the compiler that built it"
    return f"built from another version ({version}, not {abi}): install again"


def _built(beside: str, name: str) -> list[Path]:
    """Files of the library. What names no version of Python first: others were left by earlier versions of ours."""
    paths = (Path(beside).with_name(f"_{name}{suffix}") for suffix in reversed(EXTENSION_SUFFIXES))
    return [path for path in paths if path.is_file()]
