"""This module takes back what quantization does to the spread and the mean of each output channel of the layers.

    y ~ g * q + b           y, q: the channel in the float and in the quantized network, before its activation

Ranges that cut off what is rare shrink channels a little, layer after layer, and where few numbers are the output,
such as one logit behind 80 layers, all of that goes the same way: biases alone cannot take it back. Where weights have
a scale for each output channel, g goes into that scale and b into the bias: no code changes, nor does the time. Layers
are settled in order, each behind those that are settled. Hubara et al. 2020 (arXiv 2006.10518) tune statistics of
BatchNormalization like this; least squares err less where the quantized channel is noisy.

Only what readers see of a channel counts (`effective_range`). In networks that lose little this can do harm, since what
is left there is chance: whoever calls measures what it gains.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.ir.model import Model, attribute
from qconv.ir.stepwise import StepwiseRun
from qconv.planning.plan import Plan
from qconv.quantization.effective_range import EffectiveRange
from qconv.quantization.layer import LayerParams, attach_bias
from qconv.quantization.parameters import Params
from qconv.quantization.sequential_rounding import BYTES_IN_MEMORY, copy_with_float_weights, replace_weights
from qconv.reporter import Reporter
from qconv.storage import ArrayStore, StoredArrays

STEP = "gains"

GAINS = (0.7, 1.5)
"""Least and largest gain of a channel: a few percent are usual."""

LEAST_CORRELATION = 0.5
"""Between both networks, below which a channel gets the mean alone: a gain would say nothing."""

FEWEST_PLACES = 64
"""Places seen of a channel from which on it is settled."""

CHANNEL_AXIS = 1

Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ChannelLines:
    """The line y ~ gain * q + shift of each channel, (O,) both."""

    gain: Float64
    shift: Float64

    def applied(self, outputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Outputs (N, O, ...) on these lines."""
        shape = [1] * outputs.ndim
        shape[CHANNEL_AXIS] = -1
        return np.asarray(outputs * self.gain.reshape(shape) + self.shift.reshape(shape), np.float32)


def correct_gains(
    model: Model,
    plan: Plan,
    params: Params,
    feeds: Sequence[Mapping[str, NDArray[Any]]],
    threads: int | None,
    reporter: Reporter,
) -> tuple[list[LayerParams], int]:
    """Settle scales and biases of layers for what the quantized network hands on.

    Args:
        model: The folded float network, which stays as it is.
        plan: The decisions.
        params: All parameters, which stay as they are.
        feeds: The images, batch by batch.
        threads: Of the runtime.
        reporter: Hears of progress.

    Returns:
        The layers, and how many of them have changed.
    """
    copy, nodes = copy_with_float_weights(model, plan, params, quantizers=True)
    for chosen in params.layers:
        replace_weights(copy, nodes[chosen.layer.node.name or ""], chosen)
    alone = {alike[0].node for alike in plan.layers_by_weight() if len(alike) == 1}
    layers, changed = list(params.layers), 0
    with (
        contextlib.closing(ArrayStore(BYTES_IN_MEMORY)) as first,
        contextlib.closing(ArrayStore(BYTES_IN_MEMORY)) as second,
    ):
        float_run = StepwiseRun(model, feeds, first, threads=threads)
        quantized_run = StepwiseRun(copy, feeds, second, threads=threads)
        for index, chosen in enumerate(layers):
            reporter.progress(STEP, index, len(layers))
            node = chosen.layer.node
            if node not in alone or not _can_change(chosen):
                continue
            there = nodes[node.name or ""].outputs[0]
            wanted, got = float_run.values_of(node.outputs[0]), quantized_run.values_of(there)
            lines = fit_lines(wanted, got, EffectiveRange.of_consumers(node, params.activations).ends)
            if lines is None or lines.gain.size != chosen.weight.scale.size:
                continue
            layers[index], changed = _on_lines(chosen, lines, params, plan), changed + 1
            quantized_run.replace_values(there, map(lines.applied, got))
    reporter.progress(STEP, len(layers), len(layers))
    return layers, changed


