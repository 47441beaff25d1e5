"""Extraction: every row in its place whatever shares a batch, slides that fail alone, threads that end."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from wsi_pipe.config import ExtractSettings, JobSettings
from wsi_pipe.encoders import load_encoder
from wsi_pipe.encoders.base import EncoderInfo, check_finite
from wsi_pipe.errors import ConfigError, DeviceError, EncoderOutputError, ResolutionError, SlideReadError
from wsi_pipe.extract import ExtractItem, SlideFailure, SlideFeatures, extract_features
from wsi_pipe.extract.lines import ByteQueue, StoppedError
from wsi_pipe.geometry import TileGrid, TileSpec
from wsi_pipe.job.fingerprints import features_fingerprint
from wsi_pipe.job.run import load_encoders
from wsi_pipe.slides.array import ArraySlide
from wsi_pipe.tiles import TileBatch, read_tiles

TILE = 32


def picture(seed: int, tiles: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (TILE, TILE * tiles, 3), dtype=np.uint8)


def row_of_tiles(count: int, mpp: float = 2.0, factor: int = 1) -> TileGrid:
    """Tiles side by side along x; ``factor`` level-0 pixels to a tile pixel."""
    side = float(TILE * factor)
    cells = np.stack([np.arange(count), np.zeros(count)], 1).astype(np.int32)
    tissue = np.ones(count, np.float32)
    return TileGrid(TileSpec(mpp, TILE), (mpp, mpp), (0.0, 0.0), (side, side), (side, side), cells, tissue)


def slide(seed: int, tiles: int) -> ArraySlide:
    return ArraySlide([picture(seed, tiles)], mpp=2.0, block_px=(TILE, TILE))


def item(name: str, seed: int, tiles: int, encoders: Sequence[str] = ("sums",)) -> ExtractItem:
    return ExtractItem(name, lambda: slide(seed, tiles), [row_of_tiles(tiles)], {"5x": encoders})


def sums(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Per channel, the mean and a weighted mean that no other tile shares."""
    weights = np.linspace(0.5, 1.5, pixels.shape[1] * pixels.shape[2]).reshape(pixels.shape[1:3])
    values = pixels.astype(np.float64) / 255
    plain, weighted = values.mean((1, 2)), np.einsum("bhwc,hw->bc", values, weights) / weights.sum()
    return np.concatenate([plain, weighted], 1).astype(np.float32)


def expected(seed: int, tiles: int) -> NDArray[np.float32]:
    cut = picture(seed, tiles).reshape(TILE, tiles, TILE, 3).swapaxes(0, 1)
    return sums(cut)


@dataclass(frozen=True)
class Ready:
    values: NDArray[np.float32]

    def result(self) -> NDArray[np.float32]:
        return check_finite(self.values, "sums")


