"""What layers read with few bits, and others as well, is rounded twice: to 8 bits, and from there for the layers.

Few bits of activations are those of what layers read; so are the published figures. The stream of a residual network is
read by layers and by the next Add, and in what goes on through all Adds every rounding error stays to the end:

    x -> 8 bits -> Add                      x -> 8 bits -> few bits -> Conv

An Identity carries the second one.
"""

from __future__ import annotations

from qconv.errors import Change
from qconv.ir.model import Model, Node, Value
from qconv.planning.plan import Plan

REPORT_STEP = "plan"
FULL_PRECISION_BITS = 8


def requantize_for_layers(model: Model, plan: Plan) -> dict[str, str]:
    """Give layers an Identity of their own where others read the same tensor of fewer than 8 bits.

    Returns the names of the tensors, each with that of what its layers read now. The plan is for the model before.
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
    """What was done, for the report."""
    what = "rounded to 8 bits, and once more for the layers that read it"
    return [Change(REPORT_STEP, name, what, "tensors rounded to 8 bits, and once more for layers") for name in found]
