"""Writing tensors to a safetensors file, piece by piece, so that a full disk is an error like any other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["tensors_sha256", "write_tensor_file"]

NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
"""The format's names of torch's types, largest elements first: so laid out, each is aligned."""


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors on the CPU and texts to ``path`` in the safetensors format.

    safetensors' own function writes a file of another name first, which stays when it is interrupted, and makes of
    every error of the system one that is no OSError. Raises OSError, ValueError for a type that the format lacks.
    """
    import torch

    order = list(NAMES)

    def kind(tensor: Tensor) -> str:
        name = str(tensor.dtype).removeprefix("torch.")
        if name not in NAMES:
            raise ValueError(f"the safetensors format has no {name}")
        return name

    names = sorted(tensors, key=lambda name: (order.index(kind(tensors[name])), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": NAMES[kind(tensor)],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            flat = tensors[name].detach().contiguous().flatten()
            if flat.numel():
                file.write(flat.view(torch.uint8).numpy().data)


def tensors_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256, in hex, over every tensor's name, dtype, shape and bytes, in the order of the names."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
