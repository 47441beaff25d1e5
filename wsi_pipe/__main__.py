"""``python -m wsi_pipe``."""

from __future__ import annotations

from wsi_pipe.cli import main

if __name__ == "__main__":
    main()
