"""Fixtures that all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def _shared_folder() -> Path | None:
    named = os.environ.get("WSI_PIPE_TEST_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared"
    return folder if (folder / "slides").is_dir() else None


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real slides and MIL sets; tests that need it are skipped where it is absent."""
    folder = _shared_folder()
    if folder is None:
        pytest.skip("no real slides: neither ../shared nor the folder in WSI_PIPE_TEST_DATA has slides/")
    return folder


@pytest.fixture(scope="session")
def shared_slides(shared_data: Path) -> Path:
    """The folder of real slides."""
    return shared_data / "slides"
