"""The range that costs the layers behind a tensor least: a tensor's own error is not the network's.

    error(range) = sum over outputs o and kernel positions k of Var[ sum over channels c of W[o, c, k] e[c] ],
    e = fake(x) - x on the columns that the sketch kept: all channels at some places of some pictures

The variance and not the mean square: a mean shift of an output goes into its bias. Errors at neighbouring kernel
positions count as independent. Channels that nobody weighs much may be clipped, those that add up may not.

Sources: the error at the output instead of the tensor's: Nahshan et al. 2019, arXiv 1911.07190; leaving the mean to the
bias: Nagel et al. 2019, arXiv 1906.04721, section 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qconv.clipping import Range, search
from qconv.layers import Layer
from qconv.quant import QuantSpec

Float64 = NDArray[np.float64]
MOST_CHANNELS = 2048
"""Above, channels count as independent: the product of a matrix with itself would be larger than the network."""


def powers_of(layer: Layer) -> Float64:
    """Sum of squares of the weights that each input channel meets, (I,)."""
    found: Float64 = np.einsum("goik,goik->gi", layer.weight, layer.weight, dtype=np.float64).reshape(-1)
    return found


def mixing_of(layer: Layer) -> NDArray[np.float32] | None:
    """(I, J), so that the sum of squares of e @ mixing is the outputs'; None where channels count as independent."""
    groups, outputs, channels, positions = layer.weight.shape
    if groups > 1 or channels > MOST_CHANNELS:
        return None
    rows = layer.weight[0].swapaxes(1, 2).reshape(outputs * positions, channels)
    if len(rows) > channels:
        values, vectors = np.linalg.eigh(rows.T @ rows)
        return np.asarray(vectors * np.sqrt(np.maximum(values, 0.0)), np.float32)
    return np.ascontiguousarray(rows.T, np.float32)


def least_at_outputs(columns: NDArray[np.float32], readers: Sequence[Layer], spec: QuantSpec, ends: Range) -> Range:
    """The range inside `ends` with the least error at the readers' outputs. columns: (n, C) values of the tensor."""
    powers = np.zeros(columns.shape[1])
    mixings = []
    for reader in readers:
        mixing = mixing_of(reader)
        if mixing is None:
            powers += powers_of(reader)
        else:
            mixings.append(mixing)

    def error(lows: Float64, highs: Float64) -> Float64:
        found = np.zeros(len(lows))
        for index, (low, high) in enumerate(zip(lows, highs, strict=True)):
            lost = spec.from_range(low, high).fake(columns) - columns
            lost -= lost.mean(axis=0)
            found[index] = powers @ np.einsum("nc,nc->c", lost, lost, dtype=np.float64)
            for mixing in mixings:
                mixed = lost @ mixing
                found[index] += np.einsum("nj,nj->", mixed, mixed, dtype=np.float64)
        return found

    return search(error, spec, *ends)
