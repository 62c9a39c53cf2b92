"""Gates such as SiLU, x * Sigmoid(x), are opened for scales of channels: a depthwise layer of its own gives the gate x.

    z = x * f(x)   =   s * ((x / s) * f(s * (x / s)))

Sigmoid hands no factor on, so x keeps its scale where the gate reads it as it is. Behind a depthwise layer with weights
s, at first 1, it does not: the product hands on what scales x, and `scale_groups` finds in it a stream like any other,
which ends in the layers that read the product. Weights of a depthwise layer have a scale for each channel and 8 bits
hold each of them exactly. Equal channels of x / s have more codes each; the weights behind have fewer, which
`noise_model` weighs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from qconv.calibration.observer import ChannelRanges
from qconv.ir.layers import INPUTS_FIRST, Float64, read_layer
from qconv.ir.metadata import round_log_scale, write_equalization
from qconv.ir.model import Model, Node, Value, rank
from qconv.ir.operators import operator
from qconv.ir.rewriting import standard_op_type
from qconv.passes.equalize import apply_scales, choose_scales, log_scale_bounds
from qconv.passes.noise_model import ChannelObservations, collect_noise_terms
from qconv.passes.scale_groups import find_scale_groups
from qconv.planning.plan import Plan, count_channels


@dataclass(frozen=True, slots=True, eq=False)
class ScalableGate:
    """A gate whose product can be scaled. data: x, which `gate` and `product` alone read."""

    data: Value
    gate: Node
    product: Node


def find_scalable_gates(model: Model) -> list[ScalableGate]:
    """The gates behind layers of a folded model whose products all readers can take scaled, in graph order."""
    found = _find_gates(model)
    trial = model.copy()
    opened = open_gates(trial, [gate.data.name or "" for gate in found])
    groups = find_scale_groups(trial)
    free = {name for name, layer in opened.items() if not groups.fixed[groups.of[_data(layer)]].any()}
    return [gate for gate in found if gate.data.name in free]


def _find_gates(model: Model) -> list[ScalableGate]:
    found = []
    for node in model.nodes():
        data = node.outputs[0] if node.outputs else None
        if standard_op_type(node) not in INPUTS_FIRST or data is None or data.is_graph_output():
            continue
        readers = model.readers(data)
        gates = [reader for reader in readers if operator(standard_op_type(reader)).gates]
        products = [reader for reader in readers if standard_op_type(reader) == "Mul"]
        if len(readers) != 2 or len(gates) != 1 or len(products) != 1 or rank(data) != 4 or not count_channels(data):
            continue
        if set(products[0].inputs) == {data, gates[0].outputs[0]}:
            found.append(ScalableGate(data, gates[0], products[0]))
    return found


def open_gates(model: Model, names: Collection[str]) -> dict[str, Node]:
    """Put a depthwise layer with weights of 1 in front of the gates that read these tensors, which changes nothing.

    Returns the layers by the names of the tensors.
    """
    opened = {}
    for found in _find_gates(model):
        name, channels = found.data.name or "", count_channels(found.data)
        if name in names:
            ones = model.constant(f"{name}_gate_scale", np.ones((channels, 1, 1, 1), np.float32))
            attributes = {"kernel_shape": [1, 1], "group": channels}
            layer = model.build("Conv", [found.data, ones], name=f"{name}_gate", attributes=attributes, like=found.data)
            model.insert_before(found.gate, layer)
            model.set_input(found.gate, 0, layer.outputs[0])
            opened[name] = layer
    return opened


def close_gates(model: Model, opened: Mapping[str, Node]) -> None:
    """Remove those of the layers of `open_gates` whose weights are 1 still."""
    for layer in opened.values():
        if np.all(read_layer(layer).weight == 1):
            model.bypass(layer)


def choose_gate_scales(
    model: Model, plan: Plan, opened: Mapping[str, Node], channels: Mapping[str, ChannelRanges]
) -> dict[str, Float64]:
    """The scales of channels, (C,), with the least noise by the noise model, for opened gates that gain by it.

    plan: of the opened model. channels: what was seen, by tensor; of all inputs of layers and of all products.
    Everything but the gates keeps its scale.
    """
    groups = find_scale_groups(model)
    seen = ChannelObservations(groups, channels)
    of_gates = [groups.of[_data(layer)] for layer in opened.values()]
    allowed = np.zeros(groups.fixed.size, bool)
    for classes in of_gates:
        allowed[classes] = True
    lowest, highest = (np.where(allowed, bound, 0.0) for bound in log_scale_bounds(seen))
    found = choose_scales(groups, collect_noise_terms(model, plan, seen), lowest, highest)
    u = round_log_scale(found.u)
    chosen = {name: np.exp(u[classes]) for name, classes in zip(opened, of_gates, strict=True)}
    return {name: scales for name, scales in chosen.items() if np.any(scales != 1)}


def scale_gates(model: Model, opened: Mapping[str, Node], scales: Mapping[str, Float64]) -> dict[str, Float64]:
    """Divide the channels of x by these scales, (C,), by its name, and what goes with them alike, and record it.

    Returns log s of the channels, (C,), of all tensors that are others now. Raises EditRefused, and changes nothing,
    where the weights would overflow float32.
    """
    groups = find_scale_groups(model)
    own = np.ones(groups.fixed.size)
    for name, wanted in scales.items():
        own[groups.of[_data(opened[name])]] = wanted
    own = np.where(groups.fixed, 1.0, own)
    apply_scales(model, groups, own)
    u = np.log(own)
    moved = {value.name or "": u[classes] for value, classes in groups.of.items() if np.any(u[classes])}
    write_equalization(model.inner.metadata_props, moved, {})
    return moved


def _data(layer: Node) -> Value:
    value = layer.inputs[0]
    assert value is not None
    return value