class Sums:
    """An encoder of pixel sums that keeps a record of the batches it got."""

    def __init__(self, *, shares: bool = True, in_flight: int = 1, name: str = "sums") -> None:
        self.info = EncoderInfo(name, name, 6, "0" * 64, "CC0-1.0")
        self.shares_batches = shares
        self.in_flight = in_flight
        self.batches: list[int] = []

    def suggest_batch(self, tile_px: int) -> int:
        return 8

    def encode(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self.submit(tiles).result()

    def submit(self, tiles: NDArray[np.uint8]) -> Ready:
        self.batches.append(len(tiles))
        return Ready(sums(tiles))


def run(items: Sequence[ExtractItem], encoders: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    options = {"batch_size": None, "read_threads": 2, "memory_bytes": 64 << 20, "dtype": "float32"} | options
    return {result.slide_id: result for result in extract_features(iter(items), encoders, **options)}


def no_threads_left() -> bool:
    return not [thread for thread in threading.enumerate() if thread.name.startswith("wsi-pipe-")]


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("in_flight", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 3, 8, 64])
def test_rows_come_in_grid_order_whatever_the_batches(shares: bool, in_flight: int, batch_size: int) -> None:
    encoder = Sums(shares=shares, in_flight=in_flight)
    counts = {"a": (1, 5), "b": (2, 17), "c": (3, 1), "d": (4, 8)}
    results = run([item(n, seed, k) for n, (seed, k) in counts.items()], {"sums": encoder}, batch_size=batch_size)
    assert set(results) == set(counts)
    for name, (seed, tiles) in counts.items():
        np.testing.assert_array_equal(results[name].features["5x"]["sums"], expected(seed, tiles))
        assert results[name].counts["tiles"] == tiles
    assert sum(encoder.batches) == 31
    assert no_threads_left()


def test_small_slides_share_batches_where_the_encoder_says_so() -> None:
    shared, alone = Sums(shares=True), Sums(shares=False)
    items = [item(str(k), k, 3) for k in range(8)]
    run(items, {"sums": shared})
    run(items, {"sums": alone})
    assert shared.batches == [8, 8, 8]
    assert alone.batches == [3] * 8


def test_batches_that_are_full_already_go_through_uncopied() -> None:
    class Owners(Sums):
        def __init__(self) -> None:
            super().__init__(shares=True)
            self.views: list[bool] = []

        def submit(self, tiles: NDArray[np.uint8]) -> Ready:
            self.views.append(tiles.base is not None)
            return super().submit(tiles)

    encoder = Owners()
    results = run([item("a", 1, 19), item("b", 2, 19)], {"sums": encoder})
    assert sorted(encoder.batches) == [6, 8, 8, 8, 8]
    assert [view for size, view in zip(encoder.batches, encoder.views, strict=True) if size == 8] == [True] * 4
    for name, seed in (("a", 1), ("b", 2)):
        np.testing.assert_array_equal(results[name].features["5x"]["sums"], expected(seed, 19))


def test_tiles_are_made_in_the_memory_that_the_encoder_wants() -> None:
    """On a GPU that is pinned memory: what fills a batch crosses from where it was decoded."""

    class Particular(Sums):
        def __init__(self) -> None:
            super().__init__(shares=True)
            self.given: list[NDArray[np.uint8]] = []
            self.mine: list[bool] = []
            self.released = 0

        def release(self) -> None:
            self.released += 1

        def new_tiles(self, shape: tuple[int, int, int, int]) -> NDArray[np.uint8]:
            self.given.append(np.full(shape, 77, np.uint8))
            return self.given[-1]

        def submit(self, tiles: NDArray[np.uint8]) -> Ready:
            self.mine.append(any(np.shares_memory(tiles, given) for given in self.given))
            return super().submit(tiles)

    encoder = Particular()
    plain = Sums(name="plain")
    items = [item("a", 1, 19, ("plain", "sums")), item("b", 2, 19, ("plain", "sums"))]
    results = run(items, {"plain": plain, "sums": encoder})
    assert sorted(encoder.batches) == [6, 8, 8, 8, 8]
    assert [mine for size, mine in zip(encoder.batches, encoder.mine, strict=True) if size == 8] == [True] * 4
    assert sum(len(given) for given in encoder.given) == 38
    assert encoder.released == 1
    for name, seed in (("a", 1), ("b", 2)):
        np.testing.assert_array_equal(results[name].features["5x"]["sums"], expected(seed, 19))


def test_encoders_of_different_batches_share_one_reading() -> None:
    class Few(Sums):
        def suggest_batch(self, tile_px: int) -> int:
            return 3

    few = Few(name="few", shares=False)
    both = ExtractItem("s", lambda: slide(1, 20), [row_of_tiles(20)], {"5x": ["sums", "few"]})
    result = run([both], {"sums": Sums(), "few": few})["s"]
    np.testing.assert_array_equal(result.features["5x"]["few"], expected(1, 20))
    assert sum(few.batches) == 20
    assert max(few.batches) == 3


def test_a_level_is_read_once_for_all_its_encoders() -> None:
    opened: list[ArraySlide] = []

    def opening() -> ArraySlide:
        opened.append(slide(1, 20))
        return opened[-1]

    one, two = Sums(), Sums(name="two", shares=False)
    both = ExtractItem("s", opening, [row_of_tiles(20)], {"5x": ["sums", "two"]})
    result = run([both], {"sums": one, "two": two})["s"]
    np.testing.assert_array_equal(result.features["5x"]["sums"], result.features["5x"]["two"])
    assert len(opened) == 1
    assert opened[0].stats.blocks_decoded == 20
    assert result.counts["blocks_decoded"] == 20


def test_levels_have_their_own_encoders_and_empty_grids_give_no_rows() -> None:
    grids = [row_of_tiles(2, 4.0, 2), row_of_tiles(4, 2.0), row_of_tiles(0, 1.0)]
    work = ExtractItem("s", lambda: slide(5, 4), grids, {"2.5x": ["two"], "5x": ["sums"], "10x": ["sums", "two"]})
    result = run([work], {"sums": Sums(), "two": Sums(name="two")})["s"]
    assert {label: set(found) for label, found in result.features.items()} == {
        "2.5x": {"two"}, "5x": {"sums"}, "10x": {"sums", "two"},
    }  # fmt: skip
    assert result.features["10x"]["sums"].shape == (0, 6)
    np.testing.assert_array_equal(result.features["5x"]["sums"], expected(5, 4))


@pytest.mark.parametrize("shares", [True, False])
def test_a_slide_that_fails_takes_nobody_with_it(shares: bool) -> None:
    class Torn(ArraySlide):
        def decode(self, plane: Any, cell: Any, data: Any) -> NDArray[np.uint8]:
            if cell[0] >= 60:
                raise SlideReadError("torn.tif: tile 60 is damaged")
            return super().decode(plane, cell, data)

    def gone() -> ArraySlide:
        raise FileNotFoundError("gone.tif")

    torn = ExtractItem(
        "torn", lambda: Torn([picture(7, 90)], mpp=2.0, block_px=(TILE, TILE)), [row_of_tiles(90)], {"5x": ["sums"]}
    )
    missing = ExtractItem("gone", gone, [row_of_tiles(3)], {"5x": ["sums"]})
    results = run([item("a", 1, 5), torn, missing, item("b", 2, 6)], {"sums": Sums(shares=shares)})
    assert isinstance(results["torn"], SlideFailure)
    assert isinstance(results["torn"].error, SlideReadError)
    assert "damaged" in str(results["torn"].error)
    assert isinstance(results["gone"].error, FileNotFoundError)
    for name, seed, tiles in (("a", 1, 5), ("b", 2, 6)):
        np.testing.assert_array_equal(results[name].features["5x"]["sums"], expected(seed, tiles))


def test_nan_names_the_tile_and_spares_the_slides_of_the_same_batch() -> None:
    class Poisoned(Sums):
        def submit(self, tiles: NDArray[np.uint8]) -> Ready:
            values = sums(tiles)
            values[(tiles == bad).all((1, 2, 3)), 2] = np.nan
            return Ready(values)

    bad = picture(2, 5).reshape(TILE, 5, TILE, 3).swapaxes(0, 1)[3]
    results = run([item("a", 1, 4), item("b", 2, 5), item("c", 3, 2)], {"sums": Poisoned()})
    error = results["b"].error
    assert isinstance(error, EncoderOutputError)
    assert "5x tile x=96, y=0" in str(error)
    assert "\n" not in str(error)
    for name, seed, tiles in (("a", 1, 4), ("c", 3, 2)):
        np.testing.assert_array_equal(results[name].features["5x"]["sums"], expected(seed, tiles))


def test_features_too_large_for_float16_are_an_error_not_infinity() -> None:
    class Large(Sums):
        def submit(self, tiles: NDArray[np.uint8]) -> Ready:
            return Ready(sums(tiles) * 200_000)

    halves = run([item("a", 1, 4)], {"sums": Large()}, dtype="float16")["a"]
    assert isinstance(halves, SlideFailure)
    assert "too large for float16" in str(halves.error)
    assert "tile x=0, y=0" in str(halves.error)
    assert isinstance(run([item("a", 1, 4)], {"sums": Large()}, dtype="float32")["a"], SlideFeatures)


def test_half_precision_is_the_float32_features_rounded() -> None:
    result = run([item("a", 1, 4)], {"sums": Sums()}, dtype="float16")["a"]
    stored = result.features["5x"]["sums"]
    assert stored.dtype == np.float16
    np.testing.assert_array_equal(stored, expected(1, 4).astype(np.float16))


def test_a_device_that_fails_ends_the_run_after_what_was_finished() -> None:
    class Dying(Sums):
        def submit(self, tiles: NDArray[np.uint8]) -> Ready:
            if len(self.batches) == 2:
                raise DeviceError("cuda:0 is out of memory", remedy="use another")
            return super().submit(tiles)

    results = extract_features([item(str(k), k, 8) for k in range(9)], {"sums": Dying(shares=False)}, dtype="float32")
    assert [next(results).slide_id, next(results).slide_id] == ["0", "1"]
    with pytest.raises(DeviceError, match="out of memory"):
        next(results)
    assert no_threads_left()


def test_what_the_items_raise_is_raised() -> None:
    def items() -> Iterator[ExtractItem]:
        yield item("a", 1, 2)
        raise ConfigError("row 3 of slides.csv")

    with pytest.raises(ConfigError, match="row 3"):
        list(extract_features(items(), {"sums": Sums()}))
    assert no_threads_left()


def test_leaving_early_ends_the_threads() -> None:
    results = extract_features((item(str(k), k, 40) for k in range(1000)), {"sums": Sums()}, memory_bytes=1 << 16)
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert no_threads_left()


def test_items_are_taken_lazily_within_the_memory() -> None:
    taken = []

    def items() -> Iterator[ExtractItem]:
        for k in range(500):
            taken.append(k)
            yield item(str(k), k, 8)

    results = extract_features(items(), {"sums": Sums(shares=False)}, memory_bytes=2 * 8 * TILE * TILE * 3)
    next(results)
    # One slide with the caller, four waiting for it, one encoded, two read, two taken ahead, and their like.
    assert len(taken) < 20
    results.close()  # type: ignore[attr-defined]


def test_encoding_goes_on_while_the_caller_is_busy_with_a_slide() -> None:
    later = threading.Event()

    class Watched(Sums):
        def submit(self, tiles: NDArray[np.uint8]) -> Ready:
            if len(self.batches) >= 2:
                later.set()
            return super().submit(tiles)

    results = extract_features([item(str(k), k, 8) for k in range(4)], {"sums": Watched()})
    next(results)
    assert later.wait(30), "the third slide was not encoded while the first was held"
    assert len(list(results)) == 3


def test_a_finished_slide_does_not_wait_for_the_next_to_be_read() -> None:
    taken = threading.Event()

    def opening() -> ArraySlide:
        assert taken.wait(30), "the first slide was not handed out before the second was opened"
        return slide(2, 8)

    late = ExtractItem("late", opening, [row_of_tiles(8)], {"5x": ["sums"]})
    results = extract_features(iter([item("early", 1, 8), late]), {"sums": Sums(in_flight=3)}, dtype="float32")
    assert next(results).slide_id == "early"
    taken.set()
    second = next(results)
    assert isinstance(second, SlideFeatures)


def test_the_next_tiles_do_not_wait_for_a_batch_that_is_under_way() -> None:
    first, second = threading.Event(), threading.Event()

    class Late:
        """Features that are there only when another batch has been submitted."""

        def __init__(self, values: NDArray[np.float32]) -> None:
            self.values = values

        @property
        def ready(self) -> bool:
            return second.is_set()

        def result(self) -> NDArray[np.float32]:
            assert second.wait(5), "waited for the first batch while the second was on its way"
            return self.values

    class Busy(Sums):
        def submit(self, tiles: NDArray[np.uint8]) -> Any:
            (second if first.is_set() else first).set()
            return Late(sums(tiles))

    def opening() -> ArraySlide:
        assert first.wait(30)
        return slide(2, 8)

    late = ExtractItem("late", opening, [row_of_tiles(8)], {"5x": ["sums"]})
    results = run([item("early", 1, 8), late], {"sums": Busy(in_flight=3)})
    for name, seed in (("early", 1), ("late", 2)):
        np.testing.assert_array_equal(results[name].features["5x"]["sums"], expected(seed, 8))


def test_progress_counts_every_tile() -> None:
    seen: list[tuple[str, str, int]] = []
    run([item("a", 1, 5), item("b", 2, 12)], {"sums": Sums()}, progress=lambda *step: seen.append(step))
    assert sum(n for slide_id, _, n in seen if slide_id == "a") == 5
    assert sum(n for slide_id, _, n in seen if slide_id == "b") == 12
    assert {label for _, label, _ in seen} == {"5x"}


def test_a_distilled_encoder_refuses_another_resolution() -> None:
    encoder = Sums()
    encoder.info = replace(encoder.info, mpp=0.5, mpp_required=True)
    error = run([item("a", 1, 2)], {"sums": encoder})["a"].error
    assert isinstance(error, ResolutionError)
    assert "20x" in str(error)
    assert "5x" in str(error)


def test_an_encoder_that_states_a_wrong_dimension_fails_the_slide() -> None:
    encoder = Sums()
    encoder.info = replace(encoder.info, dim=7)
    assert "6 features instead of 7" in str(run([item("a", 1, 2)], {"sums": encoder})["a"].error)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dtype": "int8"}, "int8"), ({"batch_size": 0}, "at least 1"), ({"layers": (0,)}, "no blocks")],
)
def test_bad_options_stop_before_any_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        extract_features([item("a", 1, 2)], {"sums": Sums()}, **options)


