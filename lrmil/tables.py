"""Small CSV tables of users: labels and splits."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from lrmil.errors import LrmilError

__all__ = ["CASE_COLUMNS", "SLIDE_COLUMNS", "find_column", "read_table"]

SLIDE_COLUMNS = ("slide_id", "slide", "image_id", "filename")
CASE_COLUMNS = ("case_id", "case", "patient_id", "patient")


def read_table(
    path: str | Path, what: str, error: type[LrmilError]
) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Column names and rows (line number, values stripped) of a CSV with comma, semicolon or tab.

    what: names the table in messages. Raises ``error`` when it is unreadable, empty, or a row is too long or short.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as caught:
        cause = getattr(caught, "strerror", None) or "is not UTF-8 text"
        raise error(f"{path}: {cause}", remedy=f"give the {what} as a CSV file") from caught
    first = text.partition("\n")[0]
    reader = csv.reader(text.splitlines(), delimiter=max(",;\t", key=first.count))
    header = [name.strip() for name in next(reader, [])]
    if not any(header):
        raise error(f"{path} is empty", remedy=f"the {what} needs a header row")
    rows = []
    for values in reader:
        if not any(value.strip() for value in values):
            continue
        if len(values) != len(header):
            raise error(f"{path}, line {reader.line_num}: {len(values)} values under {len(header)} columns")
        rows.append((reader.line_num, {k: v.strip() for k, v in zip(header, values, strict=True)}))
    return header, rows


def find_column(header: Sequence[str], known: Sequence[str]) -> str | None:
    """The first of ``known`` that is a column, whatever its case."""
    lower = {name.lower(): name for name in reversed(header)}
    return next((lower[name] for name in known if name in lower), None)
