"""Searches bits layer by layer: the smallest weights within a given drop, or the best of a given size.

The sensitivity of every layer is measured by itself; noises add up, so that the best assignments at each size form a
Pareto curve (`search.sensitivity`). This model is trusted with their order only: the assignment that is chosen was
built, run and compared with the float model on calibration images, and ends up in the file with the same codes. With
second-order rounding, every candidate is rounded so and scored on images that it was not rounded on: the others flatter
by 3 dB and more at few bits. A drop is found by bisection over the curve, as it falls with size but for chance; the
smallest candidate that was measured within it is taken. For a given size the last two points are compared, and uniform
bits unless the model finds them much worse. Where even the most bits of weights miss the drop, activations get more of
them: the cheapest division of the curve of `search.precision_choice` that keeps it, found by bisection, too.

    size = sum over layers of bits * count / (32 * sum over layers of count)

counts codes as if they were packed bit by bit. Biases are not searched over.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from qconv.config.choices import Drop
from qconv.config.recipe import Recipe
from qconv.config.targets import TARGETS
from qconv.data.loader import Batch, count_images
from qconv.errors import QconvError
from qconv.ir.model import Model, constant_array
from qconv.metrics.similarity import compute_sqnr_db
from qconv.planning.planner import is_quantizable_layer, make_plan
from qconv.quantization.layer_rounding import ROUNDING_EFFORTS, LayerSolver
from qconv.reporter import Reporter
from qconv.results.quantize import MixedPrecision, SizePoint
from qconv.search.candidate import (
    CandidateScorer,
    FoldedNetwork,
    Measurement,
    QuantizationSolution,
    SearchContext,
    round_to_nearest,
)
from qconv.search.division import with_division
from qconv.search.precision_choice import ChosenDivision, DivisionCurve
from qconv.search.sensitivity import (
    FLOAT_BITS,
    BitAssignment,
    LayerSensitivity,
    SensitivityContext,
    fill_to_size,
    find_pareto_curve,
    make_assignment,
    measure_sensitivities,
)

SENSITIVITY_IMAGES = 16
"""Images that sensitivities are measured on: enough to order layers; the result is verified on all."""
MUCH_WORSE_FACTOR = 2.0
"""Ratio of modelled noise to that of the best point from which on a point is not measured: the model errs by less."""


@dataclass(frozen=True, slots=True)
class MixedPrecisionResult:
    """The result of a search.

    recipe: with the `layer_bits` that were found. solution: its plan and parameters. folded: the network that they are
    of. division: taken in place of the one that was chosen before; None where that has remained.
    """

    recipe: Recipe
    report: MixedPrecision
    solution: QuantizationSolution
    folded: FoldedNetwork
    division: ChosenDivision | None = None


def predict_recipe(model: Model, recipe: Recipe, floats: Mapping[str, str]) -> Recipe:
    """The recipe with uniform bits near those that a search will find, for the steps before it.

    model, floats: as `make_plan` takes them.
    """
    possible = [bits for bits in recipe.candidate_bits or () if bits < FLOAT_BITS]
    if not recipe.searches or not possible:
        return recipe
    bits = possible[len(possible) // 2]
    if recipe.target_size is not None:
        scope = _SearchSpace.of(model, recipe, floats)
        bits = max((b for b in possible if scope.alike(b) <= scope.most(recipe.target_size)), default=possible[0])
    return _make_uniform_recipe(recipe, bits)


def _make_uniform_recipe(recipe: Recipe, bits: int) -> Recipe:
    """The recipe with these bits for all layers, and no search."""
    return replace(
        recipe,
        weight_bits=bits,
        pack=False,
        max_drop=None,
        target_size=None,
        candidate_bits=None,
        save_layer_bits=None,
    )


def check_target_size(model: Model, recipe: Recipe, floats: Mapping[str, str]) -> None:
    """Raise QconvError where `--target-size` is below what the candidate bits can give; before any work."""
    if recipe.target_size is None:
        return
    scope = _SearchSpace.of(model, recipe, floats)
    least = scope.alike(min(recipe.candidate_bits or (FLOAT_BITS,)))
    if least > scope.most(recipe.target_size):
        told = f"which is {scope.share(least):.4g}"
        fact = f"--target-size {recipe.target_size:g} is below what these bits can give, {told}."
        raise QconvError(fact, "add smaller --candidate-bits, lower --edge-bits, or allow a larger size.")


def search_bits(context: SearchContext, reporter: Reporter, curve: DivisionCurve | None = None) -> MixedPrecisionResult:
    """Find the bits of every layer that `--layer-bits` gives none. Raises QconvError where no assignment will do.

    curve: divisions that activations may have; None for the one that they have.
    """
    recipe, division = context.recipe, None
    scope = _SearchSpace.of(context.folded.model, recipe, context.folded.plan.floats)
    if not scope.candidate_bits:
        raise QconvError(
            "There is no layer to choose bits for: --layer-bits names them all.", "leave some of them out."
        )
    names = list(scope.candidate_bits)
    feeds = None
    if recipe.rounding != "nearest":
        feeds = context.feed.take(ROUNDING_EFFORTS[recipe.effort].pictures, "read again")
    layers = _measure_sensitivities(context, scope.candidate_bits, feeds, reporter)
    most = scope.most(1.0 if recipe.target_size is None else recipe.target_size)
    points = _assignments_within(layers, most)
    judge = CandidateScorer.of(context, names, feeds, reporter)
    _warn_of_few_images(judge, recipe.max_drop, reporter)
    if recipe.max_drop is None:
        points, chosen = _choose_best(judge, _find_uniform_assignment(layers, most), points)
    else:
        judge.expected = 1 + len(points).bit_length()
        if curve is not None and not judge.holds(points, len(points) - 1, recipe.max_drop):
            judge, division = _find_division_within_drop(judge, points, recipe.max_drop, curve)
        chosen = _find_smallest_within_drop(judge, points, recipe.max_drop)
    report = MixedPrecision(
        _describe_bits(recipe),
        len(names),
        judge.pictures,
        judge.float_scores,
        tuple(
            _make_size_point(point, judge.seen.get(index), scope.share(point.size), chosen=index == chosen)
            for index, point in enumerate(points)
        ),
    )
    folded, found = judge.context.folded, judge.recipe_of(points[chosen])
    if division is not None:
        found = with_division(found, folded.plan.wide, folded.plan.floats)
    return MixedPrecisionResult(found, report, judge.solutions[chosen], folded, division)


def _warn_of_few_images(judge: CandidateScorer, drop: Drop | None, reporter: Reporter) -> None:
    """Warn of a drop that so few images cannot resolve."""
    told = f"the {judge.pictures} pictures that bits are judged by"
    if judge.flattered:
        reporter.warn(f"weights are rounded on {told}, which flatters: pass more pictures.")
    if drop is not None and drop.measure in ("agreement", "top1") and 0 < drop.value * judge.pictures < 1:
        reporter.warn(f"--max-drop {drop} is less than one of {told}: pass more pictures.")


def _measure_sensitivities(
    context: SearchContext, candidate_bits: Mapping[str, Collection[int]], feeds: list[Batch] | None, reporter: Reporter
) -> list[LayerSensitivity]:
    """The sensitivities of the layers in `candidate_bits`. feeds: to round weights on; None for nearest codes."""
    folded, recipe = context.folded, context.recipe
    solution = round_to_nearest(folded, recipe)
    network = SensitivityContext(folded.model, solution.plan, solution.params, folded.sketches, recipe, context.parts)
    solver = None
    if feeds is not None:
        solver = LayerSolver(
            recipe,
            solution.plan.target,
            replace(ROUNDING_EFFORTS[recipe.effort], factors=(), sweeps=0),
            context.data.seed,
        )
    batches = list(_first_batches(context.feed.iter_cached("pictures"), SENSITIVITY_IMAGES)) if feeds is None else feeds
    known = measure_sensitivities(
        network, candidate_bits, batches, solver, lambda done, total: reporter.progress("layers", done, total)
    )
    return [known[name] for name in candidate_bits]


def _first_batches(batches: Iterable[Batch], pictures: int) -> Iterator[Batch]:
    """Yield batches until they hold so many images."""
    seen = 0
    for feeds in batches:
        yield feeds
        seen += count_images(feeds)
        if seen >= pictures:
            return


@dataclass(frozen=True, slots=True)
class _SearchSpace:
    """What a search may choose.

    candidate_bits: the bits that each layer may have, by name.
    counts: number of weights of these layers.
    fixed: bits of storage of all other weights.
    count: number of all weights.
    """

    candidate_bits: Mapping[str, Collection[int]]
    counts: Mapping[str, int]
    fixed: int
    count: int

    @classmethod
    def of(cls, model: Model, recipe: Recipe, floats: Mapping[str, str]) -> _SearchSpace:
        """The search space of a model. The first and the last layer keep `edge_bits`."""
        least = make_plan(model, _make_uniform_recipe(recipe, 2), TARGETS[recipe.target], floats)
        fewest = {layer.node.name or "": layer.weight.bits for layer in least.layers}
        candidate_bits: dict[str, set[int]] = {}
        counts: dict[str, int] = {}
        fixed = 0
        for node in model.nodes():
            weight = constant_array(node.inputs[1]) if is_quantizable_layer(node) else None
            if weight is None:
                continue
            name, wish = node.name or "", recipe.bits_of(node.name or "").weights
            counts[name] = weight.size
            if name in fewest and wish is None:
                candidate_bits[name] = {max(bits, fewest[name]) for bits in recipe.candidate_bits or ()}
            else:
                fixed += weight.size * fewest.get(name, FLOAT_BITS)
        return cls(candidate_bits, counts, fixed, sum(counts.values()))

    def most(self, share: float) -> int:
        """The bits of storage left for the searched layers, for a share of float's size."""
        return int(share * FLOAT_BITS * self.count) - self.fixed

    def share(self, size: int) -> float:
        """The share of float's size when the searched layers take so many bits of storage."""
        return (size + self.fixed) / (FLOAT_BITS * self.count)

    def alike(self, bits: int) -> int:
        """The bits of storage of the searched layers with uniform bits, or the nearest that each can have."""
        return sum(self.counts[name] * _nearest_bits(wish, bits) for name, wish in self.candidate_bits.items())


