"""This pass equalizes channel ranges across layers: it scales channels and absorbs high biases (`absorb_biases`).

Scaling (cross-layer equalization): `scale_groups` finds what can be scaled, `noise_model` the scales with the least
quantization noise; they go into the weights. Channels very far apart are brought near before (`balance`). A channel of
a Clip is scaled only while it keeps away from the bounds by CLIP_MARGIN on all images, and is not scaled up further
than it may reach on others: an image beyond that would be clipped earlier than before. The float networks before and
after are compared; where their outputs differ, nothing is changed.

Source: Nagel et al. 2019, arXiv 1906.04721, section 4.1, which makes the ranges of both weights equal; here with
activation noise, and one scale a channel of a whole residual stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.calibration.observer import (
    ChannelRanges,
    Observer,
    estimate_channel_ranges,
    open_observed_session,
    view_channels,
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
from qconv.ir.metadata import forget_equalization, round_log_scale, write_equalization
from qconv.ir.model import Model, Value, constant_array
from qconv.ir.rewriting import EditRefused, describe_node
from qconv.metrics.comparison import ComparisonAccumulator
from qconv.metrics.network_outputs import NetworkOutputs
from qconv.passes.absorb_biases import (
    STEP,
    AbsorptionCandidate,
    absorb_biases,
    find_absorption_candidates,
    select_gaining,
)
from qconv.passes.balance import find_far_channels
from qconv.passes.merge_layers import share_equal_weights
from qconv.passes.noise_descent import EVALUATIONS, ORDERS, minimize_noise
from qconv.passes.noise_model import (
    MOST_WEIGHTS,
    ChannelObservations,
    NoiseTerm,
    collect_noise_terms,
    total_noise,
)
from qconv.passes.scale_groups import (
    NETWORK_BOUNDARY,
    ClipLimit,
    ConstantScaleGroups,
    ScaleGroups,
    find_scale_groups,
)
from qconv.planning.plan import Plan, plan_observer
from qconv.planning.work import (
    EQUALIZATION_SHARE,
    STEP_WORK,
    count_kernel,
    count_weights,
    largest_within,
    quantization_work,
)
from qconv.runtime.session import Session

CLIP_MARGIN = 1.1

LARGEST_LOG_SCALE = math.log(100.0)

LEAST_NOISE_GAIN = 0.02
"""Share of the noise that a component's scales must remove: the noise model is no more accurate than that."""

EXACT_DB, NEAR_DB = 60.0, 20.0
"""Least SQNR of the float outputs after against before: with images, and with BatchNorm statistics alone."""

CHECKED_IMAGES = 8


Watch = Callable[[Sequence[Observer]], dict[str, ChannelRanges]]
"""Returns channel ranges by tensor."""


def equalize_channels(
    model: Model, plan: Plan, feed: DataLoader, most: int | None, threads: int | None
) -> list[Finding]:
    """Equalize the channels of a folded model, and absorb biases, for quantization by `plan`.

    most: batches that are looked at; None for all.
    The model computes what it did, up to rounding. Where its outputs would move more, nothing is done.
    """
    run = _Equalization.of(model, plan, feed, threads, EXACT_DB)
    observers = plan_channel_observers(plan, run.groups, {candidate.result for candidate in run.candidates})

    def watch(seen: Sequence[Observer], batches: int | None = most) -> dict[str, ChannelRanges]:
        session = open_observed_session(model, seen, threads)
        return estimate_channel_ranges(view_channels(session, seen, islice(feed.iter_batches(STEP), batches)))

    if most is None:
        return run.equalize(observers, watch)
    return run.equalize(
        observers, watch, lambda seen: watch(seen, None), lambda: _bound_descent(plan, run.groups, feed)
    )


def equalize_without_data(
    model: Model, plan: Plan, watched: Watch, feed: DataLoader, threads: int | None
) -> list[Finding]:
    """Equalize the channels of a folded model without images; see `equalize_channels`.

    watched: returns channel ranges by tensor, from BatchNorm statistics. feed: generated images, on which the outputs
    may differ a little: a value that is hardly ever reached counts as never reached.
    """
    run = _Equalization.of(model, plan, feed, threads, NEAR_DB)
    observers = plan_channel_observers(plan, run.groups, set())
    if observers:
        observers += [Observer(candidate.result.name or "") for candidate in run.candidates]
    return run.equalize(observers, watched)


