"""The table of encoders for docs/encoders.md, with what a pass of each costs as a distillation's teacher.

    python benchmarks/encoder_table.py

Hours are projected, not measured: multiplications of a pass are counted, and set against the measured rate of a ViT-B
on one H100 (docs/encoders.md, "Speed"); reading tiles bounds what is left. No weights are
needed: networks are built without.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from wsi_pipe.encoders.architectures import build
from wsi_pipe.encoders.recipe import Preprocessing, Recipe
from wsi_pipe.encoders.registry import load_registry

VIT_B_RATE = 8634.0
"""Tiles a second of vit_base_patch16_224 alone, bfloat16, measured on one H100."""
READING_RATE = 5310.0
"""Tiles a second that reading gave that run."""


OTHERS = {"resnet50": 4.1e9, "ctranspath": 4.5e9}
"""Multiplications of one image of 224 px of what is no plain ViT: those of ResNet50 and of Swin-T, by timm's cards."""


def operations(recipe: Recipe) -> float:
    """Multiplications of one image: each weight once a token, and the products of queries, keys and values."""
    side = recipe.preprocessing.input_px or 224
    if recipe.architecture in OTHERS:
        return OTHERS[recipe.architecture] * (side / 224) ** 2
    with torch.device("meta"):
        network: Any = build(recipe, name=recipe.architecture)
    weights = sum(weight.numel() for weight in network.parameters())
    vit = getattr(network.trunk, "trunk", network.trunk)
    tokens = (side // vit.patch_embed.patch_size[0]) ** 2 + 1
    return float(weights * tokens + 2 * len(vit.blocks) * tokens**2 * vit.embed_dim)


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--slides", type=int, default=1000, help="slides of the projection")
    parser.add_argument("--tiles", type=int, default=15000, help="tiles of a slide at 20x")
    given = parser.parse_args()
    half = (0.5, 0.5, 0.5)
    known = operations(Recipe("vit_base_patch16_224", 768, Preprocessing(224, half, half), "cls"))
    print("| name | M parameters | features | input px | um/px | licence | gated | checked | hours as a teacher |")
    print("|---|---|---|---|---|---|---|---|---|")
    for entry in load_registry().values():
        rate = min(READING_RATE, VIT_B_RATE * known / operations(entry.recipe))
        hours = given.slides * given.tiles / rate / 3600
        found = entry.mpp_range
        mpp = "not stated" if found is None else "-".join(dict.fromkeys(f"{value:g}" for value in found))
        cells = [
            f"`{entry.name}`", entry.parameters, entry.dim, entry.input_px, mpp, entry.licence,
            "yes" if entry.gated else "no", "yes" if entry.verified else "unverified", f"{hours:.1f}",
        ]  # fmt: skip
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
