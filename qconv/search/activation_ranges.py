"""Searches the ranges of activations by the noise at the network's outputs, measured on images.

A tensor may reach far on a few places of a few images without any effect behind it: a ReLU6 has no use for more than
6. Neither the error of the tensor shows this, nor that of the layer that reads it. So each group of tensors that share
a range is rounded alone, in the float network, and the rest of the network is run:

    noise(t) = sum over outputs of |y(t) - y|^2 / |y|^2          range(t) = [max(low, -t), min(high, t)]

low, high: the tensor's own ends. An end that is near zero stays where it is while the other moves in: the -0.28 of a
SiLU are needed however far it reaches above.
Rounding errors of different tensors hardly correlate, so that their noises add up and each range can be chosen by
itself. The network is walked once to see which ranges matter, and once more to choose these. A narrower range hurts on
the few images that reach beyond it: these are all tried, and some of the others stand for the rest.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.calibration.range_estimators import Range
from qconv.errors import Change, Finding, Skipped
from qconv.ir.judged_tensors import find_judged_tensors
from qconv.ir.model import Model, Value
from qconv.ir.stepwise import NetworkTail, StepwiseRun
from qconv.metrics.output_parts import NO_PARTS, PartCounts, Parts, measure_output_noise
from qconv.planning.plan import Plan
from qconv.planning.precision_curve import TensorNoise
from qconv.planning.work import RANGES_SHARE, SESSION_WORK, count_weights, multiplications, quantization_work
from qconv.quantizer import QuantParams
from qconv.reporter import Reporter
from qconv.search.loudest_images import PickedImages, pick_batches
from qconv.search.output_noise import TINY, noise_change_db
from qconv.storage import ArrayStore

STEP = "ranges"
BYTES_IN_MEMORY = 2**27
"""Bytes of tensors that are held in memory."""
LEAST_NOISE_SHARE = 0.04
"""Share of all noise from which on a range is searched."""
LEAST_GAIN = 0.02
"""Share of all noise that a range must spare to be taken: on other images, less may be none."""
GROUPS_PER_SESSION = 8
"""Groups that share a session: to make one takes as long as to run it on a few images."""
HALF, PATIENCE = 0.5, 2
"""First steps of the search, and how many of them may be no better in a row: noise does not fall evenly."""
MOST_RISE = 2.0
"""Noise over that of the range as it is at which no narrower one is tried."""
NARROWER, WIDER = 0.75, 1.25
"""Steps of the search around the best of these."""
USUAL_TRIALS = 4
"""Factors that are tried of a range."""
LARGEST_STEP_RATIO = 0.98
"""Largest ratio of noise after a step to noise before it for another step to be tried."""


FEW_NUMBERS_IMAGES, FEW_NUMBERS_NEAR = 4, 16
"""Least of `SearchBudget.few` and `near` where outputs are few numbers."""


@dataclass(frozen=True, slots=True)
class SearchBudget:
    """How many images a search takes.

    few: images that show which ranges matter.
    many: images that are walked to choose these ranges. loud: of them, with the largest outputs.
    apart: set apart before, to measure divisions on that the others have led to.
    far, loudest, near: images that each factor is tried on: those where the tensor reaches farthest, those with the
    largest outputs, and others.
    share: of the work of quantizing (`planning.work`) that each of both walks may take; None for any.
    """

    few: int
    many: int
    loud: int
    apart: int
    far: int
    loudest: int
    near: int
    share: float | None = RANGES_SHARE

    def of_few_numbers(self) -> SearchBudget:
        """The budget where outputs are so few numbers that what one image tells is chance."""
        return replace(self, few=max(self.few, FEW_NUMBERS_IMAGES), near=max(self.near, FEW_NUMBERS_NEAR))


SEARCH_BUDGETS = {
    "fast": SearchBudget(1, 32, 8, 16, 2, 2, 2),  # chosen with --tune-ranges
    "balanced": SearchBudget(1, 32, 8, 16, 2, 2, 2),
    "best": SearchBudget(4, 128, 32, 32, 16, 16, 16, None),
}

Float64 = NDArray[np.float64]
InputBatch = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class RangeGroup:
    """Tensors that share a range. first: the first of them in graph order."""

    first: Value
    members: tuple[Value, ...]
    params: QuantParams

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors, which they keep in copies of the network."""
        return tuple(_names_of(self.members))

    @property
    def key(self) -> Hashable:
        """What its noise depends on, in a given network on given images."""
        return self.names, self.params.spec, self.params.scale.tobytes(), self.params.zero_point.tobytes()


