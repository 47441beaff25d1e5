"""A background thread that works ahead of a loop."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["run_ahead"]

T = TypeVar("T")

LOOK_S = 0.1
"""How often, in seconds, a thread with nothing to do looks whether it is still wanted."""


@dataclass(frozen=True)
class _End:
    """Nothing follows. error: what ended it, None at the end of the items."""

    error: BaseException | None = None


def run_ahead(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """``items`` in their order, made in a thread that is at most ``depth`` of them ahead, not counting the one at work.

    With ``depth`` 0 there is no thread and nothing ahead. What making an item raises is raised in its place. The thread
    has ended when the iterator is exhausted or closed: whoever may leave it early closes it (``contextlib.closing``).
    Raises ValueError for ``depth`` below 0.
    """
    if depth < 0:
        raise ValueError(f"depth {depth} must be at least 0")
    return _ahead(items, depth) if depth else (item for item in items)


def _ahead(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    ready: queue.Queue[T | _End] = queue.Queue(depth)
    unwanted = threading.Event()

    def put(item: T | _End) -> bool:
        while not unwanted.is_set():
            try:
                ready.put(item, timeout=LOOK_S)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(item):
                    return
        except BaseException as error:  # whatever it is, it belongs to the loop that waits
            put(_End(error))
        else:
            put(_End())

    # A daemon: should the loop never be closed, the thread does not keep the program from ending.
    thread = threading.Thread(target=work, name="lrmil-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        unwanted.set()
        thread.join()