@dataclass(frozen=True, slots=True, eq=False)
class _Equalization:
    """A network whose channels are equalized.

    feed: the images on which its float outputs are compared. least_db: SQNR that they must keep for what is done.
    """

    model: Model
    plan: Plan
    groups: ScaleGroups
    candidates: list[AbsorptionCandidate]
    feed: DataLoader
    threads: int | None
    least_db: float

    @classmethod
    def of(cls, model: Model, plan: Plan, feed: DataLoader, threads: int | None, least_db: float) -> _Equalization:
        """What there is to equalize. What the model told of channels before is forgotten."""
        forget_equalization(model.inner.metadata_props)
        candidates = find_absorption_candidates(model)
        return cls(model, plan, find_scale_groups(model), candidates, feed, threads, least_db)

    def equalize(
        self,
        observers: Sequence[Observer],
        watch: Watch,
        watch_all: Watch | None = None,
        bound: Callable[[], tuple[int, list[Finding]]] = lambda: (MOST_WEIGHTS, []),
    ) -> list[Finding]:
        """Bring near, lower and scale channels, in this order.

        watch_all: the same on all images, where `watch` looks at some; what is lowered must be high on all. bound: the
        most weights of a layer that count, and what there is to say about it.
        """
        left = [Skipped(STEP, where, why) for where, why in _explain_fixed_components(self.groups).items()]
        if not observers or (bool(self.groups.fixed.all()) and not self.candidates):
            return list(left)
        channels = watch(observers)
        balanced, moved = self._balance(ChannelObservations(self.groups, channels))
        if moved:
            channels = watch(observers)
        high = select_gaining(self.candidates, channels)
        if high and watch_all is not None:
            names = {candidate.result.name for candidate in high}
            on_all = watch_all([observer for observer in observers if observer.name in names])
            channels |= {name: replace(channels[name], floor=found.floor) for name, found in on_all.items()}
        lowered = self._absorb(high, channels)
        most, told = bound()
        scaled = self._scale_by_noise(ChannelObservations(self.groups, channels), most)
        return [*balanced, *lowered, *scaled, *told, *left]

    def _balance(self, seen: ChannelObservations) -> tuple[list[Finding], bool]:
        """Bring channels near that are far from the others. Returns whether any were."""
        found = find_far_channels(seen)
        u = found.within(*log_scale_bounds(seen, math.inf))
        refused = self._scale(u) if u.any() else None
        if refused is not None:
            return [refused], False
        return [*found.moved(u), *found.left(u)], bool(u.any())

    def _absorb(self, high: Sequence[AbsorptionCandidate], channels: dict[str, ChannelRanges]) -> list[Finding]:
        """Absorb biases, unless float outputs would differ. channels: updated in place."""
        if not select_gaining(high, channels):
            return []
        trial_model, names = self.model.copy(), {candidate.result.name for candidate in high}
        absorb_biases(
            trial_model,
            [candidate for candidate in find_absorption_candidates(trial_model) if candidate.result.name in names],
            dict(channels),
        )
        refused = self._compare(trial_model, "lowered")
        return list(absorb_biases(self.model, high, channels)) if refused is None else [refused]

    def _scale_by_noise(self, seen: ChannelObservations, most: int) -> list[Finding]:
        """Scale channels for the least noise. most: weights of a layer that count."""
        terms = collect_noise_terms(self.model, self.plan, seen, most)
        found = choose_scales(self.groups, terms, *log_scale_bounds(seen))
        found = replace(found, u=round_log_scale(found.u))
        if not found.u.any():
            return []
        refused = self._scale(found.u)
        return _report_scaling(found) if refused is None else [refused]

    def _scale(self, u: Float64) -> Skipped | None:
        """Scale channels by log s of every class, and record it.

        Returns why not, and changes nothing, where float outputs would differ.
        """
        scales = np.exp(u)
        try:
            trial_model = self.model.copy()
            apply_scales(trial_model, find_scale_groups(trial_model), scales)
        except EditRefused as reason:
            return Skipped(STEP, "the network", str(reason))
        refused = self._compare(trial_model, "scaled")
        if refused is not None:
            return refused
        apply_scales(self.model, self.groups, scales)
        told = {value.name or "": u[classes] for value, classes in self.groups.of.items()}
        write_equalization(self.model.inner.metadata_props, told, {})
        return None

    def _compare(self, trial_model: Model, done: str) -> Skipped | None:
        """Why a trial may not be done in earnest, where its float outputs differ."""
        moved = _output_sqnr(self.model, trial_model, self.feed, self.threads)
        if moved < self.least_db:
            return Skipped(STEP, "the network", f"{done} channels moved the float outputs to {moved:.1f} dB")
        return None


