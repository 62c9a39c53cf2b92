"""Finds what each output of a model is joined of: the Concat at its end, and where its parts lie in the output.

    y = Transpose(Concat(boxes, scores))        rows 0 to 3 are the boxes, the others the scores

A join of places (grids of several strides) is looked through, where all its inputs are joins of channels alike.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from qconv.ir.load import detach_weights
from qconv.ir.runtime_types import infer_shapes
from qconv.runtime.output_origins import Join

if TYPE_CHECKING:
    import onnx

PASSED_OPS = frozenset({"Identity", "Cast", "QuantizeLinear", "DequantizeLinear", "Dropout"})

MOST_STEPS = 16
"""Most steps back from an output."""


def find_joins(proto: onnx.ModelProto) -> dict[str, Join]:
    """The join of each output that ends in one, by name. Shapes that onnx does not infer leave an output out."""
    producers = {name: node for node in proto.graph.node for name in node.output}
    if not any(_find_concat(output.name, producers) for output in proto.graph.output):
        return {}
    plain = type(proto)()
    plain.CopyFrom(proto)
    detach_weights(plain)
    try:
        graph = infer_shapes(plain).graph
    except Exception:  # a C++ exception of no fixed type: loading says what is the matter
        return {}
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
    found = {output.name: _find_join(output.name, producers, shapes) for output in proto.graph.output}
    return {name: join for name, join in found.items() if join is not None}


def _find_concat(name: str, producers: dict[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    for _ in range(MOST_STEPS):
        node = producers.get(name)
        if node is None or node.op_type == "Concat":
            return node
        if node.op_type not in PASSED_OPS | {"Transpose"}:
            return None
        name = node.input[0]
    return None


def _find_join(name: str, producers: dict[str, onnx.NodeProto], shapes: dict[str, list[int]]) -> Join | None:
    order: list[int] | None = None  # where each axis of the output lies in the tensor at hand
    for _ in range(MOST_STEPS):
        node = producers.get(name)
        if node is None:
            return None
        if node.op_type == "Concat":
            return _read_concat(node, order, producers, shapes)
        if node.op_type == "Transpose":
            moved = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
            if not moved:
                return None
            order = moved if order is None else [moved[axis] for axis in order]
        elif node.op_type not in PASSED_OPS:
            return None
        name = node.input[0]
    return None


def _read_concat(
    node: onnx.NodeProto, order: list[int] | None, producers: dict[str, onnx.NodeProto], shapes: dict[str, list[int]]
) -> Join | None:
    known = [shapes.get(name, []) for name in node.input]
    rank = len(known[0])
    axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
    axis += rank if axis < 0 else 0
    if not rank or any(len(shape) != rank for shape in known):
        return None
    inner = {_find_join(name, producers, shapes) for name in node.input}
    (only,) = inner if len(inner) == 1 else (None,)
    found = only
    if found is None or found.axis == axis:
        sizes = tuple(shape[axis] for shape in known)
        found = Join(axis, sizes) if all(sizes) and axis else None
    if found is None or order is None:
        return found
    return replace(found, axis=order.index(found.axis))
