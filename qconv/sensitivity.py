"""What a layer's weights cost at the outputs when they alone have few bits, measured layer by layer.

    N_l(b) = sum over outputs of sum (ref - got)^2 / sum ref^2

got: of the folded float network with the weights of layer l rounded to b bits, its bias corrected, as they would be
written. ref: of the network itself. One session a layer: its weights and bias become inputs of the network, and every
choice of bits is one run. Noises of several layers, which are small and hardly correlated, are taken to add up; what
quantized activations add is left out, and is the same for all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv import save
from qconv.assign import Layer
from qconv.graph import Model, array
from qconv.params import Params, source_of
from qconv.plan import Layer as Planned
from qconv.plan import Plan
from qconv.quant import PerChannel
from qconv.recipe import Recipe
from qconv.runtime import Session
from qconv.sketch import Sketch
from qconv.weights import LayerParams, quantize_layer

Batch = Mapping[str, NDArray[Any]]
Outputs = Sequence[NDArray[Any]]
FLOAT = 32
WORST = 1e6
"""Noise of what gives NaN or infinity."""


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
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Layer]:
    """Count and noise of the layers named in `wishes`, for the bits listed there; FLOAT bits have no noise."""
    threads = network.recipe.threads
    with save.runnable(network.model, ()) as runnable:
        session = Session(runnable, name="the folded float model", threads=threads)
        outputs = session.outputs
        expected = [session.run_all(feeds) for feeds in batches]
    del session
    found: dict[str, Layer] = {}
    chosen = [layer for layer in network.plan.layers if (layer.node.name or "") in wishes]
    for done, layer in enumerate(chosen, 1):
        name = layer.node.name or ""
        narrow = sorted(bits for bits in wishes[name] if bits < FLOAT)
        noise = {bits: 0.0 for bits in wishes[name] if bits >= FLOAT}
        has_bias = any(_quantized(network, layer, bits).bias is not None for bits in narrow[:1])
        with _opened(network, name, 2 if has_bias else 1) as (session, inputs):
            for bits in narrow:
                fed = _fed(_quantized(network, layer, bits), layer, inputs)
                noise[bits] = noise_of(expected, (session.run(outputs, {**feeds, **fed}) for feeds in batches))
        stored = array(layer.node.inputs[1])
        assert stored is not None
        found[name] = Layer(stored.size, noise)
        progress(done, len(chosen))
    return found


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


def _quantized(network: Network, layer: Planned, bits: int) -> LayerParams:
    """The layer as `params.choose_params` makes it, with other bits."""
    recipe = network.recipe
    source = source_of(layer, network.params, network.sketches)
    apart = recipe.allocates_weights and isinstance(layer.weight.granularity, PerChannel) and bits < 8
    narrow = replace(layer, weight=replace(layer.weight, bits=bits), own_bits=apart)
    found, _ = quantize_layer(
        narrow,
        source,
        recipe.weight_calibrator,
        network.plan.target,
        saturation_safe=recipe.saturation_safe,
        correction=recipe.bias_correction,
    )
    return found


@contextlib.contextmanager
def _opened(network: Network, name: str, count: int) -> Iterator[tuple[Session, list[str]]]:
    """The network with the weights of a layer, and with a count of 2 its bias, as inputs; their names come with it."""
    model = network.model.copy()
    node = next(node for node in model.nodes() if node.name == name)
    inputs = [model.open_input(node, index, f"{name}_{kind}") for index, kind in ((1, "weights"), (2, "bias"))[:count]]
    with save.runnable(model, ()) as runnable:
        yield Session(runnable, name="the folded float model", threads=network.recipe.threads), inputs


def _fed(quantized: LayerParams, layer: Planned, inputs: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    """Weights and bias as they will be computed with."""
    stored = array(layer.node.inputs[1])
    assert stored is not None
    numbers = [quantized.weight.dequantize(quantized.codes).reshape(stored.shape), quantized.bias]
    return {name: array for name, array in zip(inputs, numbers, strict=False) if array is not None}
