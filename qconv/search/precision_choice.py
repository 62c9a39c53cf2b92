"""Chooses how much of a network stays in float for accuracy, on the curve of `planning.precision_curve`.

Where the fastest division has less than POOR_DB, the fastest one is taken that has ENOUGH_DB, or else the most accurate
one, that is at most `--float-budget` of the all-integer time slower, and no slower than float; it has to gain
LEAST_GAIN_DB. Gates that the result has to hold ask for more: then the fastest division of all that holds them.

What a point has is predicted by noises that add up, which orders points. Errors of a network of few outputs correlate,
though, and those of a poor one do not add up: so points are carried out, with weights rounded to the nearest of 8 bits,
and measured on images that nothing was chosen on, as many as bisection takes. Between two that were measured, what a
prediction is off by in dB is taken to be linear in time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from qconv.config.choices import FLOAT_BUDGET
from qconv.config.data_options import Preprocessing
from qconv.config.recipe import Recipe
from qconv.config.targets import TARGETS
from qconv.errors import Change, Finding, format_some
from qconv.ir.judged_tensors import find_judged_tensors
from qconv.ir.model import Model
from qconv.ir.subgraph import runnable_with_outputs
from qconv.metrics.output_parts import Parts, measure_output_noise
from qconv.planning.placement import (
    PlacementProblem,
    infer_run_shapes,
    is_placement_supported,
    select_cost_table,
    with_activations,
)
from qconv.planning.plan import Plan
from qconv.planning.planner import replan
from qconv.planning.precision_curve import Division, PrecisionCurve, PrecisionProblem, TensorNoise
from qconv.reporter import Reporter
from qconv.results.precision import FOR_ACCURACY, PrecisionPoint, PrecisionReport
from qconv.runtime.session import Session
from qconv.search.candidate import FoldedNetwork, build_quantized_model, round_to_nearest
from qconv.search.loudest_images import PickedImages
from qconv.search.range_widths import with_fine_weights

STEP = "precision"

POOR_DB, ENOUGH_DB, LEAST_GAIN_DB = 20.0, 24.0, 2.0
"""SQNR below which time is spent, up to which, and what that has to gain at least."""

MOST_NAMED = 3
"""Nodes that are named where there are more."""

HoldsGates = Callable[[Model], bool]
"""Whether a quantized model holds all gates on the images to check on."""


@dataclass(frozen=True, slots=True)
class ChosenDivision:
    """floats: nodes to leave in float, by name, each with the reason. report: None where nothing was looked at."""

    floats: Mapping[str, str]
    findings: list[Finding] = field(default_factory=list)
    report: PrecisionReport | None = None


def choose_division(
    folded: FoldedNetwork,
    recipe: Recipe,
    fed: Preprocessing | None,
    noises: Sequence[TensorNoise],
    names: Sequence[str],
    apart: PickedImages,
    parts: Parts,
    reporter: Reporter,
    holds_gates: HoldsGates | None = None,
) -> ChosenDivision:
    """Choose the nodes that stay in float.

    Args:
        folded: The float network; its plan has in float what is faster there.
        recipe: How to quantize.
        fed: Preprocessing of the network, which settles dynamic sizes; None for ready-made samples.
        noises: Of tensors at the outputs, each alone.
        names: Of the tensors that count.
        apart: Images that noises were not measured on.
        parts: Of outputs.
        reporter: Hears of progress.
        holds_gates: Tells whether a model holds the gates; None where there are none.
    """
    budget, known = FLOAT_BUDGET if recipe.float_budget is None else recipe.float_budget, folded.plan.floats
    if not is_placement_supported(recipe, TARGETS[recipe.target]) or not budget or not noises or not apart.feeds:
        return ChosenDivision(known)
    model, table = folded.model, select_cost_table(recipe, TARGETS[recipe.target])
    whole = replan(folded.plan, model, floats={})
    costs = PlacementProblem.of(model, whole, infer_run_shapes(model, fed), table)
    if not costs.time(whole.integer):
        return ChosenDivision(known)  # sizes are not known before a run, nor are times
    trial = _DivisionTrial(folded, recipe, whole, names, apart, parts)
    problem = PrecisionProblem.of(model, whole, costs, noises)
    search = CurveSearch(problem.fastest(folded.plan.integer), lambda point: trial.measure(point.integer))
    if holds_gates is not None or search.is_poor:
        problem.rest = trial.measure(frozenset())
        search.curve = problem.find_curve(folded.plan.integer)
    chosen = search.choose(budget)
    if holds_gates is not None:
        chosen = search.find_holding(chosen, lambda point: holds_gates(trial.build(point.integer)))
    reporter.progress(STEP, 1, 1)
    return _describe_choice(search, chosen, trial, known)


def _describe_choice(
    search: CurveSearch, chosen: int, trial: _DivisionTrial, known: Mapping[str, str]
) -> ChosenDivision:
    report = search.report(chosen, trial.images.count, apart=True)
    if chosen == 0:
        return ChosenDivision(known, [], report)
    why = f"{FOR_ACCURACY}: {report.in_words}"
    floats = with_activations(trial.whole, dict.fromkeys(trial.whole.integer - search.points[chosen].integer, why))
    names = [node.name or "" for node in trial.folded.model.nodes()]
    reasons = {name: known.get(name, why) for name in names if name in floats}
    new = [name for name in reasons if name not in known]
    told = Change(STEP, format_some(new, MOST_NAMED), f"left in float for {why}", "division for accuracy")
    return ChosenDivision(reasons, [told] if new else [], report)


@dataclass(frozen=True, slots=True)
class _DivisionTrial:
    """Carries out divisions, with ranges as they are by now.

    whole: the plan of all in integers. images: to measure on.
    """

    folded: FoldedNetwork
    recipe: Recipe
    whole: Plan
    names: Sequence[str]
    images: PickedImages
    parts: Parts

    def build(self, integer: frozenset[object]) -> Model:
        """The model with these nodes in integers."""
        floats = with_activations(self.whole, {node: STEP for node in self.whole.integer if node not in integer})
        plan = replan(self.whole, self.folded.model, floats=floats)
        tried, fine = replace(self.folded, plan=plan), with_fine_weights(self.recipe)
        return build_quantized_model(tried, fine, round_to_nearest(tried, fine).params)

    def measure(self, integer: frozenset[object]) -> float:
        """The noise at the outputs with these nodes in integers."""
        model = self.build(integer)
        on_ort = TARGETS[self.recipe.target].on_ort
        own = [value.name or "" for value in find_judged_tensors(model)]  # within the network they have other names
        with runnable_with_outputs(model, own) as runnable:
            session = Session(runnable, name="the quantized model", threads=self.recipe.threads, integer_kernels=on_ort)
        got = (session.run(own, batch) for batch in self.images.feeds)
        return measure_output_noise(self.parts, self.names, self.images.clean, got, self.images.weights)


@dataclass(slots=True)
class CurveSearch:
    """Looks for the point of a curve to take.

    curve: of predictions. measure: carries a point out, and returns the noise at the outputs. measured: by the index of
    the point.
    """

    curve: PrecisionCurve
    measure: Callable[[Division], float]
    measured: dict[int, float] = field(default_factory=dict)

    @property
    def points(self) -> tuple[Division, ...]:
        """The points, from the fastest to the most accurate."""
        return self.curve.points

    @property
    def is_poor(self) -> bool:
        """Whether the fastest point has too little."""
        return self._measured_db(0) < POOR_DB

    def choose(self, budget: float) -> int:
        """The index of the point to take. budget: share of the all-integer time that it may be slower."""
        first = self.points[0]
        if not self.is_poor:
            return 0
        most = max(min(first.time + budget, self.curve.float_time), first.time)
        allowed = [index for index, point in enumerate(self.points) if point.time <= most]
        best = self._first_of(allowed, lambda index: self._measured_db(index) >= ENOUGH_DB)
        if self._measured_db(best) < ENOUGH_DB:
            best = max(self.measured, key=lambda index: (self._measured_db(index), -index))
        return best if self._measured_db(best) >= self._measured_db(0) + LEAST_GAIN_DB else 0

    def find_holding(self, start: int, holds: Callable[[Division], bool]) -> int:
        """The first point from `start` on that holds, or the last one where none does."""
        if holds(self.points[start]):
            return start
        found = self._first_of(range(start, len(self.points)), lambda index: holds(self.points[index]))
        self._measured_db(found)
        return found

    @staticmethod
    def _first_of(among: Sequence[int], does: Callable[[int], bool]) -> int:
        """The first of some points that does, found by bisection; the first is known not to. The last if none does."""
        low, high = 0, len(among) - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if does(among[middle]) else (middle, high)
        return among[high]

    def corrected(self) -> list[float]:
        """SQNR of all points in dB, corrected by those that were measured."""
        known = sorted(self.measured)
        if not known:
            return [point.sqnr_db for point in self.points]
        times = [point.time for point in self.points]
        offs = [self._measured_db(index) - self.points[index].sqnr_db for index in known]
        # beyond the last measured point predictions are right again where nothing is rounded any more
        places = [times[index] for index in known] + [max(times) + 1e-9]
        order = np.argsort(places, kind="stable")
        found = np.interp(times, np.array(places)[order], np.array([*offs, 0.0])[order])
        exact = {index: self._measured_db(index) for index in known}
        return [exact.get(index, point.sqnr_db + float(found[index])) for index, point in enumerate(self.points)]

    def report(self, chosen: int, pictures: int, *, apart: bool) -> PrecisionReport:
        """What is told of the curve."""
        corrected = self.corrected()
        whole = max(len(point.integer) for point in self.points)
        return PrecisionReport(
            tuple(
                PrecisionPoint(
                    point.time,
                    point.sqnr_db,
                    corrected[index],
                    self._measured_db(index) if index in self.measured else None,
                    whole - len(point.integer),
                    index == chosen,
                )
                for index, point in enumerate(self.points)
            ),
            self.curve.float_time,
            pictures,
            apart,
        )

    def _measured_db(self, index: int) -> float:
        if index not in self.measured:
            self.measured[index] = self.measure(self.points[index])
        noise = self.measured[index]
        return -10 * math.log10(noise) if noise > 0 else math.inf
