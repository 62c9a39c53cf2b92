"""Finds the channels that must be scaled alike, so that scaling them changes nothing, from the graph alone.

Dividing channel c of a tensor by s_c > 0 changes nothing where every operator on the way hands the factor on,
f(x / s) = f(x) / s, and every layer at an end takes it into its weights:

    W'[o, i] = W[o, i] * s_in[i] / s_out[o]        b'[o] = b[o] / s_out[o]

So a layer is where scales change, in any ratio: a depthwise Conv parts its input from its output like any other. What
lies between layers ties channels together: an Add those of both its inputs, a Concat none but those that it copies. All
channels tied to each other make a *class*, a scale group, which has one scale; a residual stream is a class for each of
its channels, over all of its blocks. Layers that read one weight tie their inputs, and their outputs: one weight, one
scaling.

A constant beside features, such as coordinates in a Concat, has classes like these, and is divided itself. A class is
*fixed*, with scale 1, where a network's input or output, or an operator that hands no factor on (Sigmoid, Softmax, Add
of one number ...), has one of its channels. A Clip hands a factor on while its bound is out of reach: its
bounds are listed as limits, and the pictures decide.

Sources: Nagel et al. 2019, arXiv 1906.04721, section 4.1, and Meller et al. 2019, arXiv 1902.01917, for pairs of layers
and what ties them in residual networks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isinf

import numpy as np
from numpy.typing import NDArray

from qconv.ir.layers import INPUTS_FIRST, Layer, read_layer, weight_of
from qconv.ir.model import Model, Node, Value, attribute, clip_bounds, constant_array, dims, rank
from qconv.ir.operators import OPERATORS, ChannelEffect, with_
from qconv.ir.rewriting import (
    EditRefused,
    check_reduces_spatial_axes,
    features_per_channel,
    padded_channels,
    sliced_channels,
    split_channels,
    standard_op_type,
    uses_only_first_output,
)

Classes = NDArray[np.int64]
NETWORK_BOUNDARY = "the network's own input or output"


@dataclass(frozen=True, slots=True, eq=False)
class LayerScaleGroups:
    """A layer with the classes of its input channels (I,) and of its output channels (O,)."""

    node: Node
    inputs: Classes
    outputs: Classes


@dataclass(frozen=True, slots=True, eq=False)
class ConstantScaleGroups:
    """A constant that a node reads at `index`, with channels along axis 1, and the classes of these, (C,)."""

    node: Node
    index: int
    classes: Classes


@dataclass(frozen=True, slots=True, eq=False)
class ClipLimit:
    """A Clip's output: its classes can be scaled while its values stay inside the bounds. 0 and infinity bind never."""

    value: Value
    low: float
    high: float


@dataclass(frozen=True, slots=True, eq=False)
class ScaleGroups:
    """Which channels are scaled alike: each scale group is a class of channels.

    of: the classes of every tensor's channels, (C,), for tensors that layers write, directly or not.
    fixed: (classes,), whether a class keeps its scale of 1.
    component: (classes,), the number of its component: classes that meet in one tensor, as those of a residual stream.
    reasons: component -> why classes of it are fixed.
    layers: in graph order.
    constants: which other tensors are joined with or added to.
    limits: outputs of Clips, whose bounds must stay out of reach.
    """

    of: dict[Value, Classes]
    fixed: NDArray[np.bool_]
    component: NDArray[np.int64]
    reasons: dict[int, str]
    layers: list[LayerScaleGroups]
    constants: list[ConstantScaleGroups]
    limits: list[ClipLimit]

    def with_channels(self) -> list[tuple[Value, Classes]]:
        """The tensors that have channels, with their classes: a Slice may have taken none."""
        return [(value, classes) for value, classes in self.of.items() if classes.size]


def find_scale_groups(model: Model) -> ScaleGroups:
    """The scale groups of a folded model."""
    walk = _ScaleGroupFinder(model)
    for node in model.nodes():
        walk.visit(node)
    return walk.groups()


