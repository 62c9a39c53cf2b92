"""This pass lets layers whose weights are equal read one constant, so that these are scaled, rounded and stored once.

Networks apply a layer several times: a siamese network to two images, a detector's head to every level, a recurrent one
at every step. Exporters write such a weight once or once a reader, and to fold the same BatchNormalization into each
reader makes copies of it. Weights of a single number stay apart: those are filled in, and equal by chance.
"""

from __future__ import annotations

import hashlib

import numpy as np

from qconv.ir.layers import INPUTS_FIRST, weight_of
from qconv.ir.model import Model, Value, constant_array
from qconv.ir.rewriting import standard_op_type


def share_equal_weights(model: Model) -> None:
    """Let layers with equal weights read the first of these."""
    layers = [node for node in model.nodes() if standard_op_type(node) in INPUTS_FIRST]
    weights = dict.fromkeys(weight_of(node) for node in layers)
    alike: dict[tuple[object, ...], list[Value]] = {}
    for value in weights:
        if value.const_value is not None and not value.is_graph_input() and not value.is_graph_output():
            alike.setdefault((value.dtype, *value.const_value.shape.numpy()), []).append(value)
    kept: dict[bytes, Value] = {}
    for values in alike.values():
        for value in values if len(values) > 1 else []:
            numbers = constant_array(value)
            if numbers is None or not numbers.size or np.all(numbers == numbers.flat[0]):
                continue
            first = kept.setdefault(_digest(numbers), value)
            if first is not value:
                model.redirect(value, first, readers=layers)


def _digest(numbers: np.ndarray) -> bytes:
    head = f"{numbers.dtype.str} {numbers.shape}".encode()
    return hashlib.blake2b(head + np.ascontiguousarray(numbers).tobytes()).digest()
