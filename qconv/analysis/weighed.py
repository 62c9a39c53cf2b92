"""The weights of a layer in a quantized file, whoever wrote it: their codes, and the float weights in units of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from qconv.ir.layers import Layer, read_layer, scale_inputs, scale_outputs, weights_from_rows
from qconv.ir.metadata import EqualizationRecord
from qconv.ir.model import Node, attribute, constant_array, input_of
from qconv.ir.rewriting import EditRefused
from qconv.results.comparison import HistogramBars, ValueStatistics

BARS = 64
HALF = 0.5 + 1e-3
"""Of a step: a weight this far beyond the last code is cut off by more than rounding."""


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """Codes as they are stored. scale, zero: to be broadcast to them."""

    codes: NDArray[np.int32]
    scale: NDArray[np.float32]
    zero: NDArray[np.float32]

    @property
    def bits(self) -> int:
        """That the codes take, which may be fewer than their container has."""
        return max(2, int(self.codes.max(initial=0) - self.codes.min(initial=0)).bit_length())


def weights_of(layer: Node) -> Weights | None:
    """The codes that a layer's weights come from; None where they are float."""
    weight = input_of(layer, 1)
    node = None if weight is None else weight.producer()
    if node is not None and node.op_type == "Reshape" and node.inputs[0] is not None:  # blocks
        node = node.inputs[0].producer()
    if node is None:
        return None
    return _behind_dequantizer(node) if node.op_type == "DequantizeLinear" else _computed(node)


def _behind_dequantizer(node: Node) -> Weights | None:
    codes, scale, zero = (constant_array(input_of(node, index)) for index in (0, 1, 2))
    if codes is None or scale is None:
        return None
    least = np.zeros_like(scale) if zero is None else zero.astype(np.float32)
    axis, size = attribute(node, "axis", 1), attribute(node, "block_size", 0)

    def spread(numbers: NDArray[np.float32]) -> NDArray[np.float32]:
        if size and numbers.ndim == codes.ndim:
            return np.repeat(numbers, size, axis=axis).take(np.arange(codes.shape[axis]), axis=axis)
        axes = [1] * codes.ndim
        if numbers.size > 1:
            axes[axis] = -1
        return numbers.reshape(axes)

    return Weights(codes.astype(np.int32), spread(scale), spread(least))


def _computed(node: Node) -> Weights | None:
    """Cast [-> Sub] -> Mul, as qconv writes weights of layers that run in float."""
    scale = constant_array(input_of(node, 1)) if node.op_type == "Mul" else None
    before = None if scale is None or node.inputs[0] is None else node.inputs[0].producer()
    zero: NDArray[np.float32] | None = np.zeros(1, np.float32)
    if before is not None and before.op_type == "Sub" and before.inputs[0] is not None:
        zero = constant_array(input_of(before, 1))
        before = before.inputs[0].producer()
    codes = constant_array(before.inputs[0]) if before is not None and before.op_type == "Cast" else None
    if codes is None or zero is None or scale is None:
        return None
    return Weights(codes.astype(np.int32), scale, np.asarray(zero, np.float32))


def beside(layer: Node, original: Node | None, moves: EqualizationRecord) -> ValueStatistics | None:
    """The float layer's weights, in codes of the quantized one. None where either has none of the kind."""
    weights = weights_of(layer)
    same = original is not None and original.op_type == layer.op_type  # another tool may have given a name anew
    numbers = _as_moved(original, weights, moves) if weights is not None and original is not None and same else None
    if weights is None or numbers is None:
        return None
    low, high = int(weights.codes.min(initial=0)), int(weights.codes.max(initial=0))
    ideal = numbers / np.where(weights.scale == 0, 1, weights.scale) + weights.zero
    clipped = float(np.mean((ideal < low - HALF) | (ideal > high + HALF)))
    used = np.unique(weights.codes).size / 2**weights.bits
    return ValueStatistics(weights.bits, float(low), float(high), clipped, min(1.0, used), bars_of(ideal, low, high))


def _as_moved(original: Node, weights: Weights, moves: EqualizationRecord) -> NDArray[np.floating] | None:
    """The float weights with the scales of their channels, in the shape of the codes."""
    try:
        layer = read_layer(original)
    except EditRefused:
        return None
    layer = _scaled(layer, moves)
    stored = constant_array(original.inputs[1])
    if stored is None or stored.size != weights.codes.size:
        return None
    rows = layer.weight.reshape(*layer.weight.shape[:2], -1)
    return weights_from_rows(original, rows, stored.shape).reshape(weights.codes.shape)


def _scaled(layer: Layer, moves: EqualizationRecord) -> Layer:
    data, nothing = layer.node.inputs[0], np.zeros(1)
    into = None if data is None else moves.scale_of(data.name or "", layer.inputs)
    out = moves.scale_of(layer.node.outputs[0].name or "", layer.outputs)
    found = replace(layer, means=None)
    if into is not None:
        found = scale_inputs(found, into, nothing)
    return found if out is None else scale_outputs(found, 1 / out, nothing)


def bars_of(numbers: NDArray[np.floating], low: float, high: float) -> HistogramBars:
    """A histogram that shows all numbers, but NaN and infinity, and the whole range."""
    numbers = numbers[np.isfinite(numbers)]
    ends = min(low, float(numbers.min(initial=low))), max(high, float(numbers.max(initial=high)))
    counts, edges = np.histogram(numbers, BARS, ends if ends[1] > ends[0] else (ends[0], ends[0] + 1))
    return HistogramBars(tuple(map(float, edges)), tuple(map(int, counts)))
