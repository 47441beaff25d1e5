"""What the threads of extraction share: bounded queues, and the word to stop."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from typing import Any

from wsi_pipe.stopping import Stop

__all__ = ["END", "ByteQueue", "Lines", "StoppedError"]

RESULTS_AHEAD = 4
"""Finished slides that may wait for the caller before encoding stops to wait for it."""
ITEMS_AHEAD = 2
"""Slides taken from the caller's iterable before a reading thread is free for them."""
POLL_S = 0.1
PATIENCE_S = 0.8
"""How long threads are waited for that were told to stop: a batch or a read may take minutes, and the process ends."""

END = object()
"""Stands in a queue after its last entry."""


class StoppedError(Exception):
    """The caller has gone; the threads end."""


class ByteQueue:
    """A first-in first-out queue that holds at most so many bytes, but always takes one item."""

    def __init__(self, limit: int, stopped: threading.Event | Stop) -> None:
        self._limit = limit
        self._held = 0
        self._items: deque[tuple[Any, int]] = deque()
        self._change = threading.Condition()
        self._stopped = stopped

    def put(self, item: Any, size: int = 0) -> None:
        """Append an item of ``size`` bytes, waiting for room."""
        with self._change:
            self._end_if_stopped()
            while self._items and size and self._held + size > self._limit:
                self._wait()
            self._items.append((item, size))
            self._held += size
            self._change.notify_all()

    def get(self) -> Any:
        """The oldest item, waiting for one; none once it is stopped, whatever still waits."""
        with self._change:
            self._end_if_stopped()
            while not self._items:
                self._wait()
            item, size = self._items.popleft()
            self._held -= size
            self._change.notify_all()
            return item

    def wait(self, seconds: float) -> None:
        """Return when there is an item, or after so long."""
        with self._change:
            if not self._items:
                self._wait(seconds)

    @property
    def empty(self) -> bool:
        """True where ``get`` would wait."""
        with self._change:
            return not self._items

    def _wait(self, seconds: float = POLL_S) -> None:
        self._end_if_stopped()
        self._change.wait(seconds)
        self._end_if_stopped()

    def _end_if_stopped(self) -> None:
        if self._stopped.is_set():
            raise StoppedError


class Lines:
    """The queues between the threads. ``items``: slides to read; ``waiting``: tiles to encode; ``done``: results.

    Every wait ends with StoppedError once ``stopped`` is set.
    """

    def __init__(self, waiting_bytes: int, stopped: threading.Event | None = None) -> None:
        self.stopped = Stop(stopped)
        self.items: queue.Queue[Any] = queue.Queue(ITEMS_AHEAD)
        self.waiting = ByteQueue(waiting_bytes, self.stopped)
        self.done: queue.Queue[Any] = queue.Queue(RESULTS_AHEAD)

    def put_item(self, item: Any) -> None:
        """Queue a slide to read."""
        self._put(self.items, item)

    def next_item(self) -> Any:
        """The next slide to read, or END."""
        while True:
            try:
                item = self.items.get(timeout=POLL_S)
            except queue.Empty:
                item = None
            if self.stopped.is_set():
                raise StoppedError
            if item is not None:
                return item

    def hand_out(self, result: Any) -> None:
        """Queue a result for the caller."""
        self._put(self.done, result)

    def fail(self, error: BaseException) -> None:
        """Stop all threads and queue the error, which the caller raises."""
        self.stopped.set()
        self._put(self.done, error, even_when_stopped=True)

    def close(self, threads: list[threading.Thread]) -> None:
        """Stop the threads and wait for their end, making room for what they still want to say.

        Where the end was asked for from outside, not longer than ``PATIENCE_S``: the process is about to end, and what
        hangs in a dead mount or computes a batch of minutes ends with it.
        """
        self.stopped.set()
        deadline = time.monotonic() + PATIENCE_S
        for thread in threads:
            while thread.is_alive() and not (self.stopped.asked and time.monotonic() > deadline):
                while not self.done.empty():
                    self.done.get()
                thread.join(POLL_S)

    def _put(self, where: queue.Queue[Any], what: Any, *, even_when_stopped: bool = False) -> None:
        while True:
            try:
                where.put(what, timeout=POLL_S)
                return
            except queue.Full:
                if self.stopped.is_set() and not even_when_stopped:
                    raise StoppedError from None
