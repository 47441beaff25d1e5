"""The table of targets: what ``--target NAME:KIND`` may name. A new kind is a row here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lrmil.targets.base import Target
from lrmil.targets.classification import Classification
from lrmil.targets.cox import Cox
from lrmil.targets.discrete import DiscreteSurvival
from lrmil.targets.multilabel import MultiLabel
from lrmil.targets.ordinal import Ordinal
from lrmil.targets.regression import Regression
from lrmil.targets.several import Several
from wsi_pipe.errors import ConfigError

__all__ = ["TARGETS", "Asked", "parse_targets", "target_from_json"]

TARGETS: Mapping[str, type[Target]] = {
    kind.kind: kind for kind in (Classification, Cox, DiscreteSurvival, Regression, Ordinal, MultiLabel)
}


@dataclass(frozen=True)
class Asked:
    """A target as a user asks for it: ``NAME:KIND`` or ``NAME:KIND:OPTION=VALUE,OPTION=VALUE``."""

    name: str
    kind: type[Target]
    options: Mapping[str, str] = field(default_factory=dict)


def parse_targets(texts: Sequence[str]) -> tuple[Asked, ...]:
    """What ``--target`` says. Raises ConfigError for an unknown kind or option, or a name that stands twice."""
    found = tuple(map(_parsed, texts))
    names = [asked.name for asked in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two targets are called {name!r}", remedy="give each a name of its own")
    return found


def _parsed(text: str) -> Asked:
    name, _, rest = text.partition(":")
    kind, _, options = rest.partition(":")
    name, kind = name.strip(), kind.strip()
    if not name or not kind:
        raise ConfigError(f"--target {text!r} is not NAME:KIND", remedy="write, for one, os:survival")
    if kind not in TARGETS:
        raise ConfigError(f"no target is of the kind {kind!r}", remedy=f"known ones are {', '.join(TARGETS)}")
    given: dict[str, str] = {}
    for part in options.split(",") if options else ():
        key, equals, value = part.partition("=")
        if not equals or key.strip() not in TARGETS[kind].options:
            known = "; ".join(f"{option}={word}" for option, word in TARGETS[kind].options.items())
            raise ConfigError(f"--target {text!r}: {part!r} is no option of {kind}", remedy=f"known ones: {known}")
        given[key.strip()] = value.strip()
    return Asked(name, TARGETS[kind], given)


def target_from_json(values: Mapping[str, Any]) -> Target:
    """The inverse of ``Target.to_json``. Raises ConfigError for a kind that this version does not know."""
    kind = str(values.get("kind"))
    if kind == Several.kind:
        parts = tuple(target_from_json(part) for part in values.get("parts", ()))
        return Several(str(values.get("name", "")), parts)
    if kind not in TARGETS:
        raise ConfigError(f"no target is of the kind {kind!r}", remedy="update lrmil")
    return TARGETS[kind].from_json(values)
