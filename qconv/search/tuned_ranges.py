"""Sets ranges of activations by what the network's outputs lose.

    1. ranges that make much of the noise, one by one                       `activation_ranges`
    2. what is worth its time stays in float, by the noises of step 1       `precision_choice`
    3. one width for all ranges that the calibrator chose                   `range_widths`
    4. where 2 or 3 changed anything, 1 begins anew from there, and measures what was not measured yet

With `--scale-gates` loud gates are scaled after step 1 (`gate_scaling`), which then begins anew, too.

Beside a loud tensor nothing else counts, and what a range gains hangs on where it starts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qconv.config.data_options import Preprocessing
from qconv.config.recipe import Recipe
from qconv.data.loader import DataLoader
from qconv.errors import Finding
from qconv.ir.judged_tensors import find_judged_tensors
from qconv.metrics.output_parts import Parts, add_selected_parts
from qconv.quantization.parameters import choose_activation_params
from qconv.reporter import Reporter
from qconv.results.precision import PrecisionReport
from qconv.search.activation_ranges import SEARCH_BUDGETS, RangeSearch, SearchMemory, search_activation_ranges
from qconv.search.candidate import FoldedNetwork
from qconv.search.division import divide
from qconv.search.gate_scaling import ScaledGates, scale_loud_gates
from qconv.search.loudest_images import HeardOutputs, PickedImages, pick_images
from qconv.search.output_gains import GainTrial
from qconv.search.output_noise import OutputNoise
from qconv.search.precision_choice import DivisionCurve, HoldsGates, choose_division
from qconv.search.range_widths import choose_range_width


@dataclass(frozen=True, slots=True)
class TunedRanges:
    """What is taken from now on, and what may be.

    folded: the network, divided, with its plan and ranges. findings, precision: for the report. curve: other divisions.
    gains: corrects those of layers; None where that is not wanted, outputs are many numbers, or no image is
    left that nothing was chosen on.
    """

    folded: FoldedNetwork
    findings: list[Finding]
    precision: PrecisionReport | None = None
    curve: DivisionCurve | None = None
    gains: GainTrial | None = None


def tune_ranges(
    folded: FoldedNetwork,
    recipe: Recipe,
    feed: DataLoader,
    fed: Preprocessing | None,
    parts: Parts,
    reporter: Reporter,
    holds_gates: HoldsGates | None = None,
    heard: HeardOutputs | None = None,
) -> TunedRanges:
    """Set the ranges that the outputs gain from, and give what is worth it more than 8 bits.

    feed: the images. fed: the preprocessing of what the model takes; None for ready-made samples. parts: of outputs.
    holds_gates: whether a model holds the gates; None without any. heard: what the float network has said of the images
    before; None where it has not run.
    """
    names, budget = [value.name or "" for value in find_judged_tensors(folded.model)], SEARCH_BUDGETS[recipe.effort]
    if not names:
        return TunedRanges(folded, [])
    counts = budget.loud, budget.many - budget.loud, budget.apart
    parts = add_selected_parts(parts, folded.model)
    if heard is None or list(heard.names) != names:
        heard = HeardOutputs(names, parts)
    images, aside = pick_images(folded.model, feed, counts, recipe.threads, heard)
    apart = OutputNoise(names, aside, parts)

    memory = SearchMemory()
    found = _search(folded, recipe, images, parts, reporter, memory)
    gates = ScaledGates(folded)
    if recipe.scale_gates:
        gates = scale_loud_gates(folded, recipe, feed, found, images, apart)
    if gates.folded is not folded:
        folded, memory = gates.folded, SearchMemory()  # its tensors are others
        found = _search(folded, recipe, images, parts, reporter, memory)
    tuned = replace(folded, set_ranges={**folded.set_ranges, **found.ranges})
    division = choose_division(tuned, recipe, fed, found.noises, apart, reporter, holds_gates)
    divided = bool(division.wide) or division.floats != folded.plan.floats
    if divided:
        folded = divide(folded, floats=division.floats, wide=division.wide)
    width = choose_range_width(folded, recipe, OutputNoise(names, images, parts), reporter)
    if divided or width.findings:
        folded = replace(folded, set_ranges=width.ranges)
        found = _search(folded, recipe, images, parts, reporter, memory)
    ranges = {**folded.set_ranges, **found.ranges}
    told = [*gates.findings, *division.findings, *width.findings, *found.findings]
    curve = None if division.curve is None else division.curve.with_ranges(ranges)
    may_gain = recipe.corrects_gains and aside.apart and aside.few_numbers
    gains = GainTrial(images.feeds, apart) if may_gain else None
    return TunedRanges(replace(folded, set_ranges=ranges), told, division.report, curve, gains)


def _search(
    folded: FoldedNetwork,
    recipe: Recipe,
    images: PickedImages,
    parts: Parts,
    reporter: Reporter,
    memory: SearchMemory,
) -> RangeSearch:
    params, _ = choose_activation_params(folded.plan, folded.sketches, recipe, folded.set_ranges)
    budget, known = SEARCH_BUDGETS[recipe.effort], params.activations
    if images.few_numbers:
        budget = budget.of_few_numbers()
    return search_activation_ranges(
        folded.model, folded.plan, known, images, budget, recipe.threads, reporter, parts, memory
    )
