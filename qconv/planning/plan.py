"""The plan records which tensors and nodes are quantized, with which spec, and what has to be observed in calibration.

`planner` makes the decisions; here they are data. A range in front of SiLU or HardSwish need not reach further down
than where the activation's result is within a quarter of a quantization step s of zero:

    SiLU        x * Sigmoid(x) = -s / 4, the root left of the minimum
    HardSwish   alpha * x + beta = 0, for x * HardSigmoid(x); x + c = 0, for x * Clip(x + c, 0, ...)

SiLU: Elfwing et al. 2017, arXiv 1702.03118. HardSwish: Howard et al. 2019, arXiv 1905.02244.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from qconv.calibration.observer import Observer
from qconv.calibration.sketch import SAMPLED_ELEMENTS, SketchContents
from qconv.config.recipe import Recipe
from qconv.config.targets import Target
from qconv.ir.model import (
    DataType,
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
from qconv.ir.operators import (
    CLIPPING_ACTIVATIONS,
    QUANTIZATION_RULES,
    UNKNOWN_OPERATOR,
    ComputingRule,
    ConcatRule,
    Rule,
    TransparentRule,
    WeightedRule,
    operator,
)
from qconv.quantizer import PerBlock, PerChannel, QuantParams, QuantSpec

SILU_MINIMUM_AT = -1.2784645
"""Where x / (1 + exp(-x)) is least: the root of 1 + exp(-x) (1 + x) = 0."""

SHARE_OF_STEP = 0.25

FASTER = "faster in float"
"""What the reason of a node begins with that takes less time in float."""

LOWEST_GATE_INPUT = -100.0


@dataclass(frozen=True, slots=True)
class ActivationGate:
    """SiLU or HardSwish, which go to zero on the left. product: the output. closed_at: its zero; None for SiLU."""

    product: Value
    closed_at: float | None

    def floor(self, step: float) -> float:
        """The least input with an effect, where the product is quantized in steps of `step`."""
        if self.closed_at is not None:
            return self.closed_at
        inside, outside = SILU_MINIMUM_AT, LOWEST_GATE_INPUT
        while inside - outside > 1e-6:
            middle = (inside + outside) / 2
            if -middle / (1 + math.exp(-middle)) > SHARE_OF_STEP * step:
                inside = middle
            else:
                outside = middle
        return outside


def find_activation_gate(model: Model, value: Value) -> ActivationGate | None:
    """Find the activation that alone reads `value`: HardSwish, say, or a Mul with a gate made from it."""
    readers = model.readers(value)
    if value.is_graph_output():
        return None
    whole = operator(readers[0].op_type) if len(readers) == 1 else UNKNOWN_OPERATOR
    if whole.gates_itself and whole.cutoff is not None:
        return ActivationGate(readers[0].outputs[0], whole.cutoff(partial(attribute, readers[0])))
    products = [node for node in readers if node.op_type == "Mul"]
    if len(readers) != 2 or len(products) != 1:
        return None
    (product,), (gate,) = products, [node for node in readers if node is not products[0]]
    closes = _find_gate_cutoff(model, gate)
    if closes is None or set(product.inputs) != {value, closes.output}:
        return None
    return ActivationGate(product.outputs[0], closes.at)


@dataclass(frozen=True, slots=True)
class _GateCutoff:
    """The output of a gate. at: the input up to which it is zero; None where it only comes near zero."""

    output: Value
    at: float | None


def _find_gate_cutoff(model: Model, gate: Node) -> _GateCutoff | None:
    """An operator that is a gate by the table, or Add of a constant and a Clip from zero on."""
    row = operator(gate.op_type)
    if row.nears_zero:  # others who read it see the difference
        alone = model.sole_reader(gate.outputs[0]) is not None
        return _GateCutoff(gate.outputs[0], None) if alone else None
    if row.gates and row.cutoff is not None:
        cutoff = row.cutoff(partial(attribute, gate))
        return None if cutoff is None else _GateCutoff(gate.outputs[0], cutoff)
    clip = model.sole_reader(gate.outputs[0])
    if gate.op_type != "Add" or clip is None or clip.op_type not in CLIPPING_ACTIVATIONS:
        return None
    shift = next((constant_scalar(v) for v in gate.inputs if v is not None and constant_array(v) is not None), None)
    bounds = clip_bounds(clip)
    if shift is None or bounds is None or bounds[0] != 0:
        return None
    return _GateCutoff(clip.outputs[0], -shift)


@dataclass(frozen=True, slots=True)
class Decision:
    """The decision for a tensor or a node: a spec, or None for float, and the reason."""

    spec: QuantSpec | None
    why: str


@dataclass(frozen=True, slots=True, eq=False)
class LayerPlan:
    """A node with quantized weights.

    weight: spec of its weights, arranged as `arranged` returns them.
    data: the input that is quantized; None where weights alone are, and the layer runs in float.
    at_load: the runtime computes float weights from codes once, when it loads the file, and not at every run.
    own_bits: each output channel has bits of its own, the spec's on average.
    moves_zero: codes are stored less their zero points.
    padded: how many input channels its codes are padded to, see `channel_padding`; 0 for none.
    """

    node: Node
    rule: WeightedRule
    weight: QuantSpec
    data: Value | None
    at_load: bool = False
    own_bits: bool = False
    moves_zero: bool = False
    padded: int = 0

    @property
    def blocked(self) -> bool:
        """Whether blocks of input channels have scales."""
        return isinstance(self.weight.granularity, PerBlock)

    def arranged(self, weight: NDArray[np.float32]) -> NDArray[np.float32]:
        """The weights in the shape that the spec's axes refer to.

        Blocks run over whole input channels, kernel positions included, so a blocked kernel is flattened: a Conv's to
        (O, I/g * kH * kW), a ConvTranspose's to (I, O/g * kH * kW).
        """
        return weight.reshape(len(weight), -1) if self.blocked else weight


@dataclass(slots=True)
class Plan:
    """The decisions for all tensors and nodes of a folded model.

    activations: every quantized tensor that is no constant, in graph order.
    layers: nodes with quantized weights.
    constants: quantized constant operands of Add, Mul and the like, by the value that holds them.
    integer: the nodes that will run on codes.
    absorbed: Relu or Clip -> the node whose quantizer takes its place.
    on_codes: nodes that work between quantizer and dequantizer.
    wide: nodes that were told to compute on 16 bits where others have 8, by name, each with the reason.
    on_16_bits: the nodes of `integer` that do, those that the recipe names among them.
    ties: groups of tensors that share parameters.
    given: quantized tensors that need no range: those with the codes of a dequantizer in the model, the input's pixels,
        and those whose codes end where a line does (`saturating_line`).
    gates: tensors whose only reader is an activation that is zero far below zero.
    head: tensors that the last layers write, where more is computed of them.
    kept: node name -> why it stays float, or runs in float although its tensors are quantized.
    floats: those of them that are faster in float, each with the reason.
    activation_of: name of a Relu or Clip -> name of the layer in front of it.
    reads: the readers that take a quantized tensor as codes; None where all that can do.
    recipe, target: what the plan is made by, and the runtime that it is for.

    `planner.replan` makes a plan again for another model, recipe, or nodes in float.
    """

    recipe: Recipe
    target: Target
    floats: Mapping[str, str] = field(default_factory=dict)
    wide: Mapping[str, str] = field(default_factory=dict)
    activations: dict[Value, Decision] = field(default_factory=dict)
    layers: list[LayerPlan] = field(default_factory=list)
    constants: dict[Value, QuantSpec] = field(default_factory=dict)
    integer: set[Node] = field(default_factory=set)
    absorbed: dict[Node, Node] = field(default_factory=dict)
    on_codes: set[Node] = field(default_factory=set)
    on_16_bits: set[Node] = field(default_factory=set)
    ties: list[tuple[Value, ...]] = field(default_factory=list)
    given: dict[Value, QuantParams] = field(default_factory=dict)
    gates: dict[Value, ActivationGate] = field(default_factory=dict)
    head: set[Value] = field(default_factory=set)
    kept: dict[str, Decision] = field(default_factory=dict)
    activation_of: dict[str, str] = field(default_factory=dict)
    reads: dict[Value, list[Node]] | None = None

    @property
    def placed(self) -> frozenset[str]:
        """The names of nodes that are in float because they are faster there."""
        return frozenset(self.floats)

    def brief_floats(self) -> dict[str, str]:
        """The reasons of `floats` without the times of each node, so that many have one."""
        return {n: why.partition(":")[0] if why.startswith(FASTER) else why for n, why in self.floats.items()}

    def by_channel(self) -> list[Value]:
        """The tensors whose channels have scales and bits of their own."""
        return [value for value in self.activations if value not in self.given and self.has_channel_scales(value)]

    def has_channel_scales(self, value: Value | None) -> bool:
        """Whether a tensor has a scale for each of its channels."""
        choice = None if value is None else self.activations.get(value)
        return choice is not None and choice.spec is not None and isinstance(choice.spec.granularity, PerChannel)

    def observers(self, want: SketchContents = SketchContents.EXTREMES) -> list[Observer]:
        """The observers of all tensors that need a range: inputs of layers, and in each group all that are no copies.

        want: what all sketches keep; those of layers' inputs keep channels in any case.
        """
        read = {layer.data for layer in self.layers}
        seen = (value for value in self.activations if value in read or not self.copies(value))
        return [
            plan_observer(value, want | SketchContents.CHANNELS if value in read else want & SketchContents.BINS)
            for value in seen
        ]

    def float_observers(self) -> list[Observer]:
        """The observers of layers' inputs that stay float: bias correction needs their means."""
        read = (layer.node.inputs[0] for layer in self.layers if layer.data is None and layer.node.op_type != "MatMul")
        floats = (value for value in dict.fromkeys(read) if value is not None and value not in self.activations)
        return [plan_observer(value, SketchContents.CHANNELS) for value in floats]

    def copies(self, value: Value) -> bool:
        """Whether `value` only holds values of tensors that it shares parameters with."""
        node = value.producer()
        if node is None or node not in self.integer or node in self.absorbed:
            return False
        rule = QUANTIZATION_RULES[node.op_type]
        if not isinstance(rule, TransparentRule | ConcatRule):
            return False
        return set(self.group_of()[value]).issuperset(data_inputs(node, rule))

    def layers_by_weight(self) -> list[list[LayerPlan]]:
        """The layers, those together that read one weight alike and so share its codes; in graph order of the first."""
        found: dict[tuple[object, ...], list[LayerPlan]] = {}
        for layer in self.layers:
            node = layer.node
            alike = layer.rule.output_axis, attribute(node, "group", 1), attribute(node, "transB", 0)
            stored_as = layer.weight, layer.at_load, layer.own_bits, layer.moves_zero
            found.setdefault((node.inputs[1], alike, stored_as), []).append(layer)
        return list(found.values())

    def group_of(self) -> dict[Value, tuple[Value, ...]]:
        """Every quantized tensor with the tensors that share its parameters, itself included."""
        groups = {value: group for group in self.ties for value in group}
        return {value: groups.get(value, (value,)) for value in self.activations}


