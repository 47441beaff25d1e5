"""How much is said on standard error, and how: -q, -v, colours.

What a command was asked for goes to standard output, whatever is said here.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial

import click

__all__ = ["be", "colour", "error", "level", "more", "note", "say", "warning"]

_level = 0
_undo: list[Callable[[], None]] = []
LOGGERS = ("wsi_pipe", "lrmil")
ALL = ""


def level() -> int:
    """-1 quiet, 0 as always, 1 more, 2 everything."""
    return _level


def be(level: int) -> None:
    """Set how much is said, also by logs: at 1 those of these packages, from 2 on those of all libraries."""
    global _level
    _level = level
    while _undo:
        _undo.pop()()
    if level <= 0:
        return
    handler = _ToStandardError()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    for name in (ALL,) if level > 1 else LOGGERS:
        logger = logging.getLogger(name)
        _undo.append(partial(logger.setLevel, logger.level))
        _undo.append(partial(logger.removeHandler, handler))
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG if level > 1 else logging.INFO)


class _ToStandardError(logging.Handler):
    """Whatever standard error is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def colour() -> bool | None:
    """False where NO_COLOR, set to anything, asks for none; else None: a terminal gets colours."""
    return False if os.environ.get("NO_COLOR") else None


def note(text: str) -> None:
    """What the user may want to know; not with -q."""
    if _level >= 0:
        click.echo(f"note: {text}", err=True)


def say(text: str) -> None:
    """How far something is; not with -q."""
    if _level >= 0:
        click.echo(text, err=True)


def more(text: str) -> None:
    """What is said with -v alone."""
    if _level > 0:
        click.echo(text, err=True)


def warning(text: str) -> None:
    """What the user should know."""
    click.echo(f"{click.style('warning:', fg='yellow')} {text}", err=True, color=colour())


def error(program: str, text: str) -> None:
    """Why nothing came of it; with -vv also where in the code it arose."""
    if _level > 1 and sys.exc_info()[1] is not None:
        click.echo(traceback.format_exc(), err=True, nl=False)
    click.echo(f"{program}: {click.style('error:', fg='red', bold=True)} {text}", err=True, color=colour())
