"""Pages of the site that are made when it is built: the command lines from Click, Python from docstrings, notebooks.

mkdocs.yml names this file as a hook. Nothing is installed with it and nothing imports it but the tests.
"""

from __future__ import annotations

import html
import importlib
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {"wsi-pipe": "wsi_pipe.cli", "lrmil": "lrmil.cli"}
FROM_ROOT = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}

MODULES = (
    "wsi_pipe",
    "wsi_pipe.api",
    "wsi_pipe.slides.opening",
    "wsi_pipe.slides.base",
    "wsi_pipe.geometry",
    "wsi_pipe.tissue",
    "wsi_pipe.tiling",
    "wsi_pipe.tiles",
    "wsi_pipe.encoders",
    "wsi_pipe.bag",
    "wsi_pipe.config",
    "wsi_pipe.synthetic",
    "wsi_pipe.errors",
    "lrmil.splits",
    "lrmil.store",
    "lrmil.model",
    "lrmil.losses",
    "lrmil.metrics",
    "lrmil.errors",
)
"""What the page on Python holds, in the order of the data; those that are not there are left out."""

UNITS = {
    "_um": "um", "_px": "px", "_um2": "um²", "_mpp": "um/px", "_mib": "MiB", "_gib": "GiB", "_s": "seconds",
    "mpp": "um/px",
}  # fmt: skip
METAVARS = {"S": "seconds", "UM": "um/px", "MIB": "MiB", "GIB": "GiB"}


# -- commands ---------------------------------------------------------------------------------


def command_page(name: str, group: click.Group) -> str:
    """A command line as Markdown: every command with every argument and option, what it takes, its default."""
    lines = [f"# {name}", "", _prose(group.help), ""]
    context = click.Context(group, info_name=name)
    names = group.list_commands(context)
    lines += [f"- [`{name} {command}`](#{name}-{command}): {_short(group, context, command)}" for command in names]
    for command in names:
        found = group.get_command(context, command)
        assert found is not None
        lines += ["", f"## {name} {command}", "", *_command(found, click.Context(found, context, info_name=command))]
    if group.epilog:
        lines += ["", _prose(group.epilog)]
    return "\n".join(lines) + "\n"


def _short(group: click.Group, context: click.Context, name: str) -> str:
    table = getattr(group, "table", {})
    command = group.get_command(context, name)
    text = table[name][1] if name in table else command.get_short_help_str(200) if command else ""
    return _cell(text)


