"""The commands that look at models and write none."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from qconv.cli.given import preprocessing_of
from qconv.cli.options import WIDTH, common_options, csv_option, output_options, preprocessing_options, stack
from qconv.cli.putting_out import Wanted
from qconv.cli.values import Size
from qconv.config.recipe import MOST_THREADS, Recipe
from qconv.config.targets import TARGETS
from qconv.errors import QconvError
from qconv.signals import raise_exit_on_signals

NO_STREAM = "a model from standard input can be read only once: name its file."


def _files(model: str) -> tuple[Path, ...]:
    return () if model == "-" else (Path(model),)


batch_option = click.option(
    "--batch", metavar="N", type=click.IntRange(1), help="Pictures a run.  [default: the model's own, or 1]"
)
size_option = click.option("--size", type=Size(), help="Of pictures, where a model leaves height and width open.")


@click.command(context_settings=WIDTH)
@click.argument("model")
@batch_option
@size_option
@csv_option
@output_options
@click.option(
    "--threads",
    default=1,
    show_default=True,
    metavar="N",
    type=click.IntRange(1, MOST_THREADS),
    help="Threads of ONNX Runtime.",
)
def audit(
    model: str,
    batch: int | None,
    size: tuple[int, int] | None,
    threads: int,
    csv: str | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> int:
    """Say what ONNX Runtime runs of MODEL in integers, what in float, by which rule, and what each costs."""
    if not model:
        raise click.UsageError("MODEL needs a name.")
    wanted = Wanted(as_json, quiet, csv)
    wanted.check(*_files(model))
    from qconv.audit import audit as audit_audit
    from qconv.ir.files import source_of
    from qconv.report import text

    raise_exit_on_signals()
    found = audit_audit.audit_file(source_of(model), threads=threads, batch=batch, size=size)
    told = found.as_dict()
    wanted.put(told, told["layers"], lambda: text.format_audit(found, verbose=verbose))
    return 0


@click.command(context_settings=WIDTH)
@click.argument("model")
@csv_option
@click.option(
    "--target",
    default="ort-cpu",
    show_default=True,
    type=click.Choice(list(TARGETS)),
    help="Of the default run that a float model is looked at for.",
)
@output_options
def inspect(model: str, csv: str | None, target: str, as_json: bool, quiet: bool, verbose: bool) -> int:
    """Tell what is in MODEL: of a float one what would be quantized and what is in the way, of another how it was."""
    if not model:
        raise click.UsageError("MODEL needs a name.")
    wanted = Wanted(as_json, quiet, csv)
    wanted.check(*_files(model))
    if model == "-" and sys.stdin is None:
        raise QconvError("Standard input is closed.", "pipe the model into it, or name its file.")
    from qconv.analysis import inspect_float, inspect_quantized
    from qconv.ir.files import external_data_files, read_proto, source_of
    from qconv.report import text_inspect

    source = source_of(model)
    raise_exit_on_signals()
    proto = read_proto(source)
    wanted.check(*external_data_files(proto, source))
    found: Any
    text: Callable[..., str]
    if inspect_quantized.is_quantized_file(proto):
        found, text = inspect_quantized.inspect_quantized(source), text_inspect.format_quantized_model
    else:
        found, text = inspect_float.inspect_float(source, target), text_inspect.format_float_model
    wanted.put(found.as_dict(), found.rows, lambda: text(found, verbose=verbose))
    return 0


@click.command(context_settings=WIDTH)
@click.argument("models", nargs=-1, required=True, metavar="MODEL [OTHER]...")
@batch_option
@size_option
@click.option(
    "--rounds", default=24, show_default=True, metavar="N", type=click.IntRange(1), help="Turns that each model gets."
)
@csv_option
@common_options
def benchmark(
    models: tuple[str, ...],
    batch: int | None,
    size: tuple[int, int] | None,
    rounds: int,
    csv: str | None,
    threads: int | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> int:
    """Time MODEL and OTHERs in turns, each against the first, with made-up input."""
    if "-" in models:
        raise click.UsageError(NO_STREAM)
    wanted = Wanted(as_json, quiet, csv)
    wanted.check(*map(Path, models))
    from qconv.report import console as report_console
    from qconv.report import text
    from qconv.runtime import benchmark as timing
    from qconv.runtime import session

    console = report_console.Console(quiet=quiet)
    raise_exit_on_signals()
    try:
        conditions = timing.TimingConditions(threads, batch, size, rounds)
        found = timing.benchmark(models, conditions, version=session.RUNTIME_VERSION, progress=console.progress)
    finally:
        console.close()
    if found.threads > found.cpu.cores:
        console.warn(f"{found.threads} threads share {found.cpu.cores} cores, so they wait for each other.")
    told = found.as_dict()
    wanted.put(told, told["models"], lambda: text.format_benchmark(found, verbose=verbose))
    return 0


ALL_PICTURES = 10**9
TABLES = (".csv", ".npz")

evaluate_options = stack(
    click.option(
        "--images",
        required=True,
        metavar="DIR|FILE",
        help="Pictures: a folder, with a folder a class inside for top-1 and top-5, or a file with one path a line.",
    ),
    click.option(
        "--against",
        metavar="FLOAT",
        help="Also compare with this model: agreement, SQNR, flips and whether they are chance.",
    ),
    click.option(
        "--classes",
        metavar="FILE",
        help="The class folders in output order, one a line.  [default: classes.txt in the folder, or folder names]",
    ),
    click.option(
        "--label-offset", default=0, show_default=True, metavar="N", type=int, help="Added to the place in that list."
    ),
    click.option(
        "--save-predictions",
        metavar="OUT",
        help="Write what was said of each picture: a .csv, or a .npz with all outputs.",
    ),
    click.option("--samples", metavar="N", type=click.IntRange(1), help="Draw so many pictures.  [default: all]"),
    click.option("--seed", metavar="N", type=click.IntRange(0), help="Of that draw.  [default: 0]"),
    click.option("--glob", "pattern", metavar="PATTERN", help="Use only pictures whose name or path matches."),
    click.option("--batch", default=1, show_default=True, metavar="N", type=click.IntRange(1), help="Pictures a run."),
    csv_option,
    preprocessing_options,
    common_options,
)


@click.command(context_settings=WIDTH)
@click.argument("model")
@evaluate_options
def evaluate(
    model: str,
    images: str,
    against: str | None,
    classes: str | None,
    label_offset: int,
    save_predictions: str | None,
    samples: int | None,
    seed: int | None,
    pattern: str | None,
    batch: int,
    threads: int | None,
    csv: str | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> int:
    """How often MODEL is right on labelled pictures, and how near it is to another model, with 95 % intervals."""
    if "" in (images, against, classes, save_predictions):
        raise click.UsageError("--images, --against, --classes and --save-predictions need a name.")
    if seed is not None and samples is None:
        raise click.UsageError("--seed is of the draw that --samples asks for; without it all pictures are used.")
    if "-" in (against, save_predictions):
        raise click.UsageError("only MODEL can be read from a pipe, and only --json can be written to one.")
    out = None if save_predictions is None else Path(save_predictions)
    if out is not None and out.suffix.lower() not in TABLES:
        raise click.UsageError(f"{out} is no table: name a file that ends in {' or '.join(TABLES)}.")
    recipe = Recipe(
        calib=(images,),
        samples=samples or ALL_PICTURES,
        seed=seed or 0,
        glob=pattern,
        batch=batch,
        threads=threads,
        preprocessing=preprocessing_of(options),
    )
    wanted = Wanted(as_json, quiet, csv)
    files = [Path(name) for name in (model, against, classes, images) if name not in (None, "-")]
    wanted.check(*files, written={"the predictions": save_predictions})
    from qconv import storage
    from qconv.analysis import evaluate as measuring
    from qconv.ir.files import source_of
    from qconv.report import console as report_console
    from qconv.report import text

    if out is not None:
        storage.check_output_path(out)
    console = report_console.Console(quiet=quiet)
    raise_exit_on_signals()
    wishes = measuring.EvaluationOptions(
        recipe,
        None if against is None else source_of(against),
        None if classes is None else Path(classes),
        label_offset,
        table=None if out is None else out.suffix.lower(),
    )
    try:
        found = measuring.evaluate(source_of(model), wishes, warn=console.warn, progress=console.progress)
    finally:
        console.close()
    if out is not None:
        assert found.predictions is not None
        storage.write_atomically(
            out, found.predictions.as_npz() if wishes.table == ".npz" else found.predictions.as_csv()
        )
    wanted.put(found.as_dict(), found.rows(), lambda: text.format_evaluation(found, verbose=verbose))
    return 0
