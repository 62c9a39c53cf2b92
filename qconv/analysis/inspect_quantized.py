"""This module tells how a quantized file was made, by whatever tool: bits, scheme, granularity and bytes of every
layer.

A file by qconv says in its recipe how many bits were meant: integers of 2 to 7 bits are stored as int8. Of other files
the type counts, since integers that happen to be small prove nothing. Bits of activations are those of the type, or of
the Clip that holds integers to 0 .. 2^b - 1 or the signed range.

Scales, zero points and biases that several layers share count for the first one. What no layer owns is the rest.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qconv.analysis.inspect_float import TensorSignature, read_producer, refuse_custom_operators
from qconv.auditing.audit import FILE_FORMATS, detect_format
from qconv.config.recipe import Recipe
from qconv.config.serialization import command_line_options, recipe_from_dict
from qconv.ir.fast_forms import take_back_fast_forms
from qconv.ir.files import Source, declared_opset, file_bytes, is_quantized, metadata_of, read_proto
from qconv.ir.load import load_unchanged
from qconv.ir.metadata import read_placed_nodes, read_preprocessing_dict, read_recipe
from qconv.ir.model import Model, Node, Value
from qconv.ir.model import input_of as at
from qconv.ir.operators import CLIPPING_ACTIVATIONS
from qconv.ir.packed_codes import PackedCodes, Unpacked, unpack_codes
from qconv.ir.stored_weights import (
    DYNAMIC_OPS,
    FLOAT_FORMAT,
    MOST_STEPS_BACK,
    OPERAND_INDICES,
    OperandIndices,
    StoredWeights,
    TensorFormat,
    clip_bits,
    constant_bytes,
    constant_numbers,
    constant_value,
    element_type,
    find_stored_weights,
    integer_format,
    iter_constants,
    weight_bits_of,
)
from qconv.ir.tensor_matching import INTEGER_OPS
from qconv.results.precision import FOR_ACCURACY


@dataclass(frozen=True, slots=True)
class QuantizedLayerRow:
    """A layer.

    Attributes:
        type: Of what is stored.
        bits: Of its integers; of float 32.
        scheme, granularity: None in float.
        block_size: Elements that share a scale, for per-block.
        runs: "integer" or "float", as the file is written; the runtime has the last word (`qconv audit`).
        input, output: The formats of what it reads and writes.
        bytes: Integers or weights in float, scales with zero points, and bias.
        share: Of the file.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    type: str
    bits: int
    scheme: str | None
    granularity: str | None
    block_size: int | None
    input: TensorFormat
    output: TensorFormat
    bias: str | None
    runs: str
    codes_bytes: int
    scales_bytes: int
    bias_bytes: int
    share: float
    float_bytes: int = 0

    @property
    def bytes(self) -> int:
        """All bytes that the file holds for this layer alone."""
        return self.codes_bytes + self.float_bytes + self.scales_bytes + self.bias_bytes

    def as_dict(self) -> dict[str, Any]:
        """Return the row that `--json` and `--csv` print."""
        return {
            "name": self.name,
            "op": self.op,
            "shape": list(self.shape),
            "type": self.type,
            "bits": self.bits,
            "scheme": self.scheme,
            "granularity": self.granularity,
            "block_size": self.block_size,
            "input_type": self.input.type,
            "input_bits": self.input.bits,
            "input_scheme": self.input.scheme,
            "output_type": self.output.type,
            "output_bits": self.output.bits,
            "output_scheme": self.output.scheme,
            "bias_type": self.bias,
            "runs": self.runs,
            "codes_bytes": self.codes_bytes,
            "float_bytes": self.float_bytes,
            "scales_bytes": self.scales_bytes,
            "bias_bytes": self.bias_bytes,
            "bytes": self.bytes,
            "share": self.share,
        }


