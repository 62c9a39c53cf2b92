"""Finds where a layer's weights are stored in a quantized file, by whatever tool it was made.

Q/DQ         integers -> DequantizeLinear [-> Reshape, Transpose ...] -> layer
by qconv     integers -> Cast [-> Sub zero] -> Mul scale [-> Reshape] -> layer   (runs in float; the runtime computes it
             at load, scales and zeros of blocks by Gather)
not folded   floats -> QuantizeLinear -> DequantizeLinear -> layer  (the file holds float weights)
QOperator, dynamic     integers, scale and zero point are inputs of the layer itself
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.config.recipe import Recipe
from qconv.ir.model import DataType, Model, Node, Value, attribute
from qconv.ir.model import input_of as at
from qconv.ir.operators import QUANTIZATION_RULES, WeightedRule, with_
from qconv.quantizer import QuantParams, QuantSpec, broadcast_parameter


@dataclass(frozen=True, slots=True, eq=False)
class Dequantizer:
    """Where integers become numbers: (codes - zero) * scale.

    node: the DequantizeLinear, or the Mul behind Cast [-> Sub]. codes, scale, zero: what it reads; zero None where it
    is 0. axis: of the codes, along which scales differ. block: elements along it that share one, 0 for a channel.
    at_load: whether the runtime computes it once, when it loads the file.
    """

    node: Node
    codes: Value
    scale: Value
    zero: Value | None
    axis: int
    block: int = 0
    at_load: bool = False

    @property
    def others(self) -> list[Value]:
        """What it reads beside the codes."""
        return [self.scale] if self.zero is None else [self.scale, self.zero]

    @property
    def scale_reader(self) -> Node:
        """The node that reads the scale: its own, or the Gather in front of it."""
        if any(value is self.scale for value in self.node.inputs):
            return self.node
        makers = (value.producer() for value in self.node.inputs if value is not None)
        return next(node for node in makers if node is not None and at(node, 0) is self.scale)

    def broadcast(self, shape: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """Scale and zero point, to be broadcast to codes of this shape; None where they are no constants."""
        scale, zero = constant_numbers(self.scale), constant_numbers(self.zero)
        if scale is None or (zero is None and self.zero is not None):
            return None
        least = np.zeros(1, np.float32) if zero is None else zero.astype(np.float32)
        parts = (broadcast_parameter(part, shape, self.axis, self.block) for part in (scale, least))
        return next(parts), next(parts)

    def tensor_params(self) -> QuantParams | None:
        """The parameters, where all codes share one finite scale and one zero point; else None."""
        scale, zero = constant_numbers(self.scale), constant_numbers(self.zero)
        if zero is None and self.zero is None:
            zero = np.zeros((), np.int8 if self.codes.dtype == DataType.INT8 else np.uint8)
        if scale is None or scale.size != 1 or not np.isfinite(scale).all():
            return None
        if zero is None or zero.size != 1 or zero.dtype.kind not in "iu":
            return None
        spec = QuantSpec(8 * zero.dtype.itemsize, zero.dtype.kind == "i", symmetric=False)
        return QuantParams(spec, scale.reshape(()), zero.reshape(()))


def read_dequantizer(value: Value | None) -> Dequantizer | None:
    """What makes a tensor of integers; None for all other tensors.

    It is a DequantizeLinear, or Cast [-> Sub] -> Mul of constants, as qconv writes weights of layers that run in float.
    """
    node = None if value is None else value.producer()
    if node is None or node.op_type not in ("DequantizeLinear", "Mul"):
        return None
    if node.op_type == "Mul":
        return _read_cast_sub_mul(node)
    codes, scale = at(node, 0), at(node, 1)
    if codes is None or scale is None:
        return None
    return Dequantizer(node, codes, scale, at(node, 2), attribute(node, "axis", 1), attribute(node, "block_size", 0))


def _read_cast_sub_mul(node: Node) -> Dequantizer | None:
    scale = next((value for value in node.inputs if _stored_part(value) is not None), None)
    value = next((value for value in node.inputs if value is not scale), None)
    before = None if value is None else value.producer()
    zero = None
    if before is not None and before.op_type == "Sub":
        zero, value = at(before, 1), at(before, 0)
        before = None if value is None else value.producer()
    codes = at(before, 0) if before is not None and before.op_type == "Cast" else None
    stored = constant_value(codes)
    spread = None if scale is None else scale.producer()
    scale, zero = _stored_part(scale), _stored_part(zero)
    numbers = constant_numbers(scale)
    if codes is None or stored is None or scale is None or numbers is None:
        return None
    if spread is not None and spread.op_type == "Gather":
        block = int(np.count_nonzero(constant_numbers(at(spread, 1)) == 0))
        return Dequantizer(node, codes, scale, zero, attribute(spread, "axis", 0), block, at_load=True)
    shape = (1,) * (len(stored.shape) - numbers.ndim) + numbers.shape
    several = [axis for axis, size in enumerate(shape) if size > 1]
    if len(several) > 1:
        return None
    return Dequantizer(node, codes, scale, zero, several[0] if several else 0, at_load=True)


def _stored_part(value: Value | None) -> Value | None:
    """A constant scale or zero, through the Gather that repeats those of blocks; None for everything else."""
    node = None if value is None else value.producer()
    if node is not None and node.op_type == "Gather" and constant_numbers(at(node, 1)) is not None:
        value = at(node, 0)
    return value if constant_value(value) is not None else None


def read_weight_dequantizer(layer: Node) -> Dequantizer | None:
    """What makes a layer's weights of integers, through the Reshape that blocked ones have behind it."""
    weight = at(layer, 1)
    node = None if weight is None else weight.producer()
    return read_dequantizer(at(node, 0) if node is not None and node.op_type == "Reshape" else weight)


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeights:
    """Codes as they are stored. scale, zero: to be broadcast to them."""

    codes: NDArray[np.int32]
    scale: NDArray[np.float32]
    zero: NDArray[np.float32]

    @property
    def bits(self) -> int:
        """That the codes take, which may be fewer than their container has."""
        return max(2, int(self.codes.max(initial=0) - self.codes.min(initial=0)).bit_length())


