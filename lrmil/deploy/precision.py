"""Encoders' graphs in bfloat16 and int8."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["quantised", "rounded"]

QUANTISED = ("Conv", "Gemm", "MatMul")


def rounded(model: Any) -> Any:
    """A copy of an encoder's graph whose products with weights, of matrices, are computed in bfloat16.

    Their weights are stored in it; norms, softmax, convolutions and the residual stream stay in float32.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    out = onnx.ModelProto()
    out.CopyFrom(model)
    graph = out.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    uses: dict[str, int] = {}
    for node in graph.node:
        for name in node.input:
            uses[name] = uses.get(name, 0) + 1
    nodes: list[Any] = []
    changed: dict[str, str] = {}
    for node in graph.node:
        # A product of two activations is attention's, whose softmax wants its digits.
        if node.op_type not in ("MatMul", "Gemm") or not any(name in weights for name in node.input):
            nodes.append(node)
            continue
        inputs = []
        for name in node.input:
            short = f"{name}_bfloat16"
            if name in weights and name not in changed:
                values = numpy_helper.to_array(weights[name])
                graph.initializer.append(_bfloat16(values, short))
                changed[name] = short
            elif name not in weights and name not in changed:
                nodes.append(helper.make_node("Cast", [name], [short], to=TensorProto.BFLOAT16, name=f"{short}_cast"))
                changed[name] = short
            inputs.append(changed[name])
        wide, result = node.output[0], f"{node.output[0]}_bfloat16"
        product = helper.make_node(node.op_type, inputs, [result], name=node.name)
        product.attribute.extend(node.attribute)
        nodes += [product, helper.make_node("Cast", [result], [wide], to=TensorProto.FLOAT, name=f"{node.name}_cast")]
    del graph.node[:]
    graph.node.extend(nodes)
    still = {name for node in nodes for name in node.input}
    for name in [name for name in changed if name in weights and name not in still]:
        graph.initializer.remove(weights[name])
    return out


def _bfloat16(values: NDArray[np.float32], name: str) -> Any:
    """A tensor of the nearest bfloat16, ties to even."""
    from onnx import TensorProto, helper

    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return helper.make_tensor(name, TensorProto.BFLOAT16, values.shape, nearest.tobytes(), raw=True)


def quantised(model: Any, batches: Iterable[NDArray[np.uint8]]) -> Any:
    """A copy of an encoder's graph with convolutions and products with weights in int8.

    Weights are quantised for each output channel, activations by the range that they have on ``batches``, tiles uint8
    (B, S, S, 3), which are read once.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._batches: Iterator[NDArray[np.uint8]] = iter(batches)

        def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
            tiles = next(self._batches, None)
            return None if tiles is None else {"tiles": tiles}

    with tempfile.TemporaryDirectory(prefix="lrmil-export-") as folder, _quiet():
        whole, ready, small = (Path(folder) / name for name in ("whole.onnx", "ready.onnx", "small.onnx"))
        onnx.save(model, whole)
        quant_pre_process(str(whole), str(ready), skip_symbolic_shape=True)
        quantize_static(
            str(ready),
            str(small),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=list(QUANTISED),
            extra_options={"MatMulConstBOnly": True},
        )
        return onnx.load(small)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantiser's advice to its own developers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
