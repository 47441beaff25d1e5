"""Tables as spreadsheets, scripts and other tools write them, and ids by one rule."""

from __future__ import annotations

import csv
import io
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from wsi_pipe.errors import ManifestError
from wsi_pipe.ids import Ids, clash, id_of, joined, table_ids
from wsi_pipe.manifest import SlideEntry, collect_slides, read_manifest, write_manifest
from wsi_pipe.tables import csv_text, inert, is_missing, number, read_table, written_cell

COLUMNS = ("slide", "wsi", "mpp", "case_id")


def write(folder: Path, content: str | bytes, name: str = "t.csv") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows(path: Path) -> list[list[str]]:
    return [cells for _, cells in read_table(path, "table", known=COLUMNS).rows]


TABLE = [["Kidney ä, 3.svs", "0.25"], ["b.svs", ""], ["c;d.svs", "1"]]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_separators_encodings_and_line_ends(tmp_path: Path, separator: str, encoding: str, ending: str) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=separator, lineterminator=ending).writerows([["slide", "mpp"], *TABLE])
    table = read_table(write(tmp_path, text.getvalue().encode(encoding)), "table", known=COLUMNS)
    assert table.columns == ("slide", "mpp")
    assert [cells for _, cells in table.rows] == TABLE
    assert table.separator == separator
    assert [("Windows-1252" in note) for note in table.notes] == ([True] if encoding == "cp1252" else [])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("slide\na.svs\nb.svs\n", [["a.svs"], ["b.svs"]]),
        ("slide\n\"a, b;c.svs\"\n", [["a, b;c.svs"]]),
        ("slide,mpp,,\na,1,,\n,,,\n\nb,2,,\n,,,\n", [["a", "1"], ["b", "2"]]),
        ("sep=;\nslide;mpp\na;0,5\n", [["a", "0,5"]]),
        ("\n\nslide,mpp\na,1\n", [["a", "1"]]),
        ("slide,case_id\n\"two\nlines\",x\n", [["two\nlines", "x"]]),
        ("slide;case, kind; mpp\na;x, y;1\n", [["a", "x, y", "1"]]),
        ("  slide  , mpp \n a.svs , 1 \n", [["a.svs", "1"]]),
        ("'=slide,mpp\n'=1+1,'@x\n", [["=1+1", "@x"]]),
    ],
)  # fmt: skip
def test_what_is_in_the_rows(tmp_path: Path, text: str, expected: list[list[str]]) -> None:
    assert rows(write(tmp_path, text)) == expected


def test_rows_have_the_numbers_of_a_spreadsheet(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, 'sep=,\nslide,mpp\na,1\n\n"b\nc",2\n,\nd,3\n'), "table", known=COLUMNS)
    assert [row for row, _ in table.rows] == [2, 4, 6]
    with pytest.raises(ManifestError, match=r"t.csv, row 5: has more cells than there are columns \(3 values under 2"):
        read_table(write(tmp_path, 'slide,mpp\n\n"a\nb",1\n\nc,0,5\n'), "table", known=COLUMNS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; the table needs a header row"),
        (b",,\n\n", "is empty"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is not text; give a CSV in UTF-8"),
        (b"PK\x03\x04 no workbook", "is no Excel workbook that can be read"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "old Excel .*save it as .xlsx or as CSV"),
        (b"slide,mpp,MPP\na,1,2\n", "column 'mpp' stands twice"),
    ],
)
def test_what_is_no_table_says_why(tmp_path: Path, content: bytes, message: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ManifestError, match=message):
        read_table(path, "table", known=COLUMNS).find("mpp")


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"none.csv: No such file or directory; give the table as a CSV"):
        read_table(tmp_path / "none.csv", "table")


