"""Measurements as words, Markdown, and one HTML page that stands by itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wsi_pipe.benchmark.analysis import (
    ArmTotals,
    Balance,
    Comparison,
    Ratio,
    archive_totals,
    arm_name,
    balance,
    comparisons,
    totals,
    warnings_of,
)
from wsi_pipe.benchmark.projection import Assumptions, assumptions_in_words, project
from wsi_pipe.benchmark.records import (
    ENCODE_STAGES,
    FIXED_STAGES,
    READ_STAGES,
    STAGES,
    TRANSFER,
    Arm,
    BenchmarkRecord,
    write_record,
)
from wsi_pipe.config import to_mapping
from wsi_pipe.files import write_text_atomically
from wsi_pipe.pages import asset, render_page

__all__ = ["STAGE_MEANING", "answers", "headline", "markdown", "stage_table", "write_outputs"]

STAGE_MEANING = {
    "open": "open the slide",
    "segment": "read the overview and find tissue",
    "plan": "lay the grid",
    "fetch": "get native tiles from the file",
    "decode": "decompress native tiles",
    "resample": "cut, average and filter into tiles",
    "handle": "plan the reading and pass tiles on",
    "read": "read tile by tile (cannot be divided)",
    "encode": "tiles to features, the copy to the device included",
    TRANSFER: "copy tiles to the device and do no more, once more by itself; held by encode and in no sum",
    "write": "write and check the bag",
}
GROUPS = (
    ("before the first tile", FIXED_STAGES),
    ("reading", READ_STAGES),
    ("encoding", ENCODE_STAGES),
    ("writing", ("write",)),
)
PART_OF = {"encode": TRANSFER}
"""What is shown below a stage as a part of it."""
RUN_STAGES_NOTE = (
    "Wall seconds of the end-to-end passes. They overlap, and hold what only a run does: `segment` and `tile` draw "
    "pictures and write mask and grids, `extract` stores features, `assemble` writes and checks the bag."
)
HEADLINE = (
    ("end to end", "end to end"),
    ("reading", "reading"),
    ("encoding", "encoding"),
    ("end to end, processor", "processor time"),
)


def figure(value: float | None, digits: int = 3) -> str:
    """A number to so many significant figures, with thousands grouped; a dash for None."""
    if value is None:
        return "–"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.1e}"


def interval(ratio: Ratio) -> str:
    """A ratio and its interval: "14.2 (13.9 to 14.6)"; just the ratio where there is no interval."""
    if ratio.low is None:
        return figure(ratio.value)
    return f"{figure(ratio.value)} ({figure(ratio.low)} to {figure(ratio.high)})"


def headline(record: BenchmarkRecord) -> list[str]:
    """The answer: what low resolution costs beside high resolution; other findings after it, a sentence each."""
    compared = comparisons(record)
    head = next((c for c in compared if c.headline), None)
    sentences = []
    if head is None:
        sentences.append("One resolution was measured, so there is nothing to set against it.")
    else:
        parts = []
        for what, words in HEADLINE:
            ratio = head.ratio(what)
            if ratio is not None and ratio.value is not None:
                bounds = f" (95 % interval 1/{figure(ratio.low)} to 1/{figure(ratio.high)})"
                parts.append(f"1/{figure(ratio.value)} {words}{bounds if ratio.low is not None else ''}")
        tiles = head.ratio("tiles")
        dear, cheap = record.arm(head.dear), record.arm(head.cheap)
        sentences += _at_once(record, dear, cheap)
        alone = "one slide at a time, " if sentences else ""
        sentences.append(
            f"{cheap.label} ({cheap.encoder}) costs, {alone}beside {dear.label} ({dear.encoder}): {', '.join(parts)}."
        )
        if tiles is not None and tiles.value is not None:
            sentences.append(f"It has 1/{figure(tiles.value)} of the tiles.")
    for other in compared:
        if other is head:
            continue
        what = "end to end" if other.ratio("end to end") else "reading"
        ratio = other.ratio(what)
        if ratio is not None and ratio.value is not None:
            sentences.append(f"{other.title[0].upper()}{other.title[1:]}: {interval(ratio)} times the seconds, {what}.")
    return sentences


def _at_once(record: BenchmarkRecord, dear: Arm, cheap: Arm) -> list[str]:
    """What an archive wants to know first: all slides in one pass; nothing where that was not measured of both arms."""
    found = archive_totals(record)
    high, low = found.get(dear.id), found.get(cheap.id)
    if high is None or low is None:
        return []
    words = (
        f"All {low.slides} slides in one pass: {cheap.label} ({cheap.encoder}) takes "
        f"1/{figure(high.wall_s / low.wall_s)} of the time of {dear.label} ({dear.encoder}), "
        f"{figure(low.slides_an_hour)} slides an hour against {figure(high.slides_an_hour)}"
    )
    if low.outside_s > 0:
        words += f", and 1/{figure(high.outside_s / low.outside_s)} of the processor time outside of the encoder"
    return [f"{words}."]


def archive_table(record: BenchmarkRecord) -> tuple[list[str], list[list[str]]]:
    """Heading and rows: every arm that took all slides in one pass."""
    rows = [
        [
            arm_name(record, t.arm),
            *(figure(v) for v in (t.wall_s, t.cpu_s, t.outside_s / t.slides, t.slides_an_hour)),
        ]
        for t in archive_totals(record).values()
    ]
    return ["all slides in one pass", "s", "CPU s", "CPU s a slide outside the encoder", "slides an hour"], rows


def stage_table(record: BenchmarkRecord) -> tuple[list[str], list[list[str]]]:
    """Heading and rows: stage, then wall and processor seconds of each arm, all slides, mean over repeats."""
    arms = totals(record)
    heading = ["stage", *(f"{arm_name(record, arm.arm)}, {unit}" for arm in arms for unit in ("s", "CPU s"))]
    rows = []
    for name, stages in GROUPS:
        present = [s for s in stages if any(s in arm.stages for arm in arms)]
        for s in present:
            rows.append([s, *(figure(v) for arm in arms for v in arm.stages.get(s, (None, None)))])
            part = PART_OF.get(s)
            if part and any(part in arm.stages for arm in arms):
                values = (v for arm in arms for v in arm.stages.get(part, (None, None)))
                rows.append([f"of which {part}", *(figure(v) for v in values)])
        if len(present) > 1:
            sums = [(arm.wall(present), arm.cpu(present)) for arm in arms]
            rows.append([f"= {name}", *(figure(v) for pair in sums for v in pair)])
    every = [(arm.wall(STAGES), arm.cpu(STAGES)) for arm in arms]
    rows.append(["= all stages, one after the other", *(figure(v) for pair in every for v in pair)])
    rows.append(
        ["end to end, overlapped", *(figure(v) for arm in arms for v in (arm.end_to_end_s, arm.end_to_end_cpu_s))]
    )
    return heading, rows


def run_stage_table(record: BenchmarkRecord) -> tuple[list[str], list[list[str]]]:
    """Heading and rows: the stages that ``wsi-pipe run`` reports, in wall seconds of the end-to-end passes."""
    arms = [arm for arm in totals(record) if arm.end_to_end_s is not None]
    stages = dict.fromkeys(s for arm in arms for s in arm.run_stages)
    rows = [[s, *(figure(arm.run_stages.get(s)) for arm in arms)] for s in stages]
    rows.append(["end to end", *(figure(arm.end_to_end_s) for arm in arms)])
    return ["stage", *(f"{arm_name(record, arm.arm)}, s" for arm in arms)], rows


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, numbers to the right."""
    clean = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [
        "| " + " | ".join(heading) + " |",
        "|" + "|".join(" --- " if i == 0 else " ---: " for i in range(len(heading))) + "|",
        *("| " + " | ".join(row) + " |" for row in clean),
    ]


