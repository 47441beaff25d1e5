"""The key names of image towers of image-text models, brought to those of timm's networks.

What belongs to the text tower keeps its name, so that a table's ``ignore`` says that it is left.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

__all__ = ["TOWER_KEYS"]

State = dict[str, Tensor]

_BLOCK = [
    (r"layer_norm1\.", "norm1."),
    (r"layer_norm2\.", "norm2."),
    (r"self_attn\.out_proj\.", "attn.proj."),
    (r"mlp\.fc1\.", "mlp.fc1."),
    (r"mlp\.fc2\.", "mlp.fc2."),
]


def _renamed(state: State, names: Sequence[tuple[str, str]], trunk: str) -> State:
    """Keys of transformers' vision models as timm's; query, key and value of a block become one matrix."""
    out: State = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        match = re.fullmatch(r"vision_model\.encoder\.layers\.(\d+)\.(.+)", key)
        if match:
            block, rest = match.groups()
            part = re.fullmatch(r"self_attn\.(q|k|v)_proj\.(weight|bias)", rest)
            if part:
                parts.setdefault(f"{trunk}blocks.{block}.attn.qkv.{part[2]}", {})[part[1]] = value
                continue
            for pattern, replacement in _BLOCK:
                rest, count = re.subn(rf"^{pattern}", replacement, rest)
                if count:
                    break
            out[f"{trunk}blocks.{block}.{rest}"] = value
            continue
        for pattern, replacement in names:
            renamed, count = re.subn(pattern, replacement, key)
            if count:
                out[renamed] = value
                break
        else:
            out[key] = value
    for key, found in parts.items():
        if len(found) == 3:  # an incomplete triple stays out, so that loading names it
            out[key] = torch.cat([found["q"], found["k"], found["v"]])
    return out


def _hf_clip_keys(state: State, network: nn.Module) -> State:
    """Keys of transformers' CLIPModel as those of ``ProjectedViT``. Source: transformers, modeling_clip.py."""
    out = _renamed(state, _CLIP, "trunk.")
    # A buffer of earlier versions: 0, 1, 2, ...
    for key in [name for name in out if name.endswith("embeddings.position_ids")]:
        del out[key]
    cls, position = out.get("trunk.cls_token"), out.get("trunk.pos_embed")
    if cls is not None:
        out["trunk.cls_token"] = cls.reshape(1, 1, -1)
    if position is not None:
        out["trunk.pos_embed"] = position[None]
    return out


_CLIP = [
    (r"^vision_model\.embeddings\.class_embedding$", "trunk.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "trunk.pos_embed"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "trunk.patch_embed.proj."),
    # Spelled so in transformers.
    (r"^vision_model\.pre_layrnorm\.", "trunk.norm_pre."),
    (r"^vision_model\.post_layernorm\.", "trunk.norm."),
    (r"^visual_projection\.", "head."),
]


def _hf_siglip_keys(state: State, network: nn.Module) -> State:
    """Keys of transformers' SiglipModel as those of timm's SigLIP ViTs, with their pooling by one query.

    Source: transformers, modeling_siglip.py (SiglipMultiheadAttentionPoolingHead); timm, layers/attention_pool.py.
    """
    out = _renamed(state, _SIGLIP, "")
    position = out.get("pos_embed")
    if position is not None:
        out["pos_embed"] = position[None]
    for kind in ("weight", "bias"):
        packed = out.pop(f"vision_model.head.attention.in_proj_{kind}", None)
        if packed is not None:
            query, rest = packed.tensor_split([len(packed) // 3])
            out[f"attn_pool.q.{kind}"], out[f"attn_pool.kv.{kind}"] = query, rest
    return out


_SIGLIP = [
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^vision_model\.post_layernorm\.", "norm."),
    (r"^vision_model\.head\.probe$", "attn_pool.latent"),
    (r"^vision_model\.head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^vision_model\.head\.layernorm\.", "attn_pool.norm."),
    (r"^vision_model\.head\.mlp\.", "attn_pool.mlp."),
]


def _keep_keys(state: State, network: nn.Module) -> State:
    """Keys of KEEP as those of ``ProjectedViT``: its LayerScale calls ``weight`` what timm calls ``gamma``."""
    out: State = {}
    for key, value in state.items():
        key = re.sub(r"^visual_head\.", "head.", re.sub(r"^visual\.", "trunk.", key))
        out[re.sub(r"\.(ls[12])\.weight$", r".\1.gamma", key)] = value
    return out


TOWER_KEYS: Mapping[str, Callable[[State, nn.Module], State]] = {
    "hf-clip": _hf_clip_keys,
    "hf-siglip": _hf_siglip_keys,
    "keep": _keep_keys,
}
"""As ``weights.KEY_MAPS``."""
