"""The noise model predicts quantization noise as a function of channel scales s; `noise_descent` finds the least.

    activations step_x^2 * sum over c of g_c s_c^2                              step_x = max of range_c / s_c, in codes
    weights     sum over o of g_o step_o^2 * sum over i of v_i / s_i^2          step_o = max over i of |W_oi| s_i
                step^2 * sum over o of g_o s_o^2 * sum over i of v_i / s_i^2    step = max over o, i of |W_oi| s_i / s_o
    g_c = sum over layers that read channel c, over o, k of W[o, c, k]^2 * share * g_o / (sum over o of g_o Var[y_o])

Scales s divide tensors and multiply the weights that read them (`scale_groups`); steps follow ranges, and step^2 / 12
is the mean square of an error. To fill the ranges of a tensor takes precision from the weights that read it, so that
there is an optimum between; the third line is for layers with one scale for all weights.

g_c is what a unit of noise in channel c is worth at the outputs, computed from the last layer to the first: noise
counts as a share of the signal y that the next layer adds to, which is its own output or the stream behind the Add that
alone reads it. Inside a residual branch it counts by the branch's `share` in the stream. v_i is the power of a weight's
input; a channel's mean counts little (MEAN_WEIGHT), as bias correction removes its effect. Next to layers rounded
singly in real networks g is right to a factor of a few.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from qconv.calibration.observer import ChannelRanges
from qconv.ir.layers import Float64, read_layer
from qconv.ir.model import Model, Value
from qconv.ir.operators import operator
from qconv.passes.scale_groups import LayerScaleGroups, ScaleGroups
from qconv.planning.plan import LayerPlan, Plan
from qconv.quantizer import PerTensor

Classes = NDArray[np.int64]

TINY = 1e-300


@dataclass(frozen=True, slots=True, eq=False)
class ActivationNoise:
    """The rounding noise of tensors that share a step.

    channels: classes of all their channels, (n,).
    lows, highs: ranges of the channels, (n,), lows <= 0 <= highs.
    gains: g of the channels, (n,).
    levels: steps in the range.
    """

    channels: Classes
    lows: Float64
    highs: Float64
    gains: Float64
    levels: float

    def classes(self) -> Classes:
        """The classes on whose scales the noise depends."""
        return self.channels

    def noise(self, u: Float64) -> float:
        """The noise with log s of every class, (classes,)."""
        s = np.exp(u[self.channels])
        width = float((self.highs / s).max(initial=0.0) - (self.lows / s).min(initial=0.0))
        return float(width**2 / (12 * self.levels**2) * (self.gains @ s**2))


@dataclass(frozen=True, slots=True, eq=False)
class WeightNoise:
    """The rounding noise of the weights of a layer with G groups.

    inputs, outputs: classes (I,), (O,). largest: (G, O/G, I/G), of each output and input the largest magnitude over
    kernel positions. powers: (I,), of what meets the weights, summed over kernel positions. gains: (O,). levels: codes
    above zero. whole: whether all weights share one scale, else those of each output do.
    """

    inputs: Classes
    outputs: Classes
    largest: NDArray[np.floating]
    powers: Float64
    gains: Float64
    levels: float
    whole: bool

    def joined(self, other: WeightNoise) -> WeightNoise:
        """The noise in two layers that share these weights and classes, each power counted by its layer's gains."""
        groups = len(self.largest)
        worths = [term.gains.reshape(groups, -1).sum(axis=1, keepdims=True) for term in (self, other)]
        share = worths[0] / np.maximum(worths[0] + worths[1], TINY)
        powers = share * self.powers.reshape(groups, -1) + (1 - share) * other.powers.reshape(groups, -1)
        return replace(self, powers=powers.reshape(-1), gains=self.gains + other.gains)

    def thinned(self, every: int) -> WeightNoise:
        """The noise with one output in `every` of each group, which stands for the others."""
        groups = len(self.largest)
        outputs = self.outputs.reshape(groups, -1)[:, ::every].reshape(-1)
        gains = every * self.gains.reshape(groups, -1)[:, ::every].reshape(-1)
        return replace(self, outputs=outputs, largest=self.largest[:, ::every], gains=gains)

    def classes(self) -> Classes:
        """The classes on whose scales the noise depends: outputs only where one scale is for all of them."""
        return np.concatenate([self.inputs, self.outputs]) if self.whole else self.inputs

    def noise(self, u: Float64) -> float:
        """The noise with log s of every class, (classes,)."""
        groups = len(self.largest)
        gains, s = (x.reshape(groups, -1) for x in (self.gains, np.exp(u[self.inputs])))
        power = (self.powers.reshape(groups, -1) / s**2).sum(axis=1)
        rows = (self.largest * s[:, None]).max(axis=2)  # (G, O/G)
        if self.whole:
            out = np.exp(u[self.outputs]).reshape(groups, -1)
            found = float((rows / out).max()) ** 2 * float((gains * out**2).sum(axis=1) @ power)
        else:
            found = float((gains * rows**2).sum(axis=1) @ power)
        return found / (12 * self.levels**2)