class _DisjointClasses:
    """Disjoint sets of numbers, which are classes, some of them fixed; the least number of a set stands for it.

    Whole arrays are joined at a time. whys: reasons to fix sets, from 1 on; 0 says that a set is free.
    """

    def __init__(self) -> None:
        self.count = 0
        self.whys: list[str] = [""]
        self._parents = np.arange(0)
        self._why = np.zeros(0, np.int64)  # of each root

    def make_sets(self, count: int) -> Classes:
        """Add as many classes."""
        start, self.count = self.count, self.count + count
        if self.count > self._parents.size:
            more = max(self.count, 2 * self._parents.size)
            self._parents = np.concatenate([self._parents, np.arange(self._parents.size, more)])
            self._why = np.concatenate([self._why, np.zeros(more - self._why.size, np.int64)])
        return np.arange(start, self.count)

    def roots(self, these: Classes) -> Classes:
        """The class that stands for the set of each."""
        found = self._parents[these]
        while np.any((above := self._parents[found]) != found):
            self._parents[found] = self._parents[above]  # halves the way for all that are on it
            found = above
        self._parents[these] = found
        return found

    def union(self, these: Classes, those: Classes) -> None:
        """Join each class of `these` with the class at its place in `those`. Reasons of `these` come first."""
        a, b = np.broadcast_arrays(self.roots(these), self.roots(those))
        why = np.where(self._why[a] > 0, self._why[a], self._why[b])
        one, other = a, b
        while np.any(apart := one != other):
            one, other = one[apart], other[apart]
            np.minimum.at(self._parents, np.maximum(one, other), np.minimum(one, other))
            one, other = self.roots(one), self.roots(other)
        held = np.flatnonzero(why)[::-1]  # of several reasons of a set the first is written last
        self._why[self.roots(a[held])] = why[held]

    def fix(self, these: Classes, why: str) -> None:
        """Fix the sets of these classes; one that is fixed keeps its reason."""
        roots = self.roots(these)
        if why not in self.whys:
            self.whys.append(why)
        self._why[roots[self._why[roots] == 0]] = self.whys.index(why)

    def are_fixed(self, these: Classes) -> bool:
        return bool(self._why[self.roots(these)].all())

    def why_fixed(self, these: Classes) -> Classes:
        """The numbers of the reasons of these classes."""
        return self._why[self.roots(these)]


