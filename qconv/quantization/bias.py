"""Bias correction: rounding the weights moves the mean of every output channel, and the bias takes the move back.

    b' = b + sum over inputs i and kernel positions k of (W - Q)[o, i, k] * E[x_i]

E[x_i] is the mean of the layer's input channel in the float network: over the calibration pictures (measured), or as it
follows from a BatchNormalization in front (analytic, see expected.py). Positions that only see padding are counted as
if they saw the mean: the correction is exact inside and a little too large at borders. An output of a ConvTranspose
sees one of sH * sW kernel positions (strides), so that its share of the sum is as small.

Source: Nagel et al. 2019, arXiv 1906.04721, section 4.2.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def correction(
    error: NDArray[np.float32], mean: NDArray[np.float64], *, groups: int, output_axis: int
) -> NDArray[np.float64]:
    """What to add to the bias, shape (O,).

    error: W - Q as the layer stores it: (O, I/g, kH, kW), (I, O/g, kH, kW) where `output_axis` is 1, or a matrix with
    its outputs along `output_axis`.
    mean: of each input channel, shape (I,).
    """
    if error.ndim == 2:
        by_output = error if output_axis == 0 else error.T
        moved: NDArray[np.float64] = np.einsum("oi,i->o", by_output, mean)
        return moved
    if output_axis == 1:
        inputs, per_group = error.shape[:2]
        by_group = error.reshape(groups, inputs // groups, per_group, -1).sum(axis=3, dtype=np.float64)  # (G, I/G, O/G)
        summed: NDArray[np.float64] = np.einsum("gio,gi->go", by_group, mean.reshape(groups, -1)).reshape(-1)
        return summed
    outputs, per_group = error.shape[:2]
    by_input = error.reshape(groups, outputs // groups, per_group, -1).sum(axis=3, dtype=np.float64)  # (G, O/G, I/G)
    shift: NDArray[np.float64] = np.einsum("goi,gi->go", by_input, mean.reshape(groups, per_group)).reshape(-1)
    return shift
