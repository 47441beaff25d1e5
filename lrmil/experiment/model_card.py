"""Model cards that people read: Markdown beside a model's file, and one for a run whose folds answer together.

What they say is what the files say: data, arm, figures, whom the model has seen, what it is for and what it is not.
After Mitchell et al., Model cards for model reporting, 2019.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lrmil.checkpoint import MODEL_NAME, ModelCard, load_whole, read_card
from lrmil.deploy.match import describe
from lrmil.errors import ModelFileError, ModelMismatchError
from lrmil.predictor.ensemble import check_agreement, model_files
from wsi_pipe.files import file_sha256, write_text_atomically

__all__ = ["CARD_NAME", "model_card", "run_card", "write_model_card", "write_run_card"]

CARD_NAME = "model.md"
SHOWN = {
    "auc": "AUC",
    "average_precision": "average precision",
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "brier": "Brier score",
    "ece": "calibration error",
}
PARTS = {"train": "training", "val": "validation", "test": "test"}
WORDS = {"train": "trained on", "val": "stopped or calibrated by", "unlabelled": "distilled from, without labels"}
NOTICE = "For research use. It is not a medical device, and no diagnosis may rest on it."
FEW_CASES = 50

Figures = Mapping[str, Mapping[str, Any]]


def write_model_card(folder: Path) -> None:
    """Write ``model.md`` beside ``folder/model.safetensors``, with the intervals of ``figures.json`` where it is there.

    Nothing is written where there is no model, or it is broken: who asks it is told. Raises OutputError.
    """
    path = folder / MODEL_NAME
    if path.is_file():
        with suppress(ModelFileError):
            write_text_atomically(folder / CARD_NAME, model_card(path, _figures(folder)))


def write_run_card(run: Path) -> None:
    """Write ``model.md`` into a run of several folds; nothing into another folder. Raises OutputError."""
    with suppress(ModelFileError):
        files = model_files(run)
        if len(files) > 1:
            write_text_atomically(run / CARD_NAME, run_card(files))


def model_card(path: Path, figures: Figures | None = None) -> str:
    """The card of a model file as Markdown. figures: of its test slides, name -> value, low, high, reason."""
    _, card, reference = load_whole(path)
    tiles = f"kept: {reference.form}" if reference else "none kept, so no distance can be told"
    parts = [
        f"# {_title(card)}",
        NOTICE,
        "## What it is",
        _table(["", ""], [*_facts(card), ["training tiles' correlation", tiles], ["SHA-256", file_sha256(path)]]),
        "## Data",
        _data(card),
        "## Whom it has seen",
        _seen(card),
        "## Figures",
        _figure_table(card, figures),
        "## Intended use",
        _use(card),
        "## Limits",
        _list(_limits(card, figures)),
    ]
    return "\n\n".join(parts) + "\n"


def run_card(files: Sequence[Path]) -> str:
    """The card of a run's models as Markdown."""
    cards = [read_card(file) for file in files]
    first = cards[0]
    headline = _headline(first)
    names = [file.parent.name for file in files]
    rows = []
    for name, file, card in zip(names, files, cards, strict=True):
        found = _figures(file.parent)
        own = found.get(headline) if found else None
        shown = _interval(own) if own else _number(card.metrics.get(f"test_{headline}", math.nan))
        part = card.data.get("train", {})
        rows.append([f"[{name}]({name}/{CARD_NAME})", card.model.name, str(part.get("slides", "")), shown])
    try:
        check_agreement(list(zip(names, cards, strict=True)))
        use = (
            f"`lrmil predict --model` with this folder asks the {len(files)} models together: the mean of their "
            "calibrated probabilities, with their disagreement. Each saw cases that others were tested on, so that "
            "together they can be judged on new cases alone: the figures above are those of single models."
        )
    except ModelMismatchError as error:
        use = f"These models cannot answer together: {error.message}. Give the file of one."
    parts = [
        f"# {len(files)} models that {_task(first)}",
        NOTICE,
        _table(["fold", "architecture", "training slides", f"test {SHOWN.get(headline, headline)}"], rows),
        "## Intended use",
        use,
        "## Limits",
        "As each model's card says.",
    ]
    return "\n\n".join(parts) + "\n"


def _title(card: ModelCard) -> str:
    return f"Model of {card.fold or 'one training'}: {card.model.name}, to {_task(card)}"


def _task(card: ModelCard) -> str:
    """What it is for, after "to"."""
    if not card.target_state:
        return f"tell {_classes(card)} apart"
    target = card.target
    return f"predict {target.name or 'several targets'} ({target.kind})"


def _headline(card: ModelCard) -> str:
    """The name of the figure that is shown where there is room for one."""
    return card.target.headline if card.target_state else "auc"


def _classes(card: ModelCard) -> str:
    return f"{', '.join(card.classes[:-1])} and {card.classes[-1]}"


