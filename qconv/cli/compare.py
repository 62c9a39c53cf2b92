"""`qconv compare` compares a quantized model with its float model layer by layer."""

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
    report_option,
)
from qconv.cli.output import OutputOptions, check_report_path, format_command_line
from qconv.cli.recipe_options import (
    make_preprocessing_options,
)
from qconv.config.choices import check_run_options
from qconv.config.data_options import DataOptions
from qconv.reporter import Reporter
from qconv.signals import raise_exit_on_signals

COMPARED_IMAGES = 64

compare_options = combine_options(
    click.option(
        "--images", required=True, metavar="DIR|FILE", help="Pictures: a folder, or a file with one path a line."
    ),
    click.option(
        "--samples",
        default=COMPARED_IMAGES,
        show_default=True,
        metavar="N",
        type=click.IntRange(1),
        help="Pictures to use; all if fewer.",
    ),
    click.option("--seed", default=0, show_default=True, metavar="N", type=click.IntRange(0), help="Of their draw."),
    click.option("--glob", "pattern", metavar="PATTERN", help="Use only pictures whose name or path matches."),
    click.option("--batch", default=1, show_default=True, metavar="N", type=click.IntRange(1), help="Pictures a run."),
    csv_option,
    report_option,
    preprocessing_options,
    common_options,
)


@click.command(context_settings=HELP_WIDTH)
@click.argument("float_model", metavar="FLOAT")
@click.argument("model", metavar="QUANT")
@compare_options
def compare(
    float_model: str,
    model: str,
    images: str,
    samples: int,
    seed: int,
    pattern: str | None,
    batch: int,
    threads: int | None,
    csv: str | None,
    report: str | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> int:
    """Compare QUANT with FLOAT layer by layer: the error that each receives, adds, and causes at the outputs."""
    if "-" in (float_model, model):
        raise click.UsageError("models are read several times: name their files.")
    if "" in (float_model, model, images):
        raise click.UsageError("FLOAT, QUANT and --images need a name.")
    wanted = OutputOptions(as_json, quiet, csv)
    wanted.check(*map(Path, (float_model, model, images)))
    check_run_options(threads)
    data = DataOptions((images,), samples, batch, seed, pattern, make_preprocessing_options(options))
    from qconv.analysis import compare as analysis_compare
    from qconv.ir.files import source_of
    from qconv.report import console as report_console
    from qconv.report import text

    sources = source_of(float_model), source_of(model)
    place = check_report_path(report, sources, [images], {"the table": csv})
    console = report_console.Console(quiet=quiet)
    reporter = Reporter(console.warn, console.progress)
    raise_exit_on_signals()
    try:
        seen = analysis_compare.compare_on_images(*sources, data, reporter, threads)
    finally:
        console.close()
    if place is not None:
        from qconv import storage
        from qconv.report import html, pages

        storage.write_atomically(
            place, html.render_page(pages.make_compare_page(seen, *sources, format_command_line(), reporter.warnings))
        )
    found = seen.compared
    rows = [row.as_dict() for row in found.worst_first]
    wanted.put(found.as_dict(), rows, lambda: text.format_comparison(found, verbose=verbose))
    return 0
