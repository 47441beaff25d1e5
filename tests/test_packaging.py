"""What is installed: the two packages with their data, extras for what the default path does without."""

from __future__ import annotations

import ast
import configparser
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def names(requirements: str) -> set[str]:
    return {re.split(r"[\[<>=!~; ]", line)[0].lower() for line in requirements.split("\n") if line.strip()}


def test_pipelines_stay_in_the_repository(setup: configparser.ConfigParser) -> None:
    setuptools = pytest.importorskip("setuptools")
    include = setup["options.packages.find"]["include"].split()
    found = set(setuptools.find_packages(str(ROOT), include=include))
    assert {name.split(".")[0] for name in found} == {"wsi_pipe", "lrmil"}
    # A folder without __init__.py would be left out in silence.
    for package in ("wsi_pipe", "lrmil"):
        for path in (ROOT / package).rglob("*.py"):
            assert ".".join(path.relative_to(ROOT).parent.parts) in found, path


def test_every_kind_of_file_in_the_packages_is_installed(setup: configparser.ConfigParser) -> None:
    kinds = {item.strip().removeprefix("*") for item in setup["options.package_data"]["*"].split(",")}
    there = {path.suffix or path.name for package in ("wsi_pipe", "lrmil") for path in (ROOT / package).rglob("*.*")}
    # Sources in C are built; the rest is Python's or the build's own.
    assert there - {".py", ".pyc", ".c", ".so", ".pyd"} <= kinds | {".typed"}
    assert "py.typed" in kinds


def test_presets_of_the_experiment_are_installed(setup: configparser.ConfigParser) -> None:
    setuptools = pytest.importorskip("setuptools")
    # Patterns are looked for in folders that are packages, and not below them.
    found = setuptools.find_packages(str(ROOT), include=setup["options.packages.find"]["include"].split())
    assert "lrmil.experiment.presets" in found
    names = {path.name for path in (ROOT / "lrmil/experiment/presets").iterdir()}
    assert {"paper.toml", "paper-small.toml", "cpu.toml", "cpu-small.toml", "gpu-full.toml"} <= names
    assert "*.toml" in setup["options.package_data"]["*"]


def imported_at_all(package: str) -> set[str]:
    found = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"wsi_pipe", "lrmil"}


DISTRIBUTION = {
    "PIL": "pillow", "cv2": "opencv-python-headless", "distributed": "dask", "openslide": "openslide-python",
    "skimage": "scikit-image", "sklearn": "scikit-learn", "tomli_w": "tomli-w", "pynvml": "nvidia-ml-py",
}  # fmt: skip
COMES_WITH = {
    "aiohttp": "fsspec", "huggingface_hub": "timm", "markupsafe": "jinja2", "mpl_toolkits": "matplotlib",
    "numcodecs": "zarr", "torchvision": "timm",
}  # fmt: skip
"""What a requirement of ours brings along for certain."""


def test_what_is_imported_is_required_or_an_extra(setup: configparser.ConfigParser) -> None:
    required = names(setup["options"]["install_requires"])
    extras = {name for key, text in setup["options.extras_require"].items() if key != "test" for name in names(text)}
    for package in ("wsi_pipe", "lrmil"):
        for module in imported_at_all(package):
            name = DISTRIBUTION.get(module, COMES_WITH.get(module, module)).lower()
            assert name in required | extras, f"{package} imports {module}, which nothing brings"


def test_dask_is_no_requirement_but_of_the_extra(setup: configparser.ConfigParser) -> None:
    assert "dask" not in names(setup["options"]["install_requires"])
    assert names(setup["options.extras_require"]["cluster"]) == {"dask"}


def test_classifiers_are_the_versions_that_the_tests_are_run_on(setup: configparser.ConfigParser) -> None:
    stated = re.findall(r"Python :: (3\.\d+)", setup["metadata"]["classifiers"])
    wheels = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["cibuildwheel"]["build"]
    assert [f"cp{version.replace('.', '')}-*" for version in stated] == wheels
    assert setup["options"]["python_requires"] == f">={stated[0]}"
    tried = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert all(f"python{version}" in tried for version in stated)
