"""Records why layers whose tensors are quantized run in float all the same, by the types and shapes of their codes."""

from __future__ import annotations

from collections.abc import Sequence

from qconv.config.choices import WIDE_BITS
from qconv.ir.model import Node
from qconv.ir.operators import CLIPPING_ACTIVATIONS, QUANTIZATION_RULES, WeightedRule
from qconv.planning.eligibility import NO_16_BIT_KERNEL, explain_dequantized_layer
from qconv.planning.plan import Decision, Plan

NO_CHANNEL_SCALE_KERNEL = "a scale for each channel of the activations has no integer kernel"


def explain_float_execution(nodes: Sequence[Node], plan: Plan) -> None:
    """Complete `kept` and `activation_of` of a plan. nodes: of its network, in order."""
    for layer in plan.layers:
        why = explain_dequantized_layer(layer, plan, plan.recipe)
        if why is not None:
            plan.kept.setdefault(layer.node.name or "", Decision(None, why))
    for node in nodes:
        follower = next((reader for reader, layer in plan.absorbed.items() if layer is node), node)
        touched = [*node.inputs, *node.outputs, *follower.outputs]
        if node in plan.integer and any(plan.has_channel_scales(value) for value in touched):
            plan.kept.setdefault(node.name or "", Decision(None, NO_CHANNEL_SCALE_KERNEL))
    for node in nodes:
        if node in (plan.integer if plan.recipe.activation_bits == WIDE_BITS else plan.on_16_bits):
            plan.kept.setdefault(node.name or "", Decision(None, NO_16_BIT_KERNEL))
    for node, layer_node in plan.absorbed.items():
        if layer_node.name in plan.kept:
            plan.kept.setdefault(node.name or "", plan.kept[layer_node.name])
    for node in nodes:  # fused into the layer before, an activation gives the layer its own name
        before = next((v.producer() for v in node.inputs if v is not None and v.producer() is not None), None)
        if (
            before is not None
            and node.op_type in CLIPPING_ACTIVATIONS
            and isinstance(QUANTIZATION_RULES.get(before.op_type), WeightedRule)
        ):
            plan.activation_of[node.name or ""] = before.name or ""
