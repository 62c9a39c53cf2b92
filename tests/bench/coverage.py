"""What ONNX Runtime's optimized graph runs in integers, and which arithmetic stayed float."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
from onnx import TensorProto

INTEGERS = (TensorProto.UINT8, TensorProto.INT8, TensorProto.UINT16, TensorProto.INT16, TensorProto.INT32)
INTEGER_KERNELS = ("QLinear", "QGemm", "MatMulInteger", "ConvInteger", "QAttention", "DynamicQuantizeMatMul")
# They move or convert values and calculate nothing.
MOVERS = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Cast", "Shape"}
    | {"Slice", "Gather", "Identity", "ReorderInput", "ReorderOutput", "Constant", "Expand", "Split", "Dropout"}
)
# The notes on the runtime's kernels say that these can run in integers.
SHOULD_BE_INTEGER = frozenset(
    {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "MaxPool", "Add", "Sum", "GlobalAveragePool"}
    | {"Concat"}
)


def coverage(model: Path) -> dict[str, Any]:
    """{"integer", "float": {operator: count}, "float_nodes": ["op name"], ...}: Q and DQ left over are conversions."""
    graph = optimized(model).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output, *graph.input)}
    integer: Counter[str] = Counter()
    floating: Counter[str] = Counter()
    nodes = []
    for node in graph.node:
        kind = types.get(node.output[0])
        if _integer(node):
            integer[node.op_type] += 1
        elif node.op_type in MOVERS or (node.op_type == "Sum" and len(node.input) == 1):
            continue
        elif kind in INTEGERS:
            integer[node.op_type] += 1
        elif kind == TensorProto.FLOAT:
            floating[node.op_type] += 1
            nodes.append(f"{node.op_type} {node.name}")
    excused = _behind_islands(graph.node)
    conversions = Counter(n.op_type for n in graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear"))
    return {
        "integer": dict(integer),
        "float": dict(floating),
        "float_nodes": nodes,
        "conversions": dict(conversions),
        "should_be_integer": [node for node in nodes if node.split()[0] in SHOULD_BE_INTEGER and node not in excused],
    }


def _behind_islands(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Concats of what operators wrote that have no integer kernel: codes could only be made for the Concat's sake."""
    nodes = list(nodes)
    origin = {name: node for node in nodes for name in node.output}
    able = SHOULD_BE_INTEGER | MOVERS | {"Mul", "Sigmoid", "Softmax", "AveragePool", "LeakyRelu"}
    return {
        f"{node.op_type} {node.name}"
        for node in nodes
        if node.op_type == "Concat"
        and any(
            origin[name].op_type not in able for name in node.input if name in origin and not _integer(origin[name])
        )
    }


def _integer(node: onnx.NodeProto) -> bool:
    return node.op_type.startswith(INTEGER_KERNELS)


def optimized(model: Path) -> onnx.ModelProto:
    """The graph as the runtime runs it here, all optimizations on."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        options = ort.SessionOptions()
        options.log_severity_level = 3  # it warns that such a file suits this machine only
        options.optimized_model_filepath = str(path)
        ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return onnx.load(path)