NoiseTerm = ActivationNoise | WeightNoise
"""One source of noise."""


def total_noise(terms: Sequence[NoiseTerm], u: Float64) -> float:
    """The noise of all terms."""
    return sum(term.noise(u) for term in terms)


MEAN_WEIGHT = 0.1

MOST_WEIGHTS = 2**22

LEAST_SIGNAL = 1e-30
"""Variance below which a layer's output counts as constant: no noise is measured against it."""


@dataclass(frozen=True, slots=True)
class ChannelObservations:
    """The observed ranges and moments of tensors that have classes."""

    groups: ScaleGroups
    channels: Mapping[str, ChannelRanges]

    def of(self, value: Value | None) -> ChannelRanges | None:
        """The ranges of a tensor; None where it has no classes or was not observed."""
        classes = None if value is None else self.groups.of.get(value)
        found = None if value is None else self.channels.get(value.name or "")
        return found if found is not None and classes is not None and found.low.size == classes.size else None

    def powers(self, value: Value | None, channels: int) -> tuple[Float64, Float64] | None:
        """E[x^2], and the part of it that bias correction cannot remove, of every channel, (C,) each."""
        found = None if value is None else self.channels.get(value.name or "")
        if found is None or found.mean is None or found.spread is None or found.low.size != channels:
            return None
        return found.spread + found.mean**2, found.spread + MEAN_WEIGHT * found.mean**2

    def made(self, value: Value) -> tuple[Float64, Float64] | None:
        """The variance of a layer's output, and of the stream that it is added to behind activations, (C,) each.

        None where these were not observed.
        """
        found: list[Float64] = []
        while (classes := self.groups.of.get(value)) is not None:
            seen = self.of(value)
            if seen is not None and seen.spread is not None:
                found.append(seen.spread)
            readers = {use.node for use in value.uses()}
            if len(readers) != 1 or value.is_graph_output():
                break
            (reader,) = readers
            behind = self.groups.of.get(reader.outputs[0])
            if not operator(reader.op_type).hands_on_noise or behind is None or behind.size != classes.size:
                break
            value = reader.outputs[0]
        return (found[0], found[-1]) if found else None


@dataclass(slots=True, eq=False)
class _NoiseGains:
    """g of every class, by the layers visited so far, from the last to the first.

    noise: g, (classes,).
    share: the largest share in its stream of any layer that reads the class, (classes,).
    """

    noise: Float64
    share: Float64


