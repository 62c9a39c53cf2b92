"""Scales and bits of each channel: of a layer's weights by output channel, of a tensor along axis 1.

Ranges come first, as for the mean bits; their widths give the bits (see allocation.py), and the bits the final ranges.
Codes of a channel of b bits use the codes of b bits and no others, in the container that all channels share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from qconv.calibration import range_estimators
from qconv.calibration.sketch import Sketch
from qconv.errors import Change
from qconv.quantization.allocation import allocate
from qconv.quantization.weight_ranges import WEIGHT_RANGES, Ends, Floats
from qconv.quantizer import PerChannel, QuantParams, QuantSpec

MOST = 8
Ranges = Callable[[NDArray[np.intp], QuantSpec], Ends]
"""The ends of the channels with these indices for a spec, (n,) and (n,)."""


def of_weights(weight: Floats, spec: QuantSpec, calibrator: str) -> QuantParams:
    """Parameters of weights whose output channels have bits of their own, `spec.bits` on average. spec: per channel."""
    assert isinstance(spec.granularity, PerChannel)
    axis = spec.granularity.axis

    def ranges(channels: NDArray[np.intp], own: QuantSpec) -> Ends:
        return WEIGHT_RANGES[calibrator](weight.take(channels, axis=axis), own)

    return _given_out(spec, weight.shape[axis], ranges)


def of_activations(sketch: Sketch, spec: QuantSpec, channels: int, *, clips: bool) -> QuantParams:
    """Parameters of a tensor whose channels have bits of their own, `spec.bits` on average.

    clips: by the density that fits a channel's numbers, see clipping.py; else its range is that of its extremes.
    """
    lows, highs = (np.broadcast_to(ends.astype(np.float64), channels) for ends in (sketch.lows, sketch.highs))
    columns = sketch.columns.reshape(-1, sketch.columns.shape[2]) if sketch.columns.size else None
    if not clips or columns is None or columns.shape[1] != channels:
        return _given_out(spec, channels, lambda chosen, own: (lows[chosen], highs[chosen]))
    density = _Densities(columns, lows, highs, signed=spec.signed)
    return _given_out(spec, channels, density.ranges)


def in_words(where: str, what: str, params: QuantParams) -> Change:
    """For the report. what: whose channels they are."""
    bits = params.bits
    assert bits is not None
    told = f"{what}: {bits.min()} to {bits.max()} bits a channel, {bits.mean():.2f} on average"
    return Change("params", where, told, f"{what}: bits given out channel by channel")


class _Densities:
    """Laplace's or Gauss's density of each channel, whichever fits, as `clipping.fitted` has it of a histogram.

    columns: (n, C) numbers. Where a channel is never negative, zeros are left out and the rest is one half.
    """

    def __init__(self, columns: NDArray[np.float32], lows: Floats, highs: Floats, *, signed: bool) -> None:
        self.lows, self.highs = lows, highs
        x = columns.astype(np.float64)
        self.one_sided = np.full(len(lows), False) if signed else lows >= 0
        counted = ~self.one_sided | (x > np.finfo(np.float32).tiny)
        count = np.maximum(counted.sum(axis=0), 1)
        self.centre = np.where(self.one_sided, 0.0, x.mean(axis=0))
        away = np.abs(x - self.centre) * counted
        self.spread = away.sum(axis=0) / count
        self.deviation = np.sqrt((away**2).sum(axis=0) / count)
        self.laplace = range_estimators.is_laplace_likelier(self.spread, self.deviation)

    def ranges(self, channels: NDArray[np.intp], spec: QuantSpec) -> Ends:
        known = (range_estimators.gauss_clipping_factor, range_estimators.laplace_clipping_factor)
        factors = np.array([[factor(spec.bits, one_sided=half) for half in (False, True)] for factor in known])
        laplace, one_sided = self.laplace[channels], self.one_sided[channels]
        scale = np.where(laplace, self.spread[channels], self.deviation[channels])
        # a channel that was zero in all columns, but not everywhere, keeps its extremes
        alpha = np.where(scale > 0, factors[laplace.astype(int), one_sided.astype(int)] * scale, np.inf)
        low, high, centre = self.lows[channels], self.highs[channels], self.centre[channels]
        return np.maximum(np.minimum(low, 0), centre - alpha), np.minimum(np.maximum(high, 0), centre + alpha)


def _given_out(spec: QuantSpec, count: int, ranges: Ranges) -> QuantParams:
    everyone = np.arange(count)
    low, high = ranges(everyone, spec)
    width = 2 * np.maximum(-low, high) if spec.symmetric and spec.signed else np.maximum(high, 0) - np.minimum(low, 0)
    least = 2 if spec.signed else 1  # one bit, symmetric, would be zero alone
    bits = allocate(np.asarray(width, np.float64) / 2, spec.bits, least=least, most=MOST)
    scale, zero = np.ones(count, np.float32), np.zeros(count, spec.dtype)
    for own in np.unique(bits):
        chosen = np.flatnonzero(bits == own)
        found = replace(spec, bits=int(own))
        params = found.from_range(*ranges(chosen, found))
        scale[chosen], zero[chosen] = params.scale, params.zero_point
    return QuantParams(spec, scale, zero, bits)
