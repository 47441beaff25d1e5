"""The tables of a classifier, labels and splits: their columns; how tables are read is ``wsi_pipe.tables``'s."""

from __future__ import annotations

from pathlib import Path

from lrmil.errors import LrmilError
from wsi_pipe.tables import Table, read_table

__all__ = ["CASE_COLUMNS", "SLIDE_COLUMNS", "read", "whole_number"]

SLIDE_COLUMNS = ("slide_id", "slide", "wsi", "image_id", "slide_name", "filename", "file", "path", "image")
CASE_COLUMNS = ("case_id", "case", "patient_id", "patient")


def read(path: str | Path, what: str, error: type[LrmilError], *more: str) -> Table:
    """A table with slide or case ids; ``more``: other columns that are looked for. Raises ``error``."""
    return read_table(path, what, error, known=(*SLIDE_COLUMNS, *CASE_COLUMNS, *more))


def whole_number(text: str) -> str:
    """``1`` for ``1.0``, which pandas makes of a whole number where others of its column are missing."""
    head, point, tail = text.replace(",", ".").partition(".")
    return head if point and head.lstrip("+-").isdecimal() and tail.strip("0") == "" else text
