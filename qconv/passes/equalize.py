"""Scales move between layers, so that the channels of the tensor in between fill one quantization range evenly.

A BatchNormalization behind an activation, Conv -> ReLU -> BatchNormalization -> Conv, folds into the second Conv.
Folded as a whole it leaves the tensor in between as it was, where some channels may be a thousand times smaller than
others: one scale for all of them loses the small ones, whose weights then blow the loss up. Its gain is split:

    gain * relu(x) = sign(gain) * relu(|gain| x)

|gain| goes into the layer before the activation, which is exact wherever the operators in between are positively
homogeneous, f(s x) = s f(x) for s > 0; only sign and shift are left to the layer behind.

Source: the homogeneity argument of Nagel et al. 2019, arXiv 1906.04721, section 4.1.
"""

from __future__ import annotations

import numpy as np

from qconv.errors import Change
from qconv.ir.layers import (
    INPUTS_FIRST,
    Float64,
    Layer,
    check_finite,
    read_affine,
    read_layer,
    scale_outputs,
    transform_channel_stats,
    write_layer,
)
from qconv.ir.model import Model, Node, Value, rank, set_attribute
from qconv.ir.rewriting import (
    EditRefused,
    data_input,
    describe_node,
    each_node,
    standard_op_type,
    title,
    uses_only_first_output,
)

HOMOGENEOUS = frozenset({"Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool"})


def layer_before(model: Model, value: Value) -> Layer | None:
    """The layer whose output channels `value` carries, seen through homogeneous operators that nothing else reads."""
    node, seen_activation = value.producer(), False
    while node is not None and standard_op_type(node) in HOMOGENEOUS and uses_only_first_output(node):
        seen_activation = True
        below = node.inputs[0]
        if below is None or model.sole_reader(below) is not node:
            return None
        node = below.producer()
    if (
        not seen_activation
        or node is None
        or standard_op_type(node) not in INPUTS_FIRST
        or standard_op_type(node) == "MatMul"
    ):
        return None
    return read_layer(node)


def split_gain(gain: Float64) -> tuple[Float64, Float64]:
    """(magnitude, rest) with magnitude > 0 and magnitude * rest == gain; a gain of zero has magnitude 1."""
    magnitude = np.where(gain == 0, 1.0, np.abs(gain))
    return magnitude, np.sign(gain)


@each_node("equalize", "BatchNormalization")
def move_gains_back(model: Model, node: Node) -> list[Change]:
    """The magnitude of a BatchNormalization's gain goes into the layer in front of the activation before it."""
    data = node.inputs[0]
    if data is None or model.sole_reader(data) is not node:
        return []
    layer = layer_before(model, data)
    if layer is None:
        return []
    affine = read_affine(node, rank(data))
    magnitude, rest = split_gain(affine.gain)
    if np.all(magnitude == 1):
        return []
    if magnitude.size != layer.outputs:
        raise EditRefused(f"{describe_node(layer.node)} has another number of channels")
    layer = scale_outputs(layer, magnitude, np.zeros(1))
    check_finite(layer)
    write_layer(model, layer)
    between = data.producer()
    while between is not None and between is not layer.node:  # writing the layer has moved the note of its output
        transform_channel_stats(between.outputs[0], magnitude, np.zeros(1))
        between = data_input(between).producer()
    numbers = {1: rest, 2: affine.shift, 3: np.zeros_like(rest), 4: np.ones_like(rest)}
    for index, values in numbers.items():
        model.set_input(node, index, model.constant(f"{title(node)}_{index}", values.astype(np.float32)))
    set_attribute(node, "epsilon", 0.0)
    moved = "moved in front of the activation"
    return [
        Change(
            "equalize", title(layer.node), f"scale of {describe_node(node)} {moved}", f"scale of {node.op_type} {moved}"
        )
    ]
