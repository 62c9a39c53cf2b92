"""Nodes that scale and shift each channel by constant numbers, all read as y = gain * x + shift.

For BatchNormalization gain = gamma / sqrt(var + eps) and shift = beta - mean * gain, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.ir.edits import Refused, kind, source
from qconv.ir.graph import Node, Value, array, attribute
from qconv.ir.layers import Float64


@dataclass(frozen=True, slots=True, eq=False)
class Affine:
    """y = gain * x + shift, both float64 of shape (C,) or (1,)."""

    gain: Float64
    shift: Float64


# (operator, index of the constant c) -> gain and shift
AFFINE: dict[tuple[str, int], Callable[[Float64], tuple[Float64, Float64]]] = {
    ("Mul", 0): lambda c: (c, 0 * c),
    ("Mul", 1): lambda c: (c, 0 * c),
    ("Add", 0): lambda c: (np.ones_like(c), c),
    ("Add", 1): lambda c: (np.ones_like(c), c),
    ("Sub", 0): lambda c: (-np.ones_like(c), c),
    ("Sub", 1): lambda c: (np.ones_like(c), -c),
    ("Div", 1): lambda c: (1 / c, 0 * c),
}


def data_of(node: Node) -> Value | None:
    """The input that is scaled and shifted: the first of BatchNormalization, the one beside a float constant else."""
    if kind(node) == "BatchNormalization":
        return source(node)
    values = [array(value) for value in node.inputs]
    constants = [index for index, numbers in enumerate(values) if numbers is not None and numbers.dtype.kind == "f"]
    return node.inputs[1 - constants[0]] if len(constants) == 1 else None


def read_affine(node: Node, axes: int | None, axis: int = 1) -> Affine:
    """What `node` does to data with `axes` axes whose channels lie along `axis`. Raises Refused."""
    if kind(node) == "BatchNormalization":
        gain, shift = _read_batchnorm(node)
    else:
        index = 0 if array(node.inputs[0]) is not None else 1
        if (node.op_type, index) not in AFFINE:
            raise Refused("it divides a constant by the data")
        constant = array(node.inputs[index])
        assert constant is not None
        with np.errstate(divide="ignore", invalid="ignore"):
            gain, shift = AFFINE[node.op_type, index](_by_channel(constant, axes, axis).astype(np.float64))
    if not (np.isfinite(gain).all() and np.isfinite(shift).all()):
        raise Refused("its scale or shift is not finite")
    return Affine(gain, shift)


def _read_batchnorm(node: Node) -> tuple[Float64, Float64]:
    if attribute(node, "training_mode", 0) or any(value.name for value in node.outputs[1:]):
        raise Refused("it runs in training mode")
    numbers = [array(value) for value in node.inputs[1:5]]
    if any(n is None for n in numbers):
        raise Refused("its scale, shift or statistics are computed")
    gamma, beta, mean, var = (n.astype(np.float64) for n in numbers if n is not None)
    deviation2 = var + attribute(node, "epsilon", 1e-5)
    if not np.all(deviation2 > 0):
        raise Refused("its variance is negative, zero or not a number")
    gain = gamma / np.sqrt(deviation2)  # (C,)
    return gain, beta - mean * gain


def _by_channel(constant: NDArray[Any], axes: int | None, axis: int) -> NDArray[Any]:
    """A constant that is broadcast against `axes` axes as (1,) or, if it varies along `axis` alone, as (C,)."""
    if constant.size == 1 and constant.ndim <= (1 if axes is None else axes):
        return constant.reshape(1)
    if axes is None:
        raise Refused("the rank of its data is not known")
    shape = (1,) * (axes - constant.ndim) + constant.shape
    if len(shape) != axes or constant.size != shape[axis]:
        raise Refused("its constant is neither one number nor one for each channel")
    return constant.reshape(-1)
