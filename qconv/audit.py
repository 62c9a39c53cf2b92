"""What the runtime really runs: its own optimized graph, counted, and every node that stayed float with the reason.

ONNX Runtime turns DequantizeLinear -> operator -> QuantizeLinear into one integer operator where its rules allow it.
The graph that it will run is the only proof that they did.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx

from qconv.graph import Value, input_of
from qconv.params import Params
from qconv.plan import Plan
from qconv.quant import PerBlock, PerChannel, QuantParams
from qconv.report import Audit, Island, TensorRow
from qconv.rules import ACTIVATIONS

INTEGER_OPS = frozenset({"QGemm", "MatMulIntegerToFloat", "ConvInteger", "MatMulInteger", "DynamicQuantizeMatMul"})
CONVERTING_OPS = frozenset({"QuantizeLinear", "DequantizeLinear", "Constant", "ReorderInput", "ReorderOutput"})
FLOATS = frozenset({onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE})
SHAPE_OPS = frozenset({"Shape", "Size", "ConstantOfShape", "Range", "NonZero"})
SUFFIX = re.compile(r"(_token_\d+|_nchwc|_nhwc)+$")


def audit(optimized: Path, plan: Plan) -> Audit:
    """Count the nodes of the graph that ONNX Runtime saved as `optimized`, and explain those in float."""
    graph = onnx.load(str(optimized), load_external_data=False).graph
    kept = {name: choice.why for name, choice in plan.kept.items()}
    islands = []
    integer, others = sort_nodes(graph)
    own = set(plan.writers.values())
    for node in others:
        name = SUFFIX.sub("", node.name or _first(node.output))
        if node.op_type == "Transpose" and name not in own:  # the runtime's own, between layouts
            continue
        if name not in kept:  # fused nodes and those in a layout of the runtime's own are called after their output
            name = plan.writers.get(name, name)
        if node.op_type not in ACTIVATIONS:
            name = plan.activation_of.get(name, name)
        islands.append(Island(name, node.op_type, kept.get(name, "ONNX Runtime found no integer kernel for it")))
    return Audit(len(integer), len(islands), tuple(islands))


def sort_nodes(graph: onnx.GraphProto) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto]]:
    """The nodes that work on codes, and those that work on float data; Q, DQ and work on shapes belong to neither."""
    codes = {value.name for value in graph.input if value.type.tensor_type.elem_type == onnx.TensorProto.UINT8}
    aside: set[str] = {tensor.name for tensor in graph.initializer}
    integer, others = [], []
    for node in graph.node:
        if node.op_type == "Sum" and len(node.input) == 1:  # emit's own copy, which keeps a node in float
            continue
        if node.op_type in CONVERTING_OPS:
            if node.op_type == "QuantizeLinear":
                codes.update(node.output)
            elif _first(node.input) in aside:
                aside.update(node.output)
            continue
        if node.op_type in SHAPE_OPS or all(name in aside or not name for name in node.input):
            aside.update(node.output)
        elif node.op_type.startswith("QLinear") or node.op_type in INTEGER_OPS or _works_on(codes, node):
            integer.append(node)
            if not _writes_float(node):
                codes.update(node.output)
        else:
            others.append(node)
    return integer, others


def _works_on(codes: set[str], node: onnx.NodeProto) -> bool:
    """Whether a node reads codes and, unlike a Cast of pixels, does not make numbers of them."""
    return _first(node.input) in codes and not any(a.name == "to" and a.i in FLOATS for a in node.attribute)


def _writes_float(node: onnx.NodeProto) -> bool:
    """Whether an integer kernel gives its result in float: QGemm without the scale of an output, input 7."""
    return node.op_type == "MatMulIntegerToFloat" or (node.op_type == "QGemm" and not "".join(node.input[7:8]))


def _first(names: Iterable[str]) -> str:
    return next(iter(names), "")


def tensor_rows(plan: Plan, params: Params) -> list[TensorRow]:
    """A row for every quantized tensor: activations in graph order, then weights and biases layer by layer."""
    rows = []
    for value, chosen in params.activations.items():
        rows.append(_row(_name(value), "activation", chosen, plan.activations[value].why))
    for layer in params.layers:
        node = layer.layer.node
        rows.append(_row(_name(node.inputs[1]), "weight", layer.weight, f"weights of {node.name}"))
        if layer.bias_params is not None:
            name = _name(input_of(node, 2)) or f"{node.name}_bias"
            rows.append(_row(name, "bias", layer.bias_params, f"bias of {node.name}, scale s_x * s_w"))
    return rows


def _name(value: Value | None) -> str:
    return "" if value is None else value.name or ""


def _row(name: str, kind: str, chosen: QuantParams, why: str) -> TensorRow:
    spec = chosen.spec
    granularity = {PerChannel: "per-channel", PerBlock: "per-block"}.get(type(spec.granularity), "per-tensor")
    scale, zero = (np.asarray(numbers).tolist() for numbers in (chosen.scale, chosen.zero_point))
    return TensorRow(name, kind, spec.bits, spec.symmetric, granularity, scale, zero, why)
