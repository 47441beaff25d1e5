"""A slide's file as slides, grids and data sets share it: opened once in a process, and anew in another."""

from __future__ import annotations

import os
import threading
from typing import Any

from wsi_pipe.config import CacheSettings
from wsi_pipe.errors import SlideReadError
from wsi_pipe.job.opening import open_entry
from wsi_pipe.manifest import SlideEntry
from wsi_pipe.slides.base import Slide

__all__ = ["Source"]


class Source:
    """Which slide, and its open file.

    Pickles as what it takes to open the slide again. A process that was forked opens the file for itself: two that
    share a position in a file, or the locks of a library, get into each other's way.
    """

    def __init__(self, entry: SlideEntry, reader: str = "auto", cache: CacheSettings | None = None) -> None:
        self.entry = entry
        self.reader = reader
        self.cache = cache or CacheSettings()
        self._closed = False
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._slide: Slide | None = None
        self._owner = os.getpid()
        self._inherited: list[Slide] = []
        """Of the process that this one was forked from: never read, and closed with the process."""

    @property
    def slide(self) -> Slide:
        """The open slide. Raises SlideReadError where it was closed, and what opening a slide raises."""
        if self._owner != os.getpid():
            inherited = [*self._inherited, *([self._slide] if self._slide is not None else [])]
            self._forget()
            self._inherited = inherited
        with self._lock:
            if self._closed:
                raise SlideReadError(f"{self.entry.shown_path}: is closed", remedy="open it again: wp.open(path)")
            if self._slide is None:
                self._slide = self.new()
            return self._slide

    def new(self) -> Slide:
        """The slide opened once more, for who closes it."""
        return open_entry(self.entry, self.reader, self.cache)

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        with self._lock:
            self._closed = True
            if self._slide is not None and self._owner == os.getpid():
                self._slide.close()
                self._slide = None

    def rest(self) -> None:
        """Close the file until it is read again: a process may have a thousand or so open. Not while it is read."""
        with self._lock:
            if self._slide is not None and self._owner == os.getpid():
                self._slide.close()
                self._slide = None

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def __getstate__(self) -> dict[str, Any]:
        return {"entry": self.entry, "reader": self.reader, "cache": self.cache}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.entry, self.reader, self.cache = state["entry"], state["reader"], state["cache"]
        self._closed = False
        self._forget()
