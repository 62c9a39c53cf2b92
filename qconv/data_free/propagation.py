"""Propagates BatchNorm statistics through the network: means and deviations of tensors without any image.

A BatchNormalization whose input has the mean mu and the variance var writes, by channel,

    mean = beta        std = |gamma| sqrt(var / (var + eps))

Before anything is folded, `set_batchnorm_means` and `set_batchnorm_stats` leave notes (`ir.layers`), which folding and
equalization keep true; folded numbers no longer tell. The folded network is walked from them:

    Relu, Clip                  in closed form (`ir.channel_stats`)     Add, Mul        as if independent
    Sigmoid, HardSwish, ...     by quantiles                            Concat, Slice   channel by channel
    MaxPool, Resize             unchanged                               mean of places  POOLED_STD_SHARE of deviation

`set_batchnorm_means` gives every layer the means of its input, or why they are not known: it needs a normal variable in
front of a Relu or Clip, or a sum with one, and stops at operators such as MaxPool. Padding with zeros counts as more of
the same. The input of a Relu whose output a BatchNormalization reads follows from two moments. A layer without a
BatchNormalization behind it is estimated by its weights

    E[y] = W E[x] + b       Var[y] = sum over inputs of max(sum_k W_k^2, (sum_k W_k)^2) Var[x]

MOST_GUESSED_IN_A_ROW times in a row and no more, and never where it reads images, whose pixels are not independent:
behind a second such layer deviations were a ninth of what they should be.

Source: Nagel et al. 2019, arXiv 1906.04721, sections 4.1.3 and 4.2 and appendix C.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from math import inf
from typing import Any

import numpy as np

from qconv.ir.channel_stats import REACH_DEVIATIONS, ChannelDistribution, infer_before_relu
from qconv.ir.layers import (
    INPUTS_FIRST,
    Float64,
    Layer,
    affine_data_input,
    channel_stats_of,
    has_input_means,
    read_affine,
    read_layer,
    set_channel_stats,
    set_input_means,
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
from qconv.ir.operators import ChannelEffect, operator
from qconv.ir.rewriting import (
    EditRefused,
    check_reduces_spatial_axes,
    data_input,
    describe_node,
    features_per_channel,
    padded_channels,
    sliced_channels,
    split_channels,
    standard_op_type,
)


def set_batchnorm_means(model: Model) -> None:
    """Note the input means of every layer, in a model that is not folded yet. Layers that have a note keep it."""
    walk = MeanPropagation(model)
    for node in model.nodes():
        if standard_op_type(node) in INPUTS_FIRST:
            if not has_input_means(node):
                walk.note(node)
            walk.forget(node, f"no BatchNormalization follows {describe_node(node)}")
        else:
            walk.visit(node)


class MeanPropagation:
    """Propagates means through the graph. known: the distribution of a tensor's channels, or why it is not known."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.known: dict[Value, ChannelDistribution | str] = {}
        self.rules: Mapping[ChannelEffect, PropagationRule] = MEAN_RULES

    def note(self, node: Node) -> None:
        """Note the input means of a layer."""
        try:
            found, layer = self.read(data_input(node)), read_layer(node)
            if standard_op_type(node) == "MatMul" and rank(data_input(node)) != 2:
                raise EditRefused(f"{describe_node(node)} has its channels along another axis")
            if found.mean.size != layer.inputs:
                raise EditRefused(f"{describe_node(node)} has another number of inputs than its data has channels")
        except EditRefused as reason:
            set_input_means(node, str(reason))
        else:
            set_input_means(node, found.mean)

    def visit(self, node: Node) -> None:
        """Compute the distribution of a node's output, for all nodes but layers."""
        effect = operator(standard_op_type(node)).effect
        rule = None if effect is None else self.rules.get(effect)
        if rule is None:
            self.forget(node, f"the mean behind {describe_node(node)} does not follow from BatchNormalization")
            return
        try:
            found = rule(self, node)
        except EditRefused as reason:
            self.forget(node, str(reason))
        else:
            self.known[node.outputs[0]] = found

    def forget(self, node: Node, why: str) -> None:
        """Record why the outputs of a node are not known."""
        self.known.update(dict.fromkeys(node.outputs, why))

    def read(self, value: Value) -> ChannelDistribution:
        """The distribution of a tensor. Raises EditRefused where it is not known."""
        found = self.known.get(value, "no BatchNormalization follows the network's input")
        if isinstance(found, str):
            raise EditRefused(found)
        return found

    # -- what operators do -----------------------------------------------------------------------------------------

    def same(self, node: Node) -> ChannelDistribution:
        """The output is the input."""
        return self.read(data_input(node))

    def normalised(self, node: Node) -> ChannelDistribution:
        """BatchNormalization: mean and deviation from beta and gamma, whatever the input."""
        affine = read_affine(node, rank(data_input(node)))
        mean, var = (constant_array(node.inputs[index]) for index in (3, 4))
        assert mean is not None
        assert var is not None
        seen = ChannelDistribution(mean.astype(np.float64), np.sqrt(np.maximum(var.astype(np.float64), 0.0)))
        return seen.scaled(affine.gain, affine.shift)

    def clip(self, node: Node) -> ChannelDistribution:
        """Relu and Clip: known for a normal variable only."""
        found, bounds = self.read(data_input(node)), clip_bounds(node)
        if bounds is None:
            raise EditRefused(f"the bounds of {describe_node(node)} are computed or crossed")
        if found.cut:
            raise EditRefused(f"{describe_node(node)} cuts off what is not normal")
        return found.clipped(*bounds)

    def scale(self, node: Node) -> ChannelDistribution:
        """Add, Sub, Mul, Div: a constant scale or shift by channel; of two tensors only the sum or the difference."""
        data = affine_data_input(node)
        if data is None:
            return self.sum(node)
        affine, found = read_affine(node, rank(data)), self.read(data)
        if not {affine.gain.size, affine.shift.size} <= {1, found.mean.size}:
            raise EditRefused(f"{describe_node(node)} makes more channels")
        return found.scaled(affine.gain, affine.shift)

    def sum(self, node: Node) -> ChannelDistribution:
        """Sum of several tensors."""
        if standard_op_type(node) not in ("Add", "Sub", "Sum"):
            raise EditRefused(f"the mean behind {describe_node(node)} of two tensors does not follow from theirs")
        total, *others = self._side_by_side(node)
        sign = np.full(1, -1.0 if standard_op_type(node) == "Sub" else 1.0)
        for other in others:
            if other.mean.size != total.mean.size:
                raise EditRefused(f"{describe_node(node)} takes tensors of different channels")
            total = total.plus(other.scaled(sign, np.zeros(1)))
        return total

    def concat(self, node: Node) -> ChannelDistribution:
        """Concat along channels."""
        parts = self._side_by_side(node)
        if attribute(node, "axis") % (rank(data_input(node)) or 1) != 1:
            raise EditRefused(f"{describe_node(node)} joins places")
        return ChannelDistribution.joined(parts)

    def mean_of_places(self, node: Node) -> ChannelDistribution:
        """Average pools, unless they count padding in: the mean stays, the deviation is not known."""
        if standard_op_type(node) == "ReduceMean":
            check_reduces_spatial_axes(node)
        padding = any(attribute(node, "pads", [])) or attribute(node, "auto_pad", "NOTSET").startswith("SAME")
        if padding and attribute(node, "count_include_pad", 0):
            raise EditRefused(f"{describe_node(node)} counts padding in")
        return self.read(data_input(node)).averaged()

    def slice(self, node: Node) -> ChannelDistribution:
        """Slice of channels or places."""
        found = self.read(data_input(node))
        return found.of(sliced_channels(node, found.mean.size))

    def pad(self, node: Node) -> ChannelDistribution:
        """Pad: new channels are zero."""
        sides = [ChannelDistribution(np.zeros(count), np.zeros(count)) for count in padded_channels(node)]
        return ChannelDistribution.joined([sides[0], self.read(data_input(node)), sides[1]])

    def flatten(self, node: Node) -> ChannelDistribution:
        """Flatten (N, C, H, W) to (N, C * H * W)."""
        found = self.read(data_input(node))
        return found.of(np.repeat(np.arange(found.mean.size), features_per_channel(self.model, node)))

    def _side_by_side(self, node: Node) -> list[ChannelDistribution]:
        """The distributions of all inputs, with channels along axis 1."""
        values = [value for value in node.inputs if value is not None]
        if len({rank(value) for value in values}) > 1 or (rank(values[0]) or 0) < 2:
            raise EditRefused(f"{describe_node(node)} takes tensors of different rank")
        return [self.read(value) for value in values]


