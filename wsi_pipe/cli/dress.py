"""What every command has in common, added when it is loaded: help under headings, -v, -q, and the environment.

Commands are written as click has them, and know nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches

import click

from wsi_pipe.cli import environment, messages
from wsi_pipe.cli.layout import Layout, flag_of, is_number, options_of, sections

__all__ = ["DressedCommand", "dressed", "no_such_command", "speaking_options"]

EVERYTHING = "wsi_pipe.help_all"
"""Key of a context's ``meta``: the long help is asked for."""
WIDEST = 26
"""Characters of spellings that have their help beside them."""


class DressedCommand(click.Command):
    """A command with its options under headings."""

    layout = Layout("")

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        """-h and --help, of the short help."""
        return _HELP

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options under their headings; the short help says how many it leaves out."""
        found, left_out = sections(self, self.layout, ctx, everything=ctx.meta.get(EVERYTHING, False))
        for param in self.params:
            name = param.make_metavar(ctx).strip("[].") if isinstance(param, click.Argument) else ""
            if name in self.layout.arguments:
                formatter.write_paragraph()
                formatter.write_dl([(click.style(name, fg="cyan"), self.layout.arguments[name])])
        # One column for the whole page; longer spellings stand on a line of their own.
        width = max(len(names) for rows in found.values() for names, _ in rows if len(names) <= WIDEST)
        for heading, rows in found.items():
            formatter.write_paragraph()
            formatter.write(click.style(f"{heading}:", bold=True) + "\n")
            with formatter.indentation():
                formatter.write_dl(
                    [(_coloured(names) + " " * (width - len(names)), text) for names, text in rows], col_max=width
                )
        if left_out:
            shown = f"{self.layout.program} {self.name} --help-all"
            formatter.write_paragraph()
            formatter.write_text(f"{left_out} more options: {shown}")

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The command's own, and in the long help how options are given by the environment."""
        super().format_epilog(ctx, formatter)
        if ctx.meta.get(EVERYTHING) and any(option.envvar for option in options_of(self, ctx)):
            formatter.write_paragraph()
            formatter.write_text(environment.in_words(self.layout.program, self.name or ""))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does; what was given by the environment is told."""
        rest = super().parse_args(ctx, args)
        if not ctx.resilient_parsing:
            environment.tell(ctx)
        return rest


def _coloured(names: str) -> str:
    """Spellings in cyan, what stands for a value as it is; plain where there is no colour."""
    return " ".join(click.style(word, fg="cyan") if word.startswith("-") else word for word in names.split(" "))


def dressed(command: click.Command, layout: Layout) -> click.Command:
    """The command with what all have; one that is of a class of its own, or dressed, is left as it is."""
    if type(command) is not click.Command:
        return command
    name = command.name or ""
    params = list(command.params)
    flags = {spelling for param in params for spelling in param.opts}
    params += [option for option in speaking_options() if not flags & set(option.opts)]
    for option in params:
        if not isinstance(option, click.Option):
            continue
        unit = layout.unit(name, flag_of(option))
        if unit and is_number(option) and option.metavar is None:
            option.metavar = unit
        if option.envvar is None:
            option.envvar = environment.variables(layout.program, name, option)
    found = DressedCommand(
        command.name,
        context_settings=command.context_settings,
        callback=command.callback,
        params=[*params, _help_all(params)],
        help=command.help,
        epilog=command.epilog,
        short_help=command.short_help,
        options_metavar=command.options_metavar,
        no_args_is_help=command.no_args_is_help,
        hidden=command.hidden,
        deprecated=command.deprecated,
    )
    found.layout = layout
    return found


def speaking_options() -> list[click.Option]:
    """-q and -v."""

    def quiet(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value:
            messages.be(-1)

    def verbose(ctx: click.Context, param: click.Parameter, value: int) -> None:
        if value and messages.level() < 0:
            raise click.UsageError("-q and -v are given", ctx)
        if value:
            messages.be(value)

    return [
        click.Option(
            ["-q", "--quiet"],
            is_flag=True,
            expose_value=False,
            is_eager=True,
            callback=quiet,
            help="No progress, no notes: warnings, errors and what was asked for.",
        ),
        click.Option(
            ["-v", "--verbose"],
            count=True,
            expose_value=False,
            # After --quiet, however they are ordered in the call.
            callback=verbose,
            help="Say more: settings, devices, each slide; -vv: also what libraries say, and where errors arise.  [0]",
        ),
    ]


def _showing(everything: bool) -> Callable[[click.Context, click.Parameter, bool], None]:
    def show(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value and not ctx.resilient_parsing:
            ctx.meta[EVERYTHING] = everything
            click.echo(ctx.get_help(), color=ctx.color)
            ctx.exit()

    return show


_HELP = click.Option(
    ["-h", "--help"],
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_showing(everything=False),
    help="Show this help.",
)


def _help_all(params: Iterable[click.Parameter]) -> click.Option:
    count = sum(isinstance(param, click.Option) and not param.hidden for param in params) + 2
    return click.Option(
        ["--help-all"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_showing(everything=True),
        help=f"Show all {count} options.",
    )


def no_such_command(ctx: click.Context, name: str, known: Iterable[str]) -> click.UsageError:
    """The error of a command that there is not, with those that are spelled nearly so."""
    near = get_close_matches(name, list(known), n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else f" There are {', '.join(known)}."
    return click.UsageError(f"No such command {name!r}.{hint}", ctx)
