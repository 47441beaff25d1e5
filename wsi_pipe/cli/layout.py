"""How a command's options are told of: under which heading, always or in the long help alone, and in which unit.

Options are known by their longest spelling, "--tile-px", or by that of one command, "benchmark --cache", which goes
first. What no table names is a command's own, and stands under "Options" in both helps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import click

__all__ = ["OWN", "SHORT", "Layout", "flag_of", "is_number", "is_switch", "options_of", "record", "sections"]

OWN = "Options"
"""Heading of what no table names."""
WIDEST_CHOICE = 60
"""Characters of a choice that stands beside its option."""
SHORT = 14
"""A command of so many options shows them all at once."""


@dataclass(frozen=True)
class Layout:
    """The tables of one program.

    program: its name. headings: heading -> options, both in the order of the help. rare: options that the long help
    alone shows. units: option -> what stands for its number. spellings: old spellings, which work and are not shown.
    arguments: what stands for an argument -> what it can be.
    """

    program: str
    headings: Mapping[str, Sequence[str]] = field(default_factory=dict)
    rare: frozenset[str] = frozenset()
    units: Mapping[str, str] = field(default_factory=dict)
    spellings: frozenset[str] = frozenset()
    arguments: Mapping[str, str] = field(default_factory=dict)

    def place(self, command: str, flag: str) -> tuple[str, int]:
        """The heading of an option, and its place there."""
        for name in (f"{command} {flag}", flag):
            for heading, flags in self.headings.items():
                if name in flags:
                    return heading, list(flags).index(name)
        return OWN, 0

    def is_rare(self, command: str, flag: str) -> bool:
        """Whether the long help alone shows an option."""
        return f"{command} {flag}" in self.rare or (flag in self.rare and not self._own(command, flag))

    def unit(self, command: str, flag: str) -> str | None:
        """What stands for the number of an option."""
        return self.units.get(f"{command} {flag}", self.units.get(flag))

    def _own(self, command: str, flag: str) -> bool:
        return any(f"{command} {flag}" in flags for flags in self.headings.values())


def flag_of(option: click.Parameter) -> str:
    """The spelling that an option is known by: the longest of those before any slash; older ones stand last."""
    long = [name for name in option.opts if name.startswith("--")]
    return long[0] if long else option.opts[0]


def is_switch(option: click.Option) -> bool:
    """Whether an option is on or off, and takes no value."""
    return option.is_flag or option.count


def is_number(option: click.Parameter) -> bool:
    """Whether an option takes a number."""
    return isinstance(option.type, (click.types.IntParamType, click.types.FloatParamType))


def options_of(command: click.Command, ctx: click.Context) -> list[click.Option]:
    """The options of a command that are shown anywhere."""
    return [param for param in command.get_params(ctx) if isinstance(param, click.Option) and not param.hidden]


def sections(
    command: click.Command, layout: Layout, ctx: click.Context, *, everything: bool
) -> tuple[dict[str, list[tuple[str, str]]], int]:
    """Heading -> (spellings, help) of each option, and how many options are left out."""
    name = command.name or ""
    found: dict[str, list[tuple[int, int, tuple[str, str]]]] = {}
    options = options_of(command, ctx)
    everything = everything or len(options) <= SHORT
    left_out = 0
    for order, option in enumerate(options):
        flag = flag_of(option)
        if not everything and layout.is_rare(name, flag) and not option.required:
            left_out += 1
            continue
        heading, place = layout.place(name, flag)
        found.setdefault(heading, []).append((place, order, record(option, layout, ctx)))
    known = list(layout.headings)
    # A command's own options come after its subject and before what all commands share.
    ranks = {heading: rank for rank, heading in enumerate(known)} | {OWN: len(known) - 2.5}
    return {
        heading: [row for _, _, row in sorted(found[heading])] for heading in sorted(found, key=lambda h: ranks[h])
    }, left_out


def record(option: click.Option, layout: Layout, ctx: click.Context) -> tuple[str, str]:
    """Spellings with what stands for the value, and help with default and bounds in brackets."""
    names = [name for name in option.opts if name not in layout.spellings] or list(option.opts)
    # Short ones first.
    shown = ", ".join(sorted(names, key=lambda name: name.startswith("--")))
    one_of = ""
    if not is_switch(option):
        metavar = option.make_metavar(ctx)
        if isinstance(option.type, click.Choice) and len(metavar) > WIDEST_CHOICE:
            metavar, one_of = "NAME", f" One of {', '.join(map(str, option.type.choices))}."
        shown += f" {metavar}"
    others = [name for name in option.secondary_opts if name not in layout.spellings]
    if others:
        shown += f" / {others[0]}"
    text = " ".join((option.help or "").split())
    text, found, default = text.rpartition("[") if text.endswith("]") else (text, "", "")
    notes = [default.removesuffix("]")] if found else []
    if not notes and option.show_default and option.default is not None:
        notes.append(_in_words(option.default, option))
    bounds = _bounds(option.type)
    notes += [bounds] if bounds else []
    notes += ["required"] if option.required else []
    text = text.strip() + one_of
    return shown, f"{text}  [{'; '.join(notes)}]".strip() if notes else text


def _in_words(default: object, option: click.Option) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, float):
        return f"{default:g}"
    return str(default() if callable(default) else default)


def _bounds(kind: object) -> str:
    """The bounds of a number in words, "" where there are none, or none but the least that a count can be."""
    if not isinstance(kind, (click.IntRange, click.FloatRange)):
        return ""
    low, high = kind.min, kind.max
    if high is None and (low == 0 or (low == 1 and isinstance(kind, click.IntRange))):
        return ""
    if low is not None and high is not None:
        return f"{low:g} to {'below ' if kind.max_open else ''}{high:g}"
    if low is not None:
        return f"above {low:g}" if kind.min_open else f"{low:g} or more"
    return f"{'below' if kind.max_open else 'at most'} {high:g}" if high is not None else ""
