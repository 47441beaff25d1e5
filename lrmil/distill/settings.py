"""Settings of patch distillation."""

from __future__ import annotations

from dataclasses import dataclass, field

from wsi_pipe.errors import ConfigError

__all__ = ["DistillSettings"]


@dataclass(frozen=True)
class DistillSettings:
    """How a low-resolution encoder is distilled.

    layers: the teacher's blocks whose CLS the student's tokens learn, negative ones from the end; the paper's first,
    second and second to last by default. A teacher without blocks, or ``layers`` empty, gives its final features as the
    only layer. layer_variance: divide each layer's loss, and the final one, by its variance on training tiles (off
    reproduces the paper). patch, final: weights of the two losses. standardise: learn targets with each dimension
    standardised on training tiles: "auto" does so for teachers without blocks, whose dimensions have units of their
    own. epochs, batch_size, lr, weight_decay, warmup, clip: of AdamW; clip 0 is for none. schedule: of the rate,
    "cosine" to zero or "constant". patience: epochs without a
    lower validation loss before stopping. val_fraction: of the fold's training cases, for that. stain, flips:
    augmentation. jitters: this many more grids of each training slide, moved by a part of an LR tile, on which the
    teacher is run; for students that start from random weights on few slides.
    precision: "auto", "float32" or "bfloat16". mix_mib: slides are mixed in groups of about this size when decoded, and
    two groups are in memory at once. cache_mib: tiles are kept decoded when all of them fit, else read anew each epoch;
    the result does not depend on it. targets_mib: the teacher's layers and features are kept in memory up to this size,
    what exceeds it in scratch files beside the run; the result does not depend on it. threads: that read tiles, 0
    for as many as there are cores.
    """

    layers: tuple[int, ...] = (0, 1, -2)
    layer_variance: bool = True
    patch: float = 1.0
    final: float = 1.0
    standardise: str = "auto"
    epochs: int = 30
    batch_size: int = 64
    lr: float = field(default=3e-4, metadata={"also": ("learning_rate",)})
    weight_decay: float = 0.05
    warmup: float = 0.05
    clip: float = 1.0
    patience: int = 8
    val_fraction: float = 0.15
    stain: float = 0.1
    flips: bool = True
    jitters: int = 0
    precision: str = "auto"
    device: str = "auto"
    seed: int = 0
    mix_mib: int = 1024
    cache_mib: int = 2048
    targets_mib: int = 4096
    threads: int = 0
    schedule: str = "cosine"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience", "mix_mib"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} must be at least 1")
        for name in ("patch", "final", "weight_decay", "stain", "jitters", "cache_mib", "targets_mib", "threads"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} {getattr(self, name)} must be at least 0")
        if self.patch == 0 and self.final == 0:
            raise ConfigError("both losses have weight 0", remedy="give patch or final a weight above 0")
        if not self.lr > 0 or not self.clip >= 0:
            raise ConfigError("lr must be above 0, clip at least 0")
        if self.schedule not in ("cosine", "constant"):
            raise ConfigError(f"schedule {self.schedule!r} must be cosine or constant")
        if not 0 <= self.val_fraction < 1 or not 0 <= self.warmup < 1:
            raise ConfigError("val_fraction and warmup must be at least 0 and below 1")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ConfigError(f"precision {self.precision!r} must be auto, float32 or bfloat16")
        if self.standardise not in ("auto", "yes", "no"):
            raise ConfigError(f"standardise {self.standardise!r} must be auto, yes or no")
