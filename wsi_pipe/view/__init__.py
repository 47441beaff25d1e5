"""The viewer: slides of a job in the browser, with outlines, grids and what bags say of each tile.

``catalogue`` knows the slides, ``opened`` keeps a few of them open, ``pixels`` cuts what the browser shows, ``layers``
reads values of tiles, ``nearest`` finds tiles that look alike, ``trial`` finds tissue under other settings, ``app``
answers requests and ``serve`` runs it on the loopback interface. ``single`` puts one slide into one file.
"""

from __future__ import annotations

from wsi_pipe.view.app import make_app
from wsi_pipe.view.catalogue import Catalogue, Listed
from wsi_pipe.view.serve import serve
from wsi_pipe.view.single import write_single_page

__all__ = ["Catalogue", "Listed", "make_app", "serve", "write_single_page"]
