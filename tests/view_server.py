"""A viewer that runs beside a test, and a small job for it."""

from __future__ import annotations

import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from wsi_pipe.bag import read_grids, write_attention
from wsi_pipe.cli import group as commands
from wsi_pipe.cli import run_group
from wsi_pipe.synthetic import make_cohort

MODEL = "abmil"


def make_job(folder: Path) -> Path:
    """Two slides of 3,072 x 2,560 px at 0.25 um/px with texture features at 20x and 5x, and attention at 5x."""
    make_cohort(folder / "slides", 2, seed=3, size_px=(3072, 2560), mpp=0.25, downsamples=(1, 4))
    job = folder / "job"
    arguments = ["run", str(folder / "slides" / "slides.csv"), "-o", str(job), "-r", "20x", "-r", "5x", "-e", "texture"]
    assert run_group(commands, "wsi-pipe", [*arguments, "--tile-px", "128"]) == 0
    for bag in sorted((job / "bags").glob("*.h5")):
        coarse = read_grids(bag)[0]
        weights = np.arange(1, len(coarse) + 1, dtype=np.float32)
        write_attention(bag, coarse.label, MODEL, weights / weights.sum())
    return job


@contextmanager
def viewer(*arguments: str) -> Iterator[str]:
    """``wsi-pipe view`` as a process of its own; gives its address."""
    command = [sys.executable, "-m", "wsi_pipe", "view", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:"), "the viewer did not start"
        yield address
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()


def get(url: str, method: str = "GET", **headers: str) -> tuple[int, bytes]:
    """Status and body of a request."""
    request = urllib.request.Request(url, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
