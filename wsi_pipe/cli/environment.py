"""Options by the environment: WSI_PIPE_RUN_WORKERS for run --workers, WSI_PIPE_WORKERS for all commands that have it.

Only options that take a value, and none that changes what results mean: a word forgotten in a profile must not draw
weights, overrule a slide's own resolution, leave slides out or take anything away. What is taken is told.
"""

from __future__ import annotations

import os

import click

from wsi_pipe.cli import messages
from wsi_pipe.cli.layout import flag_of, is_switch
from wsi_pipe.masking import mask_secrets

__all__ = ["FORBIDDEN", "SHARED", "from_environment", "in_words", "tell", "variables"]

FORBIDDEN = frozenset({
    # What a slide is, said against or in place of its file.
    "--slide-mpp", "--scene", "--z", "--mask", "--annotations", "--tissue-class", "--frame",
    # Which part of the slides, cases or folds counts.
    "--only", "--limit", "--cases", "--fold", "--by", "--positive", "--part",
    # What a label table means, and what is predicted.
    "--target", "--map", "--case-from", "--labels-by",
    # Any setting at all, and secrets' places, which go with a switch.
    "--set", "--salt",
})  # fmt: skip
"""Options with a value that can be given in the call alone; switches never can by the environment."""

SHARED = frozenset({
    "--workers", "--devices", "--device", "--batch-size", "--read-threads", "--threads", "--memory", "--timeout",
    "--cache-size", "--scheduler", "--resources", "--wait-workers", "--log-json",
})  # fmt: skip
"""Options that mean the same in all commands, and so have a variable without the command's name as well. WSI_PIPE_CACHE
is older than these, names the default of --cache, and gets into no job's settings."""
OTHERS = frozenset({("distill", "--batch-size")})
"""Where one of these means something else."""
DESTROYING = frozenset({"prune"})
"""Commands that take nothing at all from the environment."""


def variables(program: str, command: str, option: click.Option) -> list[str] | None:
    """The environment variables of an option, the command's own first; None where it has none."""
    flag = flag_of(option)
    if is_switch(option) or flag in FORBIDDEN or command in DESTROYING or option.hidden:
        return None
    prefix, name = _upper(program), _upper(flag.removeprefix("--"))
    found = [f"{prefix}_{_upper(command)}_{name}"]
    if flag in SHARED and (command, flag) not in OTHERS:
        found.append(f"{prefix}_{name}")
    return found


def _upper(name: str) -> str:
    return name.replace("-", "_").upper()


def from_environment(ctx: click.Context, name: str) -> bool:
    """Whether a parameter's value comes from the environment."""
    return ctx.get_parameter_source(name) is click.core.ParameterSource.ENVIRONMENT


def tell(ctx: click.Context) -> None:
    """Say which options the environment gave."""
    for param in ctx.command.params:
        if param.name and isinstance(param.envvar, list) and from_environment(ctx, param.name):
            variable = next(name for name in param.envvar if os.environ.get(name))
            messages.note(f"{flag_of(param)} {mask_secrets(os.environ[variable])}, as {variable} says")


def in_words(program: str, command: str) -> str:
    """How options are given by the environment, for the long help."""
    prefix = _upper(program)
    return (
        f"Options with a value can be set in the environment: {prefix}_{_upper(command)}_NAME for this command, and "
        f"most of Machine for all commands by {prefix}_NAME. Not so what changes the meaning of results."
    )
