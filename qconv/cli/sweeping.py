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
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qconv.cli.given import names_given, recipe_of, require_pictures, without
from qconv.cli.putting_out import Wanted, check_report, typed
from qconv.config.choices import option_name
from qconv.config.serialization import read_toml
from qconv.errors import QconvError
from qconv.signals import raise_exit_on_signals

if TYPE_CHECKING:
    from qconv.analysis.trials import SweepEntry
    from qconv.config.recipe import Recipe

SHARED = frozenset(
    {
        "calib",
        "fallback",
        "output",
        "sweep",
        "report",
        "csv",
        "samples",
        "batch",
        "seed",
        "pattern",
        "stats",
        "save_stats",
    }
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
            raise click.UsageError(
                f"{option_name(name)} is about one result, and --sweep makes several: leave one out."
            )
    require_pictures(options["calib"], "a sweep scores recipes on them")
    if model == "-":
        raise click.UsageError("a sweep times the float model beside the others: name its file.")
    folder = Path(model).parent if output is None else Path(output)
    if output is not None and not folder.is_dir():
        raise QconvError(f"{output} is no folder.", "with --sweep, -o names a folder, which must be there.")
    entries = list(_entries(file, model, folder, options))
    outputs = {f"the output of {entry.name}": str(entry.out) for entry in entries}
    read = [*options["calib"], options["layer_bits"], str(file)]
    flags.wanted.check(Path(model), *map(Path, filter(None, read)), written=outputs)
    from qconv.analysis.trials import run_sweep as carried_out
    from qconv.ir.files import source_of
    from qconv.pipeline import quantize
    from qconv.report import console as report_console
    from qconv.report import text

    source = source_of(model)
    page = check_report(flags.report, [source], read, {"the table": flags.wanted.csv, **outputs})
    console = report_console.Console(quiet=flags.wanted.quiet)
    told: list[str] = []

    def warn(text: str) -> None:
        told.append(text)
        console.warn(text)

    raise_exit_on_signals()
    try:
        found = carried_out(source, entries, quantize.Listener(warn, console.progress))
    finally:
        console.close()
    if page is not None:
        from qconv import storage
        from qconv.report import html, pages

        storage.write_atomically(page, html.render_page(pages.make_sweep_page(found, typed(), told)))
    told_as = found.as_dict()
    flags.wanted.put(told_as, told_as["recipes"], lambda: text.format_sweep(found, verbose=flags.verbose))
    return 1 if any(trial.failed for trial in found.trials) else 0


def _entries(file: Path, model: str, folder: Path, options: Mapping[str, Any]) -> Iterator[SweepEntry]:
    from qconv.analysis.trials import SweepEntry

    stem = Path(model).stem if Path(model).suffix.lower() == ".onnx" else Path(model).name
    typed = names_given()
    for name, table in _tables(file).items():
        lines = _Lines(file, name)
        for key, value in table.items():
            lines.add(key, value)
        try:
            recipe = lines.recipe(options, typed)
        except click.UsageError as error:
            fact = f"{file}: {name} says {shlex.join(lines.words) or 'nothing'}, which cannot be: "
            fix = "use options of quantize that go together, but none on pictures or on where things go."
            raise QconvError(f"{fact}{error.format_message()}", fix) from None
        yield SweepEntry(name, recipe, folder / f"{stem}.{name}.onnx", tuple(lines.words))


@dataclass(slots=True)
class _Lines:
    """A table of the file. words: the same on a command line; undone: switches that are off, and can be said no way."""

    file: Path
    name: str
    words: list[str] = field(default_factory=list)
    undone: set[str] = field(default_factory=set)
    known: list[click.Parameter] = field(default_factory=lambda: without(SHARED))

    def add(self, key: str, value: Any) -> None:
        """Take in one line."""
        if any(f"--{key}" in option.opts for option in without(()) if option.name in SHARED):
            fact = f"{self.file}: {key!r} of {self.name} cannot differ from recipe to recipe."
            raise QconvError(fact, f"pass --{key} on the command line, for all of them.")
        if key == "layer-bits" and isinstance(value, str):
            value = str(self.file.parent / value)
        option = next((o for o in self.known if f"--{key}" in o.opts), None)
        if isinstance(value, bool):
            off = f"--no-{key}"
            if value:
                self.words.append(f"--{key}")
            elif option is None or off in option.secondary_opts:
                self.words.append(off)
            else:
                self.undone.add(option.name or "")
        elif isinstance(value, str | int | float):
            self.words += [f"--{key}", str(value)]
        elif isinstance(value, list) and all(isinstance(item, str | int | float) for item in value):
            # what cannot be repeated takes its numbers in one word
            once = option is None or not option.multiple
            for item in [",".join(map(str, value))] if once else map(str, value):
                self.words += [f"--{key}", item]
        else:
            raise QconvError(f"{self.file}: {key!r} of {self.name} is no value of an option.", f"{EXAMPLE}.")

    def recipe(self, options: Mapping[str, Any], typed: Collection[str]) -> Recipe:
        """What the command line says, and over it these lines; what can be repeated is added to it."""
        command = click.Command("recipe", params=self.known, add_help_option=False)
        found = {**options, **dict.fromkeys(self.undone, False)}
        with command.make_context("recipe", list(self.words)) as own:
            said = names_given() | self.undone
            for option in command.params:
                name = option.name or ""
                if name in names_given():
                    found[name] = (*options[name], *own.params[name]) if option.multiple else own.params[name]
        # a recipe that is named here replaces what was typed outside
        return recipe_of(found, said if "recipe_name" in said else said | set(typed))


def _tables(file: Path) -> dict[str, dict[str, Any]]:
    content = read_toml(file, "--sweep", EXAMPLE)
    if not content:
        raise QconvError(f"{file} has no recipe.", f"{EXAMPLE}.")
    alike = Counter(name.casefold() for name in content)
    for name, table in content.items():
        if alike[name.casefold()] > 1:
            raise QconvError(
                f"{file}: {name!r} differs from another recipe in capitals alone.", "give it another name."
            )
        if not isinstance(table, dict):
            raise QconvError(f"{file} has {name!r} outside of any recipe.", f"{EXAMPLE}.")
        if not name or name.startswith(".") or Path(name).name != name or not name.isprintable():
            raise QconvError(f"{file}: {name!r} cannot be part of a file's name.", "call the recipe otherwise.")
    return content
