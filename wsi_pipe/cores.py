"""How many processor cores there are to use, and how processes beside one another share them."""

from __future__ import annotations

import os

from wsi_pipe.errors import ConfigError

__all__ = ["CORES_VARIABLE", "available_cores", "core_shares", "cores_environment"]

CORES_VARIABLE = "WSI_PIPE_CORES"
"""Environment variable that says how many cores a process and its children may use."""

LIBRARY_VARIABLES = (
    "OMP_NUM_THREADS",  # torch, and what is built with OpenMP
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENCV_FOR_THREADS_NUM",
    "VIPS_CONCURRENCY",
)


MAX_CORES = 1024
"""More than any machine that this runs on has: each is a thread of its own here and there."""


def available_cores() -> int:
    """Cores that this process may use: as the environment says, else those it is pinned to, else all.

    Raises ConfigError where the environment says something else than a number from 1 to ``MAX_CORES``.
    """
    told = os.environ.get(CORES_VARIABLE, "").strip()
    if told:
        if not (told.isascii() and told.isdecimal() and len(told) < 10 and 0 < int(told) <= MAX_CORES):
            raise ConfigError(
                f"{CORES_VARIABLE}={told[:40]} is no number of cores from 1 to {MAX_CORES}",
                remedy="set it to what the processes of this machine may use, or leave it out",
            )
        return int(told)
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def core_shares(processes: int) -> list[int]:
    """The cores of this process dealt out to ``processes`` children, at least one each."""
    each, rest = divmod(available_cores(), processes)
    return [max(each + (n < rest), 1) for n in range(processes)]


def cores_environment(cores: int) -> dict[str, str]:
    """Environment variables that hold a child process, and the libraries that start threads in it, to ``cores``.

    What the user set for a library stays. They must be there when the process starts: libraries look but once.
    """
    return {CORES_VARIABLE: str(cores)} | {name: os.environ.get(name, str(cores)) for name in LIBRARY_VARIABLES}
