"""The benchmark: its file, its arithmetic, and that it counts right; nothing depends on how long anything takes."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_pipe.benchmark import Assumptions, read_record, write_record
from wsi_pipe.benchmark.analysis import balance, bootstrap_ratio, comparisons, totals, warnings_of
from wsi_pipe.benchmark.measure import _devices, arms_of, run_benchmark
from wsi_pipe.benchmark.meters import ForeignLoad, Gpu, PeakMemory, drop_cache, give_back_memory, io_read_bytes
from wsi_pipe.benchmark.passes import Passes, _divide
from wsi_pipe.benchmark.peer import best_level, read_singly
from wsi_pipe.benchmark.projection import assumptions_in_words, project
from wsi_pipe.benchmark.records import (
    END_TO_END,
    STAGED,
    ArchivePass,
    Arm,
    BenchmarkRecord,
    GpuSpent,
    Machine,
    Measurement,
    SlideFacts,
    Spent,
)
from wsi_pipe.benchmark.render import answers, figure, headline, markdown, stage_table, write_outputs
from wsi_pipe.cli import EXIT_INTERRUPTED, group, run_group
from wsi_pipe.config import JobSettings, SegmentSettings, TileSettings
from wsi_pipe.encoders import load_encoder
from wsi_pipe.errors import ConfigError, DeviceError
from wsi_pipe.geometry import TileGrid, TileSpec
from wsi_pipe.job.run import process
from wsi_pipe.manifest import SlideEntry
from wsi_pipe.outcome import SlideOutcome
from wsi_pipe.overview import read_overview
from wsi_pipe.slides import open_slide
from wsi_pipe.slides.array import ArraySlide
from wsi_pipe.slides.storage.source import FileSource
from wsi_pipe.slides.tiff.image import TiffImage
from wsi_pipe.synthetic import make_cohort
from wsi_pipe.tiles import stream_tiles
from wsi_pipe.tiling import plan_grids
from wsi_pipe.tissue import find_tissue

MACHINE = Machine("a processor", 2, 8 << 30, "Linux", "3.11.7", versions={"numpy": "2.0"})
LR = Arm("5x texture", "5x", 2.0, 256, "texture", 162, "0" * 64)
HR = Arm("20x texture", "20x", 0.5, 256, "texture", 162, "0" * 64)
PEER = dataclasses.replace(HR, id="20x openslide", method="openslide", reader="openslide")


def passes(
    arm: Arm, slide: str, repeat: int, tiles: int, scale: float, energy: float | None = None
) -> list[Measurement]:
    """A stage pass and an end-to-end pass of known seconds: 1 s fixed, 2 s to read, 4 s to encode, times ``scale``."""
    gpu = GpuSpent(energy_j=energy, utilisation=0.5, busy_s=scale) if energy is not None else None
    stages = {
        "open": Spent(0.25, 0.25), "segment": Spent(0.5, 0.75), "plan": Spent(0.25, 0.25),
        "fetch": Spent(0.5 * scale, 0.25 * scale), "decode": Spent(1.5 * scale, 3 * scale),
        "encode": Spent(4 * scale, 8 * scale), "write": Spent(0.125, 0.125),
    }  # fmt: skip
    if arm.method == "openslide":
        stages = {
            "open": Spent(0.25, 0.25),
            "read": Spent(20 * scale, 40 * scale),
            "encode": Spent(4 * scale, 8 * scale),
        }
    wall, cpu = (math.fsum(getattr(s, k) for s in stages.values()) for k in ("wall_s", "cpu_s"))
    staged = Measurement(
        slide, arm.id, repeat, 0, STAGED, wall, cpu, stages, tiles, 4 * tiles, 1000 * tiles, 324 * tiles
    )
    outcome = {"open": Spent(0.25, 0), "segment": Spent(0.5, 0), "tile": Spent(0.25, 0), "read": Spent(2 * scale, 0)}
    whole = Measurement(
        slide, arm.id, repeat, 1, END_TO_END, 1 + 4 * scale, cpu, outcome, tiles, 4 * tiles, 1000 * tiles, 324 * tiles,
        peak_memory_bytes=1 << 30, gpu=gpu,
    )  # fmt: skip
    return [staged] if arm.method == "openslide" else [staged, whole]


def record_of(
    arms: Sequence[Arm] = (LR, HR), slides: int = 2, repeats: int = 3, energy: bool = False, **changes: Any
) -> BenchmarkRecord:
    names = [f"s{i}" for i in range(slides)]
    measurements = [
        m
        for repeat in range(repeats)
        for i, name in enumerate(names)
        for arm in arms
        for m in passes(
            arm,
            name,
            repeat,
            (i + 1) * (150 if arm.label == "20x" else 10),
            (i + 1) * (1.0 if arm.label == "20x" else 0.0625),
            100.0 * (i + 1) * (1.0 if arm.label == "20x" else 0.1) if energy else None,
        )
    ]
    cpu = math.fsum(m.cpu_s for m in measurements)
    values: dict[str, Any] = {
        "created_utc": "2026-01-01T00:00:00Z",
        "wsi_pipe_version": "1",
        "command": "wsi-pipe benchmark x",
        "machine": MACHINE,
        "repeats": repeats,
        "cache": "warm",
        "threads": 2,
        "arms": tuple(arms),
        "slides": tuple(SlideFacts(n, f"/s/{n}.svs", 1, 10, 10, 0.25, "aperio", "tiff", 100.0) for n in names),
        "measurements": tuple(measurements),
        "once": {"start-up": Spent(1.0, 2.0)},
        "process": Spent(100.0, cpu + 2.0),
    }
    return BenchmarkRecord(**{**values, **changes})


# The file


texts = st.text(max_size=12)
amounts = st.floats(0, 1e9, allow_nan=False)


@settings(max_examples=40, deadline=None)
@given(
    command=texts,
    spent=st.dictionaries(texts, st.tuples(amounts, amounts), max_size=4),
    peak=st.none() | st.integers(0, 2**60),
    energy=st.none() | amounts,
    skipped=st.dictionaries(texts, texts, max_size=3),
)
def test_what_is_written_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory,
    command: str,
    spent: dict[str, tuple[float, float]],
    peak: int | None,
    energy: float | None,
    skipped: dict[str, str],
) -> None:
    stages = {name: Spent(*pair) for name, pair in spent.items()}
    m = Measurement("s0", LR.id, 0, 0, STAGED, 1.0, 1.0, stages, 1, 2, 3, 4, None, peak, GpuSpent(energy_j=energy))
    record = record_of(slides=1, repeats=1, measurements=(m,), command=command, skipped=skipped, once=stages)
    path = tmp_path_factory.mktemp("b") / "benchmark.json"
    write_record(path, record)
    assert read_record(path) == record


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("not json", "is not JSON"),
        ({"schema": "other"}, "is not a benchmark"),
        ({"schema_version": 99}, "is of version 99"),
        ({"repeats": "many"}, "repeats"),
        ({"arms": []}, "names an arm"),
        ({"process": None}, "incomplete"),
    ],
)
def test_a_bad_file_is_one_clear_error(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "benchmark.json"
    write_record(path, record_of())
    if isinstance(change, str):
        path.write_text(change)
    else:
        values = json.loads(path.read_text())
        values.update(change)
        path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    with pytest.raises(ConfigError, match=message) as caught:
        read_record(path)
    assert str(path) in str(caught.value)
    assert caught.value.remedy or "arm" in message or "repeats" in message


# Arithmetic


def test_ratios_are_of_sums_over_slides() -> None:
    (found,) = comparisons(record_of())
    assert (found.headline, found.dear, found.cheap) == (True, HR.id, LR.id)
    expected = {
        "end to end": (2 + 12) / (2 + 0.75),
        "end to end, but open, segment, tile": 12 / 0.75,
        "reading": 16.0,
        "encoding": 16.0,
        "writing": 1.0,
        "fixed: open, segment, plan": 1.0,
        "tiles": 15.0,
        "native tiles decoded": 15.0,
        "bytes read": 15.0,
    }
    for what, value in expected.items():
        ratio = found.ratio(what)
        assert ratio is not None
        assert ratio.value == pytest.approx(value), what
    assert found.ratio("energy of the GPU, end to end") is None
    (found,) = comparisons(record_of(energy=True))
    energy = found.ratio("energy of the GPU, end to end")
    assert energy is not None
    assert energy.value == pytest.approx(10.0)


def test_bootstrap_of_what_does_not_vary_is_a_point() -> None:
    cheap = np.array([[1.0, 1.0], [2.0, 2.0], [4.0, 4.0]])
    value, low, high = bootstrap_ratio(5 * cheap, cheap) or (0, 0, 0)
    assert (value, low, high) == pytest.approx((5, 5, 5))
    assert bootstrap_ratio(cheap, 0 * cheap) is None


def test_bootstrap_intervals_have_the_width_that_theory_gives() -> None:
    rng = np.random.default_rng(0)
    # One repeat; equal tile counts; ratio = mean of the numerator: the standard error is the sample's over sqrt(n).
    dear = rng.normal(10, 2, (200, 1))
    value, low, high = bootstrap_ratio(dear, np.ones((200, 1))) or (0, 0, 0)
    error = dear.std(ddof=1) / math.sqrt(200)
    assert value == pytest.approx(dear.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.08)
    # More repeats of one slide narrow the interval, which then speaks of that slide alone.
    narrow = bootstrap_ratio(rng.normal(10, 2, (1, 400)), np.ones((1, 400)))
    wide = bootstrap_ratio(rng.normal(10, 2, (1, 10)), np.ones((1, 10)))
    assert narrow is not None
    assert wide is not None
    assert narrow[2] - narrow[1] < 0.4 * (wide[2] - wide[1])


def test_a_single_pass_has_no_interval() -> None:
    record = record_of(slides=1, repeats=1)
    for ratio in comparisons(record)[0].ratios:
        assert ratio.low is None
        assert ratio.high is None
    assert "interval" not in headline(record)[0]
    assert "1/16 reading" in headline(record)[0]


def test_both_arms_get_the_same_draws() -> None:
    # Slides differ a hundredfold, the ratio does not: with the same slides in both sums the interval is a point.
    cheap = np.array([[1.0, 1.1], [100.0, 110.0]])
    value, low, high = bootstrap_ratio(3 * cheap, cheap) or (0, 0, 0)
    assert (low, high) == pytest.approx((value, value))


def test_encoders_side_by_side_and_the_peers_way_are_compared_too() -> None:
    other = dataclasses.replace(HR, id="20x vit", encoder="vit")
    found = comparisons(record_of([LR, HR, other, PEER]))
    titles = [c.title for c in found]
    assert [c.headline for c in found] == [True, False, False, False]
    assert found[0].dear == HR.id  # like against like leads
    assert "vit against texture" in titles[1]
    assert titles[2] == "encoders at 20x: texture against vit"
    reading = found[3].ratio("reading")
    assert reading is not None
    assert reading.value == pytest.approx(10.0)
    # An encoder of its own for the low resolution: the pair that would be run leads.
    lr = dataclasses.replace(LR, id="5x lr.safetensors", encoder="lr.safetensors")
    (found,) = comparisons(record_of([lr, HR]))
    assert found.headline
    assert found.title == "20x against 5x: texture against lr.safetensors"
    assert comparisons(record_of([HR])) == []


def test_totals_and_the_table_add_up() -> None:
    record = record_of([LR, HR, PEER], energy=True)
    lr, hr, peer = totals(record)
    assert hr.tiles == 450
    assert hr.bytes_written == 324 * 450
    assert hr.stages["decode"] == pytest.approx((4.5, 9.0))
    assert hr.end_to_end_s == pytest.approx(14.0)
    assert hr.energy_j == pytest.approx(300.0)
    assert peer.end_to_end_s is None
    assert lr.peak_memory_bytes == 1 << 30
    heading, rows = stage_table(record)
    by_name = {row[0]: row for row in rows}
    column = heading.index("20x, s")
    assert by_name["= reading"][column] == "6"
    assert by_name["read"][column] == "–"
    assert float(by_name["= all stages, one after the other"][column]) == pytest.approx(20.25, rel=0.01)


def test_the_copy_to_a_device_is_counted_once() -> None:
    record = record_of()
    copied = tuple(
        dataclasses.replace(m, stages={**m.stages, "transfer": Spent(3.0, 2.0)}) if m.kind == STAGED else m
        for m in record.measurements
    )
    # Encoding holds the copy; that it was made once more, for its own clock, is the benchmark's own expense.
    spent = 2.0 * sum(m.kind == STAGED for m in copied)
    with_copy = dataclasses.replace(record, measurements=copied, process=Spent(100.0, record.process.cpu_s + spent))
    assert comparisons(with_copy) == comparisons(record)
    assert project(with_copy, Assumptions()) == project(record, Assumptions())
    _, rows = stage_table(with_copy)
    own = [row for row in rows if row[0] == "of which transfer"]
    # Two slides, each of 3 s and 2 s of processor time, in both arms.
    assert own == [["of which transfer", "6", "4", "6", "4"]]
    assert [row for row in rows if row not in own] == stage_table(record)[1]
    assert balance(with_copy).parts["transfer"] == pytest.approx(spent)
    assert balance(with_copy).unexplained == pytest.approx(0.0, abs=1e-12)
    assert "*transfer*: copy tiles" in markdown(with_copy, Assumptions())


def test_wall_seconds_of_reading_are_divided_and_none_is_lost() -> None:
    before = {"fetch": (1.0, 0.5), "decode": (2.0, 2.0), "resample": (0.0, 0.0)}
    after = {"fetch": (2.0, 0.6), "decode": (8.0, 7.0), "resample": (2.0, 1.9)}
    parts = _divide(Spent(5.0, 8.0), before, after)
    assert sum(p.wall_s for p in parts.values()) == pytest.approx(5.0)
    assert sum(p.cpu_s for p in parts.values()) == pytest.approx(8.0)
    assert parts["decode"].cpu_s == pytest.approx(5.0)
    assert parts["handle"].cpu_s == pytest.approx(1.0)
    assert parts["decode"].wall_s / parts["fetch"].wall_s == pytest.approx(6.0)
    # Clocks that disagree by a little do not make time negative.
    assert _divide(Spent(1.0, 6.0), before, after)["handle"].cpu_s == 0.0


def test_projections_are_proportional() -> None:
    record = record_of(energy=True)
    lr, hr = project(record, Assumptions(slides=2000, price_per_hour=3.0, price_per_kwh=0.5))
    assert hr.hours == pytest.approx(1000 * 14 / 3600)
    hr_total = totals(record)[1]
    assert hr_total.end_to_end_cpu_s is not None
    assert hr.kwh == pytest.approx(1000 * (hr_total.end_to_end_cpu_s * 10 + 300) / 3.6e6)
    assert hr.cost == pytest.approx(3 * hr.hours + 0.5 * hr.kwh)
    assert hr.gigabytes_read == pytest.approx(1000 * 450_000 / 1e9)
    twice = project(record, Assumptions(slides=4000))
    assert twice[1].hours == pytest.approx(2 * hr.hours)
    assert twice[0].cost is None
    assert lr.hours < hr.hours
    assert any("10 W a core" in words for words in assumptions_in_words(record, Assumptions()))


def test_doubts_are_said() -> None:
    good = record_of(slides=6, repeats=3)
    large = tuple(dataclasses.replace(m, tiles=m.tiles * 30) for m in good.measurements)
    assert warnings_of(dataclasses.replace(good, measurements=large)) == []
    assert any("largest slide has 900 tiles" in w for w in warnings_of(good))
    assert any("Other programs used 40 %" in w for w in warnings_of(dataclasses.replace(good, foreign_load=0.4)))
    assert any("One slide" in w for w in warnings_of(record_of(slides=1)))
    assert any("2 slides are few" in w for w in warnings_of(record_of(slides=2)))
    assert any("One repeat says" in w for w in warnings_of(record_of(repeats=1)))
    noisy = tuple(dataclasses.replace(m, wall_s=m.wall_s * (1 + m.repeat)) for m in good.measurements)
    assert any("noisy" in w for w in warnings_of(dataclasses.replace(good, measurements=noisy)))
    short = tuple(dataclasses.replace(m, wall_s=m.wall_s / 1000) for m in good.measurements)
    assert sum("too short" in w for w in warnings_of(dataclasses.replace(good, measurements=short))) == 2
    assert "Left out: bad: empty file." in warnings_of(dataclasses.replace(good, skipped={"bad": "empty file"}))
    lost = dataclasses.replace(good, process=Spent(1.0, good.process.cpu_s * 1.2))
    assert any("17 % of the processor time belongs to no stage" in w for w in warnings_of(lost))


def test_a_record_that_was_made_to_balance_does() -> None:
    record = record_of()
    books = balance(record)
    assert books.parts["start-up"] == 2.0
    assert books.explained_s == pytest.approx(record.process.cpu_s)
    assert books.unexplained == pytest.approx(0.0, abs=1e-12)
    assert books.parts["decode"] == pytest.approx(3 * (9.0 + 9.0 / 16))


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0, "0"), (14.24, "14.2"), (1234.6, "1,235"), (123.4, "123"), (0.01234, "0.0123"), (1e-6, "1.0e-06")],
)
def test_figures_are_written_to_three_digits(value: float | None, text: str) -> None:
    assert figure(value) == text


def test_the_answer_comes_first(tmp_path: Path) -> None:
    record = record_of([LR, HR, PEER])
    first = headline(record)[0]
    assert first.startswith("5x (texture) costs, beside 20x (texture): 1/5.09 end to end")
    assert "1/16 reading" in first
    text = markdown(record, Assumptions())
    assert text.splitlines()[2] == f"**{first}**"
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")
    assert "One resolution" in headline(record_of([HR]))[0]
    paths = write_outputs(tmp_path / "out", record_of([HR]), Assumptions())
    assert [p.name for p in paths] == ["benchmark.json", "benchmark.md", "benchmark.html"]
    json.dumps(answers(record, Assumptions()), allow_nan=False)


def test_all_slides_in_one_pass_come_before_one_slide_at_a_time(tmp_path: Path) -> None:
    """Two slides in 10 s and in 2 s; encoding takes 24 and 1.5 s of the processor, as the stage passes have it."""
    at_once = tuple(
        ArchivePass(arm.id, repeat, wall_s, cpu_s, 2, 30)
        for repeat in range(3)
        for arm, wall_s, cpu_s in ((LR, 2.0, 3.5), (HR, 10.0, 44.0))
    )
    record = record_of(archive=at_once)
    first, second, *_ = headline(record)
    assert first == (
        "All 2 slides in one pass: 5x (texture) takes 1/5 of the time of 20x (texture), 3,600 slides an hour against "
        "720, and 1/10 of the processor time outside of the encoder."
    )
    assert second.startswith("5x (texture) costs, one slide at a time, beside 20x (texture): 1/5.09 end to end")
    assert "| 20x | 10 | 44 | 10 | 720 |" in markdown(record, Assumptions())
    lr, hr = project(record, Assumptions(slides=2000))
    assert (lr.hours, hr.hours) == (pytest.approx(1000 * 2 / 3600), pytest.approx(1000 * 10 / 3600))
    assert any("all slides in one pass" in words for words in assumptions_in_words(record, Assumptions()))
    assert balance(record).parts["passes over all slides"] == pytest.approx(3 * 47.5)
    write_record(tmp_path / "benchmark.json", record)
    assert read_record(tmp_path / "benchmark.json") == record


# Measuring


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    make_cohort(folder, 2, seed=3, signal="coarse", size_px=(1280, 1280), mpp=0.5)
    return folder


@pytest.fixture(scope="module")
def measured(cohort: Path) -> BenchmarkRecord:
    entries = [SlideEntry(p.stem, str(p), p.stem) for p in sorted(cohort.glob("*.tif"))]
    bad = cohort / "bad.svs"
    bad.write_bytes(b"")
    entries.insert(1, SlideEntry("bad", str(bad), "bad"))
    return run_benchmark(entries, JobSettings(), repeats=2, compare=("openslide",), command="as tested", folder=cohort)


def test_every_pass_is_made_and_arms_take_turns(measured: BenchmarkRecord, cohort: Path) -> None:
    ids = [arm.id for arm in measured.arms]
    assert ids == ["5x texture", "20x texture", "5x openslide", "20x openslide"]
    assert len(measured.measurements) == 2 * 2 * (2 * 2 + 2)
    assert [m.order for m in measured.measurements] == list(range(24))
    firsts = [next(m.arm for m in measured.measurements if m.repeat == r) for r in range(2)]
    assert firsts == ids[:2]
    assert list(measured.skipped) == ["bad"]
    assert len(measured.slides) == 2
    # Once all slides are through one by one, all in one pass.
    at_once = [(one.arm, one.repeat, one.slides) for one in measured.archive]
    assert at_once == [(ids[0], 0, 2), (ids[1], 0, 2), (ids[1], 1, 2), (ids[0], 1, 2)]
    for one in measured.archive:
        assert one.tiles == sum(m.tiles for m in measured.of(one.arm, STAGED) if m.repeat == one.repeat)
    assert list(measured.once) == ["start-up", "load encoders", "warm up"]
    assert not [p for p in cohort.iterdir() if p.is_dir()], "the scratch folder is gone"


def test_stages_belong_to_their_passes(measured: BenchmarkRecord) -> None:
    native = {"open", "segment", "plan", "fetch", "decode", "resample", "handle", "encode", "write"}
    for m in measured.measurements:
        if m.kind == END_TO_END:
            assert {"open", "segment", "tile", "read", "encode", "assemble"} <= set(m.stages)
            assert m.peak_memory_bytes is not None
            assert m.peak_memory_bytes > 50 << 20
            assert m.peak_memory_growth_bytes is not None
            assert 0 <= m.peak_memory_growth_bytes < m.peak_memory_bytes
        elif m.arm.endswith("openslide"):
            assert set(m.stages) == {"open", "segment", "plan", "read", "encode", "write"}
        else:
            assert set(m.stages) == native
            assert sum(s.wall_s for s in m.stages.values()) <= m.wall_s
            assert sum(s.cpu_s for s in m.stages.values()) <= m.cpu_s + 1e-6


def test_counts_are_those_of_an_independent_count(measured: BenchmarkRecord) -> None:
    for facts in measured.slides:
        with tifffile.TiffFile(facts.path) as file:
            page = file.pages[0]
            assert isinstance(page, tifffile.TiffPage)
            lengths, wide, block = page.databytecounts, -(-page.imagewidth // page.tilewidth), page.tilewidth
        slide = open_slide(facts.path)
        overview = read_overview(slide, SegmentSettings().mpp)
        mask = find_tissue(overview.rgb, overview.um_per_px, overview.scale_l0, SegmentSettings())
        grid = plan_grids(slide.pyramid, mask, TileSettings(resolutions=(0.5,)))[0]
        slide.close()
        touched = set()
        for x, y in grid.coords.tolist():
            for column in range(x // block, (x + 255) // block + 1):
                for row in range(y // block, (y + 255) // block + 1):
                    if column * block < facts.width_l0 and row * block < facts.height_l0:
                        touched.add(row * wide + column)
        for m in measured.of("20x texture", STAGED) + measured.of("20x texture", END_TO_END):
            if m.slide == facts.slide_id:
                assert m.tiles == len(grid)
                assert m.native_tiles == len(touched)
                # Neighbours are fetched in one go, with the few bytes that lie between them in the file.
                wanted = sum(lengths[i] for i in touched)
                assert m.bytes_read >= wanted
                if m.kind == STAGED:
                    assert m.overview_bytes_read is not None
                    assert m.bytes_read - m.overview_bytes_read <= 1.01 * wanted
                assert m.io_read_bytes is None or m.io_read_bytes >= m.bytes_read


def test_the_books_of_a_real_benchmark_balance(measured: BenchmarkRecord) -> None:
    # Within a fifth: passes of 0.1 s leave much of what is between them, and threads' clocks tick. Of what was paid
    # before, which here is a whole test session and would hide all else, nothing is counted.
    books, before = balance(measured), measured.once["start-up"].cpu_s
    explained, whole = books.explained_s - before, books.process_s - before
    assert whole > 0
    assert explained / whole == pytest.approx(1.0, abs=0.2)


class Watched:
    """What was really read of slides and decoded, counted where it happens: byte ranges of files, blocks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ranges: list[tuple[int, int]] = []
        self.decoded: list[int] = []
        read, decode, decode_into = FileSource.read, TiffImage.decode, TiffImage.decode_into
        read_into = TiffImage.read_into

        def reading(source: FileSource, offset: int, length: int) -> bytes:
            data = read(source, offset, length)
            self.ranges.append((offset, len(data)))
            return data

        def decoding(image: TiffImage, cell: Any, data: Any, reduce: int) -> Any:
            block = decode(image, cell, data, reduce)
            self.decoded.append(1)
            return block

        def decoding_into(image: TiffImage, datas: Any, outs: Any, reduce: int) -> list[bool]:
            done = decode_into(image, datas, outs, reduce)
            self.decoded.append(sum(done))
            return done

        def reading_into(image: TiffImage, cells: Any, room: Any, reduce: int) -> Any:
            found = read_into(image, cells, room, reduce)
            offsets, lengths = image.table()
            for column, row in cells[found.done].tolist():
                at = row * -(-image.size_px[0] // image.block_px[0]) + column
                self.ranges.append((int(offsets[at]), int(lengths[at])))
            self.decoded.append(int(found.done.sum()))
            return found

        monkeypatch.setattr(FileSource, "read", reading)
        monkeypatch.setattr(TiffImage, "read_into", reading_into)
        monkeypatch.setattr(TiffImage, "decode", decoding)
        monkeypatch.setattr(TiffImage, "decode_into", decoding_into)

    def take(self) -> tuple[int, int]:
        """Bytes read and blocks decoded since the last call."""
        found = sum(length for _, length in self.ranges), sum(self.decoded)
        self.ranges.clear()
        self.decoded.clear()
        return found


@pytest.mark.parametrize("resolution", [0.5, 2.0])
def test_bytes_and_native_tiles_are_those_really_read_and_decoded(
    cohort: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, resolution: float
) -> None:
    entry, job = entries_of(cohort)[0], JobSettings(tile=TileSettings(resolutions=(resolution,)))
    encoders = {"texture": load_encoder("texture")}
    (arm,) = arms_of(job, encoders)
    bench = Passes(job, encoders, Gpu([]), "warm", tmp_path)
    watched = Watched(monkeypatch)
    with closing(open_slide(entry.path)) as slide:
        # A reader decodes a block or two to prove that it understands the file.
        opening, probes = watched.take()
        overview = read_overview(slide, job.segment.mpp)
        overview_bytes, overview_blocks = watched.take()
        mask = find_tissue(overview.rgb, overview.um_per_px, overview.scale_l0, job.segment)
        (grid,) = plan_grids(slide.pyramid, mask, job.tile)
    staged = bench.staged(entry, arm)
    read, decoded = watched.take()
    assert staged.tiles == len(grid)
    assert staged.bytes_read == read - opening
    assert staged.overview_bytes_read == overview_bytes
    assert staged.native_tiles == decoded - overview_blocks - probes
    whole = bench.end_to_end(entry, arm)
    read, decoded = watched.take()
    assert whole.tiles == len(grid)
    assert whole.bytes_read == read
    # A run opens the slide twice.
    assert whole.native_tiles == decoded - overview_blocks - 2 * probes
    # And it reads once more what a file is known by whatever levels a later version finds in it: its ends.
    content = 2 * min(os.path.getsize(entry.path), 1 << 20)
    assert whole.bytes_read - staged.bytes_read == 2 * opening + content


def test_high_resolution_counts_what_a_run_reports(measured: BenchmarkRecord, tmp_path: Path) -> None:
    slide = measured.slides[0]
    assert run_cli("run", slide.path, "-r", "20x", "-e", "texture", "-o", str(tmp_path / "job")) == 0
    (line,) = (tmp_path / "job/outcomes.jsonl").read_text().splitlines()
    outcome = json.loads(line)
    for kind in (STAGED, END_TO_END):
        found = next(m for m in measured.of("20x texture", kind) if m.slide == slide.slide_id)
        assert outcome["tiles"] == {"20x": found.tiles}
        assert outcome["counts"]["blocks_decoded"] == found.native_tiles
    assert outcome["counts"]["prepare_bytes_fetched"] + outcome["counts"]["bytes_fetched"] == found.bytes_read


def test_both_kinds_of_pass_count_alike_and_low_resolution_counts_less(measured: BenchmarkRecord) -> None:
    for staged, whole in zip(measured.of("5x texture", STAGED), measured.of("5x texture", END_TO_END), strict=True):
        assert (staged.tiles, staged.native_tiles) == (whole.tiles, whole.native_tiles)
        # End to end the reader's count holds the header and what the fingerprint is made of, too.
        assert staged.bytes_read <= whole.bytes_read
    low, high = totals(measured)[:2]
    assert low.overview_bytes_read == high.overview_bytes_read
    assert low.overview_bytes_read
    assert low.overview_bytes_read < low.bytes_read
    assert low.tiles < high.tiles
    assert low.bytes_read < high.bytes_read


def entries_of(cohort: Path) -> list[SlideEntry]:
    return [SlideEntry(p.stem, str(p), p.stem) for p in sorted(cohort.glob("*.tif"))]


def failing(monkeypatch: pytest.MonkeyPatch, slide: str, after: int, error: BaseException) -> None:
    """Have stage passes over a slide fail once ``after`` of them were made; ``slide`` "" stands for any."""
    whole, made = Passes.staged, [0]

    def staged(self: Passes, entry: SlideEntry, arm: Arm) -> Measurement:
        if slide in ("", entry.slide_id):
            made[0] += 1
            if made[0] > after:
                raise error
        return whole(self, entry, arm)

    monkeypatch.setattr(Passes, "staged", staged)


COARSE = JobSettings(tile=TileSettings(resolutions=(2.0, 4.0)))
"""Two arms that are quick to measure."""


def test_a_slide_that_fails_late_is_skipped_and_the_rest_goes_on(
    cohort: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, second = entries_of(cohort)
    failing(monkeypatch, first.slide_id, 3, ZeroDivisionError("division by zero"))
    saved: list[BenchmarkRecord] = []
    record = run_benchmark([first, second], COARSE, repeats=3, folder=tmp_path, save=saved.append)
    assert dict(record.skipped) == {first.slide_id: "ZeroDivisionError: division by zero"}
    assert [s.slide_id for s in record.slides] == [second.slide_id]
    assert {(m.slide, m.repeat, m.kind) for m in record.measurements} == {
        (second.slide_id, r, kind) for r in range(3) for kind in (STAGED, END_TO_END)
    }
    assert len(record.measurements) == 3 * 4
    assert record.interrupted is None
    # Two passes of both kinds in the first round and one of each before the failure in the second.
    assert record.once["left out"].cpu_s > 0
    assert [(r.repeats, len(r.slides)) for r in saved] == [(1, 2), (2, 1), (3, 1)]
    write_record(tmp_path / "benchmark.json", record)
    assert read_record(tmp_path / "benchmark.json") == record
    assert f"Left out: {first.slide_id}: ZeroDivisionError: division by zero." in warnings_of(record)


def test_a_run_that_fails_leaves_nothing_to_the_next_slide(
    cohort: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, second = entries_of(cohort)

    def process_failing(entries: list[SlideEntry], *more: Any, **options: Any) -> Iterator[SlideOutcome]:
        for outcome in process(entries, *more, **options):
            if outcome.slide_id == first.slide_id:
                yield dataclasses.replace(outcome, status="failed", reason="a bad tile")
            else:
                yield outcome

    monkeypatch.setattr("wsi_pipe.benchmark.passes.process", process_failing)
    record = run_benchmark([first, second], COARSE, repeats=1, folder=tmp_path)
    assert dict(record.skipped) == {first.slide_id: f"{first.path}: a bad tile"}
    assert [m.slide for m in record.measurements] == [second.slide_id] * 4


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (DeviceError("the device is gone"), "the device is gone"),
        (ValueError("each slide fails"), "no slide can be measured (case001-1: ValueError: each slide fails)"),
    ],
)
def test_what_ends_a_benchmark_leaves_its_complete_rounds(
    cohort: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException, reason: str
) -> None:
    # Two arms: the third stage pass over the one slide is in the second round, the second one in the first.
    slides = entries_of(cohort)[:1]
    saved: list[BenchmarkRecord] = []
    failing(monkeypatch, "", 2, error)
    with pytest.raises(type(error)):
        run_benchmark(slides, COARSE, repeats=3, folder=tmp_path, save=saved.append)
    assert [r.interrupted for r in saved] == [None, f"after 1 of 3 rounds: {reason}"]
    record = saved[-1]
    assert (record.repeats, len(record.measurements)) == (1, 4)
    assert any(f"ended early, after 1 of 3 rounds: {reason}" in w for w in warnings_of(record))
    assert "ended early" in markdown(record, Assumptions())
    assert not list(tmp_path.iterdir()), "the scratch folder is gone"
    saved.clear()
    monkeypatch.undo()
    failing(monkeypatch, "", 1, error)
    with pytest.raises(type(error)):
        run_benchmark(slides, COARSE, repeats=3, folder=tmp_path, save=saved.append)
    assert saved == []


def test_what_bytes_are_counted_is_said(measured: BenchmarkRecord) -> None:
    assert "MB a slide, are the same at every resolution" in markdown(measured, Assumptions())
    assert "was not counted" in markdown(record_of(), Assumptions())


def test_no_slide_that_can_be_measured_is_an_error(tmp_path: Path) -> None:
    bad = tmp_path / "bad.svs"
    bad.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"no slide can be measured \(bad: "):
        run_benchmark([SlideEntry("bad", str(bad), "bad")], JobSettings(), repeats=1)
    with pytest.raises(ConfigError, match="0 repeats"):
        run_benchmark([], JobSettings(), repeats=0)
    with pytest.raises(ConfigError, match="warm or cold"):
        run_benchmark([], JobSettings(), cache="hot")


