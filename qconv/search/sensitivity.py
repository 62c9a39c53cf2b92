"""This module measures what each layer costs at the outputs at few bits, and assigns bits along the Pareto front.

    N_l(b) = sum over outputs of sum (ref - got)^2 / sum ref^2         layer l alone at b bits, bias corrected
    min over b   sum over layers l of N_l(b_l)      such that   sum over l of b_l * count_l <= size

The float network runs once; at each layer what lies behind it is run with weights and bias as inputs. Noises are taken
to add up; activation noise is left out. For a price of a bit each layer takes the b least in
N_l(b) + price * b * count_l, a corner of its lower convex hull. `fill_to_size` spends the rest greedily, which is not
exact.

Sources: Shoham and Gersho 1988 (Lagrangian allocation); Yao et al. 2021, arXiv 2011.10680 (HAWQ-V3).
"""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.calibration.sketch import Sketch
from qconv.config.choices import Scheme
from qconv.config.recipe import Recipe
from qconv.ir.judged_tensors import find_judged_tensors
from qconv.ir.model import Model
from qconv.ir.rewriting import data_input
from qconv.ir.stepwise import NetworkTail, StepwiseRun, collect_up_to
from qconv.metrics.output_parts import Parts, add_selected_parts, measure_output_noise
from qconv.planning.plan import LayerPlan as Planned
from qconv.planning.plan import Plan
from qconv.quantization.effective_range import EffectiveRange
from qconv.quantization.gptq import read_weight_shape
from qconv.quantization.input_moments import accumulate_moments, is_held_out
from qconv.quantization.layer import LayerInput, LayerParams, quantize_layer
from qconv.quantization.layer_rounding import LayerSolver
from qconv.quantization.parameters import Params, find_layer_input, find_layer_sketch
from qconv.quantizer import PerChannel
from qconv.storage import ArrayStore, StoredArrays

Bits = int

NoiseByBits = Mapping[Bits, float]


@dataclass(frozen=True, slots=True)
class LayerSensitivity:
    """The sensitivity of a layer. count: number of its weights. noise: N_l(b) by bits b, one entry at least."""

    count: int
    noise: NoiseByBits


@dataclass(frozen=True, slots=True)
class BitAssignment:
    """Bits for all layers. bits: of each layer. size: bits of all weights together. noise: the sum of N_l(b_l)."""

    bits: tuple[Bits, ...]
    size: int
    noise: float


def make_assignment(layers: Sequence[LayerSensitivity], bits: Sequence[Bits]) -> BitAssignment:
    """The assignment of these bits, with its size and noise."""
    size = sum(layer.count * b for layer, b in zip(layers, bits, strict=True))
    return BitAssignment(tuple(bits), size, sum(layer.noise[b] for layer, b in zip(layers, bits, strict=True)))


def find_convex_hull(layer: LayerSensitivity) -> list[Bits]:
    """The bits at the corners of the lower convex hull, ascending; noise falls along it, ever more slowly."""
    corners: list[Bits] = []
    for bits in sorted(layer.noise):
        if corners and not layer.noise[bits] < layer.noise[corners[-1]]:
            continue
        while len(corners) > 1 and _noise_slope(layer, corners[-1], bits) >= _noise_slope(
            layer, corners[-2], corners[-1]
        ):
            corners.pop()
        corners.append(bits)
    return corners


def find_pareto_curve(layers: Sequence[LayerSensitivity]) -> list[BitAssignment]:
    """From the smallest assignment to the one with the least noise, ascending in size."""
    hulls = [find_convex_hull(layer) for layer in layers]
    at = [0] * len(layers)
    found = [make_assignment(layers, [corners[0] for corners in hulls])]
    # the step of each layer that saves the most noise a bit, which is its next one
    steps = [(-_noise_slope(layers[index], *h[:2]), index) for index, h in enumerate(hulls) if len(h) > 1]
    heapq.heapify(steps)
    while steps:
        _, index = heapq.heappop(steps)
        at[index] += 1
        found.append(make_assignment(layers, [corners[place] for corners, place in zip(hulls, at, strict=True)]))
        after = hulls[index][at[index] : at[index] + 2]
        if len(after) == 2:
            heapq.heappush(steps, (-_noise_slope(layers[index], *after), index))
    return found


def fill_to_size(layers: Sequence[LayerSensitivity], start: BitAssignment, size: int) -> BitAssignment:
    """Give layers of `start` more bits up to `size`, greedily: each time the step that saves the most noise a bit."""
    best = start
    while True:
        steps = [
            make_assignment(layers, [*best.bits[:index], bits, *best.bits[index + 1 :]])
            for index, layer in enumerate(layers)
            for bits in layer.noise
            if bits > best.bits[index]
        ]
        better = [step for step in steps if step.size <= size and step.noise < best.noise]
        if not better:
            return best
        best = min(better, key=lambda step: step.noise)


def _noise_slope(layer: LayerSensitivity, low: Bits, high: Bits) -> float:
    """The noise saved by each bit of storage between two choices of bits."""
    return (layer.noise[low] - layer.noise[high]) / ((high - low) * max(layer.count, 1))


Batch = Mapping[str, NDArray[Any]]

Outputs = Sequence[NDArray[Any]]

FLOAT_BITS = 32

BYTES_IN_MEMORY = 2**27
"""Bytes of tensors, and of outputs, that are held in memory."""


