"""This module runs ONNX operators in PyTorch as ONNX defines them, with gradients.

Integer values are floats that hold whole numbers, those of ONNX, which rounds first. Rounding has the straight-through
gradient; with one scale s in QuantizeLinear and DequantizeLinear automatic differentiation then gives LSQ (Esser et al.
2020, arXiv 1902.08153, equation 3):

    y = round(clamp(x / s, low - z, high - z)) s    dy/dx = 1 inside, 0 outside
                                                    dy/ds = round(x / s) - x / s inside, the last code less z outside

`network` does the same in one step, Clips of integers included. Convolution has one to three axes, pooling one or two.
An operator that is not in the tables, and an attribute that means something else, is an error that names it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from qconv.errors import QconvError

OperatorInputs = Sequence[Tensor | None]


@dataclass(frozen=True, slots=True)
class Op:
    """A node, as far as its operator needs it.

    Attributes:
        name: The node's name, for messages.
        op_type: The ONNX operator.
        attributes: The node's attributes as Python values.
        opset: Of the model.
        outputs: How many outputs the node has.
        codes: For QuantizeLinear, the ONNX element type of the integers that it writes.
    """

    name: str
    op_type: str
    attributes: dict[str, Any]
    opset: int
    outputs: int = 1
    codes: int | None = None

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute, or `default` where it is absent."""
        return self.attributes.get(name, default)

    def refuse(self, what: str) -> QconvError:
        """Build the error for an attribute or input that is not supported."""
        fact = f"{self.op_type} {self.name!r} {what}, which qconv does not run in PyTorch."
        return QconvError(fact, "training, synthesized pictures and reconstruction are not possible for this network.")


OperatorFunction = Callable[[Op, OperatorInputs], Tensor | tuple[Tensor, ...]]
"""Runs an operator: node and inputs to one or several outputs."""


def to_numbers(x: Tensor) -> list[Any]:
    """Convert a tensor of a shape, of axes and the like to Python numbers."""
    return list(x.reshape(-1).tolist())


def first_input(given: OperatorInputs) -> Tensor:
    """Return the first input, which every operator here has."""
    x = given[0]
    assert x is not None
    return x


def optional_input(given: OperatorInputs, index: int) -> Tensor | None:
    """Return input `index`, None where the node has none."""
    return given[index] if index < len(given) else None


def present_inputs(given: OperatorInputs) -> list[Tensor]:
    """Return all inputs that are there."""
    return [x for x in given if x is not None]


def to_torch_pads(pads: Sequence[int]) -> list[int]:
    """Convert ONNX's pads (all begins, then all ends) to PyTorch's (last axis first, begin and end)."""
    half = len(pads) // 2
    return [pads[i + side * half] for i in reversed(range(half)) for side in (0, 1)]


INT_RANGES = {2: (0, 255), 3: (-128, 127), 4: (0, 65535), 5: (-32768, 32767), 21: (0, 15), 22: (-8, 7)}
"""Range of the integers of each ONNX element type that QuantizeLinear can write."""

INTEGER_DTYPES = {6: torch.int32, 7: torch.int64, 9: torch.bool}

FLOAT_TYPES = frozenset({1, 10, 11, 16})


