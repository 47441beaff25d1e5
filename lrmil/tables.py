"""The tables of a classifier, labels and splits: their columns; how tables are read is ``wsi_pipe.tables``'s."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lrmil.errors import LrmilError
from wsi_pipe.errors import ConfigError
from wsi_pipe.tables import Table, read_table

__all__ = ["CASE_COLUMNS", "LABEL_COLUMNS", "SLIDE_COLUMNS", "parse_renames", "read", "renamed", "whole_number"]

SLIDE_COLUMNS = ("slide_id", "slide", "wsi", "image_id", "slide_name", "filename", "file", "path", "image")
# Beside plain words: STAMP's PATIENT, the P_ID of many a hospital, and what TCGA's clinical files and cBioPortal write.
CASE_COLUMNS = (
    "case_id", "case", "patient_id", "patient", "p_id", "case_submitter_id", "bcr_patient_barcode",
)  # fmt: skip
LABEL_COLUMNS = ("label", "class", "target", "subtype")


def read(path: str | Path, what: str, error: type[LrmilError], *more: str) -> Table:
    """A table with slide or case ids; ``more``: other columns that are looked for. Raises ``error``."""
    return read_table(path, what, error, known=(*SLIDE_COLUMNS, *CASE_COLUMNS, *more))


def whole_number(text: str) -> str:
    """``1`` for ``1.0``, which pandas makes of a whole number where others of its column are missing."""
    head, point, tail = text.replace(",", ".").partition(".")
    return head if point and head.lstrip("+-").isdecimal() and tail.strip("0") == "" else text


def parse_renames(texts: Sequence[str]) -> dict[str, str]:
    """What ``--map OLD=NEW`` says: values of a table and what they mean, nothing for missing. Raises ConfigError."""
    found: dict[str, str] = {}
    for text in texts:
        old, equals, new = text.partition("=")
        if not equals or not old.strip():
            raise ConfigError(f"--map {text!r} is not OLD=NEW", remedy="write, for one, --map LUAD=adenocarcinoma")
        if found.setdefault(old.strip(), new.strip()) != new.strip():
            raise ConfigError(f"--map says two things of {old.strip()!r}", remedy="keep one of them")
    return found


def renamed(cell: str, renames: Mapping[str, str]) -> str:
    """What a cell means: another value where it is mapped, as it is written or as a whole number."""
    return renames.get(cell, renames.get(whole_number(cell), cell)) if renames else cell