def _can_change(chosen: LayerParams) -> bool:
    """Whether a layer has a bias that is added as it is, or may have one, and a scale for each output channel."""
    node, one_each = chosen.layer.node, chosen.weight.scale.ndim == 1 and not chosen.layer.blocked
    return node.op_type != "MatMul" and attribute(node, "beta", 1.0) == 1 and one_each


def _on_lines(chosen: LayerParams, lines: ChannelLines, params: Params, plan: Plan) -> LayerParams:
    bias = lines.shift if chosen.bias is None else chosen.bias * lines.gain + lines.shift
    weight = chosen.weight.with_scale((chosen.weight.scale * lines.gain).astype(np.float32))
    source = params.sources.get(chosen.layer.node)
    return attach_bias(chosen.layer, weight, chosen.codes, bias.astype(np.float32), source, plan.target)


def fit_lines(wanted: StoredArrays, got: StoredArrays, seen: tuple[float, float]) -> ChannelLines | None:
    """Fit the lines of a layer's channels, (N, O, ...) batch by batch, by least squares.

    wanted, got: what the float and the quantized network say. seen: the range that readers see. Places count where the
    quantized network is in it, and the float one at its ends where it is outside: places picked by what is wanted would
    bend the lines. Returns None where the data select other shapes, numbers are not finite, or places are too few.
    """
    if any(y.shape != q.shape or len(y.shape) < 2 for y, q in zip(wanted.held, got.held, strict=True)):
        return None
    filled = [index for index, held in enumerate(wanted.held) if math.prod(held.shape)]
    if not filled:
        return None
    first = _by_channel(wanted[filled[0]])
    centre = first.mean(axis=1, dtype=np.float64).astype(np.float32)  # squares of what is far from 0 say little
    rows = ((_by_channel(wanted[index]), _by_channel(got[index])) for index in filled)
    with np.errstate(invalid="ignore", over="ignore"):  # what is infinite is found in the sums
        sums = sum((_sum_products(y, q, centre, seen) for y, q in rows), start=np.zeros((6, len(centre))))
    if not np.isfinite(sums).all():
        return None
    count, one = sums[0], np.maximum(sums[0], 1)
    mean_y, mean_q = sums[1] / one, sums[2] / one
    of_y, of_q, together = sums[3] / one - mean_y**2, sums[4] / one - mean_q**2, sums[5] / one - mean_y * mean_q
    known = (count >= FEWEST_PLACES) & (of_q > 0)
    if not known.any():
        return None
    close = known & (together > 0) & (together**2 >= LEAST_CORRELATION**2 * of_y * of_q)
    gain = np.clip(np.divide(together, of_q, out=np.ones_like(of_q), where=close), *GAINS)
    shift = np.where(known, centre + mean_y - gain * (centre + mean_q), 0.0)
    return ChannelLines(gain, shift)


def _by_channel(outputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N, O, ...) as (O, places)."""
    return np.moveaxis(outputs, CHANNEL_AXIS, 0).reshape(outputs.shape[CHANNEL_AXIS], -1)


def _sum_products(
    y: NDArray[np.float32], q: NDArray[np.float32], centre: NDArray[np.float32], seen: tuple[float, float]
) -> Float64:
    """The number of places, and the sums of y, q, y^2, q^2 and y q over them, (6, O); y and q less the centre."""
    low, high = seen
    inside, middle = (q > low) & (q < high), centre[:, None]
    y, q = (np.clip(y, low, high) - middle) * inside, (q - middle) * inside
    sums = [x.sum(axis=1, dtype=np.float64) for x in (y, q)]
    products = [np.einsum("op,op->o", a, b).astype(np.float64) for a, b in ((y, y), (q, q), (y, q))]
    return np.stack([inside.sum(axis=1), *sums, *products]).astype(np.float64)
