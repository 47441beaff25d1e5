"""What is learned: slides with the teacher's targets, weighed by a MIL teacher's attention where one is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lrmil.checkpoint import load_model
from lrmil.distill.jitter import jittered_slides
from lrmil.distill.request import DistillRequest
from lrmil.distill.selection import Selection, inner_split
from lrmil.distill.settings import DistillSettings
from lrmil.distill.shelf import Shelf
from lrmil.distill.targets import DistillSlide, TargetItem, attention_weights, compute_targets, load_slide
from lrmil.errors import BagMismatchError, SettingsError
from lrmil.leaks import check_model
from wsi_pipe.bag import BagAttrs, read_grids
from wsi_pipe.encoders.base import Encoder, LayeredEncoder, block_indices
from wsi_pipe.errors import BagError
from wsi_pipe.masking import MASK
from wsi_pipe.slides import open_slide

__all__ = ["taught_slides", "teacher_layers", "weighted"]


def taught_slides(
    request: DistillRequest,
    selection: Selection,
    teacher: Encoder,
    layers: Sequence[int],
    depth: int,
    shelf: Shelf,
    say: Callable[[str], object],
) -> tuple[list[DistillSlide], list[DistillSlide]]:
    """Training slides, further grids of them included, and validation slides, with the teacher's targets."""
    settings, bags = request.settings, selection.bags
    files: dict[str, Path] = {}
    folder = request.targets_dir or request.out.parent / f"{request.out.stem}.targets"
    if request.compute:
        say(f"teacher {teacher.info.name} over the tiles at {request.hr} of {len(bags)} slides")
        made = compute_targets([_target(request, bag, attrs) for bag, attrs in bags.items()], teacher, layers, folder)
        files = {bag.stem: made[bag.stem, request.hr] for bag in bags}
    loaded = {
        bag: _load(request, teacher.info.name, bag, attrs, layers, depth, files, shelf) for bag, attrs in bags.items()
    }
    places = {slide.slide_id: bag for bag, slide in loaded.items() if slide is not None}
    slides = [slide for slide in loaded.values() if slide is not None]
    if not slides:
        raise SettingsError("no training slide has an LR tile with children", remedy="check splits and resolutions")
    train, val = inner_split(slides, settings)
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


def teacher_layers(teacher: Encoder, settings: DistillSettings) -> tuple[tuple[int, ...], int]:
    """Blocks of the teacher counted from 0, and its depth; none for a teacher without blocks."""
    depth = teacher.depth if isinstance(teacher, LayeredEncoder) else 0
    if not depth or not settings.layers:
        return (), depth
    return tuple(dict.fromkeys(block_indices(settings.layers, depth, teacher.info.name))), depth


def _load(
    request: DistillRequest,
    encoder: str,
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
        encoder,
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


def weighted(
    slides: Sequence[DistillSlide],
    request: DistillRequest,
    teacher: Encoder,
    selection: Selection,
) -> list[DistillSlide]:
    """Slides whose children weigh as a MIL teacher of the same fold attends to them.

    Raises LeakageError when the teacher saw a case of the fold's test part, or may have, BagMismatchError when it is
    one of other features, SettingsError when it has no attention.
    """
    assert request.mil_teacher is not None
    model, card = load_model(request.mil_teacher)
    path = request.mil_teacher
    wanted = {"fold": selection.name, "level": request.hr, "encoder": teacher.info.name}
    found = {"fold": card.fold, "level": card.level, "encoder": card.encoder}
    for name, value in wanted.items():
        if found[name] and found[name] != value:
            raise BagMismatchError(
                f"{path}: is a model of {name} {found[name]}, not of {value}",
                remedy="give the HR teacher that was trained on this very fold",
            )
    if card.weights_sha256 and card.weights_sha256 != teacher.info.weights_sha256:
        raise BagMismatchError(
            f"{path}: was trained on features of other weights of {card.encoder} than the teacher's",
            remedy="train it on these bags, or give the teacher that made its features",
        )
    check_model(
        card,
        path,
        selection.held_out,
        what="MIL teacher",
        remedy="give the HR teacher that lrmil train made of this very fold, with the same splits",
        splits=None if request.splits is None else (request.splits, selection.name),
        identities=selection.identities,
    )
    heavier = []
    with torch.inference_mode():
        for slide in slides:
            features = torch.from_numpy(np.array(slide.final, np.float32))
            output = model(features, torch.tensor([0, len(features)]))
            if output.attention_logits is None:
                raise SettingsError(f"{path}: has no attention per tile", remedy="give an attention model")
            attention = output.attention_logits.float().softmax(0).numpy()
            heavier.append(dataclasses.replace(slide, weights=attention_weights(slide.children, attention)))
    return heavier
