"""Bars of slides and tiles, in a notebook or on a terminal: ``Job.run(..., progress=True)``."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Bars"]


class Bars:
    """How many of ``slides`` are through, and how many tiles of those whose grids are laid are encoded.

    A context manager, whose ``step`` is a callback of ``Job.run``. console: where it is drawn; standard error by
    default, and a notebook's cell in a notebook.
    """

    def __init__(self, slides: int, console: Console | None = None) -> None:
        from rich.console import Console as Terminal
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bars = Progress(
            TextColumn("{task.description:6}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console or Terminal(stderr=True),
        )
        self._lock = threading.Lock()
        self._laid = 0
        self._slides = self._bars.add_task("slides", total=slides)
        # Until a grid is laid nothing is known of tiles.
        self._tiles = self._bars.add_task("tiles", total=None)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def step(self, slide_id: str, what: str, amount: int) -> None:
        """Work on a slide advanced, told by any thread."""
        if what == "laid":
            with self._lock:
                self._laid += amount
                self._bars.update(self._tiles, total=self._laid)
        elif what != "segment":
            self._bars.advance(self._tiles, amount)

    def finished(self) -> None:
        """One more slide is through."""
        self._bars.advance(self._slides)
