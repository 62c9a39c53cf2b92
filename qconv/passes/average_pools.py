"""This pass moves an AveragePool in front of the 1x1 Conv before it, where less is computed there.

    W (average of x) + b  =  average of (W x + b)

That holds exactly where the numbers that are averaged have weights that add up to one: where zeros that the pool pads
with are not counted. DenseNet's transitions multiply a quarter as often behind the pool. The other way round nothing is
moved: a Conv in front of a pool has a range that is wide beside the averages, so that its codes lose more.
"""

from __future__ import annotations

from math import prod

from qconv.errors import Change
from qconv.ir.model import Model, Node, attribute, constant_array, dims, set_dims
from qconv.ir.rewriting import (
    data_input,
    describe_node,
    each_node,
    explicit_pads,
    standard_op_type,
    title,
)

MULTIPLICATIONS_A_NUMBER = 70
"""What a number that a pool writes takes, beside multiplications of a 1x1 Conv: 1 ns on codes, which take 0.014."""


@each_node("merge", "AveragePool")
def average_first(model: Model, node: Node) -> list[Change]:
    """Move an AveragePool in front of the 1x1 Conv that it alone reads."""
    value = data_input(node)
    conv = value.producer()
    if conv is None or standard_op_type(conv) != "Conv" or model.sole_reader(value) is not node:
        return []
    if not (_is_pointwise(conv) and _is_average(node) and _gains(conv, node)):
        return []
    source, result, sizes = data_input(conv), node.outputs[0], dims(node.outputs[0])
    read = dims(source)
    if read is None or sizes is None or not model.take_over(result, value):
        return []
    model.set_input(node, 0, source)
    model.insert_before(conv, node)
    model.set_input(conv, 0, result)
    set_dims(value, sizes)
    set_dims(result, [*read[:2], *sizes[2:]])
    what = f"{describe_node(node)} moved in front of it"
    return [Change("merge", title(conv), what, "AveragePool moved in front of a Conv")]


def _is_pointwise(conv: Node) -> bool:
    weights = constant_array(conv.inputs[1])
    if weights is None or weights.ndim != 4 or prod(weights.shape[2:]) != 1:
        return False
    return set(attribute(conv, "strides", [1])) == {1} and not any(explicit_pads(conv, 2) or [1])


def _is_average(pool: Node) -> bool:
    """Whether the weights of all windows add up to one."""
    if not attribute(pool, "count_include_pad", 0):
        return True
    pads = explicit_pads(pool, len(attribute(pool, "kernel_shape")))
    return pads is not None and not any(pads) and not attribute(pool, "ceil_mode", 0)


def _gains(conv: Node, pool: Node) -> bool:
    """Whether the other order takes less, by the sizes of maps; False where they are not known."""
    before, after = dims(data_input(conv)), dims(pool.outputs[0])
    if before is None or after is None or len(before) != 4 or None in before[1:] or None in after[1:]:
        return False
    inputs, *places = (size or 0 for size in before[1:])
    outputs, *fewer = (size or 0 for size in after[1:])
    each = outputs * inputs // attribute(conv, "group", 1)
    saved = (prod(places) - prod(fewer)) * each
    return bool(saved > prod(fewer) * (inputs - outputs) * MULTIPLICATIONS_A_NUMBER)
