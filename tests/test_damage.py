"""Damaged and hostile files where others are read: an error in one line, never a traceback, never minutes."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wsi_pipe.cli import group, run_group
from wsi_pipe.config import JobSettings, load_toml
from wsi_pipe.cores import MAX_CORES, available_cores
from wsi_pipe.encoders.lr_file import header_from_json
from wsi_pipe.encoders.registry import read_registry
from wsi_pipe.errors import ConfigError, MaskError, SlideOpenError, WeightsError
from wsi_pipe.job import JobPaths, append_outcome, read_outcomes
from wsi_pipe.job.given import read_geojson
from wsi_pipe.outcome import SlideOutcome
from wsi_pipe.slides import open_slide
from wsi_pipe.slides.codecs.decode import CodecError, PlainDecoder
from wsi_pipe.slides.storage.source import open_source
from wsi_pipe.slides.tiff.ifd import MAX_TAGS_IN_ALL, read_directories
from wsi_pipe.slides.tiff.ndpi import LENS, _lens

MakeSlide = Callable[..., Path]
DEEP = "[" * 100_000


def cli(*arguments: str | Path) -> int:
    return run_group(group, "wsi-pipe", [str(argument) for argument in arguments])


# ---------------------------------------------------------------- nested text


def test_nested_toml_is_a_wrong_file(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(f"a = {DEEP}")
    for read in (lambda: load_toml(JobSettings, path), lambda: read_registry(path)):
        with pytest.raises(ConfigError, match="nested too deeply"):
            read()


def test_nested_json_is_a_wrong_file(tmp_path: Path) -> None:
    path = tmp_path / "mask.geojson"
    path.write_text(DEEP)
    with pytest.raises(MaskError, match="nested"):
        read_geojson(path)
    with pytest.raises(WeightsError):
        header_from_json(DEEP, "file")


@pytest.mark.parametrize(
    "line",
    [
        DEEP,
        '{"slide_id": ["a"], "status": "done"}',
        '{"slide_id": "b", "status": "done", "seconds": {"read": "long"}}',
        '{"slide_id": "b", "status": "done", "tiles": 3}',
        '{"slide_id": "b", "status": {}}',
        '{"slide_id": "b", "status": "failed", "reason": [1]}',
        "[1, 2]",
        "\0\0\0",
    ],
)
def test_a_line_of_outcomes_that_is_none_is_passed_over(tmp_path: Path, line: str) -> None:
    paths = JobPaths(tmp_path)
    append_outcome(paths, SlideOutcome("a", "done", "a.svs", seconds={"read": 1.0}, tiles={"20x": 4}))
    with paths.outcomes.open("a") as handle:
        handle.write(line + "\n")
    append_outcome(paths, SlideOutcome("c", "failed", "c.svs", reason="why", costs={"20x/uni": {"read": 1.0}}))
    assert {name: outcome.status for name, outcome in read_outcomes(tmp_path).items()} == {"a": "done", "c": "failed"}


# ---------------------------------------------------------------- cores


@pytest.mark.parametrize("told", ["1000000", "0", "-1", "two", "1e3", "9" * 30, "\u0663"])
def test_an_absurd_number_of_cores_is_refused(monkeypatch: pytest.MonkeyPatch, told: str, tmp_path: Path) -> None:
    monkeypatch.setenv("WSI_PIPE_CORES", told)
    with pytest.raises(ConfigError, match="WSI_PIPE_CORES"):
        available_cores()


def test_a_number_of_cores_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WSI_PIPE_CORES", f" {MAX_CORES} ")
    assert available_cores() == MAX_CORES
    monkeypatch.setenv("WSI_PIPE_CORES", "")
    assert available_cores() >= 1


# ---------------------------------------------------------------- slides


def test_a_damaged_lzw_stream_is_an_error_of_its_tile() -> None:
    decoder = PlainDecoder((8, 8), 3, "LZW", difference=False)
    with pytest.raises(CodecError, match="LZW stream is damaged"):
        decoder.decode(b"\xff\xff\xff\xff" * 8)


@pytest.mark.parametrize("values", [np.array([b"x"]), np.array([np.nan]), np.zeros(0), np.array([20.0])])
def test_a_lens_that_is_no_number_is_no_lens(values: Any) -> None:
    class Fake:
        def count(self, tag: int) -> int:
            return 1 if tag == LENS else 0

        def array(self, tag: int) -> Any:
            return values

    assert _lens(Fake()) == (20.0 if values.tolist() == [20.0] else 0.0)  # type: ignore[arg-type]


def test_directories_that_overlap_are_limited_together(tmp_path: Path) -> None:
    """Thousands of directories of thousands of tags each in 97 KB: each is sound by itself."""
    tags, step, count = 4096, 4, 4000
    body = bytearray(97_000)
    for k in range(count):
        at = 8 + step * k
        struct.pack_into("<H", body, at, tags)
        after = at + 2 + 12 * tags
        if after + 4 <= len(body):
            struct.pack_into("<I", body, after, at + step if k + 1 < count else 0)
    struct.pack_into("<2sHI", body, 0, b"II", 42, 8)
    path = tmp_path / "overlaps.tif"
    path.write_bytes(body)
    source = open_source(path)
    with pytest.raises(SlideOpenError, match="tags together"):
        read_directories(source)
    assert source.stats.bytes_fetched < 16 * MAX_TAGS_IN_ALL
    source.close()


def test_a_damaged_width_is_not_laid_out_wrongly_by_another_reader(tmp_path: Path, make_slide: MakeSlide) -> None:
    path = make_slide(tmp_path / "a.svs")
    raw = bytearray(path.read_bytes())
    (at,) = struct.unpack_from("<I", raw, 4)
    (count,) = struct.unpack_from("<H", raw, at)
    for entry in range(at + 2, at + 2 + 12 * count, 12):
        if struct.unpack_from("<H", raw, entry)[0] == 256:
            struct.pack_into("<I", raw, entry + 8, 1536 // 2)
    path.write_bytes(raw)
    with pytest.raises(SlideOpenError, match="need"):
        open_slide(path)
