"""Scales of channels are moved between layers where quantization gains from it: over pairs of layers and whole streams.

streams.py finds what can be scaled, noise.py what it costs; here the pictures say how large channels are, and the
chosen scales go into the weights.

    value of noise    g_c = sum over layers that read channel c, over o, k of W[o, c, k]^2 g_o / (sum over o of g_o E[y_o^2])

from the last layer to the first: noise counts as a share of the signal in what the next layer makes of it, which in turn
is weighed by those behind. E[y_o^2] = sum over i, k of W[o, i, k]^2 E[x_i^2]. A channel's mean counts little in what
meets a weight, as bias correction takes back what comes of it (MEAN_COUNTS).

A channel of a Clip is scaled only if its values keep away from the bounds on all pictures, before and after, by the
factor MARGIN: there the function changes for pictures with larger values than any of these.

The networks before and after are run on some pictures: where they differ, nothing is scaled.

Source: Nagel et al. 2019, arXiv 1906.04721, section 4.1, which makes the ranges of both weights equal; here the noise of
activations counts as well, and streams have one scale a channel however many layers write and read them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from qconv import save
from qconv.calibrate import Tap, observer, watch_apart
from qconv.edits import Refused, called, title
from qconv.feed import Feed
from qconv.findings import Change, Finding, Skipped
from qconv.graph import Model, Node, Value
from qconv.layers import Float64, check_finite, read_layer, scale_inputs, scale_outputs, write_layer
from qconv.noise import Codes, Term, Weights, least, total
from qconv.plan import Layer, Plan, tap_of
from qconv.quant import PerTensor
from qconv.runtime import Session
from qconv.sketch import Sketch, Want
from qconv.streams import OPEN, Ends, Limit, Streams, find_streams
from qconv.verify import Comparison

STEP = "equalize"
MARGIN = 1.1
LARGEST_SCALE = math.log(100.0)
LEAST_GAIN = 0.02
"""Share of the noise that a group's scales must take away: the model of the noise is no better than that."""
MEAN_COUNTS = 0.1
LEAST_RANGE = 0.1
"""Share of a tensor's mean range that a channel counts at least: other pictures may wake it."""
UNSEEN, TAIL, FEWEST_IN_TAIL = 10.0, 0.125, 3
OWN_SAMPLES = 8
"""As many samples of a channel's power weigh as much as what its range tells of it."""
PASSING = frozenset({"Add", "Relu", "Clip", "LeakyRelu", "PRelu"})
MOST_WEIGHTS = 2**22
EXACT_DB = 60.0
CHECKED_PICTURES = 8


def balance(model: Model, plan: Plan, feed: Feed, threads: int | None) -> list[Finding]:
    """Scale the channels of a folded model's tensors as its quantization by `plan` gains most.

    The model computes what it did, up to rounding. Where its outputs would move more, nothing is done.
    """
    streams = find_streams(model)
    left = [Skipped(STEP, where, why) for where, why in _unmoved(streams).items()]
    taps = _taps(plan, streams)
    if not taps or bool(streams.fixed.all()):
        return list(left)
    seen = _Seen(streams, seen_by_channel(watch_apart(observer(model, taps, threads), taps, feed.all(STEP))))
    terms = noise_terms(model, plan, seen)
    found = chosen(streams, terms, *_bounds(seen))
    if not found.u.any():
        return [*left, Skipped(STEP, "the network", "no scale of a channel lowers the modelled noise")]
    try:
        tried = model.copy()
        apply(tried, find_streams(tried), found.scales)
    except Refused as reason:
        return [*left, Skipped(STEP, "the network", str(reason))]
    moved = _sqnr(model, tried, feed, threads)
    if moved < EXACT_DB:
        return [*left, Skipped(STEP, "the network", f"scaled channels moved the float outputs to {moved:.1f} dB")]
    apply(model, streams, found.scales)
    return [*_told(found), *left]


# -- what is known -----------------------------------------------------------------------------------------------------


def _taps(plan: Plan, streams: Streams) -> list[Tap]:
    """All that is quantized, and what the layers read whose weights are."""
    read = dict.fromkeys(value for layer in plan.layers if (value := layer.node.inputs[0]) is not None)
    seen = dict.fromkeys(value for value in plan.activations if value in streams.of and not plan.copies(value))
    seen |= dict.fromkeys(limit.value for limit in streams.limits)
    return [tap_of(value, Want.CHANNELS | Want.COLUMNS) for value in {**seen, **read}]


