"""What tensors are like, channel by channel, by what BatchNormalization says: statistics without a picture.

A BatchNormalization knows its input (running mean and variance) and so its output (beta and gamma). Before anything is
folded, both tensors get a note (layers.py), which folding and equalization keep true. Afterwards the folded network is
walked from these notes through the operators of RULES:

    Relu, Clip                  in closed form (normal.py)         Add, Mul        as if independent
    Sigmoid, HardSwish, ...     by quantiles                       Concat, Slice   channel by channel
    MaxPool, Resize             values that were there before      mean of places  WIDTH_OF_MEANS of the deviation

What stands before a Relu whose output a BatchNormalization reads follows from that: two moments, two unknowns. Layers
without a BatchNormalization behind them are guessed by their weights,

    E[y] = W E[x] + b       Var[y] = sum over inputs of max(sum_k W_k^2, (sum_k W_k)^2) Var[x]

MOST_GUESSES of them in a row and no more, and none that reads pictures, whose neighbours are anything but independent:
behind a second one deviations were a ninth of what they should be.

Source: Nagel et al. 2019, arXiv 1906.04721, sections 4.1.3 and 4.2 and appendix C.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from math import inf

import numpy as np

from qconv.data_free.expected import RULES, Follower, Rule
from qconv.ir.channel_stats import REACH_DEVIATIONS, ChannelDistribution, infer_before_relu
from qconv.ir.layers import (
    INPUTS_FIRST,
    Float64,
    Layer,
    affine_data_input,
    channel_stats_of,
    read_affine,
    read_layer,
    set_channel_stats,
)
from qconv.ir.model import (
    Model,
    Node,
    Value,
    attribute,
    clip_bounds,
    constant_array,
    constant_scalar,
    dims,
    input_of,
    rank,
)
from qconv.ir.rewriting import (
    EditRefused,
    check_reduces_spatial_axes,
    data_input,
    describe_node,
    split_channels,
    standard_op_type,
)

MOST_GUESSES = 1
WIDTH_OF_MEANS = 0.5
"""Deviation of means over a map beside that of its places, which are far from independent. 0.35 to 0.47 were seen in
ResNet-20, MobileNetV2 and EfficientNet-Lite0."""


def note_told(model: Model) -> None:
    """Give the tensors around every BatchNormalization of a model that is not folded yet their notes."""
    for node in model.nodes():
        if standard_op_type(node) != "BatchNormalization":
            continue
        try:
            affine = read_affine(node, rank(data_input(node)))
        except EditRefused:
            continue
        mean, var = (constant_array(node.inputs[index]) for index in (3, 4))
        assert mean is not None
        assert var is not None
        if not mean.any() and (var == 1).all():
            continue  # where training starts: never measured
        seen = ChannelDistribution(mean.astype(np.float64), np.sqrt(np.maximum(var.astype(np.float64), 0.0)))
        set_channel_stats(node.outputs[0], seen.scaled(affine.gain, affine.shift))
        _note_input(data_input(node), seen)


def _note_input(value: Value, seen: ChannelDistribution) -> None:
    node = value.producer()
    if channel_stats_of(value) is None:
        set_channel_stats(value, seen)
    if node is None or standard_op_type(node) != "Relu" or channel_stats_of(data_input(node)) is not None:
        return
    before = data_input(node).producer()
    if before is not None and standard_op_type(before) in INPUTS_FIRST:
        assert seen.std is not None
        set_channel_stats(data_input(node), infer_before_relu(seen.mean, seen.std))


def told(model: Model, inputs: Mapping[Value, ChannelDistribution]) -> dict[Value, ChannelDistribution | str]:
    """What is known of every tensor of a folded model, or why nothing is. inputs: of the network's own inputs.

    Deviations are known of all that is.
    """
    walk = _Told(model, inputs)
    for node in model.nodes():
        walk.visit(node)
    return walk.known


def reach(found: ChannelDistribution) -> tuple[Float64, Float64]:
    """The least and the largest value of each channel, (C,) both: FARTHEST deviations away, or cut off before."""
    if found.table is not None:
        return found.ends
    low, high = found.at(np.array([-REACH_DEVIATIONS, REACH_DEVIATIONS]))
    return low, high


class _Told(Follower):
    """The walk. Unlike `Follower`, it begins at notes and goes through layers."""

    def __init__(self, model: Model, inputs: Mapping[Value, ChannelDistribution]) -> None:
        super().__init__(model)
        self.known.update(inputs)
        self.rules = RULES_OF_ALL

    def visit(self, node: Node) -> None:
        """As `Follower` does; a note on the output counts more than what follows from the inputs."""
        if standard_op_type(node) == "Split":
            self._split(node)
            return
        super().visit(node)
        noted, follows = channel_stats_of(node.outputs[0]), self.known[node.outputs[0]]
        if noted is None or standard_op_type(node) in INPUTS_FIRST:
            return
        if isinstance(follows, ChannelDistribution) and follows.mean.shape == noted.mean.shape:
            self.known[node.outputs[0]] = replace(follows, mean=noted.mean, std=noted.std, guesses=0)
        else:
            bounds = clip_bounds(node) or (-inf, inf)
            low, high = (np.full(noted.mean.shape, end) for end in bounds)
            self.known[node.outputs[0]] = replace(noted, cut=bounds != (-inf, inf), low=low, high=high)

    def _split(self, node: Node) -> None:
        try:
            found = self.read(data_input(node))
            parts = split_channels(node, found.mean.size)
        except EditRefused as reason:
            self.forget(node, str(reason))
        else:
            self.known.update({value: found.of(part) for value, part in zip(node.outputs, parts, strict=True)})

    def layer(self, node: Node) -> ChannelDistribution:
        """By its note, or guessed by its weights."""
        return channel_stats_of(node.outputs[0]) or self._guessed(node)

    def _guessed(self, node: Node) -> ChannelDistribution:
        found, layer = self.read(data_input(node)), read_layer(node)
        if found.guesses >= MOST_GUESSES:
            raise EditRefused(f"no BatchNormalization follows {describe_node(node)}, nor those in front of it")
        if (standard_op_type(node) == "MatMul" and rank(data_input(node)) != 2) or found.mean.size != layer.inputs:
            raise EditRefused(f"{describe_node(node)} has its channels along another axis")
        return by_weights(layer, found)

    def clip(self, node: Node) -> ChannelDistribution:
        """What was cut off before counts as normal again, within its ends."""
        bounds = clip_bounds(node)
        if bounds is None:
            raise EditRefused(f"the bounds of {describe_node(node)} are computed or crossed")
        found = self.read(data_input(node))
        return replace(found, cut=False).clipped(*bounds)

    def mean_of_places(self, node: Node) -> ChannelDistribution:
        """Pools."""
        if standard_op_type(node) == "ReduceMean":
            check_reduces_spatial_axes(node)
        found = self.read(data_input(node))
        assert found.std is not None
        return replace(found.averaged(), std=WIDTH_OF_MEANS * found.std)

    def places(self, node: Node) -> ChannelDistribution:
        """Some of the places, or values between them."""
        found, sizes = self.read(data_input(node)), dims(node.outputs[0])
        kept = sizes is None or len(sizes) < 2 or sizes[1] in (None, found.mean.size)
        if not kept or attribute(node, "coordinate_transformation_mode", "") == "tf_crop_and_resize":
            raise EditRefused(f"{describe_node(node)} may mix channels")
        return found

    def pad(self, node: Node) -> ChannelDistribution:
        """Places may be filled with any number."""
        widths, fill = constant_array(input_of(node, 1)), constant_scalar(input_of(node, 2))
        if fill is None or widths is None or input_of(node, 3) is not None or widths.reshape(2, -1)[:, :2].any():
            return super().pad(node)
        found = self.read(data_input(node))
        low, high = found.ends
        return replace(found, low=np.minimum(low, fill), high=np.maximum(high, fill))

    def pixels(self, node: Node) -> ChannelDistribution:
        """The network's input in other axes: what is told of it is by channel, wherever these lie."""
        if not data_input(node).is_graph_input():
            raise EditRefused(f"{describe_node(node)} moves channels")
        return self.read(data_input(node))

    def dequantized(self, node: Node) -> ChannelDistribution:
        """Codes that come from outside, as pixels do."""
        found, scale, zero = (
            self.read(data_input(node)),
            constant_array(node.inputs[1]),
            constant_array(input_of(node, 2)),
        )
        if scale is None or scale.size not in (1, found.mean.size):
            raise EditRefused(f"the scales of {describe_node(node)} are computed, or not of its channels")
        gain = scale.reshape(-1).astype(np.float64)
        shift = np.zeros(1) if zero is None else -gain * zero.reshape(-1).astype(np.float64)
        return found.scaled(gain, shift)

    def function(self, node: Node) -> ChannelDistribution:
        """Of each number alone. What saturates needs its input no further than that, whatever it is."""
        value = data_input(node)
        if isinstance(self.known.get(value, ""), str) and standard_op_type(node) in SATURATING:
            self.known[value] = self._up_to_saturation(node)
        return self.read(value).through(FUNCTIONS[standard_op_type(node)](node))

    def _up_to_saturation(self, node: Node) -> ChannelDistribution:
        value, sizes = data_input(node), dims(data_input(node)) or []
        if (
            len(sizes) < 2
            or not sizes[1]
            or any(standard_op_type(reader) not in SATURATING for reader in self.model.readers(value))
        ):
            return self.read(value)
        low, high = (np.full(sizes[1], end) for end in SATURATING[standard_op_type(node)](node))
        return ChannelDistribution((low + high) / 2, (high - low) / (2 * REACH_DEVIATIONS), True, low, high)

    def scale(self, node: Node) -> ChannelDistribution:
        """By constants, or the product of two tensors: a gate, which may be made of the other."""
        values = [value for value in node.inputs if value is not None]
        if standard_op_type(node) != "Mul" or affine_data_input(node) is not None or len(values) != 2:
            return super().scale(node)
        for one, other in (values, values[::-1]):
            gate = other.producer()
            if gate is not None and standard_op_type(gate) in FUNCTIONS and data_input(gate) is one:
                return self.read(one).through(partial(_gated, FUNCTIONS[standard_op_type(gate)](gate)))
        return product(*self._side_by_side(node))


