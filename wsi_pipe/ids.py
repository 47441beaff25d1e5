"""One rule for slide ids in every table: ``a.svs`` and ``a`` are one slide, and so are composed and decomposed accents.

A name is compared by its last part, without the suffixes of slides and bags. Other dots belong to it: the barcodes of
TCGA hold some.
"""

from __future__ import annotations

import functools
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

__all__ = ["Ids", "clash", "id_of", "joined", "same_name", "table_ids", "without_suffix"]

V = TypeVar("V")

BAG_SUFFIXES = (".h5", ".hdf5", ".pt", ".pth", ".npy", ".npz", ".parquet", ".dcm", ".zip")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jp2", ".j2k", ".bmp")
MORE_SLIDE_SUFFIXES = (".qptiff", ".ptif", ".ptiff", ".czi", ".zarr", ".isyntax", ".vsi", ".mrxs", ".afi")


@functools.cache
def _suffixes() -> re.Pattern[str]:
    from wsi_pipe.slides.discover import SLIDE_EXTENSIONS

    known = {*SLIDE_EXTENSIONS, *BAG_SUFFIXES, *PICTURE_SUFFIXES, *MORE_SLIDE_SUFFIXES}
    return re.compile(rf"(?:(?:\.ome)?(?:{'|'.join(map(re.escape, sorted(known)))}))+$", re.IGNORECASE)


def same_name(name: str) -> str:
    """``name`` in Unicode's composed form (NFC): macOS writes accents decomposed, everybody else composed."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def without_suffix(name: str) -> str:
    """A file's name without the suffixes of slides and bags: ``a.ome.tif`` and ``a.svs.h5`` are ``a``."""
    found = _suffixes().search(name)
    return name[: found.start()] if found and found.start() else name


def _last(name: str) -> str:
    """The last part of a path, of Windows or others."""
    if "/" in name or "\\" in name:
        return re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    return name


def id_of(name: str) -> str:
    """What slides are compared by: the last part of a path, composed, without suffixes of slides and bags."""
    return without_suffix(_last(same_name(name)))


def _whole(name: str) -> str:
    """A whole number as an id is ``12`` where pandas or Excel make ``12.0`` of it."""
    return re.sub(r"^(\d+)[.,]0+$", r"\1", name)


def clash(names: Iterable[str]) -> tuple[str, str] | None:
    """Two of ``names`` that are one slide by the rule: equal, or one is the other without its suffix.

    ``a.svs`` and ``a.ndpi`` beside each other are two slides: files of one stem are told apart by their suffix.
    """
    names = list(names)
    keys = [id_of(name).casefold() for name in names]
    if len(set(keys)) == len(keys):
        return None
    seen: dict[str, dict[str, str]] = {}
    for name, bare in zip(names, keys, strict=True):
        group = seen.setdefault(bare, {})
        whole = _last(same_name(name)).casefold()
        other = group.get(whole) or (next(iter(group.values()), None) if whole == bare else group.get(bare))
        if other is not None:
            return other, name
        group[whole] = name
    return None


def table_ids(names: Sequence[str]) -> list[str]:
    """The ids that the names of a table stand for, where no bags say which ids there are.

    A suffix is dropped, but kept where two files of one stem are in the table.
    """
    wholes: dict[str, set[str]] = {}
    keys = [id_of(name) for name in names]
    for name, key in zip(names, keys, strict=True):
        wholes.setdefault(key, set()).add(_last(same_name(name)))
    apart = {key for key, found in wholes.items() if len(found) > 1 and key not in found}
    return [_last(same_name(n)) if key in apart else key for n, key in zip(names, keys, strict=True)]


class Ids:
    """Ids that are known, and which of them a name in a table means."""

    def __init__(self, known: Iterable[str]) -> None:
        self._by: tuple[dict[str, str | None], ...] = ({}, {}, {})
        self._known = dict.fromkeys(known)
        for name in self._known:
            for index, key in zip(self._by, self._keys(same_name(name)), strict=True):
                # A key that two ids share says nothing.
                index[key] = name if key not in index else None

    @staticmethod
    def _keys(name: str) -> tuple[str, str, str]:
        key = without_suffix(name)
        return name, key, key.casefold()

    def match(self, name: str) -> str | None:
        """The known id that ``name`` means: the same, a file or a path of that name; None where none or several do.

        Of a path the folders count as far as ids are made of them (``b--a`` for ``b/a.svs``).
        """
        if name in self._known:
            return name
        name = same_name(name)
        parts = [part for part in re.split(r"[/\\]", name) if part]
        tried = ["--".join(parts[-depth:]) for depth in range(len(parts), 0, -1)]
        tried += [stem for stem in (os.path.splitext(tried[-1])[0], _whole(tried[-1])) if stem] if tried else []
        for one in tried:
            for index, key in zip(self._by, self._keys(one), strict=True):
                found = index.get(key)
                if found is not None:
                    return found
        return None


def joined(table: Mapping[str, V], ids: Iterable[str]) -> dict[str, V]:
    """The values of a table by the ``ids`` that its names mean; a name that is the id itself goes before others."""
    ids = list(ids)
    known = Ids(ids)
    found = {known.match(name): value for name, value in table.items()}
    return {slide: table[slide] if slide in table else found[slide] for slide in ids if slide in found}
