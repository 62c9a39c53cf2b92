"""Chooses how much of a network stays in float for accuracy, on the curve of `planning.precision_curve`.

Where the fastest division has less than POOR_DB, that one is taken which is worth the most: its dB, of which no more
than ENOUGH_DB count, less up to DB_OF_BUDGET for the time that it takes more, which is at most `--float-budget` of the
all-integer time, and not beyond float's. Gates that the result has to hold ask for more: then the fastest division of
all that holds them. Where times are not known, see `choose_division`.

What a point has is predicted by noises that add up, which orders points. Errors of a network of few outputs correlate,
though, and those of a poor one do not add up: so the first and the last point within the budget are carried out, with
weights rounded to the nearest of 8 bits, and measured on images that nothing was chosen on, and then the best one until
that is one that was measured. Between two that were, what a prediction is off by in dB is taken to be linear in time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

import numpy as np

from qconv.calibration.range_estimators import Range
from qconv.config.choices import FLOAT_BITS, FLOAT_BUDGET, PRECISE_SHARE, WIDE_BITS
from qconv.config.data_options import Preprocessing
from qconv.config.recipe import Recipe
from qconv.config.targets import TARGETS
from qconv.errors import Change, Finding, Skipped, format_some
from qconv.ir.model import Model, Node
from qconv.planning.operator_costs import Shapes
from qconv.planning.placement import (
    PlacementProblem,
    infer_run_shapes,
    infer_sample_shapes,
    is_placement_supported,
    select_cost_table,
    select_cpu_tables,
    with_activations,
)
from qconv.planning.plan import Plan
from qconv.planning.planner import replan
from qconv.planning.precision_curve import Division, PrecisionCurve, PrecisionProblem, TensorNoise
from qconv.planning.traffic import count_traffic
from qconv.planning.widths import measure_precise_share
from qconv.quantization.parameters import choose_ranges
from qconv.reporter import Reporter
from qconv.results.precision import PreciseShare, PrecisionPoint, PrecisionReport
from qconv.search.candidate import FoldedNetwork, build_quantized_model, round_to_nearest
from qconv.search.division import divide
from qconv.search.output_noise import OutputNoise, with_fine_weights

STEP = "precision"

POOR_DB, ENOUGH_DB = 22.0, 24.0
"""SQNR below which time is spent, and up to which."""

DB_OF_BUDGET = 2.0
"""What all the time that may be spent is worth, and a share of it the same share of that."""

LEAST_WORTH_DB = 0.5
"""What a division has to gain at least, less what its time is worth: less may be chance."""

LEAST_GAIN_DB = 2.0
"""What a division has to gain at least where times are not known."""

MOST_MEASURED = 6
"""Divisions that are carried out at most to find the one to take."""

MOST_NAMED = 3
"""Nodes that are named where there are more."""

HoldsGates = Callable[[Model], bool]
"""Whether a quantized model holds all gates on the images to check on."""


@dataclass(frozen=True, slots=True)
class ChosenDivision:
    """The nodes that have more than 8 bits.

    floats, wide: in float and on 16 bits, by name, each with the reason. report, curve: None where there is no choice.
    """

    floats: Mapping[str, str]
    wide: Mapping[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    report: PrecisionReport | None = None
    curve: DivisionCurve | None = None


def choose_division(
    folded: FoldedNetwork,
    recipe: Recipe,
    fed: Preprocessing | None,
    noises: Sequence[TensorNoise],
    apart: OutputNoise,
    reporter: Reporter,
    holds_gates: HoldsGates | None = None,
) -> ChosenDivision:
    """Choose the nodes that get more than 8 bits: float, or what `--candidate-activation-bits` says.

    For a target without a table of costs, where the user asked for it, a division costs what it reads and writes
    (`planning.traffic`), for want of times. Its limit is the share of activations with more than 8 bits, of their
    number and of their elements; the most accurate division within it is taken, however much 8 bits have, if it gains
    LEAST_GAIN_DB.

    Args:
        folded: The float network; its plan has in float what is faster there.
        recipe: How to quantize.
        fed: Preprocessing of the network, which settles dynamic sizes; None for ready-made samples.
        noises: Of tensors at the outputs, each alone.
        apart: Measures the noise on images that `noises` were not measured on.
        reporter: Hears of progress.
        holds_gates: Tells whether a model holds the gates; None where there are none.
    """
    target, known = TARGETS[recipe.target], folded.plan.floats
    budget = recipe.float_budget
    if budget is None:
        budget = PRECISE_SHARE if target.costs is None else FLOAT_BUDGET
    if not _is_choice_supported(recipe) or not budget or not noises or not apart.images.feeds:
        return ChosenDivision(known)
    model = folded.model
    shapes = infer_run_shapes(model, fed) or infer_sample_shapes(model, apart.images.feeds[0])
    whole = replan(folded.plan, model, floats={})
    costs, *cpus = _count_costs(model, whole, shapes, recipe)
    if not costs.time(whole.integer):  # sizes are not known before a run, nor are times
        unknown = Skipped(STEP, "all tensors", "sizes are not known before a run, nor what more bits would cost")
        return ChosenDivision(known, findings=[unknown] if target.costs is None else [])
    ranges = choose_ranges(folded.plan, folded.sketches, recipe, folded.set_ranges)  # once, not for each division
    known_ranges = {value.name or "": found for value, found in ranges.items()}
    undivided = replace(folded, set_ranges=known_ranges)
    trial = _DivisionTrial(undivided, recipe, whole, shapes, apart)
    problem = PrecisionProblem.of(model, whole, costs, noises, cpus)
    search = CurveSearch(problem.fastest(folded.plan.integer), lambda point: trial.measure(point.integer))
    curve = DivisionCurve(problem, search, trial)
    if holds_gates is not None or target.costs is None or search.is_poor:
        curve.find_all()
    if target.costs is None:
        chosen = search.choose_within(lambda point: trial.measure_share(point.integer).is_within(budget))
    else:
        chosen = search.choose(budget)
    if holds_gates is not None:
        chosen = search.find_holding(chosen, lambda point: holds_gates(trial.build(point.integer)))
    reporter.progress(STEP, 1, 1)
    return curve.take(chosen)


def _is_choice_supported(recipe: Recipe) -> bool:
    """Whether a tensor may have more than 8 bits, and the costs of that are known."""
    target = TARGETS[recipe.target]
    return recipe.high_precision is not None and (target.costs is None or is_placement_supported(recipe, target))


def _count_costs(model: Model, whole: Plan, shapes: Shapes, recipe: Recipe) -> list[PlacementProblem]:
    """What divisions cost: on a CPU of which nothing is known, and on each class of CPU; traffic for other targets."""
    target = TARGETS[recipe.target]
    if target.costs is None:
        return [count_traffic(model, whole, shapes, recipe.high_precision or FLOAT_BITS)]
    tables = [select_cost_table(recipe, target), *select_cpu_tables(recipe, target)]
    return [PlacementProblem.of(model, whole, shapes, table).with_dear_conversions() for table in tables]


@dataclass(slots=True)
class DivisionCurve:
    """The divisions of a network, to be taken or carried out. chosen: the index of the one that was taken last."""

    problem: PrecisionProblem
    search: CurveSearch
    trial: _DivisionTrial
    chosen: int = 0

    def find_all(self) -> None:
        """Find the divisions behind the first one."""
        if len(self.search.points) == 1:
            self.problem.rest = self.trial.measure(frozenset())
            self.search.curve = self.problem.find_curve(self.search.points[0].integer)

    def with_ranges(self, ranges: Mapping[str, Range]) -> DivisionCurve:
        """The same with other ranges of activations from now on."""
        folded = replace(self.trial.folded, set_ranges=ranges)
        return replace(self, trial=replace(self.trial, folded=folded))

    def find_dearer(self) -> range:
        """The indices of the divisions with more than 8 bits for more than the one that was taken."""
        self.find_all()
        return range(self.chosen + 1, len(self.search.points))

    def carry_out(self, index: int) -> FoldedNetwork:
        """The network of a division."""
        return self.trial.divide(self.search.points[index].integer, self.tell(index).why)

    def tell(self, index: int) -> PrecisionReport:
        """What is told of the curve with a division taken."""
        trial = self.trial
        report = self.search.report(index, trial.apart.images.count, apart=trial.apart.images.apart)
        if TARGETS[trial.recipe.target].costs is None:
            bits = trial.recipe.high_precision or FLOAT_BITS
            report = replace(report, bits=bits, share=trial.measure_share(self.search.points[index].integer))
        return report

    def take(self, index: int) -> ChosenDivision:
        """Take a division, with what is told of it."""
        self.chosen, trial, known = index, self.trial, self.trial.folded.plan.floats
        report, integer = self.tell(index), self.search.points[index].integer
        if index == 0:
            return ChosenDivision(known, report=report, curve=self)
        floats, wide = trial.name_nodes(integer, report.why)
        reasons = {name: known.get(name, why) for name, why in floats.items()}
        new = [name for name in (*reasons, *wide) if name not in known]
        what = f"{_LEFT[report.bits]} for {report.why}"
        told = Change(STEP, format_some(new, MOST_NAMED), what, "division for accuracy")
        return ChosenDivision(reasons, wide, [told] if new else [], report, self)


_LEFT = {FLOAT_BITS: "left in float", WIDE_BITS: "computed on 16 bits"}


@dataclass(frozen=True, slots=True)
class _DivisionTrial:
    """Carries out divisions, with ranges as they are by now.

    folded: undivided. whole: the plan of all in integers. shapes: of all tensors, for one run. apart: measures them.
    """

    folded: FoldedNetwork
    recipe: Recipe
    whole: Plan
    shapes: Shapes
    apart: OutputNoise

    def name_nodes(self, integer: Set[Node], why: str) -> tuple[dict[str, str], dict[str, str]]:
        """The nodes in float and those on 16 bits, by name with the reason. integer: those on 8 bits."""
        found = with_activations(self.whole, dict.fromkeys(self.whole.integer - integer, why))
        every = (node.name or "" for node in self.folded.model.nodes())  # in order, as names come out of sets
        named = {name: found[name] for name in every if name in found}
        return ({}, named) if self.recipe.high_precision == WIDE_BITS else (named, {})

    def divide(self, integer: Set[Node], why: str = STEP) -> FoldedNetwork:
        """The network with these nodes on 8 bits. why: the others have more."""
        floats, wide = self.name_nodes(integer, why)
        return divide(self.folded, floats=floats, wide=wide)

    def measure_share(self, integer: Set[Node]) -> PreciseShare:
        """The share of activations that have more bits with these nodes on 8."""
        return measure_precise_share(self.divide(integer).plan, self.whole, self.shapes)

    def build(self, integer: Set[Node]) -> Model:
        """The model with these nodes on 8 bits."""
        divided, fine = self.divide(integer), with_fine_weights(self.recipe)
        return build_quantized_model(divided, fine, round_to_nearest(divided, fine).params)

    def measure(self, integer: Set[Node]) -> float:
        """The noise at the outputs with these nodes on 8 bits."""
        return self.apart.of_nearest(self.divide(integer), self.recipe)


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
        self._measured_db(allowed[-1])  # predictions may be far off
        for _ in range(MOST_MEASURED):
            found = self.corrected()
            best = max(allowed, key=lambda index: self._worth(index, found[index], budget))
            if best in self.measured:
                break
            self._measured_db(best)
        worth = {index: self._worth(index, self._measured_db(index), budget) for index in self.measured}
        best = max(worth, key=worth.__getitem__)
        return best if worth[best] >= worth[0] + LEAST_WORTH_DB else 0

    def _worth(self, index: int, sqnr_db: float, budget: float) -> float:
        """SQNR in dB, up to what is enough, less what the time is worth that it takes more than the first point."""
        slower = max(0.0, self.points[index].time - self.points[0].time)
        return min(sqnr_db, ENOUGH_DB) - DB_OF_BUDGET * slower / budget

    def choose_within(self, is_allowed: Callable[[Division], bool]) -> int:
        """The index of the most accurate point that is allowed, the dearest, where it gains enough."""
        every = range(len(self.points))
        if is_allowed(self.points[-1]):
            best = every[-1]
        else:
            best = max(0, self._first_of(every, lambda index: not is_allowed(self.points[index])) - 1)
        return best if best and self._measured_db(best) >= self._measured_db(0) + LEAST_GAIN_DB else 0

    def find_holding(self, start: int, holds: Callable[[Division], bool]) -> int:
        """The first point from `start` on that holds; where none does, the last one, if it has more than `start`.

        It may yet: weights are only rounded to the nearest here.
        """
        last = len(self.points) - 1
        if holds(self.points[start]) or start == last:
            return start
        if not holds(self.points[last]):
            return last if self._measured_db(last) >= self._measured_db(start) + LEAST_WORTH_DB else start
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