def by_weights(layer: Layer, found: ChannelDistribution) -> ChannelDistribution:
    """What a layer makes of independent inputs."""
    assert found.std is not None
    groups = layer.weight.shape[0]
    strides = attribute(layer.node, "strides", [1]) if standard_op_type(layer.node) == "ConvTranspose" else [1]
    weight = layer.weight.astype(np.float64)
    sums = weight.sum(axis=3)  # (G, O/G, I/G)
    met = np.maximum(np.einsum("goik,goik->goi", weight, weight), sums * sums)
    mean = np.einsum("goi,gi->go", sums, found.mean.reshape(groups, -1)).reshape(-1)
    var = np.einsum("goi,gi->go", met, (found.std**2).reshape(groups, -1)).reshape(-1)
    seen = 1 / float(np.prod(strides))  # positions of the kernel that an output of a ConvTranspose meets
    return ChannelDistribution(seen * mean + layer.bias, np.sqrt(seen * var), guesses=found.guesses + 1)


def product(one: ChannelDistribution, other: ChannelDistribution) -> ChannelDistribution:
    """Of two independent tensors with as many channels."""
    if one.mean.size != other.mean.size:
        raise EditRefused("two tensors of different channels are multiplied")
    assert one.std is not None
    assert other.std is not None
    squares = (one.std**2 + one.mean**2) * (other.std**2 + other.mean**2)
    mean = one.mean * other.mean
    corners = np.stack([a * b for a in reach(one) for b in reach(other)])
    std = np.sqrt(np.maximum(squares - mean**2, 0.0))
    guesses = max(one.guesses, other.guesses)
    return ChannelDistribution(mean, std, True, corners.min(axis=0), corners.max(axis=0), guesses=guesses)