def test_reading_tile_by_tile_gives_the_same_tiles() -> None:
    image = np.random.default_rng(0).integers(0, 256, (512, 768, 3)).astype(np.uint8)
    half = image.reshape(256, 2, 384, 2, 3).mean((1, 3)).astype(np.uint8)
    slide = ArraySlide([image, half], mpp=(0.5, 0.5))
    cells = np.array([[0, 0], [1, 0], [2, 1]], np.int32)
    grid = TileGrid(
        TileSpec(0.5, 256), (0.5, 0.5), (0.0, 0.0), (256.0, 256.0), (256.0, 256.0), cells, np.ones(3, np.float32)
    )
    assert best_level(slide, grid) == 0
    ours = np.concatenate([b.pixels for b in stream_tiles(slide, grid, batch_size=2)])
    theirs = np.concatenate(list(read_singly(slide, grid, 2, 2)))
    assert np.array_equal(ours, theirs)
    coarse = dataclasses.replace(grid, spec=TileSpec(2.0, 64), mpp_effective=(2.0, 2.0))
    assert best_level(slide, coarse) == 1
    assert next(read_singly(slide, coarse, 3, 1)).shape == (3, 64, 64, 3)


# Meters


def test_arms_are_compared_by_the_memory_that_they_add() -> None:
    record = record_of()
    grown = tuple(
        dataclasses.replace(m, peak_memory_growth_bytes=(m.repeat + 1) * (1 << 20) * (8 if m.arm == HR.id else 1))
        if m.kind == END_TO_END
        else m
        for m in record.measurements
    )
    low, high = totals(dataclasses.replace(record, measurements=grown))
    assert (low.peak_memory_growth_bytes, high.peak_memory_growth_bytes) == (3 << 20, 24 << 20)
    assert low.peak_memory_bytes == high.peak_memory_bytes
    words = markdown(dataclasses.replace(record, measurements=grown), Assumptions())
    assert "1,024 MiB; most that a pass end to end added to what it found: 5x 3 MiB, 20x 24 MiB." in words
    assert "held: 1,024 MiB.\n" in markdown(record, Assumptions())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the C library keeps what it likes")
