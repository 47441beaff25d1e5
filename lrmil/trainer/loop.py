"""The one training loop; what a step is, is given to it."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrmil.config import TrainSettings
from lrmil.data import batches, plan_batches
from lrmil.errors import DivergedError, SettingsError
from lrmil.model import MILModel
from lrmil.splits import FoldIndices
from lrmil.store import ResidentStore
from lrmil.targets import Classification, Target
from lrmil.trainer.compute import bag_logits, rounding
from lrmil.trainer.optimise import AdamW, learning_rate, make_optimizer, set_learning_rate
from lrmil.trainer.state import Progress, load_state, save_state
from lrmil.trainer.steps import Step, WholeStep
from wsi_pipe.errors import ConfigError
from wsi_pipe.files import write_text_atomically

__all__ = ["HISTORY_NAME", "STATE_NAME", "Run", "fit", "write_history"]

STATE_NAME = "state.safetensors"
HISTORY_NAME = "metrics.csv"
EpochFigures = Mapping[str, float | None]


@dataclass(frozen=True)
class Run:
    """What a run works on. out_dir: None keeps everything in memory. fingerprint: of all that decides its numbers.

    labels: int64 (bags,) classes, or float (bags, W) of another target. target: with the constants of the training
    bags; none is classes of equal weight, as many as the model has.
    """

    store: ResidentStore
    labels: NDArray[Any]
    split: FoldIndices
    settings: TrainSettings
    precision: torch.dtype
    out_dir: Path | None = None
    fingerprint: str = ""
    progress: Callable[[EpochFigures], object] | None = None
    target: Target | None = None

    @property
    def goal(self) -> Target:
        """The target, or classes of equal weight."""
        return self.target or Classification(classes=tuple(map(str, range(self.settings.model.classes))))


def fit(model: MILModel, step: Step, run: Run) -> Progress:
    """Train until the last epoch or early stopping, and leave the best weights in ``model``.

    The best epoch is the one with the best monitored figure of the validation bags; without validation bags it is the
    last. A state found in ``run.out_dir`` is continued.

    Raises DivergedError when the loss is not finite; SettingsError when the monitored figure is undefined on the
    validation bags; ResumeError when the folder holds the state of another run.
    """
    settings, device = run.settings, run.store.device
    optimizer = make_optimizer(model, settings)
    state = None if run.out_dir is None else run.out_dir / STATE_NAME
    progress = Progress()
    if state is not None and state.exists():
        progress = load_state(state, model, optimizer, run.fingerprint, device)
    with _writer(run, progress.epoch) as writer:
        while not progress.finished:
            epoch = progress.epoch + 1
            row: dict[str, float | None] = {"epoch": epoch, **_train_epoch(model, step, optimizer, run, epoch)}
            row |= _validate(model, run)
            progress.history.append(row)
            progress.epoch = epoch
            _keep_best(model, progress, row, run)
            progress.finished = epoch >= settings.epochs or _is_stale(progress, settings)
            if run.out_dir is not None:
                write_history(run.out_dir / HISTORY_NAME, progress.history)
                if settings.save_every and (epoch % settings.save_every == 0 or progress.finished):
                    assert state is not None
                    save_state(state, model, optimizer, progress, run.fingerprint, device)
            if writer is not None:
                for name, value in row.items():
                    if name != "epoch" and value is not None:
                        writer.add_scalar(name.replace("_", "/", 1), value, epoch)
            if run.progress is not None:
                run.progress(row)
    if progress.best_weights:
        model.load_state_dict(progress.best_weights)
    return progress


def _train_epoch(model: MILModel, step: Step, optimizer: AdamW, run: Run, epoch: int) -> dict[str, float | None]:
    settings, store, train = run.settings, run.store, run.split.train
    model.train()
    # The order is a function of seed and epoch alone, so resuming needs no state of a shuffler.
    order_seed = int(np.random.SeedSequence([settings.seed, epoch]).generate_state(1)[0])
    size: dict[str, Any] = {"token_budget": settings.token_budget, "max_bags": settings.max_bags}
    if isinstance(step, WholeStep):
        budget = settings.token_budget
        step.begin(bag_logits(model, store, train, token_budget=budget, precision=run.precision), store.device)
    steps = len(plan_batches(store.lengths, train, shuffle_seed=order_seed, **size))
    sums: dict[str, Tensor] = {}
    for i, batch in enumerate(batches(store, run.labels, train, shuffle_seed=order_seed, **size)):
        set_learning_rate(optimizer, learning_rate(settings, epoch - 1 + (i + 0.5) / steps))
        optimizer.zero_grad(set_to_none=True)
        with rounding(store.device, run.precision):
            loss = step(model, batch)
        loss.total.backward()  # type: ignore[no-untyped-call]
        if settings.clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        # Summed on the device: reading a value at every step would make a GPU wait.
        bags = len(batch.labels)
        for name, value in {"loss": loss.total.detach(), **loss.terms}.items():
            sums[name] = sums.get(name, 0.0) + value * bags
    means = {f"train_{name}": float(value) / len(train) for name, value in sums.items()}
    if not math.isfinite(means["train_loss"]):
        raise DivergedError(
            f"the training loss of epoch {epoch} is {means['train_loss']}",
            remedy="lower the learning rate, or look for NaN in the features with lrmil pack",
        )
    return {"learning_rate": learning_rate(settings, epoch), **means}


def _validate(model: MILModel, run: Run) -> dict[str, float | None]:
    val = run.split.val
    if not len(val):
        return {}
    logits = bag_logits(model, run.store, val, token_budget=run.settings.token_budget, precision=run.precision)
    found = run.goal.validation(run.labels[val], logits.double().numpy())
    return {f"val_{name}": value if math.isfinite(value) else None for name, value in found.items()}


def _keep_best(model: MILModel, progress: Progress, row: EpochFigures, run: Run) -> None:
    if not len(run.split.val):
        progress.best_epoch = progress.epoch
        return
    monitor = run.settings.monitor
    if f"val_{monitor}" not in row:
        known = ", ".join(name.removeprefix("val_") for name in row if name.startswith("val_"))
        raise SettingsError(f"{monitor} is no figure of this target", remedy=f"monitor one of {known}")
    value = row[f"val_{monitor}"]
    if value is None:
        raise SettingsError(
            f"{monitor} is undefined on the validation bags, so it cannot be monitored",
            remedy="monitor the loss, or make splits with every class (or an event) among the validation cases",
        )
    sign = 1.0 if monitor.rpartition(".")[2] in run.goal.lower_is_better else -1.0
    if progress.best_value is None or sign * value < sign * progress.best_value:
        progress.best_value, progress.best_epoch = value, progress.epoch
        progress.best_weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _is_stale(progress: Progress, settings: TrainSettings) -> bool:
    waited = progress.epoch - progress.best_epoch
    return bool(settings.patience) and waited >= settings.patience and progress.epoch >= settings.min_epochs


def write_history(path: Path, history: Sequence[EpochFigures]) -> None:
    """Write the figures of every epoch as CSV. Raises OutputError when it cannot be written."""
    out = io.StringIO()
    # A run that an earlier version began may lack figures in its first epochs.
    names = list(dict.fromkeys(name for row in history for name in row))
    writer = csv.DictWriter(out, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: "" if value is None else value for name, value in row.items()} for row in history)
    write_text_atomically(path, out.getvalue())


def _writer(run: Run, epoch: int) -> AbstractContextManager[Any]:
    if not run.settings.tensorboard or run.out_dir is None:
        return nullcontext()
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("tensorboard is not installed", remedy="pip install 'wsi-pipe[tensorboard]'") from error
    # What an interrupted run wrote after its last saved state is taken back.
    writer: AbstractContextManager[Any] = SummaryWriter(os.fspath(run.out_dir / "tensorboard"), purge_step=epoch + 1)
    return writer
