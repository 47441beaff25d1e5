"""A run's slides in the order in which they can be worked on: local ones at once, those behind URLs once copied."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator

from wsi_pipe.config import JobSettings
from wsi_pipe.errors import NeedsCopyError, SlideOpenError, TaskTimeoutError
from wsi_pipe.job.opening import open_entry
from wsi_pipe.manifest import SlideEntry, is_url
from wsi_pipe.slides.storage.in_use import Keep, keep_copy
from wsi_pipe.stopping import Stop, StopRequested, belongs_to

__all__ = ["Staging"]

POLL_S = 0.1
STAGED_AHEAD = 2
"""Slides behind URLs that are copied, or have been and wait for their turn."""


class _Copy:
    """A slide behind a URL on its way to the cache, where its format needs that, in a thread of its own.

    A daemon: a copy that takes minutes must not keep an interrupted run from ending.
    """

    def __init__(self, entry: SlideEntry, settings: JobSettings) -> None:
        self.entry = entry
        self.begun = time.monotonic()
        self.stop, self.over = threading.Event(), threading.Event()
        self.error: Exception | None = None
        self._settings = settings
        threading.Thread(target=self._run, name="stage", daemon=True).start()

    def _run(self) -> None:
        try:
            with belongs_to(self.stop):
                open_entry(self.entry, self._settings.reader, self._settings.cache).close()
        except StopRequested:
            pass
        except SlideOpenError as error:
            if not isinstance(error, NeedsCopyError):
                self.error = error
        except Exception:
            # It goes wrong again where the slide is opened in earnest, and is told there.
            pass
        finally:
            self.over.set()


class Staging:
    """Iterates over the slides of a run; copies those behind URLs to the cache ahead of their turn.

    No local slide waits for a remote one, and no remote one for another that takes longer. timeout_s: what one copy may
    take, as a slide may. stopped: ends the iteration, also while a copy is waited for. pauses: None comes where nothing
    is there yet, instead of waiting.
    copies: by slide, what keeps its copy where it is; the caller releases it when the slide is done. failed: slides
    whose copy could not be made, each with its error; they do not come.
    """

    def __init__(
        self,
        entries: Iterable[SlideEntry],
        settings: JobSettings,
        *,
        timeout_s: float | None,
        stopped: threading.Event,
        pauses: bool,
    ) -> None:
        self._settings, self._timeout_s, self._pauses = settings, timeout_s, pauses
        self._local: deque[SlideEntry] = deque()
        self._remote: deque[SlideEntry] = deque()
        for entry in entries:
            (self._remote if is_url(entry.path) else self._local).append(entry)
        self._stop = Stop(stopped)
        self._under_way: list[_Copy] = []
        self.copies: dict[str, Keep] = {}
        self.failed: deque[tuple[SlideEntry, Exception]] = deque()

    def __iter__(self) -> Iterator[SlideEntry | None]:
        try:
            while not self._stop.is_set():
                while self._remote and len(self._under_way) < STAGED_AHEAD:
                    self._begin(self._remote.popleft())
                landed = next((copy for copy in self._under_way if self._is_over(copy)), None)
                if landed is not None:
                    self._under_way.remove(landed)
                    if landed.error is None:
                        yield landed.entry
                    else:
                        self.release(landed.entry.slide_id)
                        self.failed.append((landed.entry, landed.error))
                elif self._local:
                    yield self._local.popleft()
                elif not self._under_way:
                    return
                elif self._pauses:
                    yield None
                else:
                    self._under_way[0].over.wait(POLL_S)
        finally:
            for copy in self._under_way:
                copy.stop.set()

    def release(self, slide_id: str) -> None:
        """The slide is done: its copy need not stay."""
        if (copy := self.copies.pop(slide_id, None)) is not None:
            copy.release()

    def release_all(self) -> None:
        """No slide is worked on any more."""
        for slide_id in list(self.copies):
            self.release(slide_id)

    def _begin(self, entry: SlideEntry) -> None:
        self.copies[entry.slide_id] = keep_copy(entry.path)
        self._under_way.append(_Copy(entry, self._settings))

    def _is_over(self, copy: _Copy) -> bool:
        """Whether a copy is there, or will not be."""
        if copy.over.is_set():
            return True
        if self._timeout_s is None or time.monotonic() - copy.begun < self._timeout_s:
            return False
        copy.stop.set()
        copy.error = TaskTimeoutError(
            f"copying it from its URL took longer than {self._timeout_s:g} s and was ended",
            remedy="give more time with --timeout, or copy the slide to a local disk and give its path",
        )
        return True
