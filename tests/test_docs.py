"""The documentation as a site: nothing broken, every option in it, and command lines that the program understands."""

from __future__ import annotations

import html.parser
import importlib
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import click
import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
NEEDED = ("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers.python")
WRITTEN_FOR_THE_SITE = ("index", "start", "install", "workflows", "coming-from", "faq", "glossary")


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pages = load(DOCS / "site_pages.py")


def commands() -> Iterator[tuple[str, str, click.Command, click.Context]]:
    for name, module in pages.COMMANDS.items():
        group = importlib.import_module(module).group
        context = click.Context(group, info_name=name)
        for command in group.list_commands(context):
            found = group.get_command(context, command)
            yield name, command, found, click.Context(found, context, info_name=command)


ALL = list(commands())


@pytest.mark.parametrize(("name", "command", "found", "context"), ALL, ids=[f"{a} {b}" for a, b, *_ in ALL])
def test_every_option_is_in_the_reference(
    name: str, command: str, found: click.Command, context: click.Context
) -> None:
    page = pages.command_page(name, importlib.import_module(pages.COMMANDS[name]).group)
    section = page.split(f"\n## {name} {command}\n")[1].split("\n## ")[0]
    table = [line for line in section.split("\n") if line.startswith("| `")]
    for line in table:
        cells = re.split(r"(?<!\\)\|", line)[1:-1]
        assert len(cells) == 4, line
        assert all(cell.strip() for cell in cells), line
    options = [
        p
        for p in found.get_params(context)
        if isinstance(p, click.Option) and not {"--help", "--help-all"} & set(p.opts)
    ]
    assert len(table) == len(options)
    for option in options:
        for spelling in (*option.opts, *option.secondary_opts):
            assert sum(f"`{spelling}`" in line.split(" | ")[0] for line in table) == 1, spelling


def rows(name: str, command: str) -> dict[str, tuple[str, str, str]]:
    found, context = next((f, c) for a, b, f, c in ALL if (a, b) == (name, command))
    return {row[0]: row[1:] for row in pages.option_rows(found, context)}


def test_defaults_units_and_ranges_are_told() -> None:
    run = rows("wsi-pipe", "run")
    assert run["`--tile-px`"][:2] == ("whole number from 8, px", "256")
    assert run["`--judge-um`"][:2] == ("number, um", "128")
    assert run["`--min-tissue`"][:2] == ("number from 0 to 1", "0.25")
    assert run["`-r`, `--resolution`"][:2] == ("`RES,RES`; repeatable", "20x,5x")
    assert run["`--workers`"][:2] == ("whole number from 1", "1")
    assert run["`--timeout`"][0] == "number from 1, seconds"
    assert run["`--memory`"][:2] == ("whole number from 64, MiB", "2048")
    assert run["`--report`, `--no-report`"][:2] == ("nothing", "on")
    assert run["`-o`, `--out`"][1] == "must be given"
    assert rows("wsi-pipe", "tile")["`--save-tiles`"][0] == "`jpg` or `png` or `webp` or `shards`"


def lines_of(page: Path) -> Iterator[str]:
    """Command lines in the blocks and between backquotes of a page, joined where they are continued."""
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"```[a-z]*\n(.*?)```", text, re.DOTALL):
        yield from block.replace("\\\n", " ").split("\n")
    for line in re.sub(r"```.*?```", "", text, flags=re.DOTALL).split("\n"):
        yield from re.findall(r"`([^`]+)`", line)


@pytest.mark.parametrize("page", [*WRITTEN_FOR_THE_SITE, "scaling"])
def test_command_lines_of_pages_are_understood(page: str) -> None:
    known = {
        (name, command): {s for p in found.get_params(context) for s in (*p.opts, *p.secondary_opts)}
        for name, command, found, context in ALL
    }
    seen = 0
    for line in lines_of(DOCS / f"{page}.md"):
        # What stands before the program: docker run ..., for example.
        found = re.search(r"(?:^|\s)(wsi-pipe|lrmil) ([a-z]+)( .*)?$", line.split(" && ")[-1].split("  #")[0])
        if found is None or "--" in found[0][: found.start(2) - found.start()]:
            continue
        name, command, rest = found[1], found[2], found[3] or ""
        assert (name, command) in known, f"{page}: {line}"
        for word in shlex.split(rest):
            option = word.split("=")[0]
            if re.fullmatch(r"--?[a-z][a-z-]*", option):
                assert option in known[name, command], f"{page}: {line}: {option}"
                seen += 1
    assert seen or page in ("glossary", "index", "install")


