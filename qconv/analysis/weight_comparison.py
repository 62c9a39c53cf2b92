"""Compares the weights of a layer with the float model's, in units of the integers that they became."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from qconv.ir.layers import Layer, read_layer, scale_inputs, scale_outputs, weights_from_rows
from qconv.ir.metadata import EqualizationRecord
from qconv.ir.model import Node, constant_array
from qconv.ir.rewriting import EditRefused
from qconv.ir.stored_weights import QuantizedWeights, read_quantized_weights
from qconv.results.comparison import HistogramBars, ValueStatistics

HISTOGRAM_BARS = 64

CLIPPED_BEYOND = 0.5 + 1e-3
"""Steps: a weight this far beyond the last integer is clipped, not just rounded."""


def compare_weights(layer: Node, original: Node | None, equalization: EqualizationRecord) -> ValueStatistics | None:
    """Compare a layer's float weights, in units of its integer ones, with these; None where either has none."""
    weights = read_quantized_weights(layer)
    same = original is not None and original.op_type == layer.op_type  # another tool may have given a name anew
    numbers = (
        _apply_equalization(original, weights, equalization)
        if weights is not None and original is not None and same
        else None
    )
    if weights is None or numbers is None:
        return None
    low, high = int(weights.codes.min(initial=0)), int(weights.codes.max(initial=0))
    ideal = numbers / np.where(weights.scale == 0, 1, weights.scale) + weights.zero
    clipped = float(np.mean((ideal < low - CLIPPED_BEYOND) | (ideal > high + CLIPPED_BEYOND)))
    used = np.unique(weights.codes).size / 2**weights.bits
    return ValueStatistics(
        weights.bits, float(low), float(high), clipped, min(1.0, used), make_histogram(ideal, low, high)
    )


def _apply_equalization(
    original: Node, weights: QuantizedWeights, equalization: EqualizationRecord
) -> NDArray[np.floating] | None:
    """Return the float weights with their channels scaled as equalization did, in the integers' shape."""
    try:
        layer = read_layer(original)
    except EditRefused:
        return None
    layer = _scale_layer(layer, equalization)
    stored = constant_array(original.inputs[1])
    if stored is None or stored.size != weights.codes.size:
        return None
    rows = layer.weight.reshape(*layer.weight.shape[:2], -1)
    return weights_from_rows(original, rows, stored.shape).reshape(weights.codes.shape)


def _scale_layer(layer: Layer, equalization: EqualizationRecord) -> Layer:
    data, nothing = layer.node.inputs[0], np.zeros(1)
    into = None if data is None else equalization.scale_of(data.name or "", layer.inputs)
    out = equalization.scale_of(layer.node.outputs[0].name or "", layer.outputs)
    found = replace(layer, means=None)
    if into is not None:
        found = scale_inputs(found, into, nothing)
    return found if out is None else scale_outputs(found, 1 / out, nothing)


def make_histogram(numbers: NDArray[np.floating], low: float, high: float) -> HistogramBars:
    """Make a histogram of all finite values that covers the whole range."""
    numbers = numbers[np.isfinite(numbers)]
    ends = min(low, float(numbers.min(initial=low))), max(high, float(numbers.max(initial=high)))
    counts, edges = np.histogram(numbers, HISTOGRAM_BARS, ends if ends[1] > ends[0] else (ends[0], ends[0] + 1))
    return HistogramBars(tuple(map(float, edges)), tuple(map(int, counts)))
