"""Chooses how wide all ranges of activations are, by the noise at the network's outputs on the loudest images.

    end(w) = c^(1 - w) * m^w          c: the calibrator's end, m: the tensor's own extreme, w in WIDTHS

A calibrator that weighs errors of all places alike cuts off what is rare, such as the activations behind the one object
of a hundred images: the outputs of that image then lose what they are made for. Ranges that reach as far as the tensors
cost all other images some accuracy. Which of both weighs more is a matter of the network. So one width serves the whole
network: WIDTHS are carried out one after the other while the noise falls, with weights rounded to the nearest of 8
bits, and run on images. To choose one parameter of all ranges by what the network loses is of Nahshan et al. 2019,
arXiv 1911.07190, section 4.2, there the p of an L_p norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from qconv.calibration.range_estimators import Range
from qconv.config.recipe import Recipe
from qconv.errors import Change, Finding
from qconv.ir.model import Value
from qconv.planning.plan import Plan
from qconv.quantization.parameters import choose_ranges
from qconv.reporter import Reporter
from qconv.search.candidate import FoldedNetwork
from qconv.search.output_noise import OutputNoise, noise_change_db

STEP = "widths"

WIDTHS = (0.25, 0.5, 1.0)
"""Widths that are tried beside 0, the calibrator's own ranges."""

LARGEST_RATIO = 0.98
"""Largest ratio of noises at which wider ranges are taken."""


@dataclass(frozen=True, slots=True)
class ChosenWidth:
    """ranges: all that are set in place of the calibrator's, by tensor. findings: for the report."""

    ranges: Mapping[str, Range]
    findings: list[Finding]


def choose_range_width(
    folded: FoldedNetwork,
    recipe: Recipe,
    noise: OutputNoise,
    reporter: Reporter,
) -> ChosenWidth:
    """Choose the width of all ranges that the calibrator finds, by the noise; those that are set stay."""
    known = folded.set_ranges
    own = choose_ranges(folded.plan, folded.sketches, recipe, known)
    whole = choose_ranges(folded.plan, folded.sketches, recipe, calibrator_name="minmax")
    open_to = [value for value in own if own[value] != whole[value] and _has_few_codes(folded.plan, value)]
    if not open_to:
        return ChosenWidth(known, [])
    calibrated = {value.name or "": found for value, found in own.items()}  # to be found once, not for each width
    wider = {0.0: dict(known)}
    for width in WIDTHS:
        wider[width] = {value.name or "": _blend(own[value], whole[value], width) for value in open_to} | dict(known)
    tried: dict[float, float] = {}
    for width, ranges in wider.items():
        reporter.progress(STEP, len(tried), len(wider))
        tried[width] = noise.of_nearest(replace(folded, set_ranges=calibrated | ranges), recipe)
        if tried[width] > min(tried.values()):
            break  # noise falls with the width, and rises from then on
    reporter.progress(STEP, len(tried), len(tried))
    best = min(tried, key=tried.__getitem__)
    if tried[best] >= LARGEST_RATIO * tried[0.0]:
        return ChosenWidth(known, [])
    change = noise_change_db(tried[0.0], tried[best])
    reach = "reach to the extremes that were seen" if best == 1 else f"reach {best:.0%} of the way to the extremes"
    told = Change("ranges", "all activations", f"ranges {reach}: noise at the outputs {change:+.1f} dB", "ranges wider")
    return ChosenWidth(wider[best], [told])


def _has_few_codes(plan: Plan, value: Value) -> bool:
    """Whether a tensor has up to 8 bits: 16 have room for everything."""
    spec = plan.activations[value].spec
    return spec is not None and spec.bits <= 8


def _blend(own: Range, whole: Range, width: float) -> Range:
    """The range between both; an end without any reach in one of them stays what the calibrator says."""
    low, high = (
        np.sign(a) * abs(a) ** (1 - width) * abs(b) ** width if a * b > 0 else a
        for a, b in zip(own, whole, strict=True)
    )
    return float(low), float(high)
