"""The summaries of a job, and the data of its page."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from wsi_pipe.cli import group, run_group
from wsi_pipe.config import ExtractSettings, JobSettings, TileSettings
from wsi_pipe.errors import OutputError
from wsi_pipe.job import append_outcome, open_job
from wsi_pipe.outcome import SlideOutcome
from wsi_pipe.pages import embed_json, render_page
from wsi_pipe.report import Picture, Section, slides_csv, summarise, summary_table, write_report
from wsi_pipe.report.page import report_data, settings_rows
from wsi_pipe.report.summary import histogram_bars, labels_of, level_seconds, outlier_flags, stage_seconds

PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000" + "1f15c4890000000d49444154789c6360606060000000050001"
    "a5f645400000000049454e44ae426082"
)


def done(slide_id: str, hr: int, lr: int, mm2: float = 1.0, **seconds: float) -> SlideOutcome:
    return SlideOutcome(
        slide_id,
        "done",
        path=f"/slides/{slide_id}.svs",
        tiles={"20x": hr, "5x": lr},
        counts={"tissue_mm2": mm2, "read_s.20x": 1.5, "read_s.5x": 0.5},
        seconds=seconds or {"open": 0.5, "read": 2.0, "encode": 4.0},
    )


FAILED = SlideOutcome(
    "bad",
    "failed",
    "/slides/bad.svs",
    "open",
    "it is empty",
    'copy it again, "whole"',
    "SlideOpenError",
    {"open": 0.25},
)
EMPTY = SlideOutcome("pale", "empty", "/slides/pale.svs", reason="no tissue", tiles={"20x": 0, "5x": 0})
SOME = [done("a", 150, 10, 2.0), done("b", 310, 20, 3.5), FAILED, EMPTY]


def page_data(page: Path) -> dict[str, object]:
    text = page.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    data: dict[str, object] = json.loads(found.group(1))
    return data


def test_figures_are_sums_over_slides() -> None:
    figures = summarise(SOME)
    assert figures["slides"] == {"total": 4, "done": 2, "empty": 1, "failed": 1}
    assert figures["tiles"] == {"5x": 30, "20x": 460}
    assert list(figures["tiles"]) == ["5x", "20x"]
    assert figures["hr_per_lr"] == pytest.approx(460 / 30)
    assert figures["tissue_mm2"] == pytest.approx(5.5)
    assert figures["seconds"] == {"open": 1.25, "read": 4.0, "encode": 8.0}
    assert figures["seconds_total"] == pytest.approx(13.25)
    assert figures["seconds_by_level"] == {"20x": {"read": 3.0}, "5x": {"read": 1.0}}


def test_figures_and_slides_are_written_beside_the_page(tmp_path: Path) -> None:
    page = write_report(tmp_path, SOME, JobSettings())
    figures = json.loads(page.with_suffix(".json").read_text())
    assert {k: figures[k] for k in ("slides", "tiles")} == {k: summarise(SOME)[k] for k in ("slides", "tiles")}
    assert page.with_suffix(".csv").read_text() == slides_csv(SOME)


def test_no_slides_give_no_figures_and_no_error(tmp_path: Path) -> None:
    assert summarise([])["hr_per_lr"] is None
    assert summary_table([]) == "slides   0 done, 0 empty, 0 failed"
    assert write_report(tmp_path, [], JobSettings()).is_file()


def test_labels_stand_coarsest_first_by_resolution_not_by_name() -> None:
    assert labels_of([SlideOutcome("s", "done", tiles={"20x": 1, "2.5x": 1, "10x": 1, "5x": 1})]) == [
        "2.5x", "5x", "10x", "20x",
    ]  # fmt: skip


def test_seconds_by_level_come_from_the_counts() -> None:
    counts = {"read_s.2.5x": 1.0, "read_s.20x": 2.0, "encode_s.20x": 4.0, "tiles": 7.0, "tissue_mm2": 1.0}
    outcome = SlideOutcome("s", "done", seconds={"odd": 9.0, "read": 3.0, "open": 0.1}, counts=counts)
    assert list(stage_seconds(outcome).items()) == [("open", 0.1), ("read", 3.0), ("odd", 9.0)]
    assert level_seconds(outcome) == {"2.5x": {"read": 1.0}, "20x": {"read": 2.0, "encode": 4.0}}


def test_the_table_names_failures_with_their_remedies() -> None:
    text = summary_table(SOME)
    assert "2 done, 1 empty, 1 failed" in text
    assert "30 at 5x, 460 at 20x (15.3 fine to one coarse)" in text
    assert 'failed   bad (open): it is empty; copy it again, "whole"' in text
    assert "empty    pale: no tissue" in text
    many = [SlideOutcome(f"s{i}", "failed", stage="open", reason="r") for i in range(30)]
    assert summary_table(many).count("failed   s") == 20
    assert "and 10 more: see failures.csv" in summary_table(many)


def test_the_csv_reads_back() -> None:
    slides = list(csv.DictReader(io.StringIO(slides_csv(SOME))))
    assert [row["slide_id"] for row in slides] == ["a", "b", "bad", "pale"]
    assert [row["tiles_20x"] for row in slides] == ["150", "310", "", "0"]
    assert slides[0]["tissue_mm2"] == "2.0"
    assert slides[2]["seconds_open"] == "0.25"


def test_outliers_are_those_far_from_the_median_on_a_log_scale() -> None:
    rng = np.random.default_rng(0)
    counts = np.exp(rng.normal(math.log(3000), 0.3, 60)).astype(int)
    outcomes = [done(f"s{i}", int(n), int(n) // 15, mm2=n / 60) for i, n in enumerate(counts)]
    outcomes[7] = done("few", 12, 1, mm2=50)
    outcomes[9] = done("many", 90_000, 6000, mm2=50)
    flags = outlier_flags(outcomes, "20x")
    assert flags[7] == ["few tiles"]
    assert flags[9] == ["many tiles"]
    # Recomputed another way: |log x - median| beyond 3.5 / 0.6745 median absolute deviations.
    logs = np.log([o.tiles["20x"] for o in outcomes])
    expected = np.abs(logs - np.median(logs)) > 3.5 / 0.6745 * np.median(np.abs(logs - np.median(logs)))
    assert [any(f.endswith("tiles") for f in flag) for flag in flags] == expected.tolist()


def test_few_or_equal_slides_have_no_outliers() -> None:
    assert outlier_flags([done("a", 1, 1), *(done(f"s{i}", 5000, 300) for i in range(6))], "20x") == [[]] * 7
    equal = [done(f"s{i}", 1000 + i, 70) for i in range(20)]
    assert outlier_flags(equal, "20x") == [[]] * 20


@pytest.mark.parametrize("values", [[5.0], [3.0, 3.0, 3.0], list(range(1, 200)), [1.0, 10.0, 1000.0, 5e4], [0.0, 2.0]])
def test_histograms_count_every_value_above_zero_once(values: list[float]) -> None:
    marked = [v > 100 for v in values]
    result = histogram_bars(values, marked)
    assert result is not None
    bars = result["bars"]
    positive = [v for v in values if v > 0]
    assert sum(bar["count"] for bar in bars) == len(positive)
    assert sum(bar["marked"] for bar in bars) == sum(marked)
    assert result["log"] == (max(positive) > 20 * min(positive))
    for bar in bars[:-1]:
        inside = sum(bar["from"] * (1 - 1e-12) <= v < bar["to"] * (1 - 1e-12) for v in positive)
        assert inside == bar["count"]
    assert histogram_bars([0.0], [False]) is None


def test_settings_that_differ_are_marked() -> None:
    settings = JobSettings(tile=TileSettings(min_tissue=0.4), extract=ExtractSettings(encoders={"5x": ("a", "b")}))
    changed = {(row["group"], row["name"]): row["value"] for row in settings_rows(settings) if row["changed"]}
    assert changed == {("tile", "min_tissue"): "0.4", ("extract", "encoders"): "5x: a, b"}
    assert not any(row["changed"] for row in settings_rows(JobSettings()))


def test_text_from_users_cannot_leave_the_data_or_the_markup(tmp_path: Path) -> None:
    name = '</script><script>alert("x")</script>&\u2028<!--'
    assert json.loads(embed_json({"name": name})) == {"name": name}
    assert not re.search("[<>&\u2028]", embed_json({"name": name}))
    outcome = SlideOutcome(name, "failed", reason=name, remedy=name, path=name)
    sections = [Section(name, [name], [name], [(name, 1)])]
    page = write_report(tmp_path, [outcome], JobSettings(), title=name, sections=sections)
    text = page.read_text(encoding="utf-8")
    assert 'alert("x")</script>' not in text
    assert "<!--" not in text
    slides = page_data(page)["slides"]
    assert isinstance(slides, dict)
    assert slides["id"] == [name]


def test_numbers_that_json_has_not_are_refused_or_left_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        render_page(title="t", body="", data={"x": math.nan})
    data = report_data(tmp_path, [SlideOutcome("s", "done", counts={"tissue_mm2": math.inf})], JobSettings())
    assert data["slides"]["tissue_mm2"] == [None]


def test_pictures_are_embedded_in_small_jobs_and_linked_in_large_ones(tmp_path: Path) -> None:
    folder = tmp_path / "thumbnails"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"tissue of a")
    (folder / "a.grid.jpg").write_bytes(b"grids of a")
    (folder / "b.jpg").write_bytes(b"tissue of b")
    small = report_data(tmp_path, SOME, JobSettings())
    assert small["slides"]["pictures"] == [3, 1, 0, 0]
    assert set(small["embedded"]) == {"a", "b"}
    assert small["embedded"]["a"]["grid"] == "data:image/jpeg;base64,Z3JpZHMgb2YgYQ=="
    assert set(small["embedded"]["b"]) == {"tissue"}
    assert report_data(tmp_path, SOME, JobSettings(), embed_slides=3)["embedded"] == {}


def test_sections_are_added_with_their_pictures(tmp_path: Path) -> None:
    picture = tmp_path / "curve.png"
    picture.write_bytes(PIXEL)
    section = Section(
        "Training", ["It went well."], ["model", "AUC"], [("student", 0.91234)], [Picture(picture, "ROC")]
    )
    text = write_report(tmp_path, SOME, JobSettings(), sections=[section]).read_text(encoding="utf-8")
    assert '<a href="#extra-0">Training</a>' in text
    assert '<td class="num">0.9123</td>' in text
    assert '<img src="data:image/png;base64,' in text
    missing = Section("Training", pictures=[Picture(tmp_path / "none.png", "none")])
    with pytest.raises(OutputError, match=r"none\.png"):
        write_report(tmp_path, SOME, JobSettings(), sections=[missing])


def test_the_page_asks_nothing_of_the_network(tmp_path: Path) -> None:
    text = write_report(tmp_path, SOME, JobSettings()).read_text(encoding="utf-8")
    assert "default-src &#x27;none&#x27;" in text
    addresses = set(re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}", text))
    assert addresses <= {"http://www.w3.org"}  # the name of SVG, which is not fetched


def test_ten_thousand_slides_stay_small(tmp_path: Path) -> None:
    outcomes = [done(f"slide-{i:05d}", 3000 + i % 700, 200 + i % 50, 50 + i % 13) for i in range(10_000)]
    page = write_report(tmp_path, outcomes, JobSettings())
    assert page.stat().st_size < 3_000_000


def test_the_command_draws_a_job_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = tmp_path / "job"
    paths = open_job(job, JobSettings(), [])
    for outcome in SOME:
        append_outcome(paths, outcome)
    assert run_group(group, "wsi-pipe", ["report", str(job)]) == 0
    printed = capsys.readouterr().out
    assert summary_table(SOME) in printed
    assert str(job / "report.html") in printed
    assert (job / "report.html").is_file()
    assert run_group(group, "wsi-pipe", ["report", str(job), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["slides"]["total"] == 4
    assert run_group(group, "wsi-pipe", ["report", str(tmp_path)]) == 2
    assert "is not a job" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "job").write_text("a file")
    with pytest.raises(OutputError, match="cannot write"):
        write_report(tmp_path / "job", SOME, JobSettings())
