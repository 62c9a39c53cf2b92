"""Which nodes compute on codes of 16 bits where the rest of a network has 8, and which tensors hold such codes.

A tensor has the bits of the node that writes it. Where float or the model's caller writes it, it has 16 bits as soon as
a node that computes on 16 reads it. Readers of the other kind get a copy of their own, see `passes.requantize`; the
Identity that makes a copy is of no kind, and what it writes has the bits of who reads that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

from qconv.config.choices import WIDE_BITS
from qconv.ir.model import Model, Node, Value, constant_array
from qconv.ir.operators import QUANTIZATION_RULES, WeightedRule
from qconv.planning.plan import Plan, data_inputs
from qconv.quantizer import QuantSpec
from qconv.results.precision import PreciseShare

COPY = "Identity"
"""The operator that carries a second pair of quantizer and dequantizer."""


def find_nodes_on_16_bits(plan: Plan) -> set[Node]:
    """The nodes of a plan that compute on 16 bits, while all others have fewer: those in `wide`, and in the recipe.

    A layer that absorbs an activation counts by its own name.
    """
    if plan.recipe.activation_bits >= WIDE_BITS:
        return set()
    named = (node for node in plan.integer if node.op_type != COPY)
    return {node for node in named if node.name in plan.wide or _asks_for_16_bits(plan, node)}


def _asks_for_16_bits(plan: Plan, node: Node) -> bool:
    return plan.recipe.bits_of(node.name or "").activations == WIDE_BITS


def holds_16_bits(model: Model, plan: Plan, value: Value) -> bool:
    """Whether a quantized tensor has 16 bits because nodes around it compute on them."""
    maker = value.producer()
    maker = maker if maker is None else plan.absorbed.get(maker, maker)
    if maker is not None and maker.op_type == "DequantizeLinear":
        return False  # the model's pixels
    if maker in plan.integer and maker is not None and maker.op_type != COPY:
        return maker in plan.on_16_bits
    return any(reader in plan.on_16_bits for reader in model.readers(value))


def specify_constants(plan: Plan, nodes: Iterable[Node], *, symmetric: bool) -> dict[Value, QuantSpec]:
    """How constant operands of integer nodes are quantized, with the bits that their node computes on.

    Those that `reads` leaves in float are not; weights have specs of their own.
    """
    found: dict[Value, QuantSpec] = {}
    for node in nodes if plan.reads is None else ():
        rule = QUANTIZATION_RULES.get(node.op_type)
        if node in plan.integer and rule is not None and not isinstance(rule, WeightedRule):
            wide = plan.recipe.activation_bits == WIDE_BITS or node in plan.on_16_bits
            constants = (value for value in data_inputs(node, rule) if constant_array(value) is not None)
            found |= {value: QuantSpec(WIDE_BITS if wide else 8, False, symmetric) for value in constants}
    return found


def measure_precise_share(plan: Plan, whole: Plan, shapes: Mapping[str, tuple[int, ...]]) -> PreciseShare:
    """The activations of a plan with 16 bits, and those in float that are quantized in another.

    whole: the plan of the undivided network. shapes: of all tensors, for one run; without one a tensor counts as one
    element.
    """
    quantized = {value.name for value in plan.activations}
    floats = [value for value in whole.activations if value.name not in quantized]
    wide = [value for value, choice in plan.activations.items() if choice.spec and choice.spec.bits == WIDE_BITS]
    elements = {value: prod(shapes.get(_shaped_like(value).name or "", ())) for value in (*plan.activations, *floats)}
    precise = [*wide, *floats]
    share = sum(elements[value] for value in precise) / max(1, sum(elements.values()))
    return PreciseShare(len(precise), len(elements), share)


def _shaped_like(value: Value) -> Value:
    """The tensor of the undivided network that a copy is of."""
    maker = value.producer()
    while maker is not None and maker.op_type == COPY and maker.inputs[0] is not None:
        value = maker.inputs[0]
        maker = value.producer()
    return value