PropagationRule = Callable[[Any, Node], ChannelDistribution]

MEAN_RULES: dict[ChannelEffect, PropagationRule] = {
    ChannelEffect.NORMALIZE: MeanPropagation.normalised,
    ChannelEffect.SAME: MeanPropagation.same,
    **dict.fromkeys((ChannelEffect.RECTIFY, ChannelEffect.CLIP), MeanPropagation.clip),
    **dict.fromkeys((ChannelEffect.ADD, ChannelEffect.SCALE), MeanPropagation.scale),
    ChannelEffect.SUM: MeanPropagation.sum,
    ChannelEffect.CONCAT: MeanPropagation.concat,
    **dict.fromkeys((ChannelEffect.MEAN_OF_PLACES, ChannelEffect.REDUCE_MEAN), MeanPropagation.mean_of_places),
    ChannelEffect.SLICE: MeanPropagation.slice,
    ChannelEffect.PAD: MeanPropagation.pad,
    ChannelEffect.FLATTEN: MeanPropagation.flatten,
}
"""How means go through operators, by what these do to channels."""


MOST_GUESSED_IN_A_ROW = 1

POOLED_STD_SHARE = 0.5
"""Deviation of a mean over a map, as a share of the deviation of its places, which are far from independent. 0.35 to
0.47 were seen in ResNet-20, MobileNetV2 and EfficientNet-Lite0."""


