"""``report.html`` of a job: figures, failures and remedies, slides and their pictures, outliers, timings, settings."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from wsi_pipe import __version__
from wsi_pipe.config import JobSettings, to_mapping, told_of
from wsi_pipe.files import output_error, write_text_atomically
from wsi_pipe.job.left_out import read_passed_over
from wsi_pipe.job.ownership import refuse_foreign_reports
from wsi_pipe.job.paths import JobPaths
from wsi_pipe.outcome import SlideOutcome
from wsi_pipe.pages import asset, data_uri, render_page
from wsi_pipe.report.focus import HEADER, focus_rows, focus_text
from wsi_pipe.report.summary import (
    OUTLIER_RULE,
    cause_of,
    histogram_bars,
    labels_of,
    mpp_text,
    outlier_flags,
    random_places,
    slides_csv,
    stage_seconds,
    summarise,
)
from wsi_pipe.slides.passed_over import PassedOver

__all__ = ["EMBED_SLIDES", "Picture", "Section", "report_data", "write_report"]

EMBED_SLIDES = 24
"""Jobs of up to so many slides carry their pictures in the page; larger ones load them from the folder beside it."""

LISTED_SLIDES = 20_000
"""The page lists no more; all are in ``report.csv``."""

LISTED_OF_A_CAUSE, LISTED_CAUSES = 200, 100
"""Failures of one cause that the page lists, and causes: a share that is not mounted fails a whole archive."""

EMBED_BYTES = 24 << 20
"""Upper limit to what pictures may add to the page; what does not fit is loaded from the folder."""

KINDS = (("tissue", ".jpg"), ("grid", ".grid.jpg"))


@dataclass(frozen=True)
class Picture:
    """A picture file (PNG or JPEG) to embed, and its caption."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Section:
    """Something that a job adds to its page, such as the classifier that the demo trains.

    paragraphs: plain text. header, rows: a table, if any; numbers are aligned to the right.
    """

    title: str
    paragraphs: Sequence[str] = ()
    header: Sequence[str] = ()
    rows: Sequence[Sequence[object]] = ()
    pictures: Sequence[Picture] = ()


def write_report(
    job_dir: Path,
    outcomes: Iterable[SlideOutcome],
    settings: JobSettings,
    *,
    title: str | None = None,
    sections: Sequence[Section] = (),
    embed_slides: int = EMBED_SLIDES,
) -> Path:
    """Write ``report.html`` into a job directory and return its path; ``report.csv`` and ``report.json`` beside it.

    outcomes: the last one of each slide. The CSV has a row for each slide (``slides_csv``), the JSON the job's figures
    (``summarise``). Pictures are ``thumbnails/<slide_id>.jpg`` (tissue contours) and
    ``.grid.jpg`` (grids), as far as they are there; they are embedded for up to ``embed_slides`` slides.
    Raises OutputError when the page cannot be written or a picture of a section cannot be read.
    """
    listed = list(outcomes)
    passed_over = read_passed_over(job_dir)
    if passed_over:
        sections = [*sections, _passed_over_section(passed_over)]
    data = report_data(job_dir, listed, settings, title=title, embed_slides=embed_slides)
    package = "wsi_pipe.report"
    rows, in_all = focus_rows(listed)
    if rows:
        sections = (*sections, Section("Focus and folds", [focus_text(len(rows), in_all)], HEADER, rows))
    extra = "".join(_section_html(section, number) for number, section in enumerate(sections))
    links = "".join(f'<a href="#extra-{i}">{html.escape(s.title)}</a>' for i, s in enumerate(sections))
    body = asset(package, "report.html").replace("<!-- sections -->", extra).replace("<!-- links -->", links)
    page = render_page(
        title=f"{data['title']} · wsi-pipe",
        body=body,
        data=data,
        styles=[asset(package, "report.css")],
        scripts=[asset(package, "slides.js"), asset(package, "viewer.js"), asset(package, "report.js")],
    )
    path = JobPaths(job_dir).report
    refuse_foreign_reports(JobPaths(job_dir))
    write_text_atomically(path, page)
    write_text_atomically(path.with_suffix(".csv"), slides_csv(listed))
    figures = {"schema": "wsi-pipe report", "schema_version": 1, "created_utc": data["created_utc"], **data["summary"]}
    figures["passed_over"] = passed_over.to_json()
    write_text_atomically(path.with_suffix(".json"), json.dumps(figures, indent=1, allow_nan=False) + "\n")
    return path


