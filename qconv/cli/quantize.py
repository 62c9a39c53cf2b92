"""`qconv quantize` quantizes a model with calibration images, or with each recipe of a file (--sweep).

    [w8a8]                      # as the command line says

    [w4]
    weight-bits = 4
    effort = "best"
    keep-float = ["stem*", "head*"]
    tune-ranges = false         # --no-tune-ranges

A recipe is the command line with these options put over it. What says which images are read, or where things are
written, cannot differ.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qconv.cli.options import HELP_WIDTH, quantize_options, require_output
from qconv.cli.output import OutputOptions, check_report_path, format_command_line
from qconv.cli.recipe_options import find_typed_options, make_request_of_options, require_images, select_options_without
from qconv.config.choices import option_name
from qconv.config.data_options import DataOptions
from qconv.config.recipe import Recipe
from qconv.config.serialization import read_toml
from qconv.errors import QconvError
from qconv.reporter import Reporter
from qconv.signals import raise_exit_on_signals

if TYPE_CHECKING:
    from qconv.analysis.trials import SweepEntry
    from qconv.ir.files import Source
    from qconv.results.quantize import Report


SHARED_OPTIONS = frozenset(
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

SINGLE_RUN_OPTIONS = ("stats", "save_stats", "save_layer_bits", "min_agreement", "min_sqnr")
"""Options that are about one result."""

EXAMPLE_HINT = (
    'write a table for each recipe: [w4] and below it options of quantize, as weight-bits = 4 or effort = "best"'
)


@dataclass(frozen=True, slots=True)
class OutputFlags:
    """How the result is wanted."""

    wanted: OutputOptions
    verbose: bool
    report: str | None


def quantize_sweep(model: str, output: str | None, options: Mapping[str, Any], flags: OutputFlags) -> int:
    """Carry out the recipes in the file options["sweep"]. output: a folder; None for the model's own."""
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
    entries = list(_read_entries(file, model, folder, options))
    outputs = {f"the output of {entry.name}": str(entry.out) for entry in entries}
    read = [*options["calib"], options["layer_bits"], str(file)]
    flags.wanted.check(Path(model), *map(Path, filter(None, read)), written=outputs)
    from qconv.analysis.trials import run_sweep as carried_out
    from qconv.ir.files import source_of
    from qconv.report import console as report_console
    from qconv.report import text

    source = source_of(model)
    page = check_report_path(flags.report, [source], read, {"the table": flags.wanted.csv, **outputs})
    console = report_console.Console(quiet=flags.wanted.quiet)
    reporter = Reporter(console.warn, console.progress)
    raise_exit_on_signals()
    try:
        found = carried_out(source, entries, reporter)
    finally:
        console.close()
    if page is not None:
        from qconv import storage
        from qconv.report import html, pages

        storage.write_atomically(
            page, html.render_page(pages.make_sweep_page(found, format_command_line(), reporter.warnings))
        )
    told_as = found.as_dict()
    flags.wanted.put(told_as, told_as["recipes"], lambda: text.format_sweep(found, verbose=flags.verbose))
    return 1 if any(trial.failed for trial in found.trials) else 0


def _read_entries(file: Path, model: str, folder: Path, options: Mapping[str, Any]) -> Iterator[SweepEntry]:
    from qconv.analysis.trials import SweepEntry

    stem = Path(model).stem if Path(model).suffix.lower() == ".onnx" else Path(model).name
    typed = find_typed_options()
    for name, table in _read_tables(file).items():
        lines = _RecipeTable(file, name)
        for key, value in table.items():
            lines.add(key, value)
        try:
            recipe, data = lines.request(options, typed)
        except click.UsageError as error:
            fact = f"{file}: {name} says {shlex.join(lines.words) or 'nothing'}, which cannot be: "
            fix = "use options of quantize that go together, but none on pictures or on where things go."
            raise QconvError(f"{fact}{error.format_message()}", fix) from None
        yield SweepEntry(name, recipe, data, folder / f"{stem}.{name}.onnx", tuple(lines.words))


@dataclass(slots=True)
class _RecipeTable:
    """A table of the file. words: the same on a command line; undone: switches that are off, and can be said no way."""

    file: Path
    name: str
    words: list[str] = field(default_factory=list)
    undone: set[str] = field(default_factory=set)
    known: list[click.Parameter] = field(default_factory=lambda: select_options_without(SHARED_OPTIONS))

    def add(self, key: str, value: Any) -> None:
        """Take in one line."""
        if any(f"--{key}" in option.opts for option in select_options_without(()) if option.name in SHARED_OPTIONS):
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
            raise QconvError(f"{self.file}: {key!r} of {self.name} is no value of an option.", f"{EXAMPLE_HINT}.")

    def request(self, options: Mapping[str, Any], typed: Collection[str]) -> tuple[Recipe, DataOptions]:
        """What the command line says, and over it these lines; what can be repeated is added to it."""
        command = click.Command("recipe", params=self.known, add_help_option=False)
        found = {**options, **dict.fromkeys(self.undone, False)}
        with command.make_context("recipe", list(self.words)) as own:
            said = find_typed_options() | self.undone
            for option in command.params:
                name = option.name or ""
                if name in find_typed_options():
                    found[name] = (*options[name], *own.params[name]) if option.multiple else own.params[name]
        # a recipe that is named here replaces what was typed outside
        return make_request_of_options(found, said if "recipe_name" in said else said | set(typed))


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


