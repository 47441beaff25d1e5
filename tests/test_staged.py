"""Slides behind URLs beside local ones: nobody waits for another's copy, and each copy has its time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from wsi_pipe.config import JobSettings
from wsi_pipe.errors import MissingMppError, SlideOpenError, TaskTimeoutError
from wsi_pipe.execute import Done, Where
from wsi_pipe.execute import run as execute
from wsi_pipe.job import open_job, read_outcomes, staged
from wsi_pipe.job.dispatch import dispatch
from wsi_pipe.job.staged import STAGED_AHEAD, Staging
from wsi_pipe.manifest import SlideEntry, collect_slides

MakeSlide = Callable[..., Path]


def far(name: str) -> SlideEntry:
    return SlideEntry(name, f"https://127.0.0.1:1/{name}.svs", name)


def near(name: str) -> SlideEntry:
    return SlideEntry(name, f"/slides/{name}.svs", name)


class Server:
    """Copies that arrive when they are told to, or fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.arrives: dict[str, threading.Event] = {}
        self.errors: dict[str, Exception] = {}
        self.asked: list[str] = []
        monkeypatch.setattr(staged, "open_entry", self.open)

    def open(self, entry: SlideEntry, *_: Any) -> Any:
        self.asked.append(entry.slide_id)
        self.arrives.setdefault(entry.slide_id, threading.Event()).wait(60)
        if entry.slide_id in self.errors:
            raise self.errors[entry.slide_id]
        return self

    def close(self) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server(monkeypatch)
    yield server
    for event in server.arrives.values():
        event.set()


def staging(entries: list[SlideEntry], *, timeout_s: float | None = None, pauses: bool = True) -> Staging:
    return Staging(entries, JobSettings(), timeout_s=timeout_s, stopped=threading.Event(), pauses=pauses)


def until_something(slides: Iterator[SlideEntry | None]) -> str:
    for slide in slides:
        if slide is not None:
            return slide.slide_id
        threading.Event().wait(0.01)
    return "end"


def test_local_slides_wait_for_no_copy(server: Server) -> None:
    some = staging([far("f0"), near("a"), far("f1"), near("b"), far("f2")])
    slides = iter(some)
    assert [next(slides), next(slides), next(slides)] == [near("a"), near("b"), None]
    assert sorted(server.asked) == ["f0", "f1"][:STAGED_AHEAD]
    # The one that is there first comes first.
    server.arrives.setdefault("f1", threading.Event()).set()
    assert until_something(slides) == "f1"
    for name in ("f0", "f2"):
        server.arrives.setdefault(name, threading.Event()).set()
    assert sorted([until_something(slides), until_something(slides)]) == ["f0", "f2"]
    assert until_something(slides) == "end"
    assert sorted(some.copies) == ["f0", "f1", "f2"]
    some.release_all()
    assert some.copies == {}


def test_a_copy_that_takes_too_long_fails_its_slide_alone(server: Server) -> None:
    server.arrives["f1"] = threading.Event()
    server.arrives["f1"].set()
    some = staging([far("f0"), far("f1"), far("f2")], timeout_s=0.3)
    server.arrives["f2"] = server.arrives["f1"]
    slides = iter(some)
    assert {until_something(slides), until_something(slides)} == {"f1", "f2"}
    assert until_something(slides) == "end"
    ((entry, error),) = some.failed
    assert entry.slide_id == "f0"
    assert isinstance(error, TaskTimeoutError)
    assert "f0" not in some.copies


def test_a_copy_that_cannot_be_made_is_told_once_and_others_go_on(server: Server) -> None:
    server.errors = {"f0": SlideOpenError("f0: 404"), "f1": MissingMppError("no mpp")}
    for name in ("f0", "f1"):
        server.arrives[name] = threading.Event()
        server.arrives[name].set()
    some = staging([far("f0"), far("f1")], pauses=False)
    # What is no matter of copying is told where the slide is opened in earnest.
    assert [slide.slide_id for slide in some if slide] == ["f1"]
    assert [(entry.slide_id, str(error)) for entry, error in some.failed] == [("f0", "f0: 404")]


def test_outcomes_of_copies_that_failed_are_noted(
    server: Server, tmp_path: Path, make_slide: MakeSlide, tissue_picture: Any
) -> None:
    make_slide(tmp_path / "in" / "a.svs", picture=tissue_picture(900, 800))
    entries = [far("f0"), *collect_slides([str(tmp_path / "in")])]
    server.errors["f0"] = SlideOpenError("f0: gone", remedy="look")
    server.arrives["f0"] = threading.Event()
    server.arrives["f0"].set()
    paths = open_job(tmp_path / "job", JobSettings(), entries)
    came = {
        outcome.slide_id: outcome.status for outcome in dispatch(entries, JobSettings(), paths, Where(), until="tile")
    }
    assert came == {"a": "done", "f0": "failed"}
    noted = read_outcomes(tmp_path / "job")["f0"]
    assert (noted.status, noted.stage, noted.reason, noted.remedy) == ("failed", "open", "f0: gone", "look")


def double(number: int) -> int:
    return 2 * number


def test_processes_do_not_wait_for_an_item_that_is_not_there_yet() -> None:
    """What is finished comes back while the next item is not there, and an item that is done already goes through."""
    came = threading.Event()

    def items() -> Iterator[int | Done[int, int] | None]:
        yield 1
        while not came.is_set():
            yield None
        yield Done(7, 49)
        yield 2

    results = execute(double, items(), Where(workers=2))
    assert next(results) == Done(1, 2)
    came.set()
    assert {result.value for result in results if isinstance(result, Done)} == {49, 4}
