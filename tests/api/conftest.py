"""Small slides and jobs of them for the tests of the Python interface."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def slides(tmp_path_factory: pytest.TempPathFactory, make_slide: Callable[..., Path]) -> list[Path]:
    """Two slides at 0.5 um/px with 36 and some tiles of 128 px at 20x each."""
    folder = tmp_path_factory.mktemp("api")
    return [make_slide(folder / f"{name}.svs", seed=seed) for seed, name in enumerate("ab")]
