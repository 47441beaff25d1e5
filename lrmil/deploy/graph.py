"""ONNX graphs written node by node: what the heads need of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["OPSET", "Graph"]

OPSET = 20


class Graph:
    """Nodes and constants of a graph under way; every value has a name.

    prefix: begins the names, so that graphs can be joined.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._made = 0
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def _name(self, kind: str) -> str:
        self._made += 1
        return f"{self._prefix}/{kind}_{self._made}"

    def constant(self, values: ArrayLike | Any, dtype: Any = np.float32) -> str:
        """A constant array (a torch tensor too)."""
        from onnx import numpy_helper

        array: NDArray[Any] = np.ascontiguousarray(np.asarray(values, dtype))
        name = self._name("const")
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def ints(self, *values: int) -> str:
        """A constant of int64, one axis."""
        return self.constant(values, np.int64)

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """A node with one output."""
        return self.ops(kind, 1, *inputs, **attributes)[0]

    def ops(self, kind: str, outputs: int, *inputs: str, **attributes: Any) -> list[str]:
        """A node with several outputs."""
        from onnx import helper

        names = [self._name(kind) for _ in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=self._name(f"{kind}_node"), **attributes))
        return names

    def named(self, value: str, name: str) -> None:
        """Give a value the name of an output."""
        from onnx import helper

        self.nodes.append(helper.make_node("Identity", [value], [name], name=self._name("output")))

    def where(self, condition: str, one: Callable[[], str], other: Callable[[], str]) -> str:
        """``one()`` where a condition holds, else ``other()``; only one of them is computed."""
        from onnx import TensorProto, helper

        branches = []
        for make in (one, other):
            outside, self.nodes = self.nodes, []
            try:
                result = make()
                output = helper.make_tensor_value_info(result, TensorProto.FLOAT, None)
                branches.append(helper.make_graph(self.nodes, self._name("branch"), [], [output]))
            finally:
                self.nodes = outside
        return self.op("If", condition, then_branch=branches[0], else_branch=branches[1])

    # -- what several heads write

    def linear(self, values: str, weight: Any, bias: Any) -> str:
        """values (T, D), weight (H, D), bias (H,) -> (T, H)."""
        return self.op("Gemm", values, self.constant(weight), self.constant(bias), transB=1)

    def layer(self, values: str, layer: Any) -> str:
        """A linear layer of torch over values (T, D)."""
        return self.linear(values, layer.weight.detach(), layer.bias.detach())

    def mul(self, values: str, factor: float) -> str:
        """Each value times a number."""
        return self.op("Mul", values, self.constant(factor))

    def mean(self, values: Sequence[str]) -> str:
        """The mean of several values of one shape."""
        return values[0] if len(values) == 1 else self.mul(self.op("Sum", *values), 1 / len(values))

    def length(self, values: str) -> str:
        """The length of the first axis, int64 (1,)."""
        return self.op("Shape", values, start=0, end=1)

    def flat(self, values: str) -> str:
        """All values on one axis."""
        return self.op("Reshape", values, self.ints(-1))
