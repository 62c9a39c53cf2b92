"""Writes what is for speed alone into the quantized graph: padded channels, averages as layers, and LRN that is fast.

It is the last step: what learns or measures weights, and what compares tensors, has the network's own shapes.
"""

from __future__ import annotations

from collections.abc import Iterator

from qconv.errors import Change, Finding
from qconv.ir.fast_forms import pad_layer
from qconv.ir.fast_normalization import open_normalization
from qconv.ir.fast_pools import pool_to_layer
from qconv.ir.model import Model, Value
from qconv.ir.rewriting import standard_op_type
from qconv.planning.plan import Plan


def write_fast_forms(model: Model, plan: Plan) -> list[Finding]:
    """Write them into an emitted model in place, where the plan has them or the target wants them. Returns which."""
    found: list[Finding] = [*_pad_channels(model, plan)]
    if plan.target.fast_forms:
        found += [*_average_by_layers(model), *_open_normalizations(model)]
    if found:
        model.sweep()
    return found


def _pad_channels(model: Model, plan: Plan) -> Iterator[Change]:
    made: dict[Value, Value] = {}
    for layer in plan.layers:
        if layer.padded and pad_layer(model, layer.node, layer.padded, made):
            what = f"input padded to {layer.padded} channels on codes"
            yield Change("pad", layer.node.name or "", what)


def _average_by_layers(model: Model) -> Iterator[Change]:
    for node in model.nodes():
        if standard_op_type(node) == "AveragePool" and pool_to_layer(model, node):
            yield Change("pool", node.name or "", "AveragePool written as a depthwise Conv of codes")


def _open_normalizations(model: Model) -> Iterator[Change]:
    for node in model.nodes():
        if standard_op_type(node) == "LRN" and open_normalization(model, node):
            yield Change("open", node.name or "", "LRN written as a sum of squares and square roots")
