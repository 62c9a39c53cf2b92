"""This module finds what the weights of a folded network foretell without an image: five troubles, each by a rule.

With w[o, i, k] the weights of output channel o, and b bits between -max and max, a step is max / (2^(b-1) - 1).

    channel-imbalance   max over o of |w[o]|max / |w[o']|max: with one scale for all, a channel whose ratio to the
                        largest is 2^n has n bits fewer than the others. A scale for each channel mends it.
    input-imbalance     the same over input channels. No scale of weights mends it: the channels themselves must be
                        scaled, in this layer and in what is in front of it (equalization). Where BatchNormalization
                        tells the means of the inputs, channels that bring next to nothing do not count.
    outlier             |w|max of a channel over the root mean square r of its other weights. Rounding costs
                        step^2 / 12, so that those keep 20 log10(sqrt(12) 127 r / |w|max) dB with 8 bits.
    high-bias           a channel's values lie in m +- 3 s and never come near zero; c is how near. c / R is the share
                        of the tensor's range R that holds nothing of this channel. By BatchNormalization m = beta and
                        s = |gamma|. Else, where a Clip or Sigmoid bounds the inputs, the values are those that they
                        can make; for others m is the bias and s = 6 sqrt(sum w^2), as of inputs with the rms 6.
    dead-channels       all weights of an output channel are zero, or nearly so beside others: it writes its bias, or
                        nothing at all where that is not positive and a Relu follows. It costs memory and time.

Where weights are not finite nothing else is said. What an int32 bias needs depends on the ranges of activations.

Sources: Nagel et al. 2019, arXiv 1906.04721, sections 3.1, 4.1 and 4.1.3; Krishnamoorthi 2018, arXiv 1806.08342, 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.errors import format_count
from qconv.ir.layers import INPUTS_FIRST, Float64, Layer, read_layer
from qconv.ir.model import Model, Node, clip_bounds, constant_array
from qconv.ir.operators import CLIPPING_ACTIVATIONS, operator
from qconv.ir.rewriting import EditRefused, standard_op_type

LEAST_RATIO = 64.0
"""2^6: of 8 bits the smallest channel keeps 2, so that its weights are -1, 0 and 1 times a step."""
LEAST_OUTLIER = 12.0
"""Four times what the largest of some hundred normal weights is, about 3: two bits of 8 are lost to one weight."""
LEAST_WEIGHTS = 32
"""With fewer in a channel, one that stands out is no exception but a quarter of them."""
LEAST_OFFSET = 0.5
"""Half of the range, one of its bits."""
DEVIATIONS = 3.0
"""Standard deviations; 99.7 % of a normal variable. Nagel et al. absorb what lies beyond them."""
ASSUMED_INPUT_RMS = 6.0
"""Root mean square that layers read at most, where nothing tells: a normalised network's values hardly reach that, and
behind ReLU6 none is larger."""
DEAD_SHARE = 2.0**-16
"""Ranges below this share of the layer's largest are as good as zero: with one scale even 16 bits have no step left."""
"""Their results lie between 0 and 1."""
MOST_EXAMPLES = 8
"""Most channels that are named."""

MeanAndDeviation = tuple[Float64, Float64]


@dataclass(frozen=True, slots=True)
class WeightProblem:
    """One kind of trouble in one layer.

    Attributes:
        kind: A short name that stays the same.
        where: The layer.
        what: The evidence in words.
        value: The number that triggered it.
        channels: The worst first, at most EXAMPLES.
        count: How many there are.
        handled: What of a default run takes care of it; empty where nothing does.
    """

    kind: str
    where: str
    what: str
    value: float | None
    channels: tuple[int, ...] = ()
    count: int = 0
    handled: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the row that `--json` prints."""
        return {
            "kind": self.kind,
            "where": self.where,
            "what": self.what,
            "value": self.value,
            "channels": list(self.channels),
            "count": self.count,
            "handled": self.handled,
        }


@dataclass(frozen=True, slots=True)
class WeightStatistics:
    """Statistics of one layer's weights; None where they say nothing: one channel, few weights, all zero.

    Attributes:
        output_ratio, input_ratio: Largest over smallest range.
        outlier: Of the worst channel, in dB as in the module.
        offset: c / R, as in the module.
    """

    output_ratio: float | None = None
    input_ratio: float | None = None
    outlier: float | None = None
    offset: float | None = None


@dataclass(frozen=True, slots=True)
class DefaultHandling:
    """What a default run does about troubles. per_channel: weights get a scale for each output channel."""

    per_channel: bool
    equalizes: bool


def collect_batch_norm_statistics(model: Model) -> dict[str, MeanAndDeviation]:
    """Collect mean and deviation of layers' outputs by the BatchNormalization behind. model: not folded."""
    found: dict[str, MeanAndDeviation] = {}
    for node in model.nodes():
        before = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        if (
            standard_op_type(node) != "BatchNormalization"
            or before is None
            or standard_op_type(before) not in INPUTS_FIRST
        ):
            continue
        numbers = [constant_array(value) for value in node.inputs[1:5]]
        if model.sole_reader(before.outputs[0]) is node and all(part is not None for part in numbers):
            gamma, beta = (np.asarray(part, np.float64).reshape(-1) for part in numbers[:2])
            found[before.name or ""] = (beta, np.abs(gamma))
    return found


