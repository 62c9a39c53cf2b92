"""Sets ranges of activations by what the network's outputs lose, in three steps that each build on the one before.

    1. ranges that make much of the noise, one by one       `activation_ranges`
    2. tensors that are loud with any range stay float       `loud_tensors`
    3. one width for all ranges that the calibrator chose    `range_widths`

Beside a loud tensor nothing else counts. So its neighbours are looked at once more when it is left in float, and the
width is chosen after that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qconv.config.data_options import Preprocessing
from qconv.config.recipe import Recipe
from qconv.data.loader import DataLoader
from qconv.errors import Change, Finding
from qconv.ir.judged_tensors import find_judged_tensors
from qconv.metrics.output_parts import Parts
from qconv.planning.planner import replan
from qconv.quantization.parameters import choose_activation_params
from qconv.reporter import Reporter
from qconv.search.activation_ranges import SEARCH_BUDGETS, RangeSearch, search_activation_ranges
from qconv.search.candidate import FoldedNetwork
from qconv.search.loud_tensors import keep_loud_tensors_float
from qconv.search.loudest_images import PickedImages, pick_images
from qconv.search.range_widths import choose_range_width

LOUD = "left in float, as the outputs lose most to it"


@dataclass(frozen=True, slots=True)
class TunedRanges:
    """folded: the network with its plan and ranges from now on. findings: for the report."""

    folded: FoldedNetwork
    findings: list[Finding]


def tune_ranges(
    folded: FoldedNetwork,
    recipe: Recipe,
    feed: DataLoader,
    fed: Preprocessing | None,
    parts: Parts,
    reporter: Reporter,
) -> TunedRanges:
    """Set the ranges that the outputs gain from, and leave the loudest tensors in float.

    feed: the images. fed: the preprocessing of what the model takes; None for ready-made samples. parts: of outputs.
    """
    names, budget = [value.name or "" for value in find_judged_tensors(folded.model)], SEARCH_BUDGETS[recipe.effort]
    if not names:
        return TunedRanges(folded, [])
    counts = budget.loud, budget.many - budget.loud
    images = pick_images(folded.model, names, feed, counts, recipe.threads, parts)
    found = _search(folded, recipe, images, parts, reporter)
    findings = list(found.findings)
    folded = _with_ranges(folded, found)
    floats = keep_loud_tensors_float(folded.model, folded.plan, recipe, fed, found.noises)
    if floats:
        plan = replan(folded.plan, folded.model, floats={**folded.plan.floats, **floats})
        folded = replace(folded, plan=plan)
        findings += [Change("ranges", name, f"left in float: {why}", LOUD) for name, why in floats.items()]
    width = choose_range_width(folded, recipe, names, images, reporter, parts)
    folded, findings = replace(folded, set_ranges=width.ranges), findings + width.findings
    if floats:
        found = _search(folded, recipe, images, parts, reporter)
        folded, findings = _with_ranges(folded, found), findings + found.findings
    return TunedRanges(folded, findings)


def _search(
    folded: FoldedNetwork, recipe: Recipe, images: PickedImages, parts: Parts, reporter: Reporter
) -> RangeSearch:
    params, _ = choose_activation_params(folded.plan, folded.sketches, recipe, folded.set_ranges)
    budget, known = SEARCH_BUDGETS[recipe.effort], params.activations
    return search_activation_ranges(
        folded.model, folded.plan, known, images.feeds, budget, recipe.threads, reporter, parts
    )


def _with_ranges(folded: FoldedNetwork, found: RangeSearch) -> FoldedNetwork:
    return replace(folded, set_ranges={**folded.set_ranges, **found.ranges})