@dataclass(frozen=True, slots=True)
class SensitivityContext:
    """The folded float network, its plan, parameters of activations, sketches, and the parts of its outputs."""

    model: Model
    plan: Plan
    params: Params
    sketches: Mapping[str, Sketch]
    recipe: Recipe
    parts: Parts = field(default_factory=dict)


def measure_sensitivities(
    network: SensitivityContext,
    candidate_bits: Mapping[str, Collection[int]],
    batches: Sequence[Batch],
    solver: LayerSolver | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, LayerSensitivity]:
    """Measure the sensitivities of layers; FLOAT_BITS has no noise.

    candidate_bits: what each of these layers is quantized to, by its name. solver: rounds the weights; None for
    nearest codes.
    """
    threads, judged = network.recipe.threads, find_judged_tensors(network.model)
    outputs, parts = [value.name or "" for value in judged], add_selected_parts(network.parts, network.model)
    found: dict[str, LayerSensitivity] = {}
    with contextlib.closing(ArrayStore(BYTES_IN_MEMORY)) as store:
        walk = StepwiseRun(network.model, batches, store, threads=threads, kept=judged)
        looked_at = _choose_noise_batches(len(batches), solver)
        expected = collect_up_to(
            BYTES_IN_MEMORY, NetworkTail(walk.tail_model(judged), outputs, threads=threads).run(looked_at)
        )
        looked_at = looked_at[: len(expected)]
        for index, layer in enumerate(network.plan.layers):
            name = layer.node.name or ""
            if name not in candidate_bits:
                continue
            progress(len(found), len(candidate_bits))
            inputs = walk.values_of(data_input(layer.node))
            choices = _quantize_at_each_bits(network, layer, index, candidate_bits[name], inputs, solver)
            opened = _name_weight_inputs(name, choices.values())
            tail = NetworkTail(walk.tail_model(judged), outputs, opened=(name, opened), threads=threads)
            noise = {bits: 0.0 for bits in candidate_bits[name] if bits >= FLOAT_BITS}
            for bits, chosen in choices.items():
                fed = {opened[place]: numbers for place, numbers in _dequantize_layer(chosen).items()}
                noise[bits] = measure_output_noise(parts, outputs, expected, tail.run(looked_at, fed=fed))
            found[name] = LayerSensitivity(prod(read_weight_shape(layer.node)), noise)
    progress(len(found), len(candidate_bits))
    return found


def _choose_noise_batches(count: int, solver: LayerSolver | None) -> list[int]:
    """Choose the batches to measure noise on: the held-out ones, where weights are solved for the others."""
    apart = [index for index in range(count) if solver is not None and is_held_out(index)]
    return apart or list(range(count))


def _quantize_at_each_bits(
    network: SensitivityContext,
    layer: Planned,
    index: int,
    candidate_bits: Collection[int],
    inputs: StoredArrays,
    solver: LayerSolver | None,
) -> dict[int, LayerParams]:
    """Quantize the layer with each of the bits it may have."""
    found = {bits: _quantize_to_nearest(network, layer, bits) for bits in sorted(candidate_bits) if bits < FLOAT_BITS}
    refused = solver is None or all(solver.refusal(nearest) for nearest in found.values())
    if solver is None or refused or inputs.is_empty:
        return found
    samples = solver.sample_rows(layer, index, inputs)
    rows = (patches.rows(inputs[batch], patches.places(at)) for batch, patches, at in samples)
    seen, source = accumulate_moments((x, x) for x in rows), _find_source(network, layer)
    effective_range = EffectiveRange.of_consumers(layer.node, network.params.activations)
    return {
        bits: nearest
        if solver.refusal(nearest)
        else solver.solve(nearest, source, seen, effective_range, anew=False)[0]
        for bits, nearest in found.items()
    }


def _quantize_to_nearest(network: SensitivityContext, layer: Planned, bits: int) -> LayerParams:
    """Quantize the layer as `choose_params` does, with other bits."""
    recipe = network.recipe
    apart = recipe.allocates_weights and isinstance(layer.weight.granularity, PerChannel) and bits < 8
    symmetric = recipe.scheme_of_weights(bits) is Scheme.SYMMETRIC
    narrow = replace(layer, weight=replace(layer.weight, bits=bits, symmetric=symmetric), own_bits=apart)
    found, _ = quantize_layer(
        narrow,
        _find_source(network, layer),
        recipe.weight_calibrator,
        network.plan.target,
        seen=find_layer_sketch(layer, network.sketches),
        saturation_safe=recipe.saturation_safe,
        correction=recipe.bias_correction,
    )
    return found


def _find_source(network: SensitivityContext, layer: Planned) -> LayerInput | None:
    return find_layer_input(layer, network.params, network.sketches)


def _name_weight_inputs(name: str, choices: Iterable[LayerParams]) -> dict[int, str]:
    """Names of the inputs that replace weights, and the bias where there may be one, by input position."""
    biased = any(chosen.bias is not None for chosen in choices)
    return {1: f"{name}_weights"} | ({2: f"{name}_bias"} if biased else {})


def _dequantize_layer(chosen: LayerParams) -> dict[int, NDArray[np.float32]]:
    """The float weights and bias that the codes stand for, by input position."""
    weight = chosen.weight.dequantize(chosen.codes).reshape(read_weight_shape(chosen.layer.node))
    return {1: weight} | ({} if chosen.bias is None else {2: chosen.bias.astype(np.float32)})
