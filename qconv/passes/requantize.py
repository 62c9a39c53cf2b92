"""This pass rounds a tensor twice, to 8 bits and to few bits, where layers read few bits and others read it as well.

Few bits of activations are meant for the inputs of layers; so are the published figures. The stream of a residual
network is read by layers and by the next Add, and on its way through all Adds every rounding error stays to the end:

    x -> 8 bits -> Add                      x -> 8 bits -> few bits -> Conv

An Identity carries the second pair of quantizer and dequantizer.
"""

from __future__ import annotations

from qconv.errors import Change
from qconv.ir.model import Model, Node, Value
from qconv.planning.plan import Plan

REPORT_STEP = "plan"
FULL_PRECISION_BITS = 8


def requantize_for_layers(model: Model, plan: Plan) -> dict[str, str]:
    """Give layers an Identity of their own where others read the same tensor of fewer than 8 bits.

    plan: for the model before. Returns the names of the tensors, each with the name of the Identity's output.
    """
    layers: dict[Value, list[Node]] = {}
    for layer in plan.layers:
        if layer.data is not None and layer.data not in plan.given:
            layers.setdefault(layer.data, []).append(layer.node)
    groups = plan.group_of()
    found: dict[str, str] = {}
    for value, readers in layers.items():
        spec, maker = plan.activations[value].spec, value.producer()
        if spec is None or spec.bits >= FULL_PRECISION_BITS or maker is None or len(groups[value]) > 1:
            continue
        if set(model.readers(value)) == set(readers) and not value.is_graph_output():
            continue
        copy = model.build("Identity", [value], name=f"{value.name}_few_bits", like=value)
        model.insert_after(maker, copy)
        model.redirect(value, copy.outputs[0], readers=readers)
        found[value.name or ""] = copy.outputs[0].name or ""
    return found


def describe_requantization(found: dict[str, str]) -> list[Change]:
    """The changes, for the report."""
    what = "rounded to 8 bits, and once more for the layers that read it"
    return [Change(REPORT_STEP, name, what, "tensors rounded to 8 bits, and once more for layers") for name in found]
