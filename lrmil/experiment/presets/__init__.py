"""The presets of ``lrmil experiment``, TOML files beside this one."""

from __future__ import annotations

from pathlib import Path

from wsi_pipe.errors import ConfigError

__all__ = ["find_preset", "preset_names"]

FOLDER = Path(__file__).parent


def preset_names() -> list[str]:
    """The names of the presets that are installed."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def find_preset(name: str) -> Path:
    """The file of a preset that is installed, or the TOML file that ``name`` is. Raises ConfigError for neither."""
    if name in preset_names():
        return FOLDER / f"{name}.toml"
    path = Path(name)
    if path.suffix == ".toml":
        # What is wrong with it is told where it is read.
        return path
    raise ConfigError(
        f"no preset is called {name!r}", remedy=f"known ones are {', '.join(preset_names())}; or give a TOML file"
    )