def count_channels(value: Value) -> int:
    """The number of channels along axis 1; 0 where it is not known before a run."""
    sizes = dims(value) or []
    return (sizes[1] if len(sizes) > 1 else 0) or 0


def data_inputs(node: Node, rule: Rule) -> list[Value]:
    """The inputs of a node that carry data, constants included; not shapes, axes and weights."""
    return [value for index in data_positions(node, rule) if (value := node.inputs[index]) is not None]


def data_positions(node: Node, rule: Rule) -> range:
    """The positions of the data inputs of a node."""
    count: int | None = 1
    if isinstance(rule, ComputingRule):
        count = rule.data
    elif isinstance(rule, ConcatRule):
        count = None
    elif isinstance(rule, WeightedRule) and node.op_type == "MatMul" and constant_array(input_of(node, 1)) is None:
        count = 2
    return range(len(node.inputs))[:count]


def plan_observer(value: Value, wanted: SketchContents) -> Observer:
    """The observer of a tensor. wanted: what its sketch keeps beyond the extremes."""
    positive, stride = _is_never_negative(value), _sampling_stride(value)
    maps = rank(value) == 4 and value.dtype == DataType.FLOAT and value.producer() is not None
    maps = maps and 0 not in (dims(value) or ())  # of which there is nothing to pool
    pooled = positive and maps and (stride is not None or wanted in (SketchContents.EXTREMES, SketchContents.CHANNELS))
    return Observer(value.name or "", wanted, never_negative=positive, pooled=pooled, stride=stride or 1)


