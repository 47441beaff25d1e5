"""Where cases come from, and how far the site alone gives the label away.

A slide shows its laboratory: stain, scanner and preparation differ from hospital to hospital. Where a hospital sends
more cases of one class, a classifier may learn the hospital (Howard et al. 2021, Nature Communications 12:4423).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrmil.errors import LabelError
from lrmil.site_splits import torn_sites
from lrmil.splits import SplitTable
from lrmil.tables import CASE_COLUMNS, SLIDE_COLUMNS, read
from wsi_pipe.ids import Ids, same_name, table_ids
from wsi_pipe.tables import is_missing

__all__ = [
    "Confounding",
    "Sites",
    "confounding",
    "cramers_v",
    "read_case_sites",
    "read_sites",
    "tcga_case",
    "tcga_site",
]

SITE_COLUMNS = (
    "site", "site_id", "hospital", "hospital_id", "center", "centre", "center_id", "institution", "institute",
    "tissue_source_site", "tss",
)  # fmt: skip
BARCODE = re.compile(r"^TCGA-([A-Z0-9]{2})-[A-Z0-9]{4}(?![A-Z0-9])", re.IGNORECASE)
BY_BARCODE = "TCGA barcode"
DRAWS = 999
"""Random assignments of labels to cases that chi-squared is compared with."""
SMALL_V = 0.1
"""Association that is told of, if chance does not explain it: what Cohen 1988 calls small."""
SHOWN = 5


@dataclass(frozen=True)
class Sites:
    """of_case: case -> site, without cases of unknown site. source: the column that says so, or "TCGA barcode", or ""
    where nothing does. torn: cases that the table gives two sites, and which therefore have none here."""

    of_case: Mapping[str, str] = field(default_factory=dict)
    source: str = ""
    torn: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def tcga_site(barcode: str) -> str:
    """The tissue source site of a TCGA barcode, "A1" of ``TCGA-A1-A0SB-01Z``; "" for other names."""
    found = BARCODE.match(barcode)
    return found.group(1).upper() if found else ""


def tcga_case(barcode: str) -> str:
    """The patient of a TCGA barcode, ``TCGA-A1-A0SB`` of ``TCGA-A1-A0SB-01Z-00-DX1.svs``; "" for other names."""
    found = BARCODE.match(barcode)
    return found.group(0).upper() if found else ""


def read_sites(
    path: str | Path, slide_ids: Sequence[str], case_ids: Sequence[str], *, column: str | None = None
) -> Sites:
    """The site of each case by a label table, or, where it has no column of sites, by the cases' TCGA barcodes.

    slide_ids, case_ids: of the bags, one each; rows are matched with them as labels are. column: that holds the site,
    by default the first of ``SITE_COLUMNS`` that is there. Raises LabelError when ``column`` is not there, or the table
    cannot be read.
    """
    table = read(path, "label table", LabelError, *SITE_COLUMNS, *([column] if column else []))
    place = table.find(column) if column else table.find(*SITE_COLUMNS)
    if place is None:
        if column:
            raise LabelError(f"{path} has no column {column!r}", remedy=f"its columns are {', '.join(table.columns)}")
        return _by_barcode(slide_ids, case_ids)
    slide, case = table.find(*SLIDE_COLUMNS), table.find(*CASE_COLUMNS)
    key = slide if slide is not None else case
    if key is None:
        raise LabelError(
            f"{path} has no column slide_id or case_id", remedy=f"its columns are {', '.join(table.columns)}"
        )
    owner = (
        dict(zip(slide_ids, case_ids, strict=True)) if slide is not None else dict(zip(case_ids, case_ids, strict=True))
    )
    known = Ids(owner)
    found: dict[str, set[str]] = {}
    for _, cells in table.rows:
        name = known.match(cells[key])
        if name is not None and not is_missing(cells[place]):
            found.setdefault(owner[name], set()).add(same_name(cells[place]))
    return Sites(
        {one: next(iter(sites)) for one, sites in found.items() if len(sites) == 1},
        table.columns[place],
        {one: tuple(sorted(sites)) for one, sites in found.items() if len(sites) > 1},
    )


def read_case_sites(path: str | Path, *, column: str | None = None) -> Sites:
    """As ``read_sites``, of every case in the table, whether or not there are bags; a slide without a case is its own.

    Raises LabelError as it does, and for cases with two sites or for a table that tells no site at all.
    """
    table = read(path, "label table", LabelError, *SITE_COLUMNS, *([column] if column else []))
    slide, case = table.find(*SLIDE_COLUMNS), table.find(*CASE_COLUMNS)
    key = slide if slide is not None else case
    if key is None:
        raise LabelError(
            f"{path} has no column slide_id or case_id", remedy=f"its columns are {', '.join(table.columns)}"
        )
    names = table_ids([cells[key] for _, cells in table.rows])
    cases = [
        name if case is None or is_missing(cells[case]) else same_name(cells[case])
        for (_, cells), name in zip(table.rows, names, strict=True)
    ]
    owner = dict(zip(names, cases, strict=True))
    ids = cases if slide is None else list(owner)
    sites = read_sites(path, ids, ids if slide is None else list(owner.values()), column=column)
    if sites.torn:
        one, found = next(iter(sites.torn.items()))
        raise LabelError(
            f"{path}: {len(sites.torn)} cases have two sites, such as {one}: {', '.join(found)}",
            remedy="give each case one site",
        )
    if not sites.of_case:
        raise LabelError(
            f"{path} does not say where cases come from", remedy="name the column of sites: --site-column NAME"
        )
    return sites


def _by_barcode(slide_ids: Sequence[str], case_ids: Sequence[str]) -> Sites:
    found: dict[str, set[str]] = {}
    for slide, case in zip(slide_ids, case_ids, strict=True):
        site = tcga_site(case) or tcga_site(slide)
        if site:
            found.setdefault(case, set()).add(site)
    if not found:
        return Sites()
    return Sites(
        {case: next(iter(sites)) for case, sites in found.items() if len(sites) == 1},
        BY_BARCODE,
        {case: tuple(sorted(sites)) for case, sites in found.items() if len(sites) > 1},
    )


@dataclass(frozen=True)
class Confounding:
    """How labels and sites hang together.

    cases, sites: how many. unknown: cases without a site, which do not count. v: bias-corrected Cramer's V, NaN where
    it is undefined (a single site, or each case of its own). p: share of random assignments of labels to cases that
    are associated as strongly. auc: how well the site alone ranks cases, see ``site_auc``, the mean over classes.
    accuracy: of the commonest class among the other cases of a case's site. commonest: share of the commonest class.
    torn: fold -> sites on both sides of its test. source: what says the sites.
    """

    cases: int
    sites: int
    unknown: int
    v: float
    p: float
    auc: float
    accuracy: float
    commonest: float
    source: str
    torn: Mapping[str, int] = field(default_factory=dict)

    @property
    def found(self) -> bool:
        """Whether labels and sites are associated, by more than chance and more than a little."""
        return self.p < 0.05 and not self.v < SMALL_V

    def to_json(self) -> dict[str, Any]:
        """JSON-able values, for a model's record. No site is named."""
        values: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: dict(value) if name == "torn" else _finite(value) for name, value in values.items()}

    def notes(self) -> list[str]:
        """What the user should know."""
        v = "undefined" if math.isnan(self.v) else f"{self.v:.2f}"
        figures = (
            f"{self.sites} sites ({self.source}), Cramer's V {v}, p {self.p:.3f}; the site alone has an AUC of "
            f"{self.auc:.2f} and an accuracy of {self.accuracy:.2f} (the commonest class: {self.commonest:.2f})"
        )
        unknown = f"; {self.unknown} cases of unknown site do not count" if self.unknown else ""
        if not self.found:
            return [f"labels and sites are not shown to hang together: {figures}{unknown}"]
        lines = [f"labels and sites are confounded: {figures}{unknown}"]
        torn = {name: count for name, count in self.torn.items() if count}
        if torn:
            most = max(torn.values())
            lines.append(
                f"up to {most} sites both train and test in a fold: a model that knows the hospital by its stain would "
                "pass; test on other hospitals with lrmil split --by site"
            )
        return lines


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def confounding(case_labels: Mapping[str, str], sites: Sites, splits: SplitTable | None = None) -> Confounding | None:
    """The figures for labelled cases of known site; None where no case has one.

    case_labels: case -> class. splits: to count sites that both train and test.
    """
    cases = sorted(case for case in case_labels if case in sites.of_case)
    if not cases:
        return None
    rows = _codes([sites.of_case[case] for case in cases])
    columns = _codes([case_labels[case] for case in cases])
    table = _crossed(rows, columns)
    return Confounding(
        cases=len(cases),
        sites=len(table),
        unknown=len(case_labels) - len(cases),
        v=cramers_v(table),
        p=_chance(table, rows, columns),
        auc=float(np.mean([site_auc(table[:, c], table.sum(1)) for c in range(table.shape[1])])),
        accuracy=_majority_accuracy(table),
        commonest=float(table.sum(0).max() / table.sum()),
        source=sites.source,
        torn={} if splits is None or splits.unit != "case" else torn_sites(splits, sites.of_case),
    )


