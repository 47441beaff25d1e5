"""Frozen settings of models, losses and training; TOML in and out.

``load_settings`` reads them from a TOML file with the tables ``[model]`` and ``[loss]`` beside the training's own keys.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wsi_pipe.config import from_mapping, load_toml, to_mapping
from wsi_pipe.errors import ConfigError

__all__ = [
    "ATTENTION_MODELS",
    "AUTO_ATTENTION",
    "CHOICES",
    "MODELS",
    "MONITORS",
    "PARENTS",
    "POOLINGS",
    "QUANTILES",
    "SMALL_MODELS",
    "LossSettings",
    "ModelSettings",
    "TrainSettings",
    "deciding",
    "load_settings",
    "tuned_on",
]

MODELS = ("linear", "mean", "max", "abmil", "gated-abmil", "clam-sb", "clam-mb", "dsmil", "dtfd", "transmil")
# Which a training can be asked for: one of these, or "auto", which chooses.
CHOICES = ("auto", *MODELS)
# What "auto" takes where attention is wanted, and what is trained in another way on small cohorts.
AUTO_ATTENTION = "gated-abmil"
SMALL_MODELS = ("abmil", "gated-abmil")
# Which models may go without a projection.
UNPROJECTED = ("abmil", "gated-abmil")
ATTENTION_MODELS = ("abmil", "gated-abmil", "clam-sb", "clam-mb", "dsmil", "dtfd", "transmil")
# What a linear model sees of a bag, and the quantiles of the last.
POOLINGS = ("mean", "mean+spread", "quantiles")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MOST_MEMBERS = 100
# Share of a model's own second loss, as published.
SECOND_LOSS = {"clam-sb": 0.3, "clam-mb": 0.3, "dsmil": 0.5, "dtfd": 0.5}
# How the teacher's attention on the HR children of an LR tile becomes attention on the tile.
PARENTS = ("sum", "mean", "max")
# Figures on the validation cases that early stopping can watch.
MONITORS = (
    "loss",
    "auc",
    "average_precision",
    "balanced_accuracy",
    "accuracy",
    "sensitivity",
    "specificity",
    "kappa",
    "f1_macro",
    "f1_weighted",
    "brier",
    "ece",
)


@dataclass(frozen=True)
class ModelSettings:
    """The architecture of a MIL model; enough to build it again.

    name: one of ``MODELS``, or "auto", which training replaces by what inner cross-validation prefers.
    in_dim: features per tile. classes: number of classes, or of outputs
    of another target (see ``lrmil.targets``). hidden: width of the projection that
    all models begin with, and of the bag's representation. attention_dim: width of the attention branch (ABMIL, CLAM)
    or of the queries (DSMIL). dropout: in the projection and the attention branch. input_dropout: of single features
    before the projection. heads, landmarks: of TransMIL, whose attention is exact up to ``landmarks`` tokens and
    Nyström's above. auxiliary_weight: share of the model's own second loss (CLAM's instance clustering, DSMIL's
    max-pooling stream, DTFD's pseudo-bags) in the cross-entropy term; None takes the publication's (0.3, 0.5, 0.5), and
    the other models have no second loss, so they take None only. cluster_k: tiles on each side that CLAM clusters.
    pooling: of a linear model, one of ``POOLINGS``, or "auto", which training replaces by the best in inner
    cross-validation. members: networks whose logits are averaged, trained with other random numbers. linear_share: of
    a linear model in these logits. projection: off for an ABMIL, gated or not, on the features themselves, as in the
    published LRMIL: ``hidden`` then means nothing, and the instance head sees the features. pseudo_bags: of DTFD.
    stream_average: DSMIL answers with the mean of its two streams.
    """

    name: str = "auto"
    in_dim: int = 1024
    classes: int = 2
    hidden: int = 512
    attention_dim: int = 256
    dropout: float = 0.25
    input_dropout: float = 0.0
    heads: int = 8
    landmarks: int = 256
    auxiliary_weight: float | None = None
    cluster_k: int = 8
    pooling: str = "auto"
    members: int = 1
    linear_share: float = 0.0
    projection: bool = True
    pseudo_bags: int = 8
    stream_average: bool = False

    def __post_init__(self) -> None:
        if self.name not in CHOICES:
            raise ConfigError(f"no model is called {self.name!r}", remedy=f"known ones are {', '.join(CHOICES)}")
        if not self.projection and self.name not in UNPROJECTED:
            raise ConfigError(
                f"a {self.name} model needs its projection", remedy=f"for {' or '.join(UNPROJECTED)} it may be left out"
            )
        if not self.projection and (self.members > 1 or self.linear_share > 0):
            raise ConfigError("a model without projection is one network", remedy="leave out members and linear_share")
        if not 1 <= self.members <= MOST_MEMBERS:
            raise ConfigError(f"members {self.members} must lie between 1 and {MOST_MEMBERS}")
        if not 0 <= self.linear_share < 1:
            raise ConfigError(f"linear_share {self.linear_share} must be at least 0 and below 1")
        if self.name == "linear" and (self.members > 1 or self.linear_share > 0):
            raise ConfigError(
                "a linear model is one, and linear all of it", remedy="leave out members and linear_share"
            )
        if self.pooling not in ("auto", *POOLINGS):
            raise ConfigError(
                f"no pooling is called {self.pooling!r}", remedy=f"known ones are auto, {', '.join(POOLINGS)}"
            )
        if self.stream_average and self.name != "dsmil":
            raise ConfigError(f"a {self.name} model has no two streams", remedy="leave out stream_average")
        for name in ("in_dim", "hidden", "attention_dim", "heads", "landmarks", "cluster_k", "pseudo_bags"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} must be at least 1")
        if self.classes < 1:
            raise ConfigError(f"a model needs at least 1 output, not {self.classes}")
        for name in ("dropout", "input_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} must be at least 0 and below 1")
        if self.name == "transmil" and self.hidden % self.heads:
            raise ConfigError(f"hidden {self.hidden} must be a multiple of heads {self.heads}")
        if self.auxiliary_weight is not None:
            if self.name not in SECOND_LOSS:
                raise ConfigError(f"{self.name} has no second loss", remedy="leave out auxiliary_weight")
            if not 0 <= self.auxiliary_weight < 1:
                raise ConfigError(f"auxiliary_weight {self.auxiliary_weight} must be at least 0 and below 1")

    @property
    def second_loss_share(self) -> float:
        """Share of the model's own second loss: CLAM's 0.3, DSMIL's and DTFD's 0.5 unless given; 0 for the others."""
        if self.auxiliary_weight is not None:
            return self.auxiliary_weight
        return SECOND_LOSS.get(self.name, 0.0)


@dataclass(frozen=True)
class LossSettings:
    """Weights of the terms of a student's loss; a teacher or plain model has ``ce`` alone.

    ce: cross-entropy with the label. bag: KL to the teacher's class probabilities. soft: KL to the teacher's attention
    on the covered tiles. hard: 2-way loss on the teacher's highest and lowest ``instances`` tiles. temperature: of the
    class probabilities. attention_temperature: of the attention. parents: how the teacher's attention on the children
    of an LR tile becomes that on the tile: "sum" of its softmax over all HR tiles, or the softmax over tiles of the
    "mean" or "max" of their attention logits, the published rules.
    """

    ce: float = 1.0
    bag: float = 1.0
    soft: float = 0.5
    hard: float = 0.1
    temperature: float = 2.0
    attention_temperature: float = 1.0
    instances: int = 8
    parents: str = "sum"

    def __post_init__(self) -> None:
        if self.parents not in PARENTS:
            raise ConfigError(f"parents {self.parents!r} must be one of {', '.join(PARENTS)}")
        for name in ("ce", "bag", "soft", "hard"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"the weight {name} {getattr(self, name)} must be at least 0")
        for name in ("temperature", "attention_temperature"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} {getattr(self, name)} must be above 0")
        if self.instances < 1:
            raise ConfigError(f"instances {self.instances} must be at least 1")

    @property
    def needs_teacher(self) -> bool:
        """Whether any term looks at the teacher."""
        return self.bag > 0 or self.soft > 0 or self.hard > 0


@dataclass(frozen=True)
class TrainSettings:
    """How a model is trained on one fold.

    epochs: at most. learning_rate: AdamW's peak. schedule: "cosine" falls to ``final_lr_share`` of the peak at the last
    epoch, "constant" stays. warmup_epochs: linear rise, fractions allowed. clip_norm: of the gradient, 0 for none.
    precision: "float32", "bfloat16", or "auto", which takes bfloat16 where the processor computes with it.
    token_budget: tiles per step, at least one bag. max_bags: bags per step. class_weights: "balanced" weighs each bag
    by the inverse frequency of its class in training, "none" does not. monitor: validation figure of early stopping,
    one of ``MONITORS``. patience: epochs without improvement before the end, 0 for never; the best epoch's weights
    are kept either way where there are validation cases. min_epochs: not stopped earlier. standardise: features by
    their mean and deviation over the training tiles, which the model keeps. deterministic: refuse
    operations that may differ between runs on a GPU. save_every: epochs between saved states, 0 for none.
    device: "auto", "cpu", "cuda", "cuda:1". tensorboard: event files in the run's folder. small_cohorts: "auto" trains
    ``SMALL_MODELS`` on few cases as ``lrmil.trainer.small`` says, "off" as on many. targets: what to predict instead of
    the classes of the label column, each ``NAME:KIND`` (see ``lrmil.targets.kinds``). unit: what a bag is, a "slide" or
    a "case" with all of its slides.
    """

    model: ModelSettings = field(default_factory=ModelSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    epochs: int = 50
    learning_rate: float = 2e-4
    weight_decay: float = 1e-4
    schedule: str = "cosine"
    final_lr_share: float = 0.01
    warmup_epochs: float = 1.0
    clip_norm: float = 1.0
    precision: str = "auto"
    token_budget: int = 16384
    max_bags: int = 8
    class_weights: str = "balanced"
    monitor: str = "loss"
    patience: int = 10
    min_epochs: int = 10
    standardise: bool = True
    seed: int = 0
    deterministic: bool = False
    save_every: int = 1
    device: str = "auto"
    tensorboard: bool = False
    small_cohorts: str = "auto"
    targets: tuple[str, ...] = ()
    unit: str = "slide"

    def __post_init__(self) -> None:
        for name in ("epochs", "token_budget", "max_bags"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} must be at least 1")
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate {self.learning_rate} must be above 0")
        for name in ("weight_decay", "warmup_epochs", "clip_norm", "patience", "min_epochs", "save_every", "seed"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} {getattr(self, name)} must be at least 0")
        if not 0 <= self.final_lr_share <= 1:
            raise ConfigError(f"final_lr_share {self.final_lr_share} must lie between 0 and 1")
        for name, known in (
            ("schedule", ("cosine", "constant")),
            ("precision", ("auto", "float32", "bfloat16")),
            ("class_weights", ("balanced", "none")),
            ("monitor", MONITORS),
            ("small_cohorts", ("auto", "off")),
            ("unit", ("slide", "case")),
        ):
            if name == "monitor" and self.targets:
                # Its figures are the target's own, which training knows.
                continue
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} {getattr(self, name)!r} must be one of {', '.join(known)}")


TUNED = "tuned"
"""The table of a settings file that ``lrmil tune`` writes beside the settings."""
LATER: Mapping[str, object] = {
    "model.projection": True,
    "model.pseudo_bags": 8,
    "model.stream_average": False,
    "loss.parents": "sum",
    "targets": [],
    "unit": "slide",
}
"""Settings that came after the first runs, at the values that change nothing."""


def deciding(settings: TrainSettings | Mapping[str, Any]) -> dict[str, Any]:
    """Settings, or what a file keeps of them, as fingerprints and comparisons see them: runs from before a setting came
    are the same run where it changes nothing."""
    plain = to_mapping(settings) if isinstance(settings, TrainSettings) else dict(settings)
    for key, unchanged in LATER.items():
        table, _, name = key.rpartition(".")
        inner = dict(plain.get(table) or {}) if table else plain
        if inner.get(name) == unchanged:
            del inner[name]
        if table:
            plain[table] = inner
    return plain


def load_settings(path: Path) -> TrainSettings:
    """Training settings from a TOML file. Raises ConfigError naming the file and the key when one is wrong."""
    if tuned_on(path) is None:
        return load_toml(TrainSettings, path)
    return from_mapping(TrainSettings, {key: value for key, value in _toml(path).items() if key != TUNED}, str(path))


def tuned_on(path: Path) -> frozenset[str] | None:
    """Marks (``wsi_pipe.seen``) of the cases that settings were chosen on; None for a file that says nothing of them.

    Raises ConfigError where it says it wrongly.
    """
    try:
        values = _toml(path)
    except (OSError, ValueError):
        # What is wrong with the file is told where its settings are read.
        return None
    if TUNED not in values:
        return None
    cases = values[TUNED].get("cases") if isinstance(values[TUNED], Mapping) else None
    if not isinstance(cases, list) or not all(isinstance(case, str) for case in cases):
        raise ConfigError(f"{path}: [{TUNED}] does not say whose cases the settings were chosen on")
    return frozenset(cases)


def _toml(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))
