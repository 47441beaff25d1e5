"""A few slides kept open, for whoever looks at several at once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from wsi_pipe.slides.base import Slide

__all__ = ["OpenSlides"]


@dataclass
class _Held:
    lock: threading.Lock = field(default_factory=threading.Lock)
    slide: Slide | None = None
    users: int = 0


class OpenSlides:
    """Slides by number, opened when they are asked for; the ones not looked at for longest are closed.

    opener: opens a slide; what it raises goes to whoever asked, and the next request tries again. most: how many stay
    open beyond those that are in use. Any thread may ask.
    """

    def __init__(self, opener: Callable[[int], Slide], most: int = 8) -> None:
        self._opener, self._most = opener, most
        self._lock = threading.Lock()
        self._held: OrderedDict[int, _Held] = OrderedDict()

    @contextmanager
    def use(self, number: int) -> Iterator[Slide]:
        """The slide, open for as long as the block lasts."""
        with self._lock:
            held = self._held.setdefault(number, _Held())
            self._held.move_to_end(number)
            held.users += 1
        try:
            # One opens, the others wait for it; other slides are opened meanwhile.
            with held.lock:
                if held.slide is None:
                    held.slide = self._opener(number)
            yield held.slide
        finally:
            with self._lock:
                held.users -= 1
                idle = self._idle()
            for slide in idle:
                slide.close()

    def _idle(self) -> list[Slide]:
        surplus = len(self._held) - self._most
        numbers = [n for n, held in self._held.items() if held.users == 0][: max(surplus, 0)]
        return [slide for n in numbers if (slide := self._held.pop(n).slide) is not None]

    def close(self) -> None:
        """Close what nobody uses."""
        with self._lock:
            self._most = 0
            idle = self._idle()
        for slide in idle:
            slide.close()
