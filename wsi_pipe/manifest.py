"""Which slides a job holds: files, folders, URLs or a CSV, each with an id of its own and its own settings."""

from __future__ import annotations

import dataclasses
import os
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsi_pipe.config import SegmentSettings, TileSettings, from_mapping
from wsi_pipe.errors import ConfigError, ManifestError
from wsi_pipe.files import write_text_atomically
from wsi_pipe.geometry import MPP_BOUNDS, in_mpp_bounds
from wsi_pipe.ids import clash, same_name
from wsi_pipe.masking import mask_secrets
from wsi_pipe.naming import clean_name, ids_of_the_job, is_url, name_parts, on_disk, unique_names, without_repeats
from wsi_pipe.tables import TABLE_SUFFIXES, Table, csv_text, is_missing, number, read_table, unknown_columns
from wsi_pipe.tissue.frame import FRAMES

if TYPE_CHECKING:
    from wsi_pipe.slides.passed_over import PassedOver

__all__ = [
    "SETTING_COLUMNS",
    "SlideEntry",
    "collect_slides",
    "is_url",
    "manifest_text",
    "merged_entry",
    "read_manifest",
    "settings_of",
    "write_manifest",
]

BASE_COLUMNS = ("slide", "slide_id", "case_id", "mpp", "mask")
PICTURE_COLUMNS = ("scene", "z")
REGION_COLUMNS = ("annotations", "tissue_class", "frame")
"""What is drawn on a slide, which classes of it are its tissue (several with semicolons), and from where its
coordinates count."""
FALLBACK_COLUMN = "mpp_if_missing"
CLEARED = "-"
"""A cell that takes back what the job holds of a slide; an empty one leaves it."""

OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "slide": ("wsi", "file", "path", "filename", "image", "slide_path", "wsi_path", "file_path", "image_path"),
    "slide_id": ("image_id", "slide_name"),
    "case_id": ("case", "patient_id", "patient", "p_id", "case_submitter_id", "bcr_patient_barcode"),
}
"""What other tools call the columns of a slide list."""

TILE_COLUMNS = ("min_tissue", "judge_um", "mpp_tolerance", "allow_upsampling")
"""Tile settings that may differ between slides; resolutions and tile size are the job's, so that bags compare."""


def _setting_columns() -> dict[str, tuple[str, str]]:
    columns = {}
    for item in dataclasses.fields(SegmentSettings):
        # "mpp" is the slide's own resolution in a slide list, so the mask's goes by another name.
        columns["mask_mpp" if item.name == "mpp" else item.name] = ("segment", item.name)
    for name in TILE_COLUMNS:
        columns[name] = ("tile", name)
    return columns


SETTING_COLUMNS: Mapping[str, tuple[str, str]] = _setting_columns()
"""Column of a slide list -> (stage, setting) that it overrides for one slide."""


@dataclass(frozen=True)
class SlideEntry:
    """One slide of a job.

    slide_id: unique in the job, names its files. path: file or URL. case_id: the patient. mpp: (x, y) um/px given by
    the user, or None. mask: GeoJSON that replaces the tissue mask, or None. overrides: column -> value, for settings
    of this slide alone. scene, z: which scan of the file and which focal plane, from 0, or None. annotations: GeoJSON
    whose classes become labels of tiles, or None. tissue_class: classes of it, or of the mask, that are the tissue; any
    where empty. frame: from where the coordinates of both count where the files do not say, "image" or "qupath", or
    None. mpp_if_missing: (x, y) um/px that serves where neither the user nor the file states one, or None. stated:
    columns of which the list or an option says something, also that a value is taken back; it is no part of what the
    slide is, and tells ``merged_entry`` what is to change. hides: in an anonymised job, what must not get into what it
    writes; see ``job.private``.
    """

    slide_id: str
    path: str
    case_id: str
    mpp: tuple[float, float] | None = None
    mask: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    scene: int | None = None
    z: int | None = None
    annotations: str | None = None
    tissue_class: tuple[str, ...] = ()
    frame: str | None = None
    mpp_if_missing: tuple[float, float] | None = None
    hides: tuple[str, ...] = ()
    stated: frozenset[str] = field(default=frozenset(), compare=False, repr=False)

    @property
    def shown_path(self) -> str:
        """The path as it may be stored and shown: a URL without its secrets, nothing in an anonymised job."""
        return "" if self.hides else mask_secrets(self.path) if is_url(self.path) else self.path

    def stating(self, **values: Any) -> SlideEntry:
        """The entry with these values, stated."""
        return dataclasses.replace(self, **values, stated=self.stated | values.keys())


