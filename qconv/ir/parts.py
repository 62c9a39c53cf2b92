"""Parts of a network as models of their own, and tensors in them rounded with a scale that is fed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from qconv.ir.graph import Model, Node, Value, ir, reads_of, tensor_proto

RAW = "_not_rounded"
LOW, HIGH, SCALE, ZERO = "rounded_low", "rounded_high", "rounded_scale", "rounded_zero"
"""Inputs of a part with rounded tensors: where they are clipped before, and their parameters."""
SWITCH = "rounded_group_{}"
"""Inputs of a part with several groups of such tensors: whether these are rounded."""

Proto = onnx.ModelProto


def part(
    model: Model,
    nodes: Sequence[Node],
    inputs: Mapping[str, tuple[np.dtype[Any], Sequence[int | None]]],
    outputs: Sequence[Value],
) -> Proto:
    """Some nodes of the model in their order. inputs: type and shape of what is fed."""
    read = {value.name: value for node in nodes for value in reads_of(node)}
    graph = onnx.helper.make_graph(
        [ir.serde.serialize_node(node) for node in nodes],
        "part",
        [
            onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(kind), shape)
            for name, (kind, shape) in inputs.items()
        ],
        [ir.serde.serialize_value(value) for value in outputs],
        [tensor_proto(value) for name, value in read.items() if value.is_initializer() and name not in inputs],
    )
    for output in graph.output:  # what was inferred may be wrong for the batch at hand
        output.type.tensor_type.ClearField("shape")
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in model.graph.opset_imports.items()]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=model.inner.ir_version)


def round_within(
    proto: Proto, groups: Sequence[Collection[str]], passed: Collection[str], codes: np.dtype[Any] | None
) -> None:
    """Round tensors of a part, made in it or fed to it. codes: their type, None where there are none.

    groups: of tensors that are rounded together; several have a switch each. passed: what is fed and returned. Whatever
    is rounded or passed is fed under its `raw` name.
    """
    steps = {name: [_copied(name)] for name in passed}
    for index, group in enumerate(groups):
        switch = SWITCH.format(index) if len(groups) > 1 else None
        steps |= {name: _rounding(name) if switch is None else [_switched(name, switch)] for name in group}
        if switch is not None:
            proto.graph.input.append(onnx.helper.make_tensor_value_info(switch, onnx.TensorProto.BOOL, ()))
    _insert(proto.graph, steps)
    if codes is not None:
        kinds = dict.fromkeys((LOW, HIGH, SCALE), onnx.TensorProto.FLOAT)
        kinds[ZERO] = onnx.helper.np_dtype_to_tensor_dtype(codes)
        proto.graph.input.extend(onnx.helper.make_tensor_value_info(n, kind, ()) for n, kind in kinds.items())


def open_inputs(proto: Proto, node: str, inputs: Mapping[int, str]) -> None:
    """Make the node of this name read new float inputs of the part, at these places."""
    kind = onnx.TensorProto.FLOAT
    proto.graph.input.extend(onnx.helper.make_tensor_value_info(wish, kind, None) for wish in inputs.values())
    for found in (found for found in proto.graph.node if inputs and found.name == node):
        for index, wish in inputs.items():
            found.input.extend([""] * (index + 1 - len(found.input)))
            found.input[index] = wish


def raw(name: str, names: Collection[str]) -> str:
    """What a tensor is called before it is rounded, where its name is among these."""
    return name + RAW if name in names else name


def _insert(graph: onnx.GraphProto, steps: Mapping[str, Sequence[onnx.NodeProto]]) -> None:
    """Put nodes behind whatever feeds or makes the tensors of these names; who reads them reads what comes of it."""
    nodes: list[onnx.NodeProto] = []
    for value in graph.input:
        nodes += steps.get(value.name, ())
        value.name = raw(value.name, steps)
    for node in graph.node:
        made = list(node.output)
        del node.output[:]
        node.output.extend(raw(name, steps) for name in made)
        nodes += [node, *(step for name in made for step in steps.get(name, ()))]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def _copied(name: str) -> onnx.NodeProto:
    return onnx.helper.make_node("Identity", [name + RAW], [name])


def _switched(name: str, switch: str) -> onnx.NodeProto:
    """Rounded or not; only what is chosen is computed."""
    branches = {}
    for branch, nodes in (("then_branch", _rounding(name)), ("else_branch", [_copied(name)])):
        result = f"{name}_{branch}"
        nodes[-1].output[0] = result
        branches[branch] = onnx.helper.make_graph(nodes, branch, [], [_untyped(result)])
    return onnx.helper.make_node("If", [switch], [name], **branches)


def _untyped(name: str) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)


def _rounding(name: str) -> list[onnx.NodeProto]:
    inside, codes = f"{name}_inside", f"{name}_codes"
    return [
        onnx.helper.make_node("Clip", [name + RAW, LOW, HIGH], [inside]),
        onnx.helper.make_node("QuantizeLinear", [inside, SCALE, ZERO], [codes]),
        onnx.helper.make_node("DequantizeLinear", [codes, SCALE, ZERO], [name]),
    ]