def check_weights(
    model: Model, node: Node, known: Mapping[str, MeanAndDeviation], handling: DefaultHandling
) -> tuple[WeightStatistics, list[WeightProblem]]:
    """Compute the statistics of a layer and find its troubles.

    Args:
        model: Folded.
        node: The layer.
        known: As `collect_batch_norm_statistics` gives it.
        handling: What a default run does.
    """
    try:
        layer = read_layer(node)
    except EditRefused:
        return WeightStatistics(), []
    name = node.name or ""
    if not (np.isfinite(layer.weight).all() and np.isfinite(layer.bias).all()):
        what = "weights or biases that are NaN or infinite: quantize refuses them"
        return WeightStatistics(), [WeightProblem("not-finite", name, what, None)]
    told = _WeightChecker(name, layer, handling)
    told.channel_imbalance()
    told.input_imbalance(_input_bounds(node)[1])
    told.outliers()
    told.high_bias(known.get(name), _input_bounds(node), _output_bounds(model, node))
    told.dead_channels(_output_bounds(model, node))
    return WeightStatistics(**told.numbers), told.troubles


def count_relu6(model: Model) -> int:
    """Count the Clip operators between 0 and 6."""
    return sum(clip_bounds(node) == (0.0, 6.0) for node in model.nodes())


def _output_bounds(model: Model, node: Node) -> tuple[float, float]:
    reader = model.sole_reader(node.outputs[0])
    bounds = clip_bounds(reader) if reader is not None and reader.op_type in CLIPPING_ACTIVATIONS else None
    return (-np.inf, np.inf) if bounds is None else bounds


def _input_bounds(node: Node) -> tuple[float, float]:
    """Return the bounds of a layer's input, where the operator that writes it has any."""
    before = node.inputs[0].producer() if node.inputs[0] is not None else None
    bounds = None if before is None else operator(standard_op_type(before)).output_range or clip_bounds(before)
    return (-np.inf, np.inf) if bounds is None else bounds


