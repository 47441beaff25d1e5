"""Tables of users, as spreadsheets and scripts write them, read by one rule; and tables for users, safe to open.

A table is a CSV with comma, semicolon or tab, in UTF-8, UTF-16 or Windows-1252, or an Excel workbook. Rows are numbered
as a spreadsheet shows them: the header is row 1, blank rows count.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import io
import itertools
import re
import unicodedata
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from wsi_pipe.errors import ManifestError, WsiPipeError

__all__ = [
    "MISSING",
    "TABLE_SUFFIXES",
    "Table",
    "csv_text",
    "folded",
    "inert",
    "is_missing",
    "number",
    "read_table",
    "unknown_columns",
    "written_cell",
]

TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".xlsx", ".xlsm", ".xls")

MISSING = frozenset({"", "na", "nan", "-nan", "n/a", "#n/a", "#na", "<na>", "null"})
"""What stands for a missing value, in any case. "none" does not: it is a grade in many a label table."""

SEPARATORS = (",", ";", "\t")
SNIFFED_CHARACTERS, SNIFFED_ROWS = 1 << 16, 30


@dataclass(frozen=True)
class Table:
    """A table as it was read.

    columns: names as the file writes them. rows: (row number in a spreadsheet, one cell a column); cells are stripped
    and without the apostrophe that makes them inert; rows without any cell are left out.
    separator: "" for a workbook. notes: what was assumed, one line each.
    """

    path: Path
    columns: tuple[str, ...]
    rows: list[tuple[int, list[str]]]
    separator: str = ","
    notes: tuple[str, ...] = ()
    error: type[WsiPipeError] = ManifestError

    def find(self, *names: str) -> int | None:
        """Place of the first of ``names`` that is a column, whatever its case, spaces and underscores; None without.

        Raises the table's error when a column of that name stands twice.
        """
        own = [folded(column) for column in self.columns]
        for name in map(folded, names):
            places = [place for place, column in enumerate(own) if column == name]
            if len(places) > 1:
                raise self.error(
                    f"{self.path}: column {self.columns[places[0]]!r} stands twice", remedy="delete one of them"
                )
            if places:
                return places[0]
        return None

    def where(self, row: int) -> str:
        """The file and a row of it, for messages."""
        return f"{self.path}, row {row}"


def folded(name: str) -> str:
    """A column's name as names are compared: letters and digits alone, in lower case ("Slide ID" is "slide_id")."""
    return "".join(c for c in unicodedata.normalize("NFKC", name).casefold() if c.isalnum())


def is_missing(cell: str) -> bool:
    """Whether a cell says that there is no value: empty, NA, NaN, N/A, null, in any case."""
    return cell.strip().casefold() in MISSING


def number(cell: str, separator: str = ",") -> float:
    """A cell as a number, with a decimal point or a decimal comma.

    separator: of the table; where it is a semicolon, a comma is a decimal comma. Raises ValueError when the cell is no
    number, also for "10,000", which may be ten or ten thousand.
    """
    text = cell.strip()
    if "," in text:
        if "." in text or text.count(",") > 1 or "_" in text:
            raise ValueError(f"{cell!r} is not a number")
        if separator != ";" and re.fullmatch(r"[+-]?[1-9]\d{0,2},\d{3}", text):
            raise ValueError(f"{cell!r} may be {text.replace(',', '.')} or {text.replace(',', '')}")
        text = text.replace(",", ".")
    if "_" in text:
        raise ValueError(f"{cell!r} is not a number")
    return float(text)


def unknown_columns(
    table: Table, known: Mapping[str, Collection[str]], used: Collection[int]
) -> tuple[list[str], list[tuple[str, str]]]:
    """Columns that nobody reads: notes on them, and those that are most likely a known name mistyped.

    known: name -> its other names. used: places of the columns that are read. A mistyped name is a pair (as written,
    as meant): one letter lacking, too many, exchanged or another, two in names of eight letters and more.
    """
    spelled = {folded(other): name for name, others in known.items() for other in (name, *others)}
    notes, typos, plain = [], [], []
    for place, column in enumerate(table.columns):
        own = folded(column)
        if place in used or (not own and not column):
            continue
        meant = next((name for spelt, name in spelled.items() if _is_typo(own, spelt)), None)
        if meant is not None and own not in spelled:
            typos.append((column, meant))
            continue
        words = [folded(word) for word in re.split(r"[\W_]+", column) if word]
        hint = next((name for name in known if len(words) > 1 and folded(name) in words), None)
        if hint is None and own not in spelled:
            near = difflib.get_close_matches(own, list(spelled), n=1, cutoff=0.75)
            hint = spelled[near[0]] if near else None
        if hint is not None:
            notes.append(f"{table.path}: column {column!r} is not read; did you mean {hint!r}?")
        else:
            plain.append(column)
    if plain:
        notes.append(f"{table.path}: not read, unknown: column{'s'[: len(plain) > 1]} {', '.join(plain)}")
    return notes, typos


