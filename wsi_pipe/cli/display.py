"""How a run shows itself: progress on standard error, the closing table on standard output."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import click

from wsi_pipe.files import output_error
from wsi_pipe.outcome import SlideOutcome

if TYPE_CHECKING:
    from rich.progress import TaskID

__all__ = ["LogLines", "RunDisplay", "print_json", "print_notes", "print_outcomes", "print_table"]

MOST_NOTES = 50


SHOWN_FAILURES = 100


class RunDisplay:
    """Progress of a run: bars on a terminal, one line a slide elsewhere, nothing where ``quiet``."""

    def __init__(self, total: int, *, quiet: bool = False) -> None:
        self.total, self.done, self.tiles = total, 0, 0
        self.start = time.monotonic()
        self.lines = not quiet and not sys.stderr.isatty()
        self._bars: Any = None
        self._slides: TaskID | None = None
        self._tiles: TaskID | None = None
        if not quiet and not self.lines:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )

    def __enter__(self) -> Self:
        if self._bars:
            self._bars.start()
            self._slides = self._bars.add_task("slides", total=self.total, note="")
            self._tiles = self._bars.add_task("tiles", total=None, note="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.stop()

    def progress(self, slide_id: str, what: str, amount: int) -> None:
        """A ``wsi_pipe.job.run.Progress`` callback."""
        if what == "segment":
            if self._bars:
                self._bars.update(self._slides, note=slide_id)
            return
        self.tiles += amount
        if self._bars:
            rate = self.tiles / max(time.monotonic() - self.start, 1e-9)
            self._bars.update(self._tiles, completed=self.tiles, note=f"{rate:,.0f}/s  {what}")

    def finished(self, outcome: SlideOutcome) -> None:
        """One more slide is finished."""
        self.done += 1
        line = f"[{self.done}/{self.total}] {outcome.slide_id}: {describe(outcome)}"
        if self._bars:
            self._bars.update(self._slides, completed=self.done)
            if outcome.status == "failed":
                self._bars.console.print(line, markup=False, highlight=False)
        elif self.lines:
            click.echo(line, err=True)


class LogLines:
    """Events as JSON lines, appended to a file or on standard error; nothing without a target."""

    def __init__(self, target: str | None) -> None:
        self.target = target
        self._file: Any = None

    def __enter__(self) -> Self:
        if self.target and self.target != "-":
            try:
                self._file = open(self.target, "a", encoding="utf-8")
            except OSError as error:
                raise output_error(Path(self.target), error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file:
            self._file.close()

    def event(self, name: str, **values: Any) -> None:
        """One line."""
        if not self.target:
            return
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = json.dumps({"time_utc": stamp, "event": name, **values}, ensure_ascii=False)
        if self._file:
            self._file.write(line + "\n")
            self._file.flush()
        else:
            click.echo(line, err=True)


def describe(outcome: SlideOutcome) -> str:
    """An outcome in a few words."""
    if outcome.status == "failed":
        where = f" in {outcome.stage}" if outcome.stage else ""
        return f"failed{where}: {outcome.reason}" + (f"; {outcome.remedy}" if outcome.remedy else "")
    tiles = ", ".join(f"{count:,} tiles at {label}" for label, count in outcome.tiles.items())
    what = f"empty: {outcome.reason}" if outcome.status == "empty" else tiles or "done"
    return f"{what} ({sum(outcome.seconds.values()):.1f} s{', nothing to do' if outcome.nothing_new else ''})"


def print_json(value: Any) -> None:
    """JSON on standard output."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(columns: Mapping[str, str], rows: Iterable[Sequence[str]]) -> None:
    """A table on standard output; ``columns``: heading -> "left" or "right"."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", show_header=any(name.strip() for name in columns))
    for heading, justify in columns.items():
        table.add_column(heading, justify="right" if justify == "right" else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    # A file or a pipe has no width of its own: do not fold what another program may read.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def print_notes(outcomes: Iterable[SlideOutcome]) -> None:
    """What is to be said of slides, after an empty line; nothing where there is nothing."""
    rows = [[outcome.slide_id, note] for outcome in outcomes for note in outcome.notes]
    if rows:
        click.echo()
        print_table({"slide": "left", "note": "left"}, rows[:MOST_NOTES])
    if len(rows) > MOST_NOTES:
        click.echo(f"and {len(rows) - MOST_NOTES:,} notes more: see outcomes.jsonl and the report")


def print_outcomes(outcomes: Sequence[SlideOutcome], seconds: float) -> None:
    """The closing table of a run: totals, then failures with their remedies."""
    tiles: dict[str, int] = {}
    stages: dict[str, float] = {}
    for outcome in outcomes:
        for label, count in outcome.tiles.items():
            tiles[label] = tiles.get(label, 0) + count
        for stage, spent in outcome.seconds.items():
            stages[stage] = stages.get(stage, 0.0) + spent
    ends = {status: sum(o.status == status for o in outcomes) for status in ("done", "empty", "failed")}
    rows = [["slides", ", ".join(f"{n} {status}" for status, n in ends.items())]]
    rows += [[f"tiles at {label}", f"{n:,}"] for label, n in tiles.items()]
    by_stage = ", ".join(f"{stage} {value:.1f}" for stage, value in stages.items())
    rows.append(["seconds", f"{seconds:.1f} in all; by stage, overlapped: {by_stage}"])
    print_table({"": "left", " ": "left"}, rows)
    print_notes(outcomes)
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    if failed:
        click.echo()
        print_table(
            {"failed slide": "left", "stage": "left", "cause": "left", "remedy": "left"},
            ([o.slide_id, o.stage or "", o.reason or "", o.remedy or ""] for o in failed[:SHOWN_FAILURES]),
        )
        if len(failed) > SHOWN_FAILURES:
            click.echo(f"and {len(failed) - SHOWN_FAILURES:,} more: see failures.csv, and report.html for their causes")
