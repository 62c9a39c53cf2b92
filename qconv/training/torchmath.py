"""ONNX operators that compute, in PyTorch, as ONNX defines them and so that gradients go through.

Codes are floats here, whole numbers as they come out of rounding. Rounding hands gradients on as they are (the
straight-through estimator), which is all that quantizers need: with one scale s in QuantizeLinear and DequantizeLinear,

    y = round(clamp(x / s, low - z, high - z)) s    dy/dx = 1 inside, 0 outside
                                                    dy/ds = round(x / s) - x / s inside, the last code less z outside

is what Esser et al. 2020 (LSQ, arXiv 1902.08153, equation 3) derive; automatic differentiation finds it by itself. The
codes are those of ONNX, which rounds first. torchfake.py does the same in one step, Clips of codes included.

Convolution is of one to three axes, pooling of one or two. An operator that is not in the table, and an attribute that
means something else than what is built here, is an error that names it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from qconv.training.torchop import Given, Op, Run, every, first, numbers, optional, torch_pads

INT_RANGES = {2: (0, 255), 3: (-128, 127), 4: (0, 65535), 5: (-32768, 32767), 21: (0, 15), 22: (-8, 7)}
"""Least and largest code of ONNX's element types that QuantizeLinear can write."""
INTEGERS = {6: torch.int32, 7: torch.int64, 9: torch.bool}
FLOATS = frozenset({1, 10, 11, 16})


