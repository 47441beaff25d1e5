"""How objects show themselves in a notebook. Whatever comes from a file is escaped."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.masking import mask_secrets

__all__ = ["MOST_ROWS", "card", "number", "shown_path", "table"]

PICTURE_PX = 420
"""Longest side of a picture in a notebook: some 30 kB, so that notebooks stay small."""
MOST_ROWS = 20


def number(value: float) -> str:
    """A number with thousands' separators, short."""
    return f"{value:,.4g}" if isinstance(value, float) and abs(value) < 1e4 else f"{value:,.0f}"


def shown_path(path: str | Path) -> str:
    """A path or URL without its secrets."""
    return mask_secrets(str(path))


def card(title: str, facts: Iterable[tuple[str, object]], picture: NDArray[np.uint8] | None = None) -> str:
    """A title, a list of facts and, to the left of them, a picture uint8 (H, W, 3), as HTML."""
    rows = "".join(
        f'<tr><th style="text-align:left">{_text(name)}</th><td style="text-align:left">{_text(value)}</td></tr>'
        for name, value in facts
    )
    facts_html = f"<div><strong>{_text(title)}</strong><table>{rows}</table></div>"
    drawn = "" if picture is None else f'<img alt="{_text(title)}" src="{_data_uri(picture)}"/>'
    style = "display:flex;gap:1em;align-items:flex-start"
    return f'<div style="{style}">{drawn}{facts_html}</div>'


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A title and the first rows of a table, as HTML."""
    head = "".join(f"<th>{_text(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows[:MOST_ROWS])
    more = f"<p>and {len(rows) - MOST_ROWS:,} more</p>" if len(rows) > MOST_ROWS else ""
    return f"<div><strong>{_text(title)}</strong><table><tr>{head}</tr>{body}</table>{more}</div>"


def _text(value: object) -> str:
    return html.escape(mask_secrets(str(value)))


def _data_uri(rgb: NDArray[np.uint8]) -> str:
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(rgb))
    image.thumbnail((PICTURE_PX, PICTURE_PX))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