@pytest.mark.parametrize("page", WRITTEN_FOR_THE_SITE)
def test_prose_is_wrapped(page: str) -> None:
    for number, line in enumerate((DOCS / f"{page}.md").read_text(encoding="utf-8").split("\n"), 1):
        assert len(line) <= 120 or line.startswith("|"), f"{page}.md:{number}"


def test_a_notebook_is_a_page(tmp_path: Path) -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "words"]},
        {
            "cell_type": "code",
            "source": ["1 + 1"],
            "outputs": [
                {"output_type": "stream", "text": ["said\n"]},
                {"output_type": "execute_result", "data": {"text/plain": ["2"]}},
                {"output_type": "display_data", "data": {"image/png": "aGk=\n", "text/plain": ["<Figure>"]}},
            ],
        },
        {"cell_type": "code", "source": [], "outputs": []},
    ]
    path = tmp_path / "first.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    assert pages.notebook_page(path) == (
        "# Title\nwords\n\n```python\n1 + 1\n```\n\n```text\nsaid\n```\n\n```text\n2\n```\n\n"
        '<img alt="what the cell drew" src="data:image/png;base64,aGk=">\n\n[The notebook](first.ipynb)\n'
    )


@pytest.mark.parametrize("path", sorted((DOCS / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_what_a_notebook_drew_is_on_its_page(path: Path) -> None:
    outputs = [o for cell in json.loads(path.read_text())["cells"] for o in cell.get("outputs", [])]
    drawn = [o for o in outputs if any(kind.startswith("image/") for kind in o.get("data", {}))]
    page = pages.notebook_page(path)
    assert page.count('<img alt="what the cell drew"') == len(drawn)
    assert "Image object" not in page


class Links(html.parser.HTMLParser):
    """Where a page leads to, what it loads, and the anchors in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors |= {str(values[key]) for key in ("id", "name") if values.get(key)}
        if tag == "a" and values.get("href"):
            self.targets.append(str(values["href"]))
        if tag in ("img", "script") and values.get("src"):
            self.loaded.append(str(values["src"]))
        if tag == "link" and values.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.loaded.append(str(values["href"]))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly."""
    for module in NEEDED:
        try:
            there = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            there = None
        if there is None:
            pytest.skip(f"{module.split('.')[0]} is not installed: pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site") / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_no_link_of_the_site_is_broken(site: Path) -> None:
    built = {path: Links(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    broken = []
    for path, links in built.items():
        if path.name == "404.html":
            # Served from anywhere: its links start at the root.
            continue
        for target in links.targets + links.loaded:
            parts = urllib.parse.urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            there = (path.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else path
            there = there / "index.html" if there.is_dir() else there
            anchor = urllib.parse.unquote(parts.fragment)
            if not there.is_file() or (anchor and there in built and anchor not in built[there].anchors):
                broken.append(f"{path.name} -> {target}")
    assert not broken
    assert len(built) > 25


def test_the_site_fetches_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        for loaded in Links(path.read_text(encoding="utf-8")).loaded:
            assert not re.match(r"(https?:)?//", loaded), f"{path.name} loads {loaded}"


def test_every_page_is_in_the_site(site: Path) -> None:
    for path in DOCS.rglob("*.md"):
        assert (site / path.relative_to(DOCS).with_suffix(".html")).is_file(), path
    # Docstrings were found: a function with its signature, a class with its methods.
    api = (site / "api.html").read_text(encoding="utf-8")
    assert 'id="wsi_pipe.slides.opening.open_slide"' in api
    assert 'id="wsi_pipe.geometry.TileGrid"' in api
    assert "wsi_pipe.tissue.find_tissue" in api
