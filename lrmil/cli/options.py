"""Options that several commands share, and how results are shown."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from wsi_pipe.cli import messages
from wsi_pipe.cli.display import print_table
from wsi_pipe.cli.options import RESOLUTION
from wsi_pipe.geometry import level_label

if TYPE_CHECKING:
    from lrmil.experiment import RunFigures
    from lrmil.metrics import Estimate

__all__ = [
    "ABSTAIN",
    "CASE_FROM",
    "MAP",
    "PATH",
    "SLIDE_TABLE",
    "TARGET",
    "UNIT",
    "bag_options",
    "estimate",
    "label_options",
    "level_of",
    "pack_progress",
    "positive_options",
    "print_figures",
    "print_notes",
    "seen_option",
    "stack",
]

F = TypeVar("F", bound=Callable[..., Any])
PATH: click.Path = click.Path(path_type=Path)
EXISTING: click.Path = click.Path(path_type=Path, exists=True)
SHOWN = (
    "auc",
    "average_precision",
    "sensitivity",
    "specificity",
    "balanced_accuracy",
    "accuracy",
    "kappa",
    "f1_macro",
    "f1_weighted",
    "brier",
    "ece",
)


SLIDE_TABLE = click.option(
    "--slide-table",
    type=EXISTING,
    metavar="CSV",
    help="Which slide is of which case, as STAMP's with PATIENT and FILENAME.  [as the bags say]",
)


ABSTAIN = click.option(
    "--abstain",
    metavar="RULE",
    help="No answer where the model is unsure: accuracy=0.95 or coverage=0.8, reached on its validation slides, or "
    "threshold=0.9.",
)


TARGET = click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="NAME:KIND",
    help="Instead of a class: os:survival, os:survival-discrete, age:regression, grade:ordinal, markers:multilabel or "
    "NAME:class, with :OPTION=VALUE,... after it; repeatable, for several at once.  [the label column]",
)
MAP = click.option(
    "--map",
    "renames",
    multiple=True,
    metavar="OLD=NEW",
    help="A value of the labels that means another, or nothing (OLD=); repeatable.",
)
UNIT = click.option(
    "--by",
    "unit",
    type=click.Choice(["slide", "case"]),
    help="What is predicted: a slide, or a case, whose slides are then one bag.  [slide]",
)
CASE_FROM = click.option(
    "--case-from",
    type=click.Choice(["tcga"]),
    help="Take each slide's patient from its TCGA barcode.  [tables and bags]",
)


def stack(function: F, *decorators: Callable[[F], F]) -> F:
    """``function`` under decorators, the first outermost."""
    for decorator in reversed(decorators):
        function = decorator(function)
    return function


def bag_options(function: F) -> F:
    """Which features: --bags, -r and --encoder."""
    return stack(
        function,
        click.option(
            "--bags",
            required=True,
            type=EXISTING,
            metavar="DIR",
            help="A job, a folder of bags or tensors (wsi-pipe, TRIDENT, CLAM, STAMP, slide2vec), one bag, or a store.",
        ),
        click.option(
            "-r",
            "--resolution",
            type=RESOLUTION,
            metavar="RES",
            help="Level of the bags, such as 5x or 2um.  [the bags' primary one]",
        ),
        click.option("-e", "--encoder", metavar="NAME", help="Encoder of the features.  [the bags' primary one]"),
    )


def label_options(function: F) -> F:
    """Which labels, and of what: --labels, --labels-by, --label-column, --map, --slide-table and --case-from."""
    return stack(
        function,
        click.option(
            "--labels",
            required=True,
            type=EXISTING,
            metavar="CSV",
            help="Columns slide_id, case_id or both, and label.",
        ),
        click.option(
            "--labels-by",
            type=click.Choice(["auto", "slide", "case"]),
            default="auto",
            show_default=True,
            help="What a row of the labels is about.",
        ),
        click.option("--label-column", metavar="NAME", help="Column that holds the label.  [label, class, subtype]"),
        MAP,
        SLIDE_TABLE,
        CASE_FROM,
    )


def level_of(resolution: float | None) -> str | None:
    """The label of a level in bags, from um/px."""
    return None if resolution is None else level_label(resolution)


def print_notes(notes: Sequence[str]) -> None:
    """What the user should know about the cohort, on standard error."""
    for note in notes:
        click.echo(note, err=True)


def pack_progress() -> Callable[[int, int], None]:
    """Counts packed bags on a terminal; silent elsewhere."""

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty() and messages.level() >= 0:
            click.echo(f"\rpacking {done}/{total} bags", err=True, nl=done == total)

    return show


def number(value: float, digits: int = 3) -> str:
    """A figure for a table; a dash where it is undefined."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def estimate(e: Estimate) -> str:
    """A figure with its interval."""
    return number(e.value) if math.isnan(e.low) else f"{number(e.value)} ({number(e.low)} to {number(e.high)})"


