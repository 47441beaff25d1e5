"""How a run shows itself: progress on standard error, the closing table on standard output."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import click

from wsi_pipe.cli import messages
from wsi_pipe.cli.progress import RunDisplay
from wsi_pipe.cli.tables import paragraph, print_table
from wsi_pipe.files import output_error
from wsi_pipe.outcome import SlideOutcome

__all__ = ["LogLines", "RunDisplay", "print_failures", "print_json", "print_notes", "print_outcomes", "print_table"]

MOST_NOTES = 50
SHOWN_CAUSES = 20
SHOWN_OF_A_CAUSE = 5


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


def print_json(value: Any) -> None:
    """JSON on standard output."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_notes(outcomes: Iterable[SlideOutcome]) -> None:
    """What is to be said of slides, after an empty line; nothing where there is nothing."""
    rows = [[outcome.slide_id, note] for outcome in outcomes for note in outcome.notes]
    if rows:
        click.echo()
        print_table({"slide": "left", "note": "left"}, rows[:MOST_NOTES])
    if len(rows) > MOST_NOTES:
        click.echo(f"and {len(rows) - MOST_NOTES:,} notes more: see outcomes.jsonl and the report")


def print_outcomes(outcomes: Sequence[SlideOutcome], seconds: float, places: Mapping[str, Path] | None = None) -> None:
    """The closing table of a run: totals and where things are, then failures by cause; with -q the failures alone.

    places: what there is to look at, and its path.
    """
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
    quiet = messages.level() < 0
    if not quiet:
        print_table({"": "left", " ": "left"}, rows)
        print_notes(outcomes)
    print_failures([outcome for outcome in outcomes if outcome.status == "failed"])
    if places and not quiet:
        click.echo()
        print_table({"": "left", " ": "left"}, [[what, str(path)] for what, path in places.items()])


def print_failures(failed: Sequence[SlideOutcome], *, verb: str = "failed", others: str = "see failures.csv") -> None:
    """Failures by their cause, the most frequent first: one slide's own words, the remedy, and whom it befell.

    others: where those are that are not named here.
    """
    from wsi_pipe.report.summary import cause_of

    causes: dict[object, list[SlideOutcome]] = {}
    for outcome in failed:
        causes.setdefault(cause_of(outcome), []).append(outcome)
    ordered = sorted(causes.values(), key=lambda group: -len(group))
    for group in ordered[:SHOWN_CAUSES]:
        first = group[0]
        where = f" in {first.stage}" if first.stage else ""
        click.echo()
        click.echo(click.style(f"{len(group):,} {'slide' if len(group) == 1 else 'slides'} {verb}{where}", fg="red"))
        click.echo(paragraph(first.reason or "", first="  cause   ", indent=" " * 10))
        if first.remedy:
            click.echo(paragraph(first.remedy, first="  remedy  ", indent=" " * 10))
        named = [outcome.slide_id for outcome in group[:SHOWN_OF_A_CAUSE]]
        more = f" and {len(group) - len(named):,} more: {others}" if len(group) > len(named) else ""
        click.echo(paragraph(f"{', '.join(named)}{more}", first="  slides  ", indent=" " * 10))
    if len(ordered) > SHOWN_CAUSES:
        rest = sum(map(len, ordered[SHOWN_CAUSES:]))
        click.echo(f"\nand {rest:,} slides {verb} for {len(ordered) - SHOWN_CAUSES:,} other causes: {others}")
