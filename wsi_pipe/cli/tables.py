"""Tables on standard output that break no word: who looks for an id, or copies a path, finds it whole."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence

import click

__all__ = ["paragraph", "print_table", "width_of_output"]

GAP = 2
LEAST = 16
"""Columns that a text needs to be read beside others."""


def width_of_output() -> int | None:
    """Columns of the terminal; None where standard output is none: nothing is folded that a program may read."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def print_table(columns: Mapping[str, str], rows: Iterable[Sequence[str]], *, width: int | None = None) -> None:
    """A table on standard output; ``columns``: heading -> "left" or "right".

    width: columns to keep to, by default those of the terminal. What does not fit beside its neighbours without a word
    being broken is written as a block a row, its first cell on a line of its own.
    """
    width = width_of_output() if width is None else width
    cells = [[str(cell) for cell in row] for row in rows]
    headings = list(columns)
    show_heading = any(name.strip() for name in headings)
    wide = [max((_len(row[i]) for row in cells), default=0) for i in range(len(headings))]
    if show_heading:
        wide = [max(size, _len(name)) for size, name in zip(wide, headings, strict=True)]
    if width is not None and sum(wide) + GAP * (len(wide) - 1) > width:
        longest = [max((_longest(row[i]) for row in cells), default=0) for i in range(len(headings))]
        longest = [max(size, _longest(name)) for size, name in zip(longest, headings, strict=True)]
        fitted = _fitted(wide, longest, width - GAP * (len(wide) - 1))
        if fitted is None:
            _print_blocks(headings, cells, width)
            return
        wide = fitted
    right = [columns[name] == "right" for name in headings]
    if show_heading:
        for line in _lines(headings, wide, right):
            click.echo(click.style(line, bold=True))
    for row in cells:
        for line in _lines(row, wide, right):
            click.echo(line)


def paragraph(text: str, *, first: str = "", indent: str = "", width: int | None = None) -> str:
    """Text folded between words to ``width`` columns (those of the terminal), not at all where there is none."""
    width = width_of_output() if width is None else width
    if width is None:
        return first + text
    return textwrap.fill(
        text,
        max(width, LEAST + len(indent)),
        initial_indent=first,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _fitted(wide: Sequence[int], longest: Sequence[int], room: int) -> list[int] | None:
    """Columns narrowed to ``room``, none below its longest word; None where that cannot be."""
    least = [min(size, max(word, LEAST)) if size > LEAST else size for size, word in zip(wide, longest, strict=True)]
    if sum(least) > room:
        return None
    spare = room - sum(least)
    found = list(least)
    # What is short gets what it wants before what is long is stretched.
    for i in sorted(range(len(wide)), key=lambda i: wide[i] - least[i]):
        more = min(wide[i] - least[i], spare)
        found[i] += more
        spare -= more
    return found


def _lines(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> list[str]:
    """The lines of one row."""
    folded = [
        textwrap.wrap(cell, width or 1, break_long_words=False, break_on_hyphens=False)
        if _len(cell) > width
        else [cell]
        for cell, width in zip(cells, widths, strict=True)
    ]
    found = []
    for n in range(max(map(len, folded))):
        parts = [lines[n] if n < len(lines) else "" for lines in folded]
        padded = [
            " " * (width - _len(part)) + part if to_right else part + " " * (width - _len(part))
            for part, width, to_right in zip(parts, widths, right, strict=True)
        ]
        found.append((" " * GAP).join(padded).rstrip())
    return found


def _print_blocks(headings: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> None:
    name_width = max(map(_len, headings[1:]), default=0)
    for row in rows:
        click.echo(click.style(row[0], bold=True))
        for heading, cell in zip(headings[1:], row[1:], strict=True):
            if cell:
                lead = f"  {heading}{' ' * (name_width - _len(heading))}  "
                click.echo(paragraph(cell, first=lead, indent=" " * _len(lead), width=width))


def _longest(text: str) -> int:
    return max(map(_len, text.split()), default=0)


def _len(text: str) -> int:
    """Columns that a text takes on a terminal."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)