class _StraightThroughRound(torch.autograd.Function):
    """Rounding to the nearest, ties to even, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


def round_straight_through(x: Tensor) -> Tensor:
    """Round to whole numbers, ties to even, with the gradient of the identity."""
    found: Tensor = _StraightThroughRound.apply(x)
    return found


# -- quantizers --------------------------------------------------------------------------------------------------------


def broadcast_tensor(x: Tensor, like: Tensor, axis: int, block: int) -> Tensor:
    """Reshape a scale or zero point so that it broadcasts against `like`, as `quantizer.broadcast_parameter` does."""
    if x.ndim == 0 or x.numel() == 1:
        return x.reshape([1] * like.ndim) if like.ndim else x.reshape(())
    if block:
        return x.repeat_interleave(block, dim=axis).narrow(axis, 0, like.shape[axis])
    return x.reshape([-1 if i == axis % like.ndim else 1 for i in range(like.ndim)])


def _quantize(op: Op, given: OperatorInputs) -> Tensor:
    x, scale, zero = first_input(given), given[1], optional_input(given, 2)
    assert scale is not None
    axis, block = op.get("axis", 1), op.get("block_size", 0)
    if op.codes not in INT_RANGES:
        raise op.refuse(f"writes codes of type {op.codes}")
    steps, (low, high) = x / broadcast_tensor(scale, x, axis, block), INT_RANGES[op.codes]
    if zero is None:
        return round_straight_through(torch.clamp(steps, low, high))
    zero = broadcast_tensor(zero, x, axis, block)
    return round_straight_through(torch.clamp(steps, low - zero, high - zero)) + zero


def _dequantize(op: Op, given: OperatorInputs) -> Tensor:
    codes, scale, zero = first_input(given).to(torch.float32), given[1], optional_input(given, 2)
    assert scale is not None
    axis, block = op.get("axis", 1), op.get("block_size", 0)
    if zero is not None:
        codes = codes - broadcast_tensor(zero.to(torch.float32), codes, axis, block)
    return codes * broadcast_tensor(scale, codes, axis, block)


# -- layers ------------------------------------------------------------------------------------------------------------


def _resolve_pads(
    op: Op, size: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dil: Sequence[int]
) -> list[int]:
    """Resolve the begins and ends of Conv and pooling, auto_pad included."""
    auto = op.get("auto_pad", "NOTSET")
    if auto in ("NOTSET", ""):
        return list(op.get("pads", [0] * (2 * len(kernel))))
    if auto == "VALID":
        return [0] * (2 * len(kernel))
    if any(d != 1 for d in dil):
        raise op.refuse("is dilated and pads by itself")
    begins, ends = [], []
    for side, k, s, d in zip(size, kernel, strides, dil, strict=True):
        total = max((-(-side // s) - 1) * s + (k - 1) * d + 1 - side, 0)
        small, large = total // 2, total - total // 2
        begins.append(small if auto == "SAME_UPPER" else large)
        ends.append(large if auto == "SAME_UPPER" else small)
    return begins + ends


CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

CONV_TRANSPOSE: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


def _conv(op: Op, given: OperatorInputs) -> Tensor:
    x, weight, bias = first_input(given), given[1], optional_input(given, 2)
    assert weight is not None
    axes = x.ndim - 2
    if axes not in CONV:
        raise op.refuse(f"has {axes} spatial axes")
    kernel = weight.shape[2:]
    strides, dil = op.get("strides", [1] * axes), op.get("dilations", [1] * axes)
    pads = _resolve_pads(op, x.shape[2:], kernel, strides, dil)
    if pads[:axes] == pads[axes:]:
        return CONV[axes](x, weight, bias, strides, pads[:axes], dil, op.get("group", 1))
    return CONV[axes](F.pad(x, to_torch_pads(pads)), weight, bias, strides, 0, dil, op.get("group", 1))


def _conv_transpose(op: Op, given: OperatorInputs) -> Tensor:
    x, weight, bias = first_input(given), given[1], optional_input(given, 2)
    assert weight is not None
    axes = x.ndim - 2
    if axes not in CONV_TRANSPOSE or op.get("output_shape") or op.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise op.refuse("has its output's shape from elsewhere")
    strides, dil = op.get("strides", [1] * axes), op.get("dilations", [1] * axes)
    pads, more = op.get("pads", [0] * (2 * axes)), op.get("output_padding", [0] * axes)
    whole = CONV_TRANSPOSE[axes](x, weight, None, strides, 0, 0, op.get("group", 1), dil)
    whole = F.pad(
        whole, to_torch_pads([-p for p in pads[:axes]] + [m - p for m, p in zip(more, pads[axes:], strict=True)])
    )
    return whole if bias is None else whole + bias.reshape([1, -1] + [1] * axes)


def _gemm(op: Op, given: OperatorInputs) -> Tensor:
    a, b, c = first_input(given), given[1], optional_input(given, 2)
    assert b is not None
    a = a.T if op.get("transA", 0) else a
    b = b.T if op.get("transB", 0) else b
    found: Tensor = (a @ b) * op.get("alpha", 1.0)
    return found if c is None else found + c * op.get("beta", 1.0)


def _batch_norm(op: Op, given: OperatorInputs) -> Tensor:
    x, gamma, beta, mean, var = present_inputs(given)
    shape = [1, -1] + [1] * (x.ndim - 2)
    gain = gamma / torch.sqrt(var + op.get("epsilon", 1e-5))
    return torch.addcmul((beta - mean * gain).reshape(shape), x, gain.reshape(shape))


def _instance_norm(op: Op, given: OperatorInputs) -> Tensor:
    x, gamma, beta = present_inputs(given)
    return F.instance_norm(x, weight=gamma, bias=beta, eps=op.get("epsilon", 1e-5))


def _lrn(op: Op, given: OperatorInputs) -> Tensor:
    return F.local_response_norm(
        first_input(given), op.get("size"), op.get("alpha", 1e-4), op.get("beta", 0.75), op.get("bias", 1.0)
    )


# -- pools -------------------------------------------------------------------------------------------------------------


def _pooling_windows(op: Op, x: Tensor) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
    """Resolve kernel, strides, dilations and pads, and what ceil_mode adds at the ends for whole last windows."""
    kernel = list(op.get("kernel_shape"))
    axes = len(kernel)
    strides, dil = list(op.get("strides", [1] * axes)), list(op.get("dilations", [1] * axes))
    pads = _resolve_pads(op, x.shape[2:], kernel, strides, dil)
    extra = [0] * axes
    for i, (side, k, s, d) in enumerate(zip(x.shape[2:], kernel, strides, dil, strict=True)):
        span, reach = side + pads[i] + pads[i + axes], (k - 1) * d + 1
        if op.get("ceil_mode", 0):
            count = math.ceil((span - reach) / s) + 1
            if (count - 1) * s >= side + pads[i]:  # a window may not begin in the padding behind
                count -= 1
            extra[i] = max((count - 1) * s + reach - span, 0)
    return kernel, strides, dil, pads, extra


def _max_pool(op: Op, given: OperatorInputs) -> Tensor:
    x = first_input(given)
    if op.outputs > 1 or x.ndim not in (3, 4):
        raise op.refuse("tells places, or is not of one or two axes")
    kernel, strides, dil, pads, extra = _pooling_windows(op, x)
    half = len(kernel)
    ends = pads[:half] + [p + e for p, e in zip(pads[half:], extra, strict=True)]
    padded = F.pad(x, to_torch_pads(ends), value=-math.inf) if any(ends) else x
    pool: Callable[..., Tensor] = F.max_pool1d if half == 1 else F.max_pool2d
    return pool(padded, kernel, strides, 0, dil)


def _sum_windows(x: Tensor, kernel: list[int], strides: list[int]) -> Tensor:
    if len(kernel) == 1:
        found = F.avg_pool2d(x[:, :, None], [1, *kernel], [1, *strides], divisor_override=1)
        return found[:, :, 0]
    return F.avg_pool2d(x, kernel, strides, divisor_override=1)


def _average_pool(op: Op, given: OperatorInputs) -> Tensor:
    x = first_input(given)
    kernel, strides, dil, pads, extra = _pooling_windows(op, x)
    if any(d != 1 for d in dil) or x.ndim not in (3, 4):
        raise op.refuse("is dilated, or not of one or two axes")
    behind = to_torch_pads([0] * len(kernel) + extra)
    total = _sum_windows(F.pad(F.pad(x, to_torch_pads(pads)), behind), kernel, strides)
    counted = torch.ones_like(x[:1, :1])
    counted = F.pad(counted, to_torch_pads(pads), value=1.0 if op.get("count_include_pad", 0) else 0.0)
    return total / _sum_windows(F.pad(counted, behind), kernel, strides)


def _global_average(op: Op, given: OperatorInputs) -> Tensor:
    x = first_input(given)
    return x.mean(dim=list(range(2, x.ndim)), keepdim=True)


def _global_max(op: Op, given: OperatorInputs) -> Tensor:
    x = first_input(given)
    return x.amax(dim=list(range(2, x.ndim)), keepdim=True)


def _reduce(how: Callable[..., Tensor]) -> OperatorFunction:
    def run(op: Op, given: OperatorInputs) -> Tensor:
        x, axes = first_input(given), op.get("axes")
        wanted = optional_input(given, 1)
        if wanted is not None:
            axes = to_numbers(wanted)
        if not axes and op.get("noop_with_empty_axes", 0):
            return x
        return how(x, dim=list(axes or range(x.ndim)), keepdim=bool(op.get("keepdims", 1)))

    return run


# -- element by element ------------------------------------------------------------------------------------------------


def _clip(op: Op, given: OperatorInputs) -> Tensor:
    x, low, high = first_input(given), optional_input(given, 1), optional_input(given, 2)
    if low is None and high is None:
        return x
    if low is not None and high is not None and not low.requires_grad and not high.requires_grad:
        return F.hardtanh(x, low.item(), high.item())  # one pass back, where clamp takes four
    ends = [None if end is None else end.to(x.dtype) for end in (low, high)]
    return torch.clamp(x, ends[0], ends[1])


def _softmax(op: Op, given: OperatorInputs) -> Tensor:
    x = first_input(given)
    return torch.softmax(x, dim=op.get("axis", -1))


def _log_softmax(op: Op, given: OperatorInputs) -> Tensor:
    return torch.log_softmax(first_input(given), dim=op.get("axis", -1))


def _hard_sigmoid(op: Op, given: OperatorInputs) -> Tensor:
    return torch.clamp(first_input(given) * op.get("alpha", 0.2) + op.get("beta", 0.5), 0.0, 1.0)


def _prelu(op: Op, given: OperatorInputs) -> Tensor:
    x, slope = present_inputs(given)
    return torch.where(x < 0, x * slope, x)


def _gelu(op: Op, given: OperatorInputs) -> Tensor:
    return F.gelu(first_input(given), approximate=op.get("approximate", "none"))


def _variadic(how: Callable[[Tensor, Tensor], Tensor]) -> OperatorFunction:
    """Build an operator of any number of inputs, such as Sum, Max and Min, from a binary function."""

    def run(op: Op, given: OperatorInputs) -> Tensor:
        found, *others = present_inputs(given)
        for other in others:
            found = how(found, other)
        return found

    return run


def _binary(how: Callable[[Tensor, Tensor], Tensor]) -> OperatorFunction:
    def run(op: Op, given: OperatorInputs) -> Tensor:
        a, b = present_inputs(given)
        return how(a, b)

    return run


def _div(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype.is_floating_point or b.dtype.is_floating_point:
        return a / b
    return torch.div(a, b, rounding_mode="trunc")


def _unary(how: Callable[[Tensor], Tensor]) -> OperatorFunction:
    return lambda op, given: how(first_input(given))


def _cast(op: Op, given: OperatorInputs) -> Tensor:
    to, x = op.get("to"), first_input(given)
    if to in FLOAT_TYPES:
        return x.to(torch.float32)
    if to in INTEGER_DTYPES:
        return x.to(INTEGER_DTYPES[to])
    if to in INT_RANGES:
        return torch.trunc(x) if x.dtype.is_floating_point else x.to(torch.float32)
    raise op.refuse(f"casts to type {to}")


def _dropout(op: Op, given: OperatorInputs) -> Tensor:
    if op.outputs > 1:
        raise op.refuse("hands out its mask")
    return first_input(given)


COMPUTE_OPERATORS: dict[str, OperatorFunction] = {
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _binary(torch.matmul),
    "BatchNormalization": _batch_norm,
    "InstanceNormalization": _instance_norm,
    "LRN": _lrn,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_average,
    "GlobalMaxPool": _global_max,
    "ReduceMean": _reduce(torch.mean),
    "ReduceSum": _reduce(torch.sum),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMin": _reduce(torch.amin),
    "Relu": _unary(torch.relu),
    "LeakyRelu": lambda op, given: F.leaky_relu(first_input(given), op.get("alpha", 0.01)),
    "PRelu": _prelu,
    "Elu": lambda op, given: F.elu(first_input(given), op.get("alpha", 1.0)),
    "Clip": _clip,
    "Sigmoid": _unary(torch.sigmoid),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _unary(F.hardswish),
    "Tanh": _unary(torch.tanh),
    "Softplus": _unary(F.softplus),
    "Gelu": _gelu,
    "Erf": _unary(torch.erf),
    "Exp": _unary(torch.exp),
    "Log": _unary(torch.log),
    "Sqrt": _unary(torch.sqrt),
    "Abs": _unary(torch.abs),
    "Neg": _unary(torch.neg),
    "Reciprocal": _unary(torch.reciprocal),
    "Floor": _unary(torch.floor),
    "Ceil": _unary(torch.ceil),
    "Round": _unary(torch.round),
    "Softmax": _softmax,
    "LogSoftmax": _log_softmax,
    "Add": _binary(torch.add),
    "Sub": _binary(torch.sub),
    "Mul": _binary(torch.mul),
    "Div": _binary(_div),
    "Pow": _binary(torch.pow),
    "Sum": _variadic(torch.add),
    "Max": _variadic(torch.maximum),
    "Min": _variadic(torch.minimum),
    "Identity": _unary(lambda x: x),
    "Dropout": _dropout,
    "Cast": _cast,
}
"""Operators that compute."""


Positions = NDArray[np.float64]

Indices = NDArray[np.int64]


# -- shapes and places -------------------------------------------------------------------------------------------------


def _read_axes(given: OperatorInputs) -> list[int] | None:
    """Read the axes of Squeeze and its kind, an attribute or an input."""
    wanted = optional_input(given, 1)
    return None if wanted is None else list(map(int, to_numbers(wanted)))


def _squeeze(op: Op, given: OperatorInputs) -> Tensor:
    x, axes = first_input(given), _read_axes(given)
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


def _unsqueeze(op: Op, given: OperatorInputs) -> Tensor:
    x, axes = first_input(given), _read_axes(given) or []
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _reshape(op: Op, given: OperatorInputs) -> Tensor:
    x, wanted = present_inputs(given)
    shape = to_numbers(wanted)
    if not op.get("allowzero", 0):
        shape = [x.shape[i] if side == 0 else side for i, side in enumerate(shape)]
    return x.reshape(shape)


def _flatten(op: Op, given: OperatorInputs) -> Tensor:
    x, axis = first_input(given), op.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), -1)


def _transpose(op: Op, given: OperatorInputs) -> Tensor:
    x = first_input(given)
    return x.permute(*op.get("perm", list(reversed(range(x.ndim)))))


def _slice(op: Op, given: OperatorInputs) -> Tensor:
    x, *parts = given
    assert x is not None
    starts, ends, axes, steps = (to_numbers(p) if p is not None else None for p in [*parts, None, None][:4])
    assert starts is not None
    assert ends is not None
    for axis, start, end, step in zip(
        axes or range(len(starts)), starts, ends, steps or [1] * len(starts), strict=True
    ):
        side, step = x.shape[axis], int(step)
        start = max(int(start), -side) if step < 0 else int(start)  # before the first is the first, also backwards
        places = range(side)[slice(start, int(end), step)]
        if step == 1:
            x = x.narrow(axis, places.start, len(places))
        else:
            x = x.index_select(axis, torch.tensor(list(places), dtype=torch.int64, device=x.device))
    return x


def _split(op: Op, given: OperatorInputs) -> tuple[Tensor, ...]:
    x, wanted = first_input(given), optional_input(given, 1)
    axis = op.get("axis", 0)
    if wanted is not None:
        return tuple(torch.split(x, to_numbers(wanted), dim=axis))
    return tuple(torch.split(x, -(-x.shape[axis] // op.outputs), dim=axis))


def _concat(op: Op, given: OperatorInputs) -> Tensor:
    return torch.cat(present_inputs(given), dim=op.get("axis"))


def _reflect_positions(places: Indices, side: int) -> Indices:
    period = max(2 * (side - 1), 1)
    return np.minimum(places % period, period - places % period)


PAD_MODES: dict[str, Callable[[Indices, int], Indices]] = {
    "edge": lambda places, side: np.clip(places, 0, side - 1),
    "reflect": _reflect_positions,
    "wrap": lambda places, side: places % side,
}
"""Index read at each position before and behind an axis of size `side`, by Pad's mode."""


