"""Settings of the LRMIL experiment, as presets hold them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lrmil.config import PARENTS, LossSettings, TrainSettings
from lrmil.distill import DistillSettings
from lrmil.experiment.baselines import BASELINES
from wsi_pipe.config import ExtractSettings, JobSettings, TileSettings, from_mapping, load_toml, to_mapping
from wsi_pipe.encoders.random_id import RANDOM_SUFFIX
from wsi_pipe.errors import ConfigError
from wsi_pipe.geometry import level_label
from wsi_pipe.override import changed
from wsi_pipe.synthetic import SIGNALS

__all__ = ["ABLATIONS", "CohortSettings", "ExperimentSettings", "cohort_changes", "load_experiment"]

ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "no final loss": {"final": 0.0},
    "no patch loss": {"patch": 0.0},
    "layers by their size": {"layer_variance": False},
    "no stain augmentation": {"stain": 0.0},
    "no turns": {"flips": False},
}
"""What each ablation changes in ``DistillSettings``."""


@dataclass(frozen=True)
class CohortSettings:
    """A synthetic cohort, where no slides are given. See ``wsi_pipe.synthetic.SlideSpec`` for the signals."""

    signal: str = "middle"
    slides: int = 300
    size_px: int = 1024
    mpp: float = 0.5
    tissue_fraction: float = 0.7
    seed: int = 11

    def __post_init__(self) -> None:
        if self.signal not in SIGNALS:
            raise ConfigError(f"signal {self.signal!r} must be one of {', '.join(SIGNALS)}")


@dataclass(frozen=True)
class ExperimentSettings:
    """The whole experiment.

    hr_mpp, lr_mpp, tile_px: of the two grids. teacher: HR encoder, and that of the plain LR arm. student: network that
    is distilled, or "copy". random_teacher, random_student: draw weights rather than load them. student_px: side of
    its input, None for the tiles' own. compute_targets: run the teacher for its layers once, into a folder that all
    folds share, rather than read its final features from the bags. precision: of extraction. attention_weights: weigh
    children by the fold's HR teacher in L_final. folds, split_seed, val_fraction: of the splits. mil: of every
    classifier. student_loss: of the arm with a teacher. parent_rules: such an arm for each of these rules of
    ``LossSettings.parents``, by default one with the loss's own. cost_slides, cost_repeats: of the benchmark.
    replicates: of the bootstrap. baselines: further arms, of ``lrmil.experiment.baselines.BASELINES``. zoom_tiles: LR
    tiles that "zoom" looks into.
    """

    cohort: CohortSettings = CohortSettings()
    hr_mpp: float = 0.5
    lr_mpp: float = 2.0
    tile_px: int = 64
    teacher: str = "texture"
    student: str = "timm:test_resnet"
    random_teacher: bool = False
    random_student: bool = True
    student_px: int | None = None
    compute_targets: bool = False
    precision: str = "auto"
    attention_weights: bool = False
    folds: int = 5
    split_seed: int = 0
    val_fraction: float = 0.15
    distill: DistillSettings = field(default_factory=DistillSettings)
    mil: TrainSettings = field(default_factory=TrainSettings)
    student_loss: LossSettings = field(default_factory=LossSettings)
    parent_rules: tuple[str, ...] = ()
    cost_slides: int = 5
    cost_repeats: int = 3
    replicates: int = 2000
    baselines: tuple[str, ...] = ()
    zoom_tiles: int = 4

    def __post_init__(self) -> None:
        if not self.hr_mpp < self.lr_mpp:
            raise ConfigError(f"hr_mpp {self.hr_mpp:g} must be finer than lr_mpp {self.lr_mpp:g}")
        unknown = [name for name in self.baselines if name not in BASELINES]
        if unknown:
            raise ConfigError(f"no baseline is called {unknown[0]!r}", remedy=f"known ones are {', '.join(BASELINES)}")
        if self.zoom_tiles < 1:
            raise ConfigError(f"zoom_tiles {self.zoom_tiles} must be at least 1")
        odd = [rule for rule in self.parent_rules if rule not in PARENTS]
        if odd:
            raise ConfigError(f"parent_rules {odd[0]!r} must be of {', '.join(PARENTS)}")
        if self.folds < 2:
            raise ConfigError(f"{self.folds} folds do not test every case", remedy="give 2 or more")

    @property
    def hr(self) -> str:
        """Label of the HR level."""
        return level_label(self.hr_mpp)

    @property
    def lr(self) -> str:
        """Label of the LR level."""
        return level_label(self.lr_mpp)

    @property
    def taught(self) -> dict[str, LossSettings]:
        """The losses of the arms with a teacher, by their rule for parents; "" where there is one arm alone."""
        if not self.parent_rules:
            return {"": self.student_loss}
        return {rule: dataclasses.replace(self.student_loss, parents=rule) for rule in self.parent_rules}

    @property
    def teacher_features(self) -> str:
        """What the teacher's features are called in bags."""
        return f"{self.teacher}{RANDOM_SUFFIX}" if self.random_teacher else self.teacher

    def job(self, lr_encoders: tuple[str, ...] = ()) -> JobSettings:
        """Settings of the wsi-pipe job: the teacher at both levels, and LR encoders at theirs."""
        encoders = {self.hr: (self.teacher,), self.lr: (self.teacher, *lr_encoders)}
        return JobSettings(
            tile=TileSettings(resolutions=(self.hr_mpp, self.lr_mpp), tile_px=self.tile_px),
            extract=ExtractSettings(encoders=encoders, precision=self.precision),
        )

    def mil_settings(self, loss: LossSettings | None = None) -> TrainSettings:
        """Of a classifier with a teacher's loss, or with the labels alone."""
        plain = LossSettings(ce=1.0, bag=0.0, soft=0.0, hard=0.0)
        return dataclasses.replace(self.mil, loss=loss or plain)


def load_experiment(preset: Path, changes: Sequence[str] = ()) -> ExperimentSettings:
    """Settings of a preset with ``changes`` over it, each "KEY=VALUE"; of two with one key the later holds.

    KEY: dotted, as in TOML (``distill.epochs``). VALUE: as in TOML, quotes around a string left out at will; a table
    stands for the whole of the preset's. Raises ConfigError naming the preset when it is missing or wrong by itself,
    and naming the changes when they have no "=", or when a key, a type or a value is wrong.
    """
    values = to_mapping(load_toml(ExperimentSettings, preset))
    if values.pop("random_teacher", False):
        raise ConfigError(
            f"{preset}: random_teacher is no setting of a preset: figures of random weights look like any others",
            remedy="say it in the call: --set random_teacher=true",
        )
    return changed(from_mapping(ExperimentSettings, values), changes, example="distill.epochs=8")


def cohort_changes(changes: Sequence[str]) -> list[str]:
    """Those of ``changes``, see ``load_experiment``, that are about the synthetic cohort."""
    return [change for change in changes if change.partition("=")[0].partition(".")[0].strip() == "cohort"]
