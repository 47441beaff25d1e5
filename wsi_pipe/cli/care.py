"""``wsi-pipe verify``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from wsi_pipe.cli import EXIT_FAILED
from wsi_pipe.cli.display import print_json, print_table

__all__ = ["verify"]


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True), metavar="JOB|BAG...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(paths: tuple[Path, ...], as_json: bool) -> int:
    """Check every bag of a job directory, or single bags; exit code 1 when something is wrong.

    Checked: the schema, shapes and types, finite features, tiles inside their parents, attention, links, and that
    mask, grids and features belong together.
    """
    from wsi_pipe.care import verify_bags, verify_job

    bags = [path for path in paths if path.is_file()]
    findings = [*verify_bags(bags)]
    for folder in (path for path in paths if path.is_dir()):
        inside = sorted(folder.glob("*.h5"))
        findings += verify_bags(inside) if inside else verify_job(folder)
    wrong = [finding for finding in findings if finding.problems]
    if as_json:
        print_json([dataclasses.asdict(finding) for finding in findings])
        return EXIT_FAILED if wrong else 0
    for finding in wrong:
        print_table({finding.slide_id: "left", finding.status: "left"}, ([finding.path, p] for p in finding.problems))
    counts = {status: sum(f.status == status for f in findings) for status in dict.fromkeys(f.status for f in findings)}
    click.echo(
        f"{len(findings)} slides checked ({', '.join(f'{n} {s}' for s, n in counts.items())}), {len(wrong)} wrong"
    )
    return EXIT_FAILED if wrong else 0
