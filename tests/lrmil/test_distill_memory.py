"""Targets that do not fit into memory: the shelf, the linear map from sums, and how much is held at once."""

from __future__ import annotations

import dataclasses
import errno
import os
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lrmil.distill import DistillSettings
from lrmil.distill import evaluate as evaluate_module
from lrmil.distill import train as train_module
from lrmil.distill.children import ChildMap
from lrmil.distill.evaluate import RunningAgreement, child_targets, final_target, linear_baseline, mean_baseline
from lrmil.distill.feed import Feed
from lrmil.distill.pixels import PixelBatch
from lrmil.distill.ridge import RIDGE
from lrmil.distill.shelf import Shelf
from lrmil.distill.targets import DistillSlide, TargetStats, target_stats, uniform_weights
from lrmil.distill.train import Runner
from wsi_pipe.encoders.recipe import Preprocessing
from wsi_pipe.errors import OutputError
from wsi_pipe.geometry import TileGrid, TileSpec

CPU = torch.device("cpu")
MIB = 1 << 20


def test_the_shelf_gives_back_what_was_put(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = [
        rng.normal(size=shape).astype(dtype)
        for shape, dtype in [((7, 3), "f4"), ((50, 5), "f2"), ((400, 9), "f2"), ((3, 1), "f8"), ((0, 4), "f2")] * 3
    ]
    shelf = Shelf(tmp_path / "scratch", 200, chunk_bytes=4000)
    kept = [shelf.put(array) for array in arrays]
    shelf.close()
    assert kept[0] is arrays[0]
    assert shelf.memory_bytes <= 200
    assert shelf.memory_bytes + shelf.file_bytes == sum(array.nbytes for array in arrays)
    assert sum(one is other for one, other in zip(kept, arrays, strict=True)) < 8
    for one, other in zip(kept, arrays, strict=True):
        assert one.dtype == other.dtype
        assert np.array_equal(one, other)
        assert one is other or not one.flags.writeable
    # The files have no name: nothing is left, whatever happens to the process.
    assert list((tmp_path / "scratch").iterdir()) == []


def test_what_fits_makes_no_file(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "scratch", 1000)
    array = np.zeros(250, np.float32)
    assert shelf.put(array) is array
    assert not (tmp_path / "scratch").exists()
    assert shelf.put(array) is not array
    shelf.close()


def test_a_shelf_without_room_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutputError, match="scratch file") as caught:
        Shelf(tmp_path / "file", 0).put(np.zeros(3))
    assert "targets_mib" in str(caught.value.remedy)


