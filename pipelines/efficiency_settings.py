"""Settings of the label-efficiency experiment, as presets hold them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from lrmil.config import LossSettings, TrainSettings
from lrmil.distill import DistillSettings
from wsi_pipe.config import load_toml
from wsi_pipe.errors import ConfigError
from wsi_pipe.geometry import level_label
from wsi_pipe.synthetic import SIGNALS

__all__ = ["EfficiencySettings", "EndToEndSettings", "PlannedCohort", "ShiftSettings", "load_efficiency"]


@dataclass(frozen=True)
class ShiftSettings:
    """What the test cases' laboratory and scanner do otherwise than the training cases'.

    haematoxylin, eosin: factors of the stains' optical density. tint: of red, green and blue light. blur_px: standard
    deviation of a Gaussian at level 0. quality: of JPEG, 85 in training cases.
    """

    haematoxylin: float = 1.0
    eosin: float = 1.0
    tint: tuple[float, float, float] = (1.0, 1.0, 1.0)
    blur_px: float = 0.0
    quality: int = 85

    def __post_init__(self) -> None:
        if min(self.haematoxylin, self.eosin, *self.tint) <= 0 or self.blur_px < 0:
            raise ConfigError("a shift has factors above 0 and a blur of 0 or more")


@dataclass(frozen=True)
class PlannedCohort:
    """A synthetic cohort with a fixed test part; every case has one slide.

    signals: of the classes beside "negative", one each; strengths: of these signals. train, test: cases. size_px: side
    of a slide. shift: of the test cases.
    """

    signals: tuple[str, ...] = ("middle",)
    strengths: tuple[float, ...] = (1.0,)
    train: int = 150
    test: int = 100
    size_px: int = 768
    mpp: float = 0.5
    tissue_fraction: float = 0.7
    lesion_fraction: float = 0.3
    shift: ShiftSettings = ShiftSettings()

    def __post_init__(self) -> None:
        unknown = [signal for signal in self.signals if signal not in SIGNALS]
        if unknown or not self.signals or len(self.strengths) != len(self.signals):
            raise ConfigError(f"signals {self.signals} must be of {', '.join(SIGNALS)}, with a strength each")
        if len(set(self.signals)) < len(self.signals):
            raise ConfigError(f"signals {self.signals} must differ: they name the classes")

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; their order is that of the labels."""
        return ("negative", "positive") if len(self.signals) == 1 else ("negative", *self.signals)


@dataclass(frozen=True)
class EndToEndSettings:
    """How the student's network is trained on LR tiles and slide labels alone, without a teacher.

    steps: of AdamW, on a cosine schedule. bags: slides a step. stain: of the augmentation, as in distillation, beside
    turns and mirrors. dropout: of the head.
    """

    steps: int = 200
    bags: int = 8
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.05
    stain: float = 0.1
    dropout: float = 0.25


@dataclass(frozen=True)
class EfficiencySettings:
    """The whole experiment in one setting.

    seeds: of the cohorts. labelled: numbers of labelled training cases; draws: how many subsets of each number.
    lr_tiles: sides of undistilled LR tiles that the plain LR arm chooses from; tile_px is that of HR, of the students
    and of one of these. validation_every: of the labelled cases of a class every so many is for validation. mil: of
    every MIL classifier. student_loss: of stage 2. stage2_unlabelled: stage 2 learns the teacher's word on unlabelled
    training slides as well. end_to_end: of all networks that learn end to end. controls_at: numbers of labelled cases
    at which what the stages add is taken apart: fine-tuning on labels alone, and teaching a network of random weights.
    longer_steps: of the network that learns end to end on labels alone, once more with more steps; 0 for not at all.
    linear_spread: linear models see mean and spread of the features, not the mean alone. c_grid: inverse penalties
    that they choose from. arms: names of those to run, () for all; HR always is, since it teaches.
    """

    name: str = "middle"
    seeds: tuple[int, ...] = (1,)
    cohort: PlannedCohort = PlannedCohort()
    hr_mpp: float = 0.5
    lr_mpp: float = 2.0
    tile_px: int = 64
    lr_tiles: tuple[int, ...] = (64, 48, 32)
    teacher: str = "texture"
    student: str = "timm:test_resnet"
    labelled: tuple[int, ...] = (20, 40, 80, 150)
    draws: tuple[int, ...] = (3, 3, 2, 1)
    validation_every: int = 4
    distill: DistillSettings = field(default_factory=DistillSettings)
    mil: TrainSettings = field(default_factory=TrainSettings)
    student_loss: LossSettings = field(default_factory=LossSettings)
    stage2_unlabelled: bool = True
    end_to_end: EndToEndSettings = EndToEndSettings()
    controls_at: tuple[int, ...] = (40,)
    longer_steps: int = 0
    linear_spread: bool = False
    c_grid: tuple[float, ...] = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    arms: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.labelled) != len(self.draws) or min(self.draws, default=0) < 1:
            raise ConfigError(f"labelled {self.labelled} and draws {self.draws} must go together, each at least 1")
        if list(self.labelled) != sorted(set(self.labelled)):
            raise ConfigError(f"labelled {self.labelled} must rise")
        if max(self.labelled) > self.cohort.train:
            raise ConfigError(f"{max(self.labelled)} labelled cases are more than the {self.cohort.train} for training")
        if self.tile_px not in self.lr_tiles:
            raise ConfigError(f"tile_px {self.tile_px} must be one of lr_tiles {self.lr_tiles}")
        if not self.hr_mpp < self.lr_mpp:
            raise ConfigError(f"hr_mpp {self.hr_mpp:g} must be finer than lr_mpp {self.lr_mpp:g}")
        if self.longer_steps < 0:
            raise ConfigError(f"longer_steps {self.longer_steps} must be at least 0")
        if len(set(self.seeds)) < len(self.seeds) or not self.seeds:
            raise ConfigError(f"seeds {self.seeds} must be there and differ")

    @property
    def hr(self) -> str:
        """Label of the HR level."""
        return level_label(self.hr_mpp)

    @property
    def lr(self) -> str:
        """Label of the LR level."""
        return level_label(self.lr_mpp)

    def plain(self) -> TrainSettings:
        """Of a classifier that learns the labels alone."""
        return dataclasses.replace(self.mil, loss=LossSettings(ce=1.0, bag=0.0, soft=0.0, hard=0.0))


def load_efficiency(preset: Path) -> EfficiencySettings:
    """Settings of a preset. Raises ConfigError naming the file and the key when one is wrong."""
    return load_toml(EfficiencySettings, preset)
