"""A network that is built and held to what its recipe states, with random weights where no others are wanted."""

from __future__ import annotations

import hashlib

import torch

from wsi_pipe.encoders.architectures import PooledNetwork, build
from wsi_pipe.encoders.recipe import Recipe
from wsi_pipe.errors import ConfigError, WeightsError, WsiPipeError

__all__ = ["build_random", "check_dimension"]


def check_dimension(network: PooledNetwork, recipe: Recipe, name: str, source: str) -> None:
    """Raise WeightsError when the network gives features of another dimension than its recipe says.

    Raises ConfigError when it cannot work on the input side of its recipe.
    """
    side = recipe.preprocessing.input_px or 224
    try:
        with torch.inference_mode():
            dim = network(torch.zeros(1, 3, side, side)).shape[-1]
    except WsiPipeError:
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"encoder {name} cannot work on images of {side} px: {first}",
            remedy="give an input side that its architecture takes, such as a multiple of its patch",
        ) from error
    if dim != recipe.dim:
        raise WeightsError(
            f"encoder {name} with {source} gives {dim} features, not the {recipe.dim} that are stated",
            remedy="correct dim, pooling or args in the encoder's table, or give the right file",
        )


def build_random(recipe: Recipe, name: str, *, input_px: int | None = None) -> PooledNetwork:
    """The network with weights drawn from a seed that is made of the name: the same in every process."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build(recipe, name=name, input_px=input_px)
    check_dimension(network, recipe, name, "random weights")
    return network