def _nearest_bits(possible: Collection[int], bits: int) -> int:
    return min((b for b in possible if b >= bits), default=max(possible))


def _assignments_within(layers: Sequence[LayerSensitivity], most: int) -> list[BitAssignment]:
    """The points of the Pareto curve up to a size, and one that fills it up; none where none is so small."""
    found = [point for point in find_pareto_curve(layers) if point.size <= most]
    best = fill_to_size(layers, found[-1], most) if found else None
    return found if best is None or best == found[-1] else [*found, best]


def _choose_best(
    judge: CandidateScorer, same: BitAssignment | None, points: list[BitAssignment]
) -> tuple[list[BitAssignment], int]:
    """Measure the last two points and `same`, and return all points with the index of the best.

    Points that the model finds much worse are not measured.
    """
    if same is not None and same not in points:
        points = sorted([*points, same], key=lambda point: point.size)
    tried = {len(points) - 1, max(0, len(points) - 2)} | ({points.index(same)} if same is not None else set())
    least = min(points[index].noise for index in tried)
    tried = {index for index in tried if points[index].noise <= MUCH_WORSE_FACTOR * least}
    decibels: dict[int, float] = {}
    judge.expected = len(tried)
    for index in sorted(tried):
        found = judge.measure(points, index).verified.sqnr_db
        decibels[index] = math.inf if found is None else found
        judge.keep(max(decibels, key=lambda index: (decibels[index], -index)))
    return points, max(decibels, key=lambda index: (decibels[index], -index))


