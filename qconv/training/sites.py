"""What of a Q/DQ file can be learned: scales of activations, and weights with their scales and biases.

One scale often stands for several quantizers by chance: equal numbers are stored once. Before anything is learned, each
group of quantizers that must agree gets a scale of its own. They must agree where codes go from one to the other:
behind a quantizer up to its dequantizers, and across an operator that hands codes on (MaxPool, Reshape, Concat ...)
where both sides have the same parameters now, since the runtime runs it on codes only then.

The codes that a weight may take are those of its bits: as the recipe of a file by qconv says, else those of its type.
Of codes whose zero was moved to 0 (see params.LayerParams) the file does not say where they end: a window of 2^b codes
around those that there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.config.choices import Scheme
from qconv.config.recipe import Recipe
from qconv.errors import QconvError
from qconv.ir.model import DataType, Model, Node, Value, attribute, constant_array, input_of
from qconv.ir.operators import QUANTIZATION_RULES, ConcatRule, IntegerDomainRule, TransparentRule, WeightedRule
from qconv.ir.stored_weights import StoredWeights, constant_numbers, find_stored_weights, weight_bits_of

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class ActivationSite:
    """Quantizers and dequantizers with one scale. scale: () or (C,)."""

    scale: Value
    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True, eq=False)
class WeightSite:
    """The weights of a layer, or of several that share them.

    codes: (O, I/g, ...) as stored; scale: as stored. spread: the axes along which scale and codes go together, as
    `spread_of` takes them. zero, low, high: of the codes, to be broadcast to them. bias: what the layers add, (O,): a
    float constant, or what a dequantizer makes of codes; None where they add nothing that can be learned.
    """

    nodes: tuple[Node, ...]
    codes: Value
    scale: Value
    axis: int
    block: int
    zero: Ints
    low: Ints
    high: Ints
    bits: int
    bias: Value | None
    input_scale: Value | None


@dataclass(frozen=True, slots=True)
class Sites:
    """All that can be learned of a model."""

    activations: tuple[ActivationSite, ...]
    weights: tuple[WeightSite, ...]


def find_sites(model: Model, recipe: Recipe | None) -> Sites:
    """Prepare a quantized model for learning, and say what can be learned. recipe: of a file by qconv.

    The model computes what it did. Raises QconvError where there are no quantizers.
    """
    activations = tuple(_separated(model))
    weights = tuple(_weights(model, recipe))
    if not weights:
        raise QconvError(
            "The model has no layer with stored codes between quantizers and dequantizers.",
            "pass a file that `qconv quantize` wrote; operators on codes (QOperator format) cannot be trained.",
        )
    return Sites(activations, weights)


# -- activations -------------------------------------------------------------------------------------------------------


def _separated(model: Model) -> Iterator[ActivationSite]:
    groups: dict[Node, set[Node]] = {}
    for node in model.nodes():
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and _is_computed(node.inputs[0]):
            groups[node] = {node}
    for node in groups:
        for other in _bound(model, node):
            if other in groups and groups[other] is not groups[node] and _alike(node, other):
                groups[node] |= groups[other]
                for member in groups[other]:
                    groups[member] = groups[node]
    order = {node: index for index, node in enumerate(model.nodes())}
    for group in dict.fromkeys(map(frozenset, groups.values())):
        nodes = tuple(sorted(group, key=order.__getitem__))
        yield ActivationSite(_own(model, nodes, 1), nodes)


def _is_computed(value: Value | None) -> bool:
    return value is not None and constant_numbers(value) is None


def _bound(model: Model, node: Node) -> Iterator[Node]:
    """Quantizers and dequantizers that what a node writes reaches without being computed with."""
    queue = list(node.outputs)
    on_codes = node.op_type == "QuantizeLinear"
    while queue:
        for reader in model.readers(queue.pop()):
            if reader.op_type in ("QuantizeLinear", "DequantizeLinear"):
                yield reader
            elif on_codes or isinstance(
                QUANTIZATION_RULES.get(reader.op_type), TransparentRule | ConcatRule | IntegerDomainRule
            ):
                queue += reader.outputs


def _alike(one: Node, other: Node) -> bool:
    for index in (1, 2):
        a, b = (constant_numbers(input_of(node, index)) for node in (one, other))
        if (a is None) != (b is None) or (a is not None and b is not None and not np.array_equal(a, b)):
            return False
    return True


def _own(model: Model, nodes: tuple[Node, ...], index: int) -> Value:
    """The scale (input `index`) that these nodes alone read; a copy where others read it as well."""
    value = nodes[0].inputs[index]
    assert value is not None
    readers = {reader for node in nodes if (v := node.inputs[index]) is not None for reader in model.readers(v)}
    if len({node.inputs[index] for node in nodes}) == 1 and readers <= set(nodes):
        return value
    numbers = constant_numbers(value)
    if numbers is None:
        raise QconvError(f"The scale of {nodes[0].name} is computed.", "pass a file that `qconv quantize` wrote.")
    own = model.constant(f"{nodes[0].outputs[0].name}_scale", numbers)
    for node in nodes:
        model.set_input(node, index, own)
    return own


# -- weights -----------------------------------------------------------------------------------------------------------


def _weights(model: Model, recipe: Recipe | None) -> Iterator[WeightSite]:
    found: dict[Value, list[tuple[Node, StoredWeights]]] = {}
    for node in model.nodes():
        if isinstance(QUANTIZATION_RULES.get(node.op_type), WeightedRule):
            stored = find_stored_weights(model, node)
            if stored is not None and not stored.in_float and not stored.computed and stored.scale is not None:
                found.setdefault(stored.codes, []).append((node, stored))
    for codes, layers in found.items():
        nodes = tuple(node for node, _ in layers)
        node, stored = layers[0]
        numbers = constant_numbers(codes)
        assert numbers is not None
        reader = next(r for r in model.readers(codes))  # the DequantizeLinear, or the Cast of weights in float
        place = reader if reader.op_type == "DequantizeLinear" else _scaling(model, reader)
        index = next(i for i, v in enumerate(place.inputs) if v is stored.others[0])
        scale = _own(model, (place,), index)
        axis, block = _spread(stored, reader, numbers)
        whole = numbers.astype(np.int64)
        zero = spread_of(np.zeros(()) if stored.zero is None else stored.zero, whole.shape, axis, block)
        bits = weight_bits_of(node, stored, recipe)
        low, high = _limits(whole, zero.astype(np.int64), stored, bits, recipe)
        yield WeightSite(
            nodes, codes, scale, axis, block, zero.astype(np.int64), low, high, bits,
            _bias(model, nodes), _input_scale(node),
        )  # fmt: skip


def _scaling(model: Model, cast: Node) -> Node:
    """Cast [-> Sub zero] -> Mul scale."""
    node: Node | None = cast
    while node is not None and node.op_type != "Mul":
        node = model.sole_reader(node.outputs[0])
    assert node is not None
    return node


def _spread(stored: StoredWeights, reader: Node, codes: NDArray[Any]) -> tuple[int, int]:
    if reader.op_type == "DequantizeLinear":
        return attribute(reader, "axis", 1) % max(codes.ndim, 1), attribute(reader, "block_size", 0)
    return stored.axis, 0


def spread_of(numbers: NDArray[Any], shape: tuple[int, ...], axis: int, block: int) -> NDArray[Any]:
    """A scale or zero point with an axis for every axis of codes of this shape, to be broadcast to them."""
    if numbers.size == 1:
        return numbers.reshape((1,) * len(shape))
    if block:
        return np.repeat(numbers, block, axis=axis).take(np.arange(shape[axis]), axis=axis)
    return numbers.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])


def _limits(codes: Ints, zero: Ints, stored: StoredWeights, bits: int, recipe: Recipe | None) -> tuple[Ints, Ints]:
    """The least and the largest code that each weight may take, to be broadcast to the codes."""
    signed = not stored.type.startswith("u")
    whole = int(DataType.__members__[stored.type.upper()].bitwidth)
    container = (-(1 << (whole - 1)), (1 << (whole - 1)) - 1) if signed else (0, (1 << whole) - 1)
    if recipe is not None and recipe.allocates_weights:
        own = _grouped(np.abs(codes - zero), stored, _whole_reach)
        return zero - own, zero + own
    middle = 0 if signed else 1 << (whole - 1)
    moved = recipe is not None and recipe.moves_zero(bits) and recipe.scheme_of_weights(bits) is Scheme.ASYMMETRIC
    if moved:
        least = _grouped(codes, stored, lambda rows: rows.min(axis=1))
        most = _grouped(codes, stored, lambda rows: rows.max(axis=1))
        low = np.minimum(least - ((1 << bits) - 1 - (most - least)) // 2, 0)
        low = np.maximum(low, np.maximum(1 - (1 << bits), container[0]))
        return low, np.minimum(low + (1 << bits) - 1, container[1])
    if np.all(zero == middle):
        half = (1 << (bits - 1)) - 1
        deeper = int(codes.min(initial=0) - middle < -half)
        return np.maximum(zero - half - deeper, container[0]), np.minimum(zero + half, container[1])
    ends = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    return np.full(zero.shape, ends[0]), np.full(zero.shape, ends[1])


def _whole_reach(rows: Ints) -> Ints:
    """The largest code of the bits that each row takes. rows: distances from zero."""
    most = np.maximum(rows.max(axis=1), 1)
    return np.array([(1 << int(reach).bit_length()) - 1 for reach in most])


def _grouped(codes: Ints, stored: StoredWeights, what: Callable[[Ints], Ints]) -> Ints:
    """What is found of the codes of each scale, to be broadcast to the codes; blocks count together."""
    if stored.scale is None or stored.scale.size == 1 or stored.block:
        return what(codes.reshape(1, -1)).reshape((1,) * codes.ndim)
    rows = np.moveaxis(codes, stored.axis, 0).reshape(codes.shape[stored.axis], -1)
    return spread_of(what(rows), codes.shape, stored.axis, 0)


def _bias(model: Model, nodes: tuple[Node, ...]) -> Value | None:
    """What one layer adds, if it can be learned."""
    value = input_of(nodes[0], 2)
    if len(nodes) > 1 or value is None or nodes[0].op_type == "MatMul" or len(value.uses()) > 1:
        return None
    node = value.producer()
    if node is None:
        return value if constant_array(value) is not None else None
    if node.op_type != "DequantizeLinear" or _is_computed(node.inputs[0]):
        return None
    _own(model, (node,), 1)
    return value


def _input_scale(node: Node) -> Value | None:
    """The scale of the codes that a layer reads; None where it reads floats."""
    value = node.inputs[0]
    before = None if value is None else value.producer()
    return before.inputs[1] if before is not None and before.op_type == "DequantizeLinear" else None