def test_two_encoders_of_one_slug_stop_before_any_work() -> None:
    one, two = Sums(), Sums()
    with pytest.raises(ConfigError, match=r"encoders fold1/lr\.safetensors and fold2/lr\.s.* 'sums' .*rename"):
        extract_features([], {"fold1/lr.safetensors": one, "fold2/lr.safetensors": two})


@pytest.mark.parametrize(
    "pair",
    [("fold1/lr.safetensors", "fold2/lr.safetensors"), ("uni", "UNI"), ("uni", "UNI_v1"), ("a@/x/w.pt", "a@/y/w.pt")],
)
def test_a_job_s_encoders_of_one_slug_stop_before_any_is_loaded(pair: tuple[str, str]) -> None:
    for encoders in ({"*": pair}, {"5x": pair[:1], "20x": pair[1:]}):
        with pytest.raises(ConfigError, match="called") as caught:
            load_encoders(JobSettings(extract=ExtractSettings(encoders=encoders)))
        assert all(name in str(caught.value) for name in pair)


def test_an_encoder_that_is_not_loaded_is_named() -> None:
    assert "'other'" in str(run([item("a", 1, 2, ["other"])], {"sums": Sums()})["a"].error)


def test_the_queue_holds_its_bytes_and_takes_one_that_is_too_large() -> None:
    stopped = threading.Event()
    waiting = ByteQueue(100, stopped)
    waiting.put("large", 1000)  # alone it is let in
    passed = threading.Event()
    thread = threading.Thread(target=lambda: (waiting.put("next", 10), passed.set()))
    thread.start()
    assert not passed.wait(0.3)
    assert waiting.get() == "large"
    assert passed.wait(10)
    assert waiting.get() == "next"
    thread.join()
    stopped.set()
    with pytest.raises(StoppedError):
        waiting.get()


