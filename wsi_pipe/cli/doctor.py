"""``wsi-pipe doctor``."""

from __future__ import annotations

import dataclasses

import click

from wsi_pipe.cli import EXIT_FAILED, messages
from wsi_pipe.cli.display import print_json
from wsi_pipe.cli.tables import paragraph

__all__ = ["doctor"]

MARKS = {"ok": ("ok", "green"), "note": ("note", "yellow"), "failed": ("FAILED", "red")}
INDENT = 25


@click.command()
@click.option("--self-test/--no-self-test", default=True, help="Take a synthetic slide all the way, some 5 s.  [on]")
@click.option(
    "--hub-timeout",
    type=click.FloatRange(0, 60),
    default=5.0,
    show_default=True,
    metavar="SECONDS",
    help="Wait so long at most for the hub that weights come from.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(self_test: bool, hub_timeout: float, as_json: bool) -> int:
    """Say what of this installation works, with the remedy where something does not.

    Looked at are versions, the parts in C, codecs, devices, folders, the hub, encoders that can load, and a slide that
    is taken all the way. A note is about what not everybody needs. Exit code 1 when something necessary fails. Put
    the output into a bug report: it holds no names of slides, and no home folder.
    """
    from wsi_pipe.doctor import examine

    findings = []
    topic = ""
    for finding in examine(self_test=self_test, hub_timeout_s=hub_timeout):
        findings.append(finding)
        if as_json or (messages.level() < 0 and finding.state != "failed"):
            continue
        if finding.topic != topic:
            topic = finding.topic
            click.echo(click.style(topic, bold=True))
        mark, hue = MARKS[finding.state]
        lead = f"  {click.style(mark, fg=hue)}{' ' * (7 - len(mark))}"
        # Folded as if the lead had no colour, which takes no room.
        plain = f"{finding.name:<{INDENT - 10}} "
        told = paragraph(finding.told, first=" " * 9 + plain, indent=" " * INDENT)
        click.echo(lead + told[9:])
        if finding.remedy:
            click.echo(paragraph(finding.remedy, first=" " * INDENT + "-> ", indent=" " * (INDENT + 3)))
    failed = [finding for finding in findings if finding.state == "failed"]
    if as_json:
        print_json({"ok": not failed, "findings": [dataclasses.asdict(finding) for finding in findings]})
    else:
        words = f"{len(failed)} necessary {'thing fails' if len(failed) == 1 else 'things fail'}"
        click.echo(words if failed else "all that is necessary works")
    return EXIT_FAILED if failed else 0
