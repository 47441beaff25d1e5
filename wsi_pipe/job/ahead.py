"""Items worked on by several threads and handed out in their order: slides are prepared while others are encoded."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from wsi_pipe.stopping import Stop, belongs_to, stop_event

__all__ = ["Ahead"]

T = TypeVar("T")
R = TypeVar("R")

POLL_S = 0.1
PATIENCE_S = 0.8
"""How long threads are waited for where the process is about to end: what hangs in a dead mount ends with it."""


@dataclass(frozen=True)
class _Result(Generic[R]):
    value: R | None = None
    error: BaseException | None = None
    last: bool = False


class Ahead(Generic[T, R]):
    """Iterates over ``work(item)`` of each item, in the items' order, ``threads`` of them at work at a time.

    items: asked for the next one by one thread at a time, any of them, at most twice ``threads`` ahead of what was
    handed out. It may wait: what was begun is handed out meanwhile. What it or ``work`` raises is raised in the place
    of that item, and nothing comes after it. The threads begin with the iteration, each once the one before it has
    something to do, and belong to what this was made in. stop: ends it early, as ``close`` does, and no further item is
    asked for.
    """

    def __init__(self, items: Iterable[T], work: Callable[[T], R], threads: int, stop: Stop) -> None:
        self._items, self._work, self._count, self._stop = iter(items), work, threads, stop
        self._asking = threading.Lock()
        self._change = threading.Condition()
        self._results: dict[int, _Result[R]] = {}
        self._asked = self._handed = 0
        self._exhausted = self._closed = False
        self._threads: list[threading.Thread] = []
        self._belongs_to = stop_event()

    def __iter__(self) -> Generator[R]:
        self._start_one()
        try:
            while (result := self._next()) is not None:
                if result.error is not None:
                    raise result.error
                if result.last:
                    return
                yield result.value  # type: ignore[misc]
        finally:
            self.close()

    def _next(self) -> _Result[R] | None:
        """The next result in order; None once it is stopped."""
        with self._change:
            while self._handed not in self._results:
                if self._closed or self._stop.is_set():
                    return None
                self._change.wait(POLL_S)
            result = self._results.pop(self._handed)
            self._handed += 1
            self._change.notify_all()
            return result

    def _start_one(self) -> None:
        thread = threading.Thread(target=self._run, name="wsi-pipe-prepare", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run(self) -> None:
        with belongs_to(self._belongs_to):
            self._work_on()

    def _work_on(self) -> None:
        while (taken := self._take()) is not None:
            number, item = taken
            try:
                result: _Result[R] = _Result(self._work(item))
            except BaseException as error:  # raised again where the results are taken
                result = _Result(error=error)
            self._put(number, result)

    def _take(self) -> tuple[int, T] | None:
        """The next item and its number; None where there is none to work on."""
        with self._asking:
            with self._change:
                while not self._is_over() and self._asked >= self._handed + 2 * self._count:
                    self._change.wait(POLL_S)
                if self._is_over():
                    return None
                number = self._asked
                self._asked += 1
            try:
                item = next(self._items)
                if len(self._threads) < self._count:
                    self._start_one()
                return number, item
            except StopIteration:
                self._put(number, _Result(last=True))
            except BaseException as error:  # raised again where the results are taken
                self._put(number, _Result(error=error))
            return None

    def _put(self, number: int, result: _Result[R]) -> None:
        with self._change:
            self._results[number] = result
            # After an end, or an error, nothing more is asked for; what was begun before is finished.
            self._exhausted = self._exhausted or result.last or result.error is not None
            self._change.notify_all()

    def _is_over(self) -> bool:
        """Whether no further item is to be asked for."""
        return self._exhausted or self._closed or self._stop.is_set()

    def close(self) -> None:
        """End, and wait for the threads. Where the end was asked for from outside, not for long."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        deadline = time.monotonic() + PATIENCE_S
        for thread in self._threads:
            while thread.is_alive() and not (self._stop.asked and time.monotonic() > deadline):
                thread.join(POLL_S)
