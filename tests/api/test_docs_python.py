"""docs/python.md: its code runs, block by block, and it names everything that is public."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lrmil
import wsi_pipe as wp

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path, make_slide: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the slides that the page speaks of, which is the current one."""
    for seed, name in enumerate("abcd"):
        make_slide(tmp_path / f"{name}.svs", seed=seed)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_first_block_is_fifteen_lines_and_gives_a_sound_bag(folder: Path) -> None:
    first = BLOCKS[0]
    assert "## From a slide to a bag\n\n```python\n" + first in TEXT
    assert len([line for line in first.splitlines() if line.strip()]) <= 15
    exec(compile(first, str(PAGE), "exec"), {})
    bag = wp.open_bag("a.h5")
    assert bag.check() == []
    assert list(bag) == ["5x", "20x"]
    assert bag["20x"].features["texture"].shape[0] == len(bag["20x"]) > 0


def test_the_readme_shows_the_same_lines() -> None:
    readme = (PAGE.parents[1] / "README.md").read_text(encoding="utf-8")
    assert "```python\n" + BLOCKS[0] + "```" in readme


@pytest.mark.slow
def test_all_blocks_run_in_their_order(folder: Path) -> None:
    names: dict[str, Any] = {}
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"{PAGE}, block {number}", "exec"), names)
    assert names["prediction"].status == "done"
    assert [item.slide_id for item in names["several"]] == ["b", "c"]
    assert np.isclose(sum(names["prediction"].probabilities.values()), 1)
    assert set(names["job"].status()["status"]) == {"done"}


@pytest.mark.parametrize(("module", "heading"), [(wp, "wsi_pipe"), (lrmil, "lrmil")])
def test_the_page_names_all_that_is_public_and_nothing_else(module: Any, heading: str) -> None:
    table = TEXT.split(f"| `{heading}` | what it is |\n|---|---|\n")[1].split("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| (\S.*) \|$", table, flags=re.MULTILINE)
    assert len(rows) == len(table.splitlines())
    assert sorted(name for name, _ in rows) == sorted(module.__all__)
    assert set(module.__all__) <= set(dir(module))
    for name in module.__all__:
        assert name == "__version__" or getattr(module, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = module.nothing
