"""Facts about slides, kept between runs, so that an archive is opened once."""

from __future__ import annotations

import dataclasses
import json
import os
import sqlite3
import stat
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from wsi_pipe.config import CacheSettings
from wsi_pipe.errors import NeedsCopyError, in_words
from wsi_pipe.files import output_error, parse_json
from wsi_pipe.geometry import FloatPair, IntPair, Pyramid
from wsi_pipe.job.opening import open_entry
from wsi_pipe.manifest import SlideEntry, is_url

__all__ = ["NEEDS_STAGING", "MetadataCache", "SlideFacts", "opened_how", "slide_facts"]

COMMIT_EVERY = 1000
FACTS_VERSION = 2
"""Raised when readers come to tell other facts of the same file, so that what was noted before is not used."""

NEEDS_STAGING = "needs staging"
"""Of a slide behind a URL that is read from a local copy, which is not there yet."""


@dataclass(frozen=True)
class SlideFacts:
    """What opening a slide tells. error and remedy: why it cannot be opened, or None.

    sizes_px: (width, height) of each level. mpp: (x, y) as the file states it, or None. note: NEEDS_STAGING where no
    more can be told without copying the slide, else "".
    """

    sizes_px: tuple[IntPair, ...] = ()
    mpp: FloatPair | None = None
    mpp_source: str = "none"
    vendor: str = ""
    reader: str = ""
    error: str | None = None
    remedy: str | None = None
    note: str = ""

    def pyramid(self, mpp: FloatPair | None) -> Pyramid:
        """The pyramid, at the user's mpp where one is given."""
        return Pyramid.from_sizes(self.sizes_px, mpp or self.mpp)


def slide_facts(entry: SlideEntry, reader: str, cache: CacheSettings | None = None) -> SlideFacts:
    """Open a slide and look; what is wrong with it is in the facts, nothing is raised.

    A slide behind a URL that cannot be read by byte ranges is not copied: a plan over an archive would copy it all.
    """
    try:
        slide = open_entry(dataclasses.replace(entry, mpp=None), reader, cache, copy=False)
    except NeedsCopyError:
        return SlideFacts(note=NEEDS_STAGING)
    except Exception as error:
        # A damaged file may fail in ways that nobody foresaw: the plan says so and goes on.
        reason, remedy = in_words(error)
        return SlideFacts(error=reason, remedy=remedy)
    try:
        return SlideFacts(
            sizes_px=tuple(level.size_px for level in slide.pyramid.levels),
            mpp=slide.pyramid.mpp,
            mpp_source=slide.info.mpp_source,
            vendor=slide.info.vendor,
            reader=slide.info.reader,
        )
    finally:
        slide.close()


class MetadataCache:
    """Facts by path, size and time of change, in an SQLite file; in memory without a path.

    Slides behind URLs are not kept: nothing cheap tells whether they changed. Raises OutputError when the file cannot
    be written.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path or Path(":memory:")
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(str(path) if path else ":memory:")
            self._database.execute("CREATE TABLE IF NOT EXISTS facts (path TEXT PRIMARY KEY, stamp TEXT, facts TEXT)")
        except (OSError, sqlite3.Error) as error:
            raise output_error(self._path, error if isinstance(error, OSError) else OSError(str(error))) from error
        self._pending = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.commit()
        self._database.close()

    def get(self, path: str, how: str) -> SlideFacts | None:
        """Facts noted of the file as it is now, opened ``how`` (see ``opened_how``), or None."""
        stamp = _stamp(path, how)
        if stamp is None:
            return None
        row = self._database.execute("SELECT facts FROM facts WHERE path = ? AND stamp = ?", (path, stamp)).fetchone()
        if row is None:
            return None
        values = parse_json(row[0])
        values["sizes_px"] = tuple((int(w), int(h)) for w, h in values["sizes_px"])
        values["mpp"] = tuple(values["mpp"]) if values["mpp"] else None
        return SlideFacts(**values)

    def put(self, path: str, how: str, facts: SlideFacts) -> None:
        """Note facts; failures are not kept, since their cause may be mended without a change to the file."""
        stamp = _stamp(path, how)
        if stamp is None or facts.error:
            return
        try:
            self._database.execute(
                "INSERT OR REPLACE INTO facts VALUES (?, ?, ?)", (path, stamp, json.dumps(asdict(facts)))
            )
            self._pending += 1
            if self._pending >= COMMIT_EVERY:
                self._database.commit()
                self._pending = 0
        except sqlite3.Error as error:
            raise output_error(self._path, OSError(str(error))) from error


def opened_how(entry: SlideEntry, reader: str) -> str:
    """The reader, and which picture of the file is meant."""
    asked = [f":{name}={value}" for name, value in (("scene", entry.scene), ("z", entry.z)) if value is not None]
    return reader + "".join(asked)


def _stamp(path: str, how: str) -> str | None:
    if is_url(path):
        return None
    try:
        status = os.stat(path)
    except OSError:
        return None
    if stat.S_ISDIR(status.st_mode):
        # Of a store of chunks, the folder's own size and time say nothing.
        return None
    return f"{status.st_size}:{status.st_mtime_ns}:{how}:{FACTS_VERSION}"
