"""Weight range estimators choose the range of each group of weights with one scale: extremes, least squares or ACIQ.

The searches and closed forms are those of activations, on the weights instead of a histogram, for all groups at once.
With bits by channel, C * M bits are allocated to C channels of half-width alpha_i,

    M_i = log2( alpha_i^(2/3) / sum over j of alpha_j^(2/3) * B ),      B = C * 2^M

with B levels in all, as rounding costs alpha_i^2 / (3 * 4^M_i) an element. They are rounded to whole bits within
bounds, and single bits are moved until their mean is M: given where one gains most, taken where one loses least. Then
ranges are estimated for these bits, inside the container that all channels share. Clipping error does not count in the
allocation: it falls with rounding error where ranges are optimal for their bits.

Source: Banner et al. 2019, arXiv 1810.05723, section 5, equation 14; moving the remainder is not theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.calibration import range_estimators
from qconv.calibration.sketch import Sketch, make_histogram
from qconv.errors import Change
from qconv.quantizer import Granularity, PerBlock, PerChannel, PerTensor, QuantParams, QuantSpec, group_extremes

Floats = NDArray[np.floating[Any]]

RangeEnds = tuple[Floats, Floats]

COARSE_SHARES = np.linspace(1.0, 0.2, 13)

FINE_OFFSETS = np.linspace(-0.06, 0.06, 9)

BOTH_ENDS_TOGETHER, EACH_END_ALONE = ((1, 1),), ((1, 0), (0, 1))
"""The ends that a finer search moves, (lower, upper)."""

LARGEST_CHUNK = 2**20


def estimate_minmax_range(weight: Floats, spec: QuantSpec) -> RangeEnds:
    """The extremes of each group, without clipping."""
    return group_extremes(weight, spec.granularity)


def estimate_mse_range(weight: Floats, spec: QuantSpec, importance: Floats | None = None) -> RangeEnds:
    """Search the ends with the least squared error of each group: both together, then each alone if they may.

    importance: factor on the square of each weight's error, of the weight's shape; None for 1.
    """
    low, high = group_extremes(weight, spec.granularity)
    if not low.shape and importance is None:
        return _as_arrays(range_estimators.search_least_squares(make_histogram(weight), spec, float(low), float(high)))
    rows = _group_rows(weight, spec.granularity)
    counts = None if importance is None else _group_rows(importance, spec.granularity)
    low_rows, high_rows = (_params_by_row(ends, spec.granularity).reshape(-1) for ends in (low, high))
    by_row = replace(spec, granularity=PerChannel(0))
    shares = np.empty((2, len(rows)))
    for part in np.array_split(np.arange(len(rows)), min(len(rows), -(-rows.size // LARGEST_CHUNK))):
        count = None if counts is None else counts[part]
        shares[:, part] = _search_shares(rows[part], by_row, low_rows[part], high_rows[part], count)
    return _params_from_rows(low_rows * shares[0], low, spec.granularity), _params_from_rows(
        high_rows * shares[1], high, spec.granularity
    )


def _search_shares(rows: Floats, spec: QuantSpec, low: Floats, high: Floats, importance: Floats | None) -> Floats:
    """The shares of lower and upper ends with the least error of each of G rows, (2, G)."""
    shares = np.ones((2, len(rows)))
    least = _squared_error(rows, spec, low, high, importance)

    def attempt(candidate: Floats) -> None:
        error = _squared_error(rows, spec, low * candidate[0], high * candidate[1], importance)
        better = error < least
        shares[:, better], least[better] = candidate[:, better], error[better]

    for share in COARSE_SHARES:
        attempt(np.full_like(shares, share))
    for end in () if spec.symmetric else (0, 1, 0):
        for share in COARSE_SHARES:
            candidate = shares.copy()
            candidate[end] = share
            attempt(candidate)
    for move in BOTH_ENDS_TOGETHER if spec.symmetric else BOTH_ENDS_TOGETHER + EACH_END_ALONE:
        start = shares.copy()
        for step in FINE_OFFSETS:
            attempt(np.clip(start + np.array(move)[:, None] * step, 0.0, 1.0))
    return shares


def _squared_error(rows: Floats, spec: QuantSpec, low: Floats, high: Floats, importance: Floats | None) -> Floats:
    lost = spec.from_range(low, high).fake_quantize(rows)
    lost -= rows
    if importance is None:
        return np.asarray(np.einsum("ge,ge->g", lost, lost, dtype=np.float64))
    return np.asarray(np.einsum("ge,ge,ge->g", lost, lost, importance, dtype=np.float64))


def estimate_aciq_range(weight: Floats, spec: QuantSpec) -> RangeEnds:
    """The closed-form optimum of each group, for Laplace's or Gauss's density, whichever fits better."""
    low, high = group_extremes(weight, spec.granularity)
    if not low.shape:
        return _as_arrays(range_estimators.aciq_closed_form(make_histogram(weight), spec, float(low), float(high)))
    rows = _group_rows(weight, spec.granularity).astype(np.float64)
    counts = _params_by_row(_count_group_weights(weight, spec.granularity), spec.granularity)
    padding = rows.shape[1] - counts  # zeros behind a short last block
    centre = rows.sum(axis=1) / counts
    away = np.abs(rows - centre[:, None])
    spread = (away.sum(axis=1) - padding * np.abs(centre)) / counts
    deviation = np.sqrt(np.maximum((away**2).sum(axis=1) - padding * centre**2, 0.0) / counts)
    alpha = np.where(
        range_estimators.is_laplace_likelier(spread, deviation),
        range_estimators.laplace_clipping_factor(spec.bits, one_sided=False) * spread,
        range_estimators.gauss_clipping_factor(spec.bits, one_sided=False) * deviation,
    )
    lows, highs = (_params_from_rows(ends, low, spec.granularity) for ends in (centre - alpha, centre + alpha))
    return np.maximum(low, lows), np.minimum(high, highs)


WEIGHT_RANGE_ESTIMATORS: dict[str, Callable[[Floats, QuantSpec], RangeEnds]] = {
    "max": estimate_minmax_range,
    "mse": estimate_mse_range,
    "aciq": estimate_aciq_range,
}


# -- one row for each group that shares a scale ------------------------------------------------------------------------


def _group_rows(weight: Floats, granularity: Granularity) -> Floats:
    """Weights as one row a group, (G, E); zeros, which cost nothing, fill up short blocks."""
    if isinstance(granularity, PerTensor):
        return weight.reshape(1, -1)
    if isinstance(granularity, PerChannel):
        moved = np.moveaxis(weight, granularity.axis, 0)
        return np.ascontiguousarray(moved.reshape(len(moved), -1))
    moved = np.moveaxis(weight, granularity.axis, -1)
    short = -moved.shape[-1] % granularity.size
    padded = np.pad(moved, [(0, 0)] * (moved.ndim - 1) + [(0, short)])
    return padded.reshape(-1, granularity.size)


def _params_by_row(ends: NDArray[Any], granularity: Granularity) -> NDArray[Any]:
    return np.moveaxis(ends, granularity.axis, -1).reshape(-1) if isinstance(granularity, PerBlock) else ends


def _params_from_rows(by_row: NDArray[Any], like: NDArray[Any], granularity: Granularity) -> NDArray[Any]:
    """The reverse of `_params_by_row`."""
    if isinstance(granularity, PerTensor):
        return by_row.reshape(())
    if not isinstance(granularity, PerBlock):
        return by_row
    moved = np.moveaxis(like, granularity.axis, -1).shape
    return np.moveaxis(by_row.reshape(moved), -1, granularity.axis)


def _count_group_weights(weight: Floats, granularity: Granularity) -> NDArray[np.float64]:
    """How many weights each group has, in the shape of its parameters."""
    if isinstance(granularity, PerBlock):
        starts = np.arange(0, weight.shape[granularity.axis], granularity.size)
        return np.asarray(np.add.reduceat(np.ones(weight.shape), starts, axis=granularity.axis))
    assert isinstance(granularity, PerChannel)
    channels = weight.shape[granularity.axis]
    return np.full(channels, weight.size / max(channels, 1))


def _as_arrays(ends: range_estimators.Range) -> RangeEnds:
    return np.asarray(ends[0]), np.asarray(ends[1])


Float64 = NDArray[np.float64]


def optimal_bits(alpha: Float64, mean_bits: float) -> Float64:
    """The optimal M_i of each channel, not rounded; minus infinity for an empty range. alpha: half-widths, (C,)."""
    share = np.cbrt(np.asarray(alpha, np.float64)) ** 2
    total = share.sum()
    if not total > 0:
        return np.full(share.shape, float(mean_bits))
    with np.errstate(divide="ignore"):
        return np.asarray(np.log2(share / total * (len(share) * 2.0**mean_bits)))


def allocate_bits(alpha: Float64, mean_bits: int, *, least: int, most: int) -> NDArray[np.int64]:
    """Allocate whole bits to channels, (C,), within [least, most], C * mean_bits in all. alpha: half-widths, (C,)."""
    alpha = np.asarray(alpha, np.float64)
    bits = np.clip(np.rint(optimal_bits(alpha, mean_bits)), least, most).astype(np.int64)
    spare = len(bits) * mean_bits - int(bits.sum())
    while spare:
        # a bit more saves, a bit less costs, a fixed multiple of this
        weight = alpha**2 * 4.0**-bits
        free = bits < most if spare > 0 else bits > least
        if not free.any():
            break
        if spare > 0:
            bits[np.argmax(np.where(free, weight, -1.0))] += 1
            spare -= 1
        else:
            bits[np.argmin(np.where(free, weight, np.inf))] -= 1
            spare += 1
    return bits


MOST_BITS = 8

ChannelRanges = Callable[[NDArray[np.intp], QuantSpec], RangeEnds]
"""The ends of the channels with these indices for a spec, (n,) and (n,)."""


def make_weight_channel_params(weight: Floats, spec: QuantSpec, calibrator: str) -> QuantParams:
    """Parameters of weights whose output channels have bits of their own, `spec.bits` on average. spec: per channel."""
    assert isinstance(spec.granularity, PerChannel)
    axis = spec.granularity.axis

    def ranges(channels: NDArray[np.intp], own: QuantSpec) -> RangeEnds:
        return WEIGHT_RANGE_ESTIMATORS[calibrator](weight.take(channels, axis=axis), own)

    return _distribute_bits(spec, weight.shape[axis], ranges)


def make_activation_channel_params(sketch: Sketch, spec: QuantSpec, channels: int, *, clips: bool) -> QuantParams:
    """Parameters of a tensor whose channels have bits of their own, `spec.bits` on average.

    clips: ranges are the closed-form optima of the densities that fit the channels (ACIQ); else the extremes.
    """
    lows, highs = (np.broadcast_to(ends.astype(np.float64), channels) for ends in (sketch.lows, sketch.highs))
    columns = sketch.columns.reshape(-1, sketch.columns.shape[2]) if sketch.columns.size else None
    if not clips or columns is None or columns.shape[1] != channels:
        return _distribute_bits(spec, channels, lambda chosen, own: (lows[chosen], highs[chosen]))
    density = _ChannelDensities(columns, lows, highs, signed=spec.signed)
    return _distribute_bits(spec, channels, density.ranges)


def describe_channel_bits(where: str, what: str, params: QuantParams) -> Change:
    """The finding for the report. what: whose channels they are."""
    bits = params.bits
    assert bits is not None
    told = f"{what}: {bits.min()} to {bits.max()} bits a channel, {bits.mean():.2f} on average"
    return Change("params", where, told, f"{what}: bits given out channel by channel")


class _ChannelDensities:
    """Laplace's or Gauss's density of each channel, whichever fits, as `fit_density` does for a histogram.

    columns: (n, C) numbers. Of a channel that is never negative, zeros are left out and the rest counts as one half.
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

    def ranges(self, channels: NDArray[np.intp], spec: QuantSpec) -> RangeEnds:
        known = (range_estimators.gauss_clipping_factor, range_estimators.laplace_clipping_factor)
        factors = np.array([[factor(spec.bits, one_sided=half) for half in (False, True)] for factor in known])
        laplace, one_sided = self.laplace[channels], self.one_sided[channels]
        scale = np.where(laplace, self.spread[channels], self.deviation[channels])
        # a channel that was zero in all columns, but not everywhere, keeps its extremes
        alpha = np.where(scale > 0, factors[laplace.astype(int), one_sided.astype(int)] * scale, np.inf)
        low, high, centre = self.lows[channels], self.highs[channels], self.centre[channels]
        return np.maximum(np.minimum(low, 0), centre - alpha), np.minimum(np.maximum(high, 0), centre + alpha)


def _distribute_bits(spec: QuantSpec, count: int, ranges: ChannelRanges) -> QuantParams:
    everyone = np.arange(count)
    low, high = ranges(everyone, spec)
    width = 2 * np.maximum(-low, high) if spec.symmetric and spec.signed else np.maximum(high, 0) - np.minimum(low, 0)
    least = 2 if spec.signed else 1  # one bit, symmetric, would be zero alone
    bits = allocate_bits(np.asarray(width, np.float64) / 2, spec.bits, least=least, most=MOST_BITS)
    scale, zero = np.ones(count, np.float32), np.zeros(count, spec.dtype)
    for own in np.unique(bits):
        chosen = np.flatnonzero(bits == own)
        found = replace(spec, bits=int(own))
        params = found.from_range(*ranges(chosen, found))
        scale[chosen], zero[chosen] = params.scale, params.zero_point
    return QuantParams(spec, scale, zero, bits)
