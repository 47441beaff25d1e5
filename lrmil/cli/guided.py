"""``lrmil train --guided-by``: which run of low resolution says what parts of a bag are trained on too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lrmil.cli.options import pack_progress
from wsi_pipe.errors import ConfigError

__all__ = ["guiding_level", "open_guide"]


def _any_model(run: Path) -> Path:
    from lrmil.experiment.figures import fold_folders

    return fold_folders(run)[0] / "model.safetensors"


def guiding_level(run: Path | None) -> str | None:
    """The level of a run, by the model of its first fold; None without a run."""
    from lrmil.checkpoint import read_card

    return None if run is None else read_card(_any_model(run)).level or None


def open_guide(values: Mapping[str, Any], out: Path) -> Any:
    """The guide that the options ask for, its features packed beside the run's, or None."""
    from lrmil.checkpoint import read_card
    from lrmil.experiment.cohort import open_features
    from lrmil.experiment.folds import check_store
    from lrmil.experiment.guided import Guide

    run: Path | None = values["guided_by"]
    if run is None:
        return None
    if (values["bags"] / "store.json").is_file():
        raise ConfigError("--bags is a store of one level", remedy="give the bags: --guided-by needs both resolutions")
    path = _any_model(run)
    card = read_card(path)
    store = open_features(
        values["bags"],
        level=card.level or None,
        encoder=card.encoder or None,
        store_dir=out / "store-lr",
        dtype=values["dtype"],
        allow_random=values["allow_random"],
        weights_sha256=card.weights_sha256,
        progress=pack_progress(),
    )
    check_store(card, store, path)
    return Guide(run, store, values["guided_share"], values["guided_draws"])
