"""Where figures come from: the commit, the environment and the machine, for result files to name."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from wsi_pipe.cores import available_cores

__all__ = ["provenance"]

PACKAGES = ("torch", "timm", "numpy", "scikit-learn")
ROOT = Path(__file__).resolve().parents[1]


def provenance(root: Path = ROOT) -> dict[str, Any]:
    """JSON-able facts: "commit" of ``root`` (None where it is no repository), "dirty" files, versions, processor.

    cores: that this process may use; machine_cores: that there are.
    """
    commit = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return {
        "commit": commit,
        "dirty": None if changed is None else [line[3:] for line in changed.splitlines()],
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("wsi-pipe", *PACKAGES)},
        "system": platform.platform(),
        "processor": _processor(),
        "cores": available_cores(),
        "machine_cores": os.cpu_count(),
    }


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.rstrip("\n")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """As the kernel names it, where it does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
