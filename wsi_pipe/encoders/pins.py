"""Weights that stay what they were: the hub's commit and the hash of each file, kept from the first download on.

A registry entry may state both; what a source did not state is recorded when the file is first loaded. From then on
a file with another hash is refused, and a new commit of the hub changes nothing until ``wsi-pipe encoders --pin``
says so.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from wsi_pipe.errors import ConfigError, WeightsError
from wsi_pipe.files import atomic_path, file_sha256

__all__ = ["PINS_VARIABLE", "Pin", "check_pin", "pins_file", "read_pins", "recorded_revision", "write_pin"]

PINS_VARIABLE = "WSI_PIPE_PINS"


@dataclass(frozen=True)
class Pin:
    """What a file of weights is held to.

    sha256: of the file. revision: the hub's commit, empty for a file that was put there by hand. pinned: when, UTC.
    """

    sha256: str
    revision: str = ""
    pinned: str = ""


def pins_file() -> Path:
    """The JSON file of pins: what WSI_PIPE_PINS names, else ``wsi-pipe-pins.json`` in the Hugging Face cache."""
    named = os.environ.get(PINS_VARIABLE)
    if named:
        return Path(named)
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / "wsi-pipe-pins.json"


def read_pins() -> dict[str, Pin]:
    """Pins by ``<repository>/<file>``; none where there is no such file. Raises ConfigError where it is damaged."""
    path = pins_file()
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        return {str(key): Pin(**value) for key, value in held["pins"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{path}, which holds the pins of weights, cannot be read: {error}",
            remedy="put it aside; weights are then pinned anew at their next use",
        ) from error


def _key(repo_id: str, filename: str) -> str:
    return f"{repo_id}/{filename}"


def revision_of(path: Path) -> str:
    """The commit that a file in the Hugging Face cache is of, empty for any other file."""
    found = re.search(r"/snapshots/([0-9a-f]{40})/", path.as_posix())
    return found[1] if found else ""


def recorded_revision(repo_id: str, stated: str = "") -> str:
    """The commit that weights of a repository are taken from: as recorded, else as stated; empty for the newest."""
    prefix = f"{repo_id}/"
    for key, pin in read_pins().items():
        if key.startswith(prefix) and pin.revision:
            return pin.revision
    return stated


def write_pin(repo_id: str, path: Path, sha256: str | None = None) -> Pin:
    """Record what a file of weights is, in the place of what was recorded. Raises OSError where it cannot be kept."""
    pin = Pin(sha256 or file_sha256(path), revision_of(path), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    pins = read_pins() | {_key(repo_id, path.name): pin}
    target = pins_file()
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(target) as temporary:
        held = {"pins": {key: asdict(value) for key, value in sorted(pins.items())}}
        temporary.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    return pin


def check_pin(name: str, repo_id: str, path: Path, sha256: str, stated: Mapping[str, str]) -> None:
    """Hold a file of the hub's weights to its pin, and record it where there is none.

    stated: hashes by file name that the registry states. A file that was put into a folder of weights by hand is held
    to nothing: its bag names its hash. Raises WeightsError where the file is another than was pinned.
    """
    if not (repo_id and revision_of(path)):
        return
    held = read_pins().get(_key(repo_id, path.name))
    if held is None and path.name in stated and stated[path.name] != sha256:
        raise WeightsError(
            f"weights of encoder {name} ({path}) are not those that its entry was written for: their hash is "
            f"{sha256[:12]}, stated is {stated[path.name][:12]}; the file has moved to another revision, or is damaged",
            remedy=f"delete it so that it is downloaded again, or accept it: wsi-pipe encoders --pin {name}",
        )
    if held is None:
        # A shared cache may be read-only: then a stated hash is all there is to hold to.
        with suppress(OSError):
            write_pin(repo_id, path, sha256)
        return
    if held.sha256 != sha256:
        now, was = revision_of(path)[:12], held.revision[:12] or "a file"
        raise WeightsError(
            f"weights of encoder {name} ({path}) have moved: pinned is revision {was} with hash {held.sha256[:12]}, "
            f"here is revision {now} with hash {sha256[:12]}; features of both do not belong together",
            remedy=f"go back to the pinned revision, or accept the new one: wsi-pipe encoders --pin {name}",
        )
