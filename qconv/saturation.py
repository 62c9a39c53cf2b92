"""Weight scales that keep CPUs without VNNI from saturating.

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

import numpy as np
from numpy.typing import NDArray

from qconv.quant import QuantParams

PAIR_LIMIT = 32767


def widen(
    params: QuantParams,
    weight: NDArray[np.float32],
    low: NDArray[np.int64],
    high: NDArray[np.int64],
    *,
    output_axis: int,
) -> QuantParams:
    """Per-channel parameters whose codes saturate in no pair; `params` itself where they already do not.

    weight: (O, I/g, kH, kW), or a matrix with outputs along `output_axis`. low, high: least and largest code of every
    input channel, shape (I,).
    """
    limits = _spread(low, high, weight, output_axis)
    chosen, gain = params, np.ones(params.scale.shape)  # (O,)
    while True:
        codes = chosen.quantize(weight).astype(np.int64)
        over = _worst_pair(_rows(codes, output_axis), *limits) / PAIR_LIMIT
        if (over <= 1).all():
            return chosen
        # Rounding can leave a pair a little over: steps of less than half a code in 127 would take forever.
        gain = gain * np.where(over > 1, np.maximum(over, 1 + 1 / 256), 1.0)
        zero = np.rint(params.zero_point / gain).astype(params.zero_point.dtype)
        chosen = QuantParams(params.spec, (params.scale * gain).astype(np.float32), zero)


def _rows(codes: NDArray[np.int64], output_axis: int) -> NDArray[np.int64]:
    """Weights as (O, K) in the kernels' order."""
    if codes.ndim == 2:
        return codes if output_axis == 0 else codes.T
    return np.moveaxis(codes, 1, -1).reshape(len(codes), -1)


def _spread(
    low: NDArray[np.int64], high: NDArray[np.int64], weight: NDArray[np.float32], output_axis: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The codes' limits for every element of `_rows`: (O, K), or (1, K) where all outputs read the same channels."""
    if weight.ndim == 2:
        return low[None], high[None]
    outputs, per_group = weight.shape[:2]
    area = int(np.prod(weight.shape[2:]))
    groups = len(low) // per_group
    group = np.arange(outputs) * groups // outputs if groups > 1 else np.zeros(1, np.int64)
    low, high = (np.tile(limit.reshape(groups, per_group)[group], (1, area)) for limit in (low, high))
    return low, high


def _worst_pair(rows: NDArray[np.int64], low: NDArray[np.int64], high: NDArray[np.int64]) -> NDArray[np.int64]:
    """The largest magnitude that the sum of two neighbouring products can reach, for each output: (O,)."""
    ends = rows * low, rows * high
    top, bottom = np.maximum(*ends), np.minimum(*ends)
    if rows.shape[1] % 2:
        top, bottom = (np.pad(products, ((0, 0), (0, 1))) for products in (top, bottom))
    top, bottom = (products.reshape(len(rows), -1, 2).sum(axis=2) for products in (top, bottom))
    worst: NDArray[np.int64] = np.maximum(top.max(axis=1), -bottom.min(axis=1))
    return worst