def _gated(gate: Callable[[Float64], Float64], x: Float64) -> Float64:
    return x * gate(x)


def _sigmoid(x: Float64) -> Float64:
    return np.asarray((1 + np.tanh(x / 2)) / 2)


def _hard_sigmoid(x: Float64, alpha: float, beta: float) -> Float64:
    return np.asarray(np.clip(alpha * x + beta, 0.0, 1.0))


def _ends_of_ramp(alpha: float, beta: float) -> tuple[float, float]:
    if not alpha > 0:
        raise EditRefused("a HardSigmoid falls")
    return min(-beta / alpha, 0.0), max((1 - beta) / alpha, 0.0)


FUNCTIONS: dict[str, Callable[[Node], Callable[[Float64], Float64]]] = {
    "Sigmoid": lambda node: _sigmoid,
    "Tanh": lambda node: np.tanh,
    "HardSigmoid": lambda node: lambda x: _hard_sigmoid(x, attribute(node, "alpha", 0.2), attribute(node, "beta", 0.5)),
    "HardSwish": lambda node: lambda x: x * _hard_sigmoid(x, 1 / 6, 0.5),
    "LeakyRelu": lambda node: lambda x: np.where(x < 0, attribute(node, "alpha", 0.01) * x, x),
}
"""What they do to a number."""
SATURATING: dict[str, Callable[[Node], tuple[float, float]]] = {
    "Sigmoid": lambda node: (-8.0, 8.0),
    "Tanh": lambda node: (-4.0, 4.0),
    "HardSigmoid": lambda node: _ends_of_ramp(attribute(node, "alpha", 0.2), attribute(node, "beta", 0.5)),
}
"""Where they end: within 0.001 of what they are further out."""
RULES_OF_ALL: dict[str, Rule] = {
    **RULES,
    **dict.fromkeys(INPUTS_FIRST, _Told.layer),
    **dict.fromkeys(("Relu", "Clip"), _Told.clip),
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), _Told.scale),
    **dict.fromkeys(("AveragePool", "GlobalAveragePool", "ReduceMean"), _Told.mean_of_places),
    **dict.fromkeys(("MaxPool", "GlobalMaxPool", "Resize"), _Told.places),
    **dict.fromkeys(FUNCTIONS, _Told.function),
    "Pad": _Told.pad,
    "Cast": _Told.same,
    "Transpose": _Told.pixels,
    "DequantizeLinear": _Told.dequantized,
}
"""Operators that statistics go through."""
