"""Leaves in float the few tensors that make most of the noise at the outputs, where that costs hardly any time.

A tensor whose channels reach unlike far, such as a SiLU on raw pixels, may alone lose what a whole network has. The
nodes that write it and read it then stay float, if the table of costs allows: together up to a share of the
network's time, FLOAT_BUDGET by default. Noises are those that the search for ranges has measured, with the ranges that
it has set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qconv.config.choices import FLOAT_BUDGET
from qconv.config.data_options import Preprocessing
from qconv.config.recipe import Recipe
from qconv.config.targets import TARGETS
from qconv.ir.model import Model, Node, Value
from qconv.planning.placement import FloatCost, is_placement_supported
from qconv.planning.plan import Plan

LOUD_SHARE = 0.25
"""Share of all noise from which on a tensor is loud."""

LOUD_NOISE = 0.01
"""Its noise beside the power of the outputs from which on that matters: 20 dB."""


@dataclass(frozen=True, slots=True)
class TensorNoise:
    """The noise at the outputs of tensors that share a range, alone, over the power of the outputs."""

    members: tuple[Value, ...]
    noise: float


def keep_loud_tensors_float(
    model: Model, plan: Plan, recipe: Recipe, fed: Preprocessing | None, noises: Sequence[TensorNoise]
) -> dict[str, str]:
    """The nodes to leave in float besides those that are, by name, each with the reason; the loudest tensors first.

    model: the folded network. fed: its preprocessing, which settles dynamic sizes; None for ready-made samples.
    """
    target = TARGETS[recipe.target]
    budget = FLOAT_BUDGET if recipe.float_budget is None else recipe.float_budget
    if not is_placement_supported(recipe, target) or not noises or not budget:
        return {}
    cost, found = FloatCost.of(model, plan, recipe, fed), dict[str, str]()
    floats: set[Node] = set()
    whole = sum(own.noise for own in noises)
    for own in sorted(noises, key=lambda own: -own.noise):
        share = own.noise / max(whole, LOUD_NOISE)
        if share < LOUD_SHARE or own.noise < LOUD_NOISE:
            break
        around = cost.spread(floats | _nodes_around(model, plan, own.members))
        if cost.share_of(around) <= budget:
            why = f"the rounding of {own.members[0].name} makes {share:.0%} of the noise at the outputs"
            found |= {node.name or "": why for node in around - floats}
            floats, whole = around, whole - own.noise
    return found


def _nodes_around(model: Model, plan: Plan, members: Sequence[Value]) -> set[Node]:
    """The nodes that write some tensors, or read them, on codes; a layer goes with the activation that it absorbs."""
    found: set[Node] = set()
    for value in members:
        made = value.producer()
        found |= {node for node in (made, *model.readers(value)) if node is not None}
    found |= {layer for activation, layer in plan.absorbed.items() if activation in found}
    return {node for node in found if node in plan.integer}
