"""Stopping: no further batch begins, what is encoded is kept, and the next run goes on at the same boundaries."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from wsi_pipe.bag import read_bag
from wsi_pipe.care import job_status
from wsi_pipe.config import ExtractSettings, JobSettings, TileSettings
from wsi_pipe.encoders.base import EncoderInfo
from wsi_pipe.errors import WorkerError
from wsi_pipe.execute import KillableWorker
from wsi_pipe.extract import ExtractItem, SlideFeatures, SlidePart, extract_features
from wsi_pipe.extract.lines import ByteQueue, StoppedError
from wsi_pipe.geometry import TileGrid, TileSpec
from wsi_pipe.job import open_job
from wsi_pipe.job.partial import half_done
from wsi_pipe.job.run import process
from wsi_pipe.manifest import collect_slides
from wsi_pipe.slides.array import ArraySlide
from wsi_pipe.stopping import StopRequested, belongs_to

MakeSlide = Callable[..., Path]
TILE = 32


def strip(count: int) -> TileGrid:
    """Tiles side by side."""
    side = (float(TILE), float(TILE))
    cells = np.stack([np.arange(count), np.zeros(count)], 1).astype(np.int32)
    return TileGrid(TileSpec(2.0, TILE), (2.0, 2.0), (0.0, 0.0), side, side, cells, np.ones(count, np.float32))


def item(name: str, seed: int, tiles: int, encoders: Sequence[str], parts: Any = None) -> ExtractItem:
    pixels = np.random.default_rng(seed).integers(0, 256, (TILE, TILE * tiles, 3), dtype=np.uint8)

    def opened() -> ArraySlide:
        return ArraySlide([pixels], mpp=2.0, block_px=(TILE, TILE))

    return ExtractItem(name, opened, [strip(tiles)], {"5x": encoders}, parts or {})


class Ready:
    def __init__(self, values: NDArray[np.float32]) -> None:
        self.values = values

    def result(self) -> NDArray[np.float32]:
        return self.values


class Company:
    """An encoder whose features say which tiles were in the batch: other boundaries give other bytes.

    stop: set while batch number ``at`` is computed.
    """

    def __init__(
        self, name: str, batch: int, stop: threading.Event | None = None, at: int = 0, in_flight: int = 1
    ) -> None:
        self.info = EncoderInfo(name, name, 2, "0" * 64, "CC0-1.0")
        self.shares_batches = False
        self.in_flight = in_flight
        self.batch, self.stop, self.at = batch, stop, at
        self.batches: list[int] = []

    def suggest_batch(self, tile_px: int) -> int:
        return self.batch

    def encode(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self.submit(tiles).result()

    def submit(self, tiles: NDArray[np.uint8]) -> Ready:
        self.batches.append(len(tiles))
        if self.stop is not None and len(self.batches) == self.at:
            self.stop.set()
        own = tiles.astype(np.float64).mean((1, 2, 3))
        return Ready(np.stack([own, own + own.sum() * len(tiles)], 1).astype(np.float32))


def run(items: Sequence[ExtractItem], encoders: dict[str, Any], **options: Any) -> dict[str, SlideFeatures]:
    results = extract_features(iter(items), encoders, dtype="float32", read_threads=1, **options)
    return {result.slide_id: result for result in results if isinstance(result, SlideFeatures)}


def stopped_run(items: Sequence[ExtractItem], encoders: dict[str, Any], stop: threading.Event) -> list[SlidePart]:
    kept: list[SlidePart] = []
    with belongs_to(stop), pytest.raises(StopRequested):
        run(items, encoders, keep=kept.append)
    return kept


def test_a_queue_that_is_stopped_hands_out_nothing_of_what_waits() -> None:
    stop = threading.Event()
    queue = ByteQueue(1 << 20, stop)
    for number in range(5):
        queue.put(number, 10)
    assert queue.get() == 0
    stop.set()
    with pytest.raises(StoppedError):
        queue.get()


@pytest.mark.parametrize("in_flight", [1, 3])
def test_no_further_batch_begins(in_flight: int) -> None:
    stop = threading.Event()
    encoder = Company("one", 4, stop, at=3, in_flight=in_flight)
    (part,) = stopped_run([item("a", 1, 400, ["one"])], {"one": encoder}, stop)
    assert encoder.batches == [4, 4, 4]
    # The batch that was under way when the word came is not thrown away.
    assert part.rows["5x"]["one"].index.tolist() == list(range(12))


@pytest.mark.parametrize(("tiles", "at"), [(40, 1), (40, 2), (40, 3), (40, 6), (97, 1), (97, 4), (97, 9), (97, 13)])
def test_what_is_continued_is_byte_for_byte_what_an_undisturbed_run_gives(tiles: int, at: int) -> None:
    """Two encoders whose batches do not divide one another, so that what is left over of one read fills up later."""

    def both(stop: threading.Event | None = None) -> dict[str, Any]:
        return {"large": Company("large", 16, stop, at), "odd": Company("odd", 6)}

    whole = run([item("a", 1, tiles, ["large", "odd"])], both())["a"]
    stop = threading.Event()
    encoders = both(stop)
    encoders["odd"].stop, encoders["odd"].at = stop, at
    (part,) = stopped_run([item("a", 1, tiles, ["large", "odd"])], encoders, stop)
    again = both()
    done = run([item("a", 1, tiles, ["large", "odd"], part.rows)], again)["a"]
    for name in ("large", "odd"):
        np.testing.assert_array_equal(done.features["5x"][name], whole.features["5x"][name])
        kept = part.rows["5x"][name].index if name in part.rows["5x"] else []
        assert sum(again[name].batches) == tiles - len(kept)
    assert part.tiles > 0


def test_other_batches_than_those_of_the_run_before_begin_anew() -> None:
    stop = threading.Event()
    (part,) = stopped_run([item("a", 1, 60, ["one"])], {"one": Company("one", 4, stop, at=3)}, stop)
    whole = run([item("a", 1, 60, ["one"])], {"one": Company("one", 8)})["a"]
    other = Company("one", 8)
    done = run([item("a", 1, 60, ["one"], part.rows)], {"one": other})["a"]
    np.testing.assert_array_equal(done.features["5x"]["one"], whole.features["5x"]["one"])
    assert sum(other.batches) == 60


def test_a_slide_that_was_complete_but_not_taken_is_kept_whole() -> None:
    results = extract_features(
        iter([item("a", 1, 12, ["one"]), item("b", 2, 400, ["one"])]),
        {"one": Company("one", 4)},
        dtype="float32",
        keep=(kept := []).append,
    )
    first = next(results)
    results.close()
    assert first.slide_id == "a"
    # What the caller may not have finished with is handed out once more; nothing of it need be computed again.
    (part,) = [part for part in kept if part.slide_id == "a"]
    again = Company("one", 4)
    done = run([item("a", 1, 12, ["one"], part.rows)], {"one": again})["a"]
    assert again.batches == []
    assert isinstance(first, SlideFeatures)
    np.testing.assert_array_equal(done.features["5x"]["one"], first.features["5x"]["one"])


def test_progress_counts_what_is_there_already() -> None:
    stop = threading.Event()
    (part,) = stopped_run([item("a", 1, 40, ["one"])], {"one": Company("one", 4, stop, at=3)}, stop)
    seen: list[int] = []
    run([item("a", 1, 40, ["one"], part.rows)], {"one": Company("one", 4)}, progress=lambda *what: seen.append(what[2]))
    assert (seen[0], sum(seen)) == (12, 40)


def test_a_device_that_hangs_is_not_waited_for() -> None:
    stop, hangs, go_on = threading.Event(), threading.Event(), threading.Event()

    class Hanging(Company):
        def submit(self, tiles: NDArray[np.uint8]) -> Ready:
            if len(self.batches) == 2:
                hangs.set()
                go_on.wait(60)
            return super().submit(tiles)

    threading.Thread(target=lambda: (hangs.wait(60), stop.set()), daemon=True).start()
    try:
        (part,) = stopped_run([item("a", 1, 40, ["one"])], {"one": Hanging("one", 4)}, stop)
    finally:
        go_on.set()
    assert part.rows["5x"]["one"].index.tolist() == list(range(8))


# ---------------------------------------------------------------- a job


@pytest.fixture
def slides(tmp_path: Path, make_slide: MakeSlide, tissue_picture: Any) -> Path:
    for seed in range(2):
        make_slide(tmp_path / "in" / f"s{seed}.svs", picture=tissue_picture(900, 800, seed=seed))
    return tmp_path / "in"


SETTINGS = JobSettings(
    tile=TileSettings(tile_px=64), extract=ExtractSettings(encoders={"*": ("texture",)}, batch_size=8)
)


class Texture:
    """The real encoder; ``stop`` is set while batch number ``at`` is computed."""

    def __init__(self, stop: threading.Event | None = None, at: int = 0) -> None:
        from wsi_pipe.encoders import load_encoder

        self.real: Any = load_encoder("texture")
        self.info, self.in_flight, self.batches = self.real.info, 1, 0
        self.stop, self.at = stop, at

    def submit(self, tiles: NDArray[np.uint8]) -> Any:
        self.batches += 1
        if self.stop is not None and self.batches == self.at:
            self.stop.set()
        return self.real.submit(tiles)


def job_of(slides: Path, root: Path, encoder: Any) -> list[str]:
    entries = collect_slides([str(slides)])
    paths = open_job(root, SETTINGS, entries)
    return [outcome.status for outcome in process(entries, SETTINGS, paths, encoders={"texture": encoder})]


def features(root: Path) -> dict[str, bytes]:
    return {
        f"{path.stem} {level.grid.label}": level.features["texture"].values.tobytes()
        + b"".join(measure.values.tobytes() for _, measure in sorted(level.quality.items()))
        for path in sorted((root / "bags").glob("*.h5"))
        for level in read_bag(path).levels
    }


def stop_job(slides: Path, root: Path, at: int) -> Texture:
    stop = threading.Event()
    encoder = Texture(stop, at)
    with belongs_to(stop), pytest.raises(StopRequested):
        job_of(slides, root, encoder)
    return encoder


def test_the_next_run_of_a_job_continues_a_half_done_slide(slides: Path, tmp_path: Path) -> None:
    whole = Texture()
    assert job_of(slides, tmp_path / "whole", whole) == ["done", "done"]
    assert whole.batches > 6
    job = tmp_path / "job"
    assert stop_job(slides, job, at=3).batches == 3
    paths = open_job(job, SETTINGS, collect_slides([str(slides)]))
    assert half_done(paths) == ["s0"]
    # With the grids that the part belongs to, so that other settings of the next call are seen.
    assert [path.name for path in sorted((job / "tiles").iterdir())] == ["s0.h5"]
    assert job_status(job).half_done == 1
    again = Texture()
    assert job_of(slides, job, again) == ["done", "done"]
    assert again.batches == whole.batches - 3
    assert features(job) == features(tmp_path / "whole")
    assert not (job / "partial").exists()


class Other(Texture):
    """The same under another name."""

    def __init__(self, stop: threading.Event | None = None, at: int = 0) -> None:
        super().__init__(stop, at)
        self.info = dataclasses.replace(self.info, name="other", slug="other")


def job_with(slides: Path, root: Path, **encoders: Any) -> list[str]:
    extract = dataclasses.replace(SETTINGS.extract, encoders={"*": tuple(encoders)})
    settings = dataclasses.replace(SETTINGS, extract=extract)
    entries = collect_slides([str(slides)])
    return [
        outcome.status for outcome in process(entries, settings, open_job(root, settings, entries), encoders=encoders)
    ]


def test_what_is_kept_of_one_encoder_outlives_a_run_of_another(slides: Path, tmp_path: Path) -> None:
    whole = Other()
    assert job_with(slides, tmp_path / "whole", other=whole) == ["done", "done"]
    job = tmp_path / "job"
    for first, encoder in ((True, Other), (False, Texture)):
        # The second is stopped as well: what it keeps does not take the place of what the first kept.
        stop = threading.Event()
        with belongs_to(stop), pytest.raises(StopRequested):
            job_with(slides, job, **{"other" if first else "texture": encoder(stop, 3)})
    assert job_with(slides, job, texture=Texture()) == ["done", "done"]
    assert job_status(job).half_done == 1
    again = Other()
    assert job_with(slides, job, other=again) == ["done", "done"]
    assert again.batches == whole.batches - 3
    for bag in sorted((job / "bags").glob("*.h5")):
        levels = zip(read_bag(bag).levels, read_bag(tmp_path / "whole/bags" / bag.name).levels, strict=True)
        for level, expected in levels:
            assert set(level.features) == {"texture", "other"}
            assert level.features["other"].values.tobytes() == expected.features["other"].values.tobytes()
    assert not (job / "partial").exists()


def test_what_is_kept_of_grids_that_are_laid_anew_goes(slides: Path, tmp_path: Path) -> None:
    job = tmp_path / "job"
    stop = threading.Event()
    with belongs_to(stop), pytest.raises(StopRequested):
        job_with(slides, job, other=Other(stop, 3))
    settings = dataclasses.replace(SETTINGS, tile=dataclasses.replace(SETTINGS.tile, min_tissue=0.9), redo=True)
    entries = collect_slides([str(slides)])
    outcomes = process(entries, settings, open_job(job, settings, entries), encoders={"texture": Texture()})
    assert [outcome.status for outcome in outcomes] == ["done", "done"]
    assert not (job / "partial").exists()


@pytest.mark.parametrize("harm", ["cut", "flip", "foreign", "other slide", "deep"])
def test_a_part_that_is_not_whole_or_of_something_else_counts_for_nothing(
    slides: Path, tmp_path: Path, harm: str
) -> None:
    assert job_of(slides, tmp_path / "whole", Texture()) == ["done", "done"]
    job = tmp_path / "job"
    stop_job(slides, job, at=3)
    path = job / "partial" / "s0.npz"
    raw = bytearray(path.read_bytes())
    if harm == "cut":
        path.write_bytes(raw[: len(raw) // 2])
    elif harm == "flip":
        for at in range(len(raw) // 2, len(raw) // 2 + 8):
            raw[at] ^= 0x10
        path.write_bytes(raw)
    elif harm == "foreign":
        path.write_bytes(b"not ours")
    elif harm == "deep":
        np.savez(path, about=np.frombuffer(b"[" * 100_000, np.uint8))
    else:
        with np.load(path) as arrays:
            values = dict(arrays)
        about = json.loads(values["about"].tobytes())
        about["rows"][0]["fingerprint"] = "0" * 64
        values["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
        np.savez(path, **values)
    assert job_of(slides, job, Texture()) == ["done", "done"]
    assert features(job) == features(tmp_path / "whole")


def until_stopped(folder: str) -> None:
    """Works until told to stop, and puts something by."""
    Path(folder, "begun").touch()
    try:
        threading.Event().wait(60)
    finally:
        Path(folder, "kept").touch()


def test_processes_have_a_moment_to_put_by_what_they_have(tmp_path: Path) -> None:
    worker, stop = KillableWorker(), threading.Event()

    def stop_once_begun() -> None:
        while not (tmp_path / "begun").exists():
            threading.Event().wait(0.05)
        stop.set()

    thread = threading.Thread(target=stop_once_begun, daemon=True)
    thread.start()
    with pytest.raises(WorkerError, match="stopped"):
        worker.call(until_stopped, str(tmp_path), None, stop)
    assert (tmp_path / "kept").exists()
