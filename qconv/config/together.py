"""What of a Recipe goes together, and what does not: each check raises QconvError with the way out.

They are called while a Recipe is made, after its own numbers were looked at.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from qconv.config.checks import require, spelt
from qconv.config.choices import CHANNEL_CALIBRATORS, NO_PICTURES, LayerBits, Scheme, WeightGranularity
from qconv.config.pixels import Layout
from qconv.config.targets import TARGETS

if TYPE_CHECKING:
    from qconv.config.recipe import Recipe

PICTURES_ONLY = ("samples", "batch", "seed", "glob")
"""Options on how pictures are read."""


def check_bias_correction(recipe: Recipe) -> None:
    """Layers that are looked at one after the other."""
    if recipe.bias_correction != "sequential":
        return
    told = "--bias-correction sequential with"
    hint = "leave it out: weights of second order have such biases."
    require(recipe.rounding == "nearest", f"{told} --rounding {recipe.rounding}", hint)
    require(not recipe.searches, f"{told} a search for bits", "search first, then pass what is found.")
    require(bool(recipe.calib), f"{told} --stats alone", "it looks at pictures again: pass some with --calib.")


def check_allocation(recipe: Recipe) -> None:
    """Channels with bits of their own."""
    told = f"--bit-allocation {recipe.bit_allocation} with"
    if recipe.allocates_weights:
        fix = "use 2 to 7: no channel can have more than 8."
        require(recipe.weight_bits < 8, f"{told} --weight-bits {recipe.weight_bits}", fix)
        whole = recipe.weight_granularity is not WeightGranularity.PER_CHANNEL
        fact = f"{told} --weight-granularity {recipe.weight_granularity}"
        require(not whole, fact, "use per-channel: bits go with scales.")
        require(not recipe.pack, f"{told} --pack", "leave one of them out: int4 holds no more than 4 bits.")
    if recipe.allocates_activations:
        require(recipe.activation_bits <= 8, f"{told} --activation-bits {recipe.activation_bits}", "use 2 to 8.")
        fact = f"{told} --calibrator {recipe.calibrator}"
        known = " or ".join(CHANNEL_CALIBRATORS)
        require(recipe.calibrator in CHANNEL_CALIBRATORS, fact, f"use {known}, which know a range for each channel.")
        fact = f"{told} --target {recipe.target}"
        whole = TARGETS[recipe.target].inputs_only
        require(not whole, fact, "use ort-cpu or generic: others take one scale a tensor.")


def check_layer_bits(recipe: Recipe) -> None:
    """Bits of single layers."""
    entries = recipe.layer_bits
    paired = isinstance(entries, tuple) and all(isinstance(entry, tuple) and len(entry) == 2 for entry in entries)
    fix = "pass pairs of a glob and LayerBits(weights=4)."
    require(paired and all(isinstance(bits, LayerBits) for _, bits in entries), f"layer_bits {entries!r}", fix)
    for glob, bits in entries:
        told = f"--layer-bits: {glob!r} with"
        require(bits.impossible is None, f"{told} {bits.impossible}", "use 2 to 8, or 16.")
        fact = f"{told} activations of {bits.activations} bits beside --activation-bits 32"
        both = bits.activations is not None and recipe.activation_bits == 32
        require(not both, fact, "leave one of them out: 32 quantizes weights alone.")


def check_target(recipe: Recipe) -> None:
    """What the target would reject is better said before the work."""
    target = TARGETS[recipe.target]
    for glob, bits in recipe.layer_bits:
        for kind, wish, takes in (
            ("weights", bits.weights, target.weight_bits),
            ("activations", bits.activations, target.activation_bits),
        ):
            fact = f"--layer-bits: {glob!r} with {kind} of {wish} bits and --target {recipe.target}"
            require(wish is None or wish in takes, fact, f"{target.why}.")
    demands: tuple[tuple[str, Any, Collection[Any]], ...] = (
        ("weight-bits", recipe.weight_bits, target.weight_bits),
        ("edge-bits", recipe.edge_bits, target.weight_bits),
        ("activation-bits", recipe.activation_bits, target.activation_bits),
        ("weight-scheme", recipe.weight_scheme or Scheme.SYMMETRIC, target.weight_schemes),
        ("activation-scheme", recipe.activation_scheme, target.activation_schemes),
        ("weight-granularity", recipe.weight_granularity, target.granularities),
        ("pack", recipe.pack, {False, target.packs}),
        ("embed-preprocessing", recipe.embed_preprocessing, {None, *(Layout if target.takes_pixels else ())}),
    )
    for option, value, accepted in demands:
        given = f"--{option}" if value is True else f"--{option} {value}"
        require(value in accepted, f"{given} with --target {recipe.target}", f"{target.why}.")
    tunable = target.costs is not None and recipe.runs_in_integers
    hint = "it is for target ort-cpu and layers that can run in integers: weights of 2 to 8 bits, activations of 8."
    require(tunable or not recipe.tune_latency, "--tune-latency with these options", hint)
    if recipe.saturation_safe is not None:
        option = "--saturation-safe" if recipe.saturation_safe else "--no-saturation-safe"
        require(target.pairs, f"{option} with --target {recipe.target}", "leave it out: x86 CPUs are meant.")
        integers = recipe.activation_bits <= 8 and recipe.weight_bits <= 8  # of most layers
        require(integers, f"{option} with these bits", "leave it out: products are of float then.")


def check_data_free(recipe: Recipe) -> None:
    """What looks at pictures has no use where there are none; and what replaces them has none where there are."""
    told = f"with --calib {NO_PICTURES}"
    if not recipe.data_free:
        fact = f"--fallback without --calib {NO_PICTURES}"
        require(recipe.fallback is None, fact, "leave it out: pictures are read.")
        return
    fact = f"--calib {NO_PICTURES} beside pictures"
    require(not recipe.calib, fact, f"leave one of them out; a folder of that name is ./{NO_PICTURES}.")
    _require_defaults(recipe, PICTURES_ONLY, told)
    for name in ("stats", "save_stats"):
        require(getattr(recipe, name) is None, f"{spelt(name)} {told}", "leave one of them out: nothing is watched.")
    gated = recipe.min_agreement is not None or recipe.min_sqnr is not None
    require(not gated, f"A gate {told}", "leave it out, and measure the result with `qconv evaluate`.")
    require(not recipe.searches, f"A search for bits {told}", "pass pictures to measure on with --calib.")
    hint = "it looks at pictures: pass some with --calib, or leave it out."
    require(recipe.effort != "best", f"--effort best {told}", hint)
    require(recipe.rounding in (None, "nearest"), f"--rounding {recipe.rounding} {told}", hint)
    require(not recipe.tune_ranges, f"--tune-ranges {told}", hint)
    known = recipe.bias_correction in ("", "analytic", "none")
    require(known, f"--bias-correction {recipe.bias_correction} {told}", "use analytic or none: nothing is watched.")


def check_statistics(recipe: Recipe) -> None:
    """Statistics are no pictures."""
    alone = recipe.stats is not None and not recipe.calib
    gated = recipe.min_agreement is not None or recipe.min_sqnr is not None
    require(not (gated and alone), "A gate with --stats alone", "pass pictures to measure on with --calib.")
    if alone:
        _require_defaults(recipe, ("samples", "seed", "glob"), "with --stats alone")
    require(recipe.stats is None or recipe.save_stats is None, "--stats with --save-stats", "copy the file instead.")
    for name in ("equalize", "tune_ranges"):
        fact = f"{spelt(name)} with --stats"
        hint = "it looks at pictures again, which statistics are not: leave one of them out."
        require(not getattr(recipe, name) or recipe.stats is None, fact, hint)


def _require_defaults(recipe: Recipe, names: Collection[str], told: str) -> None:
    for part in fields(recipe):
        if part.name in names:
            idle = getattr(recipe, part.name) == part.default
            require(idle, f"{spelt(part.name)} {told}", "leave it out: no picture is read.")
