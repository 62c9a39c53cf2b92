"""This module makes float16 and float64 networks float32, between casts at their inputs and outputs, whose types stay.

Codes stand for float32 numbers in all runtimes, and ONNX Runtime has hardly a kernel for layers in float64. A network
is of a type where its inputs or its layers are: float64 in single computations of a float32 network, as of places and
sizes, stays. Numbers beyond float32 become its largest.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np

from qconv.errors import Change
from qconv.ir.model import BODY_TYPES, Model, attribute, ir

FLOAT = int(ir.DataType.FLOAT)

LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})

NAMES = {ir.DataType.FLOAT16: "float16", ir.DataType.DOUBLE: "float64"}


def make_float32(model: Model) -> list[Change]:
    """Rewrite a network of float16 or float64 in place; one of float32 alone stays as it is."""
    graph = model.graph
    values = [value for part in (graph, *graph.subgraphs()) for value in _graph_values(part)]
    kinds = [ir.DataType.FLOAT16] if any(value.dtype == ir.DataType.FLOAT16 for value in values) else []
    if _is_double(model):
        kinds.append(ir.DataType.DOUBLE)
    if not kinds:
        return []
    computed = _computed_kinds(model, kinds)
    edge_in = [value for value in graph.inputs if value.dtype in kinds]
    edge_out = [(value, value.dtype) for value in graph.outputs if value.dtype in kinds and value not in edge_in]
    for value in values:
        if value.dtype in kinds and value not in edge_in:
            value.dtype = ir.DataType.FLOAT
        if value.const_value is not None and value.const_value.dtype in kinds:
            value.const_value = ir.tensor(_as_float32(value.const_value), name=value.name)
    for node in graph.all_nodes():
        _retype_attributes(node, kinds)
    _cast_inputs(model, edge_in)
    for value, kind in edge_out:
        assert kind is not None
        _cast_output(model, value, kind)
    if not computed:  # constants alone were stored so
        return []
    where = " and ".join(NAMES[kind] for kind in kinds if kind in computed)
    what = "the network runs in float32 from here on; inputs and outputs keep their type"
    return [Change("load", where, what)]


def _as_float32(tensor: ir.TensorProtocol) -> np.ndarray:
    numbers, most = np.asarray(tensor.numpy()), np.finfo(np.float32).max
    if numbers.dtype == np.float64:
        numbers = np.where(np.isfinite(numbers), np.clip(numbers, -most, most), numbers)
    return numbers.astype(np.float32)


def _graph_values(graph: ir.Graph) -> list[ir.Value]:
    """Return the inputs, initializers and results of a graph or body, without those of bodies inside it."""
    return [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]


def _is_double(model: Model) -> bool:
    layers = (node for node in model.graph.all_nodes() if node.op_type in LAYERS)
    return any(value is not None and value.dtype == ir.DataType.DOUBLE for node in layers for value in node.inputs) or (
        any(value.dtype == ir.DataType.DOUBLE for value in model.graph.inputs)
    )


def _computed_kinds(model: Model, kinds: Collection[ir.DataType]) -> set[ir.DataType]:
    """The types in which something is computed from the inputs, not only stored or cast."""
    constant = set(model.graph.initializers.values())
    found = {value.dtype for value in model.graph.inputs if value.dtype in kinds}
    for node in model.graph:
        holds_bodies = any(attr.type in BODY_TYPES for attr in node.attributes.values())
        if all(value is None or value in constant for value in node.inputs) and not holds_bodies:
            constant.update(node.outputs)
        else:
            found.update(value.dtype for value in node.outputs if value.dtype in kinds)
    return {kind for kind in found if kind is not None}


def _retype_attributes(node: ir.Node, kinds: Collection[ir.DataType]) -> None:
    """Make the types in a node's attributes float32: that of a Cast or Random, the tensor of a Constant."""
    for name in ("to", "dtype", "output_dtype"):
        if attribute(node, name) in {int(kind) for kind in kinds}:
            node.attributes[name] = ir.AttrInt64(name, FLOAT)
    tensor = attribute(node, "value")
    if tensor is not None and getattr(tensor, "dtype", None) in set(kinds):
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(_as_float32(tensor)))


def _cast_inputs(model: Model, edge: Iterable[ir.Value]) -> None:
    for value in edge:
        uses = tuple(value.uses())
        cast = model.build("Cast", [value], name=f"{value.name}_float32", attributes={"to": FLOAT}, like=value)
        cast.outputs[0].dtype = ir.DataType.FLOAT
        for use in uses:
            use.node.replace_input_with(use.idx, cast.outputs[0])
        model.insert_first(cast)


def _cast_output(model: Model, value: ir.Value, kind: ir.DataType) -> None:
    name = value.name or ""
    value.name = model.fresh(f"{name}_float32")
    cast = model.build("Cast", [value], name=f"{name}_{NAMES[kind]}", attributes={"to": int(kind)}, like=value)
    cast.outputs[0].dtype = kind
    cast.outputs[0].name = name
    producer = value.producer()
    if producer is None:
        model.insert_first(cast)
    else:
        model.insert_after(producer, cast)
    outputs = model.graph.outputs
    outputs[list(outputs).index(value)] = cast.outputs[0]
