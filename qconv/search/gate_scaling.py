"""Scales the channels of loud gates such as SiLU (`--scale-gates`), which runs in integers what else float would mend.

A gate is loud where x or its product makes LEAST_SHARE of the noise at the outputs. All loud ones are scaled
(`passes.scale_gates`), and stay so where noise on images that nothing was chosen on falls by LEAST_GAIN_DB. By the
table of costs the depthwise layer that each adds takes longer than to leave the nodes around in float, but behind dense
layers of many channels: so this is no step of a default run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from qconv.calibration.observer import (
    ChannelRanges,
    Observer,
    estimate_channel_ranges,
    observe,
    open_observed_session,
    view_channels,
)
from qconv.calibration.range_estimators import sketch_contents_for
from qconv.calibration.sketch import Sketch
from qconv.config.recipe import Recipe
from qconv.data.loader import DataLoader
from qconv.errors import Change, Finding, Skipped, format_some
from qconv.ir.layers import Float64
from qconv.ir.model import Model
from qconv.ir.rewriting import EditRefused
from qconv.passes.equalize import plan_channel_observers
from qconv.passes.scale_gates import (
    ScalableGate,
    choose_gate_scales,
    close_gates,
    find_scalable_gates,
    open_gates,
    scale_gates,
)
from qconv.passes.scale_groups import find_scale_groups
from qconv.planning.plan import Plan
from qconv.planning.planner import replan
from qconv.planning.precision_curve import TensorNoise
from qconv.search.activation_ranges import RangeSearch
from qconv.search.candidate import FoldedNetwork
from qconv.search.loudest_images import PickedImages
from qconv.search.output_noise import TINY, OutputNoise, noise_change_db
from qconv.search.precision_choice import MOST_NAMED

STEP = "gates"

LEAST_SHARE = 0.05
"""Share of all noise at the outputs from which on a tensor is loud."""

LEAST_GAIN_DB = 0.5


@dataclass(frozen=True, slots=True)
class ScaledGates:
    """folded: the network from now on, the same where nothing was done. findings: for the report."""

    folded: FoldedNetwork
    findings: list[Finding] = field(default_factory=list)


def scale_loud_gates(
    folded: FoldedNetwork,
    recipe: Recipe,
    feed: DataLoader,
    found: RangeSearch,
    images: PickedImages,
    apart: OutputNoise,
) -> ScaledGates:
    """Scale the gates that the outputs gain from.

    Args:
        folded: The float network, which stays as it is.
        recipe: How to quantize.
        feed: All images, which show the ranges of tensors that are scaled.
        found: Ranges by what the outputs lose, and the noise of tensors at the outputs.
        images: Those that show what channels do.
        apart: Measures the noise on images that ranges were not chosen on.
    """
    gates = _find_loud(folded, found.noises)
    if not gates or not apart.images.feeds:
        small = f"none that can be scaled makes {LEAST_SHARE:.0%} of the noise"
        why = small if apart.images.feeds else "too few images"
        return ScaledGates(folded, [Skipped(STEP, "all gates", why)])
    try:
        scaled, tensors = _scale(folded, recipe, feed, images, [gate.data.name or "" for gate in gates])
    except EditRefused as reason:
        return ScaledGates(folded, [Skipped(STEP, gates[0].data.name or "", str(reason))])
    ranges = {**folded.set_ranges, **found.ranges}
    others = {name: known for name, known in ranges.items() if name not in tensors}
    before, after = (
        apart.of_nearest(replace(one, set_ranges=own), recipe) for one, own in ((folded, ranges), (scaled, others))
    )
    change = noise_change_db(before, after)
    where = format_some([gate.product.name or "" for gate in gates], MOST_NAMED)
    if not -change >= LEAST_GAIN_DB:
        return ScaledGates(folded, [Skipped(STEP, where, f"channels scaled change the noise by {change:+.1f} dB")])
    what = f"channels scaled, a depthwise layer in front: noise at the outputs {change:+.1f} dB"
    return ScaledGates(scaled, [Change(STEP, where, what, "gates with scaled channels")])


def _find_loud(folded: FoldedNetwork, noises: Sequence[TensorNoise]) -> list[ScalableGate]:
    """The loud gates, in graph order."""
    least = LEAST_SHARE * sum(own.noise for own in noises)
    loud = {value for own in noises if own.noise >= max(least, TINY) for value in own.members}
    gates = find_scalable_gates(folded.model)
    return [gate for gate in gates if not loud.isdisjoint((gate.data, gate.product.outputs[0]))]


def _scale(
    folded: FoldedNetwork, recipe: Recipe, feed: DataLoader, images: PickedImages, names: Sequence[str]
) -> tuple[FoldedNetwork, Mapping[str, Float64]]:
    """The network with these gates scaled, without set ranges of what that changes.

    Returns log s of all tensors that are others now, by name, too. Raises EditRefused where that cannot be.
    """
    model = folded.model.copy()
    opened = open_gates(model, names)
    plan = replan(folded.plan, model)
    scales = choose_gate_scales(model, plan, opened, _watch_channels(model, plan, recipe, images))
    moved = scale_gates(model, opened, scales)
    close_gates(model, opened)
    plan = replan(plan, model)
    sketches = {name: known for name, known in folded.sketches.items() if name not in moved}
    sketches |= _observe_others(model, plan, recipe, feed, sketches)
    ranges = {name: known for name, known in folded.set_ranges.items() if name not in moved}
    return FoldedNetwork(model, plan, sketches, ranges), moved


def _watch_channels(model: Model, plan: Plan, recipe: Recipe, images: PickedImages) -> dict[str, ChannelRanges]:
    observers = plan_channel_observers(plan, find_scale_groups(model), set())
    session = open_observed_session(model, observers, recipe.threads)
    return estimate_channel_ranges(view_channels(session, observers, images.feeds))


def _observe_others(
    model: Model, plan: Plan, recipe: Recipe, feed: DataLoader, known: Mapping[str, Sketch]
) -> dict[str, Sketch]:
    """Sketches of all tensors that a plan wants watched and of which none are known."""
    want = sketch_contents_for(recipe)
    plans = [plan, replan(plan, model, floats={})] if recipe.searches else [plan]
    every: Iterable[Observer] = (
        one
        for own in plans
        for one in (*own.observers(want), *(own.float_observers() if recipe.measures_means else ()))
    )
    found: dict[str, Observer] = {}
    for one in every:
        if one.name not in known:
            found[one.name] = replace(one, want=one.want | found.get(one.name, one).want)
    observers = list(found.values())
    return observe(open_observed_session(model, observers, recipe.threads), observers, feed.iter_batches("calibrate"))
