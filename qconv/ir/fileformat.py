"""Which opset and IR version a result needs, what runs it, and what it carries about itself."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection
from typing import Any

from qconv.config.choices import WeightGranularity
from qconv.config.preprocessing import Preprocessing
from qconv.config.recipe import Recipe
from qconv.config.targets import IR_VERSIONS, LOWEST_OPSET, OLDEST_RUNTIMES
from qconv.errors import QconvError
from qconv.ir.graph import Model

PLACED = "qconv.placed"
FLOAT = "qconv.float"
"""Where a file tells the hash of the float model that it was made from."""
NEW_TYPES_OPSET = 21  # int4, int16 and blocks


def needed_opset(recipe: Recipe, own: int) -> int:
    """The lowest opset that holds a model of opset `own` and the recipe's types, or the one that the recipe names."""
    new_types = (
        recipe.pack
        or 16 in {*recipe.bits_of_weights, *recipe.bits_of_activations, recipe.edge_bits}
        or recipe.weight_granularity is WeightGranularity.PER_BLOCK
    )
    needed = max(own, NEW_TYPES_OPSET if new_types else LOWEST_OPSET)
    if recipe.opset is None:
        return needed
    if recipe.opset < needed:
        what = "the model's own opset" if needed == own else "what these types need"
        raise QconvError(
            f"--opset {recipe.opset} is below {what} ({needed}).", f"pass --opset {needed} or leave it out."
        )
    if recipe.opset not in IR_VERSIONS:
        raise QconvError(f"--opset {recipe.opset} is not known.", f"use {LOWEST_OPSET} to {max(IR_VERSIONS)}.")
    return recipe.opset


def needed_runtime(model: Model, recipe: Recipe) -> str:
    """The oldest ONNX Runtime that runs the file right."""
    version = OLDEST_RUNTIMES.get(model.opset, OLDEST_RUNTIMES[max(OLDEST_RUNTIMES)])
    in_integers = (bits for bits in recipe.bits_of_weights if recipe.activation_bits < 32 and not recipe.packs(bits))
    if any(map(recipe.has_zero_points, in_integers)):
        version = "1.28"  # earlier ones refuse per-channel zero points that differ
    return f"onnxruntime >= {version}"


def set_ir_version(model: Model) -> None:
    """The lowest that its opset may be in."""
    model.inner.ir_version = IR_VERSIONS.get(model.opset, max(IR_VERSIONS.values()))


def describe(
    model: Model,
    version: str,
    recipe: Recipe,
    preprocessing: Preprocessing | None,
    placed: Collection[str] = (),
    made_from: str = "",
) -> None:
    """Recipe, preprocessing and version travel in the file; nothing that differs from run to run does.

    placed: names of nodes that are in float because that is faster. made_from: hash of the float model.
    """
    set_ir_version(model)
    carried = {"qconv.version": version, "qconv.recipe": json.dumps(recipe.as_dict(), sort_keys=True)}
    if preprocessing is not None:
        carried["qconv.preprocessing"] = json.dumps(preprocessing.as_dict(), sort_keys=True)
    if made_from:
        carried[FLOAT] = made_from
    if placed:
        carried[PLACED] = json.dumps(sorted(placed))
    model.inner.metadata_props.update(carried)


def placed_in(model: Model) -> frozenset[str]:
    """The nodes that a file by qconv says it left in float on purpose; none for other files."""
    with contextlib.suppress(ValueError):
        names = json.loads(model.inner.metadata_props.get(PLACED, "[]"))
        if isinstance(names, list):
            return frozenset(map(str, names))
    return frozenset()


def recipe_in(model: Model) -> dict[str, Any]:
    """The recipe that a file by qconv was made with; empty for other files."""
    with contextlib.suppress(KeyError, ValueError):
        found = json.loads(model.inner.metadata_props["qconv.recipe"])
        return found if isinstance(found, dict) else {}
    return {}
