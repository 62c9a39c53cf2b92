"""Widens weight scales so that 16-bit sums of products do not overflow on CPUs without VNNI.

AVX2 and AVX512 without VNNI multiply u8 activations with s8 weights by `vpmaddubsw`, which adds neighbouring products
in pairs of 16 bits and saturates at 32767: two products of 255 * 127 already lose half their sum, silently. A network
that is right on one machine loses 10 dB or more on another. Weights of 7 bits never saturate but give up half their
precision.

This module gives up only what is needed. With the least and the largest code a_c that each input channel takes on the
calibration pictures, a pair of neighbouring weights (w_1, w_2) stays exact if

    max_a |a_1 w_1 + a_2 w_2| <= 32767        a_c in [low_c, high_c]

and the scale of an output channel is widened just until its worst pair does; its zero point moves towards 0 by the same
factor, which is what makes the codes of asymmetric weights small. Neighbours are elements 2j and 2j + 1 of a row in the
order in which ONNX Runtime's kernels read it: kernel row, kernel column, input channel (found by experiment). Depthwise
kernels widen to 32 bits first and are left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from qconv.ir.fast_forms import keeps_pairs
from qconv.quantizer import QuantParams

T = TypeVar("T", bound=np.generic)

PAIR_LIMIT = 32767
LARGEST_CODE = 255
# Rounding can leave a pair a little over: steps of less than half a code in 127 would take forever.
SMALLEST_WIDENING = 1 + 1 / 256
LARGEST_CHUNK = 2**20


def widen_scales(
    params: QuantParams,
    weight: NDArray[np.float32],
    low: NDArray[np.int64],
    high: NDArray[np.int64],
    *,
    output_axis: int,
    inputs: int = 0,
) -> QuantParams:
    """Widen scales, per channel or per tensor, until no pair saturates; returns `params` itself where none does.

    weight: (O, I/g, kH, kW), or a matrix with outputs along `output_axis`. low, high: least and largest code of every
    input channel, shape (I,). inputs: channels that the file pads them to, which may have other neighbours then.
    """
    weight, low, high = _pad_inputs(weight, low, high, inputs)
    excess = partial(_excess_of_outputs, weight, _broadcast_limits(low, high, weight, output_axis), output_axis)
    count = weight.shape[output_axis]
    # a part at a time: products of all weights at once would be eight times their size
    parts = np.array_split(np.arange(count), -(-weight.size // LARGEST_CHUNK))
    if params.scale.ndim == 0:
        return _widen_per_tensor(params, parts, excess)
    scale, zero = params.scale.copy(), params.zero_point.copy()
    gain = np.ones(count)  # (O,)
    for over in parts:
        while over.size:  # the outputs that may still have a pair over the limit
            bits = None if params.bits is None else params.bits[over]
            found = excess(QuantParams(params.spec, scale[over], zero[over], bits), over)
            over, found = over[found > 1], found[found > 1]
            gain[over] *= np.maximum(found, SMALLEST_WIDENING)
            scale[over] = params.scale[over] * gain[over]
            zero[over] = np.rint(params.zero_point[over] / gain[over])
    return QuantParams(params.spec, scale, zero, params.bits) if np.any(gain > 1) else params


def worst_pair_ratio(codes: NDArray[np.int8], output_axis: int) -> NDArray[np.float64]:
    """The largest sum of two neighbouring products, over what 16 bits hold, for each output: (O,).

    codes: (O, I/g, kH, kW), or a matrix with outputs along `output_axis`. Activations may be any codes, 0 to 255.
    """
    rows = _kernel_rows(codes, output_axis)
    low, high = np.zeros((1, rows.shape[1]), np.int32), np.full((1, rows.shape[1]), LARGEST_CODE, np.int32)
    found: NDArray[np.float64] = _worst_pair_sum(rows, low, high) / PAIR_LIMIT
    return found


def pair_excess(
    codes: NDArray[np.integer], low: NDArray[np.int64], high: NDArray[np.int64], *, output_axis: int, inputs: int = 0
) -> NDArray[np.float64]:
    """The worst pair of each output, over what 16 bits hold, (O,); codes of weights, the others as in `widen_scales`.

    More than 1 saturates.
    """
    codes, low, high = _pad_inputs(codes, low, high, inputs)
    rows = _kernel_rows(codes, output_axis)
    limits = _broadcast_limits(low, high, codes, output_axis)
    found: NDArray[np.float64] = _worst_pair_sum(rows, *limits) / PAIR_LIMIT
    return found


_ExcessFunction = Callable[[QuantParams, NDArray[np.int64]], NDArray[np.float64]]


def _widen_per_tensor(params: QuantParams, parts: list[NDArray[np.int64]], excess: _ExcessFunction) -> QuantParams:
    """One scale for the whole tensor."""
    chosen, gain = params, 1.0
    while (found := max(float(excess(chosen, part).max()) for part in parts)) > 1:
        gain *= max(found, SMALLEST_WIDENING)
        zero = np.rint(params.zero_point / gain).astype(params.zero_point.dtype)
        chosen = QuantParams(params.spec, (params.scale * gain).astype(np.float32), zero)
    return chosen


def _excess_of_outputs(
    weight: NDArray[np.float32],
    limits: tuple[NDArray[np.int32], NDArray[np.int32]],
    output_axis: int,
    params: QuantParams,
    outputs: NDArray[np.int64],
) -> NDArray[np.float64]:
    """The worst pair of each of some outputs, over what 16 bits hold; params: of these outputs, or of all."""
    rows = _kernel_rows(params.quantize(weight.take(outputs, axis=output_axis)), output_axis)
    low, high = (limit[outputs] if len(limit) > 1 else limit for limit in limits)
    found: NDArray[np.float64] = _worst_pair_sum(rows, low, high) / PAIR_LIMIT
    return found


def _pad_inputs(
    weight: NDArray[T], low: NDArray[np.int64], high: NDArray[np.int64], inputs: int
) -> tuple[NDArray[T], NDArray[np.int64], NDArray[np.int64]]:
    """Weights (O, I, kH, kW) and limits (I,) with zeros for further input channels, up to `inputs`."""
    more = inputs - len(low)
    if more <= 0 or keeps_pairs(len(low)):
        return weight, low, high
    return np.pad(weight, [(0, 0), (0, more), (0, 0), (0, 0)]), np.pad(low, (0, more)), np.pad(high, (0, more))


def _kernel_rows(codes: NDArray[np.integer], output_axis: int) -> NDArray[np.int32]:
    """Codes of weights as (O, K), in the order in which the kernels read them."""
    wide = codes.astype(np.int32)
    if wide.ndim == 2:
        return wide if output_axis == 0 else wide.T
    return np.moveaxis(wide, 1, -1).reshape(len(wide), -1)


def _broadcast_limits(
    low: NDArray[np.int64], high: NDArray[np.int64], weight: NDArray[Any], output_axis: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The input codes' limits for every element of `_kernel_rows`: (O, K), or (1, K) with the same inputs for all."""
    least, largest = low.astype(np.int32), high.astype(np.int32)
    if weight.ndim == 2:
        return least[None], largest[None]
    outputs, per_group = weight.shape[:2]
    area = int(np.prod(weight.shape[2:]))
    groups = len(low) // per_group
    group = np.arange(outputs) * groups // outputs if groups > 1 else np.zeros(1, np.int64)
    least, largest = (np.tile(limit.reshape(groups, per_group)[group], (1, area)) for limit in (least, largest))
    return least, largest


def _worst_pair_sum(rows: NDArray[np.int32], low: NDArray[np.int32], high: NDArray[np.int32]) -> NDArray[np.int32]:
    """The largest magnitude that the sum of two neighbouring products can reach, for each output: (O,)."""
    at_low, at_high = rows * low, rows * high
    top, bottom = (_sum_neighbours(ends(at_low, at_high)) for ends in (np.maximum, np.minimum))
    worst: NDArray[np.int32] = np.maximum(top.max(axis=1), -bottom.min(axis=1))
    return worst


def _sum_neighbours(products: NDArray[np.int32]) -> NDArray[np.int32]:
    """Sums of neighbours, (O, K) -> (O, (K + 1) / 2); an odd last one stays alone."""
    sums = products[:, 0::2].copy()
    sums[:, : products.shape[1] // 2] += products[:, 1::2]
    return sums
