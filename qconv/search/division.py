"""Divides a network into nodes on 8 bits, on 16 and in float, and says a division in a recipe that redoes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from qconv.config.choices import FLOAT_BITS, WIDE_BITS, LayerBits
from qconv.config.recipe import Recipe
from qconv.config.serialization import escape_glob
from qconv.passes.requantize import give_readers_copies
from qconv.planning.planner import replan
from qconv.search.candidate import FoldedNetwork


def divide(folded: FoldedNetwork, *, floats: Mapping[str, str], wide: Mapping[str, str]) -> FoldedNetwork:
    """The network with these nodes in float and on 16 bits, by name with the reason; readers of unlike bits get copies.

    folded: undivided, with sketches of all that its own plan watches; its model stays as it is. Ranges that were set
    of a tensor whose bits are others now are chosen anew.
    """
    model = folded.model.copy()
    plan = replan(folded.plan, model, floats=floats, wide=wide)
    copied = give_readers_copies(model, plan, folded.sketches)
    before = {value.name: choice.spec for value, choice in folded.plan.activations.items()}
    changed = {value.name for value, choice in copied.plan.activations.items() if before.get(value.name) != choice.spec}
    ranges = {name: known for name, known in folded.set_ranges.items() if name not in changed}
    return FoldedNetwork(model, copied.plan, copied.sketches, ranges)


def with_division(recipe: Recipe, wide: Iterable[str], floats: Iterable[str]) -> Recipe:
    """The recipe that redoes a division: nodes of these names on 16 bits and in float, and no others but by its rules.

    Weights keep the bits that the recipe gives them: a layer in float has its weights as codes, as one that is faster
    there.
    """
    bits = {**dict.fromkeys(wide, WIDE_BITS), **dict.fromkeys(floats, FLOAT_BITS)}
    own = ((escape_glob(name), LayerBits(recipe.bits_of(name).weights, wish)) for name, wish in sorted(bits.items()))
    return replace(recipe, layer_bits=(*own, *recipe.layer_bits), candidate_activation_bits=(8,))
