"""The errors that wsi-pipe raises on purpose, each with a message that names file, cause and remedy.

::

    WsiPipeError
    ├── SlideError                       something about one slide
    │   ├── SlideOpenError (OSError)         not there, not readable, empty, truncated, not a slide
    │   │   └── NeedsCopyError               read from a local copy only, and none may be made
    │   ├── SlideReadError (OSError)         opened, but a region or a native tile cannot be decoded
    │   ├── UnsupportedSlideError (ValueError)   a reader cannot prove that it understands the file
    │   │   └── NotAPictureError             understood, and no one 8-bit colour picture: no other reader is asked
    │   ├── MissingMppError (ValueError)     no resolution in the file, and none given
    │   └── ResolutionError (ValueError)     a request finer than the slide, grids that do not align, a bad mpp
    ├── ConfigError (ValueError)         a bad option or settings file
    ├── ManifestError (ValueError)       a bad slide list: column, row, two slides with one id
    ├── MaskError (ValueError)           a bad mask or GeoJSON
    ├── BagError (ValueError)            a bag or a stage file that breaks the schema
    ├── EncoderError (RuntimeError)
    │   ├── UnknownEncoderError (LookupError)    no encoder of that name
    │   ├── WeightsError (OSError)           weights not there, gated, keys missing, wrong dimension
    │   ├── DeviceError (RuntimeError)       the device is not there, or out of memory at batch size 1
    │   └── EncoderOutputError (ArithmeticError)  NaN or infinity in the features
    └── JobError
        ├── OutputError (OSError)        cannot write: read-only folder, disk full
        ├── FileAccessError (OSError)    a file of the job cannot be looked at: locked, no permission, mount gone
        ├── NotOursError (FileExistsError)   a folder or file of others where an output is to go
        ├── JobLockedError (RuntimeError)    another run holds the job directory
        ├── StaleWorkError (RuntimeError)    finished work is of other settings or another file, and is not to be redone
        ├── TaskTimeoutError (TimeoutError)  a slide took longer than its limit
        └── WorkerError (RuntimeError)   a worker process died, or a scheduler went away

A command catches ``WsiPipeError`` in one place and turns it into one line and an exit code.
"""

from __future__ import annotations

import re

from wsi_pipe.masking import mask_secrets

__all__ = [
    "BagError",
    "ConfigError",
    "DeviceError",
    "EncoderError",
    "EncoderOutputError",
    "FileAccessError",
    "JobError",
    "JobLockedError",
    "ManifestError",
    "MaskError",
    "MissingMppError",
    "NeedsCopyError",
    "NotAPictureError",
    "NotOursError",
    "OutputError",
    "ResolutionError",
    "SlideError",
    "SlideOpenError",
    "SlideReadError",
    "StaleWorkError",
    "TaskTimeoutError",
    "UnknownEncoderError",
    "UnsupportedSlideError",
    "WeightsError",
    "WorkerError",
    "WsiPipeError",
    "in_words",
    "lacks_package",
]


class WsiPipeError(Exception):
    """Root of all errors that wsi-pipe raises on purpose.

    ``remedy`` is what the user can do about it; ``str()`` gives message and remedy in one line. Passwords and tokens of
    URLs do not get into either: messages are printed, logged and stored.
    """

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        # No super().__init__ chain with keywords: OSError's constructor would take a second positional
        # argument for an errno, so only the message goes up.
        message = mask_secrets(message)
        super().__init__(message)
        self.message = message
        self.remedy = mask_secrets(remedy) if remedy else remedy

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}" if self.remedy else self.message

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process boundaries (Dask workers); keyword-only state needs its own recipe.
        return _rebuild, (type(self), self.message, self.remedy)


def in_words(error: Exception) -> tuple[str, str | None]:
    """What happened and what to do about it, also for an error that nobody foresaw."""
    if isinstance(error, WsiPipeError):
        return error.message, error.remedy
    if isinstance(error, ImportError) and error.name:
        return lacks_package(error)
    return mask_secrets(f"{type(error).__name__}: {error}"), "please report this, with the slide if you can"


