"""Items worked on by several threads, handed out in order."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from wsi_pipe.job.ahead import Ahead
from wsi_pipe.stopping import Stop, belongs_to, stop_event


def numbers(taken: list[int], count: int) -> Iterator[int]:
    for number in range(count):
        taken.append(number)
        yield number


def test_all_threads_are_at_work_and_results_come_in_order() -> None:
    """The first four meet, which they can only when all four are worked on at once; the first is done last."""
    together, others = threading.Barrier(4), threading.Semaphore(0)

    def work(number: int) -> int:
        if number < 4:
            together.wait(30)
        if number == 0:
            assert all(others.acquire(timeout=30) for _ in range(3))
        elif number < 4:
            others.release()
        return number * number

    assert list(Ahead(range(50), work, 4, Stop())) == [n * n for n in range(50)]
    assert not [t for t in threading.enumerate() if t.name == "wsi-pipe-prepare"]


def test_no_more_is_taken_than_twice_the_threads_ahead() -> None:
    taken: list[int] = []
    results = iter(Ahead(numbers(taken, 100), lambda number: number, 3, Stop()))
    for done in range(40):
        assert next(results) == done
        assert len(taken) <= done + 1 + 6
    results.close()
    left = len(taken)
    assert left < 100
    assert not [t for t in threading.enumerate() if t.name == "wsi-pipe-prepare"]


def test_what_waits_for_the_next_item_holds_up_no_result() -> None:
    arrived = threading.Event()

    def items() -> Iterator[int]:
        yield 0
        assert arrived.wait(30)
        yield 1

    results = iter(Ahead(items(), lambda number: number, 2, Stop()))
    assert next(results) == 0
    arrived.set()
    assert list(results) == [1]


@pytest.mark.parametrize("where", ["items", "work"])
def test_an_error_comes_in_its_place_and_ends_all(where: str) -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        if where == "items":
            raise OSError("gone")
        yield from range(5, 100)

    def work(number: int) -> int:
        if where == "work" and number == 5:
            raise OSError("gone")
        return number

    results = iter(Ahead(items(), work, 3, Stop()))
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(OSError, match="gone"):
        next(results)
    assert list(results) == []


def test_it_ends_when_told_and_its_threads_belong_to_who_made_it() -> None:
    told, stop = threading.Event(), threading.Event()
    with belongs_to(told):
        ahead = Ahead(range(1000), lambda number: stop_event() is told, 2, Stop(stop))
    results = iter(ahead)
    assert next(results) is True
    stop.set()
    assert len(list(results)) <= 4