def _passed_over_section(passed_over: PassedOver) -> Section:
    return Section(
        "Passed over",
        ["Files in the folders given that look like slides and are not among the slides of this job."],
        ("what", "files", "the first of them"),
        [(kind, count, ", ".join(names)) for kind, count, names in passed_over],
    )


def report_data(
    job_dir: Path,
    outcomes: Sequence[SlideOutcome],
    settings: JobSettings,
    *,
    title: str | None = None,
    embed_slides: int = EMBED_SLIDES,
) -> dict[str, Any]:
    """What the page shows, JSON-able: ``summary`` (see ``summarise``), ``slides`` by column, ``stages``, ``settings``.

    ``slides`` holds lists of equal length: id, status, path, mpp (with who states it), notes, tiles (a list by
    level), tissue_mm2, seconds, stage, reason, remedy, flags, pictures (bit 1: contours, bit 2: grids, are in the
    folder). Of many failures of one cause, and of very many slides, only the first are among them; ``left_out`` counts
    the others.
    """
    labels = labels_of(outcomes)
    everybody, outcomes = outcomes, _listed(outcomes)
    flags = outlier_flags(outcomes, labels[-1] if labels else None)
    there = _pictures_there(job_dir)
    tissue = [_figure(o.counts.get("tissue_mm2")) for o in outcomes]
    tiles = [[int(o.tiles.get(label, 0)) for label in labels] for o in outcomes]
    slides = {
        "id": [o.slide_id for o in outcomes],
        "status": [o.status for o in outcomes],
        "path": [o.path for o in outcomes],
        "mpp": [f"{mpp_text(o)} ({o.mpp_source})" if o.mpp else "" for o in outcomes],
        "notes": [[*o.notes, *(f"{place} of random weights" for place in random_places(o))] for o in outcomes],
        "tiles": tiles,
        "tissue_mm2": tissue,
        "seconds": [_figure(math.fsum(stage_seconds(o).values())) for o in outcomes],
        "stage": [o.stage for o in outcomes],
        "reason": [o.reason for o in outcomes],
        "remedy": [o.remedy for o in outcomes],
        "flags": flags,
        "pictures": [
            sum(1 << bit for bit, (_, end) in enumerate(KINDS) if o.slide_id + end in there) for o in outcomes
        ],
    }
    done = [i for i, o in enumerate(outcomes) if o.status == "done"]
    finest = len(labels) - 1
    return {
        "schema": "wsi-pipe report",
        "schema_version": 1,
        "wsi_pipe_version": __version__,
        "title": title or job_dir.resolve().name or "job",
        "created_utc": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "labels": labels,
        "levels": [
            {"label": s.label, "mpp": s.mpp, "size_px": s.size_px, "size_um": s.size_um} for s in settings.tile.specs
        ],
        "summary": summarise(everybody),
        "left_out": len(everybody) - len(outcomes),
        "slides": slides,
        "tiles_histogram": histogram_bars(
            [float(tiles[i][finest]) if labels else 0.0 for i in done],
            [any(f.endswith("tiles") for f in flags[i]) for i in done],
        ),
        "tissue_histogram": histogram_bars(
            [float(tissue[i] or 0.0) for i in done], [any(f.endswith("tissue") for f in flags[i]) for i in done]
        ),
        "outlier_rule": OUTLIER_RULE,
        "causes": _causes(everybody),
        "stages": _stage_rows(everybody),
        "settings": settings_rows(settings),
        "embedded": _embedded(job_dir, outcomes, there) if len(outcomes) <= embed_slides else {},
    }