def read_quantized_weights(layer: Node) -> QuantizedWeights | None:
    """The codes that a layer's weights come from; None where they are float."""
    found = read_weight_dequantizer(layer)
    codes = None if found is None else constant_numbers(found.codes)
    parts = None if found is None or codes is None else found.broadcast(codes.shape)
    return None if codes is None or parts is None else QuantizedWeights(codes.astype(np.int32), *parts)


RESHAPING_OPS = with_(rearranges=True)
"""What may stand between codes and a layer, and changes none."""

MOST_STEPS_BACK = 8
"""So far back is looked for what is stored."""


@dataclass(frozen=True, slots=True)
class OperandIndices:
    """Where an operator that works on codes has what: input numbers, None where it has no such input."""

    weight: int
    scale: int | None
    zero: int | None
    data_zero: int | None
    bias: int | None = None
    out_zero: int | None = None


OPERAND_INDICES: dict[str, OperandIndices] = {
    "QLinearConv": OperandIndices(3, 4, 5, 2, 8, 7),
    "QLinearMatMul": OperandIndices(3, 4, 5, 2, None, 7),
    "QGemm": OperandIndices(3, 4, 5, 2, 6, 8),
    "ConvInteger": OperandIndices(1, None, 3, 2),
    "MatMulInteger": OperandIndices(1, None, 3, 2),
    "MatMulIntegerToFloat": OperandIndices(1, 3, 5, 4, 6),
    "DynamicQuantizeMatMul": OperandIndices(1, 2, 3, None, 4),
    "MatMulNBits": OperandIndices(1, 2, 3, None, 5),
}

DYNAMIC_OPS = frozenset({"ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"})


def constant_value(value: Value | None) -> Any:
    """The constant that a value is: an initializer, or what a Constant node writes."""
    if value is None:
        return None
    if value.const_value is not None and not value.is_graph_input():
        return value.const_value
    node = value.producer()
    found = attribute(node, "value") if node is not None and node.op_type == "Constant" else None
    return found if hasattr(found, "nbytes") else None


def constant_numbers(value: Value | None) -> NDArray[Any] | None:
    """The numbers of a constant; None for everything else."""
    found = constant_value(value)
    return None if found is None else np.asarray(found.numpy())


def constant_bytes(value: Value | None) -> int:
    """What a constant takes in the file, 0 for everything else."""
    found = constant_value(value)
    return 0 if found is None else int(found.nbytes)


def iter_constants(model: Model) -> Iterator[Value]:
    """All that the file stores, Constant nodes included."""
    yield from model.graph.initializers.values()
    yield from (node.outputs[0] for node in model.nodes() if node.op_type == "Constant")


