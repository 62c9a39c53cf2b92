"""Divides a network into nodes on 8 bits, on 16 and in float, and says a division in a recipe that redoes it.

Ranges and biases hang on sketches of tensors. Those of copies, which `passes.requantize` puts between nodes of unlike
bits, are the sketches of what they copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce

from qconv.calibration.sketch import Sketch
from qconv.config.choices import FLOAT_BITS, WIDE_BITS, LayerBits
from qconv.config.recipe import Recipe
from qconv.config.serialization import escape_glob
from qconv.errors import Change
from qconv.ir.model import Model
from qconv.passes.requantize import (
    convert_between_widths,
    describe_conversion,
    describe_requantization,
    requantize_for_layers,
)
from qconv.planning.plan import Plan
from qconv.planning.planner import replan
from qconv.search.candidate import FoldedNetwork


@dataclass(frozen=True, slots=True)
class CopiedReaders:
    """A plan of a network whose readers of unlike bits have copies. sketches: those of copies, too. changes: told."""

    plan: Plan
    sketches: Mapping[str, Sketch]
    changes: list[Change]


def give_readers_copies(model: Model, plan: Plan, sketches: Mapping[str, Sketch]) -> CopiedReaders:
    """Give readers that want other bits of a tensor a copy of it, in place.

    plan: of the model before. sketches: of its tensors; may be empty where nothing has been watched yet.
    """
    changes: list[Change] = []
    for give, describe in (
        (convert_between_widths, describe_conversion),
        (requantize_for_layers, describe_requantization),
    ):
        found = give(model, plan)
        if not found:
            continue
        changes += describe(found)
        if sketches:
            sketches = {**sketches, **{copy: _find_sketch(plan, name, sketches) for name, copy in found.items()}}
        plan = replan(plan, model)
    return CopiedReaders(plan, sketches, changes)


def _find_sketch(plan: Plan, name: str, sketches: Mapping[str, Sketch]) -> Sketch:
    """The sketch of a quantized tensor; of one that only holds what others do, that of these together."""
    if name in sketches:
        return sketches[name]
    group = next(group for value, group in plan.group_of().items() if value.name == name)
    return reduce(Sketch.join, (sketches[value.name or ""] for value in group if value.name in sketches))


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
