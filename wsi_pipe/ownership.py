"""Whose a folder is: outputs go into folders that carry a mark of this program, and what others made is left alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path

from wsi_pipe import __version__
from wsi_pipe.errors import NotOursError, OutputError
from wsi_pipe.files import is_temporary, output_error, write_text_atomically

__all__ = ["MARKER_VERSION", "claim_folder", "is_marked", "names_in", "refuse_foreign_outputs", "starts_with_any"]

MARKER_VERSION = 1
OF_NOBODY = frozenset({".DS_Store", "Thumbs.db", "desktop.ini", "lost+found", ".snapshot", ".directory"})
"""What systems put into folders by themselves."""
SHOWN = 5


def names_in(folder: Path) -> list[str]:
    """Names of what lies in a folder, but for what systems put there; none where it is not there.

    Raises OutputError when it cannot be looked at.
    """
    try:
        return sorted(name for name in os.listdir(folder) if name not in OF_NOBODY)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise output_error(folder, error) from error


def is_marked(folder: Path, marker: str) -> bool:
    """Whether a folder carries the mark. Raises OutputError when that cannot be told, NotOursError when the mark is
    another's or of a later version."""
    path = folder / marker
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    except NotADirectoryError as error:
        raise output_error(folder, error) from error
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be read ({error.strerror}), so whose the folder is cannot be told",
            remedy="check its permissions and the file system, then run again",
        ) from error
    except ValueError:
        text = ""
    try:
        values = json.loads(text)
        kind, version = values["schema"], int(values["version"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise NotOursError(
            f"{path}: is not a mark of this program", remedy="delete it, or give another --out"
        ) from error
    if kind != marker.lstrip("."):
        raise NotOursError(f"{path}: is not a mark of this program", remedy="delete it, or give another --out")
    if version > MARKER_VERSION:
        raise NotOursError(
            f"{folder}: belongs to a later version of this program", remedy="update it, or give another --out"
        )
    return True


def _no_mark(path: Path) -> NotOursError:
    return NotOursError(f"{path}: is not a mark of this program", remedy="delete it, or give another --out")


def claim_folder(
    folder: Path,
    marker: str,
    what: str,
    *,
    earlier: Callable[[Path], bool] | None = None,
    passed_over: Collection[str] = (),
    make: bool = True,
) -> bool:
    """Make ``folder``, where it is not there or empty, one for outputs: it gets a mark. A marked one is left as it is.

    marker: the mark's file name. what: such a folder in words, "a job". earlier: whether a folder without a mark is
    what an earlier version made, which had none; it is adopted. passed_over: names that do not count as files of
    others. make: off to look only. Returns whether the folder was adopted now. Raises NotOursError when it holds files
    of others and no mark, OutputError when it cannot be read or written.
    """
    if is_marked(folder, marker):
        return False
    # A write that was broken off, of the mark itself perhaps, is no file of others.
    found = [name for name in names_in(folder) if name not in passed_over and not is_temporary(name)]
    adopted = bool(found) and earlier is not None and earlier(folder)
    if found and not adopted:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise NotOursError(
            f"{folder}: holds files already ({', '.join(found[:SHOWN])}{more}) and is not {what}: nothing was written",
            remedy="give an empty folder or one that does not exist yet",
        )
    if not make:
        return adopted
    values = {
        "schema": marker.lstrip("."),
        "version": MARKER_VERSION,
        "program": f"wsi-pipe {__version__}",
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        **({"adopted": True} if adopted else {}),
    }
    write_text_atomically(folder / marker, json.dumps(values) + "\n")
    return adopted


def refuse_foreign_outputs(folder: Path, marks: Mapping[str, Collection[bytes]]) -> None:
    """Refuse to write over files that are there already and not this program's.

    marks: by file name, what stands in the first bytes of one that this program wrote. Raises NotOursError.
    """
    there = {name for name in names_in(folder) if name in marks and (folder / name).is_file()}
    for name in sorted(there):
        path = folder / name
        if path.stat().st_size and not starts_with_any(path, marks[name], 4096):
            raise NotOursError(
                f"{path}: was not made by this program and would be written over",
                remedy="move it elsewhere, or give another --out",
            )


def starts_with_any(path: Path, marks: Collection[bytes], within: int) -> bool:
    """Whether one of ``marks`` stands in the first ``within`` bytes of a file.

    Raises OutputError when it cannot be read, which says nothing of whose it is.
    """
    try:
        with open(path, "rb") as handle:
            head = handle.read(within)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be read ({error.strerror}), so whose it is cannot be told",
            remedy="check its permissions and the file system, then run again",
        ) from error
    return any(mark in head for mark in marks)