class _ScaleGroupFinder:
    """Walks through the graph once. A tensor without classes is never scaled."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.classes = _DisjointClasses()
        self.of: dict[Value, Classes] = {}
        self.layers: list[LayerScaleGroups] = []
        self.constants: list[ConstantScaleGroups] = []
        self.limits: list[ClipLimit] = []
        self._readers: dict[tuple[object, ...], LayerScaleGroups] = {}

    def visit(self, node: Node) -> None:
        """Give the outputs of a node their classes, or fix the classes that it reads."""
        if standard_op_type(node) == "Shape":  # sizes do not change
            return
        rule = _VISIT_LAYER if standard_op_type(node) in INPUTS_FIRST else VISITORS.get(standard_op_type(node))
        known = [self.of[value] for value in node.inputs if value is not None and value in self.of]
        if rule is not None and (known or rule is _VISIT_LAYER):
            try:
                rule(self, node)
            except EditRefused as reason:
                self._stop(node, str(reason))
        else:
            self._stop(node, f"{node.op_type} hands no factor on")

    def _stop(self, node: Node, why: str) -> None:
        for value in node.inputs:
            if value is not None and value in self.of:
                self.classes.fix(self.of[value], why)

    def groups(self) -> ScaleGroups:
        for value, classes in self.of.items():
            outside = any(use.node.graph is not self.model.graph for use in value.uses())
            if value.is_graph_output() or outside:
                self.classes.fix(classes, NETWORK_BOUNDARY)
        unique, number = np.unique(self.classes.roots(np.arange(self.classes.count)), return_inverse=True)
        why = self.classes.why_fixed(unique)
        of = {value: number[classes] for value, classes in self.of.items()}
        layers = [LayerScaleGroups(ends.node, number[ends.inputs], number[ends.outputs]) for ends in self.layers]
        constants = [replace(found, classes=number[found.classes]) for found in self.constants]
        component = _number_joined_classes(of, len(unique))
        reasons: dict[int, str] = {}
        for one in np.flatnonzero(why).tolist():
            reasons.setdefault(int(component[one]), self.classes.whys[why[one]])
        return ScaleGroups(of, why > 0, component, reasons, layers, constants, self.limits)

    # -- what operators do -----------------------------------------------------------------------------------------

    def layer(self, node: Node) -> None:
        """A layer begins new classes behind it; those in front of it end here."""
        data = node.inputs[0]
        layer = read_layer(node)
        if standard_op_type(node) in ("Gemm", "MatMul") and (data is None or rank(data) not in (None, 2)):
            raise EditRefused(f"{node.op_type} has its channels along another axis")
        for value in node.inputs[1:]:
            if value is not None and value in self.of:
                raise EditRefused("weights are computed")
        if data in self.of and self.of[data].size != layer.inputs:
            raise EditRefused(f"{node.op_type} has another number of channels")
        inputs = self.of.get(data) if data is not None else None
        if inputs is None:
            inputs = self.classes.make_sets(layer.inputs)
            self.classes.fix(inputs, NETWORK_BOUNDARY)
        outputs = self.classes.make_sets(layer.outputs)
        self.layers.append(LayerScaleGroups(node, inputs, outputs))
        self._tie_readers(layer, self.layers[-1])
        self.of[node.outputs[0]] = outputs

    def same(self, node: Node) -> None:
        """Channel c of the output is made of channel c of the input."""
        self.of[node.outputs[0]] = self._data(node)
        if not uses_only_first_output(node):
            raise EditRefused(f"{node.op_type} has more outputs")

    def slope(self, node: Node) -> None:
        """PRelu with constant slopes hands a factor on."""
        if constant_array(node.inputs[1]) is None:
            raise EditRefused("its slopes are computed")
        self.same(node)

    def clip(self, node: Node) -> None:
        """Clip hands a factor on while its bounds are out of reach."""
        bounds = clip_bounds(node)
        if bounds is None:
            raise EditRefused("the bounds of a Clip are computed or crossed")
        self.same(node)
        if not all(bound == 0 or isinf(bound) for bound in bounds):
            self.limits.append(ClipLimit(node.outputs[0], *bounds))

    def add(self, node: Node) -> None:
        """Sums, differences and extremes tie what they are taken of."""
        every = self._operands(node)
        widest = max(every, key=len)
        if any(classes.size not in (1, widest.size) for classes in every):
            raise EditRefused(f"{node.op_type} takes tensors of different channels")
        for classes in every:
            self.classes.union(widest, classes)
        self.of[node.outputs[0]] = widest

    def scale(self, node: Node) -> None:
        """A product hands the factor of one operand on, if the other has none: constants, gates behind a Sigmoid."""
        values = [value for value in node.inputs if value is not None]
        open_ones = [v for v in values if v in self.of and not self.classes.are_fixed(self.of[v])]
        scaled = open_ones or [v for v in values if v in self.of]
        if len(open_ones) > 1 or (standard_op_type(node) == "Div" and scaled[0] is not node.inputs[0]):
            raise EditRefused(f"{node.op_type} takes two scaled tensors, or divides by one")
        others = [value for value in values if value is not scaled[0]]
        self._check_ranks([scaled[0], *(v for v in others if constant_array(v) is None)])
        numbers = [constant_array(value) for value in others]
        axes = rank(scaled[0])
        if axes is None or any(n is not None and n.ndim > axes for n in numbers):
            raise EditRefused(f"{node.op_type} makes more axes")
        classes, sizes = self.of[scaled[0]], dims(node.outputs[0])
        if classes.size == 1 and (sizes is None or sizes[1] != 1):
            raise EditRefused(f"{node.op_type} makes more channels out of one")
        self.of[node.outputs[0]] = classes

    def concat(self, node: Node) -> None:
        """Concat puts classes side by side along channels, and ties them along another axis."""
        if attribute(node, "axis") % (rank(node.outputs[0]) or 1) == 1:
            self.of[node.outputs[0]] = np.concatenate(self._operands(node))
        else:
            self.add(node)

    def split(self, node: Node) -> None:
        """Split along channels divides classes by the sizes of the outputs."""
        classes = self._data(node)
        for value, part in zip(node.outputs, split_channels(node, classes.size), strict=True):
            self.of[value] = classes[part]

    def slice(self, node: Node) -> None:
        """Slice keeps some of the channels, or some of the places."""
        classes = self._data(node)
        self.of[node.outputs[0]] = classes[sliced_channels(node, classes.size)]

    def pad(self, node: Node) -> None:
        """Pad adds zeros or copies of places. Channels of zeros have any scale."""
        classes = self._data(node)
        before, behind = padded_channels(node)
        if before or behind:
            classes = np.concatenate([self.classes.make_sets(before), classes, self.classes.make_sets(behind)])
        self.of[node.outputs[0]] = classes

    def flatten(self, node: Node) -> None:
        """(N, C, H, W) to (N, C * H * W): every channel becomes as many features side by side."""
        classes = self._data(node)
        self.of[node.outputs[0]] = np.repeat(classes, features_per_channel(self.model, node))

    def reduce(self, node: Node) -> None:
        """Reductions over places keep the classes of channels."""
        check_reduces_spatial_axes(node)
        self.same(node)

    def resize(self, node: Node) -> None:
        """Resize copies or averages places."""
        sizes = dims(node.outputs[0])
        cropped = attribute(node, "coordinate_transformation_mode", "") == "tf_crop_and_resize"
        if cropped or sizes is None or len(sizes) < 2 or sizes[1] != self._data(node).size:
            raise EditRefused("a Resize may fill in numbers or mix channels")
        self.same(node)

    def to_space(self, node: Node) -> None:
        """DepthToSpace ties channels that become places of one channel."""
        classes, area = self._data(node), attribute(node, "blocksize") ** 2
        depth_first = attribute(node, "mode", "DCR") == "DCR"
        parts = classes.reshape(area, -1) if depth_first else classes.reshape(-1, area).T
        for part in parts[1:]:
            self.classes.union(parts[0], part)
        self.of[node.outputs[0]] = parts[0]

    # -- helpers ---------------------------------------------------------------------------------------------------

    def _tie_readers(self, layer: Layer, ends: LayerScaleGroups) -> None:
        """Layers that read one weight alike are scaled alike, or each would need a weight of its own."""
        node = layer.node
        alike = attribute(node, "transB", 0), attribute(node, "alpha", 1.0), INPUTS_FIRST[standard_op_type(node)]
        first = self._readers.setdefault((weight_of(node), layer.weight.shape, *alike), ends)
        if first is not ends:
            self.classes.union(first.inputs, ends.inputs)
            self.classes.union(first.outputs, ends.outputs)

    def _operands(self, node: Node) -> list[Classes]:
        """The classes of all inputs of a node that joins or adds them; constants among them get their own."""
        values = [(index, value) for index, value in enumerate(node.inputs) if value is not None]
        self._check_ranks([value for _, value in values])
        every, constants = [], []
        for index, value in values:
            if value not in self.of:
                constants.append(self._constant(node, index, value))
            every.append(self.of[value] if value in self.of else constants[-1].classes)
        self.constants += constants
        return every

    def _constant(self, node: Node, index: int, value: Value) -> ConstantScaleGroups:
        """New classes for a constant with channels along axis 1, whatever repeats it along others."""
        joining, sizes, producer = node, dims(value), value.producer()
        if producer is not None and standard_op_type(producer) == "Expand":
            alone = self.model.sole_reader(value) is node
            node, index = (producer, 0) if alone else (node, index)
        numbers = constant_array(node.inputs[index])
        if numbers is None or numbers.dtype.kind != "f" or sizes is None or [*numbers.shape[1:2]] != sizes[1:2]:
            raise EditRefused(f"{joining.op_type} takes something that nothing scales")
        if numbers.ndim != len(sizes) or (numbers.size == numbers.shape[1] and standard_op_type(joining) != "Concat"):
            raise EditRefused(f"{joining.op_type} takes a constant without places")
        return ConstantScaleGroups(node, index, self.classes.make_sets(numbers.shape[1]))

    def _data(self, node: Node) -> Classes:
        value = _first_input(node)
        if value not in self.of:
            raise EditRefused(f"{node.op_type} reads a scaled tensor where none belongs")
        others = [other for other in node.inputs[1:] if other is not None]
        if any(other in self.of for other in others):
            raise EditRefused(f"{node.op_type} reads a scaled tensor where none belongs")
        return self.of[value]

    def _check_ranks(self, values: list[Value]) -> None:
        """Channels are along axis 1 of each only if all have as many axes, two or more."""
        ranks = {rank(value) for value in values}
        if len(ranks) > 1 or None in ranks or min(r or 0 for r in ranks) < 2:
            raise EditRefused("tensors of different rank are joined")


def _first_input(node: Node) -> Value:
    value = node.inputs[0]
    assert value is not None
    return value


def _number_joined_classes(of: dict[Value, Classes], count: int) -> NDArray[np.int64]:
    """The number of each class's component: classes that meet in a tensor get one number."""
    joined = _DisjointClasses()
    joined.make_sets(count)
    for classes in of.values():
        joined.union(classes[:1], classes)
    return np.unique(joined.roots(np.arange(count)), return_inverse=True)[1].astype(np.int64)


