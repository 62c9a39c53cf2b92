"""Chooses the layers whose input is padded on codes to a multiple of four channels, so that a faster kernel takes it.

    codes (N, 3, H, W) -> (N, 4, H, W)      weights (O, 3, kH, kW) -> (O, 4, kH, kW)

Every sum of products stays what it is, see `ir.fast_forms`. ONNX Runtime's kernel for symmetric
weights (`MlasConvSym`) wants input channels in fours, and at least 16 output channels, in eights without AVX512;
everything else is copied into rows first (im2col). What that gains is measured, see `cost_table.json`: much for few
weights a pixel. The kernel itself is slower than the one for rows where a CPU has no VNNI, so that 7x7 layers lose
there.
"""

from __future__ import annotations

import math
from dataclasses import replace

from qconv.config.targets import CostTable
from qconv.ir.model import Node, attribute, constant_array, dims, input_of
from qconv.planning.operator_costs import NodeCost, interpolate_cost
from qconv.planning.plan import LayerPlan, Plan

FEWEST_OUTPUTS, OUTPUTS_AT_ONCE, INPUTS_AT_ONCE = 16, 8, 4

MEASURED_INPUTS = {1: 1, 2: 1, 3: 3, 5: 6, 6: 6, 7: 6, 9: 9, 10: 9, 11: 9}
"""By the number of input channels: the one that stands for it in the table. More are not measured."""

LARGEST_SMALL_KERNEL = 4

USUAL_SIDE = 112
"""Of the map that a layer writes where the file leaves its size open."""


def choose_padded_layers(plan: Plan) -> None:
    """Set `padded` of the plan's layers that take less time so on the average CPU."""
    if not plan.target.fast_forms or not plan.target.costs:
        return
    for index, layer in enumerate(plan.layers):
        if _may_be_padded(layer, plan):
            cost = _cost_of_both(layer.node, _work(layer.node, None), plan.target.costs)
            if cost is not None and cost.integer_us < cost.float_us:
                inputs = constant_array(layer.node.inputs[1]).shape[1]  # type: ignore[union-attr]
                plan.layers[index] = replace(layer, padded=-(-inputs // INPUTS_AT_ONCE) * INPUTS_AT_ONCE)


def time_of_padded(layer: LayerPlan, out: tuple[int, ...] | None, table: CostTable) -> float:
    """The time of a padded layer over its time without; 1.0 where the table has none. out: the shape of its result."""
    cost = _cost_of_both(layer.node, _work(layer.node, out), table) if layer.padded else None
    return 1.0 if cost is None or not cost.float_us else cost.integer_us / cost.float_us


def _may_be_padded(layer: LayerPlan, plan: Plan) -> bool:
    node, weight = layer.node, input_of(layer.node, 1)
    numbers = constant_array(weight)
    if layer.data is None or node.op_type != "Conv" or (node.name or "") in plan.kept or numbers is None:
        return False
    if numbers.ndim != 4 or attribute(node, "group", 1) != 1 or weight is None or len(weight.uses()) != 1:
        return False
    zero_is_0 = layer.weight.symmetric or layer.moves_zero
    return zero_is_0 and not layer.blocked and not plan.has_channel_scales(layer.data)


def _cost_of_both(node: Node, work: float, table: CostTable) -> NodeCost | None:
    """The time in integers without (`float_us`) and with the channels (`integer_us`); None where that is not measured.

    work: multiplications without them.
    """
    outputs, inputs, *kernel = constant_array(node.inputs[1]).shape  # type: ignore[union-attr]
    if outputs < FEWEST_OUTPUTS or outputs % OUTPUTS_AT_ONCE or inputs not in MEASURED_INPUTS:
        return None
    size = 3 if max(kernel) <= LARGEST_SMALL_KERNEL else 7
    lines = table.get(f"pad{size}_{MEASURED_INPUTS[inputs]}")
    return None if lines is None else interpolate_cost(lines, outputs, work)


def _work(node: Node, out: tuple[int, ...] | None) -> float:
    weight = constant_array(node.inputs[1])
    sides = (dims(node.outputs[0]) or [None] * 4)[2:] if out is None else out[2:]
    batch = 1 if out is None else out[0]
    return float(batch * math.prod(side or USUAL_SIDE for side in sides) * (0 if weight is None else weight.size))