def _figure(value: float | None) -> float | None:
    """A finite number to 6 significant figures, or None: what JSON can hold."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None


def _pictures_there(job_dir: Path) -> set[str]:
    folder = job_dir / "thumbnails"
    # One listing: ten thousand slides on a network drive should not cost twenty thousand look-ups.
    return {p.name for p in folder.iterdir()} if folder.is_dir() else set()


def _embedded(job_dir: Path, outcomes: Sequence[SlideOutcome], there: set[str]) -> dict[str, dict[str, str]]:
    """Data URIs by slide and kind, until EMBED_BYTES are used up; the contours of all slides come first."""
    found: dict[str, dict[str, str]] = {}
    left = EMBED_BYTES
    for kind, end in KINDS:
        for outcome in outcomes:
            path = job_dir / "thumbnails" / (outcome.slide_id + end)
            if path.name not in there:
                continue
            try:
                uri = data_uri(path)
            except OSError as error:
                raise output_error(path, error) from error
            if len(uri) <= left:
                left -= len(uri)
                found.setdefault(outcome.slide_id, {})[kind] = uri
    return found


def _listed(outcomes: Sequence[SlideOutcome]) -> Sequence[SlideOutcome]:
    """What the page lists: of the failures of one cause the first, and in all no more than it can show."""
    counts: dict[tuple[str, str, str], int] = {}
    found: list[SlideOutcome] = []
    for outcome in outcomes:
        if outcome.status == "failed":
            cause = cause_of(outcome)
            counts[cause] = counts.get(cause, 0) + 1
            if counts[cause] > LISTED_OF_A_CAUSE:
                continue
        if len(found) == LISTED_SLIDES:
            break
        found.append(outcome)
    return found


def _causes(outcomes: Sequence[SlideOutcome]) -> list[dict[str, Any]]:
    """Failures counted by cause, the most frequent first, each with one slide's reason and remedy."""
    first: dict[tuple[str, str, str], SlideOutcome] = {}
    counts: dict[tuple[str, str, str], int] = {}
    for outcome in outcomes:
        if outcome.status == "failed":
            cause = cause_of(outcome)
            counts[cause] = counts.get(cause, 0) + 1
            first.setdefault(cause, outcome)
    ordered = sorted(first.items(), key=lambda item: -counts[item[0]])[:LISTED_CAUSES]
    return [
        {
            "stage": cause[0],
            "error": cause[1],
            "slides": counts[cause],
            "example": of.slide_id,
            "reason": of.reason or "",
            "remedy": of.remedy or "",
        }
        for cause, of in ordered
    ]


def _stage_rows(outcomes: Sequence[SlideOutcome]) -> list[dict[str, Any]]:
    """Seconds of each stage over the slides that ran it; slides for which it was there already do not count."""
    rows = []
    for stage in summarise(outcomes)["seconds"]:
        runs = [(float(o.seconds[stage]), o.slide_id) for o in outcomes if stage in o.seconds and stage not in o.cached]
        if runs:
            values = [value for value, _ in runs]
            slowest = max(runs)
            rows.append(
                {
                    "stage": stage,
                    "slides": len(runs),
                    "total_s": math.fsum(values),
                    "median_s": statistics.median(values),
                    "max_s": slowest[0],
                    "slowest": slowest[1],
                }
            )
    return rows


def settings_rows(settings: JobSettings) -> list[dict[str, Any]]:
    """Every setting: group, name, value and default as text, and what it does where the settings class says so."""
    rows = []
    default = JobSettings()
    for group in dataclasses.fields(settings):
        value, usual = getattr(settings, group.name), getattr(default, group.name)
        if not dataclasses.is_dataclass(value):
            rows.append(_setting("general", group.name, value, usual, told_of(group)))
            continue
        for item in dataclasses.fields(value):
            own, other = getattr(value, item.name), getattr(usual, item.name)
            rows.append(_setting(group.name, item.name, own, other, told_of(item)))
    return rows


def _setting(group: str, name: str, value: object, default: object, text: str) -> dict[str, Any]:
    return {
        "group": group,
        "name": name,
        "value": _shown(value),
        "default": _shown(default),
        "changed": value != default,
        "help": text,
    }


def _shown(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (tuple, list)):
        return ", ".join(_shown(v) for v in value) or "–"
    if isinstance(value, str):
        return value
    if dataclasses.is_dataclass(value):
        return json.dumps(to_mapping(value))
    if hasattr(value, "items"):
        return "; ".join(_shown(v) if k == "*" else f"{k}: {_shown(v)}" for k, v in value.items()) or "–"
    return str(value)


def _section_html(section: Section, number: int) -> str:
    parts = [f'<section id="extra-{number}"><h2>{html.escape(section.title)}</h2>']
    parts += [f"<p>{html.escape(text)}</p>" for text in section.paragraphs]
    if section.rows:
        head = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in section.header)
        rows = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in section.rows)
        parts.append(f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>')
    if section.pictures:
        parts.append('<div class="figures">')
        for picture in section.pictures:
            try:
                uri = data_uri(picture.path)
            except OSError as error:
                raise output_error(picture.path, error) from error
            caption = html.escape(picture.caption)
            parts.append(f'<figure><img src="{uri}" alt="{caption}"><figcaption>{caption}</figcaption></figure>')
        parts.append("</div>")
    parts.append("</section>")
    return "".join(parts)


def _cell(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"<td>{html.escape(str(value))}</td>"
    text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return f'<td class="num">{text}</td>'
