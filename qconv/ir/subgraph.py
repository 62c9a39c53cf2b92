"""Extracts parts of a network as models of their own, adds outputs to it, and fake-quantizes tensors in it.

Scales and zero points of the fake quantizers are inputs of the extracted model, so that one session serves all
trials. `runnable_with_outputs` returns further tensors, or the maximum and mean of their channels;
`build_moments_model` returns the mean and mean square of channels only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from qconv.ir.chance import still
from qconv.ir.constants import tensor_proto
from qconv.ir.files import PROTOBUF_LIMIT, full_proto, total_weight_bytes
from qconv.ir.model import Model, Node, Value, ir, is_tensor, values_read_by
from qconv.storage import locked_folder, temporary_path

UNROUNDED_SUFFIX = "_not_rounded"

LOW_INPUT, HIGH_INPUT, SCALE_INPUT, ZERO_POINT_INPUT = "rounded_low", "rounded_high", "rounded_scale", "rounded_zero"
"""Inputs of a part with rounded tensors: where they are clipped before, and their parameters."""

SWITCH_INPUT = "rounded_group_{}"
"""Inputs of a part with several groups of such tensors: whether these are rounded."""

SubgraphProto = onnx.ModelProto


def extract_subgraph(
    model: Model,
    nodes: Sequence[Node],
    inputs: Mapping[str, tuple[np.dtype[Any], Sequence[int | None]]],
    outputs: Sequence[Value],
) -> SubgraphProto:
    """Extract some nodes, in order, as a model. inputs: type and shape of its inputs."""
    read = {value.name: value for node in nodes for value in values_read_by(node)}
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
    for output in graph.output:
        if output.type.HasField("tensor_type"):  # an empty type, of what nobody typed, would be one that is wrong
            output.type.tensor_type.ClearField("shape")  # what was inferred may be wrong for the batch at hand
    still(graph)
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in model.graph.opset_imports.items()]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=model.inner.ir_version)


@dataclass(frozen=True, slots=True)
class Tail:
    """What changes in a network with some of its inputs.

    nodes: in order. reads: tensors of the rest that they read, inputs of the network among them. outputs: names.
    """

    nodes: list[Node]
    reads: list[Value]
    outputs: list[str]

    @property
    def feedable(self) -> bool:
        """Whether all that it reads can be fed: sequences cannot."""
        return all(map(is_tensor, self.reads))

    def extract(self, model: Model, fed: Mapping[str, NDArray[Any]]) -> SubgraphProto:
        """The part as a model. fed: an example of what is fed, by name."""
        kinds = {value.name or "": fed[value.name or ""] for value in self.reads}
        inputs = {name: (array.dtype, [None] * array.ndim) for name, array in kinds.items()}
        made = {value.name: value for node in self.nodes for value in node.outputs}
        return extract_subgraph(model, self.nodes, inputs, [made[name] for name in self.outputs])


def find_tail(model: Model, inputs: Collection[str], outputs: Sequence[str]) -> Tail:
    """What of these outputs, and on the way to them, changes with these inputs of the network."""
    changed = {value for value in model.graph.inputs if value.name in inputs}
    behind: list[tuple[Node, list[Value]]] = []
    for node in model.graph:
        read = values_read_by(node)
        if any(value in changed for value in read):
            behind.append((node, read))
            changed.update(node.outputs)
    needed, nodes = {value for value in changed if value.name in outputs}, []
    for node, read in reversed(behind):
        if any(value in needed for value in node.outputs):
            nodes.append(node)
            needed.update(read)
    made = {value for node in nodes for value in node.outputs}
    reads = sorted((v for v in needed - made if not v.is_initializer()), key=lambda value: value.name or "")
    names = {value.name for value in made}
    return Tail(nodes[::-1], reads, [name for name in outputs if name in names])


def insert_fake_quantize(
    proto: SubgraphProto, groups: Sequence[Collection[str]], passed: Collection[str], codes: np.dtype[Any] | None
) -> None:
    """Fake-quantize tensors of a part, computed in it or its inputs. codes: type of the codes, None without groups.

    groups: of tensors that are rounded together; several have a switch each. passed: what is fed and returned. Whatever
    is rounded or passed is fed under its `unrounded_name`.
    """
    steps = {name: [_identity_node(name)] for name in passed}
    for index, group in enumerate(groups):
        switch = SWITCH_INPUT.format(index) if len(groups) > 1 else None
        steps |= {
            name: _fake_quantize_nodes(name) if switch is None else [_switch_node(name, switch)] for name in group
        }
        if switch is not None:
            proto.graph.input.append(onnx.helper.make_tensor_value_info(switch, onnx.TensorProto.BOOL, ()))
    _insert_after(proto.graph, steps)
    if codes is not None:
        kinds = dict.fromkeys((LOW_INPUT, HIGH_INPUT, SCALE_INPUT), onnx.TensorProto.FLOAT)
        kinds[ZERO_POINT_INPUT] = onnx.helper.np_dtype_to_tensor_dtype(codes)
        proto.graph.input.extend(onnx.helper.make_tensor_value_info(n, kind, ()) for n, kind in kinds.items())


def expose_inputs(proto: SubgraphProto, node: str, inputs: Mapping[int, str]) -> None:
    """Make the node of this name read new float inputs of the part, at these places."""
    kind = onnx.TensorProto.FLOAT
    proto.graph.input.extend(onnx.helper.make_tensor_value_info(wish, kind, None) for wish in inputs.values())
    for found in (found for found in proto.graph.node if inputs and found.name == node):
        for index, wish in inputs.items():
            found.input.extend([""] * (index + 1 - len(found.input)))
            found.input[index] = wish


def unrounded_name(name: str, names: Collection[str]) -> str:
    """The name of a tensor before it is rounded, if it is among `names`; else its own."""
    return name + UNROUNDED_SUFFIX if name in names else name


def _insert_after(graph: onnx.GraphProto, steps: Mapping[str, Sequence[onnx.NodeProto]]) -> None:
    """Put nodes behind whatever feeds or makes the tensors of these names; who reads them reads what comes of it."""
    nodes: list[onnx.NodeProto] = []
    for value in graph.input:
        nodes += steps.get(value.name, ())
        value.name = unrounded_name(value.name, steps)
    for node in graph.node:
        made = list(node.output)
        del node.output[:]
        node.output.extend(unrounded_name(name, steps) for name in made)
        nodes += [node, *(step for name in made for step in steps.get(name, ()))]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def _identity_node(name: str) -> onnx.NodeProto:
    return onnx.helper.make_node("Identity", [name + UNROUNDED_SUFFIX], [name])


def _switch_node(name: str, switch: str) -> onnx.NodeProto:
    """A node that selects the rounded tensor or the other; only the selected one is computed."""
    branches = {}
    for branch, nodes in (("then_branch", _fake_quantize_nodes(name)), ("else_branch", [_identity_node(name)])):
        result = f"{name}_{branch}"
        nodes[-1].output[0] = result
        branches[branch] = onnx.helper.make_graph(nodes, branch, [], [_untyped_value_info(result)])
    return onnx.helper.make_node("If", [switch], [name], **branches)


def _untyped_value_info(name: str) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)


def _fake_quantize_nodes(name: str) -> list[onnx.NodeProto]:
    inside, codes = f"{name}_inside", f"{name}_codes"
    return [
        onnx.helper.make_node("Clip", [name + UNROUNDED_SUFFIX, LOW_INPUT, HIGH_INPUT], [inside]),
        onnx.helper.make_node("QuantizeLinear", [inside, SCALE_INPUT, ZERO_POINT_INPUT], [codes]),
        onnx.helper.make_node("DequantizeLinear", [codes, SCALE_INPUT, ZERO_POINT_INPUT], [name]),
    ]


@dataclass(frozen=True, slots=True)
class ChannelPooling:
    """A tensor (N, C, H, W) of which the network returns maximum and mean of each channel, (N, C, 1, 1).

    stride: also every stride-th pixel in both directions is returned, None for none.
    """

    name: str
    stride: int | None = None

    def nodes(self) -> list[onnx.NodeProto]:
        """What the network is to compute. The runtime keeps large tensors in a layout of its own, in which it can pool
        them; to be returned whole they must be brought into the usual one, which costs as much as a layer."""
        made: list[tuple[str, dict[str, Any]]] = [("GlobalMaxPool", {}), ("GlobalAveragePool", {})]
        if self.stride is not None:
            made.append(("MaxPool", {"kernel_shape": [1, 1], "strides": [self.stride, self.stride]}))
        return [
            onnx.helper.make_node(op_type, [self.name], [result], **attributes)
            for (op_type, attributes), result in zip(made, pooled_output_names(self.name), strict=False)
        ]


def pooled_output_names(name: str) -> tuple[str, str, str]:
    """The output names for maximum and mean of each channel of a tensor, and for the sample of its pixels."""
    return f"{name}/channel_max", f"{name}/channel_mean", f"{name}/sample"


@contextlib.contextmanager
def runnable_with_outputs(
    model: Model, outputs: Iterable[str], poolings: Iterable[ChannelPooling] = ()
) -> Iterator[str | bytes]:
    """The model with `outputs` returned as well, as ONNX Runtime takes it: bytes, or a path where they are too many.

    poolings: tensors that are returned in part, under `pooled_output_names`. Nothing in it is drawn at random.
    """
    wanted = set(outputs) - {value.name for value in model.graph.outputs}
    produced = [value for node in model.graph for value in node.outputs]
    extra = [ir.serde.serialize_value(value) for value in produced if value.name in wanted]
    pools = [node for pooling in poolings for node in pooling.nodes()]
    extra += [onnx.helper.make_tensor_value_info(n.output[0], onnx.TensorProto.FLOAT, None) for n in pools]
    if total_weight_bytes(model) < PROTOBUF_LIMIT:
        proto = full_proto(model)
        still(proto.graph)
        proto.graph.node.extend(pools)
        proto.graph.output.extend(extra)
        data = proto.SerializeToString()
        del proto  # as large as all weights
        yield data
        return
    with locked_folder(temporary_path()) as folder:
        path = folder / "model.onnx"
        ir.save(model.inner, path, external_data="model.data")
        proto = onnx.load(path, load_external_data=False)
        still(proto.graph)
        proto.graph.node.extend(pools)
        proto.graph.output.extend(extra)
        path.write_bytes(proto.SerializeToString())
        yield str(path)


def build_moments_model(model: Model, tensors: Iterable[str]) -> bytes | None:
    """The part of the model that leads to `tensors` (N, C, H, W), as ONNX Runtime takes it.

    It returns the mean of each channel and the mean of its square, (N, C, 1, 1), tensor by tensor; nothing else. None
    where the part holds bodies (If, Loop), or more than one protobuf can.
    """
    wanted = list(tensors)
    nodes = _ancestor_nodes(model, set(wanted))
    read = [value for node in nodes for value in node.inputs if value is not None and value.is_initializer()]
    weights = list({value.name: value for value in read}.values())
    kinds = {attribute.type for node in nodes for attribute in node.attributes.values()}
    bodies = kinds & {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS}
    if bodies or sum(value.const_value.nbytes for value in weights if value.const_value) >= PROTOBUF_LIMIT:
        return None
    protos, results = [ir.serde.serialize_node(node) for node in nodes], []
    for name in wanted:
        for op_type, inputs, result in (
            ("GlobalAveragePool", [name], f"{name}/mean"),
            ("Mul", [name, name], f"{name}/square"),
            ("GlobalAveragePool", [f"{name}/square"], f"{name}/mean_square"),
        ):
            protos.append(onnx.helper.make_node(op_type, inputs, [result]))
        results += [f"{name}/mean", f"{name}/mean_square"]
    graph = onnx.helper.make_graph(
        protos,
        "moments",
        [ir.serde.serialize_value(value) for value in model.graph.inputs],
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in results],
        [tensor_proto(value) for value in weights],
    )
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in model.graph.opset_imports.items()]
    proto = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=model.inner.ir_version)
    data: bytes = proto.SerializeToString()
    return data


def _ancestor_nodes(model: Model, tensors: set[str]) -> list[Node]:
    """The nodes that `tensors` depend on, in order."""
    needed, found = set(tensors), []
    for node in reversed(model.nodes()):
        if any(value.name in needed for value in node.outputs):
            found.append(node)
            needed.update(value.name for value in node.inputs if value is not None and value.name)
    return found[::-1]