@pytest.mark.parametrize(
    "go_on", [lambda shelf: shelf.put(np.zeros(4096, np.uint8)), Shelf.close], ids=["next file", "end"]
)
def test_a_disk_that_is_found_full_later_is_told(
    go_on: Callable[[Shelf], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As over NFS, where writing itself succeeds."""

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    shelf = Shelf(tmp_path, 0, chunk_bytes=4096)
    shelf.put(np.zeros(4096, np.uint8))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"scratch file: No space left.*targets_mib"):
        go_on(shelf)
    shelf.close()


def slide(
    number: int, tiles: int, dims: Sequence[int], keep: Callable[[NDArray[Any]], NDArray[Any]] = lambda array: array
) -> DistillSlide:
    """A slide with ``tiles`` LR tiles of 2 x 2 children, some absent, whose targets partly follow from LR features."""
    rng = np.random.default_rng(number)
    children = np.arange(4 * tiles).reshape(tiles, 4)
    children[rng.uniform(size=children.shape) < 0.2] = -1
    children[:, 3] = np.where(children[:, 0] < 0, 4 * np.arange(tiles) + 3, children[:, 3])
    rows = ChildMap(2, np.arange(tiles), children)
    inputs = np.hstack([rng.normal(size=(tiles, 5)), np.full((tiles, 1), 0.3)])
    where = np.repeat(np.arange(tiles), 4)
    mixing = np.random.default_rng(99)
    values = []
    for dim in dims:
        signal = inputs[where] @ mixing.normal(size=(6, dim))
        values.append(keep((signal + rng.normal(size=signal.shape) + 4).astype(np.float16)))
    cells = np.array([(i, 0) for i in range(tiles)], np.int32)
    side = (256.0, 256.0)
    lr = TileGrid(TileSpec(2.0, 64), (2.0, 2.0), (0.0, 0.0), side, side, cells, np.ones(tiles, np.float32), None)
    return DistillSlide(
        f"s{number}", f"c{number}", "", (0.5, 0.5), lr, rows, tuple(values[:-1]), values[-1], uniform_weights(rows),
        inputs.astype(np.float32),
    )  # fmt: skip


def joined_baseline(
    train: Sequence[DistillSlide], val: Sequence[DistillSlide], stats: TargetStats, seed: int
) -> dict[str, tuple[float, float]]:
    """The linear baseline worked out on everything at once, errors of the penalties from their residuals."""
    inputs = np.concatenate([np.asarray(s.baseline, np.float64) for s in train])
    mean, std = inputs.mean(0), inputs.std(0)
    std[std == 0] = 1

    def of(slides: Sequence[DistillSlide]) -> NDArray[np.float64]:
        scaled = [(np.asarray(s.baseline, np.float64) - mean) / std for s in slides]
        return np.hstack([np.concatenate(scaled), np.ones((sum(map(len, slides)), 1))])

    def fit(x: NDArray[Any], y: NDArray[Any], penalty: float) -> NDArray[np.float64]:
        strength = penalty * np.trace(x.T @ x) / x.shape[1]
        regular = strength * np.diag([*np.ones(x.shape[1] - 1), 1e-9])
        return np.linalg.solve(x.T @ x + regular, x.T @ y)

    def ridge(x: NDArray[Any], y: NDArray[Any], apart: NDArray[np.bool_]) -> NDArray[np.float64]:
        y = y.astype(np.float64)
        errors = [((x[apart] @ fit(x[~apart], y[~apart], p) - y[apart]) ** 2).sum() for p in RIDGE]
        chosen.append(int(np.argmin(errors)))
        return fit(x, y, RIDGE[chosen[-1]])

    ids = list(dict.fromkeys(s.slide_id for s in train))
    order = np.random.default_rng(seed).permutation(len(ids))
    out = {ids[i] for i in order[: max(len(ids) // 6, 1)]}
    held = np.concatenate([np.full(len(s), s.slide_id in out) for s in train])
    if len(ids) == 1:
        held = np.arange(len(held)) % 6 == 0
    x_train, x_val = of(train), of(val)
    found = {}
    for layer in range(len(train[0].layers)):
        (y, m), (y_val, m_val) = (
            [np.concatenate(part) for part in zip(*(child_targets(s, layer) for s in slides), strict=True)]
            for slides in (train, val)
        )
        running = RunningAgreement(stats.layer_centre[layer], stats.layer_std[layer])
        for place in range(4):
            rows, wanted = m[:, place], m_val[:, place]
            running.add(x_val[wanted] @ ridge(x_train[rows], y[rows, place], held[rows]), y_val[wanted, place])
        found[f"layer{layer}"] = dataclasses.astuple(running.result())
    running = RunningAgreement(stats.final_centre, stats.final_std)
    weights = ridge(x_train, np.concatenate([final_target(s) for s in train]), held)
    running.add(x_val @ weights, np.concatenate([final_target(s) for s in val]))
    return found | {"final": dataclasses.astuple(running.result())}


chosen: list[int] = []


@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize("standardise", [True, False])
def test_the_linear_baseline_is_that_of_all_slides_at_once(
    monkeypatch: pytest.MonkeyPatch, count: int, standardise: bool
) -> None:
    # Blocks that end within slides, and a single slide cut into several grids.
    monkeypatch.setattr(evaluate_module, "BLOCK_TILES", 7)
    train = [slide(i, 20 + i, (4, 6, 5)) for i in range(max(count, 3))]
    if count == 1:
        train = [dataclasses.replace(one, slide_id="s0") for one in train]
    val = [slide(100 + i, 15, (4, 6, 5)) for i in range(3)]
    stats = target_stats(train, standardise=standardise)
    chosen.clear()
    expected = joined_baseline(train, val, stats, 2)
    # Not all maps take the same penalty, so that the choice is put to the test.
    assert len(set(chosen)) > 1
    found = linear_baseline(train, val, stats, 2)
    assert found.keys() == expected.keys()
    for name, figures in expected.items():
        assert dataclasses.astuple(found[name]) == pytest.approx(figures, rel=1e-9), name
        assert 0.2 < figures[0] < 1


class _Source:
    """In the place of a PixelSource: grey tiles of one pixel."""

    def __init__(self, slides: Sequence[DistillSlide]) -> None:
        self.slides = slides

    def in_order(self) -> Any:
        for i, one in enumerate(self.slides):
            for start in range(0, len(one), 16):
                tiles = np.arange(start, min(start + 16, len(one)))
                zeros = np.zeros(len(tiles), np.int64)
                yield PixelBatch(np.zeros((len(tiles), 1, 1, 3), np.uint8), zeros + i, tiles, zeros)


class _Student(torch.nn.Module):
    """Gives zeros."""

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, images: torch.Tensor) -> Any:
        from lrmil.distill.student import StudentOutput

        n = len(images)
        *layers, final = self.dims
        return StudentOutput(torch.zeros(n, 1), torch.zeros(n, final), tuple(torch.zeros(n, 4, d) for d in layers))


def peak_mib(work: Callable[[], object]) -> float:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1] / MIB
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_no_more_than_a_slide_is_in_memory_beyond_the_limit(tmp_path: Path) -> None:
    dims, tiles, count = (64, 64), 400, 40
    size = count * 4 * tiles * sum(dims) * 2 / MIB
    assert size > 15
    figures: dict[float, Any] = {}
    grey = Preprocessing(None, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

    def work(limit_mib: float) -> None:
        with closing(Shelf(tmp_path, int(limit_mib * MIB))) as shelf:
            slides = [slide(i, tiles, dims, shelf.put) for i in range(count)]
        train, val = slides[: count // 2], slides[count // 2 :]
        stats = target_stats(train, standardise=False)
        run = Runner(_Student(dims), grey, CPU, torch.float32)  # type: ignore[arg-type]
        feed = Feed(_Source(val), stats, CPU)  # type: ignore[arg-type]
        validated = train_module._validate(run, feed, feed, DistillSettings())
        figures[limit_mib] = (validated, linear_baseline(train, val, stats), mean_baseline(val, stats))

    work(size)  # what is imported and kept on first use
    peaks = {limit: peak_mib(lambda limit=limit: work(limit)) for limit in (2 * size, 1.0)}  # type: ignore[misc]
    assert peaks[2 * size] > size
    # A slide's targets in float64 are 2.5 MiB.
    assert peaks[1.0] < 0.5 * size
    assert peaks[1.0] < peaks[2 * size] - 0.8 * size
    assert figures[1.0] == figures[2 * size]