def test_a_workbook_is_read_as_it_shows_its_cells(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    sheet = book.active
    for row in (["Slide", "MPP", "Case ID"], ["a.svs", 0.25, 7], [None, None, None], ["b.svs", None, "#N/A"]):
        sheet.append(row)
    sheet["B6"] = 0.5
    sheet["A6"] = "c.svs"
    book.create_sheet("notes")
    book.save(tmp_path / "list.xlsx")
    notes: list[str] = []
    found = read_manifest(tmp_path / "list.xlsx", notes=notes)
    assert [(e.slide_id, e.mpp, e.case_id) for e in found] == [
        ("a", (0.25, 0.25), "7"),
        ("b", None, "b"),
        ("c", (0.5, 0.5), "c"),
    ]
    assert notes == [f"{tmp_path / 'list.xlsx'}: of 2 sheets the first, 'Sheet', is read"]
    assert [e.slide_id for e in collect_slides([str(tmp_path / "list.xlsx")])] == ["a", "b", "c"]
    sheet["B6"] = "half"
    book.save(tmp_path / "list.xlsx")
    with pytest.raises(ManifestError, match="row 6: mpp 'half'"):
        read_manifest(tmp_path / "list.xlsx")


def test_a_workbook_without_openpyxl_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(ManifestError, match=r"openpyxl is not installed; pip install 'wsi-pipe\[excel\]'"):
        read_table(write(tmp_path, b"PK\x03\x04", "t.xlsx"), "table")


@pytest.mark.parametrize(
    ("cell", "separator", "value"),
    [("0.25", ",", 0.25), ("0,25", ",", 0.25), ("0,253", ",", 0.253), ("10,5", ",", 10.5), ("1,024", ";", 1.024),
     ("1e3", ",", 1000.0), ("1,024", ",", None), ("10,000", "\t", None), ("1,2,3", ",", None), ("1.000,5", ",", None),
     ("1_0", ",", None), ("", ",", None)],
)  # fmt: skip
def test_numbers_with_a_point_or_a_comma(cell: str, separator: str, value: float | None) -> None:
    if value is None:
        with pytest.raises(ValueError, match=r"not a number|may be|could not convert"):
            number(cell, separator)
    else:
        assert number(cell, separator) == value


def test_missing_is_written_in_many_ways_and_none_is_a_grade() -> None:
    assert all(map(is_missing, ["", " ", "NA", "n/a", "NaN", "nan", "NULL", "#N/A", "<NA>"]))
    assert not any(map(is_missing, ["none", "None", "0", "-", "na1", "neg"]))


def test_columns_that_nobody_knows_are_told_and_a_typo_is_refused(tmp_path: Path) -> None:
    notes: list[str] = []
    text = "slide,label,Stage,mpp (um),,task\na.svs,tumour,II,0.5,x,1\n"
    (entry,) = read_manifest(write(tmp_path, text), notes=notes)
    assert entry.mpp is None
    assert [note.partition("t.csv: ")[2] for note in notes] == [
        "column 5 has no name and is not read",
        "column 'mpp (um)' is not read; did you mean 'mpp'?",
        "column 'task' is not read; did you mean 'mask'?",
        "not read, unknown: columns label, Stage",
    ]
    for typo, meant in {"mp": "mpp", "mmp": "mpp", "mppp": "mpp", "mpp_x": "mpp", "msak": "mask", "slide id ": None,
                        "min_tisue": "min_tissue", "slide_idd": "slide_id", "casid": "case_id"}.items():  # fmt: skip
        path = write(tmp_path, f"slide,{typo}\na.svs,0.5\n")
        if meant is None:
            assert read_manifest(path)[0].slide_id == "0.5"
            continue
        with pytest.raises(ManifestError, match=f"unknown column '{typo}': did you mean '{meant}'"):
            read_manifest(path)


def test_names_of_other_tools_and_values_of_other_places(tmp_path: Path) -> None:
    path = write(tmp_path, "Filename;Patient ID;MPP;min tissue\na.svs;p1;0,5;0,3\nb.svs;NA;n/a;null\n")
    first, second = read_manifest(path)
    assert (first.slide_id, first.case_id, first.mpp, first.overrides) == ("a", "p1", (0.5, 0.5), {"min_tissue": 0.3})
    assert (second.slide_id, second.case_id, second.mpp, second.overrides) == ("b", "b", None, {})


def test_a_file_is_found_whatever_the_form_of_its_accents(tmp_path: Path) -> None:
    name = "Zürich/Präparat é.svs"
    on_disk = tmp_path / unicodedata.normalize("NFD", name)
    on_disk.parent.mkdir()
    on_disk.write_bytes(b"x")
    listed = write(tmp_path, f"slide\n{unicodedata.normalize('NFC', name)}\n")
    (entry,) = read_manifest(listed)
    assert Path(entry.path).is_file()
    assert entry.path == str(on_disk)
    (named,) = collect_slides([str(tmp_path / unicodedata.normalize("NFC", name))])
    assert (named.path, named.slide_id) == (entry.path, entry.slide_id)
    both = write(
        tmp_path,
        "".join(f"{unicodedata.normalize(f, name)},x é\n" for f in ("NFC", "NFD")).join(["slide,slide_id\n", ""]),
    )
    with pytest.raises(ManifestError, match="rows 2 and 3: two slides have the id"):
        read_manifest(both)


TCGA = "TCGA-AA-0001-01Z-00-DX1.8F3A1B2C-0000-4444-9999-ABCDEF012301"


@pytest.mark.parametrize(
    ("name", "slide"),
    [("a.svs", "a"), ("a", "a"), ("A.SVS", "A"), ("a.ome.tif", "a"), ("a.OME.TIFF", "a"), ("a.svs.h5", "a"),
     ("a.b.svs", "a.b"), (TCGA, TCGA), (f"{TCGA}.svs", TCGA), ("/x/y/a.ndpi", "a"), ("C:\\x\\a.scn", "a"),
     ("a.ome.zarr", "a"), ("a.v2", "a.v2"), (".svs", ".svs"), ("a.tar.gz", "a.tar.gz"), ("u\u0308.svs", "ü")],
)  # fmt: skip
def test_one_rule_for_ids(name: str, slide: str) -> None:
    assert id_of(name) == slide
    assert Ids([slide]).match(name) == slide
    assert Ids([name]).match(slide) == (name if "/" not in name and "\\" not in name else None)


def test_what_a_name_means_among_the_ids_that_are_there() -> None:
    known = Ids(["a", "b--s", "s", "t.svs", "t.ndpi", "12", "odd.img", "Case"])
    assert known.match("b/s.svs") == "b--s"
    assert known.match("/in/b/s.svs") == "b--s"
    assert known.match("/in/c/s.svs") == "s"
    assert known.match("t.svs") == "t.svs"
    assert known.match("t") is None, "two are meant"
    assert known.match("12.0") == "12"
    assert known.match("case.svs") == "Case"
    assert known.match("") is None
    assert Ids(["odd"]).match("odd.img") == "odd"
    assert joined({"a.svs": 1, "a": 2, "x": 3}, ["a", "b"]) == {"a": 2}


def test_ids_that_are_one_slide_clash_and_files_of_one_stem_do_not() -> None:
    assert clash(["a", "b", "a.svs"]) == ("a", "a.svs")
    assert clash(["x/a.svs", "y/a.svs"]) == ("x/a.svs", "y/a.svs")
    assert clash(["a.svs", "A.svs"]) == ("a.svs", "A.svs")
    assert clash(["a.svs", "a.ndpi", "b"]) is None
    assert table_ids(["a.svs", "b.svs", "b.ndpi", "c"]) == ["a", "b.svs", "b.ndpi", "c"]


@pytest.mark.parametrize(
    "value", ["=1+1", "+x", "-x", "@SUM(A1)", "\tx", "\r=x", "＝1", "'=x", "''", "'@", "=HYPERLINK(1)"]
)
def test_cells_are_inert_and_come_back(value: str) -> None:
    cell = inert(value)
    assert isinstance(cell, str)
    assert cell.startswith("'")
    assert written_cell(cell) == value


@pytest.mark.parametrize("value", [1, -1.5, None, "", "-3", "+2.5", "-1e-3", "a=b", "'", "'abc", "x", "a@b"])
def test_numbers_and_words_stay_what_they_are(value: object) -> None:
    assert inert(value) == value


CELLS = st.text(st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n\t"), max_size=12).map(str.strip)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(CELLS, CELLS, CELLS).filter(any), min_size=1, max_size=6))
@example([("=1+1", "'=1", "-5")])
@example([("a;b;c", "d;e", ";;")])
@example([("\ufeffx", "a,b", '"')])
def test_what_is_written_is_read_back(tmp_path: Path, table: list[tuple[str, str, str]]) -> None:
    path = write(tmp_path, csv_text(["slide", "mpp", "case_id"], table))
    assert [tuple(cells) for cells in rows(path)] == table


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text("=+-@'ab.0", min_size=1, max_size=6), unique_by=str.casefold, min_size=1, max_size=5))
def test_slide_lists_of_live_ids_come_back(tmp_path: Path, names: list[str]) -> None:
    names = [name for name in names if not name.startswith(".")] or ["=a"]
    entries = [SlideEntry(name, f"/in/{name}/x.svs", f"={name}") for name in names]
    write_manifest(tmp_path / "out.csv", entries)
    assert read_manifest(tmp_path / "out.csv", own=True) == entries
    raw = list(csv.reader(io.StringIO((tmp_path / "out.csv").read_text(encoding="utf-8"), newline="")))
    assert not any(cell[:1] in ("=", "@") for row in raw for cell in row)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(max_size=200), st.text("slide,;\t\n\r\"'= mp0\0é", max_size=60).map(str.encode)))
@example(b"PK\x03\x04")
@example("slide\n".encode("utf-16-le"))
def test_any_bytes_are_a_table_or_an_error_with_the_files_name(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path, content)
    said = ""
    try:
        table = read_table(path, "table", known=COLUMNS)
    except ManifestError as error:
        said = str(error)
    else:
        assert all(len(cells) == len(table.columns) for _, cells in table.rows)
    assert not said or str(path) in said


@pytest.mark.slow
def test_a_hundred_thousand_rows_are_read_in_bounded_memory(tmp_path: Path) -> None:
    import tracemalloc

    path = write(tmp_path, "slide,mpp\n" + "".join(f"sub/{i:05d}.svs,0.25\n" for i in range(20_000)))
    tracemalloc.start()
    found = read_manifest(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (len(found), found[-1].slide_id) == (20_000, "19999")
    assert peak < 20_000 * 2000, "at most 2 kB a slide"
