"""The progress of a run on standard error: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import click

from wsi_pipe.cli import messages
from wsi_pipe.cli.pace import Pace, span
from wsi_pipe.cli.tables import paragraph
from wsi_pipe.outcome import SlideOutcome

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["RunDisplay", "describe"]

BAR = 24
"""Columns of a bar: what is told beside it has room on a terminal of 80."""


class RunDisplay:
    """Progress of a run: bars on a terminal, one line a slide elsewhere, nothing where ``quiet`` or with -q.

    console: where bars are drawn, for tests.
    """

    def __init__(self, total: int, *, quiet: bool = False, console: Console | None = None) -> None:
        self.pace = Pace(total)
        self.preparing = self.encoding = ""
        quiet = quiet or messages.level() < 0
        bars = console is not None or (not quiet and sys.stderr.isatty())
        self.lines = not quiet and not bars
        self._live: Any = None
        if bars:
            from rich.console import Console
            from rich.live import Live

            console = console or Console(stderr=True)
            self._live = Live(console=console, get_renderable=self.drawn, refresh_per_second=4, transient=False)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self.preparing = self.encoding = ""
            self._live.stop()

    def progress(self, slide_id: str, what: str, amount: int) -> None:
        """A ``wsi_pipe.job.run.Progress`` callback."""
        if what == "segment":
            self.pace.begin()
            self.preparing = slide_id
        elif what == "laid":
            self.pace.laid(slide_id, amount)
        else:
            self.encoding = slide_id
            self.pace.encoded(slide_id, amount)

    def finished(self, outcome: SlideOutcome) -> None:
        """One more slide is finished."""
        self.pace.finished(outcome)
        for name in ("preparing", "encoding"):
            if getattr(self, name) == outcome.slide_id:
                setattr(self, name, "")
        line = f"[{self.pace.done}/{self.pace.total}] {outcome.slide_id}: {describe(outcome)}"
        if self._live:
            if outcome.status == "failed" or messages.level() > 0:
                # Folded between words alone: who looks for an id finds it.
                text = paragraph(line, indent="  ", width=self._live.console.width)
                self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self.lines:
            left = self.pace.left_s if self.pace.done < self.pace.total else None
            click.echo(line + (f"; about {span(left)} left" if left is not None else ""), err=True)

    def drawn(self) -> RenderableType:
        """The bars as they are now."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        pace, expected = self.pace, self.pace.expected
        grid = Table.grid(padding=(0, 1))
        grid.add_column(width=9)
        grid.add_column(width=BAR)
        grid.add_column(no_wrap=True, overflow="ellipsis")
        left = pace.left_s if pace.done < pace.total else None
        told = f"{pace.done:,} of {pace.total:,}"
        if left is not None:
            told += f", about {span(left)} left"
        grid.add_row("slides", ProgressBar(pace.total, pace.done, width=BAR), Text(told))
        if pace.tiles or expected:
            rate = pace.tiles_per_s
            told = f"{pace.tiles:,}"
            if expected is not None:
                told += f" of {'' if pace.is_exact else 'about '}{expected:,}"
            if rate:
                told += f", {rate:,.0f}/s"
            grid.add_row("tiles", ProgressBar(expected, pace.tiles, width=BAR), Text(told))
        rows: list[RenderableType] = [grid]
        for what, slide_id in (("encoding", self.encoding), ("tissue of", self.preparing)):
            if slide_id:
                rows.append(Text(f"{what:9} {slide_id}", no_wrap=True, overflow="ellipsis"))
        return Group(*rows)


def describe(outcome: SlideOutcome) -> str:
    """An outcome in a few words."""
    if outcome.status == "failed":
        where = f" in {outcome.stage}" if outcome.stage else ""
        return f"failed{where}: {outcome.reason}" + (f"; {outcome.remedy}" if outcome.remedy else "")
    tiles = ", ".join(f"{count:,} tiles at {label}" for label, count in outcome.tiles.items())
    what = f"empty: {outcome.reason}" if outcome.status == "empty" else tiles or "done"
    return f"{what} ({sum(outcome.seconds.values()):.1f} s{', nothing to do' if outcome.nothing_new else ''})"
