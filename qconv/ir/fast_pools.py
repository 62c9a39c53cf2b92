"""An AveragePool of codes as a depthwise convolution, which ONNX Runtime's CPU provider is faster at.

    codes -> DequantizeLinear -> AveragePool -> QuantizeLinear
    codes -> DequantizeLinear -> Conv of as many groups as channels -> QuantizeLinear

All weights have the code 64, and one scale, so that they are one over the places of a window. The largest pair of
products, 2 * 255 * 64, fits into 16 bits on CPUs without VNNI. Results differ by rounding alone. Between convolutions
the pool takes some 20 ns a number (ONNX Runtime 1.32), the depthwise convolution 1.
"""

from __future__ import annotations

from math import prod

import numpy as np

from qconv.ir.model import DataType, Model, Node, attribute, constant_array, dims, input_of
from qconv.ir.rewriting import explicit_pads, standard_op_type
from qconv.ir.stored_weights import read_dequantizer

CODE = 64
"""Of each weight."""

FEWEST_CHANNELS, MOST_PLACES = 16, 64
"""The kernel takes 16 channels at once. A window of more places than that would cost bytes."""

KEPT = ("strides", "dilations", "kernel_shape")

MARK = "_window"
"""Ends the name of the codes, so that a layer of the user's own is told apart."""


def may_be_layer(pool: Node) -> bool:
    """Whether an AveragePool pads nothing or counts the zeros that it pads with, with channels and places that fit."""
    data = input_of(pool, 0)
    sizes = None if data is None else dims(data)
    kernel = attribute(pool, "kernel_shape", [])
    if standard_op_type(pool) != "AveragePool" or sizes is None or len(sizes) != 4 or len(kernel) != 2:
        return False
    pads = explicit_pads(pool, 2)
    if pads is None or attribute(pool, "ceil_mode", 0) or (any(pads) and not attribute(pool, "count_include_pad", 0)):
        return False
    return (sizes[1] or 0) >= FEWEST_CHANNELS and 1 < prod(kernel) <= MOST_PLACES


def pool_to_layer(model: Model, pool: Node) -> bool:
    """Write an AveragePool between codes of 8 bits as a Conv; False where it is none, or may not be one."""
    source, data = read_dequantizer(input_of(pool, 0)), pool.inputs[0]
    readers = model.readers(pool.outputs[0])
    if not may_be_layer(pool) or data is None or source is None or source.at_load:
        return False
    if pool.outputs[0].is_graph_output() or [node.op_type for node in readers] != ["QuantizeLinear"]:
        return False
    if source.codes.dtype not in (DataType.UINT8, DataType.INT8):
        return False
    channels, kernel, pads = (dims(data) or [])[1], attribute(pool, "kernel_shape"), explicit_pads(pool, 2)
    name, places = pool.name or "", prod(kernel)
    codes = model.constant(f"{name}{MARK}", np.full((channels or 0, 1, *kernel), CODE, np.int8))
    scale = model.constant(f"{name}_scale", np.array(1 / (CODE * places), np.float32))
    zero = model.constant(f"{name}_zero", np.array(0, np.int8))
    weights = model.build("DequantizeLinear", [codes, scale, zero], name=f"{name}_weights")
    weights.outputs[0].dtype = DataType.FLOAT
    kept = {key: value for key in KEPT if (value := attribute(pool, key)) is not None}
    model.insert_before(pool, weights)
    model.become(pool, "Conv", [data, weights.outputs[0]], {"group": channels, "pads": pads, **kept})
    return True


def layers_to_pools(model: Model) -> None:
    """Write what `pool_to_layer` has written as AveragePool again, in place."""
    found = [node for node in model.nodes() if standard_op_type(node) == "Conv" and is_window(node)]
    for node in found:
        kept = {key: value for key in (*KEPT, "pads") if (value := attribute(node, key)) is not None}
        counts = int(any(kept.get("pads", [])))
        model.become(node, "AveragePool", [node.inputs[0]], {**kept, "count_include_pad": counts})
    if found:
        model.sweep()


def is_window(conv: Node) -> bool:
    """Whether a Conv is an AveragePool, as `pool_to_layer` writes it."""
    weight = read_dequantizer(input_of(conv, 1))
    codes = None if weight is None or not (weight.codes.name or "").endswith(MARK) else constant_array(weight.codes)
    return codes is not None and bool((codes == CODE).all())