def _is_typo(name: str, meant: str) -> bool:
    if len(meant) < 3 or name == meant or abs(len(name) - len(meant)) > 2:
        return False
    if len(meant) == 4:
        # "task" is no mask, and "base" no case.
        return sorted(name) == sorted(meant)
    return _edits(name, meant) <= (2 if len(meant) >= 8 else 1)


def _edits(a: str, b: str) -> int:
    """Letters inserted, deleted, changed or swapped with the next to make ``b`` of ``a`` (optimal string alignment)."""
    before: list[int] = []
    last = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            cost = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        before, last = last, row
    return last[-1]


def read_table(
    path: str | Path, what: str, error: type[WsiPipeError] = ManifestError, *, known: Collection[str] = ()
) -> Table:
    """Read a table of a user's.

    what: names the table in messages. known: column names that are looked for, by which the separator is told. Raises
    ``error`` when the file cannot be read, is empty or no table, or a row has more or fewer cells than the header.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as caught:
        raise error(f"{path}: {caught.strerror or caught}", remedy=f"give the {what} as a CSV file") from caught
    notes: list[str] = []
    if raw.startswith(b"PK\x03\x04"):
        separator, records = "", _workbook(path, raw, what, error, notes)
    elif raw.startswith(b"\xd0\xcf\x11\xe0"):
        raise error(f"{path}: is a workbook of old Excel (.xls)", remedy="save it as .xlsx or as CSV")
    else:
        text, separator = _text(path, raw, what, error, notes), ""
        stated = re.match(r"sep=(.)\r?\n", text)
        if stated:
            # Excel reads this line and does not show it.
            text, separator = text[stated.end() :], stated[1]
        separator = separator or _separator(text, frozenset(map(folded, known)))
        records = _records(path, text, separator, error)
    return _table(path, what, separator, records, error, notes)


def _text(path: Path, raw: bytes, what: str, error: type[WsiPipeError], notes: list[str]) -> str:
    """The file's text, whatever its encoding."""
    remedy = f"give a CSV in UTF-8 as the {what}"
    wide = None
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        wide = "utf-16"
    elif len(raw) > 1 and 0 in raw[:2] and any(raw[:2]):
        wide = "utf-16-le" if raw[1] == 0 else "utf-16-be"
    try:
        text = raw.decode(wide or "utf-8-sig")
    except UnicodeDecodeError as caught:
        if wide or b"\0" in raw:
            raise error(f"{path}: is not text", remedy=remedy) from caught
        text = (
            raw.decode("cp1252", "replace") if not {0x81, 0x8D, 0x8F, 0x90, 0x9D} & set(raw) else raw.decode("latin-1")
        )
        line = next(line for line in text.splitlines() if not line.isascii())
        notes.append(f"{path}: is not UTF-8 and is read as Windows-1252: check {line.strip()[:60]!r}")
    head = text[:4096]
    if "\0" in text or (wide and not re.search(r"[A-Za-z0-9]", head)):
        raise error(f"{path}: is not text", remedy=remedy)
    return text


def _lines(text: str, separator: str) -> Iterator[list[str]]:
    return csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)


def _separator(text: str, known: frozenset[str]) -> str:
    """The separator under which the header has most known names, most rows its length, and most columns."""
    head = text[:SNIFFED_CHARACTERS]

    def fit(separator: str) -> tuple[int, float, int]:
        try:
            rows = [row for row in itertools.islice(_lines(head, separator), SNIFFED_ROWS) if any(row)]
        except csv.Error:
            return (0, 0.0, 0)
        if not rows or len(rows[0]) < 2:
            return (sum(folded(name) in known for name in rows[0]) if rows else 0, 0.0, 1)
        header = rows[0]
        even = sum(len(row) == len(header) for row in rows) / len(rows)
        return (sum(folded(name) in known for name in header), even, len(header))

    return max(SEPARATORS, key=fit)


def _records(path: Path, text: str, separator: str, error: type[WsiPipeError]) -> Iterator[tuple[int, list[str]]]:
    count = 0
    try:
        # A cell may hold line breaks, so records are counted, not lines: as a spreadsheet numbers them.
        for count, cells in enumerate(_lines(text, separator), 1):
            yield count, list(map(_cell, cells))
    except csv.Error as caught:
        raise error(f"{path}, row {count + 1}: {caught}", remedy="give a CSV in UTF-8") from caught