def _sampling_stride(value: Value) -> int | None:
    """The stride at which pixels of a map are sampled in both directions; None where its size is not known."""
    _, *sizes = dims(value) or [None]
    if len(sizes) != 3 or None in sizes:
        return None
    channels, height, width = (size or 1 for size in sizes)
    return max(1, min(math.isqrt(channels * height * width // SAMPLED_ELEMENTS), height, width))


def _is_never_negative(value: Value) -> bool:
    """Whether the operator that writes a tensor writes no value below zero."""
    node = value.producer()
    if node is None:
        return False
    if node.op_type in CLIPPING_ACTIVATIONS:
        bounds = clip_bounds(node)
        return bounds is not None and bounds[0] >= 0
    least, _ = operator(node.op_type).output_range or (-math.inf, math.inf)
    return least >= 0


T = TypeVar("T", bound=Hashable)


class DisjointSets(Generic[T]):
    """Union-find: a partition of things, at first into sets of one."""

    def __init__(self) -> None:
        self._parents: dict[T, T] = {}

    def root(self, thing: T) -> T:
        """The thing that stands for the set of this one."""
        parents = self._parents
        parents.setdefault(thing, thing)
        while parents[thing] != thing:
            parents[thing] = parents[parents[thing]]
            thing = parents[thing]
        return thing

    def union(self, one: T, other: T) -> None:
        """Join the sets of two things; the root of `one` stands for both."""
        a, b = self.root(one), self.root(other)
        self._parents[b] = a

    def join(self, things: Iterable[T]) -> None:
        """Join the sets that these things are in."""
        every = list(things)
        for thing in every:
            self.union(every[0], thing)

    def in_order(self, order: Iterable[T]) -> list[tuple[T, ...]]:
        """The sets of more than one thing, each in this order."""
        place = {thing: index for index, thing in enumerate(order)}
        found: dict[T, list[T]] = {}
        for thing in self._parents:
            found.setdefault(self.root(thing), []).append(thing)
        return [tuple(sorted(group, key=place.__getitem__)) for group in found.values() if len(group) > 1]
