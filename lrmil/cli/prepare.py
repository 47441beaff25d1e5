"""``lrmil split`` and ``lrmil pack``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import click

from lrmil.cli.options import EXISTING, MAP, PATH, TARGET, bag_options, level_of, pack_progress
from lrmil.tables import parse_renames
from wsi_pipe.cli.display import print_table
from wsi_pipe.errors import ConfigError

__all__ = ["pack", "split"]


@click.command()
@click.option("--labels", required=True, type=EXISTING, metavar="CSV", help="Columns slide_id, case_id or both, label.")
@click.option("--label-column", metavar="NAME", help="Column that holds the label.  [label, class, subtype]")
@MAP
@TARGET
@click.option("-o", "--out", required=True, type=PATH, metavar="CSV", help="Where the folds go.")
@click.option("--folds", type=click.IntRange(1), default=5, show_default=True, help="1 is a single hold-out.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the folds.")
@click.option("--val-fraction", type=float, default=0.2, show_default=True, help="Of a fold's cases that do not test.")
@click.option("--test-fraction", type=float, help="With --folds 1 only.  [0.2]")
@click.option(
    "--by",
    type=click.Choice(["case", "site"]),
    default="case",
    show_default=True,
    help="What is never in two parts: a case, or a hospital with all its cases.",
)
@click.option(
    "--site-column", metavar="NAME", help="Column that holds the site.  [site, hospital, ..., or TCGA barcodes]"
)
def split(
    labels: Path,
    label_column: str | None,
    renames: tuple[str, ...],
    targets: tuple[str, ...],
    out: Path,
    folds: int,
    seed: int,
    val_fraction: float,
    test_fraction: float | None,
    by: str,
    site_column: str | None,
) -> None:
    """Divide the cases of a label table into stratified folds; a case is never in two parts.

    Each case tests in one fold. The CSV has a row a case and columns fold_1 to fold_k with train, val and test. With
    --by site all cases of a hospital stand in one part, so that each fold tests on hospitals that it never saw.
    """
    from lrmil.data import read_case_labels
    from lrmil.site_splits import make_site_splits, missing_classes
    from lrmil.sites import read_case_sites
    from lrmil.splits import PARTS, make_splits

    if site_column and by != "site":
        raise ConfigError("--site-column is given, but cases are divided", remedy="add --by site")
    if targets:
        from lrmil.targets import parse_targets
        from lrmil.targets.labels import read_case_strata

        cases = read_case_strata(labels, parse_targets(targets), renames=parse_renames(renames))
    else:
        cases = read_case_labels(labels, label_column=label_column, renames=parse_renames(renames))
    notes: list[str] = []
    if by == "site":
        sites = read_case_sites(labels, column=site_column)
        table = make_site_splits(cases, sites.of_case, folds, seed, val_fraction, test_fraction)
        notes = [f"note: {line}" for line in missing_classes(table, cases)]
    else:
        table = make_splits(cases, folds, seed, val_fraction, test_fraction)
    table.write(out)
    classes = sorted(set(cases.values()))
    rows = []
    for name, parts in table.folds.items():
        for part in PARTS:
            found = Counter(cases[case] for case, p in zip(table.ids, parts, strict=True) if p == part)
            row = [name, part, *(str(found[c]) for c in classes)]
            if by == "site":
                there = {sites.of_case[case] for case, p in zip(table.ids, parts, strict=True) if p == part}
                row.append(str(len(there)))
            rows.append(row)
    columns = {"fold": "left", "part": "left"} | dict.fromkeys(classes, "right")
    print_table(columns | ({"sites": "right"} if by == "site" else {}), rows)
    for note in notes:
        click.echo(note, err=True)
    of_sites = f" of {len(set(sites.of_case.values()))} sites ({sites.source})" if by == "site" else ""
    click.echo(f"{len(table.ids)} cases{of_sites} in {folds} fold(s), seed {seed}: {out}")


@click.command()
@bag_options
@click.option("-o", "--out", required=True, type=PATH, metavar="DIR", help="The store's folder.")
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    default="float16",
    show_default=True,
    help="How features are stored.",
)
@click.option("--parents", metavar="RES", help="Keep each tile's parent at this coarser level, for distillation.")
def pack(bags: Path, resolution: float | None, encoder: str | None, out: Path, dtype: str, parents: str | None) -> None:
    """Copy the features of many bags into one memory-mapped store, and check them.

    lrmil train does this by itself; a store of its own can be given to several runs.
    """
    from lrmil.store import pack_bags
    from wsi_pipe.geometry import parse_resolution

    store = pack_bags(
        bags,
        level_of(resolution),
        encoder,
        out,
        dtype,  # type: ignore[arg-type]
        parent_level=None if parents is None else level_of(parse_resolution(parents)),
        progress=pack_progress(),
    )
    for record, length in zip(store.records, store.lengths.tolist(), strict=True):
        if not length:
            click.echo(f"no tiles: {record.slide_id} ({record.empty_reason})", err=True)
    if store.placeless:
        click.echo(f"{store.placeless} bags hold no coordinates: no heat map can be drawn of them", err=True)
    gib = store.flat.nbytes / 2**30
    meta = store.meta
    click.echo(
        f"{len(store)} bags, {len(store.flat):,} x {store.dim} {store.dtype} ({gib:.2f} GiB), "
        f"{meta.encoder or 'unnamed encoder'} at {meta.level or 'unstated level'}: {out}"
    )
    click.echo(f"content hash {store.content_hash}")
