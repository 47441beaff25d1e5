"""MIL heads as ONNX graphs over one bag: the arithmetic of ``lrmil.model``, written for one bag of any length."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from lrmil.config import QUANTILES
from lrmil.deploy.graph import Graph
from lrmil.deploy.heads_transmil import transmil
from lrmil.errors import ExportError
from lrmil.model import MILModel
from lrmil.model.attention import ABMIL, MaxPooling, MeanPooling
from lrmil.model.dsmil import DSMIL
from lrmil.model.ensemble import Ensemble
from lrmil.model.linear import LinearModel
from lrmil.model.transmil import TransMIL

__all__ = ["HeadValues", "add_head"]


class HeadValues(NamedTuple):
    """Names of a head's values: logits (C,), attention_logits (T,) or None where it has no attention."""

    logits: str
    attention_logits: str | None


def add_head(graph: Graph, model: MILModel, bag: str) -> HeadValues:
    """Write a model as nodes over ``bag``, float32 (T, D) with T at least 1.

    Raises ExportError for an architecture that is not known here.
    """
    if isinstance(model, Ensemble):
        return _ensemble(graph, model, bag)
    if isinstance(model, LinearModel):
        return HeadValues(_classified(graph, model, _summaries(graph, model, bag)), None)
    weight, bias = model.input_weights()
    tiles = graph.op("Relu", graph.linear(bag, weight.detach(), bias.detach()))
    pooled, scores = _pooled(graph, model, tiles)
    return HeadValues(_classified(graph, model, pooled), scores)


def _classified(graph: Graph, model: MILModel, pooled: str) -> str:
    return graph.flat(graph.layer(pooled, model.classifier))


def _pooled(graph: Graph, model: MILModel, tiles: str) -> tuple[str, str | None]:
    """What the classifier sees, (1, W), and attention logits (T,) or None, of projected tiles (T, H)."""
    if isinstance(model, MeanPooling):
        return graph.op("ReduceMean", tiles, graph.ints(0)), None
    if isinstance(model, MaxPooling):
        return graph.op("ReduceMax", tiles, graph.ints(0)), None
    if isinstance(model, ABMIL):
        return _attention(graph, model, tiles)
    if isinstance(model, DSMIL):
        return _dsmil(graph, model, tiles)
    if isinstance(model, TransMIL):
        return transmil(graph, model, tiles)
    raise ExportError(
        f"a {model.settings.name} model cannot be exported", remedy="predict with its model.safetensors instead"
    )


def _attention(graph: Graph, model: ABMIL, tiles: str) -> tuple[str, str]:
    hidden = graph.layer(tiles, model.attention)
    if model.gated:
        value, gate = graph.ops("Split", 2, hidden, axis=1, num_outputs=2)
        hidden = graph.op("Mul", graph.op("Tanh", value), graph.op("Sigmoid", gate))
    else:
        hidden = graph.op("Tanh", hidden)
    scores = graph.layer(hidden, model.attention_score)
    attention = graph.op("Transpose", graph.op("Softmax", scores, axis=0), perm=[1, 0])
    return graph.op("MatMul", attention, tiles), graph.flat(scores)


def _dsmil(graph: Graph, model: DSMIL, tiles: str) -> tuple[str, str]:
    first, last = model.query[0], model.query[2]
    scores = graph.layer(tiles, model.instance_classifier)
    hidden = graph.op("Relu", graph.layer(tiles, first))
    queries = graph.op("Tanh", graph.layer(hidden, last))
    critical = graph.op("Gather", queries, graph.op("ArgMax", scores, axis=0, keepdims=0), axis=0)
    likeness = graph.op("MatMul", queries, graph.op("Transpose", critical, perm=[1, 0]))
    scaled = graph.mul(likeness, 1 / math.sqrt(model.settings.attention_dim))
    logs = graph.op("LogSoftmax", scaled, axis=0)
    pooled = graph.op("MatMul", graph.op("Transpose", graph.op("Exp", logs), perm=[1, 0]), tiles)
    mean = graph.op("ReduceLogSumExp", logs, graph.ints(1), keepdims=0)
    shift = graph.constant(math.log(model.settings.classes))
    return graph.op("Reshape", pooled, graph.ints(1, -1)), graph.op("Sub", mean, shift)


def _summaries(graph: Graph, model: LinearModel, bag: str) -> str:
    """What a linear model's classifier sees of a bag (T, D): (1, W), standardised."""
    mean, scale = model.input_mean.detach().numpy(), model.input_scale.detach().numpy()
    pooling = model.settings.pooling
    if pooling == "quantiles":
        found = _quantiles(graph, bag)
        return _standardised(graph, found, np.tile(mean, (len(QUANTILES), 1)), scale)
    centre = graph.op("ReduceMean", bag, graph.ints(0))
    if pooling == "mean":
        return _standardised(graph, centre, mean[None], scale)
    apart = graph.op("Sub", bag, centre)
    spread = graph.op("Sqrt", graph.op("ReduceMean", graph.op("Mul", apart, apart), graph.ints(0)))
    both = graph.op("Concat", centre, spread, axis=0)
    return _standardised(graph, both, np.stack([mean, np.zeros_like(mean)]), scale)


def _standardised(graph: Graph, found: str, shift: object, scale: object) -> str:
    values = graph.op("Mul", graph.op("Sub", found, graph.constant(shift)), graph.constant(scale))
    return graph.op("Reshape", values, graph.ints(1, -1))


def _quantiles(graph: Graph, bag: str) -> str:
    """The quantiles of each feature with linear interpolation, (Q, D)."""
    from onnx import TensorProto

    count = graph.length(bag)
    ordered = graph.ops("TopK", 2, bag, count, axis=0, largest=0, sorted=1)[0]
    last = graph.op("Sub", count, graph.ints(1))
    # In float64, as the model does: a large bag has more tiles than float32 has digits.
    place = graph.op("Mul", graph.op("Cast", last, to=TensorProto.DOUBLE), graph.constant(QUANTILES, np.float64))
    below = graph.op("Cast", graph.op("Floor", place), to=TensorProto.INT64)
    above = graph.op("Min", graph.op("Add", below, graph.ints(1)), last)
    part = graph.op("Sub", place, graph.op("Cast", below, to=TensorProto.DOUBLE))
    weight = graph.op("Reshape", graph.op("Cast", part, to=TensorProto.FLOAT), graph.ints(-1, 1))
    low, high = graph.op("Gather", ordered, below, axis=0), graph.op("Gather", ordered, above, axis=0)
    return graph.op("Add", low, graph.op("Mul", weight, graph.op("Sub", high, low)))


def _ensemble(graph: Graph, model: Ensemble, bag: str) -> HeadValues:
    members = [add_head(graph, member, bag) for member in model.members if isinstance(member, MILModel)]
    logits = graph.mean([member.logits for member in members])
    if model.linear is not None:
        share = model.settings.linear_share
        linear = add_head(graph, model.linear, bag).logits
        logits = graph.op("Add", graph.mul(logits, 1 - share), graph.mul(linear, share))
    scores = [member.attention_logits for member in members if member.attention_logits is not None]
    if not scores:
        return HeadValues(logits, None)
    logs = [graph.op("Unsqueeze", graph.op("LogSoftmax", s, axis=0), graph.ints(0)) for s in scores]
    total = graph.op("ReduceLogSumExp", graph.op("Concat", *logs, axis=0), graph.ints(0), keepdims=0)
    return HeadValues(logits, graph.op("Sub", total, graph.constant(math.log(len(scores)))))