def set_batchnorm_stats(model: Model) -> None:
    """Note the statistics of input and output of every BatchNormalization, in a model that is not folded yet."""
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
        _set_input_stats(data_input(node), seen)


def _set_input_stats(value: Value, seen: ChannelDistribution) -> None:
    node = value.producer()
    if channel_stats_of(value) is None:
        set_channel_stats(value, seen)
    if node is None or standard_op_type(node) != "Relu" or channel_stats_of(data_input(node)) is not None:
        return
    before = data_input(node).producer()
    if before is not None and standard_op_type(before) in INPUTS_FIRST:
        assert seen.std is not None
        set_channel_stats(data_input(node), infer_before_relu(seen.mean, seen.std))


def propagate_stats(
    model: Model, inputs: Mapping[Value, ChannelDistribution]
) -> dict[Value, ChannelDistribution | str]:
    """The distribution of every tensor of a folded model, or why it is not known.

    inputs: distributions of the network's inputs. Each distribution that is returned has deviations.
    """
    walk = _StatsPropagation(model, inputs)
    for node in model.nodes():
        walk.visit(node)
    return walk.known


def channel_bounds(found: ChannelDistribution) -> tuple[Float64, Float64]:
    """The least and the largest value of each channel, (C,) both: REACH_DEVIATIONS away, or clipped before."""
    if found.table is not None:
        return found.ends
    low, high = found.at(np.array([-REACH_DEVIATIONS, REACH_DEVIATIONS]))
    return low, high


class _StatsPropagation(MeanPropagation):
    """Propagates means and deviations. Unlike `MeanPropagation`, it starts at notes and goes through layers."""

    def __init__(self, model: Model, inputs: Mapping[Value, ChannelDistribution]) -> None:
        super().__init__(model)
        self.known.update(inputs)
        self.rules = STATS_RULES

    def visit(self, node: Node) -> None:
        """See `MeanPropagation.visit`. A note on the output overrides what follows from the inputs."""
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
        """A layer: by the note on its output, or estimated by its weights."""
        return channel_stats_of(node.outputs[0]) or self._guessed(node)

    def _guessed(self, node: Node) -> ChannelDistribution:
        found, layer = self.read(data_input(node)), read_layer(node)
        if found.guesses >= MOST_GUESSED_IN_A_ROW:
            raise EditRefused(f"no BatchNormalization follows {describe_node(node)}, nor those in front of it")
        if (standard_op_type(node) == "MatMul" and rank(data_input(node)) != 2) or found.mean.size != layer.inputs:
            raise EditRefused(f"{describe_node(node)} has its channels along another axis")
        return propagate_through_layer(layer, found)

    def clip(self, node: Node) -> ChannelDistribution:
        """Relu and Clip: a clipped variable counts as normal within its bounds."""
        bounds = clip_bounds(node)
        if bounds is None:
            raise EditRefused(f"the bounds of {describe_node(node)} are computed or crossed")
        found = self.read(data_input(node))
        return replace(found, cut=False).clipped(*bounds)

    def mean_of_places(self, node: Node) -> ChannelDistribution:
        """Average pools: the mean stays, the deviation is POOLED_STD_SHARE of it."""
        if standard_op_type(node) == "ReduceMean":
            check_reduces_spatial_axes(node)
        found = self.read(data_input(node))
        assert found.std is not None
        return replace(found.averaged(), std=POOLED_STD_SHARE * found.std)

    def places(self, node: Node) -> ChannelDistribution:
        """MaxPool and Resize: unchanged."""
        found, sizes = self.read(data_input(node)), dims(node.outputs[0])
        kept = sizes is None or len(sizes) < 2 or sizes[1] in (None, found.mean.size)
        if not kept or attribute(node, "coordinate_transformation_mode", "") == "tf_crop_and_resize":
            raise EditRefused(f"{describe_node(node)} may mix channels")
        return found

    def pad(self, node: Node) -> ChannelDistribution:
        """Pad with any number."""
        widths, fill = constant_array(input_of(node, 1)), constant_scalar(input_of(node, 2))
        if fill is None or widths is None or input_of(node, 3) is not None or widths.reshape(2, -1)[:, :2].any():
            return super().pad(node)
        found = self.read(data_input(node))
        low, high = found.ends
        return replace(found, low=np.minimum(low, fill), high=np.maximum(high, fill))

    def pixels(self, node: Node) -> ChannelDistribution:
        """Transpose of the network's input: its distribution is by channel, whatever the axis."""
        if not data_input(node).is_graph_input():
            raise EditRefused(f"{describe_node(node)} moves channels")
        return self.read(data_input(node))

    def dequantized(self, node: Node) -> ChannelDistribution:
        """DequantizeLinear of codes from outside, such as pixels."""
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
        """Elementwise functions, by quantiles. The input of one that saturates is bounded by the saturation point."""
        value = data_input(node)
        row = operator(standard_op_type(node))
        assert row.function is not None
        if isinstance(self.known.get(value, ""), str) and row.saturates is not None:
            self.known[value] = self._up_to_saturation(node, row.saturates(partial(attribute, node)))
        return self.read(value).through(row.function(partial(attribute, node)))

    def _up_to_saturation(self, node: Node, ends: tuple[float, float] | None) -> ChannelDistribution:
        value, sizes = data_input(node), dims(data_input(node)) or []
        if (
            len(sizes) < 2
            or not sizes[1]
            or any(operator(standard_op_type(reader)).saturates is None for reader in self.model.readers(value))
        ):
            return self.read(value)
        if ends is None:
            raise EditRefused(f"a {node.op_type} falls")
        low, high = (np.full(sizes[1], end) for end in ends)
        return ChannelDistribution((low + high) / 2, (high - low) / (2 * REACH_DEVIATIONS), True, low, high)

    def scale(self, node: Node) -> ChannelDistribution:
        """Add, Sub, Mul and Div by constants, and products of two tensors: a gate, which may depend on the other."""
        values = [value for value in node.inputs if value is not None]
        if standard_op_type(node) != "Mul" or affine_data_input(node) is not None or len(values) != 2:
            return super().scale(node)
        for one, other in (values, values[::-1]):
            gate = other.producer()
            function = None if gate is None else operator(standard_op_type(gate)).function
            if gate is not None and function is not None and data_input(gate) is one:
                return self.read(one).through(partial(_apply_gate, function(partial(attribute, gate))))
        return multiply_distributions(*self._side_by_side(node))