def test_memory_that_was_freed_is_not_taken_for_held() -> None:
    give_back_memory()
    before = PeakMemory()
    before.bytes()
    held = [bytes(1000) for _ in range(50_000)]
    del held
    give_back_memory()
    after = PeakMemory()
    after.bytes()
    assert after.start_bytes - before.start_bytes < 30 << 20


def test_meters_see_what_happens(tmp_path: Path) -> None:
    peak = PeakMemory()
    held = np.ones(64 << 20, np.uint8)
    with_it = peak.bytes()
    del held
    assert with_it > 64 << 20
    assert with_it - peak.start_bytes > 60 << 20
    file = tmp_path / "data"
    file.write_bytes(b"x" * (1 << 20))
    before = io_read_bytes()
    file.read_bytes()
    drop_cache(file)
    after = io_read_bytes()
    if before is not None and after is not None:
        assert after - before >= 1 << 20
    assert 0 <= ForeignLoad().share() <= 1
    gpu = Gpu(["cpu"])
    with gpu.watch() as spent:
        gpu.wait()
    assert spent == []
    assert gpu.name is None


class FakeCuda:
    """As much of torch.cuda and NVML as the meters use: 50 J and a utilisation of 80 % meanwhile.

    Of device n the UUID is "123n" and the peak 123 + n bytes; ``asked`` are the devices that anyone looked at.
    """

    NVMLError = RuntimeError

    def __init__(self) -> None:
        self.millijoules = 1_000
        self.waits = 0
        self.asked: set[int] = set()

    def is_available(self) -> bool:
        return True

    def get_device_name(self, index: int) -> str:
        self.asked.add(index)
        return f"GPU {index}"

    def get_device_properties(self, index: int) -> SimpleNamespace:
        self.asked.add(index)
        return SimpleNamespace(uuid=f"123{index}")

    def synchronize(self, index: int) -> None:
        self.asked.add(index)
        self.waits += 1

    def reset_peak_memory_stats(self, index: int) -> None:
        self.asked.add(index)

    def max_memory_allocated(self, index: int) -> int:
        self.asked.add(index)
        return 123 + index

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        return f"handle of {uuid}"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        self.asked.add(int(handle[-1]))
        self.millijoules += 50_000
        return self.millijoules

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(gpu=80)


