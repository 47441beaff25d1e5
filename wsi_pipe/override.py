"""Settings changed by KEY=VALUE, as ``--set`` of every command takes them."""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar

from wsi_pipe.config import from_mapping, to_mapping
from wsi_pipe.errors import ConfigError

__all__ = ["call_only_keys", "changed", "flattened", "keys_of", "parse_changes", "refuse_twice"]

S = TypeVar("S")


def parse_changes(changes: Sequence[str], example: str = "tile.tile_px=224") -> list[tuple[tuple[str, ...], Any]]:
    """Keys, taken apart at their dots, and values of ``changes``, each "KEY=VALUE".

    VALUE: as in TOML, quotes around a string left out at will. Raises ConfigError where one is not of that form.
    """
    found = []
    for change in changes:
        key, equals, text = change.partition("=")
        parts = tuple(part.strip() for part in key.split("."))
        if not equals or not all(parts):
            raise ConfigError(f"--set {change}: is not of the form KEY=VALUE", remedy=f"write, for one, {example}")
        found.append((parts, _toml_value(text.strip())))
    return found


def changed(settings: S, changes: Sequence[str], *, example: str = "tile.tile_px=224") -> S:
    """Settings with ``changes`` over them, each "KEY=VALUE"; of two with one key the later holds.

    KEY: dotted, as in TOML (``segment.stain_min``). VALUE: see ``parse_changes``; a table stands for the whole of what
    was there. Raises ConfigError that names the changes
    when one is not of that form, when there is no such key, with those that are spelled nearly so, or when a type or a
    value is wrong.
    """
    if not changes:
        return settings
    values = to_mapping(settings)
    known = list(keys_of(type(settings)))
    others = [f"{key.rpartition('.')[0]}.{name}".lstrip(".") for key, name in _other_names(type(settings))]
    tables = {key.rpartition(".")[0] for key in known} - {""}
    of_a_call = set(call_only_keys(type(settings)))
    for change, (parts, value) in zip(changes, parse_changes(changes, example), strict=True):
        key = ".".join(parts)
        if key in of_a_call:
            option = "--" + parts[-1].replace("_", "-")
            raise ConfigError(f"--set {key}: is no setting, and said by an option of its own", remedy=f"give {option}")
        if key not in (*known, *others, *tables) and not _is_free(type(settings), parts):
            raise _unknown(change, key, known)
        table = values
        for part in parts[:-1]:
            inner = table.get(part)
            # What is no table becomes one here, and is refused by its type below.
            table[part] = dict(inner) if isinstance(inner, Mapping) else {}
            table = table[part]
        table[parts[-1]] = value
    try:
        return from_mapping(type(settings), values)
    except ConfigError as error:
        # The settings alone were fine, so it is the changes.
        shown = " ".join(f"--set {change}" for change in changes)
        raise ConfigError(f"{shown}: {error.message.removeprefix('settings: ')}", remedy=error.remedy) from error


def refuse_twice(changes: Sequence[str], own: Collection[str]) -> None:
    """Raises ConfigError where ``changes`` say what options of their own say too; ``own``: dotted keys of those."""
    for keys, _ in parse_changes(changes):
        for key in (".".join(keys[: n + 1]) for n in range(len(keys))):
            if key in own or (key == ".".join(keys) and any(name.startswith(f"{key}.") for name in own)):
                raise ConfigError(f"{key} is given by --set and by its own option", remedy="give one of them")


def flattened(settings: Any) -> dict[str, Any]:
    """Settings as dotted keys, without what is None or of one call alone."""
    values = to_mapping(settings)
    found = {}
    for key in keys_of(type(settings)):
        place: Any = values
        for part in key.split("."):
            place = place.get(part) if isinstance(place, Mapping) else None
        if place is not None:
            found[key] = place
    return found


def keys_of(cls: type[Any], before: str = "") -> Iterator[str]:
    """The dotted keys of a settings class, without those of one call alone."""
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        if item.metadata.get("call_only"):
            continue
        if dataclasses.is_dataclass(hints[item.name]):
            yield from keys_of(typing.cast(type[Any], hints[item.name]), f"{before}{item.name}.")
        else:
            yield before + item.name


def _other_names(cls: type[Any], before: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, another name of its last part) of settings that have one."""
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        yield from ((before + item.name, name) for name in item.metadata.get("also", ()))
        if dataclasses.is_dataclass(hints[item.name]):
            yield from _other_names(typing.cast(type[Any], hints[item.name]), f"{before}{item.name}.")


def call_only_keys(cls: type[Any], before: str = "") -> Iterator[str]:
    """The dotted keys of what is said in each call, and is no setting."""
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        if item.metadata.get("call_only"):
            yield before + item.name
        elif dataclasses.is_dataclass(hints[item.name]):
            yield from call_only_keys(typing.cast(type[Any], hints[item.name]), f"{before}{item.name}.")


def _is_free(cls: type[Any], parts: Sequence[str]) -> bool:
    """Whether a key lies in a table whose names are the user's, such as the encoders of each resolution."""
    for part in parts[:-1]:
        hint = typing.get_type_hints(cls).get(part)
        origin = typing.get_origin(hint)
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return True
        if not (isinstance(hint, type) and dataclasses.is_dataclass(hint)):
            return False
        cls = hint
    return False


def _unknown(change: str, key: str, known: Sequence[str]) -> ConfigError:
    """What is spelled nearly so, by the whole key or by its last part; else all there is of its table, or all."""
    last = {name.rpartition(".")[2]: name for name in reversed(known)}
    near = [last[name] for name in get_close_matches(key.rpartition(".")[2], last, n=2, cutoff=0.75)]
    near = near[:1] or get_close_matches(key, known, n=1, cutoff=0.75)
    table = key.rpartition(".")[0]
    mates = [name for name in known if table and name.startswith(f"{table}.")] or list(known)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return ConfigError(f"--set {change}: unknown setting {key!r}", remedy=f"{hint}known ones are {', '.join(mates)}")


def _toml_value(text: str) -> Any:
    """A TOML value, or the text itself where it is none: most names need no quotes then."""
    try:
        found = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    # More than one key: a line break in the text began another.
    return found["value"] if found.keys() == {"value"} else text
