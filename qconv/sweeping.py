"""`quantize --sweep RECIPES.toml`: a file of recipes, each a table of the options of `quantize`.

    [w8a8]                      # as the command line says

    [w4]
    weight-bits = 4
    effort = "best"
    keep-float = ["stem*", "head*"]
    tune-ranges = false         # --no-tune-ranges

A recipe is what the command line says with these options put over it. What says which pictures are read, or where
things are written, cannot differ.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from qconv.checks import spelt
from qconv.errors import QconvError
from qconv.given import recipe_of, without
from qconv.leaving import leave_by_exceptions
from qconv.putting_out import Wanted, check_report, typed
from qconv.tomlfile import read_toml

if TYPE_CHECKING:
    from qconv.recipe import Recipe
    from qconv.sweep import Entry

SHARED = frozenset(
    {"calib", "output", "sweep", "report", "csv", "samples", "batch", "seed", "pattern", "stats", "save_stats"}
    | {"save_layer_bits", "min_agreement", "min_sqnr", "preprocess", "scale", "mean", "std", "color", "layout"}
    | {"resize", "filter_", "size", "as_json", "quiet", "verbose", "threads", "embed_preprocessing"}
)
"""Options that no recipe of a sweep has of its own."""
ALONE = ("stats", "save_stats", "save_layer_bits", "min_agreement", "min_sqnr")
"""Options that are about one result."""
EXAMPLE = 'write a table for each recipe: [w4] and below it options of quantize, as weight-bits = 4 or effort = "best"'


@dataclass(frozen=True, slots=True)
class Flags:
    """How the result is wanted."""

    wanted: Wanted
    verbose: bool
    report: str | None


def sweep(model: str, output: str | None, options: Mapping[str, Any], flags: Flags) -> int:
    """Carry out the recipes in the file options["sweep"]. output: a folder; None for the model's own."""
    file = Path(options["sweep"])
    for name in ALONE:
        if options[name] is not None:
            raise click.UsageError(f"{spelt(name)} is about one result, and --sweep makes several: leave one out.")
    if model == "-":
        raise click.UsageError("a sweep times the float model beside the others: name its file.")
    folder = Path(model).parent if output is None else Path(output)
    if output is not None and not folder.is_dir():
        raise QconvError(f"{output} is no folder.", "with --sweep, -o names a folder, which must be there.")
    entries = list(_entries(file, model, folder, options))
    outputs = {f"the output of {entry.name}": str(entry.out) for entry in entries}
    flags.wanted.check(Path(model), file)
    from qconv import laddered, pipeline, summary
    from qconv.source import source_of
    from qconv.sweep import sweep as carried_out

    source = source_of(model)
    read = [*options["calib"], options["layer_bits"], str(file)]
    page = check_report(flags.report, [source], read, {"the table": flags.wanted.csv, **outputs})
    console = summary.Console(quiet=flags.wanted.quiet)
    told: list[str] = []

    def warn(text: str) -> None:
        told.append(text)
        console.warn(text)

    leave_by_exceptions()
    try:
        found = carried_out(source, entries, pipeline.Listener(warn, console.progress))
    finally:
        console.close()
    if page is not None:
        from qconv import html, pages, save

        save.write_whole(page, html.render(pages.of_sweep(found, typed(), told)))
    told_as = found.as_dict()
    flags.wanted.put(told_as, told_as["recipes"], lambda: laddered.sweep(found, verbose=flags.verbose))
    return 1 if any(trial.failed for trial in found.trials) else 0


def _entries(file: Path, model: str, folder: Path, options: Mapping[str, Any]) -> Iterator[Entry]:
    from qconv.sweep import Entry

    stem = Path(model).stem if Path(model).suffix.lower() == ".onnx" else Path(model).name
    for name, table in _tables(file).items():
        words = [word for key, value in table.items() for word in _words(file, name, key, value)]
        try:
            recipe = _recipe(words, options)
        except click.UsageError as error:
            fact = f"{file}: {name} says {shlex.join(words) or 'nothing'}, which cannot be: {error.format_message()}"
            fix = "use options of quantize that go together, but none on pictures or on where things go."
            raise QconvError(fact, fix) from None
        yield Entry(name, recipe, folder / f"{stem}.{name}.onnx", tuple(words))


def _recipe(words: Sequence[str], options: Mapping[str, Any]) -> Recipe:
    """What the command line says, and over it these words; what can be repeated is added to it."""
    command = click.Command("recipe", params=without(SHARED), add_help_option=False)
    with command.make_context("recipe", list(words)) as own:
        found = dict(options)
        for option in command.params:
            name = option.name or ""
            if own.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                found[name] = (*options[name], *own.params[name]) if option.multiple else own.params[name]
        return recipe_of(found)


def _tables(file: Path) -> dict[str, dict[str, Any]]:
    content = read_toml(file, "--sweep", EXAMPLE)
    if not content:
        raise QconvError(f"{file} has no recipe.", f"{EXAMPLE}.")
    for name, table in content.items():
        if not isinstance(table, dict):
            raise QconvError(f"{file} has {name!r} outside of any recipe.", f"{EXAMPLE}.")
        if not name or name.startswith(".") or Path(name).name != name or not name.isprintable():
            raise QconvError(f"{file}: {name!r} cannot be part of a file's name.", "call the recipe otherwise.")
    return content


def _words(file: Path, recipe: str, key: str, value: Any) -> Sequence[str]:
    """One line of a table as it is spelt on the command line."""
    if isinstance(value, bool):
        return (f"--{key}" if value else f"--no-{key}",)
    if isinstance(value, list):
        return tuple(word for item in value for word in _words(file, recipe, key, item))
    if not isinstance(value, str | int | float):
        raise QconvError(f"{file}: {key!r} of {recipe} is no value of an option.", f"{EXAMPLE}.")
    return f"--{key}", str(value)
