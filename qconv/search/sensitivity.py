"""What a layer's weights cost at the outputs when they alone have few bits, measured layer by layer.

    N_l(b) = sum over outputs of sum (ref - got)^2 / sum ref^2

got: of the folded float network with the weights of layer l in b bits, its bias corrected, as they would be written.
ref: of the network itself. Weights round to the nearest code or, where a solver is given, by second order, as if this
layer were the first: what it reads is the float network's. Then noise is measured on pictures that the weights were not
made for. The network is walked once, and at each layer what lies behind it is run with weights and bias as inputs.

Noises of several layers, which are small and hardly correlated, are taken to add up; what quantized activations add is
left out, and is the same for all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.calibration.sketch import Sketch
from qconv.config.choices import Scheme
from qconv.config.recipe import Recipe
from qconv.ir.model import Model, is_tensor
from qconv.ir.stepwise import NetworkTail, StepwiseRun, collect_up_to
from qconv.planning.plan import LayerPlan as Planned
from qconv.planning.plan import Plan
from qconv.quantization.gptq import read_weight_shape
from qconv.quantization.input_moments import accumulate_moments, is_held_out
from qconv.quantization.layer import LayerInput, LayerParams, quantize_layer
from qconv.quantization.parameters import Params, find_layer_input, find_layer_sketch
from qconv.quantization.second_order import EffectiveRange, LayerSolver, first_input
from qconv.quantizer import PerChannel
from qconv.search.assign import Layer
from qconv.storage import ArrayStore, StoredArrays

Batch = Mapping[str, NDArray[Any]]
Outputs = Sequence[NDArray[Any]]
FLOAT = 32
WORST = 1e6
"""Noise of what gives NaN or infinity."""
HELD = 2**27
"""Bytes of tensors, and of outputs, that are held in memory."""


@dataclass(frozen=True, slots=True)
class Network:
    """The folded float network, its plan, and what is known of its tensors. params: of the activations."""

    model: Model
    plan: Plan
    params: Params
    sketches: Mapping[str, Sketch]
    recipe: Recipe


def sensitivities(
    network: Network,
    wishes: Mapping[str, Collection[int]],
    batches: Sequence[Batch],
    solver: LayerSolver | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Layer]:
    """Count and noise of the layers named in `wishes`, for the bits listed there; FLOAT bits have no noise.

    solver: rounds the weights; None for nearest codes.
    """
    threads, judged = network.recipe.threads, [value for value in network.model.graph.outputs if is_tensor(value)]
    outputs = [value.name or "" for value in judged]
    found: dict[str, Layer] = {}
    with contextlib.closing(ArrayStore(HELD)) as store:
        walk = StepwiseRun(network.model, batches, store, threads=threads, kept=judged)
        looked_at = _looked_at(len(batches), solver)
        expected = collect_up_to(HELD, NetworkTail(walk.behind(judged), outputs, threads=threads).run(looked_at))
        looked_at = looked_at[: len(expected)]
        for index, layer in enumerate(network.plan.layers):
            name = layer.node.name or ""
            if name not in wishes:
                continue
            progress(len(found), len(wishes))
            inputs = walk.at(first_input(layer.node))
            choices = _choices(network, layer, index, wishes[name], inputs, solver)
            opened = _opened(name, choices.values())
            behind = NetworkTail(walk.behind(judged), outputs, opened=(name, opened), threads=threads)
            noise = {bits: 0.0 for bits in wishes[name] if bits >= FLOAT}
            for bits, chosen in choices.items():
                fed = {opened[place]: numbers for place, numbers in _real(chosen).items()}
                noise[bits] = noise_of(expected, behind.run(looked_at, fed=fed))
            found[name] = Layer(prod(read_weight_shape(layer.node)), noise)
    progress(len(found), len(wishes))
    return found


def _looked_at(count: int, solver: LayerSolver | None) -> list[int]:
    """The batches that noise is measured on: those kept apart, where weights are made for what the others hold."""
    apart = [index for index in range(count) if solver is not None and is_held_out(index)]
    return apart or list(range(count))


def noise_of(expected: Sequence[Outputs], got: Iterable[Outputs]) -> float:
    """See the module. expected, got: outputs of batch after batch. Outputs of whole numbers: the share that differs."""
    signal: dict[int, float] = {}
    noise: dict[int, float] = {}
    for references, results in zip(expected, got, strict=True):
        for index, (ref, result) in enumerate(zip(references, results, strict=True)):
            if not isinstance(ref, np.ndarray) or ref.dtype.kind not in "fiub" or ref.shape != result.shape:
                continue
            if ref.dtype.kind == "f":
                finite = np.isfinite(ref)
                lost = np.where(finite, ref, 0).astype(np.float64) - np.where(finite, result, 0)
                power, away = float(np.sum(np.where(finite, ref, 0).astype(np.float64) ** 2)), float(np.sum(lost**2))
            else:
                power, away = float(ref.size), float((ref != result).sum())
            signal[index] = signal.get(index, 0.0) + power
            noise[index] = noise.get(index, 0.0) + away
    total = sum(noise[index] / power for index, power in signal.items() if power > 0)
    return total if np.isfinite(total) else WORST


def _choices(
    network: Network,
    layer: Planned,
    index: int,
    wishes: Collection[int],
    inputs: StoredArrays,
    solver: LayerSolver | None,
) -> dict[int, LayerParams]:
    """The layer with each of the bits it may have."""
    found = {bits: _nearest(network, layer, bits) for bits in sorted(wishes) if bits < FLOAT}
    refused = solver is None or all(solver.refusal(network.model, nearest) for nearest in found.values())
    if solver is None or refused:
        return found
    drawn = zip(inputs, solver.drawn(layer, index, inputs), strict=True)
    rows = (patches.rows(x, patches.places(at)) for x, (patches, at) in drawn)
    seen, source = accumulate_moments((x, x) for x in rows), _source(network, layer)
    sight = EffectiveRange.behind(layer.node, network.params.activations)
    return {
        bits: nearest
        if solver.refusal(network.model, nearest)
        else solver.solved(nearest, source, seen, sight, anew=False)[0]
        for bits, nearest in found.items()
    }


def _nearest(network: Network, layer: Planned, bits: int) -> LayerParams:
    """The layer as `params.choose_params` makes it, with other bits."""
    recipe = network.recipe
    apart = recipe.allocates_weights and isinstance(layer.weight.granularity, PerChannel) and bits < 8
    symmetric = recipe.scheme_of_weights(bits) is Scheme.SYMMETRIC
    narrow = replace(layer, weight=replace(layer.weight, bits=bits, symmetric=symmetric), own_bits=apart)
    found, _ = quantize_layer(
        narrow,
        _source(network, layer),
        recipe.weight_calibrator,
        network.plan.target,
        seen=find_layer_sketch(layer, network.sketches),
        saturation_safe=recipe.saturation_safe,
        correction=recipe.bias_correction,
    )
    return found


def _source(network: Network, layer: Planned) -> LayerInput | None:
    return find_layer_input(layer, network.params, network.sketches)


def _opened(name: str, choices: Iterable[LayerParams]) -> dict[int, str]:
    """Names for what is fed instead of the weights, and of the bias where there may be one, by their places."""
    biased = any(chosen.bias is not None for chosen in choices)
    return {1: f"{name}_weights"} | ({2: f"{name}_bias"} if biased else {})


def _real(chosen: LayerParams) -> dict[int, NDArray[np.float32]]:
    """Weights and bias as they will be computed with, by their places."""
    weight = chosen.weight.dequantize(chosen.codes).reshape(read_weight_shape(chosen.layer.node))
    return {1: weight} | ({} if chosen.bias is None else {2: chosen.bias.astype(np.float32)})
