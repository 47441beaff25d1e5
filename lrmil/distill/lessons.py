"""What is learned: slides with a teacher's targets, out of their bags or made now."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from lrmil.distill.jitter import jittered_slides
from lrmil.distill.request import DistillRequest
from lrmil.distill.selection import Selection, inner_split
from lrmil.distill.shelf import Shelf
from lrmil.distill.targets import DistillSlide, TargetItem, compute_targets, load_slide
from lrmil.distill.teachers import Teacher
from lrmil.errors import SettingsError
from wsi_pipe.bag import BagAttrs, read_grids
from wsi_pipe.errors import BagError
from wsi_pipe.masking import MASK
from wsi_pipe.slides import open_slide

__all__ = ["taught_slides"]


def taught_slides(
    request: DistillRequest,
    selection: Selection,
    teacher: Teacher,
    shelf: Shelf,
    say: Callable[[str], object],
) -> tuple[list[DistillSlide], list[DistillSlide]]:
    """Training slides, further grids of them included, and validation slides, with a teacher's targets.

    Which slides, tiles and grids does not depend on the teacher: several go together place by place.
    """
    settings, bags = request.settings, selection.bags
    files: dict[str, Path] = {}
    name = teacher.encoder.info.name
    if request.compute:
        say(f"teacher {name} over the tiles at {request.hr} of {len(bags)} slides")
        items = [_target(request, bag, attrs) for bag, attrs in bags.items()]
        made = compute_targets(items, teacher.encoder, teacher.layers, teacher.folder)
        files = {bag.stem: made[bag.stem, request.hr] for bag in bags}
    loaded = {bag: _load(request, teacher, bag, attrs, files, shelf) for bag, attrs in bags.items()}
    places = {slide.slide_id: bag for bag, slide in loaded.items() if slide is not None}
    slides = [slide for slide in loaded.values() if slide is not None]
    if not slides:
        raise SettingsError("no training slide has an LR tile with children", remedy="check splits and resolutions")
    train, val = inner_split(slides, settings)
    if settings.jitters:
        say(f"teacher {name} over {settings.jitters} more grids of {len(train)} slides")
        train += jittered_slides(
            train,
            [places[slide.slide_id] for slide in train],
            settings.jitters,
            hr_label=request.hr,
            teacher=teacher.encoder,
            layers=teacher.layers,
            folder=teacher.folder,
            seed=settings.seed,
            shelf=shelf,
        )
    return train, val


def _load(
    request: DistillRequest,
    teacher: Teacher,
    bag: Path,
    attrs: BagAttrs,
    files: Mapping[str, Path],
    shelf: Shelf,
) -> DistillSlide | None:
    slide = load_slide(
        bag,
        _slide_file(request, bag, attrs),
        request.lr,
        request.hr,
        teacher.encoder.info.name,
        teacher.layers,
        teacher.depth,
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
