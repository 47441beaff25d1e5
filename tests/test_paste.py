"""Blocks into the tiles that they touch: in C as in Python, and never beyond an array."""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from wsi_pipe.compiled import compiled_state, load_compiled
from wsi_pipe.tiles import paste as module
from wsi_pipe.tiles.paste import hold, paste_blocks

BUILT = module._function() is not None

Placed = tuple[tuple[int, int, bool], tuple[int, int], int]


@pytest.fixture
def in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_function", lambda: None)


def expected(placed: list[Placed], tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pixel by pixel."""
    out = tiles.copy()
    for number, ((width, height, there), (left, top), tile) in enumerate(placed):
        for y in range(max(top, 0), min(top + height, out.shape[1])):
            for x in range(max(left, 0), min(left + width, out.shape[2])):
                out[tile, y, x] = picture(number, width, height)[y - top, x - left] if there else 255
    return out


def picture(number: int, width: int, height: int) -> NDArray[np.uint8]:
    return np.random.default_rng(number).integers(0, 255, (height, width, 3), np.uint8)


def pasted(placed: list[Placed], tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
    out = tiles.copy()
    blocks = [
        hold(picture(number, width, height) if there else None, (width, height))
        for number, ((width, height, there), _, _) in enumerate(placed)
    ]
    places = np.array([place for _, place, _ in placed], np.int64).reshape(-1, 2)
    paste_blocks(blocks, places, out, np.array([tile for _, _, tile in placed], np.int64))
    return out


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.tuples(st.integers(1, 9), st.integers(1, 9), st.booleans()),
            st.tuples(st.integers(-12, 12), st.integers(-12, 12)),
            st.integers(0, 2),
        ),
        max_size=12,
    )
)
def test_blocks_come_where_they_belong(placed: list[Placed]) -> None:
    """Over one another, over every edge, and wholly beside their tile."""
    tiles = np.random.default_rng(99).integers(0, 255, (3, 7, 10, 3), np.uint8)
    wanted = expected(placed, tiles)
    np.testing.assert_array_equal(pasted(placed, tiles), wanted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_function", lambda: None)
        np.testing.assert_array_equal(pasted(placed, tiles), wanted)


def test_what_a_block_is_kept_as() -> None:
    whole = picture(1, 9, 6)
    part = whole[1:5, 2:6]
    held = hold(part, (9, 6))
    assert held.pixels is not None
    np.testing.assert_array_equal(held.pixels, part)
    assert held.where == (held.pixels.ctypes.data, 4, 4)
    assert held.nbytes == 48
    assert hold(whole, (9, 6)).pixels is whole
    missing = hold(None, (9, 6))
    assert missing.where == (0, 9, 6)
    assert missing.nbytes == 0
    for wrong in (whole[..., :1], whole.astype(np.int8), whole[0]):
        with pytest.raises(ValueError, match="is not RGB"):
            hold(wrong, (9, 6))  # type: ignore[arg-type]


def test_arrays_that_do_not_fit_are_refused() -> None:
    check_refusals()


def test_arrays_that_do_not_fit_are_refused_in_python(in_python: None) -> None:
    check_refusals()


def check_refusals() -> None:
    tiles = np.zeros((2, 8, 8, 3), np.uint8)
    block, place, number = hold(picture(0, 4, 4), (4, 4)), np.zeros((1, 2), np.int64), np.zeros(1, np.int64)
    read_only = tiles.copy()
    read_only.flags.writeable = False
    for wrong in (tiles[:, ::2], tiles.astype(np.int8), tiles[0], tiles[..., :2], read_only):
        with pytest.raises(ValueError, match="blocks do not go into an array"):
            paste_blocks([block], place, wrong, number)  # type: ignore[arg-type]
    for beyond in (-1, 2):
        with pytest.raises(ValueError, match=r"there (is|are) no tile"):
            paste_blocks([block], place, tiles, np.array([beyond]))
    with pytest.raises(ValueError, match="for 1 blocks"):
        paste_blocks([block], np.zeros((2, 2), np.int64), tiles, number)
    with pytest.raises(ValueError, match="for 1 blocks"):
        paste_blocks([block], place, tiles, np.zeros(2, np.int64))
    paste_blocks([], np.zeros((0, 2), np.int64), tiles, np.zeros(0, np.int64))
    assert not tiles.any()


@pytest.mark.skipif(not BUILT, reason="the library was not built")
def test_a_library_of_another_version_is_not_used() -> None:
    assert load_compiled(module.__file__, "paste", 1) is not None
    assert load_compiled(module.__file__, "paste", 2) is None
    assert load_compiled(module.__file__, "glue", 1) is None
    assert compiled_state(module.__file__, "paste", 1) == "in use"
    assert compiled_state(module.__file__, "paste", 2) == "built from another version (1, not 2): install again"
    assert compiled_state(module.__file__, "glue", 1) == "not built: there was no C compiler on installation"


def test_a_library_that_is_none_is_told_of(tmp_path: Path) -> None:
    """Of another processor, say: a file that the system does not load."""
    (tmp_path / "_glue.so").write_bytes(b"\x7fELF")
    if ".so" in EXTENSION_SUFFIXES:
        assert load_compiled(str(tmp_path / "glue.py"), "glue", 1) is None
        assert compiled_state(str(tmp_path / "glue.py"), "glue", 1).startswith("cannot be loaded: ")