def _codes(values: Sequence[str]) -> NDArray[np.int64]:
    return np.unique(np.asarray(values), return_inverse=True)[1].astype(np.int64)


def _crossed(rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.int64]:
    table = np.zeros((rows.max() + 1, columns.max() + 1), np.int64)
    np.add.at(table, (rows, columns), 1)
    return table


def _chi_squared(table: NDArray[np.int64]) -> float:
    expected = np.outer(table.sum(1), table.sum(0)) / table.sum()
    return float((np.square(table - expected) / expected).sum())


def cramers_v(table: NDArray[np.int64]) -> float:
    """Cramer's V with the bias correction of Bergsma 2013 (J. Korean Stat. Soc. 42:323-328, eqs. 5 to 7), 0 to 1.

    table: (R, C) counts without empty rows and columns. The plain V of many small sites is far above 0 by chance alone.
    NaN where it is undefined: a single row or column, or each case in a row of its own.
    """
    n = float(table.sum())
    r, c = table.shape
    if n < 2:
        return math.nan
    phi = max(0.0, _chi_squared(table) / n - (r - 1) * (c - 1) / (n - 1))
    least = min(r - (r - 1) ** 2 / (n - 1), c - (c - 1) ** 2 / (n - 1)) - 1
    return math.sqrt(phi / least) if least > 1e-12 else math.nan


