"""The notebooks of the documentation run from top to bottom, and what is stored of them is small."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
MOST_BYTES = 400_000


def loaded(path: Path) -> dict[str, Any]:
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return notebook


def test_there_are_three_and_the_page_leads_to_them() -> None:
    page = (DOCS / "python.md").read_text(encoding="utf-8")
    assert [path.name for path in NOTEBOOKS] == re.findall(r"\(notebooks/([^)]+)\)", page)
    assert len(NOTEBOOKS) == 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_stored_is_small_and_names_no_machine(path: Path) -> None:
    assert path.stat().st_size < MOST_BYTES
    text = re.sub(r"[A-Za-z0-9+/=]{200,}", "", path.read_text(encoding="utf-8"))
    assert not re.search(r"/(tmp|home|root|work|Users)/", text)
    cells = [cell for cell in loaded(path)["cells"] if cell["cell_type"] == "code"]
    # Stored as it ran once from top to bottom without an error: readers on the site see what it shows.
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("nbclient", reason="the extra test is not installed")
    program = [sys.executable, str(DOCS / "run_notebooks.py"), str(tmp_path), path.name]
    # A cell that fails ends it with a code other than 0 and the cell's error.
    ended = subprocess.run(program, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    before, after = loaded(path)["cells"], loaded(tmp_path / path.name)["cells"]
    assert ["".join(cell["source"]) for cell in before] == ["".join(cell["source"]) for cell in after]
    # What is stored was made by these cells: the same kinds of outputs in the same places.
    kinds = [
        [[(o["output_type"], sorted(o.get("data", {}))) for o in cell.get("outputs", [])] for cell in cells]
        for cells in (before, after)
    ]
    assert kinds[0] == kinds[1]
