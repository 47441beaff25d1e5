"""Run the notebooks of docs/notebooks from top to bottom, each in a folder of its own, and save them with outputs.

    python docs/run_notebooks.py OUT [NAME ...]

OUT is the folder to save into, docs/notebooks itself to bring the outputs that are shown up to date. Needs the extra
``test``. A cell that fails ends the program with that cell and its error. What depends on the machine is taken out of
the outputs: the folder that a notebook ran in, times, and warnings of libraries.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parent / "notebooks"
TIMEOUT_S = 1800
START_S = 600


def run(path: Path, out: Path) -> None:
    """Run one notebook and save it in ``out``."""
    notebook: Any = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as own:
        # What the kernel keeps of itself does not go into the user's home.
        os.environ |= dict.fromkeys(("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"), own)
        where = {"metadata": {"path": folder}}
        client = NotebookClient(notebook, timeout=TIMEOUT_S, startup_timeout=START_S, resources=where)
        client.execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)
            if cell.cell_type == "code":
                cell.outputs = [_plain(item, folder) for item in cell.outputs if item.get("name") != "stderr"]
    for name in ("kernelspec", "language_info"):
        kept = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
        notebook.metadata.pop(name, None)
        notebook.metadata.update({name: kept[name]} if name in kept else {})
    nbformat.validate(notebook)
    out.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, out / path.name)


def _plain(value: Any, folder: str) -> Any:
    """An output without the folder that it was made in."""
    if isinstance(value, str):
        return value.replace(f"{folder}/", "").replace(folder, ".")
    if isinstance(value, dict):
        for key in value:
            value[key] = _plain(value[key], folder)
        return value
    return [_plain(item, folder) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    names = sys.argv[2:] or sorted(path.name for path in NOTEBOOKS.glob("*.ipynb"))
    for name in names:
        run(NOTEBOOKS / name, Path(sys.argv[1]))
