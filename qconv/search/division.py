"""Divides a network into nodes on 8 bits, on 16 and in float, and says a division in a recipe that redoes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from qconv.calibration.sketch import Sketch
from qconv.config.choices import FLOAT_BITS, WIDE_BITS, LayerBits
from qconv.config.recipe import Recipe
from qconv.config.serialization import escape_glob
from qconv.passes.requantize import find_sketch, give_readers_copies
from qconv.planning.plan import Plan
from qconv.planning.planner import replan
from qconv.search.candidate import FoldedNetwork


def divide(folded: FoldedNetwork, *, floats: Mapping[str, str], wide: Mapping[str, str]) -> FoldedNetwork:
    """The network with these nodes in float and on 16 bits, by name with the reason; readers of unlike bits get copies.

    folded: undivided, with sketches of all that its own plan watches; its model stays as it is. Ranges that were set
    of a tensor whose bits are others now are chosen anew.
    """
    model = folded.model.copy()
    plan = replan(folded.plan, model, floats=floats, wide=wide)
    copied = give_readers_copies(model, plan, _with_unseen(plan, folded))
    before = {value.name: choice.spec for value, choice in folded.plan.activations.items()}
    changed = {value.name for value, choice in copied.plan.activations.items() if before.get(value.name) != choice.spec}
    ranges = {name: known for name, known in folded.set_ranges.items() if name not in changed}
    return FoldedNetwork(model, copied.plan, copied.sketches, ranges)


def _with_unseen(plan: Plan, folded: FoldedNetwork) -> dict[str, Sketch]:
    """The sketches, and those of tensors that only held what others do, as of a Concat that is in float now."""
    groups = plan.group_of().items()
    seen = folded.sketches.keys() | {value.name for value in plan.given}
    unseen = [value.name or "" for value, group in groups if not any(one.name in seen for one in group)]
    own = {name: find_sketch(folded.plan, name, folded.sketches) for name in unseen}
    return {**folded.sketches, **own}


def with_division(recipe: Recipe, wide: Iterable[str], floats: Iterable[str]) -> Recipe:
    """The recipe that redoes a division: nodes of these names on 16 bits and in float, and no others but by its rules.

    Weights keep the bits that the recipe gives them: a layer in float has its weights as codes, as one that is faster
    there; one that is all in float stays so.
    """
    bits = {**dict.fromkeys(wide, WIDE_BITS), **dict.fromkeys(floats, FLOAT_BITS)}
    known = {name: recipe.bits_of(name) for name in sorted(bits)}
    own = {escape_glob(name): LayerBits(of.weights, bits[name]) for name, of in known.items() if not of.in_float}
    rest = (line for line in recipe.layer_bits if line[0] not in own)
    return replace(recipe, layer_bits=(*own.items(), *rest), candidate_activation_bits=(8,), float_budget=None)


def found_bits(recipe: Recipe, plan: Plan) -> tuple[tuple[str, LayerBits], ...]:
    """What `--layer-bits` has to say for a recipe to give this plan; the bits of all weights where that is nothing."""
    found = with_division(recipe, plan.wide, plan.floats).layer_bits
    return found or tuple((escape_glob(layer.node.name or ""), LayerBits(layer.weight.bits)) for layer in plan.layers)
