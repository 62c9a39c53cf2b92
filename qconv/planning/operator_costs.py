"""Looks up what an operator costs in a table of measured costs, by its kind, its channels and its work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from qconv.config.targets import CostTable
from qconv.ir.fast_pools import may_be_layer
from qconv.ir.model import Node, Value, attribute, constant_array, input_of
from qconv.planning.plan import FASTER

Shapes = Mapping[str, tuple[int, ...]]

DEPTHWISE_BLOCK, DEPTHWISE_REST_FACTOR = 16, 1.8
"""The integer kernel takes 16 channels at once. With a rest it takes longer than with as many more: 24 channels take
1.5 times as long as 32. Measured on ONNX Runtime 1.32 with VNNI, kernels of 3 and 5; the table has whole blocks."""

STEM_CHANNELS = 4  # up to so many input channels a convolution is the first one


@dataclass(frozen=True, slots=True)
class NodeCost:
    """Microseconds of one node in float and in integers."""

    float_us: float
    integer_us: float

    measured: bool = False

    def in_words(self) -> str:
        """The reason in words why the node stays float."""
        where = "measured here" if self.measured else "by the cost table"
        return f"{FASTER}: {self.float_us:.0f} us against {self.integer_us:.0f} {where}"


def look_up_cost(node: Node, shapes: Shapes, table: CostTable, kind: str | None = None) -> NodeCost | None:
    """The cost of a node by the table; None where it has none. kind: another line of the table than the node's own."""
    found = _work_units(node, shapes)
    if found is None or (kind or found[0]) not in table:
        return None
    own, channels, work = found
    kind = kind or own
    cost = interpolate_cost(table[kind], channels, work)
    if kind.startswith("depthwise") and channels > DEPTHWISE_BLOCK and channels % DEPTHWISE_BLOCK:
        return replace(cost, integer_us=DEPTHWISE_REST_FACTOR * cost.integer_us)
    return cost


def interpolate_cost(lines: Mapping[int, tuple[float, float, float, float]], channels: float, work: float) -> NodeCost:
    """Interpolate a cost between the table's channels, linearly in their logarithm."""
    known = np.log2(sorted(lines))
    columns = np.array([lines[key] for key in sorted(lines)])
    f_us, f_ns, i_us, i_ns = (float(np.interp(math.log2(max(channels, 1)), known, column)) for column in columns.T)
    return NodeCost(f_us + f_ns * work / 1000, i_us + i_ns * work / 1000)


def switch_cost(value: Value, shapes: Shapes, table: CostTable) -> float:
    """The time in us of one conversion: half of quantizing and dequantizing."""
    shape = shapes.get(value.name or "")
    if shape is None:
        return 0.0
    channels = shape[1] if len(shape) > 1 else 1
    return interpolate_cost(table["switch"], channels, math.prod(shape)).integer_us / 2


def _work_units(node: Node, shapes: Shapes) -> tuple[str, float, float] | None:
    """The kind of a node in the table, its channels, and its units of work; None for unknown kinds."""
    out = shapes.get(node.outputs[0].name or "")
    weight = constant_array(input_of(node, 1))
    if node.op_type in ("Gemm", "MatMul") and out is not None and weight is not None and weight.ndim == 2:
        return "Gemm", math.sqrt(weight.size), math.prod(out[:-1]) * weight.size
    if out is None or len(out) < 3:
        return None
    elements = math.prod(out)
    if node.op_type == "Conv":
        return _conv_work(node, out)
    if node.op_type in ("Add", "Mul"):
        sides = [value for value in node.inputs if value is not None]
        if any(constant_array(value) is not None for value in sides):
            return "mul_constant", out[1], elements
        sizes = [math.prod(shapes.get(value.name or "", ())) for value in sides]
        return ("mul_broadcast" if min(sizes) < elements else node.op_type), out[1], elements
    if may_be_layer(node):
        kernel = attribute(node, "kernel_shape")
        return _depthwise_kind(max(kernel)), out[1], elements * math.prod(kernel)
    if node.op_type in ("AveragePool", "MaxPool"):
        return node.op_type, out[1], elements * math.prod(attribute(node, "kernel_shape", [3, 3])) / 9
    return node.op_type, out[1], elements


def _conv_work(node: Node, out: tuple[int, ...]) -> tuple[str, float, float] | None:
    weight = constant_array(input_of(node, 1))
    if weight is None:
        return None
    outputs, per_group, *kernel = weight.shape
    group = attribute(node, "group", 1)
    macs = math.prod(out) * per_group * math.prod(kernel)
    side = max(kernel)
    if group == 1 and per_group <= STEM_CHANNELS:
        if per_group == 1:
            return ("grey3" if side < 4 else "grey5"), outputs, macs
        return ("stem3" if side < 5 else "stem7"), outputs, macs
    if per_group == 1 and outputs == group:  # with more outputs a group there is no integer kernel of its own
        return _depthwise_kind(side), outputs, macs
    channels = math.sqrt(per_group * outputs / group)
    kind = "conv" if group == 1 else "grouped"
    return f"{kind}{1 if side == 1 else 3}", channels, macs


def _depthwise_kind(side: int) -> str:
    sides = {1: "depthwise1", 2: "depthwise3", 3: "depthwise3", 4: "depthwise5", 5: "depthwise5"}
    return sides.get(side, "depthwise7")
