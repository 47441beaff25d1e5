"""``python -m lrmil``."""

from __future__ import annotations

from lrmil.cli import main

if __name__ == "__main__":
    main()