@pytest.mark.parametrize(
    ("devices", "indices"), [(["cuda"], [0]), (["cpu", "cuda:1"], [1]), (["cuda:2", "cuda:0"], [0, 2])]
)
def test_the_gpus_of_the_arms_are_watched_and_no_other(
    monkeypatch: pytest.MonkeyPatch, devices: list[str], indices: list[int]
) -> None:
    fake = FakeCuda()
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=fake))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "pynvml", fake)  # type: ignore[arg-type]
    gpu = Gpu(devices)
    assert gpu.name == ", ".join(f"GPU {index}" for index in indices)
    sampled = threading.Event()
    monkeypatch.setattr(
        fake, "nvmlDeviceGetUtilizationRates", lambda handle: (sampled.set(), SimpleNamespace(gpu=80))[1]
    )
    with gpu.watch() as spent:
        assert sampled.wait(10)
    (found,) = spent
    # Every question for one device's counter finds it 50 J further: n devices were asked n times before and after.
    n = len(indices)
    assert found.energy_j == pytest.approx(50.0 * n * n)
    assert found.utilisation == pytest.approx(0.8)
    assert found.busy_s is not None
    assert found.busy_s > 0
    assert found.peak_memory_bytes == sum(123 + index for index in indices)
    assert fake.waits == 2 * n
    assert fake.asked == set(indices)


