"""Scales of channels are moved between layers where quantization gains from it: over pairs of layers and whole streams.

streams.py finds what can be scaled, reach.py how large channels are, worth.py and noise.py what rounding them costs;
here the scales are chosen and go into the weights.

A channel of a Clip is scaled only if its values keep away from the bounds on all pictures by the factor MARGIN, and it
is not scaled up further than it may reach on others: a picture beyond that would be cut off earlier than before.

The networks before and after are run on some pictures: where their outputs differ, nothing is done. Channels that are
to give up what all their values have in common (absorb.py) are watched on all pictures.

Source: Nagel et al. 2019, arXiv 1906.04721, section 4.1, which makes the ranges of both weights equal; here the noise
of activations counts as well, and streams have one scale a channel however many layers write and read them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from qconv.calibration.observer import (
    ChannelRanges,
    Observer,
    estimate_channel_ranges,
    observe_each_image,
    open_observed_session,
)
from qconv.calibration.sketch import SketchContents
from qconv.data.loader import DataLoader
from qconv.errors import Change, Finding, Skipped
from qconv.ir import subgraph
from qconv.ir.layers import (
    Float64,
    check_finite,
    read_layer,
    scale_inputs,
    scale_outputs,
    transform_channel_stats,
    write_layer,
)
from qconv.ir.metadata import round_log_scale, write_equalization
from qconv.ir.model import Model, Value
from qconv.ir.rewriting import EditRefused
from qconv.metrics.comparison import ComparisonAccumulator
from qconv.passes.absorb import Candidate, absorb, candidates, gaining
from qconv.passes.noise import Term, least, total
from qconv.passes.streams import OPEN, Limit, Streams, find_streams
from qconv.passes.worth import Seen, noise_terms
from qconv.planning.plan import Plan, plan_observer
from qconv.runtime.session import Session

STEP = "equalize"
MARGIN = 1.1
LARGEST_SCALE = math.log(100.0)
LEAST_GAIN = 0.02
"""Share of the noise that a group's scales must take away: the model of the noise is no better than that."""
EXACT_DB, NEAR_DB = 60.0, 20.0
"""How near the float outputs must stay: where pictures tell what is out of reach, and where statistics do."""
CHECKED_PICTURES = 8


def balance(model: Model, plan: Plan, feed: DataLoader, most: int | None, threads: int | None) -> list[Finding]:
    """Scale the channels of a folded model's tensors as its quantization by `plan` gains most.

    most: batches that are looked at; None for all.
    The model computes what it did, up to rounding. Where its outputs would move more, nothing is done.
    """
    streams = find_streams(model)
    left = [Skipped(STEP, where, why) for where, why in _unmoved(streams).items()]
    could = candidates(model)
    taps = _taps(plan, streams, {candidate.result for candidate in could})
    if not taps or (bool(streams.fixed.all()) and not could):
        return list(left)
    channels = estimate_channel_ranges(
        observe_each_image(open_observed_session(model, taps, threads), taps, islice(feed.all(STEP), most))
    )
    high = gaining(could, channels)
    if high and most is not None:
        names = {candidate.result.name for candidate in high}
        again = [tap for tap in taps if tap.name in names]
        on_all = estimate_channel_ranges(
            observe_each_image(open_observed_session(model, again, threads), again, feed.all(STEP))
        )
        channels |= {name: replace(channels[name], floor=found.floor) for name, found in on_all.items()}
    lowered = _lowered(model, high, channels, feed, threads, EXACT_DB)
    return [*lowered, *_scaled(model, plan, Seen(streams, channels), feed, threads, EXACT_DB), *left]


def balance_unseen(
    model: Model,
    plan: Plan,
    watched: Callable[[Sequence[Observer]], dict[str, ChannelRanges]],
    feed: DataLoader,
    threads: int | None,
) -> list[Finding]:
    """The same without pictures.

    watched: what is known of tensors, by their names. feed: made-up pictures, on which the outputs may move a little:
    what hardly any value reaches counts as never reached.
    """
    streams = find_streams(model)
    left = [Skipped(STEP, where, why) for where, why in _unmoved(streams).items()]
    could = candidates(model)
    taps = _taps(plan, streams, set())
    if not taps or (bool(streams.fixed.all()) and not could):
        return list(left)
    channels = watched([*taps, *(Observer(candidate.result.name or "") for candidate in could)])
    lowered = _lowered(model, gaining(could, channels), channels, feed, threads, NEAR_DB)
    return [*lowered, *_scaled(model, plan, Seen(streams, channels), feed, threads, NEAR_DB), *left]