def _pad(op: Op, given: OperatorInputs) -> Tensor:
    x, value = first_input(given), optional_input(given, 2)
    ends = to_numbers(present_inputs(given)[1])
    axes = optional_input(given, 3)
    if axes is not None:
        named = [int(axis) % x.ndim for axis in to_numbers(axes)]
        whole = [0] * (2 * x.ndim)
        for i, axis in enumerate(named):
            whole[axis], whole[axis + x.ndim] = ends[i], ends[i + len(named)]
        ends = whole
    mode = op.get("mode", "constant")
    if mode == "constant":
        return F.pad(x, to_torch_pads(ends), value=0.0 if value is None else float(value))
    if mode not in PAD_MODES:
        raise op.refuse(f"pads by {mode!r}")
    x = F.pad(x, to_torch_pads([min(end, 0) for end in ends]))  # cropped first: what is cut off is not repeated
    for axis, (before, behind) in enumerate(zip(ends[: x.ndim], ends[x.ndim :], strict=True)):
        if before > 0 or behind > 0:
            side = x.shape[axis]
            places = PAD_MODES[mode](np.arange(-max(before, 0), side + max(behind, 0)), side)
            x = x.index_select(axis, torch.as_tensor(places, device=x.device))
    return x


def _gather(op: Op, given: OperatorInputs) -> Tensor:
    x, at = present_inputs(given)
    axis = op.get("axis", 0) % x.ndim
    places = torch.where(at < 0, at + x.shape[axis], at).to(x.device)
    found = x.index_select(axis, places.reshape(-1))
    return found.reshape([*x.shape[:axis], *at.shape, *x.shape[axis + 1 :]])


