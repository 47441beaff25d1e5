"""The word to stop: a signal's, or that of the process or cluster that this work belongs to.

Who asks sets an event. Everything that takes batches, slides or copies looks at it before the next one. An event alone
ends no call that waits, so that who takes the signal also raises in the main thread; but a library may swallow what is
raised, and never an event.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

__all__ = ["Stop", "StopRequested", "belongs_to", "is_interrupt", "putting_by", "stop_event"]

_process = threading.Event()
_local = threading.local()

putting_by = threading.Event()
"""Set while this process writes what there is of unfinished work: not the moment to end it."""


class StopRequested(KeyboardInterrupt):
    """The work was told to stop. No error of a slide's, so that nothing which catches those takes it for one."""


def is_interrupt(error: BaseException | None) -> bool:
    """Whether an interruption is behind an error: the error itself, its cause, or what was handled when it came."""
    for _ in range(100):
        if error is None:
            return False
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def stop_event() -> threading.Event:
    """Set once what the calling thread does shall stop: the process's event, or that of ``belongs_to``."""
    event: threading.Event = getattr(_local, "event", _process)
    return event


@contextlib.contextmanager
def belongs_to(event: threading.Event) -> Iterator[None]:
    """What this thread does meanwhile stops by ``event`` rather than by the process's own."""
    before = getattr(_local, "event", _process)
    _local.event = event
    try:
        yield
    finally:
        _local.event = before


class Stop:
    """An event of a piece of work's own, and the one that it was told to stop by; looks like an event."""

    def __init__(self, own: threading.Event | None = None) -> None:
        self._own = own or threading.Event()
        self._outer = stop_event()

    @property
    def asked(self) -> bool:
        """Whether the end was asked for from outside."""
        return self._outer.is_set()

    def set(self) -> None:
        """End this piece of work alone."""
        self._own.set()

    def is_set(self) -> bool:
        """Whether to end."""
        return self._own.is_set() or self._outer.is_set()