# A real network on the CPU


def vit_item(name: str, seed: int, tiles: int) -> ExtractItem:
    return item(name, seed, tiles, ["timm:test_vit"])


@pytest.fixture(scope="module")
def vit() -> Any:
    return load_encoder("timm:test_vit", device="cpu", precision="float32", random_weights=True)


def test_a_killed_run_resumed_gives_the_same_bytes(vit: Any) -> None:
    slides = [vit_item("a", 1, 37), vit_item("b", 2, 21), vit_item("c", 3, 50)]
    whole = run(slides, {"timm:test_vit": vit})
    interrupted = extract_features(iter(slides), {"timm:test_vit": vit}, dtype="float32", memory_bytes=1 << 18)
    first = next(interrupted)
    assert isinstance(first, SlideFeatures)
    interrupted.close()  # type: ignore[attr-defined]
    done = {"a": first, **run(slides[1:], {"timm:test_vit": vit}, memory_bytes=1 << 17, read_threads=1)}
    for name in ("a", "b", "c"):
        ours, theirs = (found[name].features["5x"]["timm-test_vit-random"] for found in (whole, done))
        assert ours.tobytes() == theirs.tobytes()


def test_neighbours_and_batch_size_change_nothing_of_note(vit: Any) -> None:
    alone = run([vit_item("a", 1, 37)], {"timm:test_vit": vit}, batch_size=1)["a"].features["5x"][
        "timm-test_vit-random"
    ]
    for size in (5, 37):
        found = run([vit_item("a", 1, 37)], {"timm:test_vit": vit}, batch_size=size)["a"].features["5x"]
        vectors = found["timm-test_vit-random"]
        cosine = (vectors * alone).sum(1) / np.linalg.norm(vectors, axis=1) / np.linalg.norm(alone, axis=1)
        assert cosine.min() >= 0.9999


