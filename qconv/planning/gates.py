"""The part of a range that nobody sees: far below zero, SiLU and HardSwish are zero whatever comes in.

A convolution in front of such an activation often reaches as far below zero as above, and half its codes would go to
values that all become zero. With steps s behind the activation, the range of its input x may end where the result is
within a quarter of a step of zero:

    SiLU        x * Sigmoid(x) = -s / 4, the root left of the minimum
    HardSwish   alpha * x + beta = 0, for x * HardSigmoid(x); x + c = 0, for x * Clip(x + c, 0, ...)

SiLU: Elfwing et al. 2017, arXiv 1702.03118. HardSwish: Howard et al. 2019, arXiv 1905.02244.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qconv.ir.model import Model, Node, Value, attribute, clip_bounds, constant_array, constant_scalar
from qconv.ir.operators import CLIPPING_ACTIVATIONS

SILU_MINIMUM_AT = -1.2784645
"""Where x / (1 + exp(-x)) is least: the root of 1 + exp(-x) (1 + x) = 0."""
SHARE_OF_STEP = 0.25
LOWEST = -100.0


@dataclass(frozen=True, slots=True)
class Gate:
    """An activation that goes to zero on the left. product: its output. closed_at: from where on, None for SiLU."""

    product: Value
    closed_at: float | None

    def floor(self, step: float) -> float:
        """The least input that matters, where the product is quantized in steps of `step`."""
        if self.closed_at is not None:
            return self.closed_at
        inside, outside = SILU_MINIMUM_AT, LOWEST
        while inside - outside > 1e-6:
            middle = (inside + outside) / 2
            if -middle / (1 + math.exp(-middle)) > SHARE_OF_STEP * step:
                inside = middle
            else:
                outside = middle
        return outside


def gate_behind(model: Model, value: Value) -> Gate | None:
    """The activation that alone reads `value`: HardSwish, or a Mul of `value` with a gate computed from it."""
    readers = model.readers(value)
    if value.is_graph_output():
        return None
    if [node.op_type for node in readers] == ["HardSwish"]:
        return Gate(readers[0].outputs[0], -3.0)
    products = [node for node in readers if node.op_type == "Mul"]
    if len(readers) != 2 or len(products) != 1:
        return None
    (product,), (gate,) = products, [node for node in readers if node is not products[0]]
    closes = _closes(model, gate)
    if closes is None or set(product.inputs) != {value, closes.output}:
        return None
    return Gate(product.outputs[0], closes.at)


@dataclass(frozen=True, slots=True)
class _Closing:
    """The output of a gate, and up to which input it is zero; None where it only comes near."""

    output: Value
    at: float | None


def _closes(model: Model, gate: Node) -> _Closing | None:
    """Sigmoid, HardSigmoid, or Add of a constant and a Clip from zero on."""
    if gate.op_type == "Sigmoid":
        # it only comes near zero: others who read it see the difference
        alone = model.sole_reader(gate.outputs[0]) is not None
        return _Closing(gate.outputs[0], None) if alone else None
    if gate.op_type == "HardSigmoid":
        alpha, beta = float(attribute(gate, "alpha", 0.2)), float(attribute(gate, "beta", 0.5))
        return _Closing(gate.outputs[0], -beta / alpha) if alpha > 0 else None
    clip = model.sole_reader(gate.outputs[0])
    if gate.op_type != "Add" or clip is None or clip.op_type not in CLIPPING_ACTIVATIONS:
        return None
    shift = next((constant_scalar(v) for v in gate.inputs if v is not None and constant_array(v) is not None), None)
    bounds = clip_bounds(clip)
    if shift is None or bounds is None or bounds[0] != 0:
        return None
    return _Closing(clip.outputs[0], -shift)
