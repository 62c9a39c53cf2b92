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

from qconv.ir.affine import data_of, read_affine
from qconv.ir.channels import check_reduces_places, padded, positions, sliced
from qconv.ir.edits import Refused, called, kind, source
from qconv.ir.graph import Model, Node, Value, array, attribute, clip_bounds, rank
from qconv.ir.layers import INPUTS_FIRST, has_means, note_means, read_layer
from qconv.ir.normal import Normal


def note_expected(model: Model) -> None:
    """Give every layer of a model that is not folded yet its note. Layers that have one keep it."""
    walk = Follower(model)
    for node in model.nodes():
        if kind(node) in INPUTS_FIRST:
            if not has_means(node):
                walk.note(node)
            walk.forget(node, f"no BatchNormalization follows {called(node)}")
        else:
            walk.visit(node)


class Follower:
    """One way through the graph. known: what is known of a tensor's channels, or why nothing is."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.known: dict[Value, Normal | str] = {}
        self.rules: Mapping[str, Rule] = RULES

    def note(self, node: Node) -> None:
        """Tell a layer what it reads."""
        try:
            found, layer = self.read(source(node)), read_layer(node)
            if kind(node) == "MatMul" and rank(source(node)) != 2:
                raise Refused(f"{called(node)} has its channels along another axis")
            if found.mean.size != layer.inputs:
                raise Refused(f"{called(node)} has another number of inputs than its data has channels")
        except Refused as reason:
            note_means(node, str(reason))
        else:
            note_means(node, found.mean)

    def visit(self, node: Node) -> None:
        """Find out about the output of anything but a layer."""
        rule = self.rules.get(kind(node))
        if rule is None:
            self.forget(node, f"the mean behind {called(node)} does not follow from BatchNormalization")
            return
        try:
            found = rule(self, node)
        except Refused as reason:
            self.forget(node, str(reason))
        else:
            self.known[node.outputs[0]] = found

    def forget(self, node: Node, why: str) -> None:
        """Nothing is known of what a node writes."""
        self.known.update(dict.fromkeys(node.outputs, why))

    def read(self, value: Value) -> Normal:
        """What is known of a tensor. Raises Refused."""
        found = self.known.get(value, "no BatchNormalization follows the network's input")
        if isinstance(found, str):
            raise Refused(found)
        return found

    # -- what operators do -----------------------------------------------------------------------------------------

    def same(self, node: Node) -> Normal:
        """Nothing."""
        return self.read(source(node))

    def normalised(self, node: Node) -> Normal:
        """Whatever comes in."""
        affine = read_affine(node, rank(source(node)))
        mean, var = (array(node.inputs[index]) for index in (3, 4))
        assert mean is not None
        assert var is not None
        seen = Normal(mean.astype(np.float64), np.sqrt(np.maximum(var.astype(np.float64), 0.0)))
        return seen.scaled(affine.gain, affine.shift)

    def clip(self, node: Node) -> Normal:
        """Of a normal variable alone."""
        found, bounds = self.read(source(node)), clip_bounds(node)
        if bounds is None:
            raise Refused(f"the bounds of {called(node)} are computed or crossed")
        if found.cut:
            raise Refused(f"{called(node)} cuts off what is not normal")
        return found.clipped(*bounds)

    def scale(self, node: Node) -> Normal:
        """A constant scale or shift by channel; of two tensors only the sum or the difference."""
        data = data_of(node)
        if data is None:
            return self.sum(node)
        affine, found = read_affine(node, rank(data)), self.read(data)
        if not {affine.gain.size, affine.shift.size} <= {1, found.mean.size}:
            raise Refused(f"{called(node)} makes more channels")
        return found.scaled(affine.gain, affine.shift)

    def sum(self, node: Node) -> Normal:
        """Of several tensors."""
        if kind(node) not in ("Add", "Sub", "Sum"):
            raise Refused(f"the mean behind {called(node)} of two tensors does not follow from theirs")
        total, *others = self._side_by_side(node)
        sign = np.full(1, -1.0 if kind(node) == "Sub" else 1.0)
        for other in others:
            if other.mean.size != total.mean.size:
                raise Refused(f"{called(node)} takes tensors of different channels")
            total = total.plus(other.scaled(sign, np.zeros(1)))
        return total

    def concat(self, node: Node) -> Normal:
        """Along channels."""
        parts = self._side_by_side(node)
        if attribute(node, "axis") % (rank(source(node)) or 1) != 1:
            raise Refused(f"{called(node)} joins places")
        return Normal.joined(parts)

    def mean_of_places(self, node: Node) -> Normal:
        """Pools, unless they count padding in."""
        if kind(node) == "ReduceMean":
            check_reduces_places(node)
        padding = any(attribute(node, "pads", [])) or attribute(node, "auto_pad", "NOTSET").startswith("SAME")
        if padding and attribute(node, "count_include_pad", 0):
            raise Refused(f"{called(node)} counts padding in")
        return self.read(source(node)).averaged()

    def slice(self, node: Node) -> Normal:
        """Some channels, or some places."""
        found = self.read(source(node))
        return found.of(sliced(node, found.mean.size))

    def pad(self, node: Node) -> Normal:
        """Channels of zeros are known to be zero."""
        sides = [Normal(np.zeros(count), np.zeros(count)) for count in padded(node)]
        return Normal.joined([sides[0], self.read(source(node)), sides[1]])

    def flatten(self, node: Node) -> Normal:
        """(N, C, H, W) to (N, C * H * W)."""
        found = self.read(source(node))
        return found.of(np.repeat(np.arange(found.mean.size), positions(self.model, node)))

    def _side_by_side(self, node: Node) -> list[Normal]:
        """What is known of all inputs, channels along axis 1 of each."""
        values = [value for value in node.inputs if value is not None]
        if len({rank(value) for value in values}) > 1 or (rank(values[0]) or 0) < 2:
            raise Refused(f"{called(node)} takes tensors of different rank")
        return [self.read(value) for value in values]


Rule = Callable[[Any, Node], Normal]
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
