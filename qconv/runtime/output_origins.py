"""Finds in the graph what computes each output of a model.

From the output the way goes back through the operators that only move values or quantize them, along the one input that
is no constant, up to the last layer with weights, or to where two tensors meet. An L2 norm and a softmax that exporters
write as several operators are told by their division: x / sqrt(sum x^2), and exp(x) / sum exp(x).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

NORMALIZING_OP = "LpNormalization"
"""How an L2 norm is called here, whatever operators compute it."""

SOFTMAX_OPS = frozenset({"Softmax", "LogSoftmax"})

LAYER_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


@dataclass(frozen=True, slots=True)
class OutputOrigin:
    """What computes an output.

    operators: from the output back to the last layer with weights, or to where tensors meet; without those that only
        move values, and those that quantize. An L2 norm is called NORMALIZING_OP, and Exp over its sum Softmax.
    kernel: the number of places that the weights of this layer cover, 1 for a 1x1 Conv; None for other operators.
    """

    operators: tuple[str, ...] = ()
    kernel: int | None = None


MOVING_OPS = frozenset(
    {"Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Cast", "Dropout", "Slice"}
    | {"QuantizeLinear", "DequantizeLinear"}
)

NORM_OPS = frozenset({"Sqrt", "Clip", "Max", "Add", "Expand", "Reciprocal", "Pow", "Div", *MOVING_OPS})
"""What may lie between a sum of squares and the division by its root."""

MOST_STEPS = 64
"""Most steps back from an output."""


def find_output_origins(proto: onnx.ModelProto) -> dict[str, OutputOrigin]:
    """What computes each output of the graph, by its name."""
    graph = _Graph.of(proto.graph)
    return {output.name: graph.origin_of(output.name) for output in proto.graph.output}


@dataclass(slots=True)
class _Graph:
    """producers: the node behind each tensor. shapes: of the constants that are stored."""

    producers: dict[str, onnx.NodeProto]
    shapes: dict[str, tuple[int, ...]]
    constant: dict[str, bool]

    @classmethod
    def of(cls, graph: onnx.GraphProto) -> _Graph:
        producers = {name: node for node in graph.node for name in node.output}
        shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        shapes |= {tensor.values.name: tuple(tensor.dims) for tensor in graph.sparse_initializer}
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
                shapes[node.output[0]] = tuple(node.attribute[0].t.dims)
        constant = dict.fromkeys(shapes, True)
        for node in graph.node:  # which stand in the order in which they run
            known = node.op_type == "Constant" or all(constant.get(name, not name) for name in node.input)
            known = known and (bool(node.input) or node.op_type == "Constant")
            constant |= dict.fromkeys(node.output, known)
        return cls(producers, shapes, constant)

    def origin_of(self, name: str) -> OutputOrigin:
        found: list[str] = []
        for node in self._back_from(name):
            kind = _plain_name(node)
            if kind in MOVING_OPS:
                continue
            data = self._data_of(node)
            if kind in ("Div", "Mul", "ReduceL2") and len(data) == 2:
                if any(self._is_norm(side) for side in data):
                    return OutputOrigin((*found, NORMALIZING_OP))
                if kind == "Div" and self._is_softmax(*data):
                    return OutputOrigin((*found, "Softmax"))
            found.append(kind)
            if kind in LAYER_OPS:
                return OutputOrigin(tuple(found), self._kernel_of(node))
        return OutputOrigin(tuple(found))

    def _back_from(self, name: str) -> Iterator[onnx.NodeProto]:
        """The nodes behind a tensor, as long as one input alone is no constant."""
        for _ in range(MOST_STEPS):
            node = self.producers.get(name)
            if node is None:
                return
            yield node
            data = self._data_of(node)
            if not data or (len(data) > 1 and _plain_name(node) not in {*MOVING_OPS, "Resize"}):
                return
            name = data[0]

    def _data_of(self, node: onnx.NodeProto) -> list[str]:
        return [name for name in node.input if name and not self.constant.get(name, False)]

    def _kernel_of(self, node: onnx.NodeProto) -> int | None:
        """How many places the weights of a convolution cover."""
        if _plain_name(node) not in ("Conv", "ConvTranspose"):
            return None
        stated = next((tuple(a.ints) for a in node.attribute if a.name == "kernel_shape"), None)
        if stated is not None:
            return int(prod(stated))
        name = next((n for n in node.input[1:] if len(self._stored_shape(n)) > 2), "")
        return prod(self._stored_shape(name)[2:]) if name else None

    def _stored_shape(self, name: str) -> tuple[int, ...]:
        while name not in self.shapes and name in self.producers and self.producers[name].input:
            name = self.producers[name].input[0]
        return self.shapes.get(name, ())

    def _is_norm(self, name: str) -> bool:
        """Whether a tensor is the length of another one, or one over it."""
        rooted = False
        for node in self._back_from_norm(name):
            rooted = rooted or node.op_type in ("Sqrt", "Pow")
            if node.op_type == "ReduceL2":
                return True
            if node.op_type in ("ReduceSum", "ReduceSumSquare"):
                return rooted
            if node.op_type not in NORM_OPS:
                return False
        return False

    def _back_from_norm(self, name: str) -> Iterator[onnx.NodeProto]:
        for _ in range(MOST_STEPS):
            node = self.producers.get(name)
            if node is None:
                return
            yield node
            data = self._data_of(node)
            if not data:
                return
            name = data[0]

    def _is_softmax(self, above: str, below: str) -> bool:
        """Whether the division is one of Exp by its own sum."""
        exp, total = self.producers.get(above), self.producers.get(below)
        if exp is None or total is None or exp.op_type != "Exp" or total.op_type != "ReduceSum":
            return False
        return total.input[0] in exp.output


def _plain_name(node: onnx.NodeProto) -> str:
    """The operator that a kernel on integer codes stands for, and the operator itself of others."""
    name: str = node.op_type
    for prefix in ("QLinear", "QGemm"):
        if name.startswith(prefix):
            return "Gemm" if prefix == "QGemm" else name.removeprefix(prefix)
    return {"ConvInteger": "Conv", "MatMulInteger": "MatMul"}.get(name, name)
