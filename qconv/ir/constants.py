"""This module makes initializers of Constant nodes, and of nodes whose inputs are all constant.

Bodies of If and Loop are left as they are. Nodes that draw random numbers are never computed here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from qconv.errors import Change, format_count
from qconv.ir.chance import RANDOM_SOURCES
from qconv.ir.model import Model, Value, attribute, constant_array, ir


def lift_constants(model: Model) -> list[Change]:
    """Make initializers of the main graph's Constant nodes, but for outputs of the model and texts."""
    lifted = 0
    for node in model.nodes():
        if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
            continue
        tensor = _constant_tensor(node)
        old = node.outputs[0]
        if tensor is None or old.is_graph_output():
            continue
        name = old.name or "constant"
        old.name = model.fresh(f"{name}_node")
        new = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
        )
        model.graph.register_initializer(new)
        model.redirect(old, new)
        model.remove(node)
        lifted += 1
    return [Change("load", "Constant", f"{format_count(lifted, 'Constant node')} made initializers")] if lifted else []


_CONSTANT_ATTRIBUTES: dict[str, Any] = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
}


def _constant_tensor(node: ir.Node) -> ir.TensorProtocol | None:
    """Return the tensor of a Constant node; None for texts and for attributes that are not known."""
    if "value" in node.attributes:
        return node.attributes["value"].as_tensor()
    for name, dtype in _CONSTANT_ATTRIBUTES.items():
        if name in node.attributes:
            return ir.tensor(np.asarray(attribute(node, name), dtype))
    return None


def fold_constant_nodes(model: Model) -> list[Change]:
    """Compute nodes that depend on no input once, by ONNX Runtime, and make initializers of their results."""
    constant = _constant_nodes(model)
    chosen = set(constant)
    wanted = [
        value
        for node in constant
        for value in node.outputs
        if not value.is_graph_output() and any(use.node not in chosen for use in value.uses())
    ]
    if not wanted:
        return []
    results = _evaluate_nodes(model, constant, wanted)
    for value, numbers in zip(wanted, results, strict=True):
        freeze(model, value, numbers)
    model.sweep()
    return [Change("load", "constants", f"{len(constant)} nodes that depend on no input computed")]


def freeze(model: Model, value: ir.Value, numbers: np.ndarray) -> ir.Value:
    """Let all read a constant of the same name in the place of what a node computes, which no output may be."""
    name = value.name or ""
    value.name = model.fresh(f"{name}_computed")
    fixed = ir.tensor(numbers, name=name)
    new = ir.Value(name=name, type=ir.TensorType(fixed.dtype), shape=ir.Shape(numbers.shape), const_value=fixed)
    model.graph.register_initializer(new)
    model.redirect(value, new)
    return new


def expand_tables(model: Model) -> list[ir.Value]:
    """Put constants in the place of the tables that `passes.compress_constants` writes. Returns the constants."""
    expanded = []
    for node in model.nodes():
        table, index = (node.inputs[0], node.inputs[1]) if node.op_type == "Gather" else (None, None)
        cast = None if index is None else index.producer()
        stored = None if cast is None or cast.op_type != "Cast" else cast.inputs[0]
        codes, entries = (None if value is None else constant_array(value) for value in (stored, table))
        if codes is None or entries is None or codes.dtype != np.uint8 or entries.dtype != np.float32:
            continue
        if entries.ndim == 1 and not node.outputs[0].is_graph_output():
            expanded.append(freeze(model, node.outputs[0], entries[codes]))
            model.remove_unread([node])
            for part in (table, stored):
                if part is not None and not part.uses() and not part.is_graph_output():
                    model.graph.initializers.pop(part.name or "", None)
    return expanded


def _constant_nodes(model: Model) -> list[ir.Node]:
    """Find the nodes that read constants alone and give the same tensors every time."""
    known: set[ir.Value] = set()
    nodes = []
    for node in model.nodes():
        bodies = any(
            attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attr in node.attributes.values()
        )
        if bodies or node.op_type in RANDOM_SOURCES or node.domain not in ("", "ai.onnx"):
            continue
        if not all(value.type is None or isinstance(value.type, ir.TensorType) for value in node.outputs):
            continue  # a sequence cannot be an initializer
        if all(value is None or value.is_initializer() or value in known for value in node.inputs):
            nodes.append(node)
            known.update(node.outputs)
    return nodes


def _evaluate_nodes(model: Model, nodes: list[ir.Node], wanted: list[ir.Value]) -> list[np.ndarray]:
    """Run constant nodes in a model of their own. Returns the arrays of `wanted`."""
    from qconv.runtime import session

    read = (value for node in nodes for value in node.inputs if value is not None and value.is_initializer())
    needed = list(dict.fromkeys(read))
    graph = onnx.helper.make_graph(
        [ir.serde.serialize_node(node) for node in nodes],
        "constants",
        [],
        [ir.serde.serialize_value(value) for value in wanted],
        [tensor_proto(value) for value in needed],
    )
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in model.graph.opset_imports.items()]
    small = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=model.inner.ir_version)
    return session.Session(small.SerializeToString(), optimize=False).run_all({})


def tensor_proto(value: Value) -> onnx.TensorProto:
    """A constant as protobuf under its own name, read into memory where it lies in a data file."""
    tensor = value.const_value
    assert tensor is not None
    if isinstance(tensor, ir.ExternalTensor):
        tensor = ir.tensor(tensor.numpy(), dtype=tensor.dtype)
    proto = ir.serde.serialize_tensor(tensor)
    proto.name = value.name or ""
    return proto
