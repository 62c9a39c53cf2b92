"""Measures the noise at the outputs of a quantized network on picked images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qconv.config.recipe import Recipe
from qconv.config.targets import TARGETS
from qconv.ir.judged_tensors import find_judged_tensors
from qconv.ir.subgraph import runnable_with_outputs
from qconv.metrics.output_parts import Parts, measure_output_noise
from qconv.quantization.parameters import Params
from qconv.runtime.session import Session
from qconv.search.candidate import FoldedNetwork, build_quantized_model, round_to_nearest
from qconv.search.loudest_images import PickedImages

FINE_BITS = 8
"""Bits of weights, of which few would hide what activations lose."""

TINY = 1e-300
"""The least noise that there is, so that there is a logarithm."""


@dataclass(frozen=True, slots=True)
class OutputNoise:
    """names: of the tensors that count. images: to measure on. parts: of these tensors."""

    names: Sequence[str]
    images: PickedImages
    parts: Parts

    def of_nearest(self, folded: FoldedNetwork, recipe: Recipe) -> float:
        """The noise with weights rounded to the nearest of FINE_BITS."""
        wanted = with_fine_weights(recipe)
        return self.of(folded, wanted, round_to_nearest(folded, wanted).params)

    def of(self, folded: FoldedNetwork, recipe: Recipe, params: Params) -> float:
        """The noise with these parameters, over all images that the picked ones stand for."""
        model = build_quantized_model(folded, recipe, params)
        on_ort = TARGETS[recipe.target].on_ort
        own = [value.name or "" for value in find_judged_tensors(model)]  # within the network they have other names
        with runnable_with_outputs(model, own) as runnable:
            session = Session(runnable, name="the quantized model", threads=recipe.threads, integer_kernels=on_ort)
        got = (session.run(own, batch) for batch in self.images.feeds)
        images = self.images
        return measure_output_noise(self.parts, self.names, images.clean, got, images.weights, images.counts)


def with_fine_weights(recipe: Recipe) -> Recipe:
    """With weights in FINE_BITS at least: ranges of activations do not hang on bits that may yet be searched for."""
    own = [(name, bits if bits.in_float else replace(bits, weights=None)) for name, bits in recipe.layer_bits]
    fine = max(FINE_BITS, recipe.weight_bits)
    if fine not in TARGETS[recipe.target].weight_bits:
        fine = recipe.weight_bits
    allocation = "activations" if recipe.allocates_activations else "none"
    return replace(recipe, weight_bits=fine, layer_bits=tuple(own), pack=False, bit_allocation=allocation)


def noise_change_db(before: float, after: float) -> float:
    """By how much a noise changes, in dB: less than 0 where it falls."""
    return 10 * (math.log10(max(after, TINY)) - math.log10(max(before, TINY)))