def _facts(card: ModelCard) -> list[list[str]]:
    members = f", {card.model.members} networks averaged" if card.model.members > 1 else ""
    linear = f", {card.model.linear_share:g} of a linear model" if card.model.linear_share else ""
    facts = [
        ["architecture", f"{card.model.name}{members}{linear}"],
        ["reads", f"{describe(card)}, {card.model.in_dim} features a tile"],
        ["resolution", f"{card.mpp:g} um/px" if card.mpp is not None else "not stated"],
        ["classes", ", ".join(card.classes)],
        ["arm", _arm(card)],
        ["calibration", card.calibration or "none"],
        ["made", f"{card.created_utc or 'at an unknown time'}, lrmil {card.lrmil_version or 'unknown'}"],
    ]
    return [*facts, ["chosen inside the training cases", str(card.choice["said"])]] if card.choice else facts


def _arm(card: ModelCard) -> str:
    """What it learned from."""
    if not card.teacher:
        return "labels alone, without a teacher"
    loss = card.training.get("loss", {})
    weights = ", ".join(f"{name} {loss[name]:g}" for name in ("ce", "bag", "soft", "hard") if name in loss)
    sha = str(card.teacher.get("sha256", ""))[:12]
    return f"labels and a teacher, {card.teacher.get('model', 'unknown')} ({sha}); weights of the loss: {weights}"


def _data(card: ModelCard) -> str:
    if not card.data:
        return "The file does not say: it was made by an earlier version."
    classes = () if card.target_state else card.classes
    header = ["part", "slides", "cases", "tiles", *classes]
    rows = []
    for part, name in PARTS.items():
        own = card.data.get(part, {})
        counts = [str(own.get("classes", {}).get(c, "")) for c in classes]
        rows.append([name, *(str(own.get(key, "")) for key in ("slides", "cases", "tiles")), *counts])
    return _table(header, rows)


def _seen(card: ModelCard) -> str:
    if not card.seen:
        return "The file does not say, so `lrmil` believes no figure of it on any slides."
    lines = [
        f"{WORDS[part]}: {len(card.seen.cases.get(part, ()))} cases, {len(card.seen.slides.get(part, ()))} slides"
        for part in WORDS
        if card.seen.cases.get(part) or card.seen.slides.get(part)
    ]
    allowed = [f"let pass by the user: {text}" for text in card.allowed]
    return "The file holds a mark of each, no names; `lrmil` refuses to judge it on any of them.\n\n" + _list(
        [*lines, *allowed]
    )


def _figure_table(card: ModelCard, figures: Figures | None) -> str:
    test = card.data.get("test", {}) if card.data else {}
    if figures is None and not any(name.startswith("test_") for name in card.metrics):
        return "None: there are no test cases."
    rows = []
    shown = SHOWN if not card.target_state else {name: name for name in figures or _test_names(card)}
    for name, words in shown.items():
        found = figures.get(name) if figures else None
        of_test = _interval(found) if found else _number(card.metrics.get(f"test_{name}", math.nan))
        rows.append([words, of_test, _number(card.metrics.get(f"val_{name}", math.nan))])
    interval = "with 95 % intervals by case" if figures else "`lrmil evaluate` adds intervals"
    note = (
        f"Of {test.get('slides', 'the')} test slides, {interval}. The validation slides chose the epoch or the "
        "calibration, so their figures flatter."
    )
    return f"{_table(['figure', 'test', 'validation'], rows)}\n\n{note}"


def _test_names(card: ModelCard) -> list[str]:
    return [name.removeprefix("test_") for name in card.metrics if name.startswith("test_")]


def _use(card: ModelCard) -> str:
    return (
        f"To {_task(card)} on slides of the kind of its training slides: the same stain, tissue and "
        f"question, read as {describe(card)}. `lrmil predict --model {MODEL_NAME}` reads slides so, refuses features "
        "of another kind, and says how far each slide lies from the training tiles. Before use elsewhere, judge it "
        f"there: `lrmil evaluate --model {MODEL_NAME} --bags BAGS --labels CSV -o DIR`."
    )


def _limits(card: ModelCard, figures: Figures | None) -> Iterable[str]:
    if card.weights == "random":
        yield "**The features were made with random weights: nothing that it says means anything.**"
    if not card.target_state:
        yield "Probabilities hold where classes are as frequent as in its validation slides; elsewhere they are off."
    data = card.data or {}
    cases = data.get("test", {}).get("cases")
    if cases is not None and cases < FEW_CASES:
        yield f"The test figures rest on {cases} cases: the intervals say how little that tells."
    if data and data.get("val", {}).get("cases", 0) < FEW_CASES:
        yield f"{data['val']['cases']} validation cases: calibration and thresholds of abstention are rough."
    auc = figures.get("auc") if figures else None
    if auc and auc.get("low") is not None and auc["low"] <= 0.5:
        yield "The interval of its AUC holds 0.5: it has not been shown to be better than chance."
    if card.sites:
        yield f"Sites: {json.dumps(card.sites, sort_keys=True)}"
    else:
        yield "Sites of the cases are not known to it: it may tell hospitals apart instead of classes."
    yield "Distances from the training tiles tell other scanners and stains; not a rare disease that looks familiar."


def _figures(folder: Path) -> Figures | None:
    try:
        found = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
        return dict(found["estimates"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _interval(e: Mapping[str, Any]) -> str:
    value, low, high = e.get("value"), e.get("low"), e.get("high")
    if value is None:
        return str(e.get("reason") or "undefined")
    return f"{value:.3f} ({low:.3f} to {high:.3f})" if low is not None and high is not None else f"{value:.3f}"


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in lines
    )


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
