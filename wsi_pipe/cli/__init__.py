"""The command line: each command parses, calls one library function, and prints.

Commands load when they are called, so that ``wsi-pipe --help`` starts at once. Exit codes: 0 all done, 1 some slides
failed, the report could not be written or a check found something, 2 bad usage or nothing could be done, 130
interrupted (Ctrl-C), 143 ended by SIGTERM, as batch systems do it.
"""

from __future__ import annotations

import _thread
import importlib
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

import click

from wsi_pipe import __version__
from wsi_pipe.errors import WsiPipeError, lacks_package

__all__ = [
    "EXIT_FAILED",
    "EXIT_INTERRUPTED",
    "EXIT_TERMINATED",
    "EXIT_USAGE",
    "LazyGroup",
    "main",
    "raise_if_interrupted",
    "run_group",
]


EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_TERMINATED = 128 + signal.SIGTERM

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
    "report": ("wsi_pipe.cli.report:report", "Write the page of a job again, and print its figures."),
    "benchmark": ("wsi_pipe.cli.benchmark:benchmark", "Measure what low resolution saves, stage by stage."),
    "encoders": ("wsi_pipe.cli.encoders:encoders", "List encoders, and which can load now."),
    "demo": ("wsi_pipe.cli.demo:demo", "Make a small labelled cohort and run everything on it."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called; ``table``: name -> ("module:attribute", short help)."""

    def __init__(self, *args: Any, table: dict[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table, which is the order of work."""
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in self.table:
            return None
        module, attribute = self.table[cmd_name][0].split(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, from the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self.table.items()])


@click.group(
    cls=LazyGroup,
    table=COMMANDS,
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
    try:
        result = command.main(args=arguments, prog_name=name, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except (KeyboardInterrupt, click.Abort) as error:
        # Click makes an Abort of the interrupt.
        terminated = isinstance(error, TerminatedError) or isinstance(error.__cause__, TerminatedError)
        click.echo(
            f"{name}: {'terminated' if terminated else 'interrupted'}; run the same command again to go on", err=True
        )
        return EXIT_TERMINATED if terminated else EXIT_INTERRUPTED
    except click.ClickException as error:
        error.show()
        return EXIT_USAGE
    except WsiPipeError as error:
        click.echo(f"{name}: error: {error}", err=True)
        return EXIT_USAGE
    except ImportError as error:
        if not error.name or error.name.partition(".")[0] in ("wsi_pipe", "lrmil"):
            raise
        click.echo(f"{name}: error: {'; '.join(lacks_package(error))}", err=True)
        return EXIT_USAGE
    except BrokenPipeError:
        # The reader of our output (head, less) is gone; Python's own flush at exit must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        # What no stage foresaw: a file of the user's that cannot be read or written.
        where = f"{error.filename}: " if error.filename else ""
        click.echo(f"{name}: error: {where}{error.strerror or error}", err=True)
        return EXIT_USAGE


class TerminatedError(KeyboardInterrupt):
    """SIGTERM came: what ends for Ctrl-C ends for this as well."""


_heard: list[int] = []
"""Signals that came, so that one whose exception some library swallowed is not lost."""


def _hear(number: int, frame: object) -> None:
    _heard.append(number)
    raise TerminatedError if number == signal.SIGTERM else KeyboardInterrupt


def raise_if_interrupted() -> None:
    """Raise again what Ctrl-C or SIGTERM raised before: for who goes on, and so has not seen it."""
    if _heard:
        raise TerminatedError if _heard[-1] == signal.SIGTERM else KeyboardInterrupt


def keep_interrupts() -> None:
    """Make sure that Ctrl-C is heard: where it falls into a callback of Python's own, Python prints and drops it.

    SIGTERM, with which SLURM and Kubernetes announce the end, is heard as well: Python would die of it on the spot.
    """
    signal.signal(signal.SIGTERM, _hear)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _hear)
    before = sys.unraisablehook

    def hook(dropped: Any) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            before(dropped)
            return
        # A moment later, when the callback is over.
        number = signal.SIGTERM if issubclass(dropped.exc_type, TerminatedError) else signal.SIGINT
        again = threading.Timer(0.05, _thread.interrupt_main, [number])
        again.daemon = True
        again.start()

    sys.unraisablehook = hook


def main() -> None:
    """Entry point of the console script."""
    keep_interrupts()
    sys.exit(run_group(group, "wsi-pipe"))