def element_type(value: Value | None) -> str:
    """The type of its elements, as `int8` or `float32`; empty where it is not known."""
    found = constant_value(value)
    dtype = value.dtype if found is None and value is not None else getattr(found, "dtype", None)
    return "" if dtype is None else _type_name(dtype)


def _type_name(dtype: DataType) -> str:
    name = str(dtype.name).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


@dataclass(slots=True)
class StoredWeights:
    """What was found behind a layer's weights. codes: the stored value, which holds numbers where it is `computed`.

    others: scales and zero points, as far as they are stored. axis: along which scales differ. dequantizer: None where
    integers are an input of the layer itself.
    """

    codes: Value
    type: str
    shape: tuple[int, ...]
    scale: NDArray[Any] | None = None
    zero: NDArray[Any] | None = None
    axis: int = 1
    block: int = 0
    in_float: bool = False
    computed: bool = False
    others: list[Value] = field(default_factory=list)
    dequantizer: Dequantizer | None = None

    @property
    def at_load(self) -> bool:
        """Whether the runtime makes floats of them once, when it loads the file."""
        return self.dequantizer is not None and self.dequantizer.at_load


def find_stored_weights(model: Model, node: Node) -> StoredWeights | None:
    """Those of a layer; None for a node that has none."""
    places = OPERAND_INDICES.get(node.op_type)
    return _weights_of_layer(node) if places is None else _weights_at_operands(model, node, places)


def _weights_at_operands(model: Model, node: Node, places: OperandIndices) -> StoredWeights | None:
    stored = at(node, places.weight)
    found = None if stored is None else _weights_as_operand(stored)
    if found is None:
        return None
    scale = at(node, places.scale) if places.scale is not None else _find_scale_after(model, node)
    zero = at(node, places.zero) if places.zero is not None else None
    found.scale, found.zero = constant_numbers(scale), constant_numbers(zero)
    found.others = [value for value in (scale, zero) if value is not None]
    found.axis = 0 if node.op_type in ("QLinearConv", "ConvInteger") or attribute(node, "transB", 0) else 1
    if node.op_type == "MatMulNBits":
        found.block, found.type = attribute(node, "block_size", 32), f"uint{attribute(node, 'bits', 4)}"
        found.shape = (attribute(node, "K", 0), attribute(node, "N", 0))
    return found


def _weights_as_operand(value: Value) -> StoredWeights | None:
    """Codes that are an input of the layer: a constant, or made of one at every run."""
    if constant_value(value) is not None:
        return StoredWeights(value, element_type(value), tuple(constant_value(value).shape.numpy()))
    node = value.producer()
    numbers = None if node is None else at(node, 0)
    if (
        node is None
        or numbers is None
        or not node.op_type.endswith("QuantizeLinear")
        or constant_value(numbers) is None
    ):
        return None
    kind = element_type(node.outputs[0]) or element_type(at(node, 2)) or "uint8"
    return StoredWeights(numbers, kind, tuple(constant_value(numbers).shape.numpy()), computed=True)


def _find_scale_after(model: Model, node: Node) -> Value | None:
    """Of ConvInteger and MatMulInteger: layer -> Cast -> Mul (Mul of both scales)."""
    cast = model.sole_reader(node.outputs[0])
    product = None if cast is None else model.sole_reader(cast.outputs[0])
    for value in product.inputs if product is not None and product.op_type == "Mul" else ():
        scales = None if value is None else value.producer()
        if scales is not None and scales.op_type == "Mul":
            return next((part for part in scales.inputs if constant_value(part) is not None), None)
    return None


def _weights_of_layer(node: Node) -> StoredWeights | None:
    rule = QUANTIZATION_RULES.get(node.op_type)
    if not isinstance(rule, WeightedRule) or node.domain not in ("", "ai.onnx"):
        return None
    value, reshaped = at(node, 1), None
    axis = 0 if node.op_type == "Gemm" and attribute(node, "transB", 0) else rule.output_axis
    for _ in range(MOST_STEPS_BACK):
        stored = constant_value(value)
        if stored is not None and value is not None:
            floats = value.dtype in (DataType.FLOAT, DataType.FLOAT16, DataType.DOUBLE, DataType.BFLOAT16)
            own = StoredWeights(value, element_type(value), tuple(stored.shape.numpy()), axis=axis, in_float=floats)
            return own if floats and own.shape else None
        before = None if value is None else value.producer()
        found = read_dequantizer(value)
        if found is not None:
            return _dequantized_weights(found, reshaped, axis)
        if before is None or before.op_type not in RESHAPING_OPS:
            return None
        reshaped = constant_numbers(at(before, 1)) if before.op_type == "Reshape" else reshaped
        value = at(before, 0)
    return None


