"""The command line: argv becomes a Recipe, the pipeline runs, the report is printed. The only place that exits.

stdout carries the result, stderr the conversation. Exit status: 0 done, 1 an error, 2 usage, 3 a gate fell short.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

import qconv
from qconv.cli.finetuning import finetune
from qconv.cli.given import recipe_of, require_pictures, without
from qconv.cli.layerwise import compare, diagnose
from qconv.cli.looking import audit, benchmark, evaluate, inspect
from qconv.cli.manual import manual
from qconv.cli.options import WIDTH, output_options, pictures_option, quantize_options, require_output
from qconv.cli.putting_out import Wanted, check_report, typed
from qconv.cli.sweeping import Flags, sweep
from qconv.cli.synthesizing import synthesize
from qconv.config.checks import spelt
from qconv.config.recipe import Recipe
from qconv.errors import QconvError, counted
from qconv.leaving import leave_at_once, leave_by_exceptions

if TYPE_CHECKING:
    from qconv.ir.source import Source
    from qconv.results.curve import Curve
    from qconv.results.report import Report

GATE_FELL_SHORT = 3


@click.group(context_settings=WIDTH)
@click.version_option(qconv.__version__, prog_name="qconv")
def cli() -> None:
    """Turn a float ONNX convolutional network into a quantized one, checked and explained."""


@cli.command(context_settings=WIDTH)
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
        told = ", ".join(spelt(name) for name in named[:-1])
        raise click.UsageError(f"--calib, --output, {told} and {spelt(named[-1])} need a name.")
    wanted = Wanted(as_json, quiet, csv)
    if options["sweep"] is not None:
        return sweep(model, output, options, Flags(wanted, verbose, options["report"]))
    recipe = recipe_of(options)
    _require_apart(options["layer_bits"], output, options["save_stats"], options["save_layer_bits"])
    _require_streams(model, output, as_json)
    if csv == "-" and output == "-":
        raise click.UsageError("'-o -' and '--csv -' both go to standard output: name a file.")
    from qconv.ir.source import source_of
    from qconv.report import summary  # rich, onnx and onnxruntime are slow to import: --help must not wait for them

    source = source_of(model)
    if output is None:
        output = default_output(model, recipe)
    read = (*recipe.calib, options["stats"], options["layer_bits"])
    written = {
        "the output": output,
        "the table": csv,
        **{spelt(name): options[name] for name in ("save_stats", "save_layer_bits")},
    }
    page = check_report(options["report"], [source], read, written)
    files = [Path(name) for name in (model, *read) if name not in (None, "-")]
    wanted.check(*files, written={**written, "the table": None})
    console = summary.Console(quiet=quiet)
    report, data = _run(source, output, recipe, console, page)
    if data is not None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    wanted.put_table(report.as_dict()["tensors"])
    stream = sys.stderr if data is not None else sys.stdout
    if as_json:
        print(json.dumps(report.as_dict(), allow_nan=False), file=stream)
    elif not quiet and csv != "-" and stream is not None:
        summary.show(report, stream, verbose=verbose)
    for gate in report.gates:
        if not gate.held and not quiet:
            got = "no such measure" if gate.got is None else f"{gate.got:.4g}"
            print(f"Gate fell short: --{gate.name} {gate.want:g}, got {got}.", file=sys.stderr)
    return 0 if report.held else GATE_FELL_SHORT


NOT_STUDIED = frozenset(
    {"output", "report", "sweep", "stats", "save_stats", "embed_preprocessing", "min_agreement", "min_sqnr", "verbose"}
    | {
        "max_drop",
        "target_size",
        "candidate_bits",
        "save_layer_bits",
        "effort",
        "rounding",
        "equalize",
        "calib",
        "fallback",
    }
)
"""Options of `quantize` that make no sense of a model that is not kept, or need pictures twice."""
CHARTS = (".png", ".html")


@cli.command(
    "study-samples",
    context_settings=WIDTH,
    params=without(NOT_STUDIED),
)
@click.argument("model")
@pictures_option
@click.option("-o", "--output", metavar="OUT", help="Also draw the curve: a .png picture or a .html page.")
@click.option(
    "--seeds",
    default=3,
    show_default=True,
    metavar="N",
    type=click.IntRange(1),
    help="Draws of each number of pictures.",
)
@click.option(
    "--holdout",
    metavar="N",
    type=click.IntRange(1),
    help="Pictures to score on.  [default: a fifth of the pictures, at most 64]",
)
@click.option(
    "--images", multiple=True, metavar="DIR|FILE", help="Take those from here, instead of holding back some of --calib."
)
@click.option("-v", "--verbose", is_flag=True, help="Also print every draw.")
def study_samples(
    model: str,
    output: str | None,
    seeds: int,
    holdout: int | None,
    images: tuple[str, ...],
    csv: str | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> int:
    """How many calibration pictures MODEL needs: its accuracy when quantized with 1, 2, 5, 10, ... of them."""
    require_pictures(options["calib"], "study-samples is about how many of them it takes")
    if "" in (output, *options["calib"], *images):
        raise click.UsageError("--calib, --images and --output need a name.")
    place = None if output is None else Path(output)
    if place is not None and place.suffix.lower() not in CHARTS:
        raise click.UsageError(f"{output} is no chart: name a file that ends in {' or '.join(CHARTS)}.")
    recipe = recipe_of({**dict.fromkeys(NOT_STUDIED), **options, "effort": "fast"})
    wanted = Wanted(as_json, quiet, csv)
    files = [Path(name) for name in (model, *options["calib"], *images) if name != "-"]
    wanted.check(*files, written={"the chart": output})
    _require_streams(model, None, as_json)
    from qconv.analysis import study
    from qconv.ir.source import source_of
    from qconv.pipeline import pipeline
    from qconv.report import summary

    console = summary.Console(quiet=quiet)
    listener = pipeline.Listener(warn=console.warn, progress=console.progress)
    source = source_of(model)
    leave_by_exceptions()
    try:
        curve = study.study_samples(source, recipe, study.Question(seeds, holdout, images), listener, place)
    finally:
        console.close()
    if place is not None:
        _write_chart(curve, place)
    told = curve.as_dict()
    wanted.put_table(told["points"])
    if as_json:
        print(json.dumps(told, allow_nan=False))
    elif not quiet and csv != "-" and sys.stdout is not None:
        summary.show_curve(curve, sys.stdout, verbose=verbose)
    return 0


def _write_chart(curve: Curve, out: Path) -> None:
    from qconv import save

    if out.suffix.lower() == ".html":
        from qconv.report import page

        save.write_whole(out, page.page(curve).encode())
        return
    from qconv.report import chart, plot

    save.write_whole(out, plot.png(chart.draw(curve)))


@cli.command("merge-stats", context_settings=WIDTH)
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("-o", "--output", required=True, metavar="OUT", help="Where to write the sum.")
@output_options
def merge_stats(files: tuple[str, ...], output: str, as_json: bool, quiet: bool, verbose: bool) -> int:
    """Add up statistics that `quantize --save-stats` wrote of parts of a set of pictures."""
    if "" in (output, *files):
        raise click.UsageError("files and --output need a name.")
    from qconv.calibration import stats
    from qconv.report import summary

    console = summary.Console(quiet=quiet)
    total, twice = stats.merged(files)
    if twice:
        console.warn(f"{counted(twice, 'picture')} came more than once, and count as often.")
    leave_by_exceptions()
    stats.write_file(total, Path(output))
    found = {
        "schema": 1,
        "version": qconv.__version__,
        "output": output,
        "model": total.name,
        "pictures": total.pictures,
        "repeated": twice,
        "tensors": len(total.sketches),
    }
    if as_json:
        print(json.dumps(found))
    elif not quiet:
        print(f"{output}: {counted(total.pictures, 'picture')}, {counted(len(total.sketches), 'tensor')}")
        for name in total.sketches if verbose else ():
            print(f"  {name}")
    return 0


for command in (inspect, evaluate, compare, diagnose, audit, benchmark, finetune, synthesize, manual):
    cli.add_command(command)


def _require_streams(model: str, output: str | None, as_json: bool) -> None:
    """A shell can close streams (`>&-`): better said before the work than after it."""
    if model == "-" and sys.stdin is None:
        raise QconvError("Standard input is closed.", "pipe the model into it, or name its file.")
    if output == "-" and sys.stdout is not None and sys.stdout.isatty():
        raise QconvError(
            "The model would be written to the terminal.", "redirect standard output, or name a file with -o."
        )
    require_output(output == "-" or as_json)


def _require_apart(read: str | None, *written: str | None) -> None:
    """The pipeline knows what a file of bits says, but not where it lies."""
    if read is not None:
        from qconv.save import refuse_what_is_read

        for name in written:
            if name is not None:
                refuse_what_is_read(Path(name), [read])


def _run(source: Source, output: str, recipe: Recipe, console: Any, page: Path | None) -> tuple[Report, bytes | None]:
    """page: where one is to be written, too."""
    from qconv.pipeline import pipeline

    listener = pipeline.Listener(warn=console.warn, progress=console.progress)
    leave_by_exceptions()
    try:
        report, data = pipeline.quantize(source, None if output == "-" else output, recipe, listener)
        if page is not None:
            from qconv import save
            from qconv.ir.source import Source
            from qconv.report import html, pages

            written = Source("the quantized model", None if data is not None else Path(output), data)
            found = pages.of_quantize(report, source, written, recipe, typed(), console.progress)
            save.write_whole(page, html.render(found))
        return report, data
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


def run() -> NoReturn:
    """Entry point of the console script: `main`, and no more.

    Taking a runtime and a dozen libraries apart again would be a tenth of the whole command. Everything is flushed, and
    temporary files are gone by now. Only whoever watches the run has something left to write: then it ends as usual.
    """
    status: object = 0
    try:
        main()
    except SystemExit as leaving:
        status = leaving.code
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, full, or not there at all
            stream.flush()
    number = status if isinstance(status, int) else 0 if status is None else 1
    if _watched():
        sys.exit(number)
    os._exit(number)


def _watched() -> bool:
    """Whether a debugger, a profiler or a measurement of coverage is on, which writes what it saw at the very end."""
    monitoring = getattr(sys, "monitoring", None)  # from Python 3.12 on
    tools = monitoring is not None and any(monitoring.get_tool(number) is not None for number in range(6))
    return tools or sys.gettrace() is not None or sys.getprofile() is not None


def main() -> None:
    """Run the command that sys.argv names and exit with its status."""
    leave_at_once()
    if sys.stderr is None:  # print would take standard output instead, which may be carrying the model
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    # a picture that is too large is told of by name; the libraries' own words on it lead nowhere
    warnings.filterwarnings("ignore", module=r"PIL\.")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may be anything
    try:
        status = cli.main(standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except QconvError as error:
        _fail(error.message, error.hint)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except OSError as error:
        if error.filename is not None:
            _fail(f"{error.filename} cannot be used: {error.strerror}.", "check the path, its rights and the disk.")
        # whoever read our output has gone, or its disk is full; nothing more may be written to it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(error, BrokenPipeError):
            sys.exit(1)
        _fail(f"standard output cannot be written: {error.strerror}.", "send it somewhere else.")
    except MemoryError:
        _fail("out of memory.", "use fewer --samples, --batch 1, or a machine with more.")
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, hint: str) -> NoReturn:
    print(f"Error: {message}", file=sys.stderr)
    print(f"Hint:  {hint}", file=sys.stderr)
    sys.exit(1)
