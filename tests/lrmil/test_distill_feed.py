"""Batches made ahead: the thread, and pixels and targets against plain loops."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from lrmil.distill import DistillSettings
from lrmil.distill import train as train_module
from lrmil.distill.ahead import run_ahead
from lrmil.distill.children import ChildMap, child_map, turn
from lrmil.distill.feed import Feed
from lrmil.distill.pixels import PixelBatch
from lrmil.distill.student import Student, StudentOutput
from lrmil.distill.targets import DistillSlide, TargetStats, target_stats, uniform_weights
from lrmil.distill.train import distill
from lrmil.distill.validation import DeviceJudge, HostJudge, Judge, judges_for
from wsi_pipe.encoders.loading import build_random
from wsi_pipe.encoders.recipe import Preprocessing, Recipe
from wsi_pipe.geometry import TileGrid, TileSpec

CPU = torch.device("cpu")
GREY = Preprocessing(None, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "lrmil-ahead"]


def soon(condition: Any) -> bool:
    end = time.monotonic() + 30
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_items_come_in_order_and_no_thread_is_left(depth: int) -> None:
    assert list(run_ahead(iter(range(50)), depth)) == list(range(50))
    assert not threads()
    with pytest.raises(ValueError, match="at least 0"):
        run_ahead(iter([1]), -1)


def test_the_thread_works_ahead_but_not_further_than_asked() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(100):
            made.append(i)
            yield i

    with closing(run_ahead(items(), 3)) as found:
        assert next(found) == 0
        # Item 0 is out, three wait, one is held until there is room.
        assert soon(lambda: len(made) == 5)
        time.sleep(0.3)
        assert len(made) == 5
        assert next(found) == 1
        assert soon(lambda: len(made) == 6)
    assert not threads()
    assert len(made) <= 7


@pytest.mark.parametrize("depth", [0, 2])
def test_what_an_item_raises_is_raised_in_its_place(depth: int) -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError("a slide cannot be read")

    found = run_ahead(items(), depth)
    assert [next(found), next(found)] == [1, 2]
    with pytest.raises(OSError, match="a slide cannot be read"):
        next(found)
    assert not threads()


def test_leaving_early_ends_the_thread_and_what_it_reads_from() -> None:
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            yield from range(1000)
        finally:
            closed.set()

    with closing(run_ahead(items(), 2)) as found:
        assert [next(found) for _ in range(4)] == [0, 1, 2, 3]
        assert len(threads()) == 1
    assert not threads()
    assert soon(closed.is_set)


def slide(number: int, k: int, tiles: int, dims: Sequence[int], dtype: Any) -> DistillSlide:
    """A slide of ``tiles`` LR tiles in a row, a quarter of their children absent, with random targets and weights."""
    rng = np.random.default_rng(number)
    lr_cells = np.array([(c, 0) for c in range(tiles)], np.int32)
    every = np.array([(c, r) for r in range(k) for c in range(tiles * k)], np.int32)
    hr_cells = rng.permutation(every)[: len(every) * 3 // 4]

    def grid(mpp: float, cells: Any, above: Any) -> TileGrid:
        side = 64 * mpp / 0.5
        ones = np.ones(len(cells), np.float32)
        return TileGrid(TileSpec(mpp, 64), (mpp, mpp), (0.0, 0.0), (side, side), (side, side), cells, ones, above)

    lr, hr = grid(0.5 * k, lr_cells, None), grid(0.5, hr_cells, (hr_cells[:, 0] // k).astype(np.int32))
    children: ChildMap = child_map(lr, hr, "slide")
    *layers, final = (rng.normal(3, 2, (len(hr), dim)).astype(dtype) for dim in dims)
    weights = uniform_weights(children) * rng.uniform(0.5, 1, (len(children.rows), k * k)).astype(np.float32)
    return DistillSlide(
        f"s{number}", f"c{number}", "", (0.5, 0.5), lr.take(children.rows), children, tuple(layers) or (final,), final,
        weights,
    )  # fmt: skip


class Source:
    """In the place of a PixelSource: random tiles, no slides to read."""

    def __init__(self, slides: Sequence[DistillSlide], settings: DistillSettings, ranks: Any = None) -> None:
        self.slides, self.settings = list(slides), settings

    def __len__(self) -> int:
        return sum(map(len, self.slides))

    def shuffled(self, seed: Sequence[int]) -> Iterator[PixelBatch]:
        rng = np.random.default_rng(seed)
        pairs = rng.permutation([(i, j) for i, one in enumerate(self.slides) for j in range(len(one))])
        for start in range(0, len(pairs), self.settings.batch_size):
            part = pairs[start : start + self.settings.batch_size]
            pixels = rng.integers(0, 256, (len(part), 64, 64, 3), np.uint8)
            yield PixelBatch(pixels, part[:, 0], part[:, 1], rng.integers(0, 8, len(part)))

    def in_order(self) -> Iterator[PixelBatch]:
        for i, one in enumerate(self.slides):
            n = len(one)
            pixels = np.random.default_rng(i).integers(0, 256, (n, 64, 64, 3), np.uint8)
            yield PixelBatch(pixels, np.full(n, i), np.arange(n), np.zeros(n, np.int64))


@pytest.mark.parametrize("dims", [(5, 7, 6), (6,)])
@pytest.mark.parametrize("standardise", [False, True])
def test_targets_are_turned_scaled_and_0_without_a_child(dims: tuple[int, ...], standardise: bool) -> None:
    k = 3
    # As after jittering: stored in one precision and computed in another.
    slides = [slide(i, k, 4 + i, dims, np.float16 if i else np.float32) for i in range(3)]
    stats = target_stats(slides, standardise=standardise)
    settings = DistillSettings(batch_size=4)
    batches = {a: list(Feed(Source(slides, settings), stats, CPU, ahead=a).shuffled([1])) for a in (0, 2)}  # type: ignore[arg-type]
    expected = list(Source(slides, settings).shuffled([1]))
    assert len(batches[0]) == len(expected) == 4
    scales = [*zip(stats.layer_mean, stats.layer_std, strict=True), (stats.final_mean, stats.final_std)]
    for source, batch, same in zip(expected, batches[0], batches[2], strict=True):
        for got, tile, symmetry in zip(batch.pixels.numpy(), source.pixels, source.symmetry, strict=True):
            # Each channel as a map of 64 x 64 children.
            wanted_px = turn(tile.transpose(2, 0, 1).reshape(3, -1), 64, int(symmetry))
            assert np.array_equal(got, wanted_px.reshape(3, 64, 64).transpose(1, 2, 0))
        found = [*batch.targets.layers, batch.targets.final]
        assert len(found) == len(dims) + (len(dims) == 1)
        for one, again in zip(found, [*same.targets.layers, same.targets.final], strict=True):
            assert one.dtype == torch.float32
            assert torch.equal(one, again)
        for b, (i, tile, symmetry) in enumerate(zip(source.slide, source.tile, source.symmetry, strict=True)):
            rows = turn(slides[i].children.children[tile], k, int(symmetry))
            assert batch.targets.mask[b].tolist() == (rows >= 0).tolist()
            assert batch.targets.weights[b].tolist() == turn(slides[i].weights[tile], k, int(symmetry)).tolist()
            stored = [*slides[i].layers, slides[i].final]
            for values, data, (mean, std) in zip(found, stored, scales, strict=True):
                for place, row in enumerate(rows):
                    wanted = (data[row].astype(np.float32) - mean) / std if row >= 0 else np.zeros_like(mean)
                    assert np.array_equal(values[b, place].numpy(), wanted)


def small_run(monkeypatch: pytest.MonkeyPatch, **feed: Any) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    slides = [slide(i, 4, 6, (5, 7), np.float16) for i in range(4)]
    stats = target_stats(slides, standardise=False)
    monkeypatch.setattr(train_module, "PixelSource", Source)
    monkeypatch.setattr(train_module, "Feed", partial(Feed, **feed))
    settings = DistillSettings(epochs=2, batch_size=5, patience=9, device="cpu")
    return run_on(slides, stats, settings)


def run_on(
    slides: Sequence[DistillSlide], stats: TargetStats, settings: DistillSettings
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    net = build_random(Recipe("test_resnet", 96, GREY, "model", {}), "test_resnet")
    student = Student(net, blocks=[], layer_dims=[5], final_dim=7, k=4, side_px=64)
    history = distill(
        student, GREY, slides[:3], slides[3:], stats, settings, device=CPU, precision=torch.float32
    )  # fmt: skip
    return history.epochs, student.state_dict()


def test_training_is_the_same_with_batches_made_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    figures, weights = small_run(monkeypatch, ahead=0)
    again, others = small_run(monkeypatch, ahead=2)
    assert figures == again
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert figures[1]["loss"] < figures[0]["loss"]
    assert not threads()


def test_an_interrupted_step_ends_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def interrupted(*args: Any) -> torch.Tensor:
        calls.append(len(threads()))
        raise KeyboardInterrupt

    monkeypatch.setattr(train_module, "losses_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small_run(monkeypatch, ahead=2)
    assert calls == [1]
    assert not threads()


@pytest.mark.parametrize("standardise", [False, True])
def test_agreement_on_the_device_is_that_of_numpy(standardise: bool) -> None:
    slides = [slide(i, 3, 5 + i, (5, 7, 6), np.float16) for i in range(3)]
    weights = [one.weights / one.weights.sum(1, keepdims=True) for one in slides]
    slides = [dataclasses.replace(one, weights=w) for one, w in zip(slides, weights, strict=True)]
    stats = target_stats(slides, standardise=standardise)
    feed = Feed(Source(slides, DistillSettings()), stats, CPU)  # type: ignore[arg-type]
    judges: list[Judge] = [HostJudge(feed.lessons[0]), DeviceJudge(feed.lessons[0], CPU)]
    assert [type(judge) for judge in judges_for(feed)] == [HostJudge]
    assert np.isnan([*judges[1].figures().values()]).all()
    torch.manual_seed(0)
    for batch in feed.in_order():
        targets = batch.targets
        # Right but for noise; what stands at absent children does not count.
        patches = tuple((t + 0.5 * torch.randn_like(t)).where(targets.mask[..., None], 1e3) for t in targets.layers)
        final = targets.final.mean(1) + torch.randn(len(targets.mask), 6)
        for judge in judges:
            judge.add(StudentOutput(final, final, patches), batch)
    host, device = (judge.figures() for judge in judges)
    assert host.keys() == device.keys()
    for name, value in host.items():
        assert device[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert 0.5 < host["layer0_explained_variance"] < 0.99


def test_the_loss_of_an_epoch_is_the_mean_over_tiles() -> None:
    losses = train_module._LossSum(CPU)
    assert losses.mean() == 0
    values = np.random.default_rng(0).uniform(0, 3, 40).astype(np.float32)
    for n, value in enumerate(values, start=1):
        losses.add(torch.tensor(value, requires_grad=True), n)
    expected = 0.0
    for n, value in enumerate(values, start=1):
        expected += float(value) * n
    assert losses.mean() == expected / sum(range(1, 41))