@dataclass(frozen=True, slots=True, eq=False)
class Channels:
    """What every channel of a tensor did, (C,) each.

    low, high: its extremes on all pictures. lowest, highest: what they may become on others (UNSEEN), zero inside.
    mean, spread: mean and variance, None where they were not asked for.
    """

    low: Float64
    high: Float64
    lowest: Float64
    highest: Float64
    mean: Float64 | None
    spread: Float64 | None


def seen_by_channel(pictures: Iterable[Mapping[str, Sketch]]) -> dict[str, Channels]:
    """Sketches of single pictures, as one a tensor; tensors whose channels grow with the picture are left out."""
    kept: dict[str, list[Sketch]] = {}
    for sketches in pictures:
        for name, sketch in sketches.items():
            kept.setdefault(name, []).append(sketch)
    return {name: _channels(found) for name, found in kept.items() if len({s.lows.size for s in found}) == 1}


def _channels(found: Sequence[Sketch]) -> Channels:
    lows, highs = (np.stack(ends).astype(np.float64) for ends in zip(*((s.lows, s.highs) for s in found), strict=True))
    low, high = lows.min(axis=0), highs.max(axis=0)
    lowest, highest = -reach_of(-lows), reach_of(highs)
    if not found[0].columns.size:
        return Channels(low, high, lowest, highest, None, None)
    columns = np.concatenate([s.columns.reshape(-1, low.size) for s in found]).astype(np.float64)
    reach, spread = (highest - lowest) ** 2, columns.var(axis=0)
    by_range = reach * (spread.mean() / max(reach.mean(), np.finfo(np.float64).tiny))
    count = len(columns)
    spread = (count * spread + OWN_SAMPLES * by_range) / (count + OWN_SAMPLES)
    return Channels(low, high, lowest, highest, np.mean([s.means for s in found], axis=0), spread)


def reach_of(extremes: Float64) -> Float64:
    """How far up each channel may go on UNSEEN times as many pictures, (C,), zero or more.

    extremes: (P, C), the largest value of each picture. A Pareto tail through the largest TAIL of them, by Hill 1975:
    x_1 * UNSEEN^xi, xi = mean of log(x_i / x_k) over i < k. No channel is taken to go further than the largest of all;
    one that is seldom awake is taken to go as far.
    """
    ordered = np.sort(np.maximum(extremes, 0.0), axis=0)[::-1]
    most = ordered[0].max(initial=0.0)
    top = ordered[: max(2, int(TAIL * len(ordered)))]
    if len(top) < FEWEST_IN_TAIL or most == 0:
        return np.full(ordered.shape[1], most)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        index = np.log(top[:-1] / top[-1]).mean(axis=0)
        found = np.where(top[-1] > 0, ordered[0] * UNSEEN**index, most)
    return np.minimum(np.maximum(found, LEAST_RANGE * ordered[0].mean()), most)