_Visitor = Callable[[_ScaleGroupFinder, Node], None]
_VISIT_LAYER: _Visitor = _ScaleGroupFinder.layer
_BY_EFFECT: dict[ChannelEffect | None, _Visitor] = {
    ChannelEffect.SAME: _ScaleGroupFinder.same,
    ChannelEffect.SLOPE: _ScaleGroupFinder.slope,
    ChannelEffect.CLIP: _ScaleGroupFinder.clip,
    **dict.fromkeys((ChannelEffect.ADD, ChannelEffect.SUM, ChannelEffect.EXTREME), _ScaleGroupFinder.add),
    ChannelEffect.SCALE: _ScaleGroupFinder.scale,
    ChannelEffect.CONCAT: _ScaleGroupFinder.concat,
    ChannelEffect.SPLIT: _ScaleGroupFinder.split,
    ChannelEffect.SLICE: _ScaleGroupFinder.slice,
    ChannelEffect.PAD: _ScaleGroupFinder.pad,
    ChannelEffect.FLATTEN: _ScaleGroupFinder.flatten,
    **dict.fromkeys((ChannelEffect.REDUCE, ChannelEffect.REDUCE_MEAN), _ScaleGroupFinder.reduce),
    ChannelEffect.RESIZE: _ScaleGroupFinder.resize,
    ChannelEffect.TO_SPACE: _ScaleGroupFinder.to_space,
}
VISITORS: dict[str, _Visitor] = {
    **{name: _BY_EFFECT[row.effect] for name, row in OPERATORS.items() if row.effect in _BY_EFFECT},
    **dict.fromkeys(with_(homogeneous=True), _ScaleGroupFinder.same),
}
"""Operators that hand a factor on, and how their channels go over."""