def _dequantized_weights(made: Dequantizer, reshaped: NDArray[Any] | None, axis: int) -> StoredWeights | None:
    """axis: of the layer's output channels, along which the scales of its weights differ at load."""
    found = _weights_as_operand(made.codes)
    if found is None:
        return None
    found.dequantizer, found.others = made, made.others
    found.scale, found.zero = constant_numbers(made.scale), constant_numbers(made.zero)
    whole = made.at_load and not made.block
    found.axis, found.block = axis if whole else made.axis, made.block
    if reshaped is not None and not whole:
        found.shape = tuple(map(int, reshaped))
        if found.block and len(found.shape) > 2 and found.block % int(np.prod(found.shape[2:])) == 0:
            found.block //= int(np.prod(found.shape[2:]))  # kernels of whole input channels, flattened
    return found


def weight_bits_of(node: Node, weights: StoredWeights, recipe: Recipe | None) -> int:
    """Of a layer's codes: those of the container, or what qconv's recipe had in mind for codes that need no more."""
    kind = DataType.__members__.get(weights.type.upper().replace("FLOAT32", "FLOAT"))
    whole = 0 if kind is None else int(kind.bitwidth)
    if weights.in_float or not weights.type:
        return whole or 32
    if recipe is None or weights.computed:
        return whole or int(weights.type.lstrip("uint") or 8)
    named = recipe.bits_of(node.name or "").weights
    if named is not None:
        return named
    codes = constant_numbers(weights.codes)
    spans = None if codes is None else code_bits_used(codes, weights)
    needed = 0.0
    if spans is not None:
        needed = float(np.mean(spans) if recipe.allocates_weights else spans.max(initial=0))
    return min((bits for bits in recipe.bits_of_weights if needed <= bits <= whole), default=whole)


def code_bits_used(codes: NDArray[Any], weights: StoredWeights) -> NDArray[np.int64]:
    """Bits that the codes of each scale take, (C,), or (1,) where there is one scale, or one for each block."""
    if codes.size == 0:
        return np.zeros(1, np.int64)
    whole = codes.astype(np.int64)
    rows = whole.reshape(1, -1)
    if weights.scale is not None and weights.scale.size > 1 and not weights.block and codes.ndim > weights.axis:
        rows = np.moveaxis(whole, weights.axis, 0).reshape(codes.shape[weights.axis], -1)
    return np.array([int(span).bit_length() for span in rows.max(axis=1) - rows.min(axis=1)])


# -- tensors between layers --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TensorFormat:
    """How a tensor between layers is held. bits: those that its codes have; 32 for float."""

    type: str
    bits: int
    scheme: str | None = None

    def __str__(self) -> str:
        return self.type if self.type.endswith(f"t{self.bits}") else f"{self.type} ({self.bits})"


FLOAT_FORMAT = TensorFormat("float32", 32)


def integer_format(kind: str, zero: NDArray[Any] | None, bits: int | None) -> TensorFormat:
    """A tensor of codes of this type with these zero points. bits: None for those of the type."""
    signed = not kind.startswith("u")
    whole = int(kind.lstrip("uint") or 8) if "int" in kind else 8
    bits = bits or whole
    middle = 0 if signed else 1 << (bits - 1)
    symmetric = zero is None or bool(np.all(zero == middle) or np.all(zero == 0))
    return TensorFormat(kind, bits, "symmetric" if symmetric else "asymmetric")


def clip_bits(node: Node) -> int | None:
    """The bits that a Clip holds codes to; None for another Clip."""
    low, high = (
        None if constant_numbers(at(node, index)) is None else constant_numbers(at(node, index)) for index in (1, 2)
    )
    if low is None or high is None or low.size != 1 or high.size != 1:
        return None
    least, most = int(low.reshape(-1)[0]), int(high.reshape(-1)[0])
    bits = (most + 1).bit_length() - 1 + (1 if least < 0 else 0)
    exact = most + 1 == 1 << (bits - (1 if least < 0 else 0))
    return bits if exact and least in (0, -most, -most - 1) and bits >= 2 else None
