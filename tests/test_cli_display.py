"""Progress, tables and failures as they are shown."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

import pytest

from wsi_pipe.cli import messages
from wsi_pipe.cli.display import RunDisplay, print_failures, print_outcomes, print_table
from wsi_pipe.cli.pace import Pace, span
from wsi_pipe.outcome import SlideOutcome

LONG = "TCGA-AA-3666-01Z-00-DX1.d93d7e92-1234-4e0a-9c1b-5a7f0e3d2b11"


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    messages.be(0)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def done(slide_id: str, tiles: int = 0, **more: object) -> SlideOutcome:
    return SlideOutcome(slide_id, "done", seconds={"segment": 1.0}, tiles={"20x": tiles}, **more)  # type: ignore[arg-type]


def test_time_to_go_from_the_first_tiles_on() -> None:
    clock = Clock()
    pace = Pace(4, clock)
    assert (pace.expected, pace.left_s) == (None, None)
    pace.begin()
    clock.now += 10
    pace.laid("a", 1000)
    assert (pace.expected, pace.is_exact, pace.left_s) == (4000, False, None)
    clock.now += 10
    pace.encoded("a", 100)
    # 100 tiles in the 20 s since work began.
    assert pace.left_s == pytest.approx(3900 / 5)
    pace.laid("b", 3000)
    assert pace.expected == 8000
    clock.now += 30
    pace.encoded("a", 900)
    pace.finished(done("a", 1000))
    assert pace.left_s == pytest.approx(7000 / 20)


def test_slides_with_nothing_to_do_tell_nothing_of_the_others() -> None:
    clock = Clock()
    pace = Pace(10, clock)
    for n in range(8):
        pace.begin()
        pace.finished(done(f"old{n}", 500, cached=("segment", "tile", "extract", "assemble")))
    pace.laid("a", 200)
    assert pace.expected == 400
    clock.now += 10
    pace.encoded("a", 200)
    pace.finished(done("a", 200))
    assert pace.left_s == pytest.approx(10)


def test_a_slide_that_fails_has_no_more_tiles() -> None:
    pace = Pace(2, Clock())
    pace.laid("a", 1000)
    pace.finished(SlideOutcome("a", "failed", reason="no"))
    pace.laid("b", 10)
    assert (pace.expected, pace.is_exact) == (10, True)


def test_the_rate_is_that_of_late() -> None:
    clock = Clock()
    pace = Pace(1, clock)
    pace.begin()
    pace.laid("a", 100_000)
    for _ in range(1000):
        clock.now += 10
        pace.encoded("a", 10)
    for _ in range(60):
        clock.now += 5
        pace.encoded("a", 500)
    assert pace.tiles_per_s == pytest.approx(100, rel=0.1)


def test_stages_without_tiles_go_by_slides() -> None:
    clock = Clock()
    pace = Pace(10, clock)
    pace.begin()
    clock.now += 20
    pace.finished(done("a"))
    pace.finished(done("b"))
    assert pace.left_s == pytest.approx(80)


def test_slides_that_fail_at_once_promise_nothing() -> None:
    clock = Clock()
    pace = Pace(4, clock)
    pace.begin()
    clock.now += 0.01
    pace.finished(SlideOutcome("a", "failed", reason="is empty"))
    assert pace.left_s is None
    pace.laid("b", 100)
    assert (pace.left_s, pace.expected) == (None, 200)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (3540, "59 min"), (3599, "1 h"), (3600 * 3.34, "3 h 20 min"),
     (3600 * 30, "30 h"), (86400 * 2.2, "2 d 5 h"), (86400 * 30, "30 d")],
)  # fmt: skip
def test_times_in_words(seconds: float, text: str) -> None:
    assert span(seconds) == text


@pytest.mark.parametrize("width", [80, 120])
def test_the_bars_name_the_slide_and_the_total(width: int) -> None:
    from rich.console import Console

    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None)
    display = RunDisplay(3, console=console)
    display.progress("a", "segment", 1)
    display.progress("a", "laid", 1200)
    display.progress(LONG, "20x", 300)
    display.progress("b", "segment", 1)
    console.print(display.drawn())
    text = out.getvalue()
    assert "0 of 3" in text
    assert "300 of about 3,600" in text
    assert f"encoding  {LONG}" in text
    assert "tissue of b" in text
    assert max(map(len, text.splitlines())) <= width
    out.seek(0)
    out.truncate()
    with display:
        display.finished(SlideOutcome(LONG, "failed", stage="open", reason=f"/d/{LONG}.svs: is empty"))
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert f"/d/{LONG}.svs:" in plain
    assert f"[1/3] {LONG}:" in plain
    assert "is empty" in " ".join(plain.split())
    assert all(len(line.rstrip()) <= width for line in plain.splitlines())


def test_lines_elsewhere_and_none_with_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with RunDisplay(2) as display:
        display.progress("a", "segment", 1)
        display.progress("a", "laid", 10)
        display.progress("a", "20x", 10)
        display.finished(done("a", 10))
        display.finished(done("b", 10))
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("[1/2] a: 10 tiles at 20x (1.0 s); about ")
    assert second == "[2/2] b: 10 tiles at 20x (1.0 s)"
    messages.be(-1)
    with RunDisplay(1) as display:
        display.finished(done("a"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_tables_break_no_word(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    path = f"/mnt/archive/2024/{LONG}.svs"
    rows = [
        [LONG, "open", f"{path}: is cut off at 12,345 bytes, and the header wants 99,999", "copy it again, whole"],
        ["short", "extract", "out of memory", "give a smaller --batch-size"],
        ["病理切片-001", "open", "no resolution", "give --slide-mpp"],
    ]
    print_table({"slide": "left", "stage": "left", "cause": "left", "remedy": "left"}, rows, width=width)
    text = capsys.readouterr().out
    for word in (LONG, f"{path}:", "病理切片-001", "--batch-size", "extract"):
        assert word in text
    words = {word for row in rows for cell in row for word in cell.split()} | {"slide", "stage", "cause", "remedy"}
    assert set(text.split()) <= words
    assert all(len(line) <= max(width, len(path) + 12) for line in text.splitlines())


def test_a_table_that_fits_has_columns(capsys: pytest.CaptureFixture[str]) -> None:
    print_table({"name": "left", "tiles": "right"}, [["a", "5"], ["bb", "1,000"]], width=80)
    assert capsys.readouterr().out == "name  tiles\na         5\nbb    1,000\n"
    print_table({"": "left", " ": "left"}, [["slides", "3 done"], ["x", "y"]], width=80)
    assert capsys.readouterr().out == "slides  3 done\nx       y\n"


def failed(slide_id: str, reason: str, remedy: str = "", stage: str = "open") -> SlideOutcome:
    return SlideOutcome(
        slide_id,
        "failed",
        path=f"/in/{slide_id}.svs",
        stage=stage,  # type: ignore[arg-type]
        reason=reason,
        remedy=remedy or None,
        error="SlideOpenError",
    )


def test_failures_are_told_by_cause(capsys: pytest.CaptureFixture[str]) -> None:
    many = [failed(f"s{n}", f"/in/s{n}.svs: ends at byte {n * 1000}", "copy it again") for n in range(30)]
    print_failures([failed("odd", "/in/odd.svs: no resolution", "give --slide-mpp"), *many])
    text = capsys.readouterr().out
    assert text.index("30 slides failed in open") < text.index("1 slide failed in open")
    assert text.count("copy it again") == 1
    assert "slides  s0, s1, s2, s3, s4 and 25 more: see failures.csv" in text
    assert "/in/odd.svs: no resolution" in text
    print_failures([failed(f"s{n}", f"{'x' * (n + 1)} is wrong") for n in range(25)])
    assert "and 5 slides failed for 5 other causes: see failures.csv" in capsys.readouterr().out
    print_failures([])
    assert capsys.readouterr().out == ""


def test_quiet_keeps_the_failures(capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = [done("a", 3), failed("b", "/in/b.svs: is empty")]
    print_outcomes(outcomes, 1.0)
    assert "1 done, 0 empty, 1 failed" in capsys.readouterr().out
    messages.be(-1)
    print_outcomes(outcomes, 1.0)
    text = capsys.readouterr().out
    assert "1 slide failed" in text
    assert "done" not in text
