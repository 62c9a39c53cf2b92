"""`qconv quantize` quantizes a model with calibration images, or with each recipe of a file (--sweep)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from qconv.cli.command import require_names, run_command
from qconv.cli.options import HELP_WIDTH, quantize_options, require_output
from qconv.cli.output import CommandFiles, CommandResult, OutputOptions
from qconv.cli.recipe_file import GivenOptions, SavedRecipe, given_options
from qconv.cli.sweep import quantize_sweep
from qconv.config.choices import option_name
from qconv.config.data_options import DataOptions
from qconv.config.recipe import Recipe
from qconv.errors import QconvError
from qconv.reporter import Reporter

NAMED_FILES = ("stats", "save_stats", "layer_bits", "save_layer_bits", "save_recipe", "sweep")
WRITTEN_FILES = ("save_stats", "save_layer_bits", "save_recipe")


@click.command(context_settings=HELP_WIDTH)
@click.argument("model")
@quantize_options
def quantize(model: str, output: str | None, **options: Any) -> int:
    """Quantize MODEL ('-' reads standard input) with the pictures in --calib and check the result."""
    wanted = OutputOptions.take(options)
    given = given_options(options)
    options = given.values
    if model == "-" and output is None:
        raise click.UsageError("a model from standard input needs an output: pass -o FILE or '-o -'.")
    if not options["calib"] and options["stats"] is None:
        raise click.UsageError("pass the calibration pictures with --calib DIR.")
    named = {option_name(name): options[name] for name in NAMED_FILES}
    require_names({"--calib": options["calib"], "--output": output, **named})
    if options["sweep"] is not None:
        return quantize_sweep(model, output, given, wanted)
    return quantize_once(model, output, given, wanted)


def quantize_once(model: str, output: str | None, given: GivenOptions, wanted: OutputOptions) -> int:
    """Make one result. Returns the exit status."""
    options = given.values
    recipe, data = given.request()
    _require_distinct_places(given.read_files, output, *(options[name] for name in WRITTEN_FILES))
    require_streams(model, output, wanted.as_json)
    if wanted.csv == "-" and output == "-":
        raise click.UsageError("'-o -' and '--csv -' both go to standard output: name a file.")
    out = default_output(model, recipe) if output is None else output
    files = CommandFiles(
        (model,),
        (*data.paths, options["stats"], *given.read_files),
        {"the output": out, **{option_name(name): options[name] for name in WRITTEN_FILES}},
    )
    place = options["save_recipe"]
    saved = None if place is None else SavedRecipe.of(recipe, data, Path(place), files)

    def work(reporter: Reporter) -> CommandResult:
        result = _quantize(model, out, (recipe, data), wanted, reporter)
        if saved is not None:
            saved.write()
        return result

    return run_command(wanted, files, work)


def _quantize(
    model: str, out: str, request: tuple[Recipe, DataOptions], wanted: OutputOptions, reporter: Reporter
) -> CommandResult:
    from qconv.ir.files import Source, source_of
    from qconv.pipeline import quantize as pipeline_quantize
    from qconv.report import pages
    from qconv.report.console import show_report

    source = source_of(model)
    report, result = pipeline_quantize.quantize(source, None if out == "-" else out, *request, reporter)
    written = Source("the quantized model", None if result is not None else Path(out), result)
    return CommandResult(
        report.as_dict(),
        lambda stream: show_report(report, stream, verbose=wanted.verbose),
        report.as_dict()["tensors"],
        lambda command: pages.make_quantize_page(report, source, written, *request, command, reporter),
        report.gates,
        result,
    )


def require_streams(model: str, output: str | None, as_json: bool) -> None:
    """A shell can close streams (`>&-`): better said before the work than after it."""
    if model == "-" and sys.stdin is None:
        raise QconvError("Standard input is closed.", "pipe the model into it, or name its file.")
    if output == "-" and sys.stdout is not None and sys.stdout.isatty():
        raise QconvError(
            "The model would be written to the terminal.", "redirect standard output, or name a file with -o."
        )
    require_output(output == "-" or as_json)


def _require_distinct_places(read: list[str], *written: str | None) -> None:
    """The pipeline knows what files of options say, but not where they lie."""
    if read:
        from qconv.storage import refuse_overwriting_inputs

        for name in written:
            if name is not None:
                refuse_overwriting_inputs(Path(name), read)


def default_output(model: str, recipe: Recipe) -> str:
    """MODEL with its bits: `cat.onnx` becomes `cat.w8a8.onnx`, and `cat.mixed.onnx` where layers have their own."""
    path = Path(model)
    if not path.name:
        raise QconvError(f"{model or 'An empty name'} is no model.", "name an ONNX file.")
    stem = path.stem if path.suffix.lower() == ".onnx" else path.name
    own = recipe.searches or recipe.layer_bits
    bits = "mixed" if own else f"w{recipe.weight_bits}a{recipe.activation_bits}"
    return str(path.with_name(f"{stem}.{bits}.onnx"))
