"""The way to a GPU without one: what is copied, and what is kept until it has crossed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from wsi_pipe.encoders.cuda_lane import CudaLane


class FakeEvent:
    """An event that says what the test tells it to."""

    over = False

    def query(self) -> bool:
        return self.over


@pytest.fixture
def lane(monkeypatch: pytest.MonkeyPatch) -> CudaLane:
    """A lane in whose eyes pinned memory is whatever begins with a 1."""
    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: bool(self.flatten()[0] == 1))
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))
    return CudaLane(torch.device("cuda:0"))


def tiles(first: int, count: int = 4) -> Any:
    array = np.full((count, 8, 8, 3), 9, np.uint8)
    array[:, 0, 0, 0] = first
    return array


def test_pinned_tiles_are_not_copied_and_kept_until_they_have_crossed(lane: CudaLane) -> None:
    mine = tiles(1)
    for part in (mine, mine[2:]):
        there, _ = lane._pinned(part)
        assert np.shares_memory(there.numpy(), mine)
        np.testing.assert_array_equal(there.numpy(), part)
    assert not lane.staging
    assert len(lane._leaving) == 2
    lane._leaving[0][1].over = True  # type: ignore[attr-defined]
    lane._pinned(tiles(1))
    assert [bool(np.shares_memory(kept.numpy(), mine)) for kept, _ in lane._leaving] == [True, False]
    lane.release()
    assert len(lane._leaving) == 2, "these are on their way"
    for _, event in lane._leaving:
        event.over = True  # type: ignore[attr-defined]
    lane.release()
    assert not lane._leaving


def test_where_no_memory_can_be_pinned_tiles_are_made_elsewhere(
    lane: CudaLane, monkeypatch: pytest.MonkeyPatch
) -> None:
    def empty(*size: Any, **options: Any) -> Any:
        raise RuntimeError("CUDA error: out of memory")

    assert lane.new_tiles((2, 3, 4, 3)).shape == (2, 3, 4, 3)
    monkeypatch.setattr(torch, "empty", empty)
    made = lane.new_tiles((2, 3, 4, 3))
    assert made.shape == (2, 3, 4, 3)
    assert made.dtype == np.uint8


def test_other_tiles_are_copied_into_a_buffer_that_is_free(lane: CudaLane) -> None:
    read_only = tiles(1)
    read_only.flags.writeable = False
    for wrong in (tiles(0), tiles(1)[:, ::2], read_only):
        there, _ = lane._pinned(wrong)
        assert not np.shares_memory(there.numpy(), wrong)
        np.testing.assert_array_equal(there.numpy(), wrong)
    assert len(lane.staging) == 3, "none of them has crossed"
    lane.staging[1][1].over = True  # type: ignore[attr-defined]
    lane._pinned(tiles(0, count=2))
    assert len(lane.staging) == 3, "the one that has crossed was taken again"
    assert not lane._leaving
