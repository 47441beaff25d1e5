"""The command line: each command parses, calls one library function, and prints.

Commands load when they are called, so that ``wsi-pipe --help`` starts at once. Exit codes: 0 all done, 1 some slides
failed, the report could not be written or a check found something, 2 bad usage or nothing could be done, 130
interrupted (Ctrl-C), 143 ended by SIGTERM, as batch systems do it.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from wsi_pipe import __version__
from wsi_pipe.cli import messages
from wsi_pipe.cli.dress import dressed, no_such_command, speaking_options
from wsi_pipe.cli.headings import WSI_PIPE
from wsi_pipe.cli.layout import Layout
from wsi_pipe.cli.signals import (
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    end,
    keep_interrupts,
    raise_if_interrupted,
    was_terminated,
)
from wsi_pipe.errors import WsiPipeError, lacks_package

__all__ = [
    "EXIT_FAILED",
    "EXIT_INTERRUPTED",
    "EXIT_TERMINATED",
    "EXIT_USAGE",
    "LazyGroup",
    "keep_interrupts",
    "main",
    "raise_if_interrupted",
    "run_group",
    "run_main",
]


EXIT_FAILED = 1
EXIT_USAGE = 2

COMMANDS: dict[str, tuple[str, str]] = {
    "info": ("wsi_pipe.cli.info:info", "Show what slides are: size, levels, resolution, tiles."),
    "plan": ("wsi_pipe.cli.plan:plan", "Say what a run would take, and what would fail, before it starts."),
    "segment": ("wsi_pipe.cli.stages:segment", "Find tissue; write GeoJSON masks and pictures."),
    "tile": ("wsi_pipe.cli.stages:tile", "Lay aligned tile grids at one or more resolutions."),
    "extract": ("wsi_pipe.cli.stages:extract", "Compute the features of all tiles."),
    "assemble": ("wsi_pipe.cli.stages:assemble", "Put grids and features together in one bag a slide."),
    "run": ("wsi_pipe.cli.stages:run", "All four stages in one go; run again, it does what is missing."),
    "status": ("wsi_pipe.cli.care:status", "Show how far a job is."),
    "verify": ("wsi_pipe.cli.care:verify", "Check every bag of a job, or single bags."),
    "prune": ("wsi_pipe.cli.care:prune", "Take features or resolutions out of a job; lists them first."),
    "adopt": ("wsi_pipe.cli.adopt:adopt", "Take another tool's features into the bags of a job."),
    "export": ("wsi_pipe.cli.export:export", "Write a job's features as another tool's files."),
    "pool": ("wsi_pipe.cli.pool:pool", "Make one vector a slide: a mean, or by a slide encoder."),
    "report": ("wsi_pipe.cli.report:report", "Write the page of a job again, and print its figures."),
    "view": ("wsi_pipe.cli.view:view", "Look at slides, grids and values of tiles in the browser."),
    "benchmark": ("wsi_pipe.cli.benchmark:benchmark", "Measure what low resolution saves, stage by stage."),
    "init": ("wsi_pipe.cli.init:init", "Write a settings file to be edited; every setting with its meaning."),
    "doctor": ("wsi_pipe.cli.doctor:doctor", "Say what of this installation works, and how to mend the rest."),
    "encoders": ("wsi_pipe.cli.encoders:encoders", "List encoders, and which can load now."),
    "demo": ("wsi_pipe.cli.demo:demo", "Make a small labelled cohort and run everything on it."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called.

    table: name -> ("module:attribute", short help). layout: headings and units of their options.
    """

    def __init__(self, *args: Any, table: dict[str, tuple[str, str]], layout: Layout, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.table = table
        self.layout = layout
        self.params += speaking_options()
        self._loaded: dict[str, click.Command] = {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table, which is the order of work."""
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command, and give it what all commands have."""
        if cmd_name not in self.table:
            return None
        if cmd_name not in self._loaded:
            module, attribute = self.table[cmd_name][0].split(":")
            command = getattr(importlib.import_module(module), attribute)
            assert isinstance(command, click.Command)
            self._loaded[cmd_name] = dressed(command, self.layout)
        return self._loaded[cmd_name]

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command of a call. Raises UsageError that names those that are spelled nearly so."""
        if args and args[0] not in self.table and not args[0].startswith("-") and not ctx.resilient_parsing:
            raise no_such_command(ctx, args[0], self.table)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, from the table alone."""
        formatter.write_paragraph()
        formatter.write(click.style("Commands:", bold=True) + "\n")
        with formatter.indentation():
            formatter.write_dl([(click.style(name, fg="cyan"), text) for name, (_, text) in self.table.items()])

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Commands, which are what one looks for, then the few options."""
        self.format_commands(ctx, formatter)
        click.Command.format_options(self, ctx, formatter)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        """Commands with their short help, without importing them; options."""
        from click.shell_completion import CompletionItem

        found = [
            CompletionItem(name, help=text) for name, (_, text) in self.table.items() if name.startswith(incomplete)
        ]
        return [*found, *click.Command.shell_complete(self, ctx, incomplete)]


@click.group(
    cls=LazyGroup,
    table=COMMANDS,
    layout=WSI_PIPE,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Start with: wsi-pipe demo. Exit codes: 0 all done, 1 some failed, 2 bad usage, 130 or 143 interrupted.",
)
@click.version_option(__version__, prog_name="wsi-pipe")
def group() -> None:
    """Whole-slide images to verified multi-resolution feature bags.

    SLIDES on any command are files, folders (searched through), URLs, or a CSV with a column 'slide'.
    """


def run_group(command: click.Group, name: str, arguments: Sequence[str] | None = None) -> int:
    """Run a group and turn what it raises into one line on standard error and an exit code."""
    messages.be(0)
    try:
        result = command.main(args=arguments, prog_name=name, standalone_mode=False, color=messages.colour())
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except (KeyboardInterrupt, click.Abort) as error:
        # Click makes an Abort of the interrupt.
        terminated = was_terminated(error)
        click.echo(
            f"{name}: {'terminated' if terminated else 'interrupted'}; run the same command again to go on", err=True
        )
        return EXIT_TERMINATED if terminated else EXIT_INTERRUPTED
    except click.ClickException as error:
        error.show()
        return EXIT_USAGE
    except WsiPipeError as error:
        messages.error(name, str(error))
        return EXIT_USAGE
    except ImportError as error:
        if not error.name or error.name.partition(".")[0] in ("wsi_pipe", "lrmil"):
            raise
        messages.error(name, "; ".join(lacks_package(error)))
        return EXIT_USAGE
    except BrokenPipeError:
        # The reader of our output (head, less) is gone; Python's own flush at exit must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        # What no stage foresaw: a file of the user's that cannot be read or written.
        where = f"{error.filename}: " if error.filename else ""
        messages.error(name, f"{where}{error.strerror or error}")
        return EXIT_USAGE


def run_main(command: click.Group, name: str) -> NoReturn:
    """What a console script does: hear signals, run the group, end the process."""
    keep_interrupts()
    end(run_group(command, name))


def main() -> None:
    """Entry point of the console script."""
    run_main(group, "wsi-pipe")
