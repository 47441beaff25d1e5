"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import tomllib
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from wsi_pipe.errors import OutputError

__all__ = [
    "TEMPORARY_SUFFIX",
    "atomic_path",
    "file_sha256",
    "is_temporary",
    "output_error",
    "parse_json",
    "parse_toml",
    "remove_partial_files",
    "write_text_atomically",
]

TEMPORARY_SUFFIX = ".partial"
_TEMPORARY = re.compile(r"^\..+\.[0-9a-f]{12}\.partial$")


def output_error(path: Path, error: OSError) -> OutputError:
    """An OutputError that names the file, the cause and the remedy."""
    remedies = {
        errno.ENOSPC: "free some space or give another output folder, then run again: finished slides are kept",
        errno.EDQUOT: "the quota is used up: free some space or give another output folder, then run again",
        errno.EACCES: "check the folder's permissions or give another output folder",
        errno.EROFS: "the file system is read-only: give another output folder",
        errno.EPERM: "check the folder's permissions or give another output folder",
        errno.ENOENT: "the output folder is gone: restore it or give another, then run again",
        errno.ENOTDIR: "a file stands where a folder is needed: give another output folder",
    }
    cause = error.strerror or str(error)
    return OutputError(
        f"cannot write {path}: {cause}", remedy=remedies.get(error.errno or 0, "check the output folder")
    )


@contextmanager
def atomic_path(path: Path, check: Callable[[Path], object] | None = None, *, durable: bool = True) -> Iterator[Path]:
    """Give a temporary name beside ``path``; on leaving, flush it, check it, and rename it into place.

    durable: wait until the disk has the file, so that it is whole also after a power failure; off for what is only
    looked at, since it takes milliseconds a file. ``check`` re-opens the finished temporary file and raises if it is
    not valid. On any error the temporary file is removed and ``path`` is as it was. Raises OutputError when the folder
    cannot be written or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{TEMPORARY_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if durable:
            with open(temporary, "rb") as handle:
                os.fsync(handle.fileno())
        if check is not None:
            check(temporary)
        os.replace(temporary, path)
    except OSError as error:
        if isinstance(error, OutputError) or error.errno is None:
            raise
        raise output_error(path, error) from error
    finally:
        # Where the folder is a file, or gone, removing fails too: the error that says so is already on its way.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def is_temporary(name: str) -> bool:
    """Whether a file's name is one that ``atomic_path`` gives for the time of writing."""
    return _TEMPORARY.search(name) is not None


def remove_partial_files(folder: Path, below: Iterable[Path]) -> list[Path]:
    """Delete what interrupted writes left in ``folder`` itself, and anywhere in the folders ``below``.

    Only for who knows that nobody writes there now. What else lies in ``folder``, another job say, is not looked at,
    and only names that ``atomic_path`` gives are deleted.
    """
    candidates = [*folder.glob(f".*{TEMPORARY_SUFFIX}")]
    for own in below:
        candidates += own.rglob(f".*{TEMPORARY_SUFFIX}")
    found = sorted(path for path in candidates if is_temporary(path.name))
    for path in found:
        path.unlink(missing_ok=True)
    return found


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_text_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text so that ``path`` holds all of it or what it held before."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises json.JSONDecodeError for one that is none, or nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", "", 0) from None
    except UnicodeDecodeError as error:
        raise json.JSONDecodeError(f"no text: {error.reason}", "", error.start) from None


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of a TOML text. Raises tomllib.TOMLDecodeError for one that is none, or nested too deeply."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise tomllib.TOMLDecodeError("nested too deeply") from None
