"""Writes the channels that a plan pads the codes of its layers with into the quantized graph.

It is the last step: what learns or measures weights, and what compares tensors, has the network's own shapes.
"""

from __future__ import annotations

from qconv.errors import Change, Finding
from qconv.ir.fast_forms import pad_layer
from qconv.ir.model import Model, Value
from qconv.planning.plan import Plan


def pad_channels(model: Model, plan: Plan) -> list[Finding]:
    """Pad the layers of an emitted model in place. Returns which were."""
    found: list[Finding] = []
    made: dict[Value, Value] = {}
    for layer in plan.layers:
        if layer.padded and pad_layer(model, layer.node, layer.padded, made):
            what = f"input padded to {layer.padded} channels on codes"
            found.append(Change("pad", layer.node.name or "", what))
    if found:
        model.sweep()
    return found