def _lowered(
    model: Model,
    high: Sequence[Candidate],
    channels: dict[str, ChannelRanges],
    feed: DataLoader,
    threads: int | None,
    least_db: float,
) -> list[Finding]:
    """High channels lowered; `channels` are brought up to date."""
    if not gaining(high, channels):
        return []
    tried, names = model.copy(), {candidate.result.name for candidate in high}
    absorb(tried, [candidate for candidate in candidates(tried) if candidate.result.name in names], dict(channels))
    moved = _sqnr(model, tried, feed, threads)
    if moved < least_db:
        return [Skipped(STEP, "the network", f"lowered channels moved the float outputs to {moved:.1f} dB")]
    return list(absorb(model, high, channels))


def _scaled(
    model: Model, plan: Plan, seen: Seen, feed: DataLoader, threads: int | None, least_db: float
) -> list[Finding]:
    streams = seen.streams
    terms = noise_terms(model, plan, seen)
    found = chosen(streams, terms, *_bounds(seen))
    found = replace(found, u=round_log_scale(found.u))
    if not found.u.any():
        return []
    try:
        tried = model.copy()
        apply(tried, find_streams(tried), found.scales)
    except EditRefused as reason:
        return [Skipped(STEP, "the network", str(reason))]
    moved = _sqnr(model, tried, feed, threads)
    if moved < least_db:
        return [Skipped(STEP, "the network", f"scaled channels moved the float outputs to {moved:.1f} dB")]
    apply(model, streams, found.scales)
    scales = {value.name or "": found.u[classes] for value, classes in streams.of.items()}
    write_equalization(model.inner.metadata_props, scales, {})
    return _told(found)


def _taps(plan: Plan, streams: Streams, low: Set[Value]) -> list[Observer]:
    """All that is quantized, and what the layers read whose weights are. low: tensors whose minima count as well."""
    read = dict.fromkeys(value for layer in plan.layers if (value := layer.node.inputs[0]) is not None)
    seen = dict.fromkeys(value for value in plan.activations if value in streams.of and not plan.copies(value))
    seen |= dict.fromkeys(limit.value for limit in streams.limits)
    taps = {value: plan_observer(value, SketchContents.CHANNELS | SketchContents.COLUMNS) for value in {**seen, **read}}
    return [Observer(tap.name, tap.want) if value in low else tap for value, tap in taps.items()]


def _bounds(seen: Seen) -> tuple[Float64, Float64]:
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
        """What channels are divided by, (classes,)."""
        return np.asarray(np.exp(self.u))


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
    """Divide every channel by its class's scale, (classes,).

    Raises Refused, and does nothing, where float32 has no such numbers.
    """
    layers = []
    for ends in streams.layers:
        into, out = scales[ends.inputs], 1 / scales[ends.outputs]
        if np.any(into != 1) or np.any(out != 1):
            layer = scale_outputs(scale_inputs(read_layer(ends.node), into, np.zeros(1)), out, np.zeros(1))
            check_finite(layer)
            layers.append(layer)
    for layer in layers:
        write_layer(model, layer)
    written = {ends.node.outputs[0] for ends in streams.layers}
    for value, classes in streams.of.items():
        if value not in written:
            transform_channel_stats(value, 1 / scales[classes], np.zeros(1))


def _sqnr(before: Model, after: Model, feed: DataLoader, threads: int | None) -> float:
    """The worst output of both float networks on some pictures, in dB."""
    with subgraph.runnable_with_outputs(before, ()) as first, subgraph.runnable_with_outputs(after, ()) as second:
        sessions = [Session(m, name="the folded float model", threads=threads) for m in (first, second)]
    comparison = ComparisonAccumulator.of(sessions[0].outputs)
    for feeds in islice(feed.few(STEP), CHECKED_PICTURES):
        comparison.add(sessions[0].run_all(feeds), sessions[1].run_all(feeds))
    return min((math.inf if s.sqnr_db is None else s.sqnr_db for s in comparison.scores()), default=math.inf)