@dataclass(frozen=True, slots=True)
class RangeSearch:
    """What a search has found.

    ranges: by the names of tensors, where others are better. noises: at the outputs, with these ranges, of all tensors
    that were looked at. findings: for the report.
    """

    ranges: dict[str, Range]
    noises: tuple[TensorNoise, ...]
    findings: list[Finding]


@dataclass(slots=True)
class SearchMemory:
    """What searches of one float network on the same images have measured, by group.

    noises: at the outputs, with the scale that the group had then, by its tensors. found: what came of trials, by
    tensors and parameters.
    """

    noises: dict[tuple[str, ...], tuple[float, float]] = field(default_factory=dict)
    found: dict[Hashable, FoundRange] = field(default_factory=dict)

    def noise(self, group: RangeGroup) -> float:
        """The noise of a group that was measured; with another scale than then it goes with the square of that.

        What a range cuts off is no part of this: it only tells which ranges are worth a search.
        """
        noise, scale = self.noises[group.names]
        return float(noise * (float(group.params.scale) / scale) ** 2)


@dataclass(frozen=True, slots=True)
class FoundRange:
    """What was found for a group. ranges: to be set, and as the file gets it; None where it stays as it is."""

    ranges: tuple[Range, Range] | None
    change_db: float


def search_activation_ranges(
    model: Model,
    plan: Plan,
    activations: Mapping[Value, QuantParams],
    images: PickedImages,
    budget: SearchBudget,
    threads: int | None,
    reporter: Reporter,
    parts: Parts = NO_PARTS,
    memory: SearchMemory | None = None,
) -> RangeSearch:
    """Search a better range for every one that the outputs gain from, by the names of the tensors that share it.

    model: the folded float network. activations: parameters so far. images: to measure on, with what the float network
    says of each. parts: of outputs. memory: of searches before, so that nothing is measured twice.
    """
    feeds, memory = images.feeds, memory or SearchMemory()
    groups = _find_range_groups(model, plan, activations) if find_judged_tensors(model) else []
    told: list[Finding] = []
    most = _most_groups(plan, feeds, budget.share, budget.few)
    if most < len(groups):
        why = f"{len(groups) - most} of {len(groups)} ranges were not looked at, or it would take too long"
        told.append(Skipped(STEP, groups[0].first.name or "", why))
        groups = [groups[index * len(groups) // most] for index in range(most)]
    unknown = [group for group in groups if group.names not in memory.noises]
    for done, found in enumerate(_measure_noises(model, unknown, images, budget.few, threads, parts)):
        reporter.progress(STEP, done, 2 * len(groups))
        memory.noises[unknown[done].names] = found, float(unknown[done].params.scale)
    noises = [memory.noise(group) for group in groups]
    whole = sum(noises)
    weighty = {
        group.first: noise for group, noise in zip(groups, noises, strict=True) if noise > LEAST_NOISE_SHARE * whole
    }
    most = _most_groups(plan, feeds, budget.share, USUAL_TRIALS * (budget.far + budget.loudest + budget.near))
    loudest = set(sorted(weighty, key=weighty.__getitem__, reverse=True)[:most])
    chosen = [group for group in groups if group.first in loudest]
    unknown = [group for group in chosen if group.key not in memory.found]
    for done, trial in enumerate(_make_trials(model, plan, unknown, images, budget, threads, parts)):
        reporter.progress(STEP, len(groups) + done * len(groups) // len(unknown), 2 * len(groups))
        memory.found[trial.group.key] = _search_range(trial)
    ranges: dict[str, Range] = {}
    left = dict(zip((group.first for group in groups), noises, strict=True))
    for group in chosen:
        best = memory.found.get(group.key)
        if best is None or best.ranges is None:
            continue
        share = weighty[group.first] / whole
        if share * (1 - 10 ** (best.change_db / 10)) >= LEAST_GAIN:
            left[group.first] *= 10 ** (best.change_db / 10)
            ranges |= {value.name or "": best.ranges[0] for value in group.members}
            told.append(_tell(group, best.ranges[1], share, best.change_db))
    reporter.progress(STEP, 2 * len(groups), 2 * len(groups))
    return RangeSearch(ranges, tuple(TensorNoise(g.members, left[g.first]) for g in groups), told)


def _tell(group: RangeGroup, written: Range, share: float, change_db: float) -> Change:
    """The finding for the report. written: the range as the file gets it. share: of all noise."""
    before, after = (f"{float(end):.3g}" for end in group.params.code_range())
    what = f"range {written[0]:.3g} to {written[1]:.3g} in place of {before} to {after}: its noise at the outputs"
    told = f"{what} {share:.1%} of all, {change_db:+.1f} dB"
    return Change(STEP, group.first.name or "", told, "range set by the outputs")


def _most_groups(plan: Plan, feeds: Sequence[InputBatch], share: float | None, runs: int) -> int:
    """How many groups can be walked through, with so many runs of one image each: half the network lies behind one.

    share: of the work of a static quantization with the images of `feeds`; None for as much as it takes.
    """
    if share is None:
        return sys.maxsize
    images = sum(max((len(x) for x in feed.values() if x.ndim), default=1) for feed in feeds)
    nodes = [layer.node for layer in plan.layers]
    one = runs * multiplications(nodes) + SESSION_WORK * sum(map(count_weights, nodes)) / GROUPS_PER_SESSION
    return max(1, int(share * quantization_work(nodes, images) / max(1.0, one / 2)))


def _find_range_groups(model: Model, plan: Plan, activations: Mapping[Value, QuantParams]) -> list[RangeGroup]:
    """The groups with one scale and up to 8 bits, in graph order: 16 bits have room for everything."""
    made = [*model.graph.inputs, *(value for node in model.nodes() for value in node.outputs)]
    order = {value: index for index, value in enumerate(made)}
    found: dict[Value, RangeGroup] = {}
    for value, members in plan.group_of().items():
        params = activations[value]
        known = tuple(sorted((member for member in members if member in order), key=order.__getitem__))
        if known and value not in plan.given and not params.scale.ndim and params.spec.bits <= 8:
            found[known[0]] = RangeGroup(known[0], known, params)
    return sorted(found.values(), key=lambda group: order[group.first])


def _measure_noises(
    model: Model, groups: Sequence[RangeGroup], images: PickedImages, few: int, threads: int | None, parts: Parts
) -> Iterator[float]:
    """Yield the noise at the outputs with each group alone rounded, on the first few images."""
    if not groups:
        return
    outputs, feeds = find_judged_tensors(model), images.feeds[:few]
    clean = _Clean(_names_of(outputs), images.clean, parts, images.counts)
    picked = dict.fromkeys(range(len(feeds)), 1.0)
    with contextlib.closing(ArrayStore(BYTES_IN_MEMORY)) as store:
        walk = StepwiseRun(model, feeds, store, threads=threads, kept=outputs)
        for together in _split_by_type(groups):
            walk.values_of(together[0].first)
            names, spec = [_names_of(group.members) for group in together], together[0].params.spec
            tail = NetworkTail(walk.tail_model(outputs), clean.names, names, spec, threads=threads)
            for index, group in enumerate(together):
                yield _mean_noise(clean, tail, picked, group.params, index)


def _split_by_type(groups: Sequence[RangeGroup]) -> Iterator[list[RangeGroup]]:
    """Split groups into runs with codes of one type."""
    for _, alike in itertools.groupby(groups, key=lambda group: group.params.spec.dtype):
        left = list(alike)
        yield from (left[start : start + GROUPS_PER_SESSION] for start in range(0, len(left), GROUPS_PER_SESSION))


@dataclass(frozen=True, slots=True)
class _Trial:
    """A range to be searched.

    noise: at the outputs, of parameters. ends: the tensor's least and largest number. floor: below which an activation
    makes the rest zero; None where none does.
    """

    group: RangeGroup
    noise: Callable[[QuantParams], float]
    ends: Range
    floor: float | None

    @property
    def start(self) -> float:
        """The farther end of the range as it is."""
        low, high = self.group.params.code_range()
        return max(-float(low), float(high), TINY)

    @property
    def reach(self) -> float:
        """How far the tensor goes."""
        return max(-self.ends[0], self.ends[1])

    def set_range(self, threshold: float) -> Range:
        """The range that ends at a threshold, or where the tensor does."""
        return max(min(self.ends[0], 0.0), -threshold), min(max(self.ends[1], 0.0), threshold)

    def written_range(self, threshold: float) -> Range:
        """What the file gets of that range, without what an activation makes zero."""
        low, high = self.set_range(threshold)
        return low if self.floor is None else max(low, self.floor), high

    def at(self, threshold: float) -> float:
        """The noise with the range that ends there."""
        return self.noise(self.group.params.spec.from_range(*self.written_range(threshold)))


def _make_trials(
    model: Model,
    plan: Plan,
    groups: Sequence[RangeGroup],
    images: PickedImages,
    budget: SearchBudget,
    threads: int | None,
    parts: Parts,
) -> Iterator[_Trial]:
    """Yield each group with its function from parameters to noise at the outputs, and how far it reaches."""
    if not groups:
        return
    outputs = find_judged_tensors(model)
    clean = _Clean(_names_of(outputs), images.clean, parts, images.counts)
    with contextlib.closing(ArrayStore(BYTES_IN_MEMORY)) as store:
        walk = StepwiseRun(model, images.feeds, store, threads=threads, kept=outputs)
        for group in groups:
            values = walk.values_of(group.first)
            if values.is_empty:
                continue  # an empty tensor tells nothing of those that share its range
            lows, highs = _measure_ends(values)
            farthest = np.argsort(-_measure_reach(lows, highs, group.params), kind="stable")[: budget.far]
            first = [*farthest.tolist(), *range(min(budget.loudest, len(images.feeds)))]
            picked = pick_batches(len(images.feeds), first, budget.near)
            names, spec = [_names_of(group.members)], group.params.spec
            tail = NetworkTail(walk.tail_model(outputs), clean.names, names, spec, threads=threads)
            noise = partial(_mean_noise, clean, tail, picked)
            gated = any(member in plan.gates for member in group.members)
            floor = float(group.params.code_range()[0]) if gated else None
            yield _Trial(group, noise, (lows.min(), highs.max()), floor)


def _names_of(values: Iterable[Value]) -> list[str]:
    return [value.name or "" for value in values]


def _measure_ends(arrays: Iterable[NDArray[Any]]) -> tuple[Float64, Float64]:
    """The least and the largest number of each batch, (batches,) both; zero counts as one of them."""
    ends = np.array([(x.min(initial=0.0), x.max(initial=0.0)) for x in arrays], np.float64)
    return ends[:, 0], ends[:, 1]


def _measure_reach(lows: Float64, highs: Float64, params: QuantParams) -> Float64:
    """The reach of each batch, as a share of the range that has codes, (batches,)."""
    low, high = (max(abs(float(end)), TINY) for end in params.code_range())
    return np.maximum(highs / high, -lows / low)


@dataclass(frozen=True, slots=True)
class _Clean:
    """What the float network says of every batch, with the names and the parts of its outputs; see PickedImages."""

    names: list[str]
    batches: Sequence[Sequence[NDArray[Any]]]
    parts: Parts
    counts: PartCounts


def _mean_noise(
    clean: _Clean, tail: NetworkTail, picked: Mapping[int, float], params: QuantParams, group: int = 0
) -> float:
    """The noise over all images that the picked batches stand for."""
    expected, got = (clean.batches[index] for index in picked), tail.run(picked, params, group)
    return measure_output_noise(clean.parts, clean.names, expected, got, picked.values(), clean.counts)


def _search_range(trial: _Trial) -> FoundRange:
    """Search the range with the least noise, by its threshold."""
    first = trial.noise(trial.group.params)
    tried: dict[float, float] = {trial.start: first}

    def measured(threshold: float) -> float:
        if threshold not in tried:
            tried[threshold] = trial.at(threshold)
        return tried[threshold]

    def best() -> float:
        return min(tried, key=tried.__getitem__)

    threshold = trial.start
    while first > 0 and threshold > best() * HALF**PATIENCE and measured(threshold * HALF) < MOST_RISE * first:
        threshold *= HALF
    for step in (NARROWER, WIDER):
        while first > 0:
            before = tried[best()]
            threshold = best() * step if step < 1 else min(best() * step, max(trial.reach, trial.start))
            if threshold in tried or measured(threshold) > LARGEST_STEP_RATIO * before:
                break
    found, change = best(), noise_change_db(first, tried[best()])
    ranges = None if found == trial.start else (trial.set_range(found), trial.written_range(found))
    return FoundRange(ranges, change)
