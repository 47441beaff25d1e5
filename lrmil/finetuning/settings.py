"""Settings of fine-tuning an encoder together with its classifier."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lrmil.config import ATTENTION_MODELS, LossSettings, ModelSettings
from wsi_pipe.config import load_toml
from wsi_pipe.errors import ConfigError

__all__ = ["FinetuneSettings", "load_finetune_settings"]


def _head() -> ModelSettings:
    return ModelSettings("gated-abmil", hidden=128, attention_dim=64)


@dataclass(frozen=True)
class FinetuneSettings:
    """How an encoder and a MIL model are trained together, on tiles and slide labels.

    model: the MIL model on top, one with attention. loss: weights of the labels and of a teacher's word. steps: of
    AdamW in all, whatever the number of slides, so that few labels and many take the same. max_bags: slides a step.
    max_tiles: of one slide in a step, drawn anew each time, 0 for all; memory grows with ``max_bags`` x ``max_tiles``.
    learning_rate: the peak, after a linear rise over the share ``warmup`` of the steps, then half a cosine to zero.
    weight_decay: not of biases and norms. clip_norm: of the gradient, 0 for none. stain, flips: augmentation of tiles,
    as in distillation. class_weights: "balanced" weighs each slide by the inverse frequency of its class, "none" does
    not. precision: "auto" (bfloat16 on a GPU that has it), "float32" or "bfloat16". save_every: passes over the slides
    between saved states, 0 for none. cache_mib: tiles are kept decoded when those of all slides fit, else read anew for
    each step; the result does not depend on it. threads: that read tiles, 0 for as many as there are cores.
    """

    model: ModelSettings = field(default_factory=_head)
    loss: LossSettings = field(default_factory=LossSettings)
    steps: int = 150
    max_bags: int = 8
    max_tiles: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.05
    clip_norm: float = 1.0
    stain: float = 0.1
    flips: bool = True
    class_weights: str = "balanced"
    seed: int = 0
    precision: str = "auto"
    device: str = "auto"
    save_every: int = 1
    cache_mib: int = 2048
    threads: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "max_bags"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} must be at least 1")
        for name in ("max_tiles", "weight_decay", "clip_norm", "stain", "seed", "save_every", "cache_mib", "threads"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} {getattr(self, name)} must be at least 0")
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate {self.learning_rate} must be above 0")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup {self.warmup} must be at least 0 and below 1")
        for name, known in (
            ("class_weights", ("balanced", "none")),
            ("precision", ("auto", "float32", "bfloat16")),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} {getattr(self, name)!r} must be one of {', '.join(known)}")
        if self.model.name not in ATTENTION_MODELS:
            raise ConfigError(
                f"model {self.model.name!r} cannot be trained together with an encoder",
                remedy=f"choose one of {', '.join(ATTENTION_MODELS)}",
            )
        if self.model.members > 1 or self.model.linear_share > 0:
            raise ConfigError("one encoder goes with one model", remedy="leave out members and linear_share")


def load_finetune_settings(path: Path) -> FinetuneSettings:
    """Settings from a TOML file. Raises ConfigError naming the file and the key when one is wrong."""
    return load_toml(FinetuneSettings, path)
