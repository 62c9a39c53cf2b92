"""Kernels of Conv and Gemm in float64, as sums and products of linear maps on one grid of taps.

    y[o, p] = sum over i, t of weight[o, i, t] * x[i, stride * p + first + t * dilation] + bias[o]        zeros outside

Two kernels that read x at the same strides and write maps of the same size are one kernel over a grid that has the
taps of both: its dilation divides both dilations and the distance between their first taps. A single tap lies on any
grid, the identity is a tap of 1 at 0 in each channel, and gcd(g, h) groups hold g groups and h groups. Gemm has no
places.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd, prod

import numpy as np

from qconv.ir.layers import Float64, Layer, check_finite, read_layer
from qconv.ir.model import Model, Node, Value, attribute, constant_array, input_of
from qconv.ir.rewriting import settled_pads, standard_op_type, title

LEAST_WEIGHT_DB, MOST_SAFE_WEIGHTS = 30.0, 150
"""How well 8 bits hold the weights of a kernel with a tap of the identity, and up to how many weights a channel nothing
can be wrong. RepVGG-A0 has 18.3 dB at the outputs with the identity in all kernels of 3x3, and 24.8 with it apart, in
5 % more time; MobileOne-S0, whose dense kernels are 1x1, has 18.5 and 18.8, in a quarter more time."""

Places = tuple[int, ...]
"""One number for each spatial axis."""


@dataclass(frozen=True, slots=True, eq=False)
class Kernel:
    """A linear layer by its taps, see the top.

    weight: (O, I/groups, *sizes), float64. bias: (O,). rest: by how much padding exceeds what the kernel needs, so that
    out = (in + rest - 1) // stride + 1. work: its multiplications a place; 0 for the identity, which has none.
    """

    weight: Float64
    bias: Float64
    groups: int
    first: Places
    dilations: Places
    strides: Places
    rest: Places
    work: int

    @property
    def outputs(self) -> int:
        """Number of output channels."""
        return int(self.weight.shape[0])

    @property
    def inputs(self) -> int:
        """Number of input channels."""
        return int(self.weight.shape[1]) * self.groups

    @property
    def sizes(self) -> Places:
        """How many taps it has along each axis."""
        return self.weight.shape[2:]

    @property
    def pads(self) -> list[int]:
        """Its padding as Conv has it, all beginnings first."""
        axes = zip(self.first, self.sizes, self.dilations, self.rest, strict=True)
        return [-first for first in self.first] + [rest + first + (n - 1) * step for first, n, step, rest in axes]

    def scaled(self, gain: Float64, shift: Float64) -> Kernel:
        """The kernel followed by gain * y + shift, both (O,) or (1,)."""
        gain = np.broadcast_to(gain, (self.outputs,))
        weight = self.weight * gain.reshape(-1, *[1] * (self.weight.ndim - 1))
        return replace(self, weight=weight, bias=self.bias * gain + shift)


@dataclass(frozen=True, slots=True)
class TapGrid:
    """Taps that two kernels share: groups, and by axis the first tap, the distance between taps, and their number."""

    groups: int
    first: Places
    dilations: Places
    sizes: Places

    def work(self, outputs: int, inputs: int) -> int:
        """The multiplications of a kernel with all of these taps, a place."""
        return outputs * (inputs // self.groups) * prod(self.sizes)


def read_kernel(node: Node) -> Kernel:
    """The kernel of a Conv or Gemm with constant weights. Raises EditRefused for others."""
    layer, stored, data = read_layer(node), constant_array(node.inputs[1]), node.inputs[0]
    assert stored is not None
    assert data is not None
    sizes = stored.shape[2:] if standard_op_type(node) == "Conv" else ()
    outputs, groups = layer.outputs, layer.weight.shape[0]
    weight = layer.weight.astype(np.float64).reshape(outputs, layer.weight.shape[2], *sizes)
    ones = [1] * len(sizes)
    pads = settled_pads(node, data) if sizes else []
    dilations, strides = tuple(attribute(node, "dilations", ones)), tuple(attribute(node, "strides", ones))
    reach = [(size - 1) * dilation for size, dilation in zip(sizes, dilations, strict=True)]
    begin, end = pads[: len(sizes)], pads[len(sizes) :]
    rest = tuple(a + b - far for a, b, far in zip(begin, end, reach, strict=True))
    return Kernel(weight, layer.bias, groups, tuple(-p for p in begin), dilations, strides, rest, weight.size)


def identity_like(kernel: Kernel) -> Kernel:
    """The identity of as many channels as the kernel reads, with a place for each of its axes."""
    channels, axes = kernel.inputs, len(kernel.sizes)
    ones, zeros = (1,) * axes, (0,) * axes
    weight = np.ones((channels, 1, *ones)) if axes else np.eye(channels)
    groups = channels if axes else 1
    return Kernel(weight, np.zeros(channels), groups, zeros, ones, ones, zeros, work=0)


def join_grids(one: Kernel, other: Kernel) -> TapGrid:
    """The coarsest grid that has the taps of both."""
    first, dilations, sizes = [], [], []
    for a, b, far_a, far_b, n_a, n_b in zip(
        *(one.first, other.first, one.dilations, other.dilations, one.sizes, other.sizes), strict=True
    ):
        step = gcd(a - b, far_a if n_a > 1 else 0, far_b if n_b > 1 else 0) or 1
        last = max(a + (n_a - 1) * far_a, b + (n_b - 1) * far_b)
        first.append(min(a, b))
        dilations.append(step)
        sizes.append((last - min(a, b)) // step + 1)
    return TapGrid(gcd(one.groups, other.groups), tuple(first), tuple(dilations), tuple(sizes))


def add_kernels(one: Kernel, other: Kernel) -> Kernel:
    """The kernel of the sum of both, on their common grid. They have the same inputs, outputs and strides."""
    grid = join_grids(one, other)
    weight = _spread(one, grid) + _spread(other, grid)
    joined = replace(one, weight=weight, bias=one.bias + other.bias, groups=grid.groups, work=weight.size)
    return replace(joined, first=grid.first, dilations=grid.dilations)


def _spread(kernel: Kernel, grid: TapGrid) -> Float64:
    """The weights of a kernel on a grid that has its taps, with zeros elsewhere: (O, I/groups, *sizes)."""
    weight = widen_groups(kernel.weight, kernel.groups, grid.groups)
    found = np.zeros((*weight.shape[:2], *grid.sizes))
    axes = zip(kernel.first, grid.first, kernel.dilations, grid.dilations, kernel.sizes, strict=True)
    taps = [(a - start) // step + np.arange(count) * max(far // step, 1) for a, start, far, step, count in axes]
    found[np.ix_(*map(np.arange, weight.shape[:2]), *taps)] = weight
    return found


def widen_groups(weight: Float64, groups: int, wanted: int) -> Float64:
    """The weights (O, I/groups, ...) in fewer groups, `wanted`, a divisor: (O, I/wanted, ...), with zeros between."""
    if groups == wanted:
        return weight
    outputs, own = weight.shape[:2]
    found = np.zeros((outputs, own * groups // wanted, *weight.shape[2:]))
    rows = outputs // groups
    for group in range(groups):
        start = group % (groups // wanted) * own
        found[group * rows : (group + 1) * rows, start : start + own] = weight[group * rows : (group + 1) * rows]
    return found


def write_kernel(model: Model, node: Node, source: Value, kernel: Kernel) -> None:
    """Make `node`, a Conv or Gemm, the layer with this kernel that reads `source`. Its name and its output stay.

    Raises EditRefused, before anything is changed, where float32 does not have the numbers.
    """
    stored = constant_array(node.inputs[1])
    assert stored is not None
    with np.errstate(over="ignore"):
        weight = kernel.weight.astype(stored.dtype)
    by_group = weight.reshape(kernel.groups, kernel.outputs // kernel.groups, weight.shape[1], -1)
    check_finite(Layer(node, by_group, kernel.bias))
    inputs = [source, model.constant(f"{title(node)}_weight", weight)]
    if kernel.bias.any() or input_of(node, 2) is not None:
        inputs.append(model.constant(f"{title(node)}_bias", kernel.bias.astype(stored.dtype)))
    if standard_op_type(node) == "Gemm":
        model.become(node, "Gemm", inputs, {"transB": 1})
        return
    attributes = {
        "kernel_shape": list(kernel.sizes),
        "pads": kernel.pads,
        "strides": list(kernel.strides),
        "dilations": list(kernel.dilations),
        "group": kernel.groups,
    }
    model.become(node, "Conv", inputs, attributes)


def why_apart(one: Kernel, other: Kernel) -> str:
    """Why two kernels of one tensor cannot be one, or had better not be, with places for both names; empty if they can.

    The maps that they write are taken to be of one size.
    """
    if (one.inputs, one.outputs) != (other.inputs, other.outputs):
        return "{} has another number of channels than {}"
    if one.strides != other.strides:
        return "{} has other strides than {}"
    grid = join_grids(one, other)
    if grid.work(one.outputs, one.inputs) > one.work + other.work:
        pairs = zip(one.sizes, other.sizes, one.dilations, other.dilations, strict=True)
        if any(a != b for n, m, a, b in pairs if min(n, m) > 1):
            return "{} has other dilations than {}"
        return "{} and {} take fewer multiplications apart"
    if _is_scale(other) and _drowns_weights(one, other):
        return "{} as one tap of {} would leave too few of 8 bits for the other weights"
    reach = [first + (n - 1) * step for first, n, step in zip(grid.first, grid.sizes, grid.dilations, strict=True)]
    if any(rest + last < 0 for rest, last in zip(one.rest, reach, strict=True)):
        return "{} pads to another size than {}"
    return ""


def _is_scale(kernel: Kernel) -> bool:
    """Whether it is the identity or a scale of each channel."""
    return kernel.work == 0 or (prod(kernel.sizes) == 1 and kernel.groups == kernel.inputs == kernel.outputs)


def _drowns_weights(one: Kernel, other: Kernel) -> bool:
    """Whether rounding the sum of both to 8 bits a channel costs more than LEAST_WEIGHT_DB allows, and more than `one`.

    With one scale for N weights w, and inputs of equal power, signal to noise is 12 * 127^2 |w|^2 / (N max w^2).
    """
    if one.weight[0].size < MOST_SAFE_WEIGHTS:
        return False
    return _weight_db(add_kernels(one, other)) < min(LEAST_WEIGHT_DB, _weight_db(one))


def _weight_db(kernel: Kernel) -> float:
    rows = kernel.weight.reshape(kernel.outputs, -1)
    power, peak = np.square(rows).mean(axis=1), np.square(rows).max(axis=1)
    share = np.divide(power, peak, out=np.ones_like(peak), where=peak > 0)
    return float(10 * np.log10(12 * 127**2 * np.median(share)))
