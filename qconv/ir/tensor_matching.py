"""Matches tensors of a quantized network with those of the float network, whoever wrote the quantized file.

A *comparison point* of the quantized network is a tensor behind a dequantizer, the result of a layer that runs in
float, or an output. Its producer is found in the float network by the node's name or that of the tensor. From there
the search goes on past nodes that the quantized network does not have: BatchNormalizations that were folded, a Relu
that its quantizer has absorbed. All tensors on that way are candidates, and measured numbers decide between them
(`analysis/compare.py`). `add_error_inputs` gives the float network an input for every point, which is added to its
tensor (error injection).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from qconv.ir.model import DataType, Model, Node, Value, constant_array, input_of
from qconv.ir.operators import CLIPPING_ACTIVATIONS, QUANTIZATION_RULES, ConcatRule, TransparentRule, WeightedRule
from qconv.ir.rewriting import standard_op_type
from qconv.ir.stored_weights import Dequantizer, read_dequantizer

MOST_CANDIDATES = 6

INTEGER_OPS = frozenset({"Clip", "Pad", "Min", "Reshape", "Resize", "Slice", "Concat"})
"""What may stand between a quantizer and a dequantizer, and works on the codes of its first input."""

CONVERSION = "Convert"
"""What a point is called that is rounded a second time, with other bits, for some of its readers."""

COPY_OPS = frozenset({"Identity", "Sum"})
"""What hands a tensor on as it is, a Sum of one: both are put in to keep roundings apart."""

FLOAT_TYPES = (DataType.FLOAT, None)


@dataclass(frozen=True, slots=True)
class Grid:
    """Codes from `least` to `most` that stand for (code - zero) * scale."""

    bits: int
    scale: float
    zero: int
    least: int
    most: int

    @property
    def low(self) -> float:
        """The smallest number that has a code."""
        return (self.least - self.zero) * self.scale

    @property
    def high(self) -> float:
        """The largest number that has a code."""
        return (self.most - self.zero) * self.scale


@dataclass(frozen=True, slots=True, eq=False)
class ComparisonPoint:
    """name, op: of the node that makes it. values: the tensor, once for each of its dequantizers.

    codes: what these read, None where it is float. grid: None also where channels have grids of their own. candidates:
    of the float network. input: whether it is the model's. layer: the node with weights that makes it, or stands in
    front of the activation that does. copy: it hands on codes as they are, or some of them, and rounds nothing.
    """

    name: str
    op: str
    values: tuple[Value, ...]
    codes: Value | None
    grid: Grid | None
    candidates: tuple[Value, ...]
    input: bool
    layer: Node | None
    copy: bool = False

    @property
    def value(self) -> Value:
        """The tensor."""
        return self.values[0]


@dataclass(frozen=True, slots=True, eq=False)
class TensorPair:
    """A point, and the tensor of the float network that it stands for."""

    point: ComparisonPoint
    tensor: Value


def find_comparison_points(quantized: Model, original: Model) -> list[ComparisonPoint]:
    """All of them, in the order in which they are made."""
    return _PointFinder(quantized, original).points()


class _PointFinder:
    def __init__(self, quantized: Model, original: Model) -> None:
        self.quantized, self.original = quantized, original
        # a folded layer may bear the name of what was folded into it: types tell them apart
        self.there = {(name, node.op_type) for node in quantized.nodes() for name in _names(node)}
        self.nodes = {node.name or "": node for node in original.nodes()}
        self.values = {value.name or "": value for value in original.graph.inputs if constant_array(value) is None}
        self.values |= {value.name or "": value for node in original.nodes() for value in node.outputs}

    def points(self) -> list[ComparisonPoint]:
        found: list[ComparisonPoint] = []
        dequantized: dict[Value, list[Value]] = {}
        for node in self.quantized.nodes():
            codes = node.inputs[0] if node.op_type == "DequantizeLinear" else None
            if codes is not None and constant_array(codes) is None and _quantizer_of(codes) is not None:
                dequantized.setdefault(codes, []).append(node.outputs[0])
        for codes, values in dequantized.items():
            quantizer = _quantizer_of(codes)
            assert quantizer is not None
            found.append(self._behind_codes(codes, tuple(values), quantizer))
        known = {value for point in found for value in point.values}
        floats = [*self._float_layers(), *self.quantized.graph.outputs]
        for value in dict.fromkeys(floats):
            if value not in known and value.dtype in FLOAT_TYPES and value.producer() is not None:
                found.append(self._point(value, (value,), None, None))
        order = {value: index for index, value in enumerate(v for n in self.quantized.nodes() for v in n.outputs)}
        return sorted(found, key=lambda point: order.get(point.value, -1))

    def _float_layers(self) -> Iterator[Value]:
        """What layers make in float, behind their activations, where others than a quantizer read it."""
        for node in self.quantized.nodes():
            if not isinstance(QUANTIZATION_RULES.get(standard_op_type(node)), WeightedRule):
                continue
            value = node.outputs[0]
            while (reader := self.quantized.sole_reader(value)) is not None and standard_op_type(
                reader
            ) in CLIPPING_ACTIVATIONS:
                value = reader.outputs[0]
            if not all(_is_only_quantized(self.quantized, reader) for reader in self.quantized.readers(value)):
                yield value

    def _behind_codes(self, codes: Value, values: tuple[Value, ...], quantizer: Node) -> ComparisonPoint:
        source, grid = quantizer.inputs[0], _grid_behind(values[0])
        assert source is not None
        made = source
        while (earlier := _quantized_before(made)) is not None:
            made = earlier
        point = self._point(made, values, codes, grid)
        if made is source:
            return point
        bits = f"{grid.bits} bits" if grid is not None else "other bits"
        return replace(point, name=f"{point.name} in {bits}", op=CONVERSION, input=False, layer=None, copy=False)

    def _point(
        self, source: Value, values: tuple[Value, ...], codes: Value | None, grid: Grid | None
    ) -> ComparisonPoint:
        source = _copy_source(source)
        maker = source.producer()
        if maker is None:
            own = self.values.get(source.name or "")
            return ComparisonPoint(
                source.name or "", "input", values, codes, grid, () if own is None else (own,), True, None
            )
        layer = _layer_in_front(maker)
        named = layer or maker
        candidates, copy = self._candidates(maker, source), grid is not None and _passes_grid_on(maker, grid)
        return ComparisonPoint(named.name or "", named.op_type, values, codes, grid, candidates, False, layer, copy)

    def _candidates(self, maker: Node, source: Value) -> tuple[Value, ...]:
        node = self.nodes.get(maker.name or "")
        if node is not None and node.op_type == maker.op_type:
            start: Value | None = node.outputs[list(maker.outputs).index(source)]
        else:
            start = self.values.get(source.name or "")
        if start is None:
            return ()
        found, queue = [start], [start]
        while queue and len(found) < MOST_CANDIDATES:
            for use in queue.pop(0).uses():
                result = use.node.outputs[0]
                seen = use.node.graph is self.original.graph  # tensors of bodies (If, Loop) cannot be returned
                if seen and not self._is_there(use.node) and use.idx == 0 and result not in found:
                    found.append(result)
                    queue.append(result)
        return tuple(found)

    def _is_there(self, node: Node) -> bool:
        return any((name, node.op_type) in self.there for name in _names(node))


def _names(node: Node) -> list[str]:
    return [name for name in (node.name, node.outputs[0].name) if name]


def _passes_grid_on(node: Node, grid: Grid) -> bool:
    """Whether all that it reads is on the same grid, and it only moves, cuts or joins that."""
    if not isinstance(QUANTIZATION_RULES.get(standard_op_type(node)), TransparentRule | ConcatRule):
        return False
    joins = isinstance(QUANTIZATION_RULES[node.op_type], ConcatRule)
    read = (value for value in (node.inputs if joins else node.inputs[:1]) if value is not None)
    return all(_grid_behind(value) == grid for value in read)


def _grid_behind(value: Value) -> Grid | None:
    dequantizer = read_dequantizer(value)
    return None if dequantizer is None or dequantizer.at_load else _grid_of(dequantizer)


def _quantizer_of(codes: Value) -> Node | None:
    """The quantizer that codes come from, through what works on them."""
    node = codes.producer()
    while node is not None and standard_op_type(node) in INTEGER_OPS and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node if node is not None and node.op_type == "QuantizeLinear" else None


def _quantized_before(value: Value) -> Value | None:
    """What was quantized and dequantized to give this tensor, past copies; None where nothing was."""
    dequantizer = read_dequantizer(_copy_source(value))
    quantizer = None if dequantizer is None else _quantizer_of(dequantizer.codes)
    return None if quantizer is None else quantizer.inputs[0]


def _copy_source(value: Value) -> Value:
    """Where the numbers of a tensor come from, past copies and limits of codes."""
    node = value.producer()
    while node is not None and node.inputs[0] is not None and _is_copy(node):
        value = node.inputs[0]
        node = value.producer()
    return value


def _is_copy(node: Node) -> bool:
    alone = standard_op_type(node) in COPY_OPS and len(node.inputs) == 1
    return alone or (standard_op_type(node) == "Min" and (node.name or "").endswith("_limited"))


def _is_only_quantized(model: Model, node: Node) -> bool:
    if node.op_type == "QuantizeLinear":
        return True
    return _is_copy(node) and all(_is_only_quantized(model, reader) for reader in model.readers(node.outputs[0]))


def _layer_in_front(maker: Node) -> Node | None:
    """The node itself where it has weights, or that in front of an activation."""
    node: Node | None = maker
    while node is not None and standard_op_type(node) in CLIPPING_ACTIVATIONS and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return (
        node if node is not None and isinstance(QUANTIZATION_RULES.get(standard_op_type(node)), WeightedRule) else None
    )


def _grid_of(dequantizer: Dequantizer) -> Grid | None:
    """The numbers that integers of one scale stand for; None where scales differ. A Clip of codes leaves fewer."""
    params = dequantizer.tensor_params()
    if params is None:
        return None
    kept = np.iinfo(params.zero_point.dtype)
    limits = _clip_limits(dequantizer.codes) or (int(kept.min), int(kept.max))
    bits = min(int(kept.bits), max(2, (limits[1] - limits[0]).bit_length()))
    return Grid(bits, float(params.scale), int(params.zero_point), *limits)


def _clip_limits(codes: Value) -> tuple[int, int] | None:
    """Where the first Clip behind the quantizer holds codes."""
    limits, node = None, codes.producer()
    while node is not None and standard_op_type(node) in INTEGER_OPS:
        ends = [constant_array(input_of(node, index)) for index in (1, 2)]
        if standard_op_type(node) == "Clip" and ends[0] is not None and ends[1] is not None:
            limits = int(ends[0]), int(ends[1])
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    return limits


def add_error_inputs(
    original: Model, quantized: Model, pairs: Sequence[TensorPair], outputs: Sequence[Value]
) -> tuple[Model, dict[ComparisonPoint, str], list[str]]:
    """A copy of `original` with these inputs; who reads the point reads the sum.

    Returns the names of the inputs as well, and those of the outputs, errors at these included.
    """
    model = original.copy()
    values = {v.name: v for v in (*model.graph.inputs, *(v for n in model.nodes() for v in n.outputs))}
    names: dict[ComparisonPoint, str] = {}
    carriers: dict[Value, list[Value]] = {}  # of a tensor: itself, and its sums with errors so far
    results = [value.name or "" for value in outputs]
    for pair in pairs:
        value = values[pair.tensor.name]
        known = carriers.setdefault(value, [value])
        readers = _names_of_readers(quantized, pair.point)
        own = {carrier: _readers_but(model, carrier, set(names.values())) for carrier in known}
        carrier = next((c for c in known if any(node.name in readers for node in own[c])), known[-1])
        chosen = [node for node in own[carrier] if node.name in readers] or own[carrier]
        delta = model.feed_readers(value, f"{value.name}_error", ())
        total = model.build("Add", [carrier, delta], name=delta.name or "", like=value)
        known.append(total.outputs[0])
        producer = carrier.producer()
        if producer is None:
            model.insert_first(total)
        else:
            model.insert_after(producer, total)
        model.redirect(carrier, total.outputs[0], readers=chosen)
        names[pair.point] = delta.name or ""
        if value.name in results:
            result = total.outputs[0].name or ""
            results = [result if name == value.name else name for name in results]
    return model, names, results


def _readers_but(model: Model, value: Value, added: Collection[str]) -> list[Node]:
    """The readers of a tensor, but for sums with errors."""
    return [node for node in model.readers(value) if node.op_type != "Add" or node.name not in added]


def _names_of_readers(model: Model, point: ComparisonPoint) -> set[str]:
    """Names of the nodes that read a point, through copies and a second rounding."""
    found: set[str] = set()
    queue = [(value, False) for value in point.values]
    while queue:
        value, codes = queue.pop()
        for node in model.readers(value):
            found.add(node.name or "")
            becomes_codes = (codes or node.op_type == "QuantizeLinear") and node.op_type != "DequantizeLinear"
            if codes or becomes_codes or _is_copy(node):
                queue += [(result, becomes_codes) for result in node.outputs]
    return found
