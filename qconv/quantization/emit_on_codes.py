"""Operators that are computed on the codes themselves, between QuantizeLinear and DequantizeLinear.

    Relu, Clip     Clip of codes at the codes of the bounds
    Pad            Pad with the zero point
    SpaceToDepth   Concat of the slices c[:, :, y::2, x::2]
    Resize         by 2, once or more often, nearest neighbour: floor(i / 2), between two Reshapes that change nothing
    a - b          DequantizeLinear(a) + DequantizeLinear(b) with the negated scale, one integer Add

Codes before and behind share scale and zero point, so that all of them give the codes that float would give. Operators
of the standard alone, which ONNX Runtime has for 8 bits from 1.19 (oldest tried) to 1.32: it lacks SpaceToDepth of
uint8 up to 1.26, Max of uint8 up to 1.23 (a Clip is as fast). Reshape keeps it from moving transposes past Resize,
which is fast on NCHW alone: behind layers on NHWC it takes 2.5 to 4 times as long without.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from qconv.ir.model import DataType, Node, Value, attribute, dims, input_of, set_dims
from qconv.ir.rewriting import whole_factors
from qconv.planning.plan import Plan
from qconv.quantization.code_attributes import has_integer_clip_kernel, integer_clip_bounds
from qconv.quantization.dequantizers import DequantizerWriter
from qconv.quantizer import QuantParams

MOST_DOUBLINGS = 3

ONE_CHANGES_NOTHING = [0, 0, 0, -1]
"""The shape that a Reshape of (N, C, H, W) has to be asked for so that it stays as it is."""


def computes_on_codes(node: Node, plan: Plan) -> bool:
    """Whether an operator of the plan works on codes, with no dequantizer in front: those told so, and doublings."""
    if node in plan.on_codes:
        return True
    return node.op_type == "Resize" and node in plan.integer and plan.target.fast_forms and bool(count_doublings(node))


def compute_on_codes(made: DequantizerWriter, node: Node, codes: Value, chosen: QuantParams) -> Value | None:
    """Insert what computes the codes of a node's result behind the node; None for codes that have no kernels.

    codes: of what it reads. chosen: the parameters of both.
    """
    if not has_integer_clip_kernel(chosen):
        return None
    steps = _FORMS[node.op_type](made, node, codes, chosen)
    for before, step in zip([node, *steps], steps, strict=False):
        made.model.insert_after(before, step)
    return steps[-1].outputs[0]


def clip_of_codes(made: DequantizerWriter, codes: Value, chosen: QuantParams, low: int, high: int) -> Node:
    """A Clip of codes that is not in the graph yet."""
    limits = [made.fixed("code_limit", np.asarray(limit, chosen.spec.dtype)) for limit in (low, high)]
    return made.model.build("Clip", [codes, *limits], name=f"{codes.name}_Clip", like=codes)


def subtract_codes(made: DequantizerWriter, node: Node, codes: Value, chosen: QuantParams) -> None:
    """Make an Add of a Sub, which reads the codes of its second input with the negated scale."""
    first, second = node.inputs
    assert second is not None
    negated = replace(chosen, scale=np.asarray(-chosen.scale))
    dequantizer = made.dequantizer(codes, negated, f"{second.name}_negated", second)
    made.model.insert_before(node, dequantizer)
    made.model.become(node, "Add", [first, dequantizer.outputs[0]])


def count_doublings(node: Node) -> int:
    """How often a Resize doubles height and width, as floor(i / 2) each time; 0 for all others."""
    frame, rounding = attribute(node, "coordinate_transformation_mode", ""), attribute(node, "nearest_mode", "")
    factors = whole_factors(node)
    if attribute(node, "mode", "nearest") != "nearest" or (frame, rounding) != ("asymmetric", "floor"):
        return 0
    if factors is None or len(factors) != 4 or factors[:2] != [1, 1] or factors[2] != factors[3]:
        return 0
    doublings = factors[2].bit_length() - 1
    return doublings if factors[2] == 1 << doublings and doublings <= MOST_DOUBLINGS else 0


def _clip(made: DequantizerWriter, node: Node, codes: Value, chosen: QuantParams) -> list[Node]:
    low, high = integer_clip_bounds(chosen, node)
    return [clip_of_codes(made, codes, chosen, int(low), int(high))]


def _pad(made: DequantizerWriter, node: Node, codes: Value, chosen: QuantParams) -> list[Node]:
    zero = made.grid(chosen)[1]
    inputs: list[Value | None] = [codes, input_of(node, 1), zero, input_of(node, 3)]
    while inputs[-1] is None:
        inputs.pop()
    mode = {"mode": attribute(node, "mode", "constant")}
    if mode["mode"] != "constant":
        inputs[2] = None
    pad = made.model.build("Pad", inputs, name=f"{node.name}_codes", attributes=mode, like=node.outputs[0])
    pad.outputs[0].dtype = codes.dtype or DataType.UINT8
    return [pad]


def _take_blocks_apart(made: DequantizerWriter, node: Node, codes: Value, chosen: QuantParams) -> list[Node]:
    """SpaceToDepth: channel (2 y + x) C + c has the codes of channel c at rows 2 i + y and columns 2 j + x."""
    model, result = made.model, node.outputs[0]
    axes, steps = made.fixed("axes", np.array([2, 3], np.int64)), made.fixed("steps", np.array([2, 2], np.int64))
    ends = made.fixed("ends", np.array([np.iinfo(np.int32).max] * 2, np.int64))
    found = []
    for place in itertools.product((0, 1), repeat=2):
        start = made.fixed("start", np.array(place, np.int64))
        part = model.build("Slice", [codes, start, ends, axes, steps], name=f"{node.name}_part", like=codes)
        _halve_sides(part.outputs[0], codes)
        found.append(part)
    parts = [part.outputs[0] for part in found]
    joined = model.build("Concat", parts, name=f"{node.name}_codes", attributes={"axis": 1}, like=result)
    joined.outputs[0].dtype = codes.dtype or DataType.UINT8
    return [*found, joined]


def _halve_sides(result: Value, source: Value) -> None:
    sizes = dims(source)
    set_dims(
        result, None if sizes is None else [*sizes[:2], *(None if side is None else side // 2 for side in sizes[2:])]
    )


def _double(made: DequantizerWriter, node: Node, codes: Value, chosen: QuantParams) -> list[Node]:
    model, name = made.model, f"{node.name}_codes"
    same = made.fixed("same_shape", np.array(ONE_CHANGES_NOTHING, np.int64))
    twice = made.fixed("twice", np.array([1, 1, 2, 2], np.float32))
    form = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    found = [model.build("Reshape", [codes, same], name=f"{name}_in", like=codes)]
    for _ in range(count_doublings(node)):
        before = found[-1].outputs[0]
        found.append(model.build("Resize", [before, None, twice], name=name, attributes=form, like=before))
        sizes = dims(before)
        if sizes is not None:
            set_dims(found[-1].outputs[0], [*sizes[:2], *(None if side is None else 2 * side for side in sizes[2:])])
    last = found[-1].outputs[0]
    return [*found, model.build("Reshape", [last, same], name=f"{name}_out", like=last)]


_Form = Callable[[DequantizerWriter, Node, Value, QuantParams], Sequence[Node]]

_FORMS: dict[str, _Form] = {
    "Relu": _clip,
    "Clip": _clip,
    "Pad": _pad,
    "SpaceToDepth": _take_blocks_apart,
    "Resize": _double,
}
