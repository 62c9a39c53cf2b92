"""`qconv quantize --sweep` makes one result of each recipe in a file.

    [w8a8]                      # as the command line says

    [w4]
    weight-bits = 4
    effort = "best"
    keep-float = ["stem*", "head*"]
    tune-ranges = false         # --no-tune-ranges

    [ours]
    recipe = "ours.toml"        # options of a file; those that stand here win

A recipe is the command line with these options put over it. What says which images are read, or where things are
written, cannot differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qconv.cli.command import run_command
from qconv.cli.output import CommandFiles, CommandResult, OutputOptions, print_to
from qconv.cli.recipe_file import NOT_IN_RECIPES, GivenOptions, RecipeTable
from qconv.cli.recipe_options import quantize_parameters, require_images
from qconv.config.choices import option_name
from qconv.config.data_options import DataOptions
from qconv.config.recipe import Recipe
from qconv.config.serialization import LAYER_BITS_KEY, read_toml
from qconv.errors import QconvError
from qconv.reporter import Reporter

if TYPE_CHECKING:
    from qconv.analysis.trials import SweepEntry

SHARED_OPTIONS = (NOT_IN_RECIPES - {"recipe"}) | frozenset(
    {"calib", "fallback", "samples", "batch", "seed", "pattern", "stats", "min_agreement", "min_sqnr"}
    | {"preprocess", "scale", "mean", "std", "color", "layout", "resize", "filter_", "size", "task"}
    | {"threads", "embed_preprocessing"}
)
"""Options that no recipe of a sweep has of its own."""

CANNOT_DIFFER = ("which cannot differ from recipe to recipe", "pass --{key} on the command line, for all of them.")

SINGLE_RUN_OPTIONS = ("stats", "save_stats", "save_layer_bits", "save_recipe", "min_agreement", "min_sqnr")
"""Options that are about one result."""

EXAMPLE_HINT = (
    'write a table for each recipe: [w4] and below it options of quantize, as weight-bits = 4 or effort = "best"'
)


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
        (*options["calib"], *given.read_files, str(file)),
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