def _cell(cell: str) -> str:
    return written_cell(cell.strip()) if cell else cell


def _workbook(
    path: Path, raw: bytes, what: str, error: type[WsiPipeError], notes: list[str]
) -> Iterator[tuple[int, list[str]]]:
    try:
        import openpyxl
    except ImportError as caught:
        raise error(
            f"{path}: is an Excel workbook, and openpyxl is not installed",
            remedy="pip install 'wsi-pipe[excel]', or save it as CSV",
        ) from caught
    try:
        book = openpyxl.load_workbook(io.BytesIO(raw), read_only=True, data_only=True)
        sheets = [sheet for sheet in book.worksheets if sheet.sheet_state == "visible"]
        if len(sheets) > 1:
            notes.append(f"{path}: of {len(sheets)} sheets the first, {sheets[0].title!r}, is read")
        if not sheets:
            raise error(f"{path}: has no sheet", remedy=f"put the {what} on the first sheet")
        sheets[0].reset_dimensions()
        for count, cells in enumerate(sheets[0].iter_rows(values_only=True), 1):
            yield count, [_cell(_shown(value)) for value in cells]
    except (
        KeyError,
        ValueError,
        TypeError,
        IndexError,
        AttributeError,
        SyntaxError,
        OSError,
        zipfile.BadZipFile,
    ) as caught:
        if isinstance(caught, WsiPipeError):
            raise
        raise error(f"{path}: is no Excel workbook that can be read ({caught})", remedy="save it as CSV") from caught


def _shown(value: object) -> str:
    """A workbook's value as its cell shows it: Excel keeps the number 7 as 7.0."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
    return str(value)


def _table(
    path: Path,
    what: str,
    separator: str,
    records: Iterator[tuple[int, list[str]]],
    error: type[WsiPipeError],
    notes: list[str],
) -> Table:
    filled = ((row, cells) for row, cells in records if any(cells))
    first, header = next(filled, (0, []))
    if not header:
        raise error(f"{path} is empty", remedy=f"the {what} needs a header row")
    header = [name.strip("\ufeff").strip() for name in header]
    width = len(header)
    while not header[-1]:
        header.pop()
    named, rows = len(header), []
    for row, cells in filled:
        if len(cells) != named:
            # A spreadsheet adds separators at the end of a row, and a workbook leaves them out.
            if len(cells) > named and not any(cells[named:]):
                del cells[named:]
            elif len(cells) < named and (not separator or named - len(cells) <= width - named):
                cells += [""] * (named - len(cells))
            else:
                raise _ragged(path, row, cells, header, separator, error)
        rows.append((row, cells))
    if unnamed := [place for place, name in enumerate(header, 1) if not name]:
        notes.append(f"{path}: column {unnamed[0]} has no name and is not read")
    if first > 1:
        notes.append(f"{path}: the header is taken from row {first}, the first that is not blank")
    return Table(path, tuple(header), rows, separator, tuple(notes), error)


def _ragged(
    path: Path, row: int, cells: Sequence[str], header: Sequence[str], separator: str, error: type[WsiPipeError]
) -> WsiPipeError:
    many = len(cells) > len(header)
    remedy = "put a cell that holds a comma in quotes, and write numbers with a point" if separator == "," else None
    return error(
        f"{path}, row {row}: has {'more' if many else 'fewer'} cells than there are columns ({len(cells)} values under "
        f"{len(header)} columns)",
        remedy=(remedy if many else None) or "give the row a cell for each column",
    )


LIVE = frozenset("=+-@\t\r\n＝＋－＠")
"""What a spreadsheet takes for the beginning of a formula (OWASP, CSV injection)."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def inert(value: object) -> object:
    """A value as a cell that a spreadsheet shows and does not run: with an apostrophe in front of what it might.

    Numbers stay numbers. ``read_table`` takes the apostrophe away again (``written_cell`` does for one cell).
    """
    if not isinstance(value, str) or not value:
        return value
    if value[0] == "'":
        return f"'{value}" if len(value) > 1 and (value[1] in LIVE or value[1] == "'") else value
    return f"'{value}" if value[0] in LIVE and not _NUMBER.fullmatch(value) else value


def written_cell(cell: str) -> str:
    """The value that ``inert`` made ``cell`` of."""
    return cell[1:] if len(cell) > 1 and cell[0] == "'" and (cell[1] in LIVE or cell[1] == "'") else cell


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A CSV for people, as text: comma, one line a row, cells inert."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([inert(name) for name in header])
    writer.writerows([inert(value) for value in row] for row in rows)
    return out.getvalue()