def _command(command: click.Command, context: click.Context) -> list[str]:
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    lines = ["```", usage, "```", "", _prose(command.help), ""]
    rows = list(option_rows(command, context))
    if rows:
        # In a box of its own, so that options are not broken in the middle.
        lines += ['<div class="options" markdown>', ""]
        lines += ["| option | takes | default | what it does |", "|---|---|---|---|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        lines += ["", "</div>"]
    return lines


def option_rows(command: click.Command, context: click.Context) -> Iterator[tuple[str, str, str, str]]:
    """Spelling, what it takes, default and help of each option of a command, those too that ``--help`` leaves out."""
    for param in command.get_params(context):
        if not isinstance(param, click.Option) or {"--help", "--help-all"} & {*param.opts}:
            continue
        text = " ".join((param.help or "").split())
        default, text = _default(param, text)
        spelled = ", ".join(f"`{name}`" for name in (*param.opts, *param.secondary_opts))
        yield spelled, _takes(param), _cell(default), _cell(text or "-")


def _default(param: click.Option, text: str) -> tuple[str, str]:
    """The default and the help without it: it stands in brackets at the end where an option that is not given says
    nothing."""
    in_words = re.fullmatch(r"(.*?)\s*\[([^\[\]]+)\]", text)
    if in_words:
        return in_words[2], in_words[1]
    if param.required:
        return "must be given", text
    value = param.default
    if callable(value) or value is None or repr(value).startswith("Sentinel") or value in ((), []):
        return ("off" if param.is_flag else "none"), text
    if isinstance(value, bool):
        return ("on" if value else "off"), text
    return f"{value:g}" if isinstance(value, float) else str(value), text


def _takes(param: click.Option) -> str:
    if param.is_flag:
        return "nothing"
    kind, metavar = param.type, param.metavar or ""
    unit = next((u for ending, u in UNITS.items() if param.name and param.name.endswith(ending)), "")
    unit = unit or METAVARS.get(metavar, "")
    if isinstance(kind, click.Choice):
        shown = " or ".join(f"`{choice}`" for choice in kind.choices)
    elif isinstance(kind, (click.IntRange, click.FloatRange)):
        whole = "whole number" if isinstance(kind, click.IntRange) else "number"
        shown = f"{whole} {_range(kind)}".strip()
    elif kind.name in ("integer", "float"):
        shown = "whole number" if kind.name == "integer" else "number"
    else:
        shown = f"`{metavar or kind.name.upper()}`"
    shown += f", {unit}" if unit else ""
    return _cell(shown + ("; repeatable" if param.multiple else ""))


def _range(kind: click.IntRange | click.FloatRange) -> str:
    low = "" if kind.min is None else f"{'above' if kind.min_open else 'from'} {kind.min:g}"
    high = "" if kind.max is None else f"{'below' if kind.max_open else 'to'} {kind.max:g}"
    return " ".join(part for part in (low, high) if part)


def _cell(text: str) -> str:
    """Text that is neither HTML nor ends a cell of a table."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    plain = [part if part.startswith("`") else html.escape(part, quote=False).replace("*", "\\*") for part in parts]
    return "".join(plain).replace("|", "\\|").replace("[", "&#91;").replace("]", "&#93;")


def _prose(text: str | None) -> str:
    """A help text: paragraphs, and blocks after ``\\b`` as they stand."""
    found = []
    for block in re.split(r"\n\s*\n", (text or "").strip()):
        kept = block.lstrip().startswith("\b")
        lines = [line.strip() for line in block.replace("\b", "").strip().split("\n")]
        found.append("\n".join(["```", *lines, "```"]) if kept else html.escape(" ".join(lines), quote=False))
    return "\n\n".join(found)


# -- Python, and what lies elsewhere in the repository ---------------------------------------------------------------


def api_page() -> str:
    """Modules for mkdocstrings to fill in."""
    there = [name for name in MODULES if importlib.util.find_spec(name) is not None]
    intro = (
        "# Python\n\nFrom the docstrings of what is meant to be used. Shapes are in brackets, `_px` are pixels, `_um` "
        "micrometres, `_l0` level-0 pixels of the whole image.\n"
    )
    return intro + "".join(f"\n::: {name}\n" for name in there)


def from_root(text: str) -> str:
    """Markdown of the repository's root as a page: links into docs/ lose the folder, others lose the link."""
    text = re.sub(r"\]\(docs/", "](", text)
    pages = {source: page for page, source in FROM_ROOT.items()}
    for source, page in pages.items():
        text = text.replace(f"]({source})", f"]({page})")
    return text


def notebook_page(path: Path) -> str:
    """A notebook as Markdown: prose, code, and what it printed or drew."""
    book = json.loads(path.read_text(encoding="utf-8"))
    parts: list[str] = []
    for cell in book["cells"]:
        source = "".join(cell["source"]).rstrip()
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code" and source:
            parts.append(f"```python\n{source}\n```")
            parts += [shown for output in cell["outputs"] if (shown := _output(output))]
    return "\n\n".join(parts) + f"\n\n[The notebook]({path.name})\n"


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    for kind in ("image/png", "image/jpeg"):
        if kind in data:
            coded = "".join("".join(data[kind]).split())
            return f'<img alt="what the cell drew" src="data:{kind};base64,{coded}">'
    if "image/svg+xml" in data or "text/html" in data:
        return "".join(data.get("image/svg+xml") or data["text/html"])
    text = "".join(output.get("text", data.get("text/plain", ""))).rstrip()
    return f"```text\n{text}\n```" if text else ""


# -- hooks of mkdocs ---------------------------------------------------------------------------------


def generated() -> dict[str, str]:
    """Pages that lie nowhere, by their place in the site."""
    pages = {
        f"cli-{name}.md": command_page(name, importlib.import_module(module).group) for name, module in COMMANDS.items()
    }
    pages["api.md"] = api_page()
    pages |= {page: from_root((ROOT / source).read_text(encoding="utf-8")) for page, source in FROM_ROOT.items()}
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        pages[f"notebooks/{path.stem}.md"] = notebook_page(path)
    return pages


def listed(nav: Any) -> set[str]:
    """Pages that a nav of mkdocs.yml names."""
    if isinstance(nav, str):
        return {nav}
    items = nav.values() if isinstance(nav, dict) else nav
    return set().union(*(listed(item) for item in items))


def on_config(config: Any) -> Any:
    """Pages that no section names come last: notebooks under the tutorials, others under "More"."""
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")} | set(generated())
    more = sorted(there - listed(config.nav))
    books = [page for page in more if page.startswith("notebooks/")]
    for section in config.nav:
        if "Tutorials" in section:
            section["Tutorials"] += books
    others = [page for page in more if page not in books]
    if others:
        config.nav.append({"More": others})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages."""
    from mkdocs.structure.files import File

    for place, text in generated().items():
        files.append(File.generated(config, place, content=text))
    return files
