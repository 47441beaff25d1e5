"""Checkpoints: read without ever unpickling, brought to a network's own key names, loaded strictly."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsi_pipe.encoders.tower_keys import TOWER_KEYS
from wsi_pipe.errors import WeightsError
from wsi_pipe.files import file_sha256

__all__ = ["KEY_MAPS", "State", "file_sha256", "load_into", "read_state", "without_prefix"]

State = dict[str, Tensor]

NESTED = ("state_dict", "model", "teacher", "module")
"""Keys under which training programs put the weights, tried in turn."""


def read_state(path: Path, nested: str | None = None) -> State:
    """The tensors of a ``.safetensors`` file or of a ``.pt``, ``.pth`` or ``.bin`` file, by key.

    nested: the key under which a pickled file holds them; by default the usual ones are tried. Pickled files are
    read with ``weights_only``, which builds nothing but tensors and plain containers. Raises WeightsError when the
    file is missing, damaged, or holds anything else.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such file", remedy="give the path of a checkpoint")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(path))
        except (SafetensorError, OSError, ValueError) as error:
            raise WeightsError(
                f"{path} is not a valid safetensors file: {error}", remedy="download it again"
            ) from error
    try:
        raw: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # unpickling raises what it likes
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"{path} cannot be read safely: {first}",
            remedy="it is damaged or holds code; save its state dict alone, best as safetensors",
        ) from error
    for key in [nested] if nested else NESTED:
        if isinstance(raw, Mapping) and isinstance(raw.get(key), Mapping):
            raw = raw[key]
    if not isinstance(raw, Mapping) or not raw or not all(isinstance(value, Tensor) for value in raw.values()):
        raise WeightsError(f"{path} holds no weights by name", remedy="save the network's state dict")
    return {str(key): value for key, value in raw.items()}


def without_prefix(state: State, prefix: str) -> State:
    """The entries whose keys begin with ``prefix``, without it."""
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def load_into(network: nn.Module, state: State, name: str, source: str, *, ignore: Iterable[str] = ()) -> None:
    """Load ``state`` into ``network``, every key and shape of both matched; a network on the meta device is filled.

    ignore: patterns (whole keys) of surplus entries that are known to be of no use, such as a classifier's head.
    Raises WeightsError that names the first missing, surplus and misshapen keys.
    """
    own = network.state_dict()
    dropped = [re.compile(pattern) for pattern in ignore]
    surplus = [key for key in state if key not in own and not any(p.fullmatch(key) for p in dropped)]
    missing = [key for key in own if key not in state]
    shapes = [
        f"{key} is {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} keys are missing: {_few(missing)}")
    if surplus:
        problems.append(f"{len(surplus)} keys belong to nothing: {_few(surplus)}")
    if shapes:
        problems.append(f"{len(shapes)} shapes differ: {_few(shapes)}")
    if problems:
        raise WeightsError(
            f"{source} does not fit encoder {name}: {'; '.join(problems)}",
            remedy="check that the file belongs to this encoder and is complete",
        )
    if any(parameter.is_meta for parameter in network.parameters()):
        # Nothing to copy into: the tensors become the network's own, in its number formats.
        filled = {key: state[key].to(value.dtype) for key, value in own.items()}
        network.load_state_dict(filled, strict=True, assign=True)
        network.requires_grad_(False)
    else:
        network.load_state_dict({key: state[key] for key in own}, strict=True)


def _few(items: list[str], limit: int = 8) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def timm_keys(state: State, trunk: nn.Module) -> State:
    """Keys as timm's own conversion for the trunk's kind of network makes them (old names, other grids, heads)."""
    convert = getattr(sys.modules[type(trunk).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return state
    converted: State = dict(convert(dict(state), trunk))
    return converted


def _hf_vit_keys(state: State, trunk: nn.Module) -> State:
    """timm's key names for weights saved by transformers' ViTModel, Dinov2Model and Dinov2WithRegistersModel.

    Query, key and value become one matrix. Where the trunk's position embedding leaves out the CLS token (timm's
    networks with registers), the CLS position is added to the CLS token instead, which computes the same.
    """
    out: State = {}
    qkv: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        key = re.sub(r"^(vit|dinov2|dinov2_with_registers|model)\.", "", key)
        match = re.fullmatch(r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(weight|bias)", key)
        if match:
            block, part, kind = match.groups()
            qkv.setdefault(f"blocks.{block}.attn.qkv.{kind}", {})[part] = value
            continue
        for pattern, replacement in _HF_VIT:
            renamed, count = re.subn(pattern, replacement, key)
            if count:
                out[renamed] = value
                break
        else:
            out[key] = value
    for key, parts in qkv.items():
        if len(parts) == 3:  # an incomplete triple stays out, so that loading names it
            out[key] = torch.cat([parts["query"], parts["key"], parts["value"]])
    for key in ("mask_token", "pooler.dense.weight", "pooler.dense.bias"):
        out.pop(key, None)
    return _fit_position(out, trunk)


_HF_VIT = [
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.mask_token$", "mask_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"blocks.\1.attn.proj."),
    (r"^encoder\.layer\.(\d+)\.(?:norm1|layernorm_before)\.", r"blocks.\1.norm1."),
    (r"^encoder\.layer\.(\d+)\.(?:norm2|layernorm_after)\.", r"blocks.\1.norm2."),
    (r"^encoder\.layer\.(\d+)\.layer_scale1\.lambda1$", r"blocks.\1.ls1.gamma"),
    (r"^encoder\.layer\.(\d+)\.layer_scale2\.lambda1$", r"blocks.\1.ls2.gamma"),
    (r"^encoder\.layer\.(\d+)\.(?:mlp\.fc1|mlp\.weights_in|intermediate\.dense)\.", r"blocks.\1.mlp.fc1."),
    (r"^encoder\.layer\.(\d+)\.(?:mlp\.fc2|mlp\.weights_out|output\.dense)\.", r"blocks.\1.mlp.fc2."),
    (r"^layernorm\.", "norm."),
]


def _fit_position(state: State, trunk: nn.Module) -> State:
    """Bring a position embedding that begins with CLS to the trunk's form and grid.

    Another grid is interpolated as transformers does it: bicubic, in float32, without antialiasing.
    """
    own = getattr(trunk, "pos_embed", None)
    given = state.get("pos_embed")
    if not isinstance(own, Tensor) or given is None or given.ndim != 3:
        return state
    cls, grid = given[:, :1], given[:, 1:]
    bare = bool(getattr(trunk, "no_embed_class", False))
    old, new = math.isqrt(grid.shape[1]), math.isqrt(own.shape[1] - (0 if bare else 1))
    if old != new and old * old == grid.shape[1]:
        square = grid.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
        square = F.interpolate(square, (new, new), mode="bicubic", align_corners=False)
        grid = square.permute(0, 2, 3, 1).flatten(1, 2)
    if not bare:
        state["pos_embed"] = torch.cat([cls, grid], dim=1)
    elif "cls_token" in state:
        state["cls_token"] = state["cls_token"] + cls
        state["pos_embed"] = grid
    return state


KEY_MAPS: Mapping[str, Callable[[State, nn.Module], State]] = {
    "timm": timm_keys, "hf-vit": _hf_vit_keys, **TOWER_KEYS,
}  # fmt: skip
"""How a checkpoint's key names become the network's, by the name that the registry's table uses."""
