"""Exported classifiers: the same answers as torch's, in one file that is checked and runs without torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lrmil.config import POOLINGS, ModelSettings
from lrmil.deploy.graph import OPSET, Graph
from lrmil.deploy.heads import add_head
from lrmil.deploy.precision import rounded
from lrmil.model import MILModel, build_model

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

DIM = 8


def test_products_with_weights_are_rounded_to_bfloat16_and_nothing_else_is() -> None:
    graph = Graph("encoder")
    weight = np.random.default_rng(0).normal(size=(DIM, 4))
    hidden = graph.op("Relu", graph.linear("x", weight.T, np.ones(4)))
    product = graph.op("MatMul", hidden, graph.constant(weight.T))
    graph.named(graph.op("MatMul", graph.op("Transpose", product, perm=[1, 0]), product), "y")
    ends = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["a", "b"]) for n in ("x", "y")]
    made = onnx.helper.make_graph(graph.nodes, "encoder", ends[:1], ends[1:], graph.constants)
    exact = onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=10)
    half = rounded(exact)
    onnx.checker.check_model(half)
    # Weights and biases are stored in it; the product of two activations has no weight and stays.
    kinds = [tensor.data_type for tensor in half.graph.initializer]
    assert kinds == [onnx.TensorProto.BFLOAT16] * 3
    assert [node.op_type for node in half.graph.node].count("Cast") == 4
    stored = onnx.numpy_helper.to_array(half.graph.initializer[0]).astype(np.float32)
    wanted = torch.from_numpy(weight.T.astype(np.float32)).bfloat16().float().numpy()
    np.testing.assert_array_equal(stored, wanted)


def make_model(name: str, **settings: Any) -> MILModel:
    torch.manual_seed(0)
    chosen = ModelSettings(name, in_dim=DIM, classes=3, hidden=16, attention_dim=8, heads=4, landmarks=16, **settings)
    model = build_model(chosen)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    model.standardise(torch.linspace(-1, 1, DIM), torch.linspace(0, 2, DIM))
    return model.eval()


def run_head(model: MILModel, bag: np.ndarray) -> list[np.ndarray]:
    graph = Graph("head")
    values = add_head(graph, model, "bag")
    outputs = ["logits", *(["attention"] if values.attention_logits else [])]
    for value, name in zip(values, outputs, strict=False):
        graph.named(value, name)
    made = onnx.helper.make_graph(
        graph.nodes,
        "head",
        [onnx.helper.make_tensor_value_info("bag", onnx.TensorProto.FLOAT, ["tiles", DIM])],
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["numbers"]) for name in outputs],
        graph.constants,
    )
    proto = onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=10)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(outputs, {"bag": bag})


HEADS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ("mean", "max", "abmil", "gated-abmil", "clam-sb", "dsmil", "transmil")),
    *(("linear", {"pooling": pooling}) for pooling in POOLINGS),
    ("gated-abmil", {"members": 3}),
    ("abmil", {"members": 2, "linear_share": 0.3, "pooling": "quantiles"}),
    ("mean", {"members": 2, "linear_share": 0.5, "pooling": "mean"}),
]


@pytest.mark.parametrize(("name", "settings"), HEADS, ids=lambda value: str(value))
def test_heads_answer_as_the_models_do_for_bags_of_any_length(name: str, settings: dict[str, Any]) -> None:
    model = make_model(name, **settings)
    # One tile, fewer and more than TransMIL's landmarks, a square number and others.
    for count in (1, 2, 9, 40, 333):
        bag = np.random.default_rng(count).normal(size=(count, DIM)).astype(np.float32)
        with torch.inference_mode():
            wanted = model(torch.from_numpy(bag), torch.tensor([0, count]))
        found = run_head(model, bag)
        np.testing.assert_allclose(found[0], wanted.logits[0].numpy(), atol=2e-4)
        assert (len(found) == 1) == (wanted.attention_logits is None)
        if wanted.attention_logits is not None:
            own, other = (torch.softmax(torch.as_tensor(v).double(), 0) for v in (wanted.attention_logits, found[1]))
            np.testing.assert_allclose(other.numpy(), own.numpy(), atol=1e-5)
