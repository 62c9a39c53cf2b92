"""`qconv quantize` quantizes a model with calibration images, or with each recipe of a file (--sweep).

    [w8a8]                      # as the command line says

    [w4]
    weight-bits = 4
    effort = "best"
    keep-float = ["stem*", "head*"]
    tune-ranges = false         # --no-tune-ranges

    [ours]
    recipe = "ours.toml"        # options of a file; those that stand here win

A recipe of a sweep is the command line with these options put over it. What says which images are read, or where
things are written, cannot differ.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qconv.cli.command import CommandFiles, CommandResult, OutputOptions, print_to, require_names, run_command
from qconv.cli.options import HELP_WIDTH, require_output
from qconv.cli.quantize_options import quantize_options
from qconv.cli.recipe_file import NOT_IN_RECIPES, GivenOptions, RecipeTable, SavedRecipe, given_options
from qconv.cli.recipe_options import PREPROCESSING_OPTIONS, quantize_parameters, require_images
from qconv.config.choices import GATE_OPTIONS, option_name
from qconv.config.data_options import LABEL_OPTIONS, DataOptions
from qconv.config.recipe import Recipe
from qconv.config.serialization import LAYER_BITS_KEY, read_toml
from qconv.errors import QconvError
from qconv.reporter import Reporter

if TYPE_CHECKING:
    from qconv.analysis.trials import SweepEntry
    from qconv.report.html import Page

NAMED_FILES = ("stats", "save_stats", "layer_bits", "save_layer_bits", "save_recipe", "sweep")
WRITTEN_FILES = ("save_stats", "save_layer_bits", "save_recipe")

SHARED_OPTIONS = (NOT_IN_RECIPES - {"recipe"}) | frozenset(
    {"calib", "fallback", "samples", "batch", "seed", "pattern", "stats", *GATE_OPTIONS, *LABEL_OPTIONS}
    | {*PREPROCESSING_OPTIONS, "task", "decode", "threads", "embed_preprocessing"}
)
"""Options that no recipe of a sweep has of its own."""

CANNOT_DIFFER = ("which cannot differ from recipe to recipe", "pass --{key} on the command line, for all of them.")

SINGLE_RUN_OPTIONS = ("stats", "save_stats", "save_layer_bits", "save_recipe", *GATE_OPTIONS)
"""Options that are about one result."""

EXAMPLE_HINT = (
    'write a table for each recipe: [w4] and below it options of quantize, as weight-bits = 4 or effort = "best"'
)


@click.command(context_settings=HELP_WIDTH, short_help="Quantize a model and check the result.")
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
    if options["save_recipe"] == "-":
        raise click.UsageError("--save-recipe needs the name of a file.")
    named = {option_name(name): options[name] for name in NAMED_FILES}
    labels = {option_name(name): options[name] for name in LABEL_OPTIONS}
    require_names({"--calib": options["calib"], "--output": output, **labels, **named})
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
        (*data.paths, options["stats"], *given.read_files, *(options[name] for name in LABEL_OPTIONS)),
        {"the output": out, **{option_name(name): options[name] for name in WRITTEN_FILES}},
    )
    place = options["save_recipe"]
    saved = None if place is None else SavedRecipe.of(recipe, data, Path(place), files)

    def work(reporter: Reporter) -> CommandResult:
        result = _quantize(model, out, (recipe, data), wanted, reporter)
        if saved is not None:
            saved.write()
        return result

    return run_command(wanted, files, work, imports="qconv.pipeline.quantize")


def _quantize(
    model: str, out: str, request: tuple[Recipe, DataOptions], wanted: OutputOptions, reporter: Reporter
) -> CommandResult:
    from qconv.ir.files import Source, source_of
    from qconv.pipeline import quantize as pipeline_quantize
    from qconv.report.console import show_report

    source = source_of(model)
    report, result = pipeline_quantize.quantize(source, None if out == "-" else out, *request, reporter)
    written = Source("the quantized model", None if result is not None else Path(out), result)

    def make_page(command: str) -> Page:
        from qconv.report import pages  # most runs have none

        return pages.make_quantize_page(report, source, written, *request, command, reporter)

    def tell() -> CommandResult:
        told = report.as_dict()
        return CommandResult(
            told,
            lambda stream: show_report(report, stream, verbose=wanted.verbose),
            told["tensors"],
            make_page,
            report.gates,
            result,
            after_page=tell_again,
        )

    def tell_again(seconds: float) -> CommandResult:
        report.time |= {"page": seconds, "total": report.time["total"] + seconds}
        return tell()

    return tell()


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


def quantize_sweep(model: str, output: str | None, given: GivenOptions, wanted: OutputOptions) -> int:
    """Carry out the recipes in the file of --sweep. output: a folder; None for the model's own."""
    options = given.values
    file = Path(options["sweep"])
    for name in SINGLE_RUN_OPTIONS:
        if options[name] is not None:
            raise click.UsageError(
                f"{option_name(name)} is about one result, and --sweep makes several: leave one out."
            )
    require_images(options["calib"], "a sweep scores recipes on them")
    if model == "-":
        raise click.UsageError("a sweep times the float model beside the others: name its file.")
    folder = Path(model).parent if output is None else Path(output)
    if output is not None and not folder.is_dir():
        raise QconvError(f"{output} is no folder.", "with --sweep, -o names a folder, which must be there.")
    entries = list(_read_entries(file, model, folder, given))
    files = CommandFiles(
        (model,),
        (*options["calib"], *given.read_files, str(file), *(options[name] for name in LABEL_OPTIONS)),
        {f"the output of {entry.name}": str(entry.out) for entry in entries},
    )

    def work(reporter: Reporter) -> CommandResult:
        from qconv.analysis.trials import run_sweep
        from qconv.ir.files import source_of
        from qconv.report import pages, text

        found = run_sweep(source_of(model), entries, reporter)
        told = found.as_dict()
        return CommandResult(
            told,
            print_to(lambda: text.format_sweep(found, verbose=wanted.verbose)),
            told["recipes"],
            lambda command: pages.make_sweep_page(found, command, reporter.warnings),
            status=1 if any(trial.failed for trial in found.trials) else 0,
        )

    return run_command(wanted, files, work)


