"""Stores weight codes of 2 to 7 bits at their bits, and takes files that do so apart again.

Standard operators unpack them. They read constants alone, so ONNX Runtime computes them once, when it loads the file,
and finds the int8 codes that a file without packing has: layers run in integers as before, bit for bit.

    int2, int4    codes -> Cast int8 [-> Add least]                      2 bits at opset 25, 4 bits at opset 21
    bytes         bytes -> BitShift right -> Mod -> Reshape -> Cast int8 -> Add least      all bits and opsets

In bytes, byte j holds the codes j, j + n, j + 2n, ... from its upper bits down; all n bytes, shifted down by so many
bits each, give all codes in order. (A shift to the left is no way: OpenVINO 2026.4 lets it saturate. It rounds one to
the right in weights of a Gemm.) Codes of 3, 5, 6 and 7 bits are sums of planes of 4, 2 and 1. Codes are stored less the
least one, or less that of each channel where this takes fewer bits.

Scales of biases, which are products of two scales that the file has, become products as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.config.choices import INT4_BITS, INT4_OPSET, INT4_RUNTIME, OLDEST_RUNTIME, PACKED_BITS
from qconv.config.targets import PACKED_FORMS
from qconv.errors import Change, Finding, format_bytes, format_count
from qconv.ir.constants import expand_tables, freeze
from qconv.ir.fast_pools import is_window
from qconv.ir.model import DataType, Model, Node, Value, attribute, input_of
from qconv.ir.newest import known_opset
from qconv.ir.stored_weights import (
    StoredWeights,
    constant_bytes,
    constant_numbers,
    constant_value,
    find_stored_weights,
    read_weight_dequantizer,
)

INT2_OPSET, INT2_RUNTIME = 25, (1, 24)
"""From which on ONNX Runtime computes a Cast of int2. Measured as `INT4_RUNTIME`, as what follows."""

SMALL_SUM_OPSET, SMALL_SUM_RUNTIME = 14, (1, 22)
"""From which on it adds codes of 8 bits; before, int32 takes their place, and four times the memory at load."""

NOTHING_TO_PACK = "no codes take less than 8 bits, or all layers with such are too small"

BYTES_OF_NODE = 80
"""What a node takes in the file, about: nothing is packed for less."""

FEWEST_CODES = 2 * BYTES_OF_NODE * 8 // 6
"""So many codes are packed in no form: 2 bits each and two nodes take as much."""

MOST_STEPS = 16
"""So many operators are followed from packed codes to unpacked ones."""


@dataclass(frozen=True, slots=True)
class PackedCodes:
    """How the codes of a tensor are stored. bits: of each. codes: bytes that they take. added: of what is added."""

    bits: int
    codes: int
    added: int


@dataclass(frozen=True, slots=True)
class _Packing:
    """Codes less the least, which lie from 0 to 2^bits - 1. least: to be broadcast to them."""

    codes: NDArray[np.uint8]
    least: NDArray[np.int16]
    bits: int


# -- packing -----------------------------------------------------------------------------------------------------------


def packed_width(bits: int, forms: Collection[str] = PACKED_FORMS) -> int:
    """The bits that codes of so many are stored with in these forms; 8 where none is for them."""
    if "bytes" in forms or f"int{bits}" in forms:
        return bits
    return INT4_BITS if "int4" in forms and bits < INT4_BITS else 8


def packing_opset(bits: int, runtime: tuple[int, int]) -> int:
    """The opset in which codes of so many bits have a type of their own that this ONNX Runtime takes; 0 for none."""
    if bits == INT4_BITS and runtime >= INT4_RUNTIME:
        return INT4_OPSET
    known = known_opset() >= INT2_OPSET
    return INT2_OPSET if bits == 2 and runtime >= INT2_RUNTIME and known else 0


def packing_runtime(model: Model) -> str | None:
    """The oldest ONNX Runtime that unpacks all codes of a file; None where none are packed."""
    found: list[tuple[int, int]] = []
    for node in model.nodes():
        stored = constant_value(input_of(node, 0))
        if node.op_type == "Cast" and stored is not None and stored.dtype in (DataType.INT4, DataType.INT2):
            found.append(INT4_RUNTIME if stored.dtype == DataType.INT4 else INT2_RUNTIME)
        elif node.op_type == "BitShift" and stored is not None:
            found.append(OLDEST_RUNTIME)
        elif node.op_type == "Add" and (of := constant_value(input_of(node, 1))) is not None and of.dtype.bitwidth == 8:
            found.append(SMALL_SUM_RUNTIME)
    return ".".join(map(str, max(found))) if found else None


def describe_packing(packed: Mapping[str, int], whole: Mapping[str, int], why: str) -> list[Finding]:
    """packed: bits by the name of codes. whole: bytes of the other codes by their names. why: they stay so."""
    counts = sorted(Counter(packed.values()).items())
    told = [
        (f"{bits} bits", f"codes of {format_count(count, 'layer')} stored with {bits} bits each")
        for bits, count in counts
    ]
    if whole:
        size = format_bytes(sum(whole.values()))
        told.append(("8 bits", f"codes of {format_count(len(whole), 'layer')} stay as they are: {size}{why}"))
    return [Change("pack", where, what) for where, what in told]


def iter_codes(model: Model) -> Iterator[tuple[Node, StoredWeights, NDArray[np.int8]]]:
    """The codes of 8 bits that layers have as constants, each once, with the first layer that has them."""
    done: set[Value] = set()
    for node in model.nodes():
        found = find_stored_weights(model, node)
        if found is None or found.in_float or found.computed or found.codes in done:
            continue
        done.add(found.codes)
        numbers = constant_numbers(found.codes)
        if numbers is not None and numbers.dtype == np.int8 and numbers.ndim > 1:
            yield node, found, numbers


def pack_codes(model: Model, runtime: tuple[int, int], forms: Collection[str] = PACKED_FORMS) -> dict[str, int]:
    """Pack the weight codes of a quantized model in place, those that become smaller.

    Returns bits by the names of the codes of layers; those of averages that are written as layers are not among them.

    Args:
        model: With int8 codes. Its opset stays, and decides the form.
        runtime: The oldest ONNX Runtime that is to run the file, as (1, 23).
        forms: Those that may be taken.
    """
    unpacking, before = _Unpacking(model, runtime, forms), set(model.nodes())
    packings: dict[Value, _Packing] = {}
    packed: dict[str, int] = {}
    for node, found, numbers in iter_codes(model):
        packing = _choose_packing(numbers, found.axis, forms)
        if packing.bits <= PACKED_BITS and unpacking.saving(packing) > 0 and not found.codes.is_graph_output():
            packings[found.codes] = packing
            packed |= {} if is_window(node) else {found.codes.name or "": packing.bits}
    if packed:
        for codes, packing in packings.items():
            unpacking.write(codes, packing)
        _compute_bias_scales(model)
        _drop_names(model, before)
    return packed


def _drop_names(model: Model, before: Collection[Node]) -> None:
    """Take the names of operators that unpack, and those that say no more than the output does: some 20 bytes each.

    Readers that want a name call a node by its output.
    """
    for node in model.nodes():
        converts = node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.name == node.outputs[0].name
        if converts or node not in before:
            node.name = None


def _choose_packing(codes: NDArray[np.int8], axis: int, forms: Collection[str]) -> _Packing:
    whole = codes.astype(np.int16)
    others = tuple(i for i in range(codes.ndim) if i != axis)
    packings = []
    for least, most in (
        (whole.min(), whole.max()),
        (whole.min(others, keepdims=True), whole.max(others, keepdims=True)),
    ):
        bits = packed_width(max(2, int((most - least).max()).bit_length()), forms)
        if bits in (2, 4) and np.min(least) >= -(1 << (bits - 1)) and np.max(most) < 1 << (bits - 1):
            least = np.int16(-(1 << (bits - 1)))  # signed codes need no offset
        packings.append(_Packing((whole - least).astype(np.uint8), np.asarray(least), bits))
    one, own = packings
    return own if own.bits < one.bits else one


class _Unpacking:
    """Writes codes in the forms that the runtime and the opset allow, and the operators behind them."""

    def __init__(self, model: Model, runtime: tuple[int, int], forms: Collection[str]) -> None:
        self.model = model
        self.small_sums = model.opset >= SMALL_SUM_OPSET and runtime >= SMALL_SUM_RUNTIME
        self.whole_types: dict[int, DataType] = {}
        for bits, kind in ((4, DataType.INT4), (2, DataType.INT2)):
            if 0 < packing_opset(bits, runtime) <= model.opset and f"int{bits}" in forms:
                self.whole_types[bits] = kind
        self.takes_bytes = "bytes" in forms
        self.nodes: list[Node] = []
        self._shared: dict[tuple[str, tuple[int, ...], bytes], Value] = {}

    def saving(self, packing: _Packing) -> int:
        """The bytes by which the file becomes smaller, about; 0 where no form is left for these codes."""
        if packing.bits not in self.whole_types and not self.takes_bytes:
            return 0  # an opset of the file's own
        nodes = 2 if packing.bits in self.whole_types else 3 + 4 * len(_planes(packing.bits))
        packed = packing.codes.size * packing.bits / 8 + packing.least.size
        return int(packing.codes.size - packed - nodes * BYTES_OF_NODE)

    def write(self, codes: Value, packing: _Packing) -> None:
        """Put what unpacks in the place of a constant, whose name the result takes."""
        kind = self.whole_types.get(packing.bits)
        result = self._from_bytes(packing) if kind is None else self._from_whole(packing, kind)
        self.model.insert_first(*self.nodes)
        self.nodes = []
        _take_place(self.model, codes, result)

    def _from_whole(self, packing: _Packing, kind: DataType) -> Value:
        middle = np.int16(1 << (packing.bits - 1))
        stored = (packing.codes.astype(np.int16) - middle).astype(np.int8)
        return self._raised(self.model.constant("packed", stored, kind), packing.least + middle)

    def _from_bytes(self, packing: _Packing) -> Value:
        whole: Value | None = None
        kept = packing.bits
        for bits in _planes(packing.bits):
            kept -= bits
            part = self._plane((packing.codes >> np.uint8(kept)) & np.uint8((1 << bits) - 1), bits)
            if kept:
                part = self._step("BitShift", part, self._fixed("shift", np.uint8(kept)), direction="LEFT")
            if not self.small_sums:
                part = self._step("Cast", part, to=DataType.INT32)
            whole = part if whole is None else self._step("Add", whole, part)
        assert whole is not None
        return self._raised(whole, packing.least)

    def _raised(self, value: Value, least: NDArray[np.int16]) -> Value:
        """Codes plus what they were stored less of, as int8."""
        if least.any():
            kind = DataType.INT8 if self.small_sums else DataType.INT32
            added = self.model.constant("least", least.astype(np.int8))
            value = self._step("Add", *(self._step("Cast", part, to=kind) for part in (value, added)))
        return self._step("Cast", value, to=DataType.INT8)

    def _plane(self, codes: NDArray[np.uint8], bits: int) -> Value:
        """Codes of 1, 2 or 4 bits out of bytes."""
        a_byte = 8 // bits
        count = -(-codes.size // a_byte)
        rows = np.zeros((a_byte, count), np.uint8)
        rows.reshape(-1)[: codes.size] = codes.reshape(-1)
        downs = np.uint8(8 - bits) - np.arange(a_byte, dtype=np.uint8).reshape(-1, 1) * np.uint8(bits)
        value = self.model.constant("packed", np.bitwise_or.reduce(rows << downs, axis=0).astype(np.uint8))
        value = self._step("BitShift", value, self._fixed("downs", downs), direction="RIGHT")
        value = self._step("Mod", value, self._fixed("codes", np.uint8(1 << bits)))
        if rows.size > codes.size:
            value = self._step("Reshape", value, self._fixed("flat", np.array([-1])))
            ends = (self._fixed(wish, np.array([end])) for wish, end in (("first", 0), ("behind", codes.size)))
            value = self._step("Slice", value, *ends)
        return self._step("Reshape", value, self._fixed("shape", np.array(codes.shape)))

    def _step(self, op_type: str, *inputs: Value, to: DataType | None = None, **attributes: Any) -> Value:
        """What an operator makes of its inputs; what it reads, where it would cast that to the type that it has."""
        if to is not None and inputs[0].dtype == to:
            return inputs[0]
        given = attributes if to is None else {"to": int(to)}
        # names weigh
        node = self.model.build(
            op_type, list(inputs), name="packed_step", attributes=given, dtype=to or inputs[0].dtype
        )
        self.nodes.append(node)
        return node.outputs[0]

    def _fixed(self, wish: str, numbers: Any) -> Value:
        """A constant that several unpackings may read."""
        wanted = np.asarray(numbers)
        key = wanted.dtype.str, wanted.shape, wanted.tobytes()
        if key not in self._shared:
            self._shared[key] = self.model.constant(wish, wanted)
        return self._shared[key]


def _planes(bits: int) -> list[int]:
    """The powers of two that codes of so many bits are cut into, the upper first."""
    return [part for part in (4, 2, 1) if bits & part]


def _take_place(model: Model, constant: Value, result: Value) -> None:
    """Let what is computed stand for a constant, under its name."""
    name = constant.name or ""
    model.redirect(constant, result)
    del model.graph.initializers[name]
    constant.name = model.fresh(f"{name}_unpacked")
    result.name, result.shape = name, constant.shape
    if constant.dtype is not None:
        result.dtype = constant.dtype


def _compute_bias_scales(model: Model) -> None:
    """Let the runtime multiply the scale of an input and those of weights to that of the bias, where that is exact.

    The zeros of a bias are made of those of the weights.
    """
    for node in model.nodes():
        weights, bias = read_weight_dequantizer(node), input_of(node, 2)
        data = None if not node.inputs or node.inputs[0] is None else node.inputs[0].producer()
        made = None if bias is None else bias.producer()
        if made is None or data is None or weights is None or made.op_type != "DequantizeLinear":
            continue
        if data.op_type == "DequantizeLinear":
            factors = [value for value in (data.inputs[1], weights.scale) if value is not None]
            scales = [numbers for value in factors if (numbers := constant_numbers(value)) is not None]
            if len(scales) == 2 and scales[0].size == 1:
                _compute_constant(model, made.inputs[1], scales[0] * scales[1], "Mul", factors)
        zero = constant_numbers(weights.zero)
        if zero is not None and weights.zero is not None and not zero.any():
            _compute_constant(
                model, input_of(made, 2), zero.astype(np.int32), "Cast", [weights.zero], to=DataType.INT32
            )


def _compute_constant(
    model: Model, value: Value | None, numbers: NDArray[Any], op_type: str, inputs: list[Value], **attributes: int
) -> None:
    """Let a node compute a constant, where the numbers are the same and the node takes less.

    One of the inputs may be that constant: a scale times 1 is stored once.
    """
    stored = constant_numbers(value)
    if value is None or stored is None or value.is_graph_output() or value in inputs:
        return
    if constant_bytes(value) <= BYTES_OF_NODE:
        return
    if stored.shape == numbers.shape and np.array_equal(stored, numbers):
        node = model.build(op_type, list(inputs), name="packed_step", attributes=attributes)
        model.insert_first(node)
        _take_place(model, value, node.outputs[0])


# -- taking apart ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Unpacked:
    """What was computed of others: codes, with how they were stored; and scales and zeros, which were not."""

    codes: dict[Value, PackedCodes] = field(default_factory=dict)
    scales: set[Value] = field(default_factory=set)


def unpack_codes(model: Model) -> Unpacked:
    """Put constants in the place of what a file computes of packed codes and of tables, and of products of scales.

    Other models stay as they are.
    """
    found = Unpacked(scales=set(expand_tables(model)))
    for node in model.nodes():
        to_float = node.op_type == "Cast" and attribute(node, "to") == DataType.FLOAT
        if not to_float and node.op_type != "DequantizeLinear":
            continue
        for value in tuple(node.inputs):
            if value is None or value.producer() is None or value.is_graph_output():
                continue
            read = _StoredParts()
            numbers = read.compute(value)
            if numbers is None:
                continue
            constant = freeze(model, value, numbers)
            model.remove_unread([value.producer()])
            if numbers.dtype == np.int8 and numbers.size:
                found.codes[constant] = read.packing(numbers.size)
            else:
                found.scales.add(constant)
            for part in (*read.joined, *read.others):
                if not part.uses() and not part.is_graph_output():
                    model.graph.initializers.pop(part.name or "", None)
    return found


@dataclass(slots=True)
class _StoredParts:
    """The constants that a tensor is computed of. joined: the codes, and what is added. others: shifts and shapes."""

    joined: list[Value] = field(default_factory=list)
    others: list[Value] = field(default_factory=list)

    def compute(self, value: Value, steps: int = MOST_STEPS, *, joined: bool = True) -> NDArray[Any] | None:
        """What qconv's unpacking gives; None for all else."""
        stored = constant_numbers(value)
        if stored is not None:
            (self.joined if joined else self.others).append(value)
            return stored
        node = value.producer()
        if node is None or steps == 0 or node.op_type not in _EVALUATED or node.domain != "":
            return None
        inputs: list[NDArray[Any]] = []
        for index, part in enumerate(node.inputs):
            whole = joined and (index == 0 or node.op_type in ("Add", "Mul"))
            found = None if part is None else self.compute(part, steps - 1, joined=whole)
            if found is None:
                return None
            inputs.append(found)
        if node.op_type == "Cast" and attribute(node, "to") not in _NUMPY_TYPES:
            return None
        return np.asarray(_EVALUATED[node.op_type](node, *inputs))

    def packing(self, count: int) -> PackedCodes:
        """How so many codes are stored."""
        added = sum(constant_bytes(part) for part in self.joined if part.dtype == DataType.INT8)
        codes = sum(constant_bytes(part) for part in self.joined if part.dtype != DataType.INT8)
        return PackedCodes(int(8 * codes / count + 0.5), codes, added)


_NUMPY_TYPES: dict[DataType, type[np.generic]] = {
    DataType.INT8: np.int8,
    DataType.UINT8: np.uint8,
    DataType.INT32: np.int32,
}


def _cast(node: Node, x: NDArray[Any]) -> Any:
    return np.asarray(x, _NUMPY_TYPES[DataType(attribute(node, "to"))])


def _shift(node: Node, x: NDArray[Any], by: NDArray[Any]) -> NDArray[Any]:
    shift = np.left_shift if attribute(node, "direction") == "LEFT" else np.right_shift
    return np.asarray(shift(x, by))


_EVALUATED: dict[str, Callable[..., Any]] = {
    "Cast": _cast,
    "BitShift": _shift,
    "Reshape": lambda node, x, shape: x.reshape(shape),
    "Mod": lambda node, x, y: np.mod(x, y),
    "Slice": lambda node, x, start, end: x[int(start[0]) : int(end[0])],
    "Add": lambda node, x, y: np.add(x, y, dtype=x.dtype),
    "Mul": lambda node, x, y: np.multiply(x, y, dtype=x.dtype),
}
"""Operators that unpack, as functions of the node and its inputs."""