def _chance(table: NDArray[np.int64], rows: NDArray[np.int64], columns: NDArray[np.int64]) -> float:
    """Share of random assignments with a chi-squared as high: with many small sites its distribution is not its own."""
    n, (_, classes) = table.sum(), table.shape
    # Chi-squared is the sum of counts^2 / expected, less n: only the counts change.
    weights = (n / np.outer(table.sum(1), table.sum(0))).ravel()
    found = float(np.square(table.ravel()) @ weights) - 1e-9
    rng = np.random.default_rng(0)
    above = 0
    for _ in range(DRAWS):
        counts = np.bincount(rows * classes + rng.permutation(columns), minlength=table.size)
        above += float(np.square(counts) @ weights) >= found
    return (above + 1) / (DRAWS + 1)


def site_auc(positive: NDArray[np.int64], total: NDArray[np.int64]) -> float:
    """How well a site's share of positive cases tells a positive from a negative case, both left out of the shares.

    positive, total: (S,) cases. The area under the ROC curve over all pairs (Airola et al. 2011, leave-pair-out, as
    leaving out one case alone gives a single site an AUC of 0: its share is always lower for a positive). A site's
    share has one case more at the share of all sites, so that a site of one case says nothing. NaN for one class.
    """
    negative = total - positive
    p, n = int(positive.sum()), int(total.sum())
    if not 0 < p < n:
        return math.nan
    overall = (p - 1) / (n - 2) if n > 2 else 0.5
    of_positive = (positive - 1 + overall) / np.maximum(total, 1)
    of_negative = (positive + overall) / np.maximum(total, 1)
    pairs = np.outer(positive, negative)
    difference = of_positive[:, None] - of_negative[None, :]
    won = np.where(np.abs(difference) < 1e-12, 0.5, difference > 0)
    # Of one site both have the same share.
    np.fill_diagonal(won, 0.5)
    return float((won * pairs).sum() / pairs.sum())


def _majority_accuracy(table: NDArray[np.int64]) -> float:
    """Leaving out case after case: is it of the commonest class among the others of its site, or among all others?"""
    right = 0
    for site, counts in enumerate(table):
        for label, number in enumerate(counts.tolist()):
            if not number:
                continue
            left = table.copy()
            left[site, label] -= 1
            # The class that is commoner everywhere decides between equals.
            ranked = left[site] + left.sum(0) / (table.sum() + 1.0)
            right += number * (int(ranked.argmax()) == label)
    return right / int(table.sum())