def merged_entry(held: SlideEntry, given: SlideEntry) -> SlideEntry:
    """What a job holds of a slide, with what a call states of it now: where it says nothing, all stays as it is.

    The path is the given one: slides move. So is what an anonymised job hides of it.
    """
    changes: dict[str, Any] = {"path": given.path, "hides": given.hides or held.hides}
    for item in dataclasses.fields(SlideEntry):
        if item.name in given.stated and item.name not in ("slide_id", "path", "overrides", "stated", "hides"):
            changes[item.name] = getattr(given, item.name)
    kept = {column: value for column, value in held.overrides.items() if column not in given.stated}
    return dataclasses.replace(held, **changes, overrides=kept | dict(given.overrides), stated=given.stated)


def settings_of(
    entry: SlideEntry, segment: SegmentSettings, tile: TileSettings
) -> tuple[SegmentSettings, TileSettings]:
    """A job's settings with one slide's overrides. Raises ConfigError when a value is refused."""
    changes: dict[str, dict[str, Any]] = {"segment": {}, "tile": {}}
    for column, value in entry.overrides.items():
        stage, name = SETTING_COLUMNS[column]
        changes[stage][name] = value
    return (
        dataclasses.replace(segment, **changes["segment"]) if changes["segment"] else segment,
        dataclasses.replace(tile, **changes["tile"]) if changes["tile"] else tile,
    )


def collect_slides(
    sources: Sequence[str],
    manifest: Path | None = None,
    *,
    job: Iterable[SlideEntry] = (),
    passed_over: PassedOver | None = None,
    notes: list[str] | None = None,
) -> list[SlideEntry]:
    """The slides of a command line: files, folders (searched through), URLs and CSV files, and a ``--slides`` CSV.

    Local paths become absolute. Ids come from file names; two slides of one name get their folders' names in front.
    job: slides of earlier runs, which keep their ids and everything that this call does not state otherwise; a slide
    elsewhere takes such an id only where the other is gone (it was moved). passed_over: takes in what folders hold that
    looks like a slide and is not listed. notes: gets what was assumed of CSV files, and files that were
    named twice. Raises ManifestError when nothing is found, a source does not exist, or ids in a CSV repeat.
    """
    from wsi_pipe.slides.discover import find_slide_files, is_slide_folder
    from wsi_pipe.slides.passed_over import PassedOver

    passed = PassedOver() if passed_over is None else passed_over
    listed: list[SlideEntry] = read_manifest(manifest, notes=notes) if manifest else []
    found: list[str] = []
    for source in sources:
        if is_url(source):
            found.append(source)
            continue
        source = on_disk(source)
        path = Path(source)
        if path.suffix.lower() in TABLE_SUFFIXES and path.is_file():
            listed += read_manifest(path, notes=notes)
        elif is_slide_folder(path):
            found.append(source)
        elif path.is_dir() and path.suffix.lower() not in (".svs", ".ndpi", ".mrxs", ".scn"):
            if not os.access(path, os.R_OK | os.X_OK):
                raise ManifestError(f"{path}: permission denied", remedy="ask for read permission on the folder")
            inside = [str(p) for p in find_slide_files(path, passed)]
            if not inside:
                cause = "; ".join(["no slides in this folder", *passed.lines()])
                raise ManifestError(f"{path}: {cause}", remedy="give slide files, or another folder")
            found += inside
        elif path.exists() or path.is_symlink():
            found.append(source)
        else:
            raise ManifestError(f"{source}: no such file or folder", remedy="check the path")
    unique, repeats = without_repeats(list(dict.fromkeys(_absolute(path) for path in found)))
    if notes is not None:
        notes += [f"{path} is the same file as {first}: one slide" for path, first in repeats]
    _refuse_undecodable(unique)
    held = list(job)
    listed = _under_the_jobs_ids(listed, held)
    entries = listed + _named(unique, {entry.slide_id for entry in listed}, held)
    if not entries:
        raise ManifestError("no slides are given", remedy="name slide files, folders or a CSV")
    _refuse_repeats(entries, "the slides given")
    by_id = {entry.slide_id: entry for entry in held}
    return [merged_entry(by_id[e.slide_id], e) if e.slide_id in by_id else e for e in entries]