def _ratio_rows(comparison: Comparison) -> list[list[str]]:
    return [
        [r.what, r.unit, figure(r.numerator), figure(r.denominator), interval(r)]
        for r in comparison.ratios
        if r.numerator or r.denominator
    ]


def markdown(record: BenchmarkRecord, assumptions: Assumptions) -> str:
    """``benchmark.md``: the answer first, then where the rest goes, then an archive, then how it was measured."""
    first, *others = headline(record)
    lines = ["# What low resolution saves", "", f"**{first}**", ""]
    lines += [f"- {sentence}" for sentence in others] + [""]
    doubts = warnings_of(record)
    if doubts:
        lines += ["Doubts:", "", *(f"- {doubt}" for doubt in doubts), ""]
    lines += [
        "## Where the time goes",
        "",
        f"Seconds for {_slides(record)}, mean of {_count(record.repeats, 'repeat')}.",
        "",
    ]
    lines += [*_table(*stage_table(record)), ""]
    lines += ["Stages: " + "; ".join(f"*{s}*: {STAGE_MEANING[s]}" for s in _stages(record)) + ".", ""]
    lines += ["### As `wsi-pipe run` reports it", "", RUN_STAGES_NOTE, ""]
    lines += [*_table(*run_stage_table(record)), ""]
    for comparison in comparisons(record):
        dear, cheap = (arm_name(record, arm) for arm in (comparison.dear, comparison.cheap))
        lines += [f"## {comparison.title[0].upper()}{comparison.title[1:]}", ""]
        lines += [*_table(["", "unit", dear, cheap, "ratio (95 % interval)"], _ratio_rows(comparison)), ""]
    if record.archive:
        lines += ["## All slides in one pass", "", *_table(*archive_table(record)), ""]
    lines += ["## An archive", ""]
    heading = ["", "hours", "GB read", "GB written", "kWh", f"cost, {assumptions.currency}"]
    rows = [
        [
            arm_name(record, p.arm),
            figure(p.hours),
            figure(p.gigabytes_read),
            figure(p.gigabytes_written),
            figure(p.kwh),
            figure(p.cost),
        ]
        for p in project(record, assumptions)
    ]
    lines += [*_table(heading, rows), "", *(f"- {word}" for word in assumptions_in_words(record, assumptions)), ""]
    lines += ["## How it was measured", "", *(f"- {fact}" for fact in _facts(record)), ""]
    lines += [*_table(["processor time of the benchmark", "s"], _balance_rows(balance(record))), ""]
    return "\n".join(lines)


