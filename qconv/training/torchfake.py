"""Quantizer, Clips of codes and dequantizer as one step: the same numbers and gradients in a third of the time.

    y = round(clamp(x / s, low - z, high - z)) s        z = 0 where there is no zero point
    dy/dx = 1 inside, 0 outside                         dy/ds = sum of (y - x dy/dx) / s

Next to convolutions that a few cores compute, passes over memory are what costs. low, high: the narrowest of the type
and the Clips, so that no half step beyond the last code counts as inside.

Source: Esser et al. 2020, arXiv 1902.08153 (LSQ), equation 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qconv.training.torchmath import INT_RANGES, rounded, side_by_side
from qconv.training.torchop import Given, Op, Run, first, optional

Step = tuple[Op, list[str | None], list[str]]
FAKE = "FakeQuantize"


class _Fake(torch.autograd.Function):
    """With one scale. low, high: whole numbers, less the zero point."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: float, high: float) -> Tensor:
        step = float(scale.detach())
        y = torch.div(x, scale.reshape(()))
        y.clamp_(low, high).round_().mul_(scale.reshape(()))
        ctx.save_for_backward(x, y)
        ctx.step, ctx.ends, ctx.shape = step, (low * step, high * step), scale.shape
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), (x, y) = grads, ctx.saved_tensors
        grad = grad.contiguous()
        inside = torch.ops.aten.hardtanh_backward(grad, x, *ctx.ends)
        scale = None
        if ctx.needs_input_grad[1]:
            moved = torch.dot(grad.reshape(-1), y.reshape(-1)) - torch.dot(inside.reshape(-1), x.reshape(-1))
            scale = (moved / ctx.step).reshape(ctx.shape)
        return inside, scale, None, None


def _run(op: Op, given: Given) -> Tensor:
    """x, scale, zero point, then the limits of the Clips, lower and upper in turns."""
    x, scale, zero = first(given), given[1], optional(given, 2)
    assert scale is not None
    low, high = _ends(op, given)
    fixed = zero is None or (zero.numel() == 1 and not zero.requires_grad)
    if scale.numel() == 1 and fixed:
        middle = 0.0 if zero is None else float(zero)
        found: Tensor = _Fake.apply(x.contiguous(), scale, low - middle, high - middle)
        return found
    axis = op.get("axis", 1)
    step = side_by_side(scale, x, axis, 0)
    middles = torch.zeros_like(step) if zero is None else side_by_side(zero, x, axis, 0)
    return rounded(torch.clamp(x / step, low - middles, high - middles)) * step


def _ends(op: Op, given: Given) -> tuple[float, float]:
    """The lowest and the highest code."""
    low, high = (float(end) for end in INT_RANGES[op.codes or 0])
    low = max([low, *(float(end) for end in given[3::2] if end is not None)])
    return low, min([high, *(float(end) for end in given[4::2] if end is not None)])


FUSED: dict[str, Run] = {FAKE: _run}


@dataclass(frozen=True, slots=True)
class Drop:
    """Quantizers that leave a share of numbers, drawn anew each time, unrounded, but within their range: what learns
    behind them does not lean on the roundings of a few pictures.

    Source: Wei et al. 2022, arXiv 2203.05740 (QDrop).
    """

    share: float
    generator: torch.Generator

    def run(self, op: Op, given: Given) -> Tensor:
        """As `FUSED` does for the rest."""
        rounded_all = _run(op, given)
        x, scale, zero = first(given), given[1], optional(given, 2)
        assert scale is not None
        step = scale.detach() if scale.numel() == 1 else side_by_side(scale.detach(), x, op.get("axis", 1), 0)
        middle = torch.zeros_like(step)
        if zero is not None:
            middle = zero if zero.numel() == 1 else side_by_side(zero, x, op.get("axis", 1), 0)
        low, high = _ends(op, given)
        held = torch.minimum(torch.maximum(x, (low - middle) * step), (high - middle) * step)
        return self.mixed(rounded_all, held)

    def mixed(self, rounded_all: Tensor, exact: Tensor) -> Tensor:
        """A share of `exact` in what is rounded, number by number."""
        drawn = torch.rand(exact.shape, generator=self.generator).to(exact.device)
        return torch.where(drawn < self.share, exact, rounded_all)


def fakes(steps: Sequence[Step], constants: Mapping[str, Tensor]) -> dict[int, tuple[Step, frozenset[str]]]:
    """What can be run at once: number of the dequantizer -> the step, and the names of the codes that it hides."""
    made = {name: index for index, step in enumerate(steps) for name in step[2]}
    readers: dict[str, int] = {}
    for step in steps:
        for name in step[1]:
            readers[name or ""] = readers.get(name or "", 0) + 1
    found: dict[int, tuple[Step, frozenset[str]]] = {}
    for index, (op, read, written) in enumerate(steps):
        if op.op_type != "DequantizeLinear" or op.get("block_size", 0):
            continue
        limits: list[str | None] = []
        hidden: list[str] = []
        name = read[0] or ""
        before = steps[made[name]] if name in made else None
        while before is not None and before[0].op_type == "Clip" and readers[name] == 1:
            ends = (*before[1][1:], None, None)[:2]
            if not all(end is None or end in constants for end in ends):
                break
            limits += ends
            hidden.append(name)
            name = before[1][0] or ""
            before = steps[made[name]] if name in made else None
        if before is None or before[0].op_type != "QuantizeLinear" or readers[name] != 1:
            continue
        same = (before[1] + [None])[1:3] == (read + [None])[1:3] and before[0].get("axis", 1) == op.get("axis", 1)
        if same and not before[0].get("block_size", 0) and before[0].codes in INT_RANGES:
            fake = Op(op.name, FAKE, before[0].attributes, op.opset, codes=before[0].codes)
            hidden.append(name)
            found[index] = (fake, [*(before[1] + [None])[:3], *limits], written), frozenset(hidden)
    return found
