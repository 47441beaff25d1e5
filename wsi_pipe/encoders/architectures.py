"""Networks from recipes: timm models, what timm lacks, and one way to pool and to look inside them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wsi_pipe.encoders.arguments import check_arguments
from wsi_pipe.encoders.pathology import BUILDERS
from wsi_pipe.encoders.recipe import INTERPOLATIONS, Preprocessing, Recipe
from wsi_pipe.errors import ConfigError, UnknownEncoderError, WsiPipeError

__all__ = ["PooledNetwork", "build", "build_unfilled", "timm_recipe"]


class PooledNetwork(nn.Module):
    """A trunk with the pooling that turns its output into one feature per image.

    ``forward`` takes normalised images (B, 3, S, S) and gives (B, D). ``forward_layers`` gives the tokens of chosen
    blocks in the same pass. ``depth`` is the number of blocks that can be asked for, 0 where the trunk has none.
    """

    def __init__(self, trunk: nn.Module, pooling: str) -> None:
        super().__init__()
        # timm's networks share methods that nn.Module's type does not know.
        self.trunk: Any = trunk
        self.pooling = pooling
        self.prefix_tokens = int(getattr(trunk, "num_prefix_tokens", 0))
        # EfficientNets call their stages blocks too, but have no CLS to take from them.
        blocks = getattr(trunk, "blocks", ()) if self.prefix_tokens and hasattr(trunk, "forward_intermediates") else ()
        self.depth = len(blocks)
        if pooling in ("cls", "cls+mean") and self.prefix_tokens == 0:
            raise ConfigError(f"pooling {pooling!r} needs a network with a CLS token")

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, D) of normalised images (B, 3, S, S)."""
        if self.pooling == "model":
            out: Tensor = self.trunk(images)
            return out
        return self.pool(self.trunk.forward_features(images))

    def pool(self, tokens: Tensor) -> Tensor:
        """One feature (B, D) per image from the trunk's final tokens (B, N, C)."""
        if self.pooling == "model":
            pooled: Tensor = self.trunk.forward_head(tokens, pre_logits=True)
            return pooled
        cls, patches = tokens[:, 0], tokens[:, self.prefix_tokens :]
        if self.pooling == "cls":
            return cls
        mean = patches.mean(1)
        return mean if self.pooling == "mean" else torch.cat([cls, mean], dim=-1)

    def forward_layers(self, images: Tensor, blocks: Sequence[int]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Features (B, D), and for each block number in ``blocks`` its CLS (B, C) and patch tokens (B, h, w, C).

        Tokens are a block's output as it is, before the network's final norm. Block numbers count from 0.
        """
        wanted = sorted(set(blocks))
        final, intermediates = self.trunk.forward_intermediates(
            images, indices=wanted, return_prefix_tokens=True, norm=False, output_fmt="NCHW"
        )
        by_block = {
            block: (prefix[:, 0], patches.permute(0, 2, 3, 1))
            for block, (patches, prefix) in zip(wanted, intermediates, strict=True)
        }
        return self.pool(final), [by_block[block] for block in blocks]


def _layer_classes() -> dict[str, type[nn.Module]]:
    # timm does not mark these names as exported, though its documentation uses them from here.
    layers: Any = importlib.import_module("timm.layers")
    found: dict[str, type[nn.Module]] = {
        "GELU": nn.GELU, "SiLU": nn.SiLU, "LayerNorm": nn.LayerNorm, "GluMlp": layers.GluMlp,
        "LayerNorm2d": layers.LayerNorm2d,
        "Mlp": layers.Mlp, "RmsNorm": layers.RmsNorm, "SwiGLU": layers.SwiGLU, "SwiGLUPacked": layers.SwiGLUPacked,
    }  # fmt: skip
    return found


def _timm_args(args: Mapping[str, Any], where: str) -> dict[str, Any]:
    classes = _layer_classes()
    out: dict[str, Any] = {}
    for key, value in args.items():
        if key.endswith("_layer") and isinstance(value, str):
            if value not in classes:
                raise ConfigError(f"{where}: {key} {value!r} is not known", remedy=f"use one of {', '.join(classes)}")
            value = classes[value]
        elif isinstance(value, list):
            value = tuple(value)
        out[key] = value
    return out


def build(recipe: Recipe, *, name: str, input_px: int | None = None, **overrides: Any) -> PooledNetwork:
    """The network of a recipe, its weights as its constructor leaves them, in evaluation mode, on the CPU in float32.

    input_px: another input side than the network's own. overrides go into the architecture's arguments (a smaller
    depth, say). Raises UnknownEncoderError when the architecture does not exist, ConfigError for arguments that it
    does not take or for an input side that it cannot work on.
    """
    args = {**recipe.args, **overrides}
    if input_px is not None and "dynamic_img_size" not in args:
        try:
            return _build(recipe, {**args, "dynamic_img_size": True}, name)
        except ConfigError:  # a network that takes no such argument; whether it takes another side shows later
            return _build(recipe, args, name)
    return _build(recipe, args, name)


def _build(recipe: Recipe, args: Mapping[str, Any], name: str) -> PooledNetwork:
    def timm_model(architecture: str, arguments: Mapping[str, Any]) -> nn.Module:
        return _build_timm(architecture, arguments, name)

    builder = BUILDERS.get(recipe.architecture)
    try:
        trunk = timm_model(recipe.architecture, args) if builder is None else builder(args, timm_model)
    except KeyError as error:
        raise ConfigError(f"encoder {name}: {recipe.architecture} needs the argument {error}") from error
    network = PooledNetwork(trunk, recipe.pooling).eval()
    return network.requires_grad_(False)


def build_unfilled(recipe: Recipe, *, name: str, input_px: int | None = None) -> PooledNetwork:
    """The network of a recipe, without weights where that works, for ``weights.load_into`` to fill.

    Drawing a ViT-g's initial weights only to overwrite them takes longer than reading its file. Networks with buffers
    that no checkpoint holds, or that cannot be built without data, are built in full.
    """
    try:
        with torch.device("meta"):
            network = build(recipe, name=name, input_px=input_px)
    except RuntimeError as error:
        if isinstance(error, WsiPipeError):
            raise
        return build(recipe, name=name, input_px=input_px)
    held = network.trunk.state_dict()
    if all(buffer in held for buffer, _ in network.trunk.named_buffers()):
        return network
    return build(recipe, name=name, input_px=input_px)


def _build_timm(architecture: str, args: Mapping[str, Any], name: str) -> nn.Module:
    import timm

    if not timm.is_model(architecture):
        near = ", ".join(timm.list_models(f"*{architecture.split('.')[0][:12]}*")[:5])
        raise UnknownEncoderError(
            f"encoder {name}: timm has no model {architecture!r}",
            remedy=f"some that it has: {near}" if near else "timm.list_models() has the list",
        )
    # What code of ours hands over is a class, which no table or file can hold.
    check_arguments({key: value for key, value in args.items() if not isinstance(value, type)}, f"encoder {name}")
    arguments = _timm_args({"num_classes": 0, **args}, name)
    norm_eps = arguments.pop("norm_eps", None)
    try:
        model: nn.Module = timm.create_model(architecture, pretrained=False, **arguments)
    except TypeError as error:
        raise ConfigError(f"encoder {name}: {architecture} does not take these arguments: {error}") from error
    if norm_eps is not None:
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = float(norm_eps)
    return model


def _triple(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return (red, green, blue)


def timm_recipe(model: str) -> tuple[Recipe, dict[str, Any]]:
    """The recipe of a timm model as its own pretrained configuration states it, and the facts around it.

    model: a name, also with a pretrained tag (``resnet50.tv_in1k``). Facts: licence, hub_id, file (on the hub, where
    it is not the usual one), classifier. ViTs take any input side that is a multiple of their patch. Raises
    UnknownEncoderError.
    """
    from timm.models.vision_transformer import VisionTransformer

    # On the meta device nothing is drawn: a ViT-g is described in an instant.
    try:
        with torch.device("meta"):
            network = _build_timm(model, {}, f"timm:{model}")
    except RuntimeError as error:
        if isinstance(error, WsiPipeError):
            raise
        network = _build_timm(model, {}, f"timm:{model}")
    config: dict[str, Any] = getattr(network, "pretrained_cfg", {})
    interpolation = config.get("interpolation", "bilinear")
    preprocessing = Preprocessing(
        int(config.get("input_size", (3, 224, 224))[-1]),
        _triple(config["mean"]),
        _triple(config["std"]),
        interpolation if interpolation in INTERPOLATIONS else "bicubic",
    )
    described: Any = network
    dim = int(getattr(described, "head_hidden_size", None) or described.num_features)
    args = {"dynamic_img_size": True} if isinstance(network, VisionTransformer) else {}
    facts = {
        "licence": str(config.get("license") or "unknown"),
        "hub_id": config.get("hf_hub_id") or "",
        "file": config.get("hf_hub_filename") or "",
        "classifier": config.get("classifier"),
    }
    return Recipe(model, dim, preprocessing, "model", args), facts
