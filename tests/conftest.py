"""Fixtures that all tests share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from wsi_pipe.slides.writing.write import write_pyramid

if "PYTEST_XDIST_WORKER" in os.environ:
    # Every core has a process of its own: more threads than that only get into each other's way.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that starts the tests in the background makes them deaf to Ctrl-C, and every process that they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture(scope="session")
def tissue_picture() -> Callable[..., NDArray[np.uint8]]:
    """``f(width, height, seed)``: an H&E-like picture, pink stroma with violet nuclei in an ellipse on near-white."""

    def draw(width: int = 1536, height: int = 1280, seed: int = 0) -> NDArray[np.uint8]:
        rng = np.random.default_rng(seed)
        y, x = np.mgrid[:height, :width].astype(np.float32)
        tissue = ((x / width - 0.45) / 0.36) ** 2 + ((y / height - 0.5) / 0.38) ** 2 < 1
        nuclei = cv2.GaussianBlur(rng.normal(size=(height, width)).astype(np.float32), (0, 0), 4.0) > 0.07
        picture = np.full((height, width, 3), 243, np.float32)
        picture[tissue] = (222, 150, 190)
        picture[tissue & nuclei] = (110, 70, 150)
        grain = rng.normal(0, 5, (height, width, 1)).astype(np.float32)
        return np.clip(picture + grain * tissue[..., None], 0, 255).astype(np.uint8)

    return draw


@pytest.fixture(scope="session")
def make_slide(tissue_picture: Callable[..., NDArray[np.uint8]]) -> Callable[..., Path]:
    """``f(path, mpp=0.5, seed=0, picture=None, **options)``: write a small pyramidal slide with levels 1, 4."""

    def make(
        path: Path, mpp: float | None = 0.5, seed: int = 0, picture: NDArray[np.uint8] | None = None, **options: Any
    ) -> Path:
        full = tissue_picture(seed=seed) if picture is None else picture
        quarter = cv2.resize(full, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_pyramid(path, [full, quarter], mpp=mpp, **options)
        return path

    return make


class Cluster:
    """A Dask scheduler and workers as processes of their own, on loopback."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = 0
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        log = (self.folder / f"{len(self.processes)}.log").open("wb")
        process = subprocess.Popen([sys.executable, "-m", "dask", *arguments], stdout=log, stderr=log)
        log.close()
        self.processes.append(process)
        return process

    def scheduler(self) -> subprocess.Popen[bytes]:
        file = self.folder / f"scheduler-{len(self.processes)}.json"
        where = ("--host", "127.0.0.1", "--port", str(self.port), "--scheduler-file", str(file))
        process = self.start("scheduler", "--no-dashboard", *where)  # fmt: skip
        deadline = time.monotonic() + 60
        while not file.exists() or not file.read_text().strip().endswith("}"):
            assert time.monotonic() < deadline, "the scheduler does not start"
            time.sleep(0.1)
        self.address = str(json.loads(file.read_text())["address"])
        self.port = int(self.address.rpartition(":")[2])
        return process

    def worker(self, *extra: str) -> subprocess.Popen[bytes]:
        return self.start(
            "worker", self.address, "--nthreads", "1", "--no-dashboard", "--death-timeout", "60",
            "--local-directory", str(self.folder), "--host", "127.0.0.1", *extra,
        )  # fmt: skip

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
        for process in reversed(self.processes):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    found = Cluster(tmp_path)
    try:
        yield found
    finally:
        found.stop()