def _shape(op: Op, given: OperatorInputs) -> Tensor:
    shape = list(first_input(given).shape)
    return torch.tensor(shape[op.get("start", 0) : op.get("end")], dtype=torch.int64)


def _expand(op: Op, given: OperatorInputs) -> Tensor:
    x, shape = present_inputs(given)
    wanted = torch.broadcast_shapes(x.shape, tuple(to_numbers(shape)))
    return x.expand(wanted)


def _tile(op: Op, given: OperatorInputs) -> Tensor:
    x, repeats = present_inputs(given)
    return x.repeat(tuple(to_numbers(repeats)))


def _depth_to_space(op: Op, given: OperatorInputs) -> Tensor:
    x, b = first_input(given), op.get("blocksize")
    n, c, h, w = x.shape
    if op.get("mode", "DCR") == "DCR":
        x = x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        x = x.reshape(n, c // b**2, b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(n, c // b**2, h * b, w * b)


def _space_to_depth(op: Op, given: OperatorInputs) -> Tensor:
    x, b = first_input(given), op.get("blocksize")
    n, c, h, w = x.shape
    return x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4).reshape(n, c * b * b, h // b, w // b)


# -- Resize ------------------------------------------------------------------------------------------------------------


TIE_TOLERANCE = 1e-5
"""A position this close to the middle of two counts as the middle: single precision, as in the runtime, cannot tell."""

NEAREST_MODES: dict[str, Callable[[Positions], Positions]] = {
    "round_prefer_floor": lambda places: np.ceil(places - 0.5 - TIE_TOLERANCE),
    "round_prefer_ceil": lambda places: np.floor(places + 0.5 + TIE_TOLERANCE),
    "floor": lambda places: np.floor(places),
    "ceil": lambda places: np.ceil(places),
}


def _resize(op: Op, given: OperatorInputs) -> Tensor:
    """Resize one axis after the other, each by a matrix (new, old) of weights.

    Sizes and positions are computed in single precision, as ONNX Runtime does, because that decides ties.
    """
    x, scales, sizes = first_input(given), optional_input(given, 2), optional_input(given, 3)
    if op.get("axes") or op.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        raise op.refuse("resizes only some axes, or crops")
    if op.get("antialias", 0) or op.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise op.refuse("smooths, or keeps the aspect ratio")
    if sizes is not None and sizes.numel():
        wanted = [int(side) for side in to_numbers(sizes)]
        factors = [np.float32(side) / np.float32(old) for side, old in zip(wanted, x.shape, strict=True)]
    else:
        assert scales is not None
        factors = [np.float32(s) for s in to_numbers(scales)]
        wanted = [math.floor(np.float32(side) * f) for side, f in zip(x.shape, factors, strict=True)]
    if wanted == list(x.shape):  # nothing is moved then, not even by a factor that is not 1
        return x
    for axis, (new, factor) in enumerate(zip(wanted, factors, strict=True)):
        if new != x.shape[axis] or factor != 1:
            matrix = torch.as_tensor(_resize_matrix(op, x.shape[axis], new, factor), dtype=x.dtype, device=x.device)
            x = torch.movedim(torch.movedim(x, axis, -1) @ matrix.T, -1, axis)
    return x


def _resize_matrix(op: Op, old: int, new: int, factor: np.float32) -> NDArray[np.float32]:
    """Compute the weights of the old positions in each new one, (new, old)."""
    at = np.arange(new, dtype=np.float32)
    match op.get("coordinate_transformation_mode", "half_pixel"):
        case "half_pixel":
            place = (at + 0.5) / factor - 0.5
        case "pytorch_half_pixel":
            place = (at + 0.5) / factor - 0.5 if new > 1 else at
        case "align_corners":
            place = at * (old - 1) / (new - 1) if new > 1 else at
        case "asymmetric":
            place = at / factor
        case other:
            raise op.refuse(f"has places by {other!r}")
    matrix, rows = np.zeros((new, old)), np.arange(new)
    mode = op.get("mode", "nearest")
    if mode == "nearest":
        how = op.get("nearest_mode", "round_prefer_floor")
        near = NEAREST_MODES[how](place.astype(np.float64))
        matrix[rows, np.clip(near, 0, old - 1).astype(int)] = 1
    elif mode == "linear":
        place = np.clip(place, 0, old - 1)
        left = np.floor(place).astype(int)
        np.add.at(matrix, (rows, left), 1 - (place - left))
        np.add.at(matrix, (rows, np.minimum(left + 1, old - 1)), place - left)
    else:
        raise op.refuse(f"interpolates by {mode!r}")
    return matrix.astype(np.float32)


SHAPE_OPERATORS: dict[str, OperatorFunction] = {
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Slice": _slice,
    "Split": _split,
    "Concat": _concat,
    "Pad": _pad,
    "Gather": _gather,
    "Shape": _shape,
    "Expand": _expand,
    "Tile": _tile,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "Resize": _resize,
}
"""Operators that move values about."""