def collect_noise_terms(
    model: Model, plan: Plan, seen: ChannelObservations, most: int = MOST_WEIGHTS
) -> list[NoiseTerm]:
    """Every source of noise of the quantized network, as a function of the scales of classes.

    most: weights of a layer from which on some of its outputs stand for all.
    """
    scale_groups = seen.groups
    worth = _NoiseGains(np.zeros(scale_groups.fixed.size), np.zeros(scale_groups.fixed.size))
    at = {ends.node: ends for ends in scale_groups.layers}
    quantized = {layer.node: layer for layer in plan.layers}
    gains: dict[Value, Float64] = {}
    weights: dict[tuple[object, ...], WeightNoise] = {}
    for node in reversed(model.nodes()):
        for value in node.outputs:
            if value in scale_groups.of:
                gains[value] = worth.noise[scale_groups.of[value]]
        term = _add_weight_noise(at[node], quantized.get(node), seen, worth, most) if node in at else None
        if term is not None:  # layers that share weights are tied, and one term
            key = (node.inputs[1], term.inputs.tobytes(), term.outputs.tobytes(), term.levels, term.whole)
            weights[key] = weights[key].joined(term) if key in weights else term
    terms: list[NoiseTerm] = [*weights.values()]
    for group in dict.fromkeys(plan.group_of().values()):
        codes = _make_activation_noise(plan, group, seen, gains)
        if codes is not None:
            terms.append(codes)
    return terms


def _add_weight_noise(
    ends: LayerScaleGroups, layer: LayerPlan | None, seen: ChannelObservations, worth: _NoiseGains, most: int
) -> WeightNoise | None:
    """The noise of a layer's weights, None where there is none to know. worth: updated for its inputs."""
    own = read_layer(ends.node)
    powers = seen.powers(ends.node.inputs[0], own.inputs)
    groups, kernel = own.weight.shape[0], own.weight.shape[3]
    squares = np.einsum("goik,goik->goi", own.weight, own.weight, dtype=np.float64)
    gains, share = worth.noise[ends.outputs], float(worth.share[ends.outputs].max(initial=0.0))
    if not gains.any():  # the network's output, or an operator reads it that says nothing
        gains, share = np.ones_like(gains), 1.0
    made = seen.made(ends.node.outputs[0])
    if made is None:
        signal = np.ones(own.inputs) if powers is None else powers[0]
        made = (np.einsum("goi,gi->go", squares, signal.reshape(groups, -1)).reshape(-1),) * 2
    alone, joined = (float(gains @ power) for power in made)
    if joined < LEAST_SIGNAL:
        return None
    gains = (share * gains / joined).reshape(groups, -1)
    np.add.at(worth.noise, ends.inputs, np.einsum("go,goi->gi", gains, squares).reshape(-1))
    np.maximum.at(worth.share, ends.inputs, share * min(1.0, alone / joined))
    if layer is None or powers is None:
        return None
    whole = isinstance(layer.weight.granularity, PerTensor)
    if not whole and own.weight.shape[2] == 1:
        return None  # a depthwise layer's rounding is relative to each channel, whatever its scale
    largest = np.abs(own.weight).max(axis=3)
    levels = max((layer.weight.qmax - layer.weight.qmin) / 2, 1.0)
    found = WeightNoise(ends.inputs, ends.outputs, largest, kernel * powers[1], gains.reshape(-1), levels, whole)
    return found.thinned(-(-largest.size // most))


def _make_activation_noise(
    plan: Plan, group: tuple[Value, ...], seen: ChannelObservations, gains: Mapping[Value, Float64]
) -> ActivationNoise | None:
    spec = plan.activations[group[0]].spec
    known = [(value, found) for value in group if (found := seen.of(value)) is not None and value in gains]
    if spec is None or group[0] in plan.given or not known:
        return None
    lows = np.concatenate([found.lowest for _, found in known])
    highs = np.concatenate([found.highest for _, found in known])
    if spec.symmetric and lows.any():
        highs = np.maximum(highs, -lows)
        lows = -highs
    channels = np.concatenate([seen.groups.of[value] for value, _ in known])
    return ActivationNoise(
        channels, lows, highs, np.concatenate([gains[value] for value, _ in known]), 2.0**spec.bits - 1
    )