def _under_the_jobs_ids(listed: Sequence[SlideEntry], job: Sequence[SlideEntry]) -> list[SlideEntry]:
    """Rows that state no id under the id that the job has for their file, where it has one."""
    taken = {entry.slide_id for entry in listed if "slide_id" in entry.stated}
    unnamed = [entry.path for entry in listed if "slide_id" not in entry.stated]
    ids = ids_of_the_job(unnamed, taken, job)
    found = []
    for entry in listed:
        own = ids.get(entry.path) if "slide_id" not in entry.stated else None
        if own is not None and own != entry.slide_id:
            case = entry.case_id if "case_id" in entry.stated else own
            entry = dataclasses.replace(entry, slide_id=own, case_id=case)
        found.append(entry)
    return found


def _refuse_undecodable(paths: Iterable[str]) -> None:
    for path in paths:
        if any("\ud800" <= character <= "\udfff" for character in path):
            shown = path.encode("utf-8", "backslashreplace").decode()
            raise ManifestError(f"{shown}: its name is not UTF-8", remedy="rename it (convmv -f latin1 -t utf8)")


def _named(paths: Sequence[str], taken: set[str], job: Sequence[SlideEntry]) -> list[SlideEntry]:
    """Entries of files that state no id: the job's own where it has the file, else one by its name."""
    kept = ids_of_the_job(paths, taken, job)
    by_id = {slide_id: path for path, slide_id in kept.items()}
    new = [path for path in paths if path not in kept]
    wished = {part[-1].casefold() for part in map(name_parts, new)}
    others = {
        entry.slide_id
        for entry in job
        if entry.slide_id in by_id
        or (entry.slide_id.casefold() in wished and (is_url(entry.path) or os.path.exists(entry.path)))
    }
    names = kept | dict(zip(new, unique_names(new, taken | others), strict=True))
    # Several scans of one file are several slides: who names the file names them all.
    more: dict[str, list[str]] = {}
    for entry in job:
        if entry.slide_id not in taken and names.get(entry.path) not in (None, entry.slide_id):
            more.setdefault(entry.path, []).append(entry.slide_id)
    own = [(path, slide_id) for path in paths for slide_id in (names[path], *more.get(path, ()))]
    return [SlideEntry(slide_id=slide_id, path=path, case_id=slide_id) for path, slide_id in own]


def _refuse_repeats(entries: Iterable[SlideEntry], where: str, rows: Sequence[int] = ()) -> None:
    seen: dict[str, int] = {}
    entries = list(entries)
    for place, entry in enumerate(entries):
        # Some file systems do not tell case apart, nor composed accents from decomposed ones.
        key = same_name(entry.slide_id).casefold()
        if key in seen:
            first = seen[key]
            at = f", rows {rows[first]} and {rows[place]}" if rows else ""
            raise ManifestError(
                f"{where}{at}: two slides have the id {entry.slide_id!r}: {entries[first].path} and {entry.path}",
                remedy="give each its own id in a column slide_id of a CSV (--slides)",
            )
        seen[key] = place


