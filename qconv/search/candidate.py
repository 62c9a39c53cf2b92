"""This module builds the quantized model of a candidate recipe, and scores it against the float model on images.

Candidates are scored on images that their weights were not rounded on, where there are enough of them: on the others
low bits look better than they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from numpy.typing import NDArray

from qconv.calibration.range_estimators import Range
from qconv.calibration.sketch import Sketch
from qconv.config.choices import Drop, LayerBits
from qconv.config.data_options import DataOptions
from qconv.config.recipe import Recipe
from qconv.config.serialization import escape_glob
from qconv.config.targets import TARGETS
from qconv.data.loader import Batch, DataLoader, count_images
from qconv.errors import Finding, QconvError
from qconv.ir import subgraph
from qconv.ir.metadata import set_ir_version
from qconv.ir.model import Model
from qconv.metrics.by_labels import Labels
from qconv.metrics.comparison import ReferenceOutputs, collect_reference_outputs
from qconv.metrics.demands import DROPS, Demanded
from qconv.metrics.output_parts import Parts
from qconv.passes.compress_constants import compress_constants
from qconv.passes.requantize import give_readers_copies
from qconv.planning.plan import Plan
from qconv.planning.planner import make_plan, replan
from qconv.quantization.emit import emit
from qconv.quantization.input_moments import is_held_out
from qconv.quantization.parameters import NO_SET_RANGES, Params, carry_over_params, choose_params
from qconv.quantization.sequential_rounding import round_layers_sequentially
from qconv.quantization.write_fast_forms import write_fast_forms
from qconv.reporter import Reporter
from qconv.results.quantize import Verification
from qconv.results.scores import SQNR, Score
from qconv.runtime.session import Session
from qconv.search.sensitivity import FLOAT_BITS, BitAssignment

Feeds = Sequence[Mapping[str, NDArray[Any]]]


@dataclass(frozen=True, slots=True)
class FoldedNetwork:
    """The folded float network that candidates are built from.

    model: the network, which stays as it is.
    plan: by the recipe that was asked for; those of other recipes leave the same nodes in float.
    sketches: by tensor.
    set_ranges: of activations, by tensor, in place of those by the calibrator.
    """

    model: Model
    plan: Plan
    sketches: Mapping[str, Sketch]
    set_ranges: Mapping[str, Range]


@dataclass(slots=True)
class QuantizationSolution:
    """Plan and parameters of a quantized model, for the folded network itself. findings: changes and refusals."""

    plan: Plan
    params: Params
    findings: list[Finding]


def round_to_nearest(folded: FoldedNetwork, recipe: Recipe) -> QuantizationSolution:
    """Choose the parameters of a recipe, with weights rounded to the nearest code."""
    known = folded.plan
    plan = known if recipe == known.recipe else replan(known, folded.model, recipe=recipe)
    return QuantizationSolution(plan, *choose_params(plan, folded.sketches, recipe, folded.set_ranges))


def round_second_order_in_place(
    solution: QuantizationSolution, folded: FoldedNetwork, recipe: Recipe, feeds: Feeds, seed: int, reporter: Reporter
) -> None:
    """Round the weights of a solution by second order, layer after layer, in place."""
    plan, params = solution.plan, solution.params
    solution.findings += round_layers_sequentially(folded.model, plan, params, feeds, recipe, reporter, seed)


def build_quantized_model(folded: FoldedNetwork, recipe: Recipe, params: Params) -> Model:
    """Build the quantized model with these parameters."""
    model = folded.model.copy()
    plan = replan(folded.plan, model, recipe=recipe)
    emit(model, plan, carry_over_params(params, plan))
    write_fast_forms(model, plan)
    compress_constants(model)
    set_ir_version(model)
    return model


def quantize_to_nearest(
    model: Model, recipe: Recipe, sketches: Mapping[str, Sketch], floats: Mapping[str, str] | None = None
) -> Model:
    """Build the quantized model that `quantize` makes of these sketches, with weights rounded to the nearest code."""
    model = model.copy()
    copied = give_readers_copies(model, make_plan(model, recipe, TARGETS[recipe.target], floats), sketches)
    folded = FoldedNetwork(model, copied.plan, copied.sketches, NO_SET_RANGES)
    return build_quantized_model(folded, recipe, round_to_nearest(folded, recipe).params)


SCORED_BYTES = 128 * 2**20

FEWEST_HELD_OUT = 8
"""Held-out images from which on candidates are scored on these alone."""

PROGRESS_STEPS = 100
"""Steps of progress for one candidate."""


@dataclass(frozen=True, slots=True)
class SearchContext:
    """Network, recipe and images of a search.

    original: the user's own model. parts: of its outputs. labels: of the images.
    """

    folded: FoldedNetwork
    recipe: Recipe
    data: DataOptions
    feed: DataLoader
    original: Session
    parts: Parts = field(default_factory=dict)
    labels: Labels | None = None


@dataclass(frozen=True, slots=True)
class Measurement:
    """A point carried out. scores: of its worst output, and of its labels where these are asked for."""

    verified: Verification
    scores: tuple[Score, ...]


@dataclass(slots=True)
class CandidateScorer:
    """Builds candidates and scores them against the float model.

    feeds: images to round weights on.
    flattered: whether candidates are scored on these images, too.
    seen: measurements, by the index of the candidate.
    solutions: parameters of the candidates that may be chosen.
    expected: candidates to come, for progress.
    """

    context: SearchContext
    names: list[str]
    feeds: list[Batch] | None
    reporter: Reporter
    scored: ReferenceOutputs
    flattered: bool
    seen: dict[int, Measurement] = field(default_factory=dict)
    solutions: dict[int, QuantizationSolution] = field(default_factory=dict)
    expected: int = 1

    @classmethod
    def of(
        cls,
        context: SearchContext,
        names: list[str],
        feeds: list[Batch] | None,
        reporter: Reporter,
    ) -> CandidateScorer:
        """The scorer for layers of these names. Runs the float model once on the images to score on."""
        unseen, flattered = _choose_scoring_batches(context.feed, 0 if feeds is None else len(feeds))
        scored = collect_reference_outputs(
            context.original,
            context.feed,
            "float",
            most_bytes=SCORED_BYTES,
            reporter=reporter,
            batches=unseen,
            labels=context.labels,
        )
        return cls(context, names, feeds, reporter, scored, flattered)

    def of_network(self, folded: FoldedNetwork, reporter: Reporter) -> CandidateScorer:
        """The scorer of the same network otherwise divided; nothing of it has been measured yet."""
        return replace(self, context=replace(self.context, folded=folded), reporter=reporter, seen={}, solutions={})

    @property
    def pictures(self) -> int:
        """The number of images that candidates are scored on."""
        return sum(count_images(feeds) for feeds, _ in self.scored.batches)

    @property
    def float_scores(self) -> tuple[Score, ...]:
        """How right the float model is by labels; nothing without these."""
        measure = self.scored.float_measure
        return () if measure is None or not measure.pictures else measure.scores()

    def recipe_of(self, point: BitAssignment) -> Recipe:
        """The recipe with the bits of an assignment. Bits of activations that the user gave stay."""
        recipe = self.context.recipe
        own = []
        for name, bits in zip(self.names, point.bits, strict=True):
            activations = recipe.bits_of(name).activations
            wish = LayerBits(in_float=True) if bits >= FLOAT_BITS else LayerBits(bits, activations)
            own.append((escape_glob(name), wish))
        return replace(recipe, layer_bits=(*own, *recipe.layer_bits))

    def measure(self, points: Sequence[BitAssignment], index: int) -> Measurement:
        """Score candidate `index`: build the model that would be written, and run it on the images."""
        if index not in self.seen:
            folded, recipe = self.context.folded, self.recipe_of(points[index])
            solution = round_to_nearest(folded, recipe)
            if self.feeds is not None:
                round_second_order_in_place(
                    solution,
                    folded,
                    recipe,
                    self.feeds,
                    self.context.data.seed,
                    Reporter(on_progress=self._within_a_point),
                )
            model = build_quantized_model(folded, recipe, solution.params)
            with subgraph.runnable_with_outputs(model, ()) as runnable:
                on_ort = TARGETS[recipe.target].on_ort
                session = Session(runnable, name="the quantized model", threads=recipe.threads, optimize=on_ort)
                verified = self.scored.score(session)
            own = () if verified.labelled is None else verified.labelled.scores[:1]
            self.seen[index], self.solutions[index] = Measurement(verified, (*verified.scores, *own)), solution
            self.tell()
        return self.seen[index]

    def keep(self, index: int) -> None:
        """Drop the parameters of all candidates but this one."""
        self.solutions = {index: self.solutions[index]}

    def tell(self, part: float = 0.0) -> None:
        """Report progress. part: share of the current candidate."""
        self.reporter.progress(
            "search", round(PROGRESS_STEPS * min(len(self.seen) + part, self.expected)), PROGRESS_STEPS * self.expected
        )

    def _within_a_point(self, stage: str, done: int, total: int) -> None:
        self.tell(done / max(1, total))

    def holds(self, points: Sequence[BitAssignment], index: int, drop: Drop) -> bool:
        """Whether a point keeps the drop. Raises QconvError where there is no such measure."""
        verified = self.measure(points, index).verified
        found = Demanded.of(DROPS[drop.measure], verified)
        if found.metric == SQNR:  # a drop to a value, not by one
            return found.reaches(drop.value, verified)
        if found.got is None or found.before is None:
            fact = f"--max-drop {drop.measure} cannot be measured: the float model shows none on these pictures."
            raise QconvError(fact, "pass pictures of what it is for, or --max-drop sqnr:DB.")
        return found.metric.lost(found.before, found.got) <= drop.value + 1e-9

    def in_words(self, index: int, drop: Drop) -> str:
        """What was measured of a point, in the drop's measure."""
        found = Demanded.of(DROPS[drop.measure], self.seen[index].verified)
        if found.before is None:
            return "infinite" if found.got is None else found.metric.format(found.got, 2)
        return f"{found.metric.lost(found.before, found.got or 0.0):.4g}"


def _choose_scoring_batches(feed: DataLoader, rounded_on: int) -> tuple[list[int], bool]:
    """Choose the batches to score on: on those that weights are rounded on, codes look better than they are.

    rounded_on: so many of the first, less those that are held out. Returns all batches where hardly any others are
    left, and whether that is so.
    """
    count = -(-len(feed.listing.paths) // feed.batch)
    found = [index for index in range(count) if index >= rounded_on or is_held_out(index)]
    flattered = len(found) * feed.batch < FEWEST_HELD_OUT and rounded_on > 0
    return (list(range(count)), True) if flattered else (found, False)