_DISTRIBUTIONS = {"pynvml": "nvidia-ml-py", "cv2": "opencv-python-headless", "PIL": "pillow", "yaml": "pyyaml"}
"""Packages whose name for pip is not the one that they are imported by."""


def lacks_package(error: ImportError) -> tuple[str, str]:
    """What is not installed, and the command that installs it: by an extra of this package where it has one."""
    from importlib import metadata

    module = (error.name or "").partition(".")[0]
    wanted = _DISTRIBUTIONS.get(module, module)
    try:
        needs = metadata.requires("wsi-pipe") or []
    except metadata.PackageNotFoundError:
        needs = []
    # A requirement reads, for one, s3fs>=2024.6; extra == "s3".
    named = [need for need in needs if re.match(rf"{re.escape(wanted)}(?![\w.-])", need, re.IGNORECASE)]
    extra = next((found[1] for need in named if (found := re.search(r"extra == ['\"]([^'\"]+)", need))), None)
    what = f"wsi-pipe[{extra}]" if extra else wanted
    broken = not isinstance(error, ModuleNotFoundError)
    cause = f"the package {wanted} cannot be imported ({error})" if broken else f"the package {wanted} is not installed"
    return cause, f"install it: pip install '{what}'"


def _rebuild(cls: type[WsiPipeError], message: str, remedy: str | None) -> WsiPipeError:
    return cls(message, remedy=remedy)


class SlideError(WsiPipeError):
    """Something is wrong with one slide."""


class SlideOpenError(SlideError, OSError):
    """The slide is not there, not readable, empty, truncated, or not a slide."""


class NeedsCopyError(SlideOpenError):
    """A slide behind a URL can be read from a local copy only; there is none, and none may be made now."""


class SlideReadError(SlideError, OSError):
    """The slide was opened, but a region or a native tile of it cannot be read or decoded."""


class UnsupportedSlideError(SlideError, ValueError):
    """A reader cannot prove that it understands the file; another reader may."""


class NotAPictureError(UnsupportedSlideError):
    """What the file holds is known, and it is not the one colour picture of 8 bits that was asked for.

    Samples of another kind, several channels, focal planes or scans, no brightfield: the refusal is final, since a
    reader that knows less of the file would take it for something else.
    """


class MissingMppError(SlideError, ValueError):
    """The file states no resolution and the user gave none."""


class ResolutionError(SlideError, ValueError):
    """A resolution finer than the slide was asked for, grids do not align, or a slide's mpp is none of a microscope."""


class ConfigError(WsiPipeError, ValueError):
    """A bad option or settings file."""


class ManifestError(WsiPipeError, ValueError):
    """A bad slide list: an unknown column, a bad row, two slides with one id."""


class MaskError(WsiPipeError, ValueError):
    """A bad tissue mask or GeoJSON."""


class BagError(WsiPipeError, ValueError):
    """A bag or a stage file that cannot be read or breaks the schema."""


class EncoderError(WsiPipeError, RuntimeError):
    """Something is wrong with an encoder."""


class UnknownEncoderError(EncoderError, LookupError):
    """No encoder has that name."""


class WeightsError(EncoderError, OSError):
    """Weights are not there, gated, incomplete, or of another shape."""


class DeviceError(EncoderError):
    """The device is not there, or is out of memory even for one tile."""


class EncoderOutputError(EncoderError, ArithmeticError):
    """An encoder gave NaN or infinity."""


class JobError(WsiPipeError):
    """Something is wrong with a job as a whole."""


class OutputError(JobError, OSError):
    """An output cannot be written: read-only folder, disk full, folder gone."""


class FileAccessError(JobError, OSError):
    """A file of the job cannot be looked at: locked, no permission, a mount gone. It says nothing of what is in it."""


class NotOursError(JobError, FileExistsError):
    """Where an output is to go lies something that this program did not make; it is left as it is."""


class JobLockedError(JobError, RuntimeError):
    """Another run holds the job directory."""


class StaleWorkError(JobError, RuntimeError):
    """Finished work was made with other settings, or of another file, and nobody said that it be made anew."""


class TaskTimeoutError(JobError, TimeoutError):
    """A slide took longer than its limit."""


class WorkerError(JobError, RuntimeError):
    """A worker process died, or the scheduler went away."""
