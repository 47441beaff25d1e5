"""What no bag may hold: data that lies in other files, and arrays far larger than the file that declares them."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

import h5py

from wsi_pipe.errors import BagError, FileAccessError

__all__ = ["refuse_unsafe", "unreachable"]

MOST_EXPANDED = 64
"""Features and coordinates that other programs compressed become some times larger, never as much as this."""
FREE_BYTES = 16 << 20

SURROUNDINGS = frozenset(
    getattr(errno, name)
    for name in (
        *("EAGAIN", "EACCES", "EPERM", "EIO", "ESTALE", "EMFILE", "ENFILE", "EBUSY", "ENOLCK", "EINTR", "ENOMEM"),
        *("ETIMEDOUT", "EHOSTDOWN", "EHOSTUNREACH", "ENETUNREACH", "ENOTCONN", "ECONNRESET", "EREMOTEIO", "ENODEV"),
        *("ENXIO", "ETXTBSY", "ELOOP", "EROFS", "ESHUTDOWN", "EKEYEXPIRED"),
    )
    if hasattr(errno, name)
)
"""Errors of the machine, its mounts and other processes: they say nothing of a file's content."""
_IN_TEXT = re.compile(r"errno = (\d+), error message = '([^']*)'")


def unreachable(path: Path, error: BaseException) -> FileAccessError | None:
    """The error that says that a file cannot be looked at, where that and not the file is at fault; else None.

    HDF5 puts the number of the system's error into its text where it reads.
    """
    number = error.errno if isinstance(error, OSError) else None
    found = _IN_TEXT.search(str(error))
    if number is None and found:
        number = int(found[1])
    if number not in SURROUNDINGS:
        return None
    if number == errno.EAGAIN:
        return FileAccessError(
            f"{path}: cannot be looked at: another process holds it open for writing",
            remedy="close it there (a notebook, a viewer), then run again: the file is left as it is",
        )
    words = found[2] if found else (getattr(error, "strerror", None) or str(error)).splitlines()[0]
    return FileAccessError(
        f"{path}: cannot be looked at: {words}",
        remedy="mend the access (permissions, mount, limit of open files), then run again: the file is left as it is",
    )


def refuse_unsafe(path: Path, file: Any) -> None:
    """Raise BagError where an open HDF5 file takes data from other files, or declares far more than it can hold.

    External storage, external links and virtual arrays would make features out of any file that the reader may read; a
    few kilobytes of compressed zeros, or of chunks that were never written, would fill the memory.
    """
    room = MOST_EXPANDED * path.stat().st_size + FREE_BYTES
    _look(path, file["/"], room, set())


def _look(path: Path, group: Any, room: int, seen: set[int]) -> int:
    """What of ``room`` is left after the arrays of a group."""
    seen.add(int(h5py.h5o.get_info(group.id).addr))
    links = group.id.links
    for name in list(group):
        kind = links.get_info(name.encode("utf-8", "surrogateescape")).type
        if kind == h5py.h5l.TYPE_SOFT:
            # Within the file; what they lead to is looked at where it stands.
            continue
        if kind != h5py.h5l.TYPE_HARD:
            raise BagError(f"{path}: {name} is a link to another file, which no bag may hold", remedy=REMEDY)
        item = group[name]
        if isinstance(item, h5py.Group):
            if int(h5py.h5o.get_info(item.id).addr) not in seen:
                room = _look(path, item, room, seen)
        elif isinstance(item, h5py.Dataset):
            room -= _declared_bytes(path, item)
            if room < 0:
                raise BagError(
                    f"{path}: declares arrays over {MOST_EXPANDED} times larger than the file, which no bag holds",
                    remedy=REMEDY,
                )
    return room


REMEDY = "make the bag again with wsi-pipe run, or copy its data into the file itself"


def _declared_bytes(path: Path, data: Any) -> int:
    """Bytes of an array in memory, or of one chunk of it where that is more."""
    made = data.id.get_create_plist()
    if made.get_external_count():
        raise BagError(f"{path}: {data.name} lies in another file, which no bag may do", remedy=REMEDY)
    layout = made.get_layout()
    if layout == h5py.h5d.VIRTUAL:
        raise BagError(f"{path}: {data.name} is put together from other files, which no bag may be", remedy=REMEDY)
    each = int(data.id.get_type().get_size())
    chunk = 1
    if layout == h5py.h5d.CHUNKED:
        for side in made.get_chunk():
            chunk *= int(side)
    elements = 1
    for side in data.shape or ():
        elements *= int(side)
    return max(elements, chunk) * each
