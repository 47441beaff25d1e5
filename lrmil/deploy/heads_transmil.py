"""TransMIL as an ONNX graph over one bag; see ``lrmil.model.transmil``, whose steps these are."""

from __future__ import annotations

import math

import numpy as np
from torch import nn

from lrmil.deploy.graph import Graph
from lrmil.model.transmil import PINV_STEPS, VALUE_KERNEL, SequenceAttention, TransMIL

__all__ = ["transmil"]


def transmil(graph: Graph, model: TransMIL, tiles: str) -> tuple[str, str]:
    """The bag (1, H) and attention logits (T,) of projected tiles (T, H)."""
    from onnx import TensorProto

    one, zero = graph.ints(1), graph.ints(0)
    count = graph.length(tiles)
    root = graph.op("Ceil", graph.op("Sqrt", graph.op("Cast", count, to=TensorProto.DOUBLE)))
    side = graph.op("Cast", root, to=TensorProto.INT64)
    extra = graph.op("Sub", graph.op("Mul", side, side), count)
    token = graph.constant(model.class_token.detach()[None])
    tokens = graph.op("Concat", token, tiles, graph.op("Slice", tiles, zero, extra, zero), axis=0)
    tokens = graph.op("Add", tokens, _mixed(graph, model.first, tokens))
    end = graph.ints(np.iinfo(np.int64).max)
    head = graph.op("Slice", tokens, zero, one, zero)
    square = _position(graph, model, graph.op("Slice", tokens, one, end, zero), side)
    tokens = graph.op("Concat", head, square, axis=0)
    update, logs = _class_row(graph, model.second, tokens)
    bag = _norm(graph, model.norm, graph.op("Add", head, update))
    # Tiles that were repeated to fill the square share their attention with their copies.
    first = graph.op("Slice", logs, one, graph.op("Add", count, one), zero)
    copies = graph.op("Slice", logs, graph.op("Add", count, one), end, zero)
    missing = graph.op("Concat", zero, graph.op("Sub", count, extra), axis=0)
    copies = graph.op("Pad", copies, missing, graph.constant(-math.inf))
    largest = graph.op("Max", first, copies)
    total = graph.op(
        "Add",
        graph.op("Exp", graph.op("Sub", first, largest)),
        graph.op("Exp", graph.op("Sub", copies, largest)),
    )
    return bag, graph.op("Add", largest, graph.op("Log", total))


def _norm(graph: Graph, norm: nn.LayerNorm, values: str) -> str:
    weight, bias = graph.constant(norm.weight.detach()), graph.constant(norm.bias.detach())
    return graph.op("LayerNormalization", values, weight, bias, axis=-1, epsilon=norm.eps)


def _split(graph: Graph, attention: SequenceAttention, tokens: str) -> list[str]:
    """Queries, keys and values, (heads, S, d) each."""
    normed = _norm(graph, attention.norm, tokens)
    weight = graph.constant(attention.qkv.weight.detach().numpy().T)
    shaped = graph.op("Reshape", graph.op("MatMul", normed, weight), graph.ints(0, 3, attention.heads, -1))
    parts = graph.ops("Split", 3, graph.op("Transpose", shaped, perm=[1, 2, 0, 3]), axis=0, num_outputs=3)
    return [graph.op("Squeeze", part, graph.ints(0)) for part in parts]