@dataclass(frozen=True, slots=True)
class QuantizedModel:
    """What was found in a quantized file.

    Attributes:
        recipe: Of a file by qconv; empty for others.
        options: The recipe as one would type it.
        other_constants: Bytes of constants that no layer owns.
        structure: Bytes of all that is no constant.
    """

    name: str
    bytes: int
    format: str
    meaning: str
    opset: int
    ir_version: int
    producer: str
    inputs: tuple[TensorSignature, ...]
    outputs: tuple[TensorSignature, ...]
    operators: Mapping[str, int]
    recipe: Mapping[str, Any]
    options: tuple[str, ...]
    preprocessing: Mapping[str, Any] | None
    placed: int
    for_accuracy: int
    layers: tuple[QuantizedLayerRow, ...]
    other_constants: int

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The main table, as `--csv` writes it."""
        return [layer.as_dict() for layer in self.layers]

    @property
    def structure(self) -> int:
        """Bytes that are neither a layer's nor constants: nodes, names, metadata."""
        return self.bytes - sum(layer.bytes for layer in self.layers) - self.other_constants

    def as_dict(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        return {
            "schema": 1,
            "model": self.name,
            "kind": "quantized",
            "format": self.format,
            "bytes": self.bytes,
            "opset": self.opset,
            "ir_version": self.ir_version,
            "producer": self.producer,
            "inputs": [end.as_dict() for end in self.inputs],
            "outputs": [end.as_dict() for end in self.outputs],
            "operators": dict(self.operators),
            "recipe": dict(self.recipe) or None,
            "options": list(self.options) if self.recipe else None,
            "preprocessing": None if self.preprocessing is None else dict(self.preprocessing),
            "layers": self.rows,
            "size": {
                "codes": sum(layer.codes_bytes for layer in self.layers),
                "float_weights": sum(layer.float_bytes for layer in self.layers),
                "scales": sum(layer.scales_bytes for layer in self.layers),
                "biases": sum(layer.bias_bytes for layer in self.layers),
                "other_constants": self.other_constants,
                "structure": self.structure,
            },
        }


def is_quantized_file(proto: Any) -> bool:
    """Whether a file is quantized, in whatever way."""
    return is_quantized(proto) or any(node.op_type in OPERAND_INDICES for node in proto.graph.node)


def inspect_quantized(source: Source) -> QuantizedModel:
    """Read a file with integer weights. Raises QconvError for what is no ONNX file."""
    proto = read_proto(source)
    refuse_custom_operators(proto, source)
    size, opset, ir_version, producer = (
        file_bytes(proto, source),
        declared_opset(proto),
        proto.ir_version,
        read_producer(proto),
    )
    (name, meaning), carried = detect_format(proto), metadata_of(proto)
    if name == "float":  # MatMulNBits and its kind
        name, _, meaning = FILE_FORMATS[-1]
    counts = Counter(node.op_type for node in proto.graph.node if node.op_type != "Constant")
    model = load_unchanged(proto, source)
    stored = sum(map(constant_bytes, iter_constants(model)))
    unpacked = unpack_codes(model)
    packed = _packing_of_layers(model, unpacked)
    take_back_fast_forms(model)  # layers then have the shapes of the float model
    recipe, placed = _drop_nan(read_recipe(carried)), read_placed_nodes(carried)
    reader = _LayerReader(model, recipe_from_dict(recipe) if recipe else None, size, packed, unpacked.scales)
    layers = tuple(row for node in model.nodes() if (row := reader.row(node)) is not None)
    owned = sum(layer.bytes for layer in layers)
    return QuantizedModel(
        name=source.name,
        bytes=size,
        format=name,
        meaning=meaning,
        opset=opset,
        ir_version=ir_version,
        producer=producer,
        inputs=tuple(map(TensorSignature.of, model.graph.inputs)),
        outputs=tuple(map(TensorSignature.of, model.graph.outputs)),
        operators=dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
        recipe=recipe,
        options=tuple(command_line_options(recipe)) if recipe else (),
        preprocessing=_read_preprocessing(carried),
        placed=len(placed),
        for_accuracy=sum(FOR_ACCURACY in why for why in placed.values()),
        layers=layers,
        other_constants=stored - owned,
    )


def _packing_of_layers(model: Model, unpacked: Unpacked) -> dict[Node, PackedCodes]:
    """How the codes of layers are stored that are packed in the file."""
    found = ((node, find_stored_weights(model, node)) for node in (model.nodes() if unpacked.codes else ()))
    stored = ((node, None if weights is None else unpacked.codes.get(weights.codes)) for node, weights in found)
    return {node: packing for node, packing in stored if packing is not None}


def _read_preprocessing(carried: Mapping[str, str]) -> dict[str, Any] | None:
    found = read_preprocessing_dict(carried)
    return None if found is None else _drop_nan(found)


def _drop_nan(told: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the numbers that JSON does not have from what a stranger wrote into a file."""
    return dict(json.loads(json.dumps(told), parse_constant=lambda name: None))


class _LayerReader:
    """Reads layers in graph order. recipe: of a file by qconv. owned: constants that a layer has already.

    packed: how the codes of layers are stored, which are unpacked in the model. computed: constants that are not in the
    file.
    """

    def __init__(
        self,
        model: Model,
        recipe: Recipe | None,
        size: int,
        packed: Mapping[Node, PackedCodes],
        computed: Collection[Value],
    ) -> None:
        self.model, self.recipe, self.size, self.packed, self.computed = model, recipe, size, packed, computed
        self.owned: set[Value] = set()

    def row(self, node: Node) -> QuantizedLayerRow | None:
        """Read a node as a layer; None where it has no weights."""
        places = OPERAND_INDICES.get(node.op_type)
        weights = find_stored_weights(self.model, node)
        if weights is None:
            return None
        bias, bias_parts = self._bias(node, places)
        packed = self.packed.get(node)
        codes, scales = self._take([weights.codes]), self._take(weights.others)
        if packed is not None and codes:
            codes, scales = packed.codes, scales + packed.added
        biases = self._take(bias_parts)
        read = self._read(node, places)
        bits, scheme = weight_bits_of(node, weights, self.recipe), self._scheme(weights)
        if packed is not None and self.recipe is None:
            bits = packed.bits
        granularity, block = self._granularity(node, weights)
        if self.recipe is not None and scheme == "symmetric" and self.recipe.moves_zero(bits):
            scheme = str(self.recipe.scheme_of_weights(bits))
        small = weights.type in ("int8", "uint8") and read.type in ("int8", "uint8") and not weights.block
        on_codes = small and not weights.at_load and self._reads_codes(node) if places is None else not weights.block
        return QuantizedLayerRow(
            name=node.name or "",
            op=node.op_type,
            shape=weights.shape,
            type=weights.type if packed is None else f"int{packed.bits}",
            bits=bits,
            scheme=None if weights.in_float else scheme,
            granularity=granularity,
            block_size=block,
            input=read,
            output=self._written(node, places),
            bias=bias,
            runs="integer" if on_codes else "float",
            codes_bytes=0 if weights.in_float else codes,
            float_bytes=codes if weights.in_float else 0,
            scales_bytes=scales,
            bias_bytes=biases,
            share=(codes + scales + biases) / self.size if self.size else 0.0,
        )

    def _take(self, values: list[Value]) -> int:
        """Sum the bytes of constants that no layer owns yet, and own them."""
        new = [value for value in dict.fromkeys(values) if value not in self.owned and value not in self.computed]
        self.owned.update(new)
        return sum(map(constant_bytes, new))

    # -- what it means -------------------------------------------------------------------------------------------------

    def _scheme(self, weights: StoredWeights) -> str:
        zero = weights.zero
        if zero is None:
            return "asymmetric" if weights.computed and weights.scale is None else "symmetric"
        whole = weights.type.startswith("u") and weights.type.lstrip("uint")
        middle = 1 << (int(whole) - 1) if whole else 0
        return "symmetric" if np.all(zero.astype(np.int64) == middle) else "asymmetric"

    def _granularity(self, node: Node, weights: StoredWeights) -> tuple[str | None, int | None]:
        if weights.in_float:
            return None, None
        if weights.block:
            return "per-block", weights.block
        sizes = [numbers.size for numbers in (weights.scale, weights.zero) if numbers is not None]
        return ("per-channel" if max(sizes, default=1) > 1 else "per-tensor"), None

    def _bias(self, node: Node, places: OperandIndices | None) -> tuple[str | None, list[Value]]:
        value = at(node, 2) if places is None else None if places.bias is None else at(node, places.bias)
        if places is None and node.op_type == "MatMul":
            value = None
        if value is None:
            return None, []
        before = value.producer()
        if before is not None and before.op_type == "DequantizeLinear":
            parts = [part for part in before.inputs if part is not None]
            return element_type(parts[0]), parts
        return (element_type(value) or "float32"), [value]

    # -- tensors between layers ----------------------------------------------------------------------------------------

    def _read(self, node: Node, places: OperandIndices | None) -> TensorFormat:
        if places is not None:
            zero = None if places.data_zero is None else at(node, places.data_zero)
            if node.op_type in DYNAMIC_OPS:
                return TensorFormat("uint8", 8, "asymmetric")
            return FLOAT_FORMAT if zero is None else integer_format(element_type(zero), constant_numbers(zero), None)
        before = _find_producer(node, 0)
        if before is not None and before.op_type == "Sum" and len(before.inputs) == 1:
            before = _find_producer(before, 0)  # qconv's copy, which keeps a layer in float
        if before is None or before.op_type != "DequantizeLinear":
            return FLOAT_FORMAT
        return self._of_codes(at(before, 0), before)

    def _reads_codes(self, node: Node) -> bool:
        before = _find_producer(node, 0)
        return before is not None and before.op_type == "DequantizeLinear"

    def _written(self, node: Node, places: OperandIndices | None) -> TensorFormat:
        if places is not None and places.out_zero is not None:
            zero = at(node, places.out_zero)
            return FLOAT_FORMAT if zero is None else integer_format(element_type(zero), constant_numbers(zero), None)
        if places is not None or not node.outputs:
            return FLOAT_FORMAT
        value = node.outputs[0]
        for _ in range(MOST_STEPS_BACK):
            follower = self.model.sole_reader(value)
            copies = follower is not None and follower.op_type in {*CLIPPING_ACTIVATIONS, "Min", "Sum"}
            if follower is None or not copies or sum(constant_value(part) is None for part in follower.inputs) != 1:
                break
            value = follower.outputs[0]
        quantizer = next((r for r in self.model.readers(value) if r.op_type == "QuantizeLinear"), None)
        if quantizer is None:
            return FLOAT_FORMAT
        codes = quantizer.outputs[0]
        clip = self.model.sole_reader(codes)
        return self._of_codes(clip.outputs[0] if clip is not None and clip.op_type == "Clip" else codes, quantizer)

    def _of_codes(self, codes: Value | None, node: Node) -> TensorFormat:
        """Read the format of integers from `node`, the quantizer or dequantizer with their scale and zero point."""
        zero, scale = at(node, 2), constant_numbers(at(node, 1))
        kind = element_type(zero) or element_type(codes) or "uint8"
        bits = None
        if scale is not None and scale.size > 1 and self.recipe is not None:
            bits = self.recipe.activation_bits  # each channel has its own, those on average
        for _ in range(MOST_STEPS_BACK):
            before = None if codes is None else codes.producer()
            if before is None or before.op_type not in INTEGER_OPS:
                break
            if bits is None and before.op_type == "Clip":
                bits = clip_bits(before)
            codes = at(before, 0)
        found = integer_format(kind, constant_numbers(zero), bits)
        return found if self.recipe is None else replace(found, scheme=str(self.recipe.activation_scheme))


def _find_producer(node: Node, index: int) -> Node | None:
    value = at(node, index)
    return None if value is None else value.producer()