def test_layers_come_beside_the_features(vit: Any) -> None:
    result = run([vit_item("a", 1, 9)], {"timm:test_vit": vit}, layers=(0, -1))["a"]
    pixels = read_tiles(slide(1, 9), row_of_tiles(9).corners_l0, float(TILE), TILE)
    direct = vit.encode_layers(pixels, [0, -1])
    found = result.layers["5x"]["timm-test_vit-random"]
    np.testing.assert_allclose(result.features["5x"]["timm-test_vit-random"], direct.features, atol=1e-5)
    assert set(found) == {0, -1}
    for block in (0, -1):
        np.testing.assert_allclose(found[block], direct.cls[block], atol=1e-5)


def test_tile_batches_are_what_the_engine_expects() -> None:
    assert {"pixels", "index"} <= set(TileBatch.__dataclass_fields__)


@pytest.mark.parametrize(
    "names",
    [
        ("uni", "UNI", "UNI_v1"),
        ("/old/lr.safetensors", "new/lr.safetensors"),
        ("timm:test_vit@/old/w.pt", "timm:test_vit@w.pt"),
        ("uni@/a/w.pt", "UNI@w.pt"),
    ],
)
def test_features_stay_valid_under_an_alias_and_when_a_file_is_moved(names: tuple[str, ...]) -> None:
    def stamp(name: str, **other: Any) -> str:
        facts = {"weights_sha256": "0" * 64, "precision": "float32", "transform": {}, "dim": 8, "layers": ()} | other
        return features_fingerprint("grid", "auto", encoder=name, dtype="float16", **facts)  # type: ignore[arg-type]

    assert len({stamp(name) for name in names}) == 1
    assert stamp(names[0]) != stamp(names[0], weights_sha256="1" * 64)
    assert stamp(names[0]) != stamp("phikon")