class _Round(torch.autograd.Function):
    """To the nearest, ties to even; the gradient is handed on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


def rounded(x: Tensor) -> Tensor:
    """Whole numbers, ties to even, with the gradient of the identity."""
    found: Tensor = _Round.apply(x)
    return found


# -- quantizers --------------------------------------------------------------------------------------------------------


def side_by_side(x: Tensor, like: Tensor, axis: int, block: int) -> Tensor:
    """A scale or zero point, to be broadcast against `like`."""
    if x.ndim == 0 or x.numel() == 1:
        return x.reshape([1] * like.ndim) if like.ndim else x.reshape(())
    if block:
        return x.repeat_interleave(block, dim=axis).narrow(axis, 0, like.shape[axis])
    return x.reshape([-1 if i == axis % like.ndim else 1 for i in range(like.ndim)])


def _quantize(op: Op, given: Given) -> Tensor:
    x, scale, zero = first(given), given[1], optional(given, 2)
    assert scale is not None
    axis, block = op.get("axis", 1), op.get("block_size", 0)
    if op.codes not in INT_RANGES:
        raise op.refuse(f"writes codes of type {op.codes}")
    steps, (low, high) = x / side_by_side(scale, x, axis, block), INT_RANGES[op.codes]
    if zero is None:
        return rounded(torch.clamp(steps, low, high))
    zero = side_by_side(zero, x, axis, block)
    return rounded(torch.clamp(steps, low - zero, high - zero)) + zero


def _dequantize(op: Op, given: Given) -> Tensor:
    codes, scale, zero = first(given).to(torch.float32), given[1], optional(given, 2)
    assert scale is not None
    axis, block = op.get("axis", 1), op.get("block_size", 0)
    if zero is not None:
        codes = codes - side_by_side(zero.to(torch.float32), codes, axis, block)
    return codes * side_by_side(scale, codes, axis, block)


# -- layers ------------------------------------------------------------------------------------------------------------


def _pads(op: Op, size: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dil: Sequence[int]) -> list[int]:
    """Begins and ends of Conv and pooling, auto_pad worked out."""
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


def _conv(op: Op, given: Given) -> Tensor:
    x, weight, bias = first(given), given[1], optional(given, 2)
    assert weight is not None
    axes = x.ndim - 2
    if axes not in CONV:
        raise op.refuse(f"has {axes} spatial axes")
    kernel = weight.shape[2:]
    strides, dil = op.get("strides", [1] * axes), op.get("dilations", [1] * axes)
    pads = _pads(op, x.shape[2:], kernel, strides, dil)
    if pads[:axes] == pads[axes:]:
        return CONV[axes](x, weight, bias, strides, pads[:axes], dil, op.get("group", 1))
    return CONV[axes](F.pad(x, torch_pads(pads)), weight, bias, strides, 0, dil, op.get("group", 1))


def _conv_transpose(op: Op, given: Given) -> Tensor:
    x, weight, bias = first(given), given[1], optional(given, 2)
    assert weight is not None
    axes = x.ndim - 2
    if axes not in CONV_TRANSPOSE or op.get("output_shape") or op.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise op.refuse("has its output's shape from elsewhere")
    strides, dil = op.get("strides", [1] * axes), op.get("dilations", [1] * axes)
    pads, more = op.get("pads", [0] * (2 * axes)), op.get("output_padding", [0] * axes)
    whole = CONV_TRANSPOSE[axes](x, weight, None, strides, 0, 0, op.get("group", 1), dil)
    whole = F.pad(
        whole, torch_pads([-p for p in pads[:axes]] + [m - p for m, p in zip(more, pads[axes:], strict=True)])
    )
    return whole if bias is None else whole + bias.reshape([1, -1] + [1] * axes)


def _gemm(op: Op, given: Given) -> Tensor:
    a, b, c = first(given), given[1], optional(given, 2)
    assert b is not None
    a = a.T if op.get("transA", 0) else a
    b = b.T if op.get("transB", 0) else b
    found: Tensor = (a @ b) * op.get("alpha", 1.0)
    return found if c is None else found + c * op.get("beta", 1.0)


def _batch_norm(op: Op, given: Given) -> Tensor:
    x, gamma, beta, mean, var = every(given)
    shape = [1, -1] + [1] * (x.ndim - 2)
    gain = gamma / torch.sqrt(var + op.get("epsilon", 1e-5))
    return torch.addcmul((beta - mean * gain).reshape(shape), x, gain.reshape(shape))


def _instance_norm(op: Op, given: Given) -> Tensor:
    x, gamma, beta = every(given)
    return F.instance_norm(x, weight=gamma, bias=beta, eps=op.get("epsilon", 1e-5))


def _lrn(op: Op, given: Given) -> Tensor:
    return F.local_response_norm(
        first(given), op.get("size"), op.get("alpha", 1e-4), op.get("beta", 0.75), op.get("bias", 1.0)
    )


# -- pools -------------------------------------------------------------------------------------------------------------


def _windows(op: Op, x: Tensor) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
    """Kernel, strides, dilations, pads, and what ceil_mode adds at the ends so that the last windows are whole."""
    kernel = list(op.get("kernel_shape"))
    axes = len(kernel)
    strides, dil = list(op.get("strides", [1] * axes)), list(op.get("dilations", [1] * axes))
    pads = _pads(op, x.shape[2:], kernel, strides, dil)
    extra = [0] * axes
    for i, (side, k, s, d) in enumerate(zip(x.shape[2:], kernel, strides, dil, strict=True)):
        span, reach = side + pads[i] + pads[i + axes], (k - 1) * d + 1
        if op.get("ceil_mode", 0):
            count = math.ceil((span - reach) / s) + 1
            if (count - 1) * s >= side + pads[i]:  # a window may not begin in the padding behind
                count -= 1
            extra[i] = max((count - 1) * s + reach - span, 0)
    return kernel, strides, dil, pads, extra


def _max_pool(op: Op, given: Given) -> Tensor:
    x = first(given)
    if op.outputs > 1 or x.ndim not in (3, 4):
        raise op.refuse("tells places, or is not of one or two axes")
    kernel, strides, dil, pads, extra = _windows(op, x)
    half = len(kernel)
    ends = pads[:half] + [p + e for p, e in zip(pads[half:], extra, strict=True)]
    padded = F.pad(x, torch_pads(ends), value=-math.inf) if any(ends) else x
    pool: Callable[..., Tensor] = F.max_pool1d if half == 1 else F.max_pool2d
    return pool(padded, kernel, strides, 0, dil)


def _sums(x: Tensor, kernel: list[int], strides: list[int]) -> Tensor:
    if len(kernel) == 1:
        found = F.avg_pool2d(x[:, :, None], [1, *kernel], [1, *strides], divisor_override=1)
        return found[:, :, 0]
    return F.avg_pool2d(x, kernel, strides, divisor_override=1)


def _average_pool(op: Op, given: Given) -> Tensor:
    x = first(given)
    kernel, strides, dil, pads, extra = _windows(op, x)
    if any(d != 1 for d in dil) or x.ndim not in (3, 4):
        raise op.refuse("is dilated, or not of one or two axes")
    behind = torch_pads([0] * len(kernel) + extra)
    total = _sums(F.pad(F.pad(x, torch_pads(pads)), behind), kernel, strides)
    counted = torch.ones_like(x[:1, :1])
    counted = F.pad(counted, torch_pads(pads), value=1.0 if op.get("count_include_pad", 0) else 0.0)
    return total / _sums(F.pad(counted, behind), kernel, strides)


def _global_average(op: Op, given: Given) -> Tensor:
    x = first(given)
    return x.mean(dim=list(range(2, x.ndim)), keepdim=True)


def _global_max(op: Op, given: Given) -> Tensor:
    x = first(given)
    return x.amax(dim=list(range(2, x.ndim)), keepdim=True)


def _reduce(how: Callable[..., Tensor]) -> Run:
    def run(op: Op, given: Given) -> Tensor:
        x, axes = first(given), op.get("axes")
        wanted = optional(given, 1)
        if wanted is not None:
            axes = numbers(wanted)
        if not axes and op.get("noop_with_empty_axes", 0):
            return x
        return how(x, dim=list(axes or range(x.ndim)), keepdim=bool(op.get("keepdims", 1)))

    return run


# -- element by element ------------------------------------------------------------------------------------------------


def _clip(op: Op, given: Given) -> Tensor:
    x, low, high = first(given), optional(given, 1), optional(given, 2)
    if low is None and high is None:
        return x
    if low is not None and high is not None and not low.requires_grad and not high.requires_grad:
        return F.hardtanh(x, low.item(), high.item())  # one pass back, where clamp takes four
    ends = [None if end is None else end.to(x.dtype) for end in (low, high)]
    return torch.clamp(x, ends[0], ends[1])


def _softmax(op: Op, given: Given) -> Tensor:
    x = first(given)
    return torch.softmax(x, dim=op.get("axis", -1))


def _log_softmax(op: Op, given: Given) -> Tensor:
    return torch.log_softmax(first(given), dim=op.get("axis", -1))


def _hard_sigmoid(op: Op, given: Given) -> Tensor:
    return torch.clamp(first(given) * op.get("alpha", 0.2) + op.get("beta", 0.5), 0.0, 1.0)


def _prelu(op: Op, given: Given) -> Tensor:
    x, slope = every(given)
    return torch.where(x < 0, x * slope, x)


def _gelu(op: Op, given: Given) -> Tensor:
    return F.gelu(first(given), approximate=op.get("approximate", "none"))


def _folded(how: Callable[[Tensor, Tensor], Tensor]) -> Run:
    """Sum, Max, Min of any number of tensors."""

    def run(op: Op, given: Given) -> Tensor:
        found, *others = every(given)
        for other in others:
            found = how(found, other)
        return found

    return run


def _two(how: Callable[[Tensor, Tensor], Tensor]) -> Run:
    def run(op: Op, given: Given) -> Tensor:
        a, b = every(given)
        return how(a, b)

    return run


def _div(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype.is_floating_point or b.dtype.is_floating_point:
        return a / b
    return torch.div(a, b, rounding_mode="trunc")


def _one(how: Callable[[Tensor], Tensor]) -> Run:
    return lambda op, given: how(first(given))


def _cast(op: Op, given: Given) -> Tensor:
    to, x = op.get("to"), first(given)
    if to in FLOATS:
        return x.to(torch.float32)
    if to in INTEGERS:
        return x.to(INTEGERS[to])
    if to in INT_RANGES:
        return torch.trunc(x) if x.dtype.is_floating_point else x.to(torch.float32)
    raise op.refuse(f"casts to type {to}")


def _dropout(op: Op, given: Given) -> Tensor:
    if op.outputs > 1:
        raise op.refuse("hands out its mask")
    return first(given)


COMPUTING: dict[str, Run] = {
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _two(torch.matmul),
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
    "Relu": _one(torch.relu),
    "LeakyRelu": lambda op, given: F.leaky_relu(first(given), op.get("alpha", 0.01)),
    "PRelu": _prelu,
    "Elu": lambda op, given: F.elu(first(given), op.get("alpha", 1.0)),
    "Clip": _clip,
    "Sigmoid": _one(torch.sigmoid),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _one(F.hardswish),
    "Tanh": _one(torch.tanh),
    "Softplus": _one(F.softplus),
    "Gelu": _gelu,
    "Erf": _one(torch.erf),
    "Exp": _one(torch.exp),
    "Log": _one(torch.log),
    "Sqrt": _one(torch.sqrt),
    "Abs": _one(torch.abs),
    "Neg": _one(torch.neg),
    "Reciprocal": _one(torch.reciprocal),
    "Floor": _one(torch.floor),
    "Ceil": _one(torch.ceil),
    "Round": _one(torch.round),
    "Softmax": _softmax,
    "LogSoftmax": _log_softmax,
    "Add": _two(torch.add),
    "Sub": _two(torch.sub),
    "Mul": _two(torch.mul),
    "Div": _two(_div),
    "Pow": _two(torch.pow),
    "Sum": _folded(torch.add),
    "Max": _folded(torch.maximum),
    "Min": _folded(torch.minimum),
    "Identity": _one(lambda x: x),
    "Dropout": _dropout,
    "Cast": _cast,
}
"""Operators that compute."""
