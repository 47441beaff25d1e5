"""Cells of a label table as numbers, levels and yes or no."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lrmil.tables import whole_number
from lrmil.targets.base import Columns
from wsi_pipe.ids import same_name
from wsi_pipe.tables import number

__all__ = ["column_of", "levels_of", "natural", "numbers_of", "yes_or_no"]

YES = frozenset({"1", "true", "yes", "y", "positive", "pos", "+", "present", "mutated", "mut", "high", "dead",
                 "deceased", "died", "death", "event", "progressed", "recurred", "relapsed"})  # fmt: skip
NO = frozenset({"0", "false", "no", "n", "negative", "neg", "-", "absent", "wildtype", "wt", "low", "alive", "living",
                "censored", "none", "disease free", "diseasefree"})  # fmt: skip
CODED = re.compile(r"^([01])\s*:")
"""cBioPortal writes ``1:DECEASED``."""


def natural(name: str) -> tuple[int, float, str]:
    """Numbers by value, before all other names by letter."""
    try:
        value = float(name)
    except ValueError:
        return (1, 0.0, name)
    return (0, value, name) if math.isfinite(value) else (1, 0.0, name)


def column_of(columns: Columns, wanted: str, *others: str) -> str:
    """The column ``wanted``, or the first of ``others`` that is there. Raises LabelError, naming all columns."""
    for name in (wanted, *others):
        found = columns.find(name)
        if found is not None:
            return found
    names = " or ".join(repr(name) for name in dict.fromkeys((wanted, *others)))
    raise columns.error(f"no column {names}", f"its columns are {', '.join(columns.names())}")


def numbers_of(columns: Columns, column: str) -> NDArray[np.float64]:
    """A column as numbers (bags,), NaN where missing. Raises LabelError, naming the cell, for what is no number."""
    found = np.full(len(cells := columns.cells(column)), np.nan)
    for place, cell in enumerate(cells):
        if cell is None:
            continue
        try:
            found[place] = number(cell)
        except ValueError as error:
            raise columns.error(f"column {column}: {cell!r} is no number", "write a number, or nothing") from error
        if not math.isfinite(found[place]):
            raise columns.error(f"column {column}: {cell!r} is not finite", "write a number, or nothing")
    return found


def yes_or_no(columns: Columns, column: str, what: str) -> NDArray[np.float64]:
    """A column as 1 and 0 (bags,), NaN where missing. what: it tells, for the message. Raises LabelError."""
    found = np.full(len(cells := columns.cells(column)), np.nan)
    for place, cell in enumerate(cells):
        if cell is None:
            continue
        coded = CODED.match(cell)
        text = coded[1] if coded else whole_number(cell).casefold()
        if text not in YES | NO:
            raise columns.error(
                f"column {column}: {cell!r} does not say {what}", "write 1 or 0, or map it: --map OLD=1"
            )
        found[place] = float(text in YES)
    return found


def levels_of(
    name: str, options: Mapping[str, str], columns: Columns, levels: Sequence[str] = ()
) -> tuple[tuple[str, ...], NDArray[np.float64]]:
    """A column's levels in order, and each bag's place among them (bags,), NaN where missing.

    levels: as a trained model has them. Without, the order is that of the option ``order`` (``low<mid<high``), else
    numbers by value and names by letter. Raises LabelError for a level that the order lacks, or fewer than two levels.
    """
    column = column_of(columns, options.get("column", name))
    cells = columns.cells(column)
    plain = [None if cell is None else same_name(cell) for cell in cells]
    short = {value: whole_number(value) for value in plain if value is not None}
    if all(value.lstrip("+-").isdecimal() for value in short.values()):
        plain = [None if value is None else short[value] for value in plain]
    there = {value for value in plain if value is not None}
    if not levels and "order" in options:
        levels = [same_name(level) for level in options["order"].split("<")]
    strange = sorted(there - set(levels)) if levels else []
    if strange:
        raise columns.error(
            f"column {column}: {strange[0]!r} is not one of {', '.join(levels)}",
            "name it in order=, or map it: --map OLD=NEW",
        )
    levels = levels or sorted(there, key=natural)
    if len(levels) < 2:
        raise columns.error(f"column {column}: all values are {next(iter(levels), 'missing')!r}", "two are needed")
    place = {level: float(k) for k, level in enumerate(levels)}
    return tuple(levels), np.array([np.nan if value is None else place[value] for value in plain])