def _find_uniform_assignment(layers: Sequence[LayerSensitivity], size: int) -> BitAssignment | None:
    """The uniform assignment with the most bits within a size, each layer as near to it as it can."""
    every = sorted({bits for layer in layers for bits in layer.noise})
    found = None
    for bits in every:
        alike = make_assignment(layers, [_nearest_bits(layer.noise, bits) for layer in layers])
        found = alike if alike.size <= size else found
    return found


def _find_division_within_drop(
    judge: CandidateScorer, points: Sequence[BitAssignment], drop: Drop, curve: DivisionCurve
) -> tuple[CandidateScorer, ChosenDivision | None]:
    """Find the cheapest division that keeps the drop with the most bits, with a scorer of it; the last if none does."""
    dearer = curve.find_dearer()
    found = judge

    def holds(index: int) -> bool:
        nonlocal found
        tried = judge.of_network(curve.carry_out(index), Reporter())
        held = tried.holds(points, len(points) - 1, drop)
        if held or index == dearer[-1]:
            found = replace(tried, reporter=judge.reporter)
        return held

    if not dearer or not holds(dearer[-1]):
        return found, None
    low, high = curve.chosen, dearer[-1]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return found, curve.take(high)


def _find_smallest_within_drop(judge: CandidateScorer, points: Sequence[BitAssignment], drop: Drop) -> int:
    """Find the smallest point within the drop by bisection; the point that is returned was measured."""
    low, high = -1, len(points) - 1
    if not judge.holds(points, high, drop):
        got = judge.in_words(high, drop)
        fact = f"No assignment keeps --max-drop {drop}: with the most bits that are allowed it is {got}."
        more = "more --candidate-bits or --candidate-activation-bits (float, too)"
        raise QconvError(fact, f"allow a larger drop, {more}, or --activation-bits.")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if judge.holds(points, middle, drop) else (middle, high)
        judge.keep(high)
    judge.tell(judge.expected)  # all: bisection may have been quicker
    return high


def _make_size_point(point: BitAssignment, seen: Measurement | None, size: float, *, chosen: bool) -> SizePoint:
    return SizePoint(
        size=size,
        modelled_sqnr_db=compute_sqnr_db(1.0, point.noise),
        verified=seen is not None,
        scores=() if seen is None else seen.scores,
        chosen=chosen,
        bits={str(bits): point.bits.count(bits) for bits in sorted(set(point.bits))},
    )


def _describe_bits(recipe: Recipe) -> str:
    parts = [] if recipe.max_drop is None else [f"--max-drop {recipe.max_drop}"]
    parts += [] if recipe.target_size is None else [f"--target-size {recipe.target_size:g}"]
    return " ".join(parts)