def read_manifest(path: Path, *, own: bool = False, notes: list[str] | None = None) -> list[SlideEntry]:
    """Slides from a table with the columns ``slide, slide_id, case_id, mpp, mask, scene, z`` (all but the first
    optional) and one column for each setting that differs between slides (``SETTING_COLUMNS``).

    Paths are taken from the table's own folder. An ``mpp`` cell is one number, or two as ``0.25x0.26``. A cell ``-``
    says that there is no such value, which takes back what a job holds; an empty one says nothing. Other columns
    are ignored, and that is told in ``notes``. own: the list that a job keeps, whose ids stay what they are. Raises
    ManifestError naming column or row and the remedy, also for a column whose name is all but that of a known one.
    """
    known = {
        name: OTHER_NAMES.get(name, ())
        for name in (*BASE_COLUMNS, *PICTURE_COLUMNS, *REGION_COLUMNS, FALLBACK_COLUMN, *SETTING_COLUMNS)
    }
    table = read_table(path, "slide list", known=[n for name, others in known.items() for n in (name, *others)])
    places = _places(table, known)
    said = _check_columns(table, known, places, own)
    if notes is not None:
        notes += [*table.notes, *said]
    base, names = os.path.abspath(path.parent), list(places)
    entries, numbers = [], []
    for row, cells in table.rows:
        values = {name: cells[places[name]] for name in names}
        entries.append(_entry(path, row, values, base, table.separator, own))
        numbers.append(row)
    # A job of a shard may hold none.
    if not entries and not own:
        raise ManifestError(f"{path}: lists no slides")
    unnamed = [i for i, entry in enumerate(entries) if not entry.slide_id]
    named = {entry.slide_id for entry in entries if entry.slide_id}
    for i, name in zip(unnamed, unique_names([entries[i].path for i in unnamed], named), strict=True):
        # As dataclasses.replace does, in a tenth of its time: lists hold a hundred thousand slides.
        object.__setattr__(entries[i], "slide_id", name)
        object.__setattr__(entries[i], "case_id", entries[i].case_id or name)
    _refuse_repeats(entries, str(path), numbers)
    if not own:
        _refuse_one_under_two_names(entries, path, numbers)
    return entries


