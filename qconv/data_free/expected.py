"""What layers read on average, by what BatchNormalization says of itself: no picture is looked at.

A BatchNormalization whose input has the mean mu and the variance var writes, by channel,

    mean = beta        std = |gamma| sqrt(var / (var + eps))

From there means are followed through the operators of RULES. Relu and Clip need a normal variable (normal.py), or a sum
with one. A mean of places has the same mean, but a spread that is not known. Padding with zeros counts as if it were
more of the same, as in bias.py. Where another operator lies between, as MaxPool, nothing is said.

This is done before anything is folded, since folded numbers no longer tell. Every layer is given a note, the means or
why they are not known; whoever scales or shifts what it reads does so with the note, too (layers.py).

Source: Nagel et al. 2019, arXiv 1906.04721, section 4.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from qconv.ir.channel_stats import ChannelDistribution
from qconv.ir.layers import INPUTS_FIRST, affine_data_input, has_input_means, read_affine, read_layer, set_input_means
from qconv.ir.model import Model, Node, Value, attribute, clip_bounds, constant_array, rank
from qconv.ir.rewriting import (
    EditRefused,
    check_reduces_spatial_axes,
    data_input,
    describe_node,
    features_per_channel,
    padded_channels,
    sliced_channels,
    standard_op_type,
)


def note_expected(model: Model) -> None:
    """Give every layer of a model that is not folded yet its note. Layers that have one keep it."""
    walk = Follower(model)
    for node in model.nodes():
        if standard_op_type(node) in INPUTS_FIRST:
            if not has_input_means(node):
                walk.note(node)
            walk.forget(node, f"no BatchNormalization follows {describe_node(node)}")
        else:
            walk.visit(node)


class Follower:
    """One way through the graph. known: what is known of a tensor's channels, or why nothing is."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.known: dict[Value, ChannelDistribution | str] = {}
        self.rules: Mapping[str, Rule] = RULES

    def note(self, node: Node) -> None:
        """Tell a layer what it reads."""
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
        """Find out about the output of anything but a layer."""
        rule = self.rules.get(standard_op_type(node))
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
        """Nothing is known of what a node writes."""
        self.known.update(dict.fromkeys(node.outputs, why))

    def read(self, value: Value) -> ChannelDistribution:
        """What is known of a tensor. Raises Refused."""
        found = self.known.get(value, "no BatchNormalization follows the network's input")
        if isinstance(found, str):
            raise EditRefused(found)
        return found

    # -- what operators do -----------------------------------------------------------------------------------------

    def same(self, node: Node) -> ChannelDistribution:
        """Nothing."""
        return self.read(data_input(node))

    def normalised(self, node: Node) -> ChannelDistribution:
        """Whatever comes in."""
        affine = read_affine(node, rank(data_input(node)))
        mean, var = (constant_array(node.inputs[index]) for index in (3, 4))
        assert mean is not None
        assert var is not None
        seen = ChannelDistribution(mean.astype(np.float64), np.sqrt(np.maximum(var.astype(np.float64), 0.0)))
        return seen.scaled(affine.gain, affine.shift)

    def clip(self, node: Node) -> ChannelDistribution:
        """Of a normal variable alone."""
        found, bounds = self.read(data_input(node)), clip_bounds(node)
        if bounds is None:
            raise EditRefused(f"the bounds of {describe_node(node)} are computed or crossed")
        if found.cut:
            raise EditRefused(f"{describe_node(node)} cuts off what is not normal")
        return found.clipped(*bounds)

    def scale(self, node: Node) -> ChannelDistribution:
        """A constant scale or shift by channel; of two tensors only the sum or the difference."""
        data = affine_data_input(node)
        if data is None:
            return self.sum(node)
        affine, found = read_affine(node, rank(data)), self.read(data)
        if not {affine.gain.size, affine.shift.size} <= {1, found.mean.size}:
            raise EditRefused(f"{describe_node(node)} makes more channels")
        return found.scaled(affine.gain, affine.shift)

    def sum(self, node: Node) -> ChannelDistribution:
        """Of several tensors."""
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
        """Along channels."""
        parts = self._side_by_side(node)
        if attribute(node, "axis") % (rank(data_input(node)) or 1) != 1:
            raise EditRefused(f"{describe_node(node)} joins places")
        return ChannelDistribution.joined(parts)

    def mean_of_places(self, node: Node) -> ChannelDistribution:
        """Pools, unless they count padding in."""
        if standard_op_type(node) == "ReduceMean":
            check_reduces_spatial_axes(node)
        padding = any(attribute(node, "pads", [])) or attribute(node, "auto_pad", "NOTSET").startswith("SAME")
        if padding and attribute(node, "count_include_pad", 0):
            raise EditRefused(f"{describe_node(node)} counts padding in")
        return self.read(data_input(node)).averaged()

    def slice(self, node: Node) -> ChannelDistribution:
        """Some channels, or some places."""
        found = self.read(data_input(node))
        return found.of(sliced_channels(node, found.mean.size))

    def pad(self, node: Node) -> ChannelDistribution:
        """Channels of zeros are known to be zero."""
        sides = [ChannelDistribution(np.zeros(count), np.zeros(count)) for count in padded_channels(node)]
        return ChannelDistribution.joined([sides[0], self.read(data_input(node)), sides[1]])

    def flatten(self, node: Node) -> ChannelDistribution:
        """(N, C, H, W) to (N, C * H * W)."""
        found = self.read(data_input(node))
        return found.of(np.repeat(np.arange(found.mean.size), features_per_channel(self.model, node)))

    def _side_by_side(self, node: Node) -> list[ChannelDistribution]:
        """What is known of all inputs, channels along axis 1 of each."""
        values = [value for value in node.inputs if value is not None]
        if len({rank(value) for value in values}) > 1 or (rank(values[0]) or 0) < 2:
            raise EditRefused(f"{describe_node(node)} takes tensors of different rank")
        return [self.read(value) for value in values]


Rule = Callable[[Any, Node], ChannelDistribution]
RULES: dict[str, Rule] = {
    "BatchNormalization": Follower.normalised,
    **dict.fromkeys(("Identity", "Dropout"), Follower.same),
    **dict.fromkeys(("Relu", "Clip"), Follower.clip),
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), Follower.scale),
    "Sum": Follower.sum,
    "Concat": Follower.concat,
    **dict.fromkeys(("AveragePool", "GlobalAveragePool", "ReduceMean"), Follower.mean_of_places),
    "Slice": Follower.slice,
    "Pad": Follower.pad,
    **dict.fromkeys(("Flatten", "Reshape", "Squeeze"), Follower.flatten),
}
"""Operators behind which a mean is known."""
