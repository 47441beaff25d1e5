"""Self-contained HTML pages: one file with styles, scripts, data and small pictures, which asks the network nothing."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

__all__ = ["asset", "data_uri", "embed_json", "render_page"]

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob: file: 'self'"
"""Content security policy of every page: nothing is fetched but pictures from the folder beside it."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="generator" content="wsi-pipe">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{styles}
</style>
</head>
<body>
{body}
<noscript><p class="notice">This page draws its figures with its own script: allow JavaScript.</p></noscript>
<script type="application/json" id="data">{data}</script>
<script>
"use strict";
{scripts}
</script>
</body>
</html>
"""


def asset(package: str, name: str) -> str:
    """The text of a file that comes with ``package``, such as ``asset("wsi_pipe.pages", "theme.css")``."""
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


def embed_json(data: object) -> str:
    """JSON that may stand inside a script element, whatever strings it holds.

    Raises ValueError for NaN or infinity, which JSON cannot hold.
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # "</script" and "<!--" would end or change the element; the last two end a line in older JavaScript.
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def data_uri(path: Path) -> str:
    """A JPEG or PNG file as a data URI. Raises OSError when it cannot be read."""
    kind = "png" if path.suffix.lower() == ".png" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def render_page(
    *, title: str, body: str, data: Mapping[str, Any], styles: Sequence[str] = (), scripts: Sequence[str] = ()
) -> str:
    """A page as HTML text: the common styles and chart functions, then the page's own.

    body: HTML, in which what came from users is escaped already. data: JSON-able, found by scripts as ``DATA``.
    """
    here = "wsi_pipe.pages"
    return PAGE.format(
        policy=html.escape(POLICY, quote=True),
        title=html.escape(title),
        styles="\n".join([asset(here, "theme.css"), *styles]),
        body=body,
        data=embed_json(data),
        scripts="\n".join([asset(here, "basics.js"), asset(here, "charts.js"), *scripts]),
    )
