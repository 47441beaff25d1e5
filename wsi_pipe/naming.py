"""What slides are called: ids by file names, and which of a job's slides a file is."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from wsi_pipe.ids import same_name, without_suffix
from wsi_pipe.masking import same_address

__all__ = ["clean_name", "ids_of_the_job", "is_url", "name_parts", "on_disk", "unique_names", "without_repeats"]


class Named(Protocol):
    """A slide of a job."""

    @property
    def slide_id(self) -> str: ...

    @property
    def path(self) -> str: ...


def is_url(path: str) -> bool:
    """Whether ``path`` is a URL of a file system other than the local one."""
    return re.match(r"^[A-Za-z][A-Za-z0-9+.-]+://", path) is not None


def on_disk(path: str) -> str:
    """``path`` as the file system writes it, where accents are composed in one of them and decomposed in the other."""
    if path.isascii() or os.path.lexists(path):
        return path
    found = os.sep
    for part in path.split(os.sep):
        below = os.path.join(found, part)
        if part and not part.isascii() and not os.path.lexists(below):
            try:
                names = os.listdir(found)
            except OSError:
                return path
            same = [name for name in names if same_name(name) == same_name(part)]
            if len(same) != 1:
                return path
            below = os.path.join(found, same[0])
        found = below
    return found


def ids_of_the_job(paths: Sequence[str], taken: set[str], job: Sequence[Named]) -> dict[str, str]:
    """By path, the id of the job's slide that a file is: the same path, else the same file by another (a link), or
    one that is gone from where it was.

    Of several slides of one file, which are scans or focal planes of it, the first. Of files that may be one that is
    gone, those are taken that have its name and the most of its folders' names, as long as there is one such.
    """
    # A URL is the same whoever signed it and until when.
    here = {same_address(path): path for path in paths}
    found: dict[str, str] = {}
    for entry in job:
        if (path := here.get(same_address(entry.path))) is not None and entry.slide_id not in taken:
            found.setdefault(path, entry.slide_id)
    used = set(found.values())
    wanted: dict[str, list[str]] = {}
    for path in paths:
        if path not in found:
            wanted.setdefault(_file_name(path), []).append(path)
    gone: dict[str, list[Named]] = {}
    files: dict[tuple[int, int], str] = {}
    for entry in job:
        if entry.slide_id in taken | used or same_address(entry.path) in here or _file_name(entry.path) not in wanted:
            continue
        if is_url(entry.path):
            continue
        if not os.path.lexists(entry.path):
            gone.setdefault(_file_name(entry.path), []).append(entry)
        elif (file := file_of(entry.path)) is not None:
            files.setdefault(file, entry.slide_id)
    for name in wanted if files else ():
        for path in list(wanted[name]):
            if not is_url(path) and (slide_id := files.pop(file_of(path) or (0, 0), None)) is not None:
                found[path] = slide_id
                wanted[name].remove(path)
    for name, entries in gone.items():
        alike = {(path, entry.slide_id): _common_end(path, entry.path) for path in wanted[name] for entry in entries}
        for path in wanted[name]:
            mine = {entry.slide_id: alike[path, entry.slide_id] for entry in entries}
            best = max(mine.values())
            candidates = [slide_id for slide_id, length in mine.items() if length == best]
            rivals = [other for other in wanted[name] if alike[other, candidates[0]] >= best]
            if len(candidates) == 1 and rivals == [path]:
                found[path] = candidates[0]
    return found


def file_of(path: str) -> tuple[int, int] | None:
    """What tells that two paths are one file, or one folder: device and number on it; None where nothing does."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return (status.st_dev, status.st_ino) if status.st_ino else None


def without_repeats(paths: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The paths without those that are the same file as an earlier one of that name, and these, each with that one."""
    names = Counter(map(_file_name, paths))
    first: dict[tuple[int, int], str] = {}
    kept, repeats = [], []
    for path in paths:
        file = file_of(path) if names[_file_name(path)] > 1 and not is_url(path) else None
        if file is not None and first.setdefault(file, path) != path:
            repeats.append((path, first[file]))
        else:
            kept.append(path)
    return kept, repeats


def _file_name(path: str) -> str:
    return path.replace("\\", "/").rpartition("/")[2]


def _common_end(one: str, other: str) -> int:
    """How many parts two paths share, counted from the end."""
    pairs = zip(reversed(one.split("/")), reversed(other.split("/")), strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(one.count("/"), other.count("/")) + 1)


def _place(url: str) -> str:
    """Host and path of a URL, without user, query and fragment: its secrets stand in these."""
    place = re.split(r"[?#]", url.split("://", 1)[-1], maxsplit=1)[0]
    host, slash, path = place.partition("/")
    return host.rpartition("@")[2] + slash + path


def name_parts(path: str) -> list[str]:
    """Folder names and the file's stem, outermost first. A DICOM file goes by the name of its folder."""
    from wsi_pipe.slides.parts import goes_by_its_folder

    whole = same_name(_place(path) if is_url(path) else os.path.abspath(path))
    *folders, name = [part for part in whole.split("/") if part] or [""]
    if folders and (name.lower().endswith(".dcm") if is_url(path) else goes_by_its_folder(path)):
        return folders
    stem = without_suffix(name)
    return [*folders, (stem if stem != name else os.path.splitext(name)[0]) or name]


def unique_names(paths: Sequence[str], taken: set[str]) -> list[str]:
    """One id a path: the stem, with the extension where a folder holds two of one stem; where names repeat still, as
    many folder names in front as it takes."""
    parts = [name_parts(path) for path in paths]
    places = Counter(tuple(part) for part in parts)
    for part, path in zip(parts, paths, strict=True):
        if places[tuple(part)] > 1:
            part[-1] = same_name((_place(path) if is_url(path) else path).rstrip("/").rpartition("/")[2])
    names = [clean_name(part[-1]) for part in parts]
    # Some file systems do not tell case apart: ids must differ by more.
    reserved = {name.casefold() for name in taken}
    for depth in range(2, 2 + max((len(part) for part in parts), default=0)):
        folded = [name.casefold() for name in names]
        counts = Counter(folded)
        clashing = [i for i, name in enumerate(folded) if counts[name] > 1 or name in reserved]
        if not clashing:
            break
        for i in clashing:
            names[i] = clean_name("--".join(parts[i][-depth:]))
    return names


LONGEST_ID = 180
"""Bytes: file systems take names of 255, and an id gets endings."""


def clean_name(name: str) -> str:
    """``name`` as a file name: no slash, no control character, no leading dot, not too long."""
    cleaned = re.sub(r"[/\\\x00-\x1f:*?\"<>|]", "_", name).strip()
    cleaned = ("_" + cleaned[1:] if cleaned.startswith(".") else cleaned) or "slide"
    if len(cleaned.encode()) <= LONGEST_ID:
        return cleaned
    digest = hashlib.sha256(cleaned.encode()).hexdigest()[:8]
    return f"{cleaned.encode()[: LONGEST_ID - 9].decode(errors='ignore')}-{digest}"