@dataclass(frozen=True, slots=True)
class _Seen:
    """The tensors with one number a channel."""

    streams: Streams
    channels: Mapping[str, Channels]

    def of(self, value: Value | None) -> Channels | None:
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
        """The variance of what a layer makes, and of the signal that it adds to, behind activations and Adds, (C,) each.

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


def noise_terms(model: Model, plan: Plan, seen: _Seen) -> list[Term]:
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


def _through(ends: Ends, layer: Layer | None, seen: _Seen, worth: _Worth) -> list[Term]:
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
    alone, joined = (max(float(gains @ power), np.finfo(np.float64).tiny) for power in made)
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
    levels = max(2.0 ** (layer.weight.bits - 1) - 1, 1.0)
    classes = ends.inputs, np.ascontiguousarray(outputs).reshape(-1)
    powers_met = kernel * powers[1]
    return [Weights.of(*classes, largest, powers_met, gains.reshape(-1).copy(), levels=levels, whole=whole)]


def _codes(plan: Plan, group: tuple[Value, ...], seen: _Seen, gains: Mapping[Value, Float64]) -> Codes | None:
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


def _bounds(seen: _Seen) -> tuple[Float64, Float64]:
    """Least and largest log s of every class; both zero where it is fixed or a Clip binds."""
    streams = seen.streams
    lowest = np.where(streams.fixed, 0.0, -LARGEST_SCALE)
    highest = np.where(streams.fixed, 0.0, LARGEST_SCALE)
    for limit in streams.limits:
        classes, found = streams.of[limit.value], seen.of(limit.value)
        share = expected = np.full(classes.size, np.inf)
        if found is not None:
            share = _share(found.low, found.high, limit)
            expected = np.maximum(MARGIN * share, _share(found.lowest, found.highest, limit))
        binds = share * MARGIN >= 1
        lowest[classes[binds]] = highest[classes[binds]] = 0.0
        with np.errstate(divide="ignore"):
            np.maximum.at(lowest, classes, np.where(binds, 0.0, np.log(expected)))
    return np.minimum(lowest, 0.0), highest


def _share(lows: Float64, highs: Float64, limit: Limit) -> Float64:
    """How far each channel goes of the way to a bound that is neither zero nor infinite, (C,)."""
    ends = np.zeros(lows.size)
    for bound, reached, sign in ((limit.low, -lows, -1), (limit.high, highs, 1)):
        if bound != 0 and not math.isinf(bound):
            # a bound on the wrong side of zero always binds
            way = max(sign * bound, 0.0)
            with np.errstate(divide="ignore", invalid="ignore"):
                ends = np.maximum(ends, np.where(way > 0, reached / way, np.inf))
    return ends


# -- which scales ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """u: log s of every class. gains: group -> noise after over noise before, of the terms that it has a part in.

    whole: the same of all terms.
    """

    streams: Streams
    u: Float64
    gains: dict[int, float]
    whole: float

    @property
    def scales(self) -> Float64:
        return np.exp(self.u)


def chosen(streams: Streams, terms: Sequence[Term], lowest: Float64, highest: Float64) -> Choice:
    """The scales with the least noise; groups of classes that gain too little from theirs keep what they have."""
    u = least(terms, lowest, highest)
    touching: dict[int, list[Term]] = {}
    for term in terms:
        for group in np.unique(streams.group[term.classes()]).tolist():
            touching.setdefault(group, []).append(term)
    gains: dict[int, float] = {}
    for group, own in touching.items():
        without = np.where(streams.group == group, 0.0, u)
        before, after = total(own, without), total(own, u)
        if after < before * (1 - LEAST_GAIN):
            gains[group] = after / before
        else:
            u = without
    return Choice(streams, u, gains, total(terms, u) / max(total(terms, np.zeros_like(u)), np.finfo(np.float64).tiny))


def _told(found: Choice) -> list[Finding]:
    tensors: dict[int, list[Value]] = {}
    for value, classes in found.streams.of.items():
        tensors.setdefault(int(found.streams.group[classes[0]]), []).append(value)
    told: list[Finding] = []
    for group, ratio in found.gains.items():
        own = found.u[found.streams.group == group]
        s = np.exp(own[own != 0])
        if not s.size:
            continue
        what = (
            f"{s.size} of {own.size} channels of {len(tensors[group])} tensors scaled by {1 / s.max():.3g} to "
            f"{1 / s.min():.3g}, modelled noise {10 * math.log10(ratio):+.1f} dB"
        )
        kind = "channels of tensors scaled alike, into the weights around them"
        told.append(Change(STEP, tensors[group][0].name or "", what, kind))
    return told


def _unmoved(streams: Streams) -> dict[str, str]:
    """Groups that an operator holds in place: the name of a tensor, and why."""
    held: dict[str, str] = {}
    seen: set[int] = set()
    for value, classes in streams.of.items():
        group = int(streams.group[classes[0]])
        reason = streams.reasons.get(group, OPEN)
        if group in seen or reason == OPEN or not streams.fixed[classes].all():
            continue
        seen.add(group)
        held[value.name or ""] = reason
    return held


# -- into the weights --------------------------------------------------------------------------------------------------


def apply(model: Model, streams: Streams, scales: Float64) -> None:
    """Divide every channel by its class's scale, (classes,). Raises Refused, and does nothing, where float32 is short."""
    layers = []
    for ends in streams.layers:
        into, out = scales[ends.inputs], 1 / scales[ends.outputs]
        if np.any(into != 1) or np.any(out != 1):
            layer = scale_outputs(scale_inputs(read_layer(ends.node), into, np.zeros(1)), out, np.zeros(1))
            check_finite(layer)
            layers.append(layer)
    for layer in layers:
        write_layer(model, layer)


def _sqnr(before: Model, after: Model, feed: Feed, threads: int | None) -> float:
    """The worst output of both float networks on some pictures, in dB."""
    with save.runnable(before, ()) as first, save.runnable(after, ()) as second:
        sessions = [Session(m, name="the folded float model", threads=threads) for m in (first, second)]
    comparison = Comparison.of(sessions[0].outputs)
    for feeds in islice(feed.few(STEP), CHECKED_PICTURES):
        comparison.add(sessions[0].run_all(feeds), sessions[1].run_all(feeds))
    return min((math.inf if s.sqnr_db is None else s.sqnr_db for s in comparison.scores()), default=math.inf)
