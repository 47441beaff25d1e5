"""What an encoder's table or file may hand to the constructor of its network, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wsi_pipe.errors import ConfigError

__all__ = ["check_arguments"]

SIZES = {
    "img_size": 16384, "patch_size": 1024, "num_classes": 0, "embed_dim": 16384, "depth": 256, "num_heads": 512,
    "reg_tokens": 1024, "window_size": 1024, "depths": 256, "layers": 256, "dims": 16384, "mlp_ratio": 64,
    "cardinality": 1024, "base_width": 4096, "output_stride": 64, "stem_width": 1024,
}  # fmt: skip
"""Numbers, or lists of them, and the most that they may be: beyond that nothing is built but a full memory."""
FRACTIONS = frozenset({
    "init_values", "ls_init_value", "norm_eps", "drop_rate", "drop_path_rate", "pos_drop_rate", "patch_drop_rate",
    "proj_drop_rate", "attn_drop_rate",
})  # fmt: skip
SWITCHES = frozenset({
    "qkv_bias", "qk_norm", "proj_bias", "class_token", "no_embed_class", "pre_norm", "fc_norm", "final_norm",
    "dynamic_img_size", "dynamic_img_pad", "strict_img_size", "avg_down", "conv_mlp", "zero_init_last",
})  # fmt: skip
WORDS = {
    "global_pool": ("", "token", "avg", "avgmax", "max", "map"),
    "pos_embed": ("", "none", "learn"),
    "weight_init": ("", "jax", "jax_nlhb", "moco", "skip"),
    "stem_type": ("", "deep", "deep_tiered"),
}
LAYERS = frozenset({"act_layer", "norm_layer", "mlp_layer", "embed_norm_layer"})
"""By the names that ``architectures`` knows."""


def check_arguments(args: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for an argument that is not a plain size, switch or name of an architecture.

    timm's constructor also takes paths and addresses of weights, which a file that was sent must not name.
    """
    for name, value in args.items():
        if name in SIZES:
            values = value if isinstance(value, (list, tuple)) else [value]
            fits = all(_is_number(v) and 0 <= v <= SIZES[name] for v in values) and len(values) <= 64
        elif name in FRACTIONS:
            fits = value is None or (_is_number(value) and 0 <= value <= 1000)
        elif name in SWITCHES:
            fits = value is None or isinstance(value, bool)
        elif name in WORDS:
            fits = value in WORDS[name]
        elif name in LAYERS:
            fits = value is None or isinstance(value, str)
        else:
            raise ConfigError(
                f"{where}: the argument {name!r} is not one that an encoder's table or file may give",
                remedy="take it out; known are " + ", ".join(sorted({*SIZES, *FRACTIONS, *SWITCHES, *WORDS, *LAYERS})),
            )
        if not fits:
            raise ConfigError(f"{where}: {value!r:.80} is no value for the argument {name!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