def _extra_lines(extra: Mapping[str, Any], head: str = "") -> list[str]:
    """What a target says beside its figures, a line each."""
    lines = []
    for name, value in extra.items():
        if isinstance(value, Mapping) and any(isinstance(inner, Mapping) for inner in value.values()):
            lines += _extra_lines(value, f"{head}{name}: ")
        elif isinstance(value, Mapping):
            lines.append(f"{head}{name.replace('_', ' ')}: " + ", ".join(f"{n} {_short(v)}" for n, v in value.items()))
        else:
            parts = value if isinstance(value, (list, tuple)) else [value]
            lines.append(f"{head}{name.replace('_', ' ')}: {', '.join(map(_short, parts))}")
    return lines


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _pooled_prevalence(result: RunFigures) -> dict[str, float]:
    total = sum(fold.slides for fold in result.folds)
    return {
        name: sum(fold.slides * fold.prevalence.get(name, 0.0) for fold in result.folds) / total
        for name in result.classes
    }


def seen_option(function: F) -> F:
    """--allow-seen."""
    text = "Judge on cases that model or encoder have seen all the same; the result says so."
    return stack(function, click.option("--allow-seen", is_flag=True, help=text))


def positive_options(function: F) -> F:
    """Which class is looked for, and at which sensitivities: --positive and --at-sensitivity."""
    return stack(
        function,
        click.option("--positive", metavar="CLASS", help="Which of two classes is looked for.  [the second]"),
        click.option(
            "--at-sensitivity",
            type=click.FloatRange(0, 1, min_open=True),
            multiple=True,
            metavar="SHARE",
            help="Figures at the threshold that has this sensitivity on the validation slides; repeatable.",
        ),
    )


def print_figures(result: RunFigures) -> None:
    """Figures with 95 % intervals by case, a column a fold and their mean and spread; undefined ones with reasons."""
    several = len(result.folds) > 1
    columns = {"figure": "left"} | {fold.name: "left" for fold in result.folds if not several}
    if several:
        columns |= {"mean over folds": "left", "SD": "right", "least": "right", "greatest": "right"}
    rows = []
    names = [name for name in SHOWN if name in result.mean] or list(result.mean)
    for name in names:
        if several:
            spread: Mapping[str, float] = result.spread[name]
            ends = [number(spread[key]) for key in ("std", "min", "max")]
            rows.append([name, estimate(result.mean[name]), *ends])
        else:
            rows.append([name, estimate(result.folds[0].estimates[name])])
    print_table(columns, rows)
    slides, cases = sum(f.slides for f in result.folds), sum(f.cases for f in result.folds)
    click.echo(
        f"{slides} slides, {cases} cases, {len(result.folds)} fold(s), part {result.part}; 95 % intervals by case"
    )
    prevalence = result.folds[0].prevalence if not several else _pooled_prevalence(result)
    click.echo("prevalence: " + ", ".join(f"{name} {share:.3f}" for name, share in prevalence.items()))
    if result.by_case:
        shown_names = [name for name in names if name in result.by_case]
        print_table(
            {"by case": "left", "mean over folds" if several else result.folds[0].name: "left"},
            [[name, estimate(result.by_case[name])] for name in shown_names],
        )
    for fold in result.folds:
        if fold.torn:
            click.echo(
                f"{fold.name}: not judged by case, since their slides are labelled differently: {', '.join(fold.torn)}"
            )
        for line in _extra_lines(fold.extra):
            click.echo(f"{fold.name}: {line}")
    if result.positive is not None:
        click.echo(f"positive class: {result.positive}; choose another with --positive")
    if any(fold.answered for fold in result.folds):
        _print_answered(result)
    for fold in result.folds:
        for point in fold.operating:
            shares = {
                "sensitivity": point.sensitivity,
                "specificity": point.specificity,
                "PPV": point.ppv,
                "NPV": point.npv,
            }
            shown = ", ".join(f"{n} {number(s.value)} ({number(s.low)} to {number(s.high)})" for n, s in shares.items())
            chosen = f"threshold {point.threshold:.4g} for a sensitivity of {point.wanted:g} on validation"
            click.echo(f"{fold.name}: {chosen}: {shown}")
    for fold in result.folds:
        reasons: dict[str, list[str]] = {}
        for name in names:
            reason = fold.estimates[name].reason
            if reason:
                reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            click.echo(f"{fold.name}: {', '.join(names)}: {reason}")


def _print_answered(result: RunFigures) -> None:
    """What abstention comes to: thresholds, coverage, and the figures of all slides beside those answered."""
    for fold in result.folds:
        if fold.answered is not None:
            c = fold.answered.coverage
            share = f"answered {number(c.value)} ({number(c.low)} to {number(c.high)}) of {fold.slides} slides"
            click.echo(f"{fold.name}: {fold.answered.abstention}: {share}")
    whole = result.folds[0].estimates if len(result.folds) == 1 else result.mean
    if result.answered:
        rows = [[name, estimate(whole[name]), estimate(result.answered[name])] for name in SHOWN]
        print_table({"figure": "left", "all slides": "left", "those answered": "left"}, rows)
