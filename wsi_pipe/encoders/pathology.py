"""Pathology networks that timm lacks: CTransPath's convolutional stem, and CONCH's attention-pooled ViTs.

Module names follow the published checkpoints, so that their keys fit without a map.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["BUILDERS", "AttentionPool", "AttentionPooledViT", "ConvStem", "LinearAttentionPool", "ProjectedViT"]

TimmBuilder = Callable[[str, Mapping[str, Any]], nn.Module]


class ConvStem(nn.Module):
    """Swin's patch embedding as three convolutions: 4 px per token, channels-last output (B, H / 4, W / 4, C).

    Source: Wang et al., Transformer-based unsupervised contrastive learning for histopathological image
    classification, Medical Image Analysis 81, 2022 (CTransPath).
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 4,
        in_chans: int = 3,
        embed_dim: int = 96,
        norm_layer: Callable[[int], nn.Module] | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        side = img_size if isinstance(img_size, int) else img_size[0]
        self.img_size = (side, side)
        self.patch_size = (4, 4)
        self.grid_size = (side // 4, side // 4)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        eighth, quarter = embed_dim // 8, embed_dim // 4
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, eighth, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(eighth),
            nn.ReLU(),
            nn.Conv2d(eighth, quarter, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(quarter),
            nn.ReLU(),
            nn.Conv2d(quarter, embed_dim, 1),
        )
        self.norm = norm_layer(embed_dim) if norm_layer is not None else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Tokens (B, H / 4, W / 4, C) of images (B, 3, H, W)."""
        tokens: Tensor = self.norm(self.proj(images).permute(0, 2, 3, 1))
        return tokens


class AttentionPool(nn.Module):
    """Learned queries that attend to all tokens (CoCa's attentional pooler, as CONCH v1 uses it).

    Source: Yu et al., CoCa, arXiv 2205.01917; Lu et al., CONCH, Nature Medicine 30, 2024.
    """

    def __init__(self, dim: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, dim))
        self.attn = nn.MultiheadAttention(dim, heads, kdim=context_dim, vdim=context_dim, batch_first=True)
        self.ln_q = nn.LayerNorm(dim)
        self.ln_k = nn.LayerNorm(context_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Pooled features (B, D) of tokens (B, N, C)."""
        context = self.ln_k(tokens)
        query = self.ln_q(self.query).expand(len(tokens), -1, -1)
        pooled: Tensor = self.attn(query, context, context, need_weights=False)[0][:, 0]
        return pooled


class LinearAttentionPool(nn.Module):
    """The same pooling with bias-free projections of its own, as CONCH v1.5 has it."""

    def __init__(self, dim: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.randn(1, dim))
        self.ln_k = nn.LayerNorm(context_dim)
        self.ln_q = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(context_dim, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Pooled features (B, D) of tokens (B, N, C)."""
        batch = len(tokens)
        query = self.to_q(self.ln_q(self.query)).expand(batch, -1, -1)
        keys, values = self.to_kv(self.ln_k(tokens)).chunk(2, dim=-1)
        split = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, keys, values)]
        attended = F.scaled_dot_product_attention(*split)
        pooled: Tensor = self.to_out(attended.transpose(1, 2).flatten(2))[:, 0]
        return pooled


class _Wrapped(nn.Module, ABC):
    """A timm ViT inside another network, which has what timm's own networks have of it."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk: Any = trunk

    @property
    def blocks(self) -> nn.Module:
        """The trunk's blocks."""
        blocks: nn.Module = self.trunk.blocks
        return blocks

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches."""
        return int(self.trunk.num_prefix_tokens)

    def forward_features(self, images: Tensor) -> Tensor:
        """Final tokens (B, N, C) of images (B, 3, H, W)."""
        tokens: Tensor = self.trunk.forward_features(images)
        return tokens

    def forward_intermediates(self, images: Tensor, **options: Any) -> Any:
        """See timm's VisionTransformer.forward_intermediates."""
        return self.trunk.forward_intermediates(images, **options)

    @abstractmethod
    def forward_head(self, tokens: Tensor, pre_logits: bool = True) -> Tensor:
        """Features (B, D) of final tokens (B, N, C)."""

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, D) of images (B, 3, H, W)."""
        return self.forward_head(self.forward_features(images))


class ProjectedViT(_Wrapped):
    """A timm ViT whose CLS a head projects into the space that images and texts share.

    unit: the projection is brought to length one. Sources: Radford et al., CLIP, arXiv 2103.00020 (a matrix without
    bias); Zhou et al., KEEP, Cancer Cell 2026 (two layers with a GELU between, then length one).
    """

    def __init__(self, trunk: nn.Module, head: nn.Module, *, unit: bool) -> None:
        super().__init__(trunk)
        self.head = head
        self.unit = unit

    def forward_head(self, tokens: Tensor, pre_logits: bool = True) -> Tensor:
        """Features (B, D) of final tokens (B, N, C)."""
        projected: Tensor = self.head(tokens[:, 0])
        return F.normalize(projected, dim=-1) if self.unit else projected


class AttentionPooledViT(_Wrapped):
    """A timm ViT whose tokens one attention query pools: CONCH's image tower before the contrastive projection.

    Has what timm's own networks have (``forward_features``, ``forward_head``, ``forward_intermediates``, ``blocks``),
    so that it is pooled and looked into as they are.
    """

    def __init__(self, trunk: nn.Module, pool: nn.Module, dim: int) -> None:
        super().__init__(trunk)
        self.attn_pool_contrast = pool
        self.ln_contrast = nn.LayerNorm(dim)

    def forward_head(self, tokens: Tensor, pre_logits: bool = True) -> Tensor:
        """Pooled features (B, D) of final tokens (B, N, C)."""
        pooled: Tensor = self.ln_contrast(self.attn_pool_contrast(tokens))
        return pooled


def _ctranspath(args: Mapping[str, Any], timm_model: TimmBuilder) -> nn.Module:
    return timm_model("swin_tiny_patch4_window7_224", {"embed_layer": ConvStem, **args})


def _conch(args: Mapping[str, Any], timm_model: TimmBuilder, pool: type[nn.Module]) -> nn.Module:
    rest = dict(args)
    trunk, dim, heads = rest.pop("trunk"), int(rest.pop("dim")), int(rest.pop("heads"))
    vit: Any = timm_model(trunk, rest)
    return AttentionPooledViT(vit, pool(dim, vit.embed_dim, heads), dim)


def _projected(args: Mapping[str, Any], timm_model: TimmBuilder, *, layers: int) -> nn.Module:
    rest = dict(args)
    trunk, dim = rest.pop("trunk"), int(rest.pop("dim"))
    vit: Any = timm_model(trunk, rest)
    if layers == 1:
        return ProjectedViT(vit, nn.Linear(vit.embed_dim, dim, bias=False), unit=False)
    head = nn.Sequential(nn.Linear(vit.embed_dim, dim), nn.GELU(), nn.Linear(dim, dim))
    return ProjectedViT(vit, head, unit=True)


BUILDERS: Mapping[str, Callable[[Mapping[str, Any], TimmBuilder], nn.Module]] = {
    "ctranspath": _ctranspath,
    "conch": lambda args, timm_model: _conch(args, timm_model, AttentionPool),
    "conch_v1_5": lambda args, timm_model: _conch(args, timm_model, LinearAttentionPool),
    "vit-projection": lambda args, timm_model: _projected(args, timm_model, layers=1),
    "vit-mlp-head": lambda args, timm_model: _projected(args, timm_model, layers=2),
}
"""Networks by the name that a recipe's ``architecture`` uses: from arguments and a builder of timm models."""
