"""The range that costs the layers behind a tensor least: a tensor's own error is not the network's.

    error(range) = sqrt(tails) * sum over channels c of |w_c|^2 * (Var[e_c] + MEAN_COUNTS E[e_c]^2),   e = fake(x) - x
    tails = expected square of e by the histogram / mean square of e on the columns

|w_c|^2 is the sum of squares of all weights that channel c meets. The variance more than the mean: the same offset on
all places hurts least. Both are taken over the columns that the sketch kept, all channels at some places of some
pictures; errors of different channels and places count as independent. So a channel that nobody weighs much may be
clipped.

The columns are few and miss most of the tails, which the histogram has. How much these should count was measured over
all models and 8, 6 and 4 bits: not at all agrees better on some networks and loses much on others, in full is the
tensor's own error again; the square root serves all. The covariance between channels was tried and changes nothing.

Sources: the error at the output instead of the tensor's: Nahshan et al. 2019, arXiv 1911.07190; leaving the mean to the
bias: Nagel et al. 2019, arXiv 1906.04721, section 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qconv.calibration.clipping import INTERVALS, Range, expected_error, search
from qconv.calibration.sketch import Histogram
from qconv.ir.layers import Layer
from qconv.quantizer import SMALLEST_SCALE, QuantParams, QuantSpec

Float64 = NDArray[np.float64]
MEAN_COUNTS = 0.1
"""Share of a mean shift that counts although the bias takes it back: other pictures have other means."""


def powers_of(layer: Layer) -> Float64:
    """Sum of squares of the weights that each input channel meets, (I,)."""
    weight = layer.weight.astype(np.float32, copy=False)
    found: Float64 = np.einsum("goik,goik->gi", weight, weight).reshape(-1).astype(np.float64)
    return found


def least_at_outputs(
    columns: NDArray[np.float32], histogram: Histogram, readers: Sequence[Layer], spec: QuantSpec, ends: Range
) -> Range:
    """The range inside `ends` with the least error at the readers' outputs.

    columns: (n, C) values of the tensor. histogram: of many more of them.
    """
    coarse = histogram.coarse(max(-ends[0], ends[1], SMALLEST_SCALE) / INTERVALS)
    powers = np.sum([powers_of(reader) for reader in readers], axis=0)  # (C,)

    def error(lows: Float64, highs: Float64) -> Float64:
        tried = spec.from_range(lows, highs)
        with np.errstate(over="ignore", invalid="ignore"):  # squares of numbers near the end of float32
            squares, means = _lost(columns, tried)
            found = (squares - (1 - MEAN_COUNTS) * means * means) @ powers
            own = squares.mean(axis=1)
            tails = np.divide(expected_error(coarse, tried), own, out=np.ones_like(own), where=own > 0)
            return np.asarray(found * np.sqrt(tails))

    return search(error, spec, *ends)


def _lost(columns: NDArray[np.float32], params: QuantParams) -> tuple[Float64, Float64]:
    """E[e^2] and E[e] of each channel of columns (n, C) under each of K quantizers, (K, C) both."""
    spec, count = params.spec, len(columns)
    squares, means = np.empty((2, len(params.scale), columns.shape[1]))
    ones = np.ones(count, np.float32)
    lost = np.empty_like(columns)
    for k, (scale, zero) in enumerate(zip(params.scale, params.zero_point.astype(np.float32), strict=True)):
        # what `fake` does, in place: this is the innermost loop
        np.divide(columns, scale, out=lost)
        np.rint(lost, out=lost)
        np.clip(lost, spec.qmin - zero, spec.qmax - zero, out=lost)
        lost *= scale
        lost -= columns
        squares[k] = np.einsum("nc,nc->c", lost, lost) / count
        means[k] = ones @ lost / count
    return squares, means
