"""Counts what a network reads and writes, in place of times, for runtimes whose times nobody has measured here.

    time(n) = b / 8 * sum over t of |t|         t: the tensors that node n reads and writes; b: its bits

An element of 8 bits counts as 1, one of 16 as 2, a float as 4; weights do not count, nor does what is computed. A
tensor between nodes of unlike kinds is converted, once for all its readers, for the number of its elements.
"""

from __future__ import annotations

from math import prod

from qconv.ir.model import Model, Node, Value, constant_array
from qconv.ir.operators import QUANTIZATION_RULES
from qconv.planning.operator_costs import NodeCost, Shapes
from qconv.planning.placement import PlacementProblem, find_tensor_costs
from qconv.planning.plan import Plan, data_inputs

NARROW_BITS = 8


def count_traffic(model: Model, plan: Plan, shapes: Shapes, bits: int) -> PlacementProblem:
    """The problem of dividing a network between 8 bits, as its `integer` costs, and more, as its `float` ones.

    plan: with all in 8 bits that can be. shapes: of all tensors, for one run; one that is not known counts nothing.
    bits: of the nodes that have more.
    """

    def count(value: Value) -> int:
        shape = shapes.get(value.name or "")
        return 0 if shape is None else prod(shape)

    costs: dict[Node, NodeCost | None] = {}
    for node in plan.integer:
        read = {v for v in data_inputs(node, QUANTIZATION_RULES[node.op_type]) if constant_array(v) is None}
        elements = sum(map(count, [*read, *node.outputs]))
        costs[node] = NodeCost(bits / NARROW_BITS * elements, elements)
    return PlacementProblem(costs, find_tensor_costs(model, plan, costs, count))
