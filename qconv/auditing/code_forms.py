"""Finds what a Q/DQ file has computed on the codes themselves, or written otherwise so that integer kernels take it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from qconv.ir.fast_forms import added_channels, padding_of_channels
from qconv.ir.fast_pools import is_window
from qconv.ir.model import DataType, Model, Node, Value, constant_array, input_of
from qconv.ir.stored_weights import read_dequantizer
from qconv.results.quantize import FloatNode

CODE_TYPES = frozenset({DataType.UINT8, DataType.INT8})

CONVERTING_OPS = frozenset({"DequantizeLinear", "Cast", "Reshape", "Transpose"})
"""What makes numbers of codes, or only moves them."""


def find_code_forms(model: Model, times: Mapping[str, float]) -> Iterator[FloatNode]:
    """Such nodes of a file, in graph order. times: microseconds of nodes by their names in the file."""
    of_quantizers: set[Value] = set()
    for node in model.nodes():
        us, name = times.get(node.name or ""), node.name or ""
        codes = input_of(node, 0)
        if node.op_type == "QuantizeLinear" or (codes in of_quantizers and node.op_type != "DequantizeLinear"):
            of_quantizers.update(node.outputs)
        if node.op_type == "Conv":
            yield from _describe_layer(node, us)
        elif node.op_type == "Add" and _is_negated(input_of(node, 1)):
            why = "a Sub, written as an Add that reads the codes of its second input with the negated scale"
            yield FloatNode(name, node.op_type, why, None, "negated-scale", us)
        elif codes in of_quantizers and _works_on_codes(node):
            yield FloatNode(name, node.op_type, "works on the codes themselves", None, "on-codes", us)


def _works_on_codes(node: Node) -> bool:
    codes = input_of(node, 0)
    if node.op_type in CONVERTING_OPS or codes is None or codes.dtype not in CODE_TYPES:
        return False
    return padding_of_channels(node.outputs[0]) is None


def _describe_layer(conv: Node, us: float | None) -> Iterator[FloatNode]:
    data = read_dequantizer(input_of(conv, 0))
    pad = None if data is None else padding_of_channels(data.codes)
    weight = read_dequantizer(input_of(conv, 1))
    stored = None if weight is None else constant_array(weight.codes)
    if is_window(conv):
        why = "an AveragePool, written as a depthwise Conv of equal weights"
        yield FloatNode(conv.name or "", conv.op_type, why, None, "window", us)
    if pad is None or stored is None:
        return
    inputs = stored.shape[1]
    why = f"its {inputs - added_channels(pad)} input channels are padded to {inputs} on codes, for a faster kernel"
    yield FloatNode(conv.name or "", conv.op_type, why, None, "padded-channels", us)


def _is_negated(value: Value | None) -> bool:
    made = read_dequantizer(value)
    scale = None if made is None else constant_array(made.scale)
    return scale is not None and scale.size == 1 and bool(scale.reshape(-1)[0] < 0)