def _read_entries(file: Path, model: str, folder: Path, given: GivenOptions) -> Iterator[SweepEntry]:
    from qconv.analysis.trials import SweepEntry

    stem = Path(model).stem if Path(model).suffix.lower() == ".onnx" else Path(model).name
    for name, content in _read_tables(file).items():
        table = _read_entry(file, name, content)
        try:
            recipe, data = _request_over(given, table)
        except click.UsageError as error:
            fact = f"{file}: {name} says {table.in_words}, which cannot be: "
            fix = "use options of quantize that go together, but none on pictures or on where things go."
            raise QconvError(f"{fact}{error.format_message()}", fix) from None
        yield SweepEntry(name, recipe, data, folder / f"{stem}.{name}.onnx", tuple(table.words))


def _read_entry(file: Path, name: str, content: dict[str, Any]) -> RecipeTable:
    """One recipe of the file, with what the recipe file says that it may name."""
    refused = dict.fromkeys(SHARED_OPTIONS, CANNOT_DIFFER)
    table = RecipeTable(file, name, refused)
    for key, value in content.items():
        if key == LAYER_BITS_KEY and isinstance(value, dict):
            fact = f"{file}: {name} has bits of single layers, which stand in a file of their own."
            raise QconvError(fact, f'name it: {LAYER_BITS_KEY} = "FILE.toml", or recipe = "FILE.toml".')
        table.add(key, value)
    table.add_recipe()
    return table


def _request_over(given: GivenOptions, table: RecipeTable) -> tuple[Recipe, DataOptions]:
    """What the command line says, and over it a recipe of the file; what can be repeated is added to it."""
    repeated = {option.name for option in quantize_parameters() if option.multiple}
    own = {name: (*given.values[name], *value) if name in repeated else value for name, value in table.values.items()}
    # a recipe that is named here replaces what was typed outside
    typed = frozenset(own) if "recipe_name" in own else given.typed | own.keys()
    return GivenOptions({**given.values, **own}, typed).request()


def _read_tables(file: Path) -> dict[str, dict[str, Any]]:
    content = read_toml(file, "--sweep", EXAMPLE_HINT)
    if not content:
        raise QconvError(f"{file} has no recipe.", f"{EXAMPLE_HINT}.")
    alike = Counter(name.casefold() for name in content)
    for name, table in content.items():
        if alike[name.casefold()] > 1:
            raise QconvError(
                f"{file}: {name!r} differs from another recipe in capitals alone.", "give it another name."
            )
        if not isinstance(table, dict):
            raise QconvError(f"{file} has {name!r} outside of any recipe.", f"{EXAMPLE_HINT}.")
        if not name or name.startswith(".") or Path(name).name != name or not name.isprintable():
            raise QconvError(f"{file}: {name!r} cannot be part of a file's name.", "call the recipe otherwise.")
    return content
