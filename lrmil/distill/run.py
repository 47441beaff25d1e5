"""From bags, slides and a fold to an LR encoder file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from lrmil.checkpoint import load_model
from lrmil.distill.evaluate import Agreement, linear_baseline, mean_baseline
from lrmil.distill.jitter import jittered_slides
from lrmil.distill.settings import DistillSettings
from lrmil.distill.shelf import Shelf
from lrmil.distill.student import Student, relative_blocks
from lrmil.distill.targets import (
    DistillSlide,
    TargetItem,
    TargetStats,
    attention_weights,
    compute_targets,
    load_slide,
    target_stats,
)
from lrmil.distill.train import DistillHistory, distill
from lrmil.errors import BagMismatchError, LeakageError, SettingsError
from lrmil.splits import SplitTable, seen_cases
from lrmil.store import check_readable
from wsi_pipe.bag import BagAttrs, read_attrs, read_grids
from wsi_pipe.config import fingerprint, to_mapping
from wsi_pipe.encoders import load_encoder
from wsi_pipe.encoders.architectures import PooledNetwork
from wsi_pipe.encoders.base import Encoder, LayeredEncoder, block_indices
from wsi_pipe.encoders.lr_file import write_lr_encoder
from wsi_pipe.encoders.random_id import RANDOM
from wsi_pipe.encoders.recipe import Recipe
from wsi_pipe.encoders.torch_encoder import TorchEncoder
from wsi_pipe.errors import BagError, ConfigError
from wsi_pipe.files import write_text_atomically
from wsi_pipe.ids import joined
from wsi_pipe.masking import MASK
from wsi_pipe.slides import open_slide

__all__ = ["COPY", "DistillRequest", "DistillResult", "run_distillation"]

COPY = "copy"
"""The student is a copy of the teacher, as in the paper."""


@dataclass(frozen=True)
class DistillRequest:
    """What to distil.

    bags: folder of bags with both levels. slides: slide id -> file, where a bag's own path no longer holds. cases:
    slide id -> case, where the bags do not know it. teacher,
    student: encoder names; "copy" for the student. mil_teacher: model file whose attention weighs the children, or None
    for equal weights. out: the LR encoder to write. compute: run the teacher now rather than read its features and
    layers from the bags; into targets_dir, which folds may share, by default one beside ``out``. random_teacher,
    random_student: weights drawn anew instead of loaded. student_px: side that tiles are resized to for the student,
    None for its own (a timm ViT: the tiles' own).
    """

    bags: Path
    teacher: str
    student: str
    lr: str
    hr: str
    splits: SplitTable
    fold: str
    out: Path
    settings: DistillSettings = field(default_factory=DistillSettings)
    slides: Mapping[str, str] = field(default_factory=dict)
    cases: Mapping[str, str] = field(default_factory=dict)
    mil_teacher: Path | None = None
    compute: bool = False
    targets_dir: Path | None = None
    random_teacher: bool = False
    random_student: bool = False
    student_px: int | None = None


@dataclass(frozen=True)
class DistillResult:
    """The written file, the history, figures of the best epoch on the inner validation cases, and what a linear map
    from undistilled LR features (baseline) and the mean HR feature (mean) reach there."""

    path: Path
    history: DistillHistory
    figures: Mapping[str, float]
    baseline: Mapping[str, Agreement]
    mean: Mapping[str, Agreement]
    train_slides: tuple[str, ...]
    val_slides: tuple[str, ...]


def run_distillation(request: DistillRequest, progress: Callable[[str], object] | None = None) -> DistillResult:
    """Distil an LR encoder for one fold and write it; a run that was interrupted goes on where it stopped.

    The student starts fresh and sees the fold's training cases only; stopping is decided on some of these. Raises
    LeakageError or SplitError for bad folds, BagMismatchError when bags lack what is needed, SettingsError for options
    that do not fit together, and what reading a slide raises.
    """
    say = progress or (lambda text: None)
    settings = request.settings
    device = _device(settings.device)
    bags = _training_bags(request)
    teacher = load_encoder(request.teacher, device=str(device), precision="auto", random_weights=request.random_teacher)
    layers, depth = _layers(teacher, settings)
    with closing(Shelf(request.out.parent, settings.targets_mib << 20)) as shelf:
        train, val = _slides(request, bags, teacher, layers, depth, shelf, say)
    if shelf.file_bytes:
        say(f"targets: {shelf.memory_bytes >> 20:,} MiB in memory, {shelf.file_bytes >> 20:,} MiB in scratch files")
    # More grids of a slide stand under its id.
    names = tuple(dict.fromkeys(s.slide_id for s in train)), tuple(s.slide_id for s in val)
    if request.mil_teacher is not None:
        identities = _identities(request)
        train, val = (_weighted(part, request, teacher, identities) for part in (train, val))
    stats = target_stats(
        train, standardise=settings.standardise == "yes" or (settings.standardise == "auto" and not layers)
    )
    student, recipe, licence = _student(request, teacher, train[0], layers, depth)
    run = _fingerprint(request, teacher, [*train, *val], stats, student)
    say(f"{len(names[0])} slides to train, {len(names[1])} to stop by; {sum(map(len, train)):,} LR tiles")

    def epoch_done(figures: Mapping[str, float], epoch: int) -> None:
        shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.items() if "cosine" not in name)
        say(f"epoch {epoch}/{settings.epochs}: {shown}")

    precision = torch.bfloat16 if _half(settings, device) else torch.float32
    history = distill(
        student, recipe.preprocessing, train, val, stats, settings,
        device=device, precision=precision, state=_state_path(request.out), run=run, progress=epoch_done,
    )  # fmt: skip
    best = history.epochs[history.best - 1] if history.best else {}
    lr_grid = train[0].lr
    write_lr_encoder(
        request.out,
        student.network.cpu(),
        recipe=recipe,
        tile=dataclasses.replace(lr_grid.spec, overlap_px=0),
        licence=licence,
        training={
            "method": "LRMIL stage 1",
            "teacher": teacher.info.name,
            "teacher_weights_sha256": teacher.info.weights_sha256,
            **({"teacher_weights": RANDOM} if teacher.info.random else {}),
            "layers": list(layers),
            "fold": request.fold,
            "train_slides": list(names[0]),
            "val_slides": list(names[1]),
            "settings": _stated(settings),
            "best_epoch": history.best,
            "figures": _finite(best),
        },
    )
    # After the encoder is safe: with many tiles and wide layers this takes a while.
    baseline = linear_baseline(train, val, stats, settings.seed) if val else {}
    mean = mean_baseline(val, stats) if val else {}
    _write_history(request.out, history, best, baseline, mean)
    return DistillResult(request.out, history, best, baseline, mean, *names)


def _device(name: str) -> torch.device:
    from wsi_pipe.encoders.devices import resolve_devices

    return resolve_devices(name)[0]


def _half(settings: DistillSettings, device: torch.device) -> bool:
    if settings.precision != "auto":
        return settings.precision == "bfloat16"
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _attrs(path: Path) -> BagAttrs:
    """The root attributes of a bag, which nothing of this run opened before.

    Raises StoreError where HDF5 loops or crashes on it, BagError when it is no bag.
    """
    check_readable(path)
    return read_attrs(path)


def _identities(request: DistillRequest) -> tuple[list[str], list[str]]:
    """Slide and case ids of all bags."""
    attrs = [_attrs(path) for path in sorted(request.bags.glob("*.h5"))]
    cases = joined(request.cases, [a.slide_id for a in attrs])
    return [a.slide_id for a in attrs], [cases.get(a.slide_id, a.case_id) for a in attrs]


def _training_bags(request: DistillRequest) -> dict[Path, BagAttrs]:
    """Bags of the fold's training slides, sorted. Raises BagMismatchError when the folder holds none."""
    paths = sorted(request.bags.glob("*.h5"))
    if not paths:
        raise BagMismatchError(f"{request.bags}: holds no bags", remedy="give JOB/bags of wsi-pipe run")
    attrs = [_attrs(path) for path in paths]
    cases = joined(request.cases, [a.slide_id for a in attrs])
    attrs = [dataclasses.replace(a, case_id=cases.get(a.slide_id, a.case_id)) for a in attrs]
    indices = request.splits.indices(request.fold, [a.slide_id for a in attrs], [a.case_id for a in attrs])
    return {paths[i]: attrs[i] for i in indices.train if attrs[i].status == "done"}


def _slides(
    request: DistillRequest,
    bags: Mapping[Path, BagAttrs],
    teacher: Encoder,
    layers: Sequence[int],
    depth: int,
    shelf: Shelf,
    say: Callable[[str], object],
) -> tuple[list[DistillSlide], list[DistillSlide]]:
    """Training slides, further grids of them included, and validation slides, with the teacher's targets."""
    settings = request.settings
    files: dict[str, Path] = {}
    folder = request.targets_dir or request.out.parent / f"{request.out.stem}.targets"
    if request.compute:
        say(f"teacher {teacher.info.name} over the tiles at {request.hr} of {len(bags)} slides")
        made = compute_targets([_target(request, bag, attrs) for bag, attrs in bags.items()], teacher, layers, folder)
        files = {bag.stem: made[bag.stem, request.hr] for bag in bags}
    loaded = {bag: _load(request, bag, attrs, layers, depth, files, shelf) for bag, attrs in bags.items()}
    places = {slide.slide_id: bag for bag, slide in loaded.items() if slide is not None}
    slides = [slide for slide in loaded.values() if slide is not None]
    if not slides:
        raise SettingsError("no training slide has an LR tile with children", remedy="check splits and resolutions")
    train, val = _inner_split(slides, settings)
    if settings.jitters:
        say(f"teacher {teacher.info.name} over {settings.jitters} more grids of {len(train)} slides")
        train += jittered_slides(
            train,
            [places[slide.slide_id] for slide in train],
            settings.jitters,
            hr_label=request.hr,
            teacher=teacher,
            layers=layers,
            folder=folder,
            seed=settings.seed,
            shelf=shelf,
        )
    return train, val


def _layers(teacher: Encoder, settings: DistillSettings) -> tuple[tuple[int, ...], int]:
    """Blocks of the teacher counted from 0, and its depth; none for a teacher without blocks."""
    depth = teacher.depth if isinstance(teacher, LayeredEncoder) else 0
    if not depth or not settings.layers:
        return (), depth
    return tuple(dict.fromkeys(block_indices(settings.layers, depth, teacher.info.name))), depth


def _load(
    request: DistillRequest,
    bag: Path,
    attrs: BagAttrs,
    layers: Sequence[int],
    depth: int,
    files: Mapping[str, Path],
    shelf: Shelf,
) -> DistillSlide | None:
    slide = load_slide(
        bag,
        _slide_file(request, bag, attrs),
        request.lr,
        request.hr,
        request.teacher,
        layers,
        depth,
        files.get(bag.stem),
        shelf,
    )
    return slide and dataclasses.replace(slide, case_id=attrs.case_id)


def _slide_file(request: DistillRequest, bag: Path, attrs: BagAttrs) -> str:
    """Where the slide of a bag lies. Raises BagError where the bag does not tell and the request neither."""
    path = request.slides.get(attrs.slide_id) or attrs.slide_path
    if not path or MASK in path:
        what = "its address is told without its secret" if path else "it is of an anonymised job"
        raise BagError(
            f"{bag}: does not say where its slide lies: {what}", remedy="give the slides: --slides CSV, with these ids"
        )
    return path


def _target(request: DistillRequest, bag: Path, attrs: BagAttrs) -> TargetItem:
    """The HR tiles of a bag. Raises BagError when it has none."""
    grid = next((g for g in read_grids(bag) if g.label == request.hr), None)
    if grid is None:
        raise BagError(f"{bag}: has no level {request.hr}", remedy="tile the slides at that resolution too")
    path = _slide_file(request, bag, attrs)
    opening = partial(open_slide, path, mpp=attrs.mpp_l0, scene=attrs.scene, z=attrs.z)
    return TargetItem(bag.stem, opening, (grid,), attrs.fingerprint_tile)


def _weighted(
    slides: Sequence[DistillSlide],
    request: DistillRequest,
    teacher: Encoder,
    identities: tuple[Sequence[str], Sequence[str]],
) -> list[DistillSlide]:
    """Slides whose children weigh as a MIL teacher of the same fold attends to them.

    identities: slide and case ids of every bag, for the check that the teacher saw none of the fold's test cases.
    """
    assert request.mil_teacher is not None
    model, card = load_model(request.mil_teacher)
    path = request.mil_teacher
    wanted = {"fold": request.splits.fold_name(request.fold), "level": request.hr, "encoder": request.teacher}
    found = {"fold": card.fold, "level": card.level, "encoder": card.encoder}
    for name, value in wanted.items():
        if found[name] and found[name] != value:
            raise BagMismatchError(
                f"{path}: is a model of {name} {found[name]}, not of {value}",
                remedy="give the HR teacher that was trained on this very fold",
            )
    if not card.fold:
        raise SettingsError(
            f"{path} does not say which fold it was trained on, so it may have seen cases that are held out",
            remedy="give the HR teacher that lrmil train made of this very fold",
        )
    if card.weights_sha256 and card.weights_sha256 != teacher.info.weights_sha256:
        raise BagMismatchError(
            f"{path}: was trained on features of other weights of {card.encoder} than the teacher's",
            remedy="train it on these bags, or give the teacher that made its features",
        )
    torn = seen_cases(path, card.fold, request.fold, request.splits, *identities)
    if torn:
        raise LeakageError(
            f"the MIL teacher {path} was trained on {len(torn)} test cases of {request.fold}: {', '.join(torn[:5])}",
            remedy="train it with the same splits",
        )
    weighted = []
    with torch.inference_mode():
        for slide in slides:
            features = torch.from_numpy(np.array(slide.final, np.float32))
            output = model(features, torch.tensor([0, len(features)]))
            if output.attention_logits is None:
                raise SettingsError(f"{path}: has no attention per tile", remedy="give an attention model")
            attention = output.attention_logits.float().softmax(0).numpy()
            weighted.append(dataclasses.replace(slide, weights=attention_weights(slide.children, attention)))
    return weighted


def _inner_split(
    slides: Sequence[DistillSlide], settings: DistillSettings
) -> tuple[list[DistillSlide], list[DistillSlide]]:
    """Training and validation slides, whole cases, about ``val_fraction`` of the cases; none for a single case."""
    cases = sorted({slide.case_id for slide in slides})
    count = min(math.ceil(settings.val_fraction * len(cases)), len(cases) - 1) if settings.val_fraction else 0
    order = np.random.default_rng(settings.seed).permutation(len(cases))
    held = {cases[i] for i in order[:count]}
    return [s for s in slides if s.case_id not in held], [s for s in slides if s.case_id in held]


def _student(
    request: DistillRequest, teacher: Encoder, slide: DistillSlide, layers: Sequence[int], depth: int
) -> tuple[Student, Recipe, str]:
    """A fresh student, the recipe to export it by, and the licence of its weights."""
    side = request.student_px
    if request.student == COPY:
        if not isinstance(teacher, TorchEncoder):
            raise SettingsError(
                f"teacher {teacher.info.name} is no network that could be copied", remedy="give --student timm:MODEL"
            )
        source = load_encoder(
            request.teacher, device="cpu", precision="float32", random_weights=request.random_teacher, input_px=side
        )
    else:
        source = _load_student(request, side or slide.lr.spec.size_px)
    encoder = cast(TorchEncoder, source)
    recipe = encoder.recipe
    if encoder.network.depth and (side or request.student != COPY):
        # The network interpolates its position embeddings to another input than it was built for.
        recipe = dataclasses.replace(recipe, args={**recipe.args, "dynamic_img_size": True})
    network: PooledNetwork = encoder.network
    # A ConvNet has no blocks to match the teacher's with: its last map learns every layer.
    blocks = relative_blocks(layers, depth, network.depth) if layers and network.depth else []
    torch.manual_seed(request.settings.seed)
    pixels = recipe.preprocessing.input_px or slide.lr.spec.size_px
    student = Student(
        network,
        blocks=blocks,
        layer_dims=[layer.shape[1] for layer in slide.layers],
        final_dim=slide.final.shape[1],
        k=slide.children.k,
        side_px=pixels,
    )
    licence = f"{teacher.info.licence} (distilled from {teacher.info.name})"
    return student, recipe, licence


def _load_student(request: DistillRequest, side: int) -> Encoder:
    options = {"device": "cpu", "precision": "float32", "random_weights": request.random_student}
    if not request.student.startswith("timm:"):
        return load_encoder(request.student, **options, input_px=request.student_px)  # type: ignore[arg-type]
    try:
        return load_encoder(request.student, **options, input_px=side)  # type: ignore[arg-type]
    except ConfigError:
        # A ConvNet takes any side as it is; only its preprocessing names one.
        encoder = cast(TorchEncoder, load_encoder(request.student, **options))  # type: ignore[arg-type]
        pre = dataclasses.replace(encoder.recipe.preprocessing, input_px=side, resize_px=None)
        encoder.recipe = dataclasses.replace(encoder.recipe, preprocessing=pre)
        return encoder


def _fingerprint(
    request: DistillRequest, teacher: Encoder, slides: Sequence[DistillSlide], stats: TargetStats, student: Student
) -> str:
    digest = hashlib.sha256()
    # The student as it starts says what it is, how large its input is and where its weights come from. The children's
    # weights are named by the model they come from: as numbers they differ in the last digit from one processor, or
    # number of threads, to another, and a run may well be resumed elsewhere.
    networks: list[torch.nn.Module] = [student]
    if request.mil_teacher is not None:
        networks.append(load_model(request.mil_teacher)[0])
    for network in networks:
        for name, tensor in sorted(network.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    variance = [float(f"{value:.4g}") for value in stats.variance.tolist()]
    deciding = dataclasses.replace(request.settings, device="", cache_mib=0, threads=1)
    return fingerprint(
        _stated(deciding), teacher.info.weights_sha256, request.student, request.lr, request.hr, request.fold,
        [slide.slide_id for slide in slides], [len(slide) for slide in slides], variance,
        request.student_px, digest.hexdigest(),
    )  # fmt: skip


def _stated(settings: DistillSettings) -> dict[str, Any]:
    """Settings as files and fingerprints state them.

    Without those that came later and change no result: runs from before go on, and their encoders, written again, stay
    the same files to the byte, so that features made with them stay valid.
    """
    mapping = to_mapping(settings)
    del mapping["targets_mib"]
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
