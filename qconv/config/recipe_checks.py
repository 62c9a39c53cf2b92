"""Defines which options of a `Recipe` go together, and what its images have to be.

Each check raises a QconvError that names both options and the way out.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from qconv.config.choices import (
    CHANNEL_CALIBRATORS,
    FEW_BITS_CALIBRATOR,
    FLOAT_BITS,
    INT4_BITS,
    INT4_OPSET,
    INT4_RUNTIME,
    NO_IMAGES,
    OLDEST_RUNTIME,
    PACKED_BITS,
    WIDE_BITS,
    Scheme,
    WeightGranularity,
    option_name,
    require,
)
from qconv.config.data_options import LABEL_OPTIONS, DataOptions, Layout
from qconv.config.targets import TARGETS, parse_runtime

if TYPE_CHECKING:
    from qconv.config.recipe import Recipe


def check_bias_correction(recipe: Recipe) -> None:
    """Layers that are looked at one after the other."""
    if recipe.bias_correction != "sequential":
        return
    told = "--bias-correction sequential with"
    hint = "leave it out: weights of second order have such biases."
    require(recipe.rounding == "nearest", f"{told} --rounding {recipe.rounding}", hint)
    require(not recipe.searches, f"{told} a search for bits", "search first, then pass what is found.")


def check_allocation(recipe: Recipe) -> None:
    """Channels with bits of their own."""
    told = f"--bit-allocation {recipe.bit_allocation} with"
    if recipe.allocates_weights:
        fix = "use 2 to 7: no channel can have more than 8."
        require(recipe.weight_bits < 8, f"{told} --weight-bits {recipe.weight_bits}", fix)
        whole = recipe.weight_granularity is not WeightGranularity.PER_CHANNEL
        fact = f"{told} --weight-granularity {recipe.weight_granularity}"
        require(not whole, fact, "use per-channel: bits go with scales.")
        require(not recipe.pack, f"{told} --pack", "leave one of them out: channels of most layers have up to 8 bits.")
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
    for glob, bits in recipe.layer_bits:
        told = f"--layer-bits: {glob!r} with"
        require(bits.impossible is None, f"{told} {bits.impossible}", "use 2 to 8, or 16.")
        fact = f"{told} activations of {bits.activations} bits beside --activation-bits 32"
        both = bits.activations is not None and recipe.activation_bits == 32
        require(not both, fact, "leave one of them out: 32 quantizes weights alone.")


def format_bits(chosen: Collection[int]) -> str:
    """Numbers of bits as they are typed, float among them."""
    return ",".join("float" if bits == FLOAT_BITS else str(bits) for bits in chosen)


def check_candidate_activation_bits(recipe: Recipe) -> None:
    """What a tensor may have in place of 8 bits, where these lose too much."""
    chosen = recipe.candidate_activation_bits
    if chosen is None:
        return
    told = f"--candidate-activation-bits {format_bits(chosen)}"
    require(set(chosen) <= {8, WIDE_BITS, FLOAT_BITS}, told, "use 8 and one or both of 16 and float.")
    require(8 in chosen, told, "name 8 as well: it is what most tensors have.")
    fact = f"{told} with --activation-bits {recipe.activation_bits}"
    require(recipe.activation_bits == 8, fact, "leave one of them out: candidates take the place of 8 bits.")
    allowed = TARGETS[recipe.target].candidate_activation_bits
    own, named = TARGETS[recipe.target].on_ort, format_bits(sorted(allowed))
    why = ": 16 bits run in float there" if own else f": {TARGETS[recipe.target].why}"
    require(set(chosen) <= allowed, f"{told} with --target {recipe.target}", f"use {named}{why}.")
    if len(chosen) > 1:
        hint = "leave one of them out: nothing may have more than 8 bits with a budget of 0."
        require(recipe.float_budget != 0, f"{told} with --float-budget 0", hint)
        require_measured(recipe, told)


def check_float_budget(recipe: Recipe) -> None:
    """A budget that nothing is spent of is no budget; 0 goes with everything."""
    if recipe.float_budget is None:
        return
    told = f"--float-budget {recipe.float_budget:g}"
    require(0 <= recipe.float_budget <= 1, told, "use a share from 0 to 1.")
    if recipe.float_budget == 0:
        return
    fact = f"{told} with --activation-bits {recipe.activation_bits}"
    require(recipe.activation_bits == 8, fact, "leave one of them out: it is spent in place of 8 bits.")
    alone, hint = recipe.candidate_activation_bits == (8,), "name float as well: with 8 alone nothing has more bits."
    require(not alone, f"{told} with --candidate-activation-bits 8", hint)
    hint = "leave one of them out: they say already which nodes have more than 8 bits."
    require(recipe.high_precision is not None, f"{told} with these bits of layers", hint)
    require_measured(recipe, told)
    integers = TARGETS[recipe.target].costs is None or recipe.runs_in_integers
    hint = "leave it out: it is for weights of up to 8 bits, not in blocks, and activations of 8."
    require(integers, f"{told} where layers do not run in integers", hint)


def require_measured(recipe: Recipe, told: str) -> None:
    """What 8 bits lose has to be known. told: the option that asks for it."""
    hint = "pass some with --calib, or leave it out: what 8 bits lose is measured on them."
    require(not recipe.data_free, f"{told} without pictures", hint)
    require(recipe.stats is None, f"{told} with --stats", "leave one of them out: pictures are looked at again.")
    hint = "pass --tune-ranges as well: what 8 bits lose is measured by it; or leave it out."
    require(recipe.tune_ranges or recipe.divides_by_statistics, f"{told} without --tune-ranges", hint)


def check_weights_alone(recipe: Recipe) -> None:
    """Options for activations mislead where these stay float."""
    if recipe.activation_bits != 32:
        fact = f"--allow-matmul-nbits with --activation-bits {recipe.activation_bits}"
        require(not recipe.allow_matmul_nbits, fact, "leave one of them out: it is for weights alone.")
        return
    on_ort = TARGETS[recipe.target].on_ort or not recipe.allow_matmul_nbits
    require(on_ort, f"--allow-matmul-nbits with --target {recipe.target}", "leave it out: it is for ONNX Runtime.")
    hint = "leave one of them out: with 32 activations stay float."
    usual = recipe.calibrator in ("", FEW_BITS_CALIBRATOR)
    require(usual, f"--calibrator {recipe.calibrator} with --activation-bits 32", hint)
    require(not recipe.tune_ranges, "--tune-ranges with --activation-bits 32", hint)


def check_target(recipe: Recipe) -> None:
    """What the target would reject is better said before the work."""
    target = TARGETS[recipe.target]
    for glob, bits in recipe.layer_bits:
        for kind, wish, takes in (
            ("weights", bits.weights, target.weight_bits),
            ("activations", bits.activations, target.activation_bits),
        ):
            fact = f"--layer-bits: {glob!r} with {kind} of {wish} bits and --target {recipe.target}"
            require(wish in (None, FLOAT_BITS) or wish in takes, fact, f"{target.why}.")
    demands: tuple[tuple[str, Any, Collection[Any]], ...] = (
        ("weight-bits", recipe.weight_bits, target.weight_bits),
        ("edge-bits", recipe.edge_bits, target.weight_bits),
        ("activation-bits", recipe.activation_bits, target.activation_bits),
        ("weight-scheme", recipe.weight_scheme or Scheme.SYMMETRIC, target.weight_schemes),
        ("activation-scheme", recipe.activation_scheme, target.activation_schemes),
        ("weight-granularity", recipe.weight_granularity, target.granularities),
        ("embed-preprocessing", recipe.embed_preprocessing, {None, *(Layout if target.takes_pixels else ())}),
    )
    for option, value, accepted in demands:
        given = f"--{option}" if value is True else f"--{option} {value}"
        require(value in accepted, f"{given} with --target {recipe.target}", f"{target.why}.")
    tunable = target.costs is not None and recipe.runs_in_integers
    hint = "it is for target ort-cpu and layers that can run in integers: weights of 2 to 8 bits, activations of 8."
    require(tunable or not recipe.tune_latency, "--tune-latency with these options", hint)
    if recipe.scale_gates:
        hint = "leave it out: it goes by --tune-ranges, which looks at pictures, and is for activations of 2 to 8 bits."
        searched = recipe.tune_ranges and min(recipe.bits_of_activations) <= 8
        require(bool(searched), "--scale-gates with these options", hint)
    if recipe.saturation_safe is not None:
        option = "--saturation-safe" if recipe.saturation_safe else "--no-saturation-safe"
        require(
            target.saturates_int16_pairs, f"{option} with --target {recipe.target}", "leave it out: x86 CPUs are meant."
        )
        integers = recipe.activation_bits <= 8 and recipe.weight_bits <= 8  # of most layers
        require(integers, f"{option} with these bits", "leave it out: products are of float then.")


def check_packing(recipe: Recipe) -> None:
    """Codes that fill their bytes cannot be packed; and what the file may need is a version."""
    if recipe.needs is not None:
        found = parse_runtime(recipe.needs)
        own = ".".join(map(str, OLDEST_RUNTIME))
        require(found >= OLDEST_RUNTIME, f"--needs {recipe.needs}", f"use {own} or newer: that is what was measured.")
    fact = f"--pack with {recipe.weight_bits}-bit weights"
    hint = f"pass --weight-bits {PACKED_BITS} or fewer, for some layers at least: codes of 8 bits fill their bytes."
    require(not recipe.pack or min(recipe.bits_of_weights) <= PACKED_BITS, fact, hint)
    forms, why = recipe.packed_forms, TARGETS[recipe.target].why_packed
    if recipe.pack and "bytes" not in forms:
        told = f"with --target {recipe.target}"
        require(bool(forms), f"--pack {told}", f"{why}.")
        hint = f"{why}: pass --weight-bits {INT4_BITS} or fewer, for some layers at least, or leave --pack out."
        require(min(recipe.bits_of_weights) <= INT4_BITS, f"{fact} and --target {recipe.target}", hint)
        own = ".".join(map(str, INT4_RUNTIME))
        hint = f"{why}, which needs {own} or newer and opset {INT4_OPSET}: leave that or --pack out."
        require(recipe.oldest_runtime >= INT4_RUNTIME, f"--pack {told} and --needs {recipe.needs}", hint)
        require((recipe.opset or INT4_OPSET) >= INT4_OPSET, f"--pack {told} and --opset {recipe.opset}", hint)


def check_data_free(recipe: Recipe) -> None:
    """What looks at pictures has no use where there are none; and what replaces them has none where there are."""
    told = f"with --calib {NO_IMAGES}"
    if not recipe.data_free:
        fact = f"--fallback without --calib {NO_IMAGES}"
        require(recipe.fallback is None, fact, "leave it out: pictures are read.")
        return
    for name in ("stats", "save_stats"):
        require(
            getattr(recipe, name) is None, f"{option_name(name)} {told}", "leave one of them out: nothing is watched."
        )
    require(not recipe.is_gated, f"A gate {told}", "leave it out, and measure the result with `qconv evaluate`.")
    require(not recipe.searches, "A search for bits without pictures", "pass pictures to measure on with --calib.")
    hint = "it looks at pictures: pass some with --calib, or leave it out."
    require(recipe.effort != "best", f"--effort best {told}", hint)
    require(recipe.rounding in (None, "nearest"), f"--rounding {recipe.rounding} {told}", hint)
    require(not recipe.tune_ranges, f"--tune-ranges {told}", hint)
    known = recipe.bias_correction in ("", "analytic", "none")
    require(known, f"--bias-correction {recipe.bias_correction} {told}", "use analytic or none: nothing is watched.")


def check_statistics(recipe: Recipe) -> None:
    """Statistics are no pictures."""
    require(recipe.stats is None or recipe.save_stats is None, "--stats with --save-stats", "copy the file instead.")
    for name in ("equalize", "tune_ranges"):
        fact = f"{option_name(name)} with --stats"
        hint = "it looks at pictures again, which statistics are not: leave one of them out."
        require(not getattr(recipe, name) or recipe.stats is None, fact, hint)


OF_PICTURES = ("samples", "batch", "seed", "glob", "decode", *LABEL_OPTIONS)
"""What no picture is read for."""


def check_data(recipe: Recipe, data: DataOptions) -> None:
    """What the recipe needs of the images, and what none of them can be told."""
    if recipe.data_free:
        fact = f"--calib {NO_IMAGES} beside pictures"
        require(not data.paths, fact, f"leave one of them out; a folder of that name is ./{NO_IMAGES}.")
        data.require_defaults(OF_PICTURES, f"with --calib {NO_IMAGES}")
        return
    require(
        bool(data.paths) or not recipe.searches,
        "A search for bits without pictures",
        "pass pictures to measure on with --calib.",
    )
    if recipe.stats is None or data.paths:
        return
    hint = "it looks at pictures again: pass some with --calib."
    require(recipe.rounding == "nearest", f"--rounding {recipe.rounding} with --stats alone", hint)
    require(recipe.bias_correction != "sequential", "--bias-correction sequential with --stats alone", hint)
    require(not recipe.is_gated, "A gate with --stats alone", "pass pictures to measure on with --calib.")
    data.require_defaults(OF_PICTURES, "with --stats alone")
