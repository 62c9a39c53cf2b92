"""Estimates what each tensor's rounding costs the outputs from calibration's own statistics, for `--effort fast`.

    N_t = (s_t^2 / 12 + E[(x - clip(x))^2]) / E[x^2]        s_t: the step of tensor t

is the noise of the tensor beside its own power, as its readers get it; a network is taken to hand it on to the outputs
unchanged, whatever the tensor. No image is looked at for it: moments are those of histograms. The division is then
chosen as with measured noises, see `search.precision_choice`, on some of the calibration images.
"""

from __future__ import annotations

import numpy as np

from qconv.calibration.sketch import Sketch
from qconv.config.data_options import Preprocessing
from qconv.config.recipe import Recipe
from qconv.data.loader import DataLoader
from qconv.ir.judged_tensors import find_judged_tensors
from qconv.ir.subgraph import runnable_with_outputs
from qconv.metrics.output_parts import Parts, add_selected_parts
from qconv.planning.precision_curve import TensorNoise
from qconv.quantization.parameters import choose_activation_params
from qconv.quantizer import QuantParams
from qconv.reporter import Reporter
from qconv.runtime.session import Session
from qconv.search.candidate import FoldedNetwork
from qconv.search.division import divide
from qconv.search.loudest_images import STEP, PickedImages
from qconv.search.output_noise import OutputNoise
from qconv.search.precision_choice import HoldsGates, choose_division
from qconv.search.tuned_ranges import TunedRanges

IMAGES = 8
"""Images that divisions are measured on."""


def divide_by_statistics(
    folded: FoldedNetwork,
    recipe: Recipe,
    feed: DataLoader,
    fed: Preprocessing | None,
    parts: Parts,
    reporter: Reporter,
    holds_gates: HoldsGates | None = None,
) -> TunedRanges:
    """Leave in float what is worth its time, with ranges as they are. Arguments as for `search.tuned_ranges`."""
    names = [value.name or "" for value in find_judged_tensors(folded.model)]
    if not names:
        return TunedRanges(folded, [])
    feeds = feed.take(IMAGES, STEP)
    with runnable_with_outputs(folded.model, names) as runnable:
        session = Session(runnable, name="the folded float model", threads=recipe.threads)
    images = PickedImages(feeds, [1.0] * len(feeds), [session.run(names, batch) for batch in feeds])
    parts = add_selected_parts(parts, folded.model)
    noises = estimate_noises(folded, recipe)
    found = choose_division(folded, recipe, fed, noises, OutputNoise(names, images, parts), reporter, holds_gates)
    if found.wide or found.floats != folded.plan.floats:
        folded = divide(folded, floats=found.floats, wide=found.wide)
    return TunedRanges(folded, found.findings, found.report, found.curve)


def estimate_noises(folded: FoldedNetwork, recipe: Recipe) -> list[TensorNoise]:
    """The noise of every group of tensors that share a range, by the histogram of those of them that have one."""
    params, _ = choose_activation_params(folded.plan, folded.sketches, recipe, folded.set_ranges)
    found: dict[tuple[object, ...], TensorNoise] = {}
    for value, members in folded.plan.group_of().items():
        chosen = params.activations[value]
        if value in folded.plan.given or members in found or chosen.scale.ndim:
            continue
        names = (member.name or "" for member in members)
        known = [folded.sketches[name] for name in names if name in folded.sketches]
        noise = max((relative_noise(sketch, chosen) for sketch in known if sketch.codes.size), default=0.0)
        found[members] = TensorNoise(members, noise)
    return list(found.values())


def relative_noise(sketch: Sketch, params: QuantParams) -> float:
    """The noise of rounding a tensor with one scale, over the tensor's power; 0 for one of zeros."""
    histogram = sketch.histogram()
    x, shares = histogram.centres, histogram.shares
    low, high = (float(end) for end in params.code_range())
    power = float(shares @ x**2)
    error = float(params.scale) ** 2 / 12 + float(shares @ (x - np.clip(x, low, high)) ** 2)
    return error / power if power > 0 else 0.0
