"""Features that another tool computed, taken into bags of this one.

``foreign`` reads the tools' files, ``mapping`` puts tiles of any places onto a grid, ``adopting`` makes the bags.
"""

from __future__ import annotations

from wsi_pipe.adopt.adopting import Adopted, adopt
from wsi_pipe.adopt.foreign import TOOLS, ForeignTiles, find_foreign
from wsi_pipe.adopt.mapping import Mapped, map_tiles

__all__ = ["TOOLS", "Adopted", "ForeignTiles", "Mapped", "adopt", "find_foreign", "map_tiles"]