def _places(table: Table, known: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Place of each known column in the table. Raises ManifestError when two could be the same one."""
    places: dict[str, int] = {}
    for name, others in known.items():
        place = table.find(name)
        if place is None:
            found = [other for other in map(table.find, others) if other is not None]
            if len(found) > 1:
                both = " and ".join(repr(table.columns[i]) for i in found[:2])
                raise ManifestError(
                    f"{table.path}: the columns {both} may both be {name!r}", remedy=f"name the right one {name!r}"
                )
            place = found[0] if found else None
        if place is not None:
            places[name] = place
    return places


def _check_columns(table: Table, known: Mapping[str, Sequence[str]], places: Mapping[str, int], own: bool) -> list[str]:
    """Notes on columns that are not read. Raises ManifestError for a missing or a mistyped one."""
    notes, typos = unknown_columns(table, known, set(places.values()))
    notes += [f"{table.path}: column {written!r} is not read" for written, meant in typos if meant in places]
    typos = [] if own else [(written, meant) for written, meant in typos if meant not in places]
    if typos:
        written, meant = typos[0]
        raise ManifestError(
            f"{table.path}: unknown column {written!r}: did you mean {meant!r}?",
            remedy=f"name it {meant!r}, or something else if it is a column of your own",
        )
    if "slide" not in places:
        raise ManifestError(
            f"{table.path}: has no column 'slide', but {', '.join(map(repr, table.columns[:12]))}",
            remedy=f"give a CSV in UTF-8 whose first row names columns among {', '.join(known)}",
        )
    return notes


def _refuse_one_under_two_names(entries: Sequence[SlideEntry], path: Path, rows: Sequence[int]) -> None:
    """Raise ManifestError where one id is another with a file's suffix: labels could not tell them apart."""
    both = clash(entry.slide_id for entry in entries)
    if both is not None:
        one, other = (rows[[e.slide_id for e in entries].index(name)] for name in both)
        raise ManifestError(
            f"{path}: rows {one} and {other}: the ids {both[0]!r} and {both[1]!r} are one slide: suffixes do not count",
            remedy="give each its own id in the column slide_id",
        )


_STATED: dict[frozenset[str], frozenset[str]] = {}


def _entry(
    manifest: Path, line: int, row: Mapping[str, str], base: str, separator: str = ",", own: bool = False
) -> SlideEntry:
    where = f"{manifest}, row {line}"
    cells = {name: "" if not own and value != CLEARED and is_missing(value) else value for name, value in row.items()}
    stated = frozenset(name for name, cell in cells.items() if cell)
    # A list of a hundred thousand slides states the same few columns over and over.
    stated = _STATED.setdefault(stated, stated)
    cells = {
        name: "" if cell == CLEARED and name not in ("slide", "slide_id") else cell for name, cell in cells.items()
    }
    if not cells["slide"]:
        raise ManifestError(
            f"{where}: the cell 'slide' is empty", remedy="write the slide's path or URL, or delete the row"
        )
    slide_id = cells.get("slide_id", "")
    if slide_id and slide_id != clean_name(slide_id):
        raise ManifestError(
            f"{where}: the id {slide_id!r} cannot be a file name", remedy=f"use for example {clean_name(slide_id)!r}"
        )
    overrides = {
        column: _setting(where, column, cell, separator)
        for column, cell in cells.items()
        if cell and column in SETTING_COLUMNS
    }
    mask, annotations = cells.get("mask") or None, cells.get("annotations") or None
    frame = cells.get("frame", "").lower() or None
    if frame not in (None, *FRAMES):
        raise ManifestError(f"{where}: the frame {frame!r} is unknown", remedy=f"write {' or '.join(FRAMES)}")
    return SlideEntry(
        slide_id=slide_id,
        path=_beside(base, cells["slide"]),
        case_id=cells.get("case_id", "") or slide_id,
        mpp=_mpp(where, cells.get("mpp", ""), separator),
        mask=_beside(base, mask) if mask else None,
        overrides=overrides,
        scene=_from_zero(where, "scene", cells.get("scene", "")),
        z=_from_zero(where, "z", cells.get("z", "")),
        annotations=_beside(base, annotations) if annotations else None,
        tissue_class=split_classes(cells.get("tissue_class", "")),
        frame=frame,
        mpp_if_missing=_mpp(where, cells.get(FALLBACK_COLUMN, ""), separator),
        stated=stated,
    )


def split_classes(text: str) -> tuple[str, ...]:
    """The classes of a cell, "Tumour; Stroma"."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(";") if part.strip()))


def _beside(base: str, cell: str) -> str:
    return cell if is_url(cell) else on_disk(os.path.join(base, cell))


def _mpp(where: str, cell: str, separator: str = ",") -> tuple[float, float] | None:
    if not cell:
        return None
    try:
        values = [number(part, separator) for part in cell.lower().split("x")]
    except ValueError:
        values = []
    if len(values) not in (1, 2) or not in_mpp_bounds(values[0], values[-1]):
        bounds = f"{MPP_BOUNDS[0]:g} to {MPP_BOUNDS[1]:g} um/px"
        cause = f"is outside {bounds}" if len(values) in (1, 2) else "is not a resolution"
        raise ManifestError(
            f"{where}: mpp {cell!r} {cause}",
            remedy="write um/px as one number such as 0.2527, or 0.25x0.26",
        )
    return (values[0], values[-1])


def _from_zero(where: str, column: str, cell: str) -> int | None:
    if not cell:
        return None
    # Tables with gaps come out of pandas and spreadsheets as 2.0.
    whole = re.sub(r"[.,]0+$", "", cell)
    if not (whole.isascii() and whole.isdigit() and len(whole) < 9):
        raise ManifestError(
            f"{where}: {cell!r} is not a number of a scan or focal plane (column {column!r})", remedy="count from 0"
        )
    return int(whole)


_WIDEST = {"stain_min": {"stain_seed": 1e9}, "stain_seed": {"stain_min": 0.0}}
"""Setting -> what leaves it free, where settings bound each other."""


def _setting(where: str, column: str, cell: str, separator: str = ",") -> Any:
    """A cell as a value of its setting's type, checked by the settings class itself."""
    stage, name = SETTING_COLUMNS[column]
    cls: type[Any] = SegmentSettings if stage == "segment" else TileSettings
    hint = typing.get_type_hints(cls)[name]
    value: Any = cell
    try:
        if hint is bool:
            value = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[cell.lower()]
        elif hint is int:
            whole = number(cell, separator)
            value = int(whole) if whole.is_integer() else int(cell)
        elif hint is not str:
            value = number(cell, separator)
        # Each cell by itself: how two of them go together is seen with the job's settings, when the slide's turn comes.
        return getattr(from_mapping(cls, _WIDEST.get(name, {}) | {name: value}, where), name)
    except (KeyError, ValueError) as error:
        reason = error.message if isinstance(error, ConfigError) else f"{where}: {cell!r} is not a {hint.__name__}"
        raise ManifestError(f"{reason} (column {column!r})") from error


def write_manifest(path: Path, entries: Iterable[SlideEntry]) -> None:
    """Write a CSV that ``read_manifest`` reads back to equal entries; local paths become absolute."""
    write_text_atomically(path, manifest_text(list(entries)))


def manifest_text(entries: Sequence[SlideEntry], more: Mapping[str, Sequence[str]] | None = None) -> str:
    """The CSV that ``write_manifest`` writes; ``more``: further columns, a cell for each entry."""
    used = [column for column in SETTING_COLUMNS if any(column in entry.overrides for entry in entries)]
    # Few files hold more than one picture: lists of others look as they always did.
    pictures = [name for name in PICTURE_COLUMNS if any(getattr(entry, name) is not None for entry in entries)]
    regions = {
        "annotations": [_absolute(entry.annotations) if entry.annotations else "" for entry in entries],
        "tissue_class": ["; ".join(entry.tissue_class) for entry in entries],
        "frame": [entry.frame or "" for entry in entries],
    }
    drawn = [column for column in REGION_COLUMNS if any(regions[column])]
    fallback = [FALLBACK_COLUMN] if any(entry.mpp_if_missing for entry in entries) else []
    columns, rows = list((more or {}).values()), []
    for place, entry in enumerate(entries):
        mask = _absolute(entry.mask) if entry.mask else ""
        row = [_absolute(entry.path), entry.slide_id, entry.case_id, _mpp_cell(entry.mpp), mask]
        row += ["" if getattr(entry, name) is None else str(getattr(entry, name)) for name in pictures]
        row += [regions[column][place] for column in drawn]
        row += [_mpp_cell(entry.mpp_if_missing) for _ in fallback]
        rows.append(row + [str(entry.overrides.get(column, "")) for column in used] + [c[place] for c in columns])
    return csv_text([*BASE_COLUMNS, *pictures, *drawn, *fallback, *used, *(more or {})], rows)


def _mpp_cell(mpp: tuple[float, float] | None) -> str:
    return "" if mpp is None else f"{mpp[0]!r}x{mpp[1]!r}"


def _absolute(path: str) -> str:
    return path if is_url(path) else str(Path(path).absolute())
