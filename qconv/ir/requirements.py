"""Decides which opset and which ONNX Runtime a result needs."""

from __future__ import annotations

from qconv.config.choices import WeightGranularity
from qconv.config.recipe import Recipe
from qconv.config.targets import HIGHEST_OPSET, LOWERED_OPSET, LOWEST_OPSET, OPSETS, parse_runtime
from qconv.errors import QconvError
from qconv.ir.model import Model
from qconv.ir.packed_codes import FEWEST_CODES, packed_width, packing_opset, packing_runtime

NEW_TYPES_OPSET = 21  # int4, int16 and blocks


def needed_opset(recipe: Recipe, own: int, largest: int | None = None) -> int:
    """The lowest opset that holds a model of opset `own` and the recipe's types, or the one that the recipe names.

    largest: elements of the largest constant, of few of which no codes are packed; None where it is not known.
    """
    new_types = (
        16 in {*recipe.bits_of_weights, *recipe.bits_of_activations, recipe.edge_bits}
        or recipe.weight_granularity is WeightGranularity.PER_BLOCK
    )
    if own > HIGHEST_OPSET:  # loading writes it as an older one
        own = LOWERED_OPSET
    needed = max(own, NEW_TYPES_OPSET if new_types else LOWEST_OPSET)
    if recipe.opset is None:
        forms, packs = recipe.packed_forms, recipe.pack and (largest is None or largest > FEWEST_CODES)
        widths = {packed_width(bits, forms) for bits in recipe.bits_of_weights if packs}
        whole = (bits for bits in widths if f"int{bits}" in forms)
        return max([needed, *(packing_opset(bits, recipe.oldest_runtime) for bits in whole)])
    if recipe.opset < needed:
        what = "the model's own opset" if needed == own else "what these types need"
        raise QconvError(
            f"--opset {recipe.opset} is below {what} ({needed}).", f"pass --opset {needed} or leave it out."
        )
    if recipe.opset not in OPSETS:
        raise QconvError(f"--opset {recipe.opset} is not known.", f"use {LOWEST_OPSET} to {HIGHEST_OPSET}.")
    return recipe.opset


def needed_runtime(model: Model, recipe: Recipe) -> str:
    """The oldest ONNX Runtime that runs the file right."""
    _, oldest = max((parse_runtime(version), version) for version, _ in _runtime_needs(model, recipe))
    return f"onnxruntime >= {oldest}"


def _runtime_needs(model: Model, recipe: Recipe) -> list[tuple[str, str]]:
    """Versions of ONNX Runtime that something in the file needs, each with what takes it away."""
    version = OPSETS.get(model.opset, OPSETS[HIGHEST_OPSET]).runtime
    hint = f"give a model, and bits, that opset {model.opset} is not needed for"
    needs = [(version, "pass a lower --opset" if recipe.opset == model.opset else hint)]
    if recipe.activation_bits < 32 and any(map(recipe.has_zero_points, recipe.bits_of_weights)):
        needs.append(("1.28", "pass --weight-scheme symmetric"))  # earlier ones refuse zero points that differ
    packed = packing_runtime(model)
    return needs if packed is None else [*needs, (packed, "pass --no-pack")]


def check_needs(model: Model, recipe: Recipe) -> None:
    """Raise QconvError where the file would need a newer ONNX Runtime than `--needs` says. model: before the work."""
    if recipe.needs is None:
        return
    for version, hint in _runtime_needs(model, recipe):
        if parse_runtime(version) > recipe.oldest_runtime:
            fact = f"--needs {recipe.needs}: the result would need ONNX Runtime {version}."
            raise QconvError(fact, f"{hint}, or leave --needs out.")