def _stages(record: BenchmarkRecord) -> list[str]:
    return [s for s in (*STAGES, TRANSFER) if any(s in m.stages for m in record.measurements)]


def _count(n: int, thing: str) -> str:
    return f"{n} {thing}" + ("s" if n != 1 else "")


def _slides(record: BenchmarkRecord) -> str:
    return _count(len(record.slides), "slide")


def _balance_rows(books: Balance) -> list[list[str]]:
    rows = [[name, figure(value)] for name, value in books.parts.items()]
    rows.append(["sum", figure(books.explained_s)])
    rows.append(["the process, as the system counts it", figure(books.process_s)])
    rows.append(["not explained", f"{100 * books.unexplained:.1f} %"])
    return rows


def _facts(record: BenchmarkRecord) -> list[str]:
    machine = record.machine
    gpu = f", {machine.gpu}" if machine.gpu else ", no GPU"
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    peak = max((m.peak_memory_bytes or 0 for m in record.measurements), default=0)
    where = f"{machine.cpu}, {_count(machine.cores, 'core')}, {machine.memory_bytes / 2**30:.0f} GiB{gpu}"
    how = (
        f"{_count(record.repeats, 'repeat')}, arms taking turns, {_count(record.threads, 'reading thread')}, "
        f"{record.cache} file cache"
    )
    return [
        f"`{record.command}` on {record.created_utc}, wsi-pipe {record.wsi_pipe_version}.",
        f"{where}; {machine.system}, Python {machine.python}; {versions}.",
        f"{_slides(record)}, {how}; other programs used {100 * record.foreign_load:.0f} % of the machine.",
        "Stages are timed one after the other, with nothing else going on.",
        "Wall seconds of reading are divided by the clocks of its threads.",
        "End to end is what `wsi-pipe run` does with one slide: reading, encoding and writing overlap.",
        "Ratios are of sums over slides; intervals are of 4,000 bootstrap draws of slides, and of repeats within each.",
        _bytes_in_words(record),
        _memory_in_words(record, peak),
    ]