def _convolved(graph: Graph, attention: SequenceAttention, values: str) -> str:
    weight, heads = graph.constant(attention.values.weight.detach()), attention.heads
    moved = graph.op("Transpose", values, perm=[2, 0, 1])
    out = graph.op("Conv", moved, weight, group=heads, pads=[VALUE_KERNEL // 2] * 2, kernel_shape=[VALUE_KERNEL])
    return graph.op("Transpose", out, perm=[1, 2, 0])


def _out(graph: Graph, attention: SequenceAttention, mixed: str) -> str:
    """(heads, S, d) through the last layer: (S, H)."""
    rows = graph.op("Reshape", graph.op("Transpose", mixed, perm=[1, 0, 2]), graph.ints(0, -1))
    return graph.layer(rows, attention.out)


def _mixed(graph: Graph, attention: SequenceAttention, tokens: str) -> str:
    q, k, v = _split(graph, attention, tokens)
    width = attention.out.in_features // attention.heads
    q = graph.mul(q, 1 / math.sqrt(width))
    few = graph.op("LessOrEqual", graph.length(tokens), graph.ints(attention.landmarks))
    mixed = graph.where(
        graph.op("Squeeze", few, graph.ints(0)),
        lambda: _attended(graph, q, k, v),
        lambda: _nystroem(graph, q, k, v, attention.landmarks),
    )
    return _out(graph, attention, graph.op("Add", mixed, _convolved(graph, attention, v)))


def _softmaxed(graph: Graph, a: str, b: str) -> str:
    return graph.op("Softmax", graph.op("MatMul", a, graph.op("Transpose", b, perm=[0, 2, 1])), axis=2)


def _attended(graph: Graph, q: str, k: str, v: str) -> str:
    return graph.op("MatMul", _softmaxed(graph, q, k), v)


def _nystroem(graph: Graph, q: str, k: str, v: str, landmarks: int) -> str:
    from onnx import TensorProto

    count = graph.op("Squeeze", graph.op("Shape", q, start=1, end=2), graph.ints(0))
    zero, one = graph.constant(0, np.int64), graph.constant(1, np.int64)
    place = graph.op("Range", zero, count, one)
    run = graph.op("Div", graph.op("Mul", place, graph.constant(landmarks, np.int64)), count)
    rows = graph.constant(np.arange(landmarks)[:, None], np.int64)
    member = graph.op("Cast", graph.op("Equal", rows, graph.op("Unsqueeze", run, graph.ints(0))), to=TensorProto.FLOAT)
    means = graph.op("Div", member, graph.op("ReduceSum", member, graph.ints(1)))
    q_mean, k_mean = graph.op("MatMul", means, q), graph.op("MatMul", means, k)
    inverse = _pinv(graph, _softmaxed(graph, q_mean, k_mean), landmarks)
    inner = graph.op("MatMul", inverse, _attended(graph, q_mean, k, v))
    return graph.op("MatMul", _softmaxed(graph, q, k_mean), inner)


def _pinv(graph: Graph, matrix: str, size: int) -> str:
    size_of = graph.op("Abs", matrix)
    columns = graph.op("ReduceMax", graph.op("ReduceSum", size_of, graph.ints(1)), graph.ints(2))
    rows = graph.op("ReduceMax", graph.op("ReduceSum", size_of, graph.ints(2)), graph.ints(1))
    z = graph.op("Div", graph.op("Transpose", matrix, perm=[0, 2, 1]), graph.op("Mul", columns, rows))

    def less(factor: float, product: str) -> str:
        return graph.op("Sub", graph.constant(factor * np.eye(size)), product)

    for _ in range(PINV_STEPS):
        mz = graph.op("MatMul", matrix, z)
        inner = less(7, mz)
        inner = less(15, graph.op("MatMul", mz, inner))
        inner = less(13, graph.op("MatMul", mz, inner))
        z = graph.op("MatMul", graph.mul(z, 0.25), inner)
    return z


def _position(graph: Graph, model: TransMIL, tiles: str, side: str) -> str:
    width = model.settings.hidden
    shape = graph.op("Concat", graph.ints(1, width), side, side, axis=0)
    square = graph.op("Reshape", graph.op("Transpose", tiles, perm=[1, 0]), shape)
    parts = [square]
    for kernel in model.position.kernels:
        assert isinstance(kernel, nn.Conv2d)
        assert kernel.bias is not None
        weight, bias = graph.constant(kernel.weight.detach()), graph.constant(kernel.bias.detach())
        size = kernel.kernel_size[0]
        parts.append(
            graph.op("Conv", square, weight, bias, group=width, pads=[size // 2] * 4, kernel_shape=[size, size])
        )
    rows = graph.op("Reshape", graph.op("Sum", *parts), graph.ints(width, -1))
    return graph.op("Transpose", rows, perm=[1, 0])


def _class_row(graph: Graph, attention: SequenceAttention, tokens: str) -> tuple[str, str]:
    """What the first token receives, (1, H), and the log of its attention to all tokens, (S,)."""
    q, k, v = _split(graph, attention, tokens)
    width = attention.out.in_features // attention.heads
    zero, one = graph.ints(0), graph.ints(1)
    first = graph.op("Slice", q, zero, one, one)
    products = graph.op("MatMul", first, graph.op("Transpose", k, perm=[0, 2, 1]))
    logs = graph.op("LogSoftmax", graph.mul(products, 1 / math.sqrt(width)), axis=2)
    mixed = graph.op("MatMul", graph.op("Exp", logs), v)
    near = graph.op("Slice", v, zero, graph.ints(VALUE_KERNEL // 2 + 1), one)
    own = graph.op("Slice", _convolved(graph, attention, near), zero, one, one)
    update = _out(graph, attention, graph.op("Add", mixed, own))
    mean = graph.op("ReduceLogSumExp", graph.op("Squeeze", logs, one), zero, keepdims=0)
    return update, graph.op("Sub", mean, graph.constant(math.log(attention.heads)))
