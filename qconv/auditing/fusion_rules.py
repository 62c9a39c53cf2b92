"""Why ONNX Runtime's CPU provider runs a node of a Q/DQ graph in float: its fusion rules, one function each.

An operator becomes an integer kernel when each data input comes from a DequantizeLinear, its one output goes to exactly
one QuantizeLinear, and types and parameters suit the kernel. Read in the runtime's `qdq_transformer/selectors_actions`
and tried on versions 1.19 to 1.32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qconv.ir.fast_normalization import find_normalization
from qconv.ir.model import DataType, Node, Value, attribute, clip_bounds, constant_array, input_of
from qconv.ir.operators import (
    CLIPPING_ACTIVATIONS,
    QUANTIZATION_RULES,
    IntegerDomainRule,
    SaturatingLineRule,
    TransparentRule,
    WeightedRule,
    operator,
)
from qconv.ir.stored_weights import read_dequantizer, read_weight_dequantizer
from qconv.planning.eligibility import gives_places
from qconv.planning.plan import data_positions

INTEGER_TYPES = frozenset({DataType.UINT8, DataType.INT8})

WIDE_TYPES = frozenset({DataType.UINT16, DataType.INT16})


@dataclass(frozen=True, slots=True)
class FloatReason:
    """rule: a short name that stays the same; why: in words; remedy: what would change it, None where nothing does."""

    rule: str
    why: str
    remedy: str | None = None


UNKNOWN_REASON = FloatReason("unknown", "ONNX Runtime found no integer kernel for it")


PLAIN_LAYOUT_POOL = FloatReason(
    "plain-layout",
    "of codes that no integer convolution has written, or whose quantizer the runtime has moved to its front, it works "
    "on NCHW, some 30 times as long as in float",
    "leave it float, with its Relu or a Sum of one tensor between it and the quantizer: qconv quantize does",
)
"""Why a MaxPool on codes is slow. Behind a convolution on codes it becomes an NhwcMaxPool, which is not."""


def find_float_reason(node: Node) -> FloatReason:
    """The first rule that keeps a node of a Q/DQ graph in float."""
    return next((found for rule in _FUSION_RULES if (found := rule(node)) is not None), UNKNOWN_REASON)


def _check_normalization(node: Node) -> FloatReason | None:
    ending = find_normalization(node)
    if ending is None:
        return None
    return FloatReason("no-kernel", f"of {ending.name}, an LRN in faster operators: LRN has no integer kernel")


def _check_kernel(node: Node) -> FloatReason | None:
    row = operator(node.op_type)
    alone = row.rule is not None and not isinstance(row.rule, SaturatingLineRule) and not row.made_of_others
    if alone and node.op_type != "ConvTranspose" and node.domain in ("", "ai.onnx"):
        return None
    return None if row.has_kernel else FloatReason("no-kernel", f"{node.op_type} has no integer kernel", row.remedy)


def _check_inputs(node: Node) -> FloatReason | None:
    rule = QUANTIZATION_RULES.get(node.op_type)
    positions = list(data_positions(node, rule)) if rule is not None else list(range(len(node.inputs)))
    if isinstance(rule, WeightedRule):
        positions = [0, 1]
    for index in positions:
        value = input_of(node, index)
        if (
            value is None
            or find_dequantizer(value) is not None
            or (index == 1 and _find_weight_dequantizer(node) is not None)
        ):
            continue
        if constant_array(value) is not None:
            what = "weights are" if isinstance(rule, WeightedRule) else f"constant {value.name} is"
            return FloatReason("float-constant", f"its {what} float", "store them as codes behind a DequantizeLinear")
        writer = value.producer()
        source = f"written in float by {writer.name}" if writer is not None else "an input of the model that is float"
        return FloatReason("float-input", f"its input {value.name} is {source}")
    return None


def _check_types(node: Node) -> FloatReason | None:
    for value in node.inputs[:2]:
        made = find_dequantizer(value)
        kind = None if made is None else made.inputs[0].dtype if made.inputs[0] is not None else None
        if kind is not None and kind not in INTEGER_TYPES:
            name = kind.name.lower()
            return FloatReason("types", f"{name} codes have no integer kernel", "use 8 bits, or hold fewer bits in 8")
    return None


def reads_16_bits(node: Node) -> bool:
    """Whether a node reads codes of 16 bits."""
    read = (made.inputs[0] for value in node.inputs if (made := find_dequantizer(value)) is not None)
    return any(codes is not None and codes.dtype in WIDE_TYPES for codes in read)


def _check_channel_scales(node: Node) -> FloatReason | None:
    """A scale for each channel, of what it reads or of what becomes of its result; through a copy or a limit."""
    made = [
        _dequantizer_before_copy(value) for value in node.inputs if value is not None and value.producer() is not node
    ]
    rule = QUANTIZATION_RULES.get(node.op_type)
    read = made[:1] if isinstance(rule, WeightedRule) else made
    behind = [use.node for use in node.outputs[0].uses()] if node.outputs else []
    behind += [use.node for limit in behind if limit.op_type == "Min" for use in limit.outputs[0].uses()]
    ends = [*read, *(end for end in behind if end.op_type == "QuantizeLinear")]
    if all(end is None or _read_scale(end).size <= 1 for end in ends):
        return None
    why = "a scale for each channel of the activations has no integer kernel"
    return FloatReason("channel-scales", why, "use one scale for all channels")


def _dequantizer_before_copy(value: Value) -> Node | None:
    """The dequantizer that writes a tensor, through a Sum of one."""
    producer = value.producer()
    if producer is not None and producer.op_type == "Sum" and len(producer.inputs) == 1:
        return find_dequantizer(producer.inputs[0])
    return find_dequantizer(value)


def _check_weights(node: Node) -> FloatReason | None:
    if not isinstance(QUANTIZATION_RULES.get(node.op_type), WeightedRule):
        return None
    made = _find_weight_dequantizer(node)
    if made is None:
        return None
    if attribute(made, "block_size", 0):
        return FloatReason(
            "blocked-weights", "weights with a scale for each block have no integer kernel", "use per-channel"
        )
    bias = find_dequantizer(input_of(node, 2))
    data = find_dequantizer(input_of(node, 0))
    if bias is None or data is None:
        return None
    product = _read_scale(data) * _read_scale(made)
    found = _read_scale(bias)
    if product.size and found.size and np.any(product.ravel() != found.ravel()):
        why = "the scale of its bias is not s_x * s_w, which versions before 1.28 do not notice"
        return FloatReason("bias-scale", why, "make it so")
    return None


def _check_output(node: Node) -> FloatReason | None:
    rule = QUANTIZATION_RULES.get(node.op_type)
    if isinstance(rule, WeightedRule) and not rule.needs_output:  # its integer kernel can write float
        return None
    value = node.outputs[0]
    if value.is_graph_output():
        return FloatReason("graph-output", "its output is an output of the model", "quantize and dequantize it there")
    readers = [use.node for use in value.uses()]
    if len(readers) > 1:
        return _several_readers("its output", value)
    (reader,) = readers or (None,)
    if reader is None or reader.op_type == "QuantizeLinear":
        return None
    if reader.op_type in CLIPPING_ACTIVATIONS:
        return _check_activation(reader)
    return FloatReason("no-quantizer", f"its output goes to {reader.name} without a quantizer", "quantize it")


def _several_readers(what: str, value: Value) -> FloatReason:
    names = ", ".join(sorted({use.node.name or use.node.op_type for use in value.uses()})[:3])
    return FloatReason(
        "several-readers", f"{what} has several readers ({names}), not one quantizer", "quantize it once"
    )


def _check_activation(node: Node) -> FloatReason | None:
    """A Relu or Clip goes away where the one quantizer behind it saturates at the same bounds."""
    if len(node.outputs[0].uses()) > 1:
        return _several_readers(f"{node.name} behind it", node.outputs[0])
    quantizer = next((use.node for use in node.outputs[0].uses() if use.node.op_type == "QuantizeLinear"), None)
    bounds = clip_bounds(node)
    if quantizer is None or bounds is None:
        return FloatReason(
            "no-quantizer", f"its output goes through {node.name} without a quantizer behind", "quantize it"
        )
    scale, zero = _read_scale(quantizer), constant_array(input_of(quantizer, 2))
    if scale.size != 1 or zero is None or zero.size != 1:
        return None
    least, most = np.iinfo(zero.dtype).min, np.iinfo(zero.dtype).max
    low, high = ((int(end) - int(zero.reshape(-1)[0])) * float(scale.reshape(-1)[0]) for end in (least, most))
    if low < bounds[0]:
        return FloatReason(
            "relu-zero-point", f"{node.name} cuts below what the codes reach ({low:.4g})", "put the zero point lowest"
        )
    if high > bounds[1]:
        why = f"{node.name} cuts at {bounds[1]:.4g}, the codes reach {high:.4g}"
        return FloatReason("clip-range", why, "end the range at the bound")
    return None


def _check_same_parameters(node: Node) -> FloatReason | None:
    rule = QUANTIZATION_RULES.get(node.op_type)
    before = find_dequantizer(input_of(node, 0))
    after = _find_quantizer_behind(node)
    if before is None or after is None:
        return None
    kinds = [constant_array(input_of(end, 2)) for end in (before, after)]
    if any(kind is None for kind in kinds):
        return FloatReason(
            "no-zero-point", "a quantizer beside it has no zero point", "write the zero point, 0 as well"
        )
    if kinds[0] is not None and kinds[1] is not None and kinds[0].dtype != kinds[1].dtype:
        return FloatReason("types", f"it reads {kinds[0].dtype} and writes {kinds[1].dtype}", "use one type for both")
    if isinstance(rule, TransparentRule | IntegerDomainRule):
        pairs = [(_read_numbers(input_of(before, i)), _read_numbers(input_of(after, i))) for i in (1, 2)]
        if not all(np.array_equal(one, other) for one, other in pairs):
            why = "scale or zero point differ before and behind it"
            return FloatReason("parameters-differ", why, "use the same for both")
    return None


def _find_quantizer_behind(node: Node) -> Node | None:
    """The quantizer of a result, through a Relu or Clip that it takes in."""
    readers = [use.node for use in node.outputs[0].uses()]
    if len(readers) == 1 and readers[0].op_type in CLIPPING_ACTIVATIONS:
        readers = [use.node for use in readers[0].outputs[0].uses()]
    return next((reader for reader in readers if reader.op_type == "QuantizeLinear"), None)


def _check_gemm(node: Node) -> FloatReason | None:
    """Its kernel takes zero points that are there, and a float bias only where it writes codes."""
    if node.op_type != "Gemm":
        return None
    made = {"data": find_dequantizer(input_of(node, 0)), "weights": _find_weight_dequantizer(node)}
    bare = next((what for what, end in made.items() if end is not None and input_of(end, 2) is None), None)
    if bare is not None:
        why = f"the DequantizeLinear of its {bare} leaves out the zero point, without which Gemm has no integer kernel"
        return FloatReason("no-zero-point", why, "write the zero point, 0 as well")
    bias = input_of(node, 2)
    if bias is not None and find_dequantizer(bias) is None and _find_quantizer_behind(node) is None:
        why = "its bias is float and no quantizer stands behind it: the kernel of Gemm adds codes alone then"
        return FloatReason(
            "gemm-bias", why, "store the bias as int32 codes with the scale s_x * s_w, or quantize the result"
        )
    return None


def _check_special_cases(node: Node) -> FloatReason | None:
    mode = attribute(node, "mode", "nearest")
    if node.op_type == "Resize" and mode != "nearest":
        return FloatReason("resize-mode", f"codes are resized by nearest neighbour, not {mode}")
    if gives_places(node):
        return FloatReason("indices", "its indices are read, which ties of codes would move")
    if node.op_type == "Pad":
        return FloatReason(
            "pad", "Pad alone has no integer kernel", "pad with zero inside the layer behind it, or on codes"
        )
    if node.op_type == "Gemm" and (attribute(node, "transA", 0) or attribute(node, "alpha", 1.0) != 1):
        return FloatReason("gemm-attributes", "a Gemm with transA or alpha has no integer kernel")
    return None


def _check_signed(node: Node) -> FloatReason | None:
    """The last resort: x86 kernels want uint8, and the runtime changes int8 over only where one operator reads it."""
    kinds = [made.inputs[0].dtype for value in node.inputs if (made := find_dequantizer(value)) and made.inputs[0]]
    if kinds[:1] != [DataType.INT8]:
        return None
    why = "int8 activations run in integers on x86 only where ONNX Runtime can turn all around them into uint8"
    return FloatReason("int8-activations", why, "use uint8 activations")


def _find_weight_dequantizer(node: Node) -> Node | None:
    found = read_weight_dequantizer(node)
    return None if found is None or found.at_load else found.node


_FUSION_RULES: tuple[Callable[[Node], FloatReason | None], ...] = (
    _check_normalization,
    _check_channel_scales,
    _check_kernel,
    _check_special_cases,
    _check_weights,
    _check_inputs,
    _check_types,
    _check_output,
    _check_gemm,
    _check_same_parameters,
    _check_signed,
)


def find_dequantizer(value: Value | None) -> Node | None:
    """The DequantizeLinear that writes a tensor."""
    found = read_dequantizer(value)
    return None if found is None or found.at_load else found.node


def _read_scale(node: Node) -> NDArray[np.float32]:
    return _read_numbers(input_of(node, 1))


def _read_numbers(value: Value | None) -> NDArray[np.float32]:
    found = constant_array(value)
    return np.zeros(0, np.float32) if found is None else np.asarray(found, np.float32)