def _bytes_in_words(record: BenchmarkRecord) -> str:
    arms = [t for t in totals(record) if t.bytes_read]
    words = "Bytes read are those of the overview that tissue is found on and of the tiles"
    if not arms:
        return "The reader does not tell how many bytes it reads."
    if arms[0].overview_bytes_read is None:
        return "Bytes read are those of the tiles: the overview that tissue is found on was not counted."
    overview = arms[0].overview_bytes_read / arms[0].slides / 1e6
    return f"{words}; the overview's, {figure(overview)} MB a slide, are the same at every resolution."


def _memory_in_words(record: BenchmarkRecord, peak: int) -> str:
    """The process holds the encoders of all arms: what tells arms apart is by how much it grew."""
    grown = [
        f"{arm_name(record, t.arm)} {t.peak_memory_growth_bytes / 2**20:,.0f} MiB"
        for t in totals(record)
        if t.peak_memory_growth_bytes is not None
    ]
    words = f"Most memory that the process held: {peak / 2**20:,.0f} MiB"
    return f"{words}; most that a pass end to end added to what it found: {', '.join(grown)}." if grown else f"{words}."


def answers(record: BenchmarkRecord, assumptions: Assumptions) -> dict[str, Any]:
    """All that is derived from the measurements, JSON-able: what the page shows and ``--json`` prints."""
    return {
        "headline": headline(record),
        "warnings": warnings_of(record),
        "comparisons": [dataclasses.asdict(c) for c in comparisons(record)],
        "archive": [
            {**dataclasses.asdict(t), "slides_an_hour": t.slides_an_hour} for t in archive_totals(record).values()
        ],
        "totals": [_totals_json(t) for t in totals(record)],
        "projections": [dataclasses.asdict(p) for p in project(record, assumptions)],
        "assumptions": {**to_mapping(assumptions), "words": assumptions_in_words(record, assumptions)},
        "balance": {**dataclasses.asdict(balance(record)), "unexplained": balance(record).unexplained},
        "facts": _facts(record),
    }


def _totals_json(t: ArmTotals) -> Mapping[str, Any]:
    return {**dataclasses.asdict(t), "stages": {s: {"wall_s": w, "cpu_s": c} for s, (w, c) in t.stages.items()}}


def write_outputs(folder: Path, record: BenchmarkRecord, assumptions: Assumptions) -> list[Path]:
    """Write benchmark.json, .md and .html and return their paths. Raises OutputError when that is not possible."""
    package = "wsi_pipe.benchmark"
    page = render_page(
        title="What low resolution saves · wsi-pipe",
        body=asset(package, "benchmark.html"),
        data={
            "record": to_mapping(record),
            "answers": answers(record, assumptions),
            "groups": [{"name": name, "stages": list(stages)} for name, stages in GROUPS],
            "parts": PART_OF,
            "meaning": STAGE_MEANING,
            "run_stages_note": RUN_STAGES_NOTE.replace("`", ""),
        },
        styles=[asset(package, "benchmark.css")],
        scripts=[asset(package, "benchmark.js")],
    )
    paths = [folder / f"benchmark.{end}" for end in ("json", "md", "html")]
    write_record(paths[0], record)
    write_text_atomically(paths[1], markdown(record, assumptions))
    write_text_atomically(paths[2], page)
    return paths
