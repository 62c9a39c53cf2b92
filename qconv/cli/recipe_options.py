"""Makes a Recipe and DataOptions of the parsed options of a command."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from qconv.cli.quantize_options import quantize_options
from qconv.config.choices import BLOCK_SIZE, GATE_OPTIONS, NAMED_RECIPES, NO_IMAGES, WeightGranularity
from qconv.config.data_options import (
    LABEL_OPTIONS,
    LETTERBOX_OPTIONS,
    Color,
    DataOptions,
    Layout,
    LetterboxAlign,
    PreprocessingOptions,
    ResizeFilter,
)
from qconv.config.recipe import Recipe, make_request
from qconv.config.serialization import read_layer_bits
from qconv.errors import QconvError

SAME_NAMED_FIELDS = (
    ("calib", "fallback", "samples", "batch", "seed", "weight_bits", "activation_bits", "edge_bits", "pack", "needs")
    + ("allow_matmul_nbits",)
    + ("max_drop", "target_size", "candidate_bits", "candidate_activation_bits", "save_layer_bits")
    + ("effort", "rounding")
    + ("calibrator", "percentile", "weight_calibrator", "bit_allocation", "bias_correction", "stats", "save_stats")
    + ("target", "equalize", "tune_ranges", "tune_latency", "float_budget", "scale_gates", "saturation_safe")
    + ("keep_float", "keep_float_op", "opset", "embed_preprocessing", *GATE_OPTIONS, "threads", "task", "decode")
    + LABEL_OPTIONS
)  # fmt: skip
"""Options that `make_request` calls the same."""


def make_request_of_fields(fields: Mapping[str, Any]) -> tuple[Recipe, DataOptions]:
    """The recipe and the images of these options; what does not go together is a usage error."""
    with raise_usage_errors():
        return make_request(fields)


@contextlib.contextmanager
def raise_usage_errors() -> Iterator[None]:
    """Make usage errors of values that are not possible, or do not go together."""
    try:
        yield
    except QconvError as error:
        raise click.UsageError(f"{error.message} {error.hint[:1].upper()}{error.hint[1:]}") from None


def collect_fields(options: dict[str, Any], typed: Collection[str] | None = None) -> dict[str, Any]:
    """What options say of the recipe and the images, as `make_request` takes it, before any follows from others.

    typed: those that a named recipe does not replace; None for those of the running command.
    """
    given = find_typed_options() if typed is None else typed
    name = options["recipe_name"]
    named = (
        {} if name is None else {option: value for option, value in NAMED_RECIPES[name].items() if option not in given}
    )
    options = {**options, **named}
    granularity, block_size = options["weight_granularity"], options["block_size"]
    if block_size is not None and granularity != WeightGranularity.PER_BLOCK:
        raise click.UsageError(f"--block-size is for --weight-granularity per-block, not {granularity}.")
    bits = options["layer_bits"]
    return {
        "layer_bits": read_layer_bits(Path(bits)) if isinstance(bits, str) else bits or (),
        "block_size": block_size or BLOCK_SIZE,
        "glob": options["pattern"],
        "weight_scheme": options["weight_scheme"],
        "activation_scheme": options["activation_scheme"],
        "weight_granularity": WeightGranularity(options["weight_granularity"]),
        "preprocessing": make_preprocessing_options(options),
        **{name: options[name] for name in SAME_NAMED_FIELDS},
        **{name: options[name] or "" for name in ("calibrator", "bias_correction")},  # what follows from the others
    }


def require_images(calib: Collection[str], why: str) -> None:
    """Usage errors for a command that needs some. why: what it does with them."""
    if not calib:
        raise click.UsageError("pass the calibration pictures with --calib DIR.")
    if NO_IMAGES in calib:
        fix = f"pass some with --calib; a folder of that name is ./{NO_IMAGES}."
        raise click.UsageError(f"--calib {NO_IMAGES} leaves no pictures, and {why}: {fix}")


def quantize_parameters() -> list[click.Option]:
    """The options of `quantize`."""
    command = click.command()(quantize_options(lambda: None))
    return [option for option in command.params if isinstance(option, click.Option)]


def select_options_without(names: Collection[str]) -> list[click.Parameter]:
    """The options of `quantize`, but for those of these names."""
    return [option for option in quantize_parameters() if option.name not in names]


def find_typed_options() -> frozenset[str]:
    """The options of the running command that were typed."""
    context = click.get_current_context(silent=True)
    if context is None:
        return frozenset()
    return frozenset(n for n in context.params if context.get_parameter_source(n) is not ParameterSource.DEFAULT)


def make_preprocessing_options(options: dict[str, Any]) -> PreprocessingOptions:
    """What the options of `preprocessing_options` say. Values that do not go together are usage errors."""
    scale = options["scale"]
    if scale is not None and len(scale) != 1:
        raise click.UsageError("--scale takes one number.")
    with raise_usage_errors():
        return PreprocessingOptions(
            preset=options["preprocess"],
            scale=None if scale is None else scale[0],
            mean=options["mean"],
            std=options["std"],
            color=None if options["color"] is None else Color(options["color"]),
            layout=None if options["layout"] is None else Layout(options["layout"]),
            resize=options["resize"],
            filter=None if options["filter_"] is None else ResizeFilter(options["filter_"]),
            size=options["size"],
            letterbox_align=None if options["letterbox_align"] is None else LetterboxAlign(options["letterbox_align"]),
            letterbox_fill=options["letterbox_fill"],
        )


PREPROCESSING_OPTIONS = (
    *("preprocess", "scale", "mean", "std", "color", "layout", "resize", "filter_", "size"),
    *LETTERBOX_OPTIONS,
)


def take_preprocessing_options(options: dict[str, Any]) -> PreprocessingOptions:
    """Take the options of `preprocessing_options` out of others."""
    return make_preprocessing_options({name: options.pop(name) for name in PREPROCESSING_OPTIONS})
