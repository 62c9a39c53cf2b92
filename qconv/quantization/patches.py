"""What a layer reads, as rows of a matrix: one row for each output position (im2col), at some positions only.

    out[g, n, o] = sum over j of rows[g, n, j] * weight[g, o, j] + bias        j = input channel, then kernel position

Along one axis the output at o meets kernel tap k at the input

    Conv            i = o * stride - pad + k * dilation
    ConvTranspose   i = (o + pad - k * dilation) / stride, where that is whole

and at nothing where i lies outside: that element is zero. Gemm and MatMul read whole rows: all axes but the last are
positions to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.ir.model import Node, attribute

Float32 = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Axis:
    """One spatial axis of a Conv or ConvTranspose."""

    size: int
    kernel: int
    stride: int
    dilation: int
    before: int
    outputs: int
    turned: bool

    def inputs(self, at: Ints) -> Ints:
        """Where the outputs `at` (p,) read, (p, kernel); -1 for nothing."""
        taps = np.arange(self.kernel) * self.dilation
        if self.turned:
            reached = at[:, None] + self.before - taps
            found = np.where(reached % self.stride == 0, reached // self.stride, -1)
        else:
            found = at[:, None] * self.stride - self.before + taps
        return np.where((found >= 0) & (found < self.size), found, -1)


@dataclass(frozen=True, slots=True)
class Places:
    """Some rows of a layer. index: flat positions in its input, (p, K); outside: which of these are none, or None."""

    index: Ints
    outside: NDArray[np.bool_] | None


@dataclass(frozen=True, slots=True)
class Patches:
    """How to cut the rows of one layer out of its input. axes: none for Gemm and MatMul."""

    groups: int
    axes: tuple[_Axis, ...]

    @classmethod
    def of(cls, node: Node, weight: Sequence[int], data: Sequence[int]) -> Patches:
        """For a layer with weights of this shape on an input of this shape (N, C, ...)."""
        if node.op_type not in ("Conv", "ConvTranspose"):
            return cls(1, ())
        count = len(data) - 2
        ends = zip(data[2:], weight[2:], range(count), strict=True)
        return cls(attribute(node, "group", 1), tuple(_axis(node, *end, count) for end in ends))

    def entries(self, data: Sequence[int]) -> int:
        """How many parts of an input of this shape are cut at the same positions."""
        return data[0] if self.axes else 1

    def positions(self, data: Sequence[int]) -> int:
        """How many rows each of these parts has."""
        return prod(axis.outputs for axis in self.axes) if self.axes else prod(data[:-1])

    def rows(self, x: NDArray[Any], places: Places, zero: int = 0) -> Float32:
        """The rows of x (N, C, ...) at the same places of each n, or of x (..., C): (G, N * p, I/G * K).

        zero: what stands for the zeros around x.
        """
        index, outside = places.index, places.outside
        if not self.axes:
            return np.asarray(x.reshape(1, -1, x.shape[-1])[:, index[:, 0]], np.float32)
        flat = x.reshape(*x.shape[:2], -1)[:, :, index]  # (N, C, p, K)
        if outside is not None:
            flat[:, :, outside] = zero
        apart = flat.reshape(len(x), self.groups, -1, *index.shape)
        return np.ascontiguousarray(apart.transpose(1, 0, 3, 2, 4), np.float32).reshape(
            self.groups, len(x) * len(index), -1
        )

    def places(self, at: Ints) -> Places:
        """What the rows at the positions (p,) are made of."""
        if not self.axes:
            return Places(at[:, None], None)
        along = np.unravel_index(at, [axis.outputs for axis in self.axes])
        index, valid = np.zeros((len(at), 1), np.int64), np.ones((len(at), 1), bool)
        for axis, place in zip(self.axes, along, strict=True):
            found = axis.inputs(np.asarray(place))
            index = (index[:, :, None] * axis.size + np.maximum(found, 0)[:, None]).reshape(len(at), -1)
            valid = (valid[:, :, None] & (found >= 0)[:, None]).reshape(len(at), -1)
        return Places(index, None if valid.all() else ~valid)


def _axis(node: Node, size: int, kernel: int, index: int, count: int) -> _Axis:
    stride = (attribute(node, "strides") or [1] * count)[index]
    dilation = (attribute(node, "dilations") or [1] * count)[index]
    reach = dilation * (kernel - 1) + 1
    auto = attribute(node, "auto_pad", "NOTSET")
    pads = attribute(node, "pads") or [0] * (2 * count)
    before, behind = (0, 0) if auto != "NOTSET" else (pads[index], pads[index + count])
    if node.op_type == "Conv":
        if auto.startswith("SAME"):
            outputs = -(-size // stride)
            before = _share(max((outputs - 1) * stride + reach - size, 0), upper=auto == "SAME_UPPER")
        else:
            outputs = (size + before + behind - reach) // stride + 1
        return _Axis(size, kernel, stride, dilation, before, outputs, turned=False)
    extra = (attribute(node, "output_padding") or [0] * count)[index]
    whole = stride * (size - 1) + extra + reach
    wanted = attribute(node, "output_shape")
    if wanted or auto.startswith("SAME"):
        outputs = wanted[-count:][index] if wanted else min(size * stride, whole)
        before = _share(max(whole - outputs, 0), upper=auto == "SAME_UPPER")
    else:
        outputs = whole - before - behind
    return _Axis(size, kernel, stride, dilation, before, outputs, turned=True)


def _share(total: int, *, upper: bool) -> int:
    """The padding in front, of `total` on both sides: an odd one goes behind (upper) or in front."""
    return total // 2 if upper else total - total // 2
