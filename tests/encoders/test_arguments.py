"""What a table or a file may hand to a network's constructor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
from safetensors.torch import load_file

from wsi_pipe.encoders.architectures import build, timm_recipe
from wsi_pipe.encoders.arguments import check_arguments
from wsi_pipe.encoders.lr_file import METADATA_KEY, load_lr_network, write_lr_encoder
from wsi_pipe.encoders.registry import load_registry
from wsi_pipe.encoders.tensor_file import write_tensor_file
from wsi_pipe.errors import ConfigError
from wsi_pipe.geometry import TileSpec


@pytest.fixture(scope="module")
def lr_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """Tensors and header of an LR encoder that loads."""
    recipe, _ = timm_recipe("test_vit")
    path = tmp_path_factory.mktemp("lr") / "lr.safetensors"
    header = write_lr_encoder(path, build(recipe, name="x"), recipe=recipe, tile=TileSpec(2.0, 64), licence="MIT")
    load_lr_network(path, "lr")
    return load_file(path), header.to_json()


@pytest.mark.parametrize(
    "argument",
    [
        {"checkpoint_path": "/tmp/evil.pt"},
        {"pretrained": True},
        {"pretrained_cfg": {"url": "https://evil.example/x.pt"}},
        {"pretrained_cfg_overlay": {"file": "/tmp/evil.pt"}},
        {"cache_dir": "/tmp"},
        {"features_only": True},
        {"scriptable": True},
        {"block_fn": "os.system"},
        {"depth": 10**9},
        {"embed_dim": [10**9]},
        {"depth": float("nan")},
        {"global_pool": "/etc/passwd"},
        {"dynamic_img_size": "yes"},
        {"init_values": "1"},
    ],
    ids=lambda argument: next(iter(argument)),
)
def test_a_file_cannot_steer_what_is_loaded(
    tmp_path: Path, lr_file: tuple[Any, str], argument: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = tmp_path / "changed.safetensors"
    tensors, text = lr_file
    values = json.loads(text)
    values["recipe"]["args"] |= argument
    write_tensor_file(changed, tensors, {METADATA_KEY: json.dumps(values)})

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("timm was asked")

    monkeypatch.setattr(timm, "create_model", never)
    with pytest.raises(ConfigError, match=next(iter(argument))):
        load_lr_network(changed, "lr")


def test_all_arguments_of_our_own_table_are_known() -> None:
    for entry in load_registry().values():
        own = {k: v for k, v in entry.args.items() if k not in ("trunk", "dim", "heads")}
        check_arguments(own, entry.name)