GATE_FELL_SHORT = 3


@click.command(context_settings=HELP_WIDTH)
@click.argument("model")
@quantize_options
def quantize(
    model: str, output: str | None, csv: str | None, as_json: bool, quiet: bool, verbose: bool, **options: Any
) -> int:
    """Quantize MODEL ('-' reads standard input) with the pictures in --calib and check the result."""
    if model == "-" and output is None:
        raise click.UsageError("a model from standard input needs an output: pass -o FILE or '-o -'.")
    if not options["calib"] and options["stats"] is None:
        raise click.UsageError("pass the calibration pictures with --calib DIR.")
    named = ("stats", "save_stats", "layer_bits", "save_layer_bits", "sweep")
    if "" in (output, *options["calib"], *(options[name] for name in named)):
        told = ", ".join(option_name(name) for name in named[:-1])
        raise click.UsageError(f"--calib, --output, {told} and {option_name(named[-1])} need a name.")
    wanted = OutputOptions(as_json, quiet, csv)
    if options["sweep"] is not None:
        return quantize_sweep(model, output, options, OutputFlags(wanted, verbose, options["report"]))
    recipe, data = make_request_of_options(options)
    _require_distinct_places(options["layer_bits"], output, options["save_stats"], options["save_layer_bits"])
    _require_streams(model, output, as_json)
    if csv == "-" and output == "-":
        raise click.UsageError("'-o -' and '--csv -' both go to standard output: name a file.")
    from qconv.ir.files import source_of
    from qconv.report import console as report_console

    source = source_of(model)
    if output is None:
        output = default_output(model, recipe)
    read = (*data.paths, options["stats"], options["layer_bits"])
    written = {
        "the output": output,
        "the table": csv,
        **{option_name(name): options[name] for name in ("save_stats", "save_layer_bits")},
    }
    page = check_report_path(options["report"], [source], read, written)
    files = [Path(name) for name in (model, *read) if name not in (None, "-")]
    wanted.check(*files, written={**written, "the table": None})
    console = report_console.Console(quiet=quiet)
    report, result = _run_quantize(source, output, (recipe, data), console, page)
    if result is not None:
        sys.stdout.buffer.write(result)
        sys.stdout.buffer.flush()
    wanted.put_table(report.as_dict()["tensors"])
    stream = sys.stderr if result is not None else sys.stdout
    if as_json:
        print(json.dumps(report.as_dict(), allow_nan=False), file=stream)
    elif not quiet and csv != "-" and stream is not None:
        report_console.show_report(report, stream, verbose=verbose)
    for gate in report.gates:
        if not gate.held and not quiet:
            got = "no such measure" if gate.got is None else f"{gate.got:.4g}"
            print(f"Gate fell short: --{gate.name} {gate.want:g}, got {got}.", file=sys.stderr)
    return 0 if report.held else GATE_FELL_SHORT


def _require_streams(model: str, output: str | None, as_json: bool) -> None:
    """A shell can close streams (`>&-`): better said before the work than after it."""
    if model == "-" and sys.stdin is None:
        raise QconvError("Standard input is closed.", "pipe the model into it, or name its file.")
    if output == "-" and sys.stdout is not None and sys.stdout.isatty():
        raise QconvError(
            "The model would be written to the terminal.", "redirect standard output, or name a file with -o."
        )
    require_output(output == "-" or as_json)


def _require_distinct_places(read: str | None, *written: str | None) -> None:
    """The pipeline knows what a file of bits says, but not where it lies."""
    if read is not None:
        from qconv.storage import refuse_overwriting_inputs

        for name in written:
            if name is not None:
                refuse_overwriting_inputs(Path(name), [read])


def _run_quantize(
    source: Source, output: str, request: tuple[Recipe, DataOptions], console: Any, page: Path | None
) -> tuple[Report, bytes | None]:
    """page: where one is to be written, too."""
    from qconv.pipeline import quantize as pipeline_quantize

    reporter = Reporter(console.warn, console.progress)
    raise_exit_on_signals()
    try:
        report, result = pipeline_quantize.quantize(source, None if output == "-" else output, *request, reporter)
        if page is not None:
            from qconv import storage
            from qconv.ir.files import Source
            from qconv.report import html, pages

            written = Source("the quantized model", None if result is not None else Path(output), result)
            found = pages.make_quantize_page(report, source, written, *request, format_command_line(), reporter)
            storage.write_atomically(page, html.render_page(found))
        return report, result
    finally:
        console.close()


def default_output(model: str, recipe: Recipe) -> str:
    """MODEL with its bits: `cat.onnx` becomes `cat.w8a8.onnx`, and `cat.mixed.onnx` where layers have their own."""
    path = Path(model)
    if not path.name:
        raise QconvError(f"{model or 'An empty name'} is no model.", "name an ONNX file.")
    stem = path.stem if path.suffix.lower() == ".onnx" else path.name
    own = recipe.searches or recipe.layer_bits
    bits = "mixed" if own else f"w{recipe.weight_bits}a{recipe.activation_bits}"
    return str(path.with_name(f"{stem}.{bits}.onnx"))