class _WeightChecker:
    """Checks one layer. magnitude: |w|, (G, O/G, I/G, K)."""

    def __init__(self, name: str, layer: Layer, handling: DefaultHandling) -> None:
        self.name, self.layer, self.handling = name, layer, handling
        self.magnitude = np.abs(layer.weight)
        self.outputs: NDArray[Any] = self.magnitude.max(axis=(2, 3), initial=0.0).reshape(-1)
        self.most = float(self.outputs.max(initial=0.0))
        self.numbers: dict[str, float] = {}
        self.troubles: list[WeightProblem] = []

    def channel_imbalance(self) -> None:
        living = self.outputs > DEAD_SHARE * self.most
        if living.sum() < 2:
            return
        ratios = self.most / self.outputs[living].astype(np.float64)
        self.numbers["output_ratio"] = value = float(ratios.max())
        channels = np.flatnonzero(living)
        count = int((ratios > LEAST_RATIO).sum())
        what = (
            f"output channels' ranges differ {_format_ratio(value)}: with one scale "
            f"{format_count(count, 'channel')} of "
        )
        what += f"{self.layer.outputs} would keep 2 bits of 8 or fewer"
        handled = "scales for each channel take care of it" if self.handling.per_channel else ""
        self._add("channel-imbalance", value > LEAST_RATIO, what, channels, ratios, LEAST_RATIO, handled)

    def input_imbalance(self, bound: float) -> None:
        ranges = self.magnitude.max(axis=(1, 3), initial=0.0).astype(np.float64)  # (G, I/G)
        largest = ranges.max(axis=1, keepdims=True, initial=0.0)
        living = (ranges > DEAD_SHARE * self.most) & (largest > 0)
        if self.layer.means is not None:
            brought = ranges * np.abs(self.layer.means).reshape(ranges.shape)
            living &= brought >= brought.max(axis=1, keepdims=True, initial=0.0) / LEAST_RATIO
        if ranges.shape[1] < 2 or not living.any():
            return
        ratios = np.divide(largest, ranges, out=np.ones_like(ranges), where=living).reshape(-1)
        self.numbers["input_ratio"] = value = float(ratios.max())
        what = f"input channels' ranges differ {_format_ratio(value)}, which no scale of outputs helps"
        handled = "equalization mends it where channels can be scaled" if self.handling.equalizes else ""
        if np.isfinite(bound):
            what += f"; the Clip or Sigmoid in front, at {bound:g}, limits how far they can be scaled"
        channels = np.arange(ratios.size)
        self._add("input-imbalance", value > LEAST_RATIO, what, channels, ratios, LEAST_RATIO, handled)

    def outliers(self) -> None:
        rows = self.magnitude.reshape(self.layer.outputs, -1).astype(np.float64)
        size = rows.shape[1]
        living = self.outputs > DEAD_SHARE * self.most
        if size < LEAST_WEIGHTS or not living.any():
            return
        rows = rows[living] / self.outputs[living].astype(np.float64)[:, None]  # the largest is 1
        others = np.maximum((rows**2).sum(axis=1) - 1.0, 0.0) / (size - 1)
        alone = others == 0  # one weight and nothing else: there is nothing to lose
        ratios = np.where(alone, 1.0, 1.0 / np.sqrt(np.where(alone, 1.0, others)))
        self.numbers["outlier"] = value = float(ratios.max())
        decibel = 20 * np.log10(np.sqrt(12) * 127 / value)
        what = (
            f"one weight of a channel is {_format_ratio(value, 'as large')} as the root mean square of "
            "the others, which "
        )
        what += f"keep {decibel:.0f} dB with 8 bits"
        self._add("outlier", value > LEAST_OUTLIER, what, np.flatnonzero(living), ratios, LEAST_OUTLIER, "")

    def high_bias(
        self, known: MeanAndDeviation | None, inputs: tuple[float, float], bounds: tuple[float, float]
    ) -> None:
        by, low, high = self._written(known, inputs)
        low, high = np.clip(low, *bounds), np.clip(high, *bounds)
        reach = float(max(high.max(initial=0.0), 0.0) - min(low.min(initial=0.0), 0.0))
        if reach == 0:
            return
        offsets = np.maximum(np.maximum(low, -high), 0.0) / reach
        living = self.outputs > DEAD_SHARE * self.most  # a dead channel has a name of its own
        offsets = offsets[living]
        self.numbers["offset"] = value = float(offsets.max(initial=0.0))
        what = f"a channel stays {100 * value:.0f}% of its tensor's range away from zero, {by}"
        relu = self.handling.equalizes and bounds == (0.0, np.inf)
        handled = "what is constant goes into the layers behind, where that is exact" if relu else ""
        self._add("high-bias", value > LEAST_OFFSET, what, np.flatnonzero(living), offsets, LEAST_OFFSET, handled)

    def _written(self, known: MeanAndDeviation | None, inputs: tuple[float, float]) -> tuple[str, Float64, Float64]:
        """Return how it is known, and the least and the largest values of each output channel, (O,)."""
        if known is not None and known[0].size == self.layer.outputs:
            mean, deviation = known
            return "by BatchNormalization", mean - DEVIATIONS * deviation, mean + DEVIATIONS * deviation
        bias, weight = self.layer.bias, self.layer.weight.astype(np.float64)
        if np.isfinite(inputs).all():
            up, down = (np.maximum(sign * weight, 0.0).sum(axis=(2, 3)).reshape(-1) for sign in (1, -1))
            least, most = min(inputs[0], 0.0), inputs[1]  # padding brings zeros
            return "whatever it reads", bias + up * least - down * most, bias + up * most - down * least
        deviation = ASSUMED_INPUT_RMS * np.sqrt((weight**2).sum(axis=(2, 3))).reshape(-1)
        return (
            f"even for inputs of {ASSUMED_INPUT_RMS:g} on average",
            bias - DEVIATIONS * deviation,
            bias + DEVIATIONS * deviation,
        )

    def dead_channels(self, bounds: tuple[float, float]) -> None:
        dead = np.flatnonzero(self.outputs <= DEAD_SHARE * self.most)
        silent = int((self.layer.bias[dead] <= 0).sum()) if bounds[0] >= 0 else 0
        what = f"{format_count(dead.size, 'channel')} of {self.layer.outputs} without weights that count"
        what += f", of which {silent} never active" if silent else ""
        share = dead.size / max(self.layer.outputs, 1)
        self._add("dead-channels", dead.size > 0, what, dead, np.ones(dead.size), 0.0, "", value=share)

    def _add(
        self,
        kind: str,
        triggered: bool,
        what: str,
        channels: NDArray[Any],
        numbers: NDArray[Any],
        least: float,
        handled: str,
        *,
        value: float | None = None,
    ) -> None:
        if not triggered:
            return
        worst = np.argsort(-numbers, kind="stable")
        worst = worst[numbers[worst] > least]
        named = tuple(int(channels[index]) for index in worst[:MOST_EXAMPLES])
        number = float(numbers.max()) if value is None else value
        self.troubles.append(WeightProblem(kind, self.name, what, number, named, worst.size, handled))


def _format_ratio(ratio: float, suffix: str = "") -> str:
    """Format a ratio as `83 times` or `1.2e+06 times`."""
    shown = f"{ratio:.0f}" if ratio < 1e5 else f"{ratio:.1e}"
    return f"{shown} times {suffix}".rstrip()
