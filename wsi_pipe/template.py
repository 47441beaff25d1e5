"""Settings as a file to be edited: every setting with its value, its unit and what it does, from the settings classes.

What is told stands in the fields' metadata (``wsi_pipe.config``), so a setting that is added is in the file.
"""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["settings_template"]

WIDTH = 100


def settings_template(settings: Any, title: str) -> str:
    """TOML text that reads back as ``settings``, each setting under a comment; what is None is a comment itself.

    title: the first comment, whose lines stay as they are.
    """
    lines = [f"# {line}".rstrip() for line in title.splitlines()]
    tables = []
    for item in _shown(settings):
        value = getattr(settings, item.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            tables.append((item, value))
        else:
            lines += ["", *_setting(item, value)]
    for item, value in tables:
        lines += ["", "", *_comment(str(item.metadata.get("help", ""))), f"[{item.name}]"]
        for inner in _shown(value):
            lines += ["", *_setting(inner, getattr(value, inner.name))]
    return "\n".join(lines) + "\n"


def _shown(settings: Any) -> Iterator[dataclasses.Field[Any]]:
    return (item for item in dataclasses.fields(settings) if not item.metadata.get("call_only"))


def _setting(item: dataclasses.Field[Any], value: object) -> list[str]:
    """The comment of a setting, with its default and unit, and its value; an example where it has none."""
    text = str(item.metadata.get("help", "")).rstrip(".")
    text = f"{text[:1].upper()}{text[1:]}." if text else ""
    if choices := item.metadata.get("choices"):
        text += f" One of {', '.join(choices)}."
    default = item.metadata.get("absent", "none") if value is None else _toml(value)
    unit = item.metadata.get("unit", "")
    text += f" [{default}{f' {unit}' if unit and value is not None else f'; {unit}' if unit else ''}]"
    shown = (
        f"# {item.name} = {_toml(item.metadata.get('example'))}" if value is None else f"{item.name} = {_toml(value)}"
    )
    return [*_comment(text), shown]


def _comment(text: str) -> list[str]:
    lines = textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)
    return [f"# {line}" for line in lines] or ["#"]


def _toml(value: object) -> str:
    """A value as TOML. Raises TypeError for one that has no such form."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{json.dumps(str(k))} = {_toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, Sequence):
        return f"[{', '.join(map(_toml, value))}]"
    raise TypeError(f"{type(value).__name__} has no form in TOML")