def _bound_descent(plan: Plan, groups: ScaleGroups, feed: DataLoader) -> tuple[int, list[Finding]]:
    """The most weights of a layer that count, so that the descent stays within its share of the work; and what for."""
    fixed = {ends.node: bool(groups.fixed[ends.inputs].all()) for ends in groups.layers}
    sizes = {
        layer.node: count_weights(layer.node) // count_kernel(layer.node)
        for layer in plan.layers
        if not fixed.get(layer.node, True)
    }
    work = quantization_work((layer.node for layer in plan.layers), len(feed.listing.paths))
    budget = EQUALIZATION_SHARE * work / (STEP_WORK * EVALUATIONS * len(ORDERS))
    most = min(MOST_WEIGHTS, largest_within([min(size, MOST_WEIGHTS) for size in sizes.values()], budget))
    cut = [node.name or "" for node, size in sizes.items() if most < min(size, MOST_WEIGHTS)]
    if not cut:
        return MOST_WEIGHTS, []
    why = f"some outputs of {len(cut)} layers stood for all of them when scales were chosen, or it would take too long"
    return most, [Skipped(STEP, cut[0], why)]


def plan_channel_observers(plan: Plan, groups: ScaleGroups, low: Set[Value]) -> list[Observer]:
    """Observers of all quantized tensors and of the inputs of quantized layers. low: with minima as well."""
    read = dict.fromkeys(value for layer in plan.layers if (value := layer.node.inputs[0]) is not None)
    seen = dict.fromkeys(value for value in plan.activations if value in groups.of and not plan.copies(value))
    seen |= dict.fromkeys(limit.value for limit in groups.limits)
    want = SketchContents.CHANNELS | SketchContents.COLUMNS
    observers = {value: plan_observer(value, want) for value in {**seen, **read}}
    return [Observer(one.name, one.want) if value in low else one for value, one in observers.items()]


def log_scale_bounds(seen: ChannelObservations, largest: float = LARGEST_LOG_SCALE) -> tuple[Float64, Float64]:
    """Least and largest log s of every class; both zero where it is fixed or a Clip binds."""
    groups = seen.groups
    lowest = np.where(groups.fixed, 0.0, -largest)
    highest = np.where(groups.fixed, 0.0, largest)
    for limit in groups.limits:
        classes, found = groups.of[limit.value], seen.of(limit.value)
        share = expected = np.full(classes.size, np.inf)
        if found is not None:
            share = _share_of_bounds(found.low, found.high, limit)
            expected = np.maximum(CLIP_MARGIN * share, _share_of_bounds(found.lowest, found.highest, limit))
        binds = share * CLIP_MARGIN >= 1
        lowest[classes[binds]] = highest[classes[binds]] = 0.0
        with np.errstate(divide="ignore"):
            np.maximum.at(lowest, classes, np.where(binds, 0.0, np.log(expected)))
    return np.minimum(lowest, 0.0), highest


def _share_of_bounds(lows: Float64, highs: Float64, limit: ClipLimit) -> Float64:
    """The share of the way to a bound that each channel goes, (C,); bounds of zero and infinity do not count."""
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
class ChosenScales:
    """The chosen scales.

    u: log s of every class.
    gains: component -> noise after over noise before, of the terms that depend on the component.
    whole: noise after over noise before, of all terms.
    """

    groups: ScaleGroups
    u: Float64
    gains: dict[int, float]
    whole: float


def choose_scales(groups: ScaleGroups, terms: Sequence[NoiseTerm], lowest: Float64, highest: Float64) -> ChosenScales:
    """The scales with the least noise. Components that gain too little keep a scale of 1."""
    u = minimize_noise(terms, lowest, highest)
    # every input of a layer behind an operator that stops scales is a component: none of these has anything to undo
    moved = np.unique(groups.component[u != 0])
    touching: dict[int, list[NoiseTerm]] = {}
    for term in terms:
        for component in np.intersect1d(groups.component[term.classes()], moved).tolist():
            touching.setdefault(component, []).append(term)
    gains: dict[int, float] = {}
    for component, own in touching.items():
        without = np.where(groups.component == component, 0.0, u)
        before, after = total_noise(own, without), total_noise(own, u)
        if after < before * (1 - LEAST_NOISE_GAIN):
            gains[component] = after / before
        else:
            u = without
    return ChosenScales(
        groups, u, gains, total_noise(terms, u) / max(total_noise(terms, np.zeros_like(u)), np.finfo(np.float64).tiny)
    )


