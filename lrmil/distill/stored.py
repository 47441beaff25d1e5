"""A teacher that cannot be run, by what bags hold of it: features that another tool computed."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NoReturn

from lrmil.distill.request import DistillRequest
from lrmil.errors import SettingsError
from wsi_pipe.adopt import ADOPTED
from wsi_pipe.bag import read_header
from wsi_pipe.encoders.base import EncoderInfo
from wsi_pipe.encoders.elsewhere import slug_asked_for
from wsi_pipe.encoders.registry import find_entry
from wsi_pipe.errors import BagError, UnknownEncoderError
from wsi_pipe.job.guard import read_guarded

__all__ = ["StoredTeacher", "stored_teacher"]


class StoredTeacher:
    """An encoder of which there are features and nothing else; asked to encode, it raises SettingsError."""

    def __init__(self, info: EncoderInfo) -> None:
        self.info = info

    def _refuse(self) -> NoReturn:
        raise SettingsError(
            f"the features of {self.info.name} in these bags were computed by another tool: it cannot be run",
            remedy="leave out --targets compute and --jitters, or make bags with wsi-pipe run",
        )

    def encode(self, tiles: Any) -> NoReturn:
        """Raises SettingsError."""
        self._refuse()

    def submit(self, tiles: Any) -> NoReturn:
        """Raises SettingsError."""
        self._refuse()


def stored_teacher(request: DistillRequest, name: str) -> StoredTeacher | None:
    """The stand-in for a teacher whose features the bags have from another tool; None where they do not.

    Raises SettingsError where the request would run such a teacher.
    """
    slug = slug_asked_for(name)
    for path in sorted(request.bags.glob("*.h5")):
        with suppress(BagError):
            held = read_guarded(read_header, path).features.get(request.hr, {}).get(slug)
            if held is None or held.precision != ADOPTED:
                return None
            licence = ""
            with suppress(UnknownEncoderError):
                licence = find_entry(slug).licence
            info = EncoderInfo(held.encoder, slug, held.dim, held.weights_sha256, licence, precision=ADOPTED)
            teacher = StoredTeacher(info)
            if request.compute or request.settings.jitters:
                teacher.encode(None)
            return teacher
    return None