def test_an_arm_names_all_devices_of_its_encoder() -> None:
    one, two = (SimpleNamespace(device=f"cuda:{i}") for i in range(2))
    assert _devices(cast(Any, one)) == "cuda:0"
    assert _devices(cast(Any, SimpleNamespace(replicas=(one, two)))) == "cuda:0,cuda:1"
    assert _devices(cast(Any, SimpleNamespace())) == "cpu"


# The command


def run_cli(*arguments: str) -> int:
    return run_group(group, "wsi-pipe", list(arguments))


def test_an_interrupted_command_draws_what_it_has(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slide = str(next(iter(sorted(cohort.glob("*.tif")))))
    failing(monkeypatch, "", 2, KeyboardInterrupt())
    out = tmp_path / "bench"
    assert run_cli("benchmark", slide, "-r", "2um", "-r", "4um", "--repeats", "2", "-o", str(out)) == EXIT_INTERRUPTED
    assert "benchmark: 1 of 2 rounds are complete, in " in capsys.readouterr().err
    assert sorted(p.name for p in out.iterdir()) == ["benchmark.html", "benchmark.json", "benchmark.md"]
    record = read_record(out / "benchmark.json")
    assert record.repeats == 1
    assert "The benchmark ended early, after 1 of 2 rounds: interrupted." in (out / "benchmark.md").read_text()
    other = tmp_path / "other"
    monkeypatch.undo()
    failing(monkeypatch, "", 0, KeyboardInterrupt())
    assert run_cli("benchmark", slide, "-r", "2um", "--repeats", "2", "-o", str(other)) == EXIT_INTERRUPTED
    assert not other.exists()


def test_the_command_measures_and_draws_again(cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slide = str(next(iter(sorted(cohort.glob("*.tif")))))
    out = tmp_path / "bench"
    assert run_cli("benchmark", slide, "--repeats", "1", "-o", str(out), "--encoder-lr", "texture") == 0
    printed = capsys.readouterr().out
    assert "5x (texture) costs, beside 20x (texture)" in printed
    assert "note: One repeat says" in printed
    again = tmp_path / "again"
    arguments = ("--from", str(out / "benchmark.json"), "-o", str(again), "--slides-per-year", "77", "--json")
    assert run_cli("benchmark", *arguments) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["assumptions"]["slides"] == 77
    assert (again / "benchmark.json").read_text() == (out / "benchmark.json").read_text()
    assert "77 slides a year" in (again / "benchmark.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "nowhere.json"], "nowhere.json: No such file"),
        (["--from", "nowhere.json", "slide.svs"], "together with --from"),
        ([], "no slides are given"),
        (["nowhere.svs"], "nowhere.svs: no such file"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_cli("benchmark", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