def _report_scaling(found: ChosenScales) -> list[Finding]:
    tensors: dict[int, list[Value]] = {}
    for value, classes in found.groups.with_channels():
        tensors.setdefault(int(found.groups.component[classes[0]]), []).append(value)
    findings: list[Finding] = []
    for component, ratio in found.gains.items():
        own = found.u[found.groups.component == component]
        s = np.exp(own[own != 0])
        if not s.size:
            continue
        what = (
            f"{s.size} of {own.size} channels of {len(tensors[component])} tensors scaled by {1 / s.max():.3g} to "
            f"{1 / s.min():.3g}, modelled noise {10 * math.log10(ratio):+.1f} dB"
        )
        kind = "channels of tensors scaled alike, into the weights around them"
        findings.append(Change(STEP, tensors[component][0].name or "", what, kind))
    return findings


def _explain_fixed_components(groups: ScaleGroups) -> dict[str, str]:
    """Components whose scale an operator fixes: the name of a tensor, and why."""
    held: dict[str, str] = {}
    seen: set[int] = set()
    for value, classes in groups.with_channels():
        component = int(groups.component[classes[0]])
        reason = groups.reasons.get(component, NETWORK_BOUNDARY)
        if component in seen or reason == NETWORK_BOUNDARY or not groups.fixed[classes].all():
            continue
        seen.add(component)
        held[value.name or ""] = reason
    return held


# -- into the weights --------------------------------------------------------------------------------------------------


def apply_scales(model: Model, groups: ScaleGroups, scales: Float64) -> None:
    """Divide every channel by its class's scale, (classes,).

    Raises EditRefused, and changes nothing, where the weights would overflow float32.
    """
    layers = []
    for ends in groups.layers:
        into, out = scales[ends.inputs], 1 / scales[ends.outputs]
        if np.any(into != 1) or np.any(out != 1):
            layer = scale_outputs(scale_inputs(read_layer(ends.node), into, np.zeros(1)), out, np.zeros(1))
            check_finite(layer)
            layers.append(layer)
    constants = [(found, _divided(found, scales)) for found in groups.constants if np.any(scales[found.classes] != 1)]
    for layer in layers:
        write_layer(model, layer)
    for found, numbers in constants:
        name = found.node.inputs[found.index]
        model.set_input(found.node, found.index, model.constant(f"{name.name if name else ''}_scaled", numbers))
    written = {ends.node.outputs[0] for ends in groups.layers}
    for value, classes in groups.of.items():
        if value not in written:
            transform_channel_stats(value, 1 / scales[classes], np.zeros(1))
    share_equal_weights(model)


def _divided(found: ConstantScaleGroups, scales: Float64) -> NDArray[np.floating[Any]]:
    """A constant with its channels divided. Raises EditRefused where float32 does not have the numbers."""
    numbers = constant_array(found.node.inputs[found.index])
    assert numbers is not None
    by = scales[found.classes].reshape(1, -1, *(1,) * (numbers.ndim - 2))
    with np.errstate(over="ignore"):
        divided = (numbers.astype(np.float64) / by).astype(numbers.dtype)
    if not np.isfinite(divided).all():
        raise EditRefused(f"a constant of {describe_node(found.node)} would get numbers that float32 does not have")
    return np.asarray(divided)


def _output_sqnr(before: Model, after: Model, feed: DataLoader, threads: int | None) -> float:
    """The least SQNR over the outputs of two float networks on some images, in dB."""
    with subgraph.runnable_with_outputs(before, ()) as first, subgraph.runnable_with_outputs(after, ()) as second:
        sessions = [Session(m, name="the folded float model", threads=threads) for m in (first, second)]
    comparison = ComparisonAccumulator.of(NetworkOutputs(sessions[0].model_outputs))
    for feeds in islice(feed.iter_cached(STEP), CHECKED_IMAGES):
        comparison.add(sessions[0].run_all(feeds), sessions[1].run_all(feeds))
    return min((math.inf if s.sqnr_db is None else s.sqnr_db for s in comparison.scores()), default=math.inf)
