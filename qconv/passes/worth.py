"""What noise in a channel is worth, layer by layer from the last to the first, and with it all sources of noise.

    g_c = sum over layers that read channel c, over o, k of W[o, c, k]^2 * share * g_o / (sum over o of g_o Var[y_o])

Noise counts as a share of the signal in what the next layer makes of it, weighed by those behind. y is the signal that
the layer adds to: its own output, or the stream behind the Add that alone reads it. Inside a residual branch noise
counts by the branch's share in the stream. A channel's mean counts little in what meets a weight, as bias correction
takes back what comes of it (MEAN_COUNTS). Beside single layers rounded in real networks this is right to a factor of a
few.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from qconv.calibration.observer import ChannelRanges
from qconv.ir.layers import Float64, read_layer
from qconv.ir.model import Model, Value
from qconv.passes.noise import Codes, Term, Weights
from qconv.passes.streams import Ends, Streams
from qconv.planning.plan import LayerPlan, Plan
from qconv.quantizer import PerTensor

MEAN_COUNTS = 0.1
MOST_WEIGHTS = 2**22
LEAST_SIGNAL = 1e-30
"""Variance below which a layer is taken to say the same of all pictures: no noise counts against that."""
PASSING = frozenset({"Add", "Relu", "Clip", "LeakyRelu", "PRelu"})


@dataclass(frozen=True, slots=True)
class Seen:
    """The tensors with one number a channel."""

    streams: Streams
    channels: Mapping[str, ChannelRanges]

    def of(self, value: Value | None) -> ChannelRanges | None:
        """What is known of a tensor that has classes; None where nothing is."""
        classes = None if value is None else self.streams.of.get(value)
        found = None if value is None else self.channels.get(value.name or "")
        return found if found is not None and classes is not None and found.low.size == classes.size else None

    def powers(self, value: Value | None, channels: int) -> tuple[Float64, Float64] | None:
        """E[x^2] and what of it bias correction cannot take back, of every channel, (C,) each."""
        found = None if value is None else self.channels.get(value.name or "")
        if found is None or found.mean is None or found.spread is None or found.low.size != channels:
            return None
        return found.spread + found.mean**2, found.spread + MEAN_COUNTS * found.mean**2

    def made(self, value: Value) -> tuple[Float64, Float64] | None:
        """The variance of what a layer makes, and of the signal that it adds to, behind activations and
        Adds, (C,) each.

        None where nobody watched.
        """
        found: list[Float64] = []
        while (classes := self.streams.of.get(value)) is not None:
            seen = self.of(value)
            if seen is not None and seen.spread is not None:
                found.append(seen.spread)
            readers = {use.node for use in value.uses()}
            if len(readers) != 1 or value.is_graph_output():
                break
            (reader,) = readers
            behind = self.streams.of.get(reader.outputs[0])
            if reader.op_type not in PASSING or behind is None or behind.size != classes.size:
                break
            value = reader.outputs[0]
        return (found[0], found[-1]) if found else None


@dataclass(slots=True, eq=False)
class _Worth:
    """Of every class, by the layers seen so far, from the last to the first.

    noise: what a unit of noise in it is worth, (classes,). share: the largest part that a layer which reads it has in
    the signal, (classes,): what is added to a large stream counts little.
    """

    noise: Float64
    share: Float64


def noise_terms(model: Model, plan: Plan, seen: Seen) -> list[Term]:
    """Every source of noise of the quantized network, as a function of the scales of classes."""
    streams = seen.streams
    worth = _Worth(np.zeros(streams.fixed.size), np.zeros(streams.fixed.size))
    at = {ends.node: ends for ends in streams.layers}
    quantized = {layer.node: layer for layer in plan.layers}
    gains: dict[Value, Float64] = {}
    terms: list[Term] = []
    for node in reversed(model.nodes()):
        for value in node.outputs:
            if value in streams.of:
                gains[value] = worth.noise[streams.of[value]]
        if node in at:
            terms += _through(at[node], quantized.get(node), seen, worth)
    for group in dict.fromkeys(plan.group_of().values()):
        codes = _codes(plan, group, seen, gains)
        if codes is not None:
            terms.append(codes)
    return terms


def _through(ends: Ends, layer: LayerPlan | None, seen: Seen, worth: _Worth) -> list[Term]:
    """The noise of a layer's weights; `worth` of its inputs is brought up to date."""
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
        return []
    gains = (share * gains / joined).reshape(groups, -1)
    np.add.at(worth.noise, ends.inputs, np.einsum("go,goi->gi", gains, squares).reshape(-1))
    np.maximum.at(worth.share, ends.inputs, share * min(1.0, alone / joined))
    if layer is None or powers is None:
        return []
    whole = isinstance(layer.weight.granularity, PerTensor)
    if not whole and own.weight.shape[2] == 1:
        return []  # a depthwise layer's rounding is relative to each channel, whatever its scale
    largest = np.abs(own.weight).max(axis=3).astype(np.float64)
    outputs = ends.outputs.reshape(groups, -1)
    every = -(-largest.size // MOST_WEIGHTS)
    if every > 1:  # some of the outputs stand for all
        largest, outputs, gains = largest[:, ::every], outputs[:, ::every], gains[:, ::every] * every
    levels = max((layer.weight.qmax - layer.weight.qmin) / 2, 1.0)
    classes = ends.inputs, np.ascontiguousarray(outputs).reshape(-1)
    powers_met = kernel * powers[1]
    return [Weights.of(*classes, largest, powers_met, gains.reshape(-1).copy(), levels=levels, whole=whole)]


def _codes(plan: Plan, group: tuple[Value, ...], seen: Seen, gains: Mapping[Value, Float64]) -> Codes | None:
    spec = plan.activations[group[0]].spec
    known = [(value, found) for value in group if (found := seen.of(value)) is not None and value in gains]
    if spec is None or group[0] in plan.given or not known:
        return None
    lows = np.concatenate([found.lowest for _, found in known])
    highs = np.concatenate([found.highest for _, found in known])
    if spec.symmetric and lows.any():
        highs = np.maximum(highs, -lows)
        lows = -highs
    channels = np.concatenate([seen.streams.of[value] for value, _ in known])
    return Codes(channels, lows, highs, np.concatenate([gains[value] for value, _ in known]), 2.0**spec.bits - 1)
