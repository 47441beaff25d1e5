"""What an import loads: counted, not timed."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "cv2", "numpy", "h5py", "pandas", "click", "dask", "scipy", "timm")
PROGRAM = """
import sys
before = set(sys.modules)
import {module}
dir({module})
ours = sorted(name for name in set(sys.modules) - before if name.split(".")[0] in ("wsi_pipe", "lrmil"))
loaded = [name for name in {heavy!r} if name in sys.modules]
print(len(set(sys.modules) - before), ours, loaded)
"""


@pytest.mark.parametrize("module", ["wsi_pipe", "lrmil"])
def test_an_import_loads_nothing_but_itself(module: str) -> None:
    program = PROGRAM.format(module=module, heavy=HEAVY)
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    count, rest = said.split(" ", 1)
    assert rest.strip() == f"['{module}'] []"
    # The names that are public, and what importlib and typing take.
    assert int(count) < 60


def test_opening_a_slide_loads_no_torch() -> None:
    program = "import sys, wsi_pipe; wsi_pipe.open; wsi_pipe.open_bag; wsi_pipe.Job; print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "False"


def test_the_package_of_distillation_can_be_called_whichever_way_it_was_imported() -> None:
    program = (
        "from lrmil.distill import DistillSettings; import lrmil, lrmil.distill.settings as s\n"
        "print(callable(lrmil.distill), s.DistillSettings is DistillSettings)"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "True True"