def propagate_through_layer(layer: Layer, found: ChannelDistribution) -> ChannelDistribution:
    """The distribution of a layer's outputs for independent inputs."""
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


def multiply_distributions(one: ChannelDistribution, other: ChannelDistribution) -> ChannelDistribution:
    """The product of two independent tensors with the same number of channels."""
    if one.mean.size != other.mean.size:
        raise EditRefused("two tensors of different channels are multiplied")
    assert one.std is not None
    assert other.std is not None
    squares = (one.std**2 + one.mean**2) * (other.std**2 + other.mean**2)
    mean = one.mean * other.mean
    corners = np.stack([a * b for a in channel_bounds(one) for b in channel_bounds(other)])
    std = np.sqrt(np.maximum(squares - mean**2, 0.0))
    guesses = max(one.guesses, other.guesses)
    return ChannelDistribution(mean, std, True, corners.min(axis=0), corners.max(axis=0), guesses=guesses)


def _apply_gate(gate: Callable[[Float64], Float64], x: Float64) -> Float64:
    return x * gate(x)


STATS_RULES: dict[ChannelEffect, PropagationRule] = {
    **MEAN_RULES,
    ChannelEffect.LAYER: _StatsPropagation.layer,
    **dict.fromkeys((ChannelEffect.RECTIFY, ChannelEffect.CLIP), _StatsPropagation.clip),
    **dict.fromkeys((ChannelEffect.ADD, ChannelEffect.SCALE), _StatsPropagation.scale),
    **dict.fromkeys((ChannelEffect.MEAN_OF_PLACES, ChannelEffect.REDUCE_MEAN), _StatsPropagation.mean_of_places),
    **dict.fromkeys((ChannelEffect.MAX_OF_PLACES, ChannelEffect.RESIZE), _StatsPropagation.places),
    ChannelEffect.FUNCTION: _StatsPropagation.function,
    ChannelEffect.PAD: _StatsPropagation.pad,
    ChannelEffect.CAST: _StatsPropagation.same,
    ChannelEffect.TRANSPOSE: _StatsPropagation.pixels,
    ChannelEffect.DEQUANTIZE: _StatsPropagation.dequantized,
}
"""How distributions go through operators, by what these do to channels."""
