"""Uniform affine quantization: the only rounding code in the project.

    code = saturate(round_half_even(x / scale) + zero_point)        x ~ (code - zero_point) * scale

exactly as ONNX's QuantizeLinear and DequantizeLinear compute it in float32 (checked bit for bit against ONNX Runtime).
Ranges always contain zero, so that zero padding is represented exactly. It does not choose ranges: calibrators do.

Source: Krishnamoorthi 2018, arXiv 1806.08342, section 2; the operator specification of QuantizeLinear.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qconv.errors import QconvError

SMALLEST_SCALE = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, slots=True)
class PerTensor:
    """One scale and zero point for the whole tensor."""


@dataclass(frozen=True, slots=True)
class PerChannel:
    """One scale and zero point for each index along `axis`."""

    axis: int


@dataclass(frozen=True, slots=True)
class PerBlock:
    """One scale and zero point for each run of `size` elements along `axis`; the last run may be short."""

    axis: int
    size: int


Granularity = PerTensor | PerChannel | PerBlock


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """How a tensor is to be quantized, before any value of it has been seen.

    Signed symmetric codes use the narrow range -(2^(b-1)-1) .. 2^(b-1)-1 with zero point 0. Unsigned symmetric codes
    have zero point 0 where the tensor is never negative and the middle code 2^(b-1) elsewhere.
    """

    bits: int
    signed: bool
    symmetric: bool
    granularity: Granularity = field(default_factory=PerTensor)

    @property
    def qmin(self) -> int:
        """The lowest code."""
        if not self.signed:
            return 0
        return -(1 << (self.bits - 1)) + (1 if self.symmetric else 0)

    @property
    def qmax(self) -> int:
        """The highest code."""
        return (1 << (self.bits - (1 if self.signed else 0))) - 1

    @property
    def dtype(self) -> np.dtype[Any]:
        """The container of the codes: the smallest whole-byte integer that holds them."""
        width = 8 if self.bits <= 8 else 16 if self.bits <= 16 else 32
        return np.dtype(f"{'int' if self.signed else 'uint'}{width}")

    def from_range(self, low: ArrayLike, high: ArrayLike) -> QuantParams:
        """Scale and zero point for values in [low, high], widened to contain zero.

        low, high: scalars, or arrays with one entry a channel or block. Raises QconvError on NaN or infinity.
        """
        low64 = np.minimum(np.asarray(low, np.float64), 0.0)
        high64 = np.maximum(np.asarray(high, np.float64), 0.0)
        if not (np.all(np.isfinite(low64)) and np.all(np.isfinite(high64))):
            raise QconvError(
                "The model has weights that are NaN or infinite.", "check the float model, or how it was exported."
            )
        if self.symmetric:
            zero = self._symmetric_zero(low64)
            reach = np.maximum(-low64, high64)
            scale = reach / np.where(zero == self.qmin, self.qmax - self.qmin, self.qmax - zero)
        else:
            scale = (high64 - low64) / (self.qmax - self.qmin)
            zero = np.zeros(scale.shape, np.int64)
        # An all-zero tensor has no scale of its own: 1 keeps its codes at the zero point.
        scale32 = np.where(scale > 0, np.maximum(scale, SMALLEST_SCALE), 1.0).astype(np.float32)
        if not self.symmetric:
            zero = np.clip(np.rint(self.qmin - low64 / scale32), self.qmin, self.qmax).astype(np.int64)
        return QuantParams(self, scale32, np.asarray(zero, self.dtype))

    def _symmetric_zero(self, low: NDArray[np.float64]) -> NDArray[np.int64]:
        if self.signed:
            return np.zeros(low.shape, np.int64)
        return np.where(low < 0, 2 ** (self.bits - 1), 0).astype(np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class QuantParams:
    """A spec with its numbers.

    scale: float32, zero_point: the codes' dtype; both of shape () per tensor, (C,) per channel and, per block, the
    tensor's shape with the blocked axis replaced by the number of blocks. bits: of each channel, (C,), where they have
    bits of their own, those of the spec on average and 8 at most.
    """

    spec: QuantSpec
    scale: NDArray[np.float32]
    zero_point: NDArray[np.integer]
    bits: NDArray[np.int64] | None = None

    @property
    def widest(self) -> int:
        """The most bits that any code has."""
        return self.spec.bits if self.bits is None else int(self.bits.max())

    @property
    def limits(self) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
        """The lowest and the highest code: shape (), or (C,) where channels have bits of their own."""
        if self.bits is None:
            return np.asarray(self.spec.qmin), np.asarray(self.spec.qmax)
        own = [replace(self.spec, bits=int(bits)) for bits in self.bits]
        return np.array([spec.qmin for spec in own]), np.array([spec.qmax for spec in own])

    def quantize(self, x: NDArray[Any]) -> NDArray[np.integer]:
        """Codes of x, in the spec's container dtype. Ties round to even; values out of range saturate."""
        # int32 biases need more digits than float32 has; everything else is rounded as the runtime rounds it.
        real = np.float64 if self.spec.bits > 16 else np.float32
        scale, zero = (part.astype(real) for part in self.broadcast(x.shape))
        with np.errstate(over="ignore"):
            codes = np.asarray(np.divide(x.astype(real, copy=False), scale))
        # in place: weights can be most of what is in memory
        np.rint(codes, out=codes)
        codes += zero
        low, high = (self._broadcast(limit, x.shape) if limit.ndim else limit for limit in self.limits)
        np.clip(codes, low, high, out=codes)
        limited: NDArray[np.integer] = codes.astype(self.spec.dtype)
        return limited

    def dequantize(self, codes: NDArray[np.integer]) -> NDArray[np.float32]:
        """The real numbers that codes stand for."""
        # differences of up to 16 bits are exact in float32
        wide = np.int64 if self.spec.bits > 16 else np.float32
        scale, zero = self.broadcast(codes.shape)
        steps = (codes.astype(wide) - zero.astype(wide)).astype(np.float32)
        real: NDArray[np.float32] = np.multiply(steps, scale, dtype=np.float32)
        return real

    def fake_quantize(self, x: NDArray[Any]) -> NDArray[np.float32]:
        """x rounded to the grid: `dequantize(quantize(x))`."""
        return self.dequantize(self.quantize(x))

    def code_range(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The smallest and the largest real number that has a code."""
        zero = self.zero_point.astype(np.float32)
        low, high = (limit.astype(np.float32) for limit in self.limits)
        return (low - zero) * self.scale, (high - zero) * self.scale

    def broadcast(self, shape: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.integer]]:
        """Scale and zero point, each with an axis for every axis of a tensor of this shape, to be broadcast to it."""
        return self._broadcast(self.scale, shape), self._broadcast(self.zero_point, shape)

    def with_scale(self, scale: NDArray[np.float32]) -> QuantParams:
        """The same spec and zero point on another step."""
        return replace(self, scale=np.asarray(scale, np.float32))

    def _broadcast(self, parameter: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        match self.spec.granularity:
            case PerChannel(axis):
                return broadcast_parameter(parameter, shape, axis)
            case PerBlock(axis, size):
                return broadcast_parameter(parameter, shape, axis, size)
            case _:
                return broadcast_parameter(parameter, shape)


def broadcast_parameter(parameter: NDArray[Any], shape: tuple[int, ...], axis: int = 0, block: int = 0) -> NDArray[Any]:
    """A scale or zero point with an axis for every axis of a tensor of this shape, to be broadcast to it.

    Args:
        parameter: one number of any shape; or those of the channels along `axis`, (C,) or with axes of 1 around; or
            those of blocks, with the tensor's shape but for `axis`, which has the number of blocks.
        axis: of the tensor, along which numbers differ.
        block: elements along `axis` that share a number; 0 where no blocks do.
    """
    if parameter.size == 1:
        return parameter.reshape((1,) * len(shape))
    if block:
        return np.repeat(parameter, block, axis=axis).take(np.arange(shape[axis]), axis=axis)
    return parameter.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])


def group_extremes(x: NDArray[Any], granularity: Granularity) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Minimum and maximum of x for each group that shares parameters, in the shape `QuantParams` wants."""
    match granularity:
        case PerChannel(axis):
            rest = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
            return x.min(axis=rest), x.max(axis=rest)
        case PerBlock(axis, size):
            starts = np.arange(0, x.shape[axis], size)
            return np.minimum.reduceat(x, starts, axis=axis), np.maximum.reduceat(x, starts, axis=axis)
        case _:
            return np.asarray(x.min()), np.asarray(x.max())


def bias_params(scale: NDArray[np.float32]) -> QuantParams:
    """int32 parameters of a bias: the exact float32 product of its layer's input and weight scales, zero point 0."""
    granularity: Granularity = PerChannel(0) if scale.ndim else PerTensor()
    spec = QuantSpec(32, signed=True, symmetric=True, granularity=granularity)
    return QuantParams(spec, scale, np.zeros(scale.shape, np.int32))
