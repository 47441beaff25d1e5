"""The import rules of the design, checked on the syntax tree of every module.

Modules are listed in order; one may import only what stands before it. That rules out cycles, and keeps data flowing
one way: slide -> mask -> grids -> tiles -> encoder -> bag -> data set -> model -> trainer -> predictor.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

WSI_PIPE = [
    # values
    "masking",
    "errors",
    "cores",
    "stopping",
    "compiled",
    "geometry",
    "files",
    "ownership",
    "locking",
    "seen",
    "config",
    "override",
    "template",
    "outcome",
    # slides, and pure functions on arrays
    "slides",
    "synthetic",
    "tissue",
    "tiling",
    "quality",
    # streams, encoders, files
    "overview",
    "tiles",
    "encoders",
    "bag",
    # engines
    "extract",
    "ids",
    "shards",
    "tables",
    "naming",
    "manifest",
    "execute",
    # composition
    "pictures",
    "pages",
    "job",
    "asked",
    "plan",
    "care",
    "interop",
    "adopt",
    "pooling",
    "benchmark",
    "report",
    "view",
    "demo",
    "doctor",
    "running",
    "api",
    # commands
    "cli",
    "__main__",
]
LRMIL = [
    "errors",
    "tables",
    "config",
    "splits",
    "site_splits",
    "metrics",
    "pictures",
    "store",
    "data",
    "sites",
    "model",
    "subsets",
    "losses",
    "ood",
    "targets",
    "checkpoint",
    "leaks",
    "deploy",
    "distill",
    "trainer",
    "predictor",
    "experiment",
    "cascade",
    "finetuning",
    "resolve",
    "probe",
    "api",
    "cli",
    "__main__",
]
ORDER = {"wsi_pipe": WSI_PIPE, "lrmil": LRMIL}

# Third-party package -> the only modules that may import it.
ONLY_IN = {
    "click": {"wsi_pipe.cli", "lrmil.cli"},
    "dask": {"wsi_pipe.execute"},
    "distributed": {"wsi_pipe.execute"},
    "h5py": {"wsi_pipe.bag", "wsi_pipe.interop", "wsi_pipe.adopt", "lrmil.store"},
    "openslide": {"wsi_pipe.slides"},
    "tifffile": {"wsi_pipe.slides"},
    "imagecodecs": {"wsi_pipe.slides"},
    "simplejpeg": {"wsi_pipe.slides"},
    "pyvips": {"wsi_pipe.slides"},
    "pydicom": {"wsi_pipe.slides"},
    "zarr": {"wsi_pipe.slides", "wsi_pipe.interop"},
    "numcodecs": {"wsi_pipe.slides"},
    "timm": {"wsi_pipe.encoders", "lrmil.distill"},
    "huggingface_hub": {"wsi_pipe.encoders"},
    "onnx": {"lrmil.deploy"},
    "onnxruntime": {"lrmil.deploy", "wsi_pipe.encoders"},
    "onnxscript": {"lrmil.deploy"},
}
# Reading, segmenting and tiling must start without torch.
TORCH_FREE = {
    "masking", "errors", "cores", "stopping", "geometry", "files", "ownership", "locking", "seen", "config", "outcome",
    "slides", "synthetic", "tissue", "tiling", "quality", "overview", "tiles", "bag", "ids", "tables", "naming",
    "manifest", "execute", "override", "template", "shards", "pictures", "pages", "plan", "care",
}  # fmt: skip
PURE = {"tissue", "tiling", "quality"}
IMPURE_IMPORTS = {"pathlib", "os", "io", "subprocess", "wsi_pipe.slides", "wsi_pipe.files"}


def modules() -> list[tuple[str, Path]]:
    found = []
    for package in ORDER:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.append((".".join(p for p in parts if p != "__init__"), path))
    return found


def imports(path: Path, module: str, *, top_level_only: bool = False) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import in line {node.lineno}"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def group(module: str) -> tuple[str, str] | None:
    parts = module.split(".")
    return (parts[0], parts[1]) if parts[0] in ORDER and len(parts) > 1 else None


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda value: str(value) if isinstance(value, str) else "")
def test_imports(module: str, path: Path) -> None:
    package = module.split(".")[0]
    own = group(module)
    if own is not None:
        assert own[1] in ORDER[package], f"{module} has no place in the order: add it where its imports allow"
    inside = f"{own[0]}.{own[1]}" if own else package
    for name in imports(path, module):
        top = name.split(".")[0]
        assert not (package == "wsi_pipe" and top in ("lrmil", "pipelines")), f"{module} imports {name}"
        assert not (package == "lrmil" and top == "pipelines"), f"{module} imports {name}"
        allowed = ONLY_IN.get(top)
        assert allowed is None or inside in allowed, f"{module} imports {name}: only {', '.join(sorted(allowed))} may"
        target = group(name)
        if own and target and target[0] == package and target[1] in ORDER[package] and target[1] != own[1]:
            order = ORDER[package]
            assert order.index(target[1]) < order.index(own[1]), f"{module} imports {name}, which stands after it"
        if own and package == "wsi_pipe" and own[1] in TORCH_FREE:
            assert top not in ("torch", "torchvision", "timm"), f"{module} imports {name}: it must start without torch"
        if own and own[1] in PURE:
            assert name not in IMPURE_IMPORTS, f"{module} imports {name}: arrays in, values out"


def files_imported(module: str, path: Path, known: set[str]) -> set[str]:
    """The modules of ours that a file names in its imports, lazy ones and those for types among them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in known else node.module)
    # A package's root is run before anything in it, and imports nothing of it until it is asked for a name.
    return (found & known) - {module, module.split(".")[0]}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, in order; none where there is none."""
    done: set[str] = set()
    for start in graph:
        path: list[str] = []
        stack = [(start, iter(sorted(graph[start])))] if start not in done else []
        while stack:
            module, ahead = stack[-1]
            if len(path) < len(stack):
                path.append(module)
            following = next(ahead, None)
            if following is None:
                done.add(module)
                stack.pop()
                path.pop()
            elif following in path:
                return [*path[path.index(following) :], following]
            elif following not in done:
                stack.append((following, iter(sorted(graph[following]))))
    return []


def test_no_file_takes_part_in_a_circle() -> None:
    known = {module for module, _ in modules()}
    assert circle({module: files_imported(module, path, known) for module, path in modules()}) == []


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}}) == ["b", "d", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_nothing_but_its_version_is_imported_of_a_package_s_root() -> None:
    known = {module for module, _ in modules()}
    for module, path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module in ORDER:
                taken = {alias.name for alias in node.names if f"{node.module}.{alias.name}" not in known}
                assert taken <= {"__version__"}, f"{module} imports {taken} of the root of {node.module}"


def test_pipelines_are_imported_by_no_package() -> None:
    for module, path in modules():
        assert not any(name.split(".")[0] == "pipelines" for name in imports(path, module)), module


def test_every_module_in_the_order_is_named_once() -> None:
    for names in ORDER.values():
        assert len(names) == len(set(names))
