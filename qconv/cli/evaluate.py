"""`qconv evaluate` measures a model on labelled images and against another model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qconv.cli.options import (
    HELP_WIDTH,
    combine_options,
    common_options,
    csv_option,
    preprocessing_options,
)
from qconv.cli.output import OutputOptions
from qconv.cli.recipe_options import make_preprocessing_options
from qconv.config.choices import check_run_options
from qconv.config.data_options import DataOptions
from qconv.reporter import Reporter
from qconv.signals import raise_exit_on_signals

TABLE_SUFFIXES = (".csv", ".npz")

evaluate_options = combine_options(
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


@click.command(context_settings=HELP_WIDTH)
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
    out = _table_of(save_predictions)
    check_run_options(threads)
    data = DataOptions((images,), samples, batch, seed or 0, pattern, make_preprocessing_options(options))
    wanted = OutputOptions(as_json, quiet, csv)
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
        data,
        None if against is None else source_of(against),
        None if classes is None else Path(classes),
        label_offset,
        table=None if out is None else out.suffix.lower(),
        threads=threads,
    )
    try:
        found = measuring.evaluate(source_of(model), wishes, Reporter(console.warn, console.progress))
    finally:
        console.close()
    if out is not None:
        assert found.predictions is not None
        storage.write_atomically(
            out, found.predictions.as_npz() if wishes.table == ".npz" else found.predictions.as_csv()
        )
    wanted.put(found.as_dict(), found.rows(), lambda: text.format_evaluation(found, verbose=verbose))
    return 0


def _table_of(name: str | None) -> Path | None:
    """Where predictions go, a file of a known kind; None for nowhere."""
    out = None if name is None else Path(name)
    if out is not None and out.suffix.lower() not in TABLE_SUFFIXES:
        raise click.UsageError(f"{out} is no table: name a file that ends in {' or '.join(TABLE_SUFFIXES)}.")
    return out
