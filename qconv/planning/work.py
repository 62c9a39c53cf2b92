"""Counts the work of a run in multiplications, and bounds what a default run may do beyond quantizing itself.

To quantize statically takes, with n images, layers of W weights that each have r rows of input an image:

    work = START_WORK + sum over layers of W * (n * r + WEIGHT_WORK)

the float network on all images, and to read, round and write each weight. What the default does more of (scaling
channels, rounding by second order, ranges by the outputs) grows with other numbers: with the cube of a layer's inputs,
with the square of the number of layers. Each of these steps may take a fixed multiple of `work`, counted before it
starts and never timed, so that the same model and images give the same bytes. Ordinary networks stay below. The costs
are of one core, as multiplications of a convolution in ONNX Runtime, about 0.04 ns each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import TYPE_CHECKING

from qconv.ir.model import Node, dims
from qconv.ir.rewriting import data_input

if TYPE_CHECKING:
    from qconv.planning.plan import LayerPlan, Plan

START_WORK = 10**10
"""What to start, and to load libraries, takes."""

WEIGHT_WORK = 3500
"""What to read, round and write one weight takes."""

STEP_WORK = 60
"""What one step of the descent in `noise_model` takes for one weight."""

SOLVE_WORK = 2.5
"""What a multiplication in a decomposition in float64 takes."""

SESSION_WORK = 250
"""What to put one weight into a session of the runtime takes."""

EQUALIZATION_SHARE, ROUNDING_SHARE, RANGES_SHARE = 1.5, 3.5, 4.0
"""Multiples of `work` that steps of a default run may take."""


def count_rows(node: Node) -> int:
    """The rows of input that a layer multiplies by its weights for one image; lengths that are open count as one."""
    sizes = dims(data_input(node) if node.op_type == "ConvTranspose" else node.outputs[0]) or []
    places = sizes[2:] if node.op_type in ("Conv", "ConvTranspose") else sizes[1:-1]
    return prod(size or 1 for size in places)


def count_weights(node: Node) -> int:
    """The weights of a layer."""
    stored = node.inputs[1].const_value if node.inputs[1] is not None else None
    return 0 if stored is None else int(stored.size)


def count_kernel(node: Node) -> int:
    """The kernel positions of a layer."""
    stored = node.inputs[1].const_value if node.inputs[1] is not None else None
    return 1 if stored is None else prod(int(size) for size in stored.shape.numpy()[2:])


def multiplications(layers: Iterable[Node]) -> int:
    """The multiplications of these layers for one image."""
    return sum(count_weights(node) * count_rows(node) for node in layers)


def measure_shares_in_float(layers: Sequence[Node], plan: Plan) -> tuple[float, float]:
    """The shares of these layers' multiplications that run in float, and of their weights that are stored so.

    layers: all of a network that is folded, and not yet quantized. Codes of more than 8 bits count as float where the
    target is ONNX Runtime, which has no kernels for them.
    """
    stored = {layer.node for layer in plan.layers}
    wide = {layer.node for layer in plan.layers if plan.target.on_ort and _has_wide_codes(layer, plan)}
    run = multiplications(node for node in layers if node not in plan.integer or node in wide)
    kept = sum(count_weights(node) for node in layers if node not in stored)
    return run / max(1, multiplications(layers)), kept / max(1, sum(map(count_weights, layers)))


def _has_wide_codes(layer: LayerPlan, plan: Plan) -> bool:
    read = None if layer.data is None else plan.activations[layer.data].spec
    return layer.weight.bits > 8 or (read is not None and read.bits > 8)


def quantization_work(layers: Iterable[Node], images: int) -> int:
    """The work of quantizing these layers statically with so many images, see the top."""
    return START_WORK + sum(count_weights(node) * (images * count_rows(node) + WEIGHT_WORK) for node in layers)


def largest_within(sizes: Sequence[int], budget: float) -> int:
    """The cap on each size with which all of them together stay below a budget; the largest size where they do."""
    left, ordered = budget, sorted(sizes)
    for index, size in enumerate(ordered):
        if size * (len(ordered) - index) > left:
            return max(1, int(left / (len(ordered) - index)))
        left -= size
    return max(ordered, default=1)
