"""From bags and slides to an LR encoder file: who is seen, what is learned, what learns, and the run over them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lrmil.distill.attention import Attention, open_attention
from lrmil.distill.evaluate import Agreement, linear_baseline, mean_baseline
from lrmil.distill.lessons import taught_slides
from lrmil.distill.pupil import fresh_student
from lrmil.distill.ranks import ALONE, Ranks, launch, started_by_torchrun, torchrun_ranks
from lrmil.distill.request import DistillRequest
from lrmil.distill.selection import Selection, select
from lrmil.distill.settings import DistillSettings
from lrmil.distill.shelf import Shelf
from lrmil.distill.student import Student
from lrmil.distill.targets import DistillSlide, Lesson, TargetStats, target_stats
from lrmil.distill.teachers import Teacher, load_teachers
from lrmil.distill.train import DistillHistory, distill
from lrmil.distill.validation import named
from wsi_pipe.config import fingerprint, to_mapping
from wsi_pipe.encoders.devices import resolve_devices
from wsi_pipe.encoders.lr_file import write_lr_encoder
from wsi_pipe.encoders.random_id import RANDOM
from wsi_pipe.files import write_text_atomically
from wsi_pipe.seen import Seen

__all__ = ["DistillResult", "run_distillation"]


@dataclass(frozen=True)
class DistillResult:
    """The written file, the history, figures of the best epoch on the inner validation cases, and what a linear map
    from undistilled LR features (baseline) and the mean HR feature (mean) reach there.

    Figures of several teachers begin with their names.
    """

    path: Path
    history: DistillHistory
    figures: Mapping[str, float]
    baseline: Mapping[str, Agreement]
    mean: Mapping[str, Agreement]
    train_slides: tuple[str, ...]
    val_slides: tuple[str, ...]


def run_distillation(request: DistillRequest, progress: Callable[[str], object] | None = None) -> DistillResult:
    """Distil an LR encoder and write it; a run that was interrupted goes on where it stopped.

    With several devices this starts a process for each; as soon as one fails all end. Among processes of ``torchrun``
    it is one of them, and only the first one writes and says anything.

    The student starts fresh and sees the fold's training cases only, or without splits all slides or those of the cases
    named; stopping is decided on some of these. The file states who was seen. Raises
    LeakageError or SplitError for bad folds, BagMismatchError when bags lack what is needed, SettingsError for options
    that do not fit together, and what reading a slide raises.
    """
    say = progress or (lambda text: None)
    if started_by_torchrun():
        told = () if request.settings.device == "auto" else (request.settings.device,)
        with torchrun_ranks(request.devices or told) as (ranks, device):
            return _distil(request, ranks, device, say)
    if len(request.devices) > 1:
        return launch(_distil, request, request.devices, say)
    only = request.devices[0] if request.devices else request.settings.device
    return _distil(request, ALONE, str(resolve_devices(only)[0]), say)


def _distil(request: DistillRequest, ranks: Ranks, where: str, say: Callable[[str], object]) -> DistillResult:
    """One process of the run. The first one alone writes, and has the baselines in its result."""
    settings, device = request.settings, torch.device(where)
    if not ranks.first:
        say = _nothing
    selection = select(request)
    teachers = load_teachers(request, where)
    attention = open_attention(request, selection, teachers)
    making = request.compute or settings.jitters > 0
    with (
        ranks.first_goes_ahead() if making else nullcontext(),
        closing(Shelf(request.out.parent, settings.targets_mib << 20)) as shelf,
    ):
        taught = [taught_slides(request, selection, teacher, shelf, say) for teacher in teachers]
    if shelf.file_bytes:
        say(f"targets: {shelf.memory_bytes >> 20:,} MiB in memory, {shelf.file_bytes >> 20:,} MiB in scratch files")
    trains, vals = ([part[n] for part in taught] for n in (0, 1))
    if attention is not None:
        trains, vals = attention.weigh(trains), attention.weigh(vals)
    lessons = [_lessons(one, *own, settings) for one, own in zip(teachers, zip(trains, vals, strict=True), strict=True)]
    first, train, val = lessons[0][0], trains[0], vals[0]
    # More grids of a slide stand under its id.
    names = tuple(dict.fromkeys(s.slide_id for s in train)), tuple(s.slide_id for s in val)
    student, recipe, licence = fresh_student(request, teachers, [slides[0] for slides in trains])
    run = _fingerprint(request, teachers, [*train, *val], [own.stats for own, _ in lessons], student, attention)
    say(f"{len(names[0])} slides to train, {len(names[1])} to stop by; {sum(map(len, train)):,} LR tiles")

    def epoch_done(figures: Mapping[str, float], epoch: int) -> None:
        shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.items() if "cosine" not in name)
        say(f"epoch {epoch}/{settings.epochs}: {shown}")

    precision = torch.bfloat16 if _half(settings, device) else torch.float32
    history = distill(
        student, recipe.preprocessing, train, val, first.stats, settings,
        device=device, precision=precision, state=_state_path(request.out), run=run, progress=epoch_done,
        name=first.name, more=lessons[1:], ranks=ranks,
    )  # fmt: skip
    best = history.epochs[history.best - 1] if history.best else {}
    if not ranks.first:
        return DistillResult(request.out, history, best, {}, {}, *names)
    write_lr_encoder(
        request.out,
        student.network.cpu(),
        recipe=recipe,
        tile=dataclasses.replace(train[0].lr.spec, overlap_px=0),
        licence=licence,
        training={
            "method": "LRMIL stage 1",
            **_teachers_stated(teachers),
            "fold": selection.name if request.splits is None else request.fold,
            "train_slides": list(names[0]),
            "val_slides": list(names[1]),
            "settings": _stated(settings),
            "best_epoch": history.best,
            "figures": _finite(best),
            "seen": _saw(selection, teachers, attention).to_json(),
        },
    )
    # After the encoder is safe: with many tiles and wide layers this takes a while.
    baseline: dict[str, Agreement] = {}
    mean: dict[str, Agreement] = {}
    for own, held in lessons if val else ():
        found = linear_baseline(own.slides, held.slides, own.stats, settings.seed)
        baseline |= {named(own.name, key): value for key, value in found.items()}
        mean |= {named(own.name, key): value for key, value in mean_baseline(held.slides, own.stats).items()}
    _write_history(request.out, history, best, baseline, mean)
    return DistillResult(request.out, history, best, baseline, mean, *names)


def _lessons(
    teacher: Teacher, train: Sequence[DistillSlide], val: Sequence[DistillSlide], settings: DistillSettings
) -> tuple[Lesson, Lesson]:
    """To train and to stop by, scaled by what the training slides show."""
    stats = target_stats(train, standardise=teacher.standardises(settings))
    return Lesson(teacher.name, train, stats), Lesson(teacher.name, val, stats)


def _saw(selection: Selection, teachers: Sequence[Teacher], attention: Attention | None) -> Seen:
    """Whom the student saw: the slides that it learned from, and whom its teachers learned from."""
    saw = selection.seen(with_labels=attention is not None)
    if attention is not None:
        saw |= attention.saw
    for teacher in teachers:
        saw |= teacher.encoder.info.seen
    return saw


def _teachers_stated(teachers: Sequence[Teacher]) -> dict[str, Any]:
    """The teachers as the file states them: the first one as the only one is, and a list where there are several."""
    stated = [
        {
            "teacher": teacher.encoder.info.name,
            "teacher_weights_sha256": teacher.encoder.info.weights_sha256,
            **({"teacher_weights": RANDOM} if teacher.encoder.info.random else {}),
            "layers": list(teacher.layers),
        }
        for teacher in teachers
    ]
    several = {"teachers": [one | {"figures": f"{t.name}."} for one, t in zip(stated, teachers, strict=True)]}
    return stated[0] | (several if len(stated) > 1 else {})


def _nothing(text: str) -> None:
    """In the place of ``say``, where another process speaks."""


def _half(settings: DistillSettings, device: torch.device) -> bool:
    if settings.precision != "auto":
        return settings.precision == "bfloat16"
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _fingerprint(
    request: DistillRequest,
    teachers: Sequence[Teacher],
    slides: Sequence[DistillSlide],
    stats: Sequence[TargetStats],
    student: Student,
    attention: Attention | None,
) -> str:
    digest = hashlib.sha256()
    # The student as it starts says what it is, how large its input is and where its weights come from. The children's
    # weights are named by the model they come from: as numbers they differ in the last digit from one processor, or
    # number of threads, to another, and a run may well be resumed elsewhere.
    networks: list[torch.nn.Module] = [student]
    if attention is not None:
        networks.append(attention.model)
    for network in networks:
        for name, tensor in sorted(network.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    weights = [teacher.encoder.info.weights_sha256 for teacher in teachers]
    variances = [[f"{value:.4g}" for value in [*own.variance.tolist(), own.final_variance]] for own in stats]
    deciding = dataclasses.replace(request.settings, device="", cache_mib=0, threads=1)
    further = [*zip(weights[1:], variances[1:], strict=True)]
    return fingerprint(
        _stated(deciding), weights[0], request.student, request.lr, request.hr, request.fold,
        [slide.slide_id for slide in slides], [len(slide) for slide in slides], list(map(float, variances[0])),
        request.student_px, digest.hexdigest(), *([further] if further else []),
    )  # fmt: skip


def _stated(settings: DistillSettings) -> dict[str, Any]:
    """Settings as files and fingerprints state them.

    Without those that came later and change no result: runs from before go on, and their encoders, written again, stay
    the same files to the byte, so that features made with them stay valid.
    """
    mapping = to_mapping(settings)
    del mapping["targets_mib"]
    if settings.schedule == DistillSettings().schedule:
        del mapping["schedule"]
    return mapping


def _state_path(out: Path) -> Path:
    return out.with_name(f"{out.stem}.state.safetensors")


def _finite(figures: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def _write_history(
    out: Path,
    history: DistillHistory,
    best: Mapping[str, float],
    baseline: Mapping[str, Agreement],
    mean: Mapping[str, Agreement],
) -> None:
    values: dict[str, Any] = {
        "best_epoch": history.best,
        "best": _finite(best),
        "linear_baseline": {name: _finite(dataclasses.asdict(a)) for name, a in baseline.items()},
        "mean_baseline": {name: _finite(dataclasses.asdict(a)) for name, a in mean.items()},
        "epochs": [_finite(figures) for figures in history.epochs],
    }
    write_text_atomically(out.with_name(f"{out.stem}.history.json"), json.dumps(values, indent=1))
